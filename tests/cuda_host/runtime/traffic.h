// Memory accesses that the runtime makes on the kernel's behalf. Compiled with the sanitizers, unlike the runtime: what
// an asynchronous copy reads and writes is checked as if the kernel had done it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emu::traffic {

// Copies `valid` bytes and fills up to `bytes` with zero, as cp.async.
void copy_with_zero_fill(char* to, const char* from, int bytes, int valid);

// The bytes between issue and arrival: NaN in every floating-point format.
void scribble(char* p, size_t bytes);

void fill(char* p, char value, size_t bytes);

uint16_t load16(const void* p);
uint32_t load32(const void* p);
uint64_t load64(const void* p);
void store16(void* p, uint16_t v);
void store32(void* p, uint32_t v);
void store64(void* p, uint64_t v);

}  // namespace emu::traffic
