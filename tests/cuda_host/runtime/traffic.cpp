#include "traffic.h"

namespace emu::traffic {

void copy_with_zero_fill(char* to, const char* from, int bytes, int valid) {
  // Whole words where possible: a byte at a time would take the shadow memory four times as long.
  int i = 0;
  for (; i + 4 <= valid; i += 4) store32(to + i, load32(from + i));
  for (; i < valid; ++i) to[i] = from[i];
  for (; i % 4 != 0; ++i) to[i] = 0;
  for (; i < bytes; i += 4) store32(to + i, 0);
}

void scribble(char* p, size_t bytes) {
  size_t i = 0;
  for (; i + 4 <= bytes; i += 4) store32(p + i, ~0u);
  for (; i < bytes; ++i) p[i] = '\xff';
}

void fill(char* p, char value, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) p[i] = value;
}

uint16_t load16(const void* p) { return *static_cast<const uint16_t*>(p); }
uint32_t load32(const void* p) { return *static_cast<const uint32_t*>(p); }
uint64_t load64(const void* p) { return *static_cast<const uint64_t*>(p); }
void store16(void* p, uint16_t v) { *static_cast<uint16_t*>(p) = v; }
void store32(void* p, uint32_t v) { *static_cast<uint32_t*>(p) = v; }
void store64(void* p, uint64_t v) { *static_cast<uint64_t*>(p) = v; }

}  // namespace emu::traffic
