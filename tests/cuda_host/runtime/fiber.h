// One stack per CUDA thread and the switch between them, with what the sanitizers must be told about it.
//
// A switch carries no happens-before edge: for ThreadSanitizer every CUDA thread is a thread of its own, and only the
// edges of sanitizers.h order them.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) && !defined(EMU_UCONTEXT)
#define EMU_UCONTEXT  // about twenty times slower than the ten instructions for x86-64, with the same results
#endif
#ifdef EMU_UCONTEXT
#include <ucontext.h>
#endif

namespace emu {

struct Fiber {
#ifdef EMU_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;
#endif
  const void* stack_low;
  size_t stack_size;
  void* asan_fake_stack;
  void* tsan_fiber;
};

// Makes `fiber` the operating system's own thread and stack, from which the scheduler runs.
void adopt_thread(Fiber& fiber);

// Prepares `fiber`, zeroed before its first use, to run `entry`, which must call entered() first and never return. What
// ThreadSanitizer knows about it stays until it is destroyed.
void create_fiber(Fiber& fiber, char* stack_low, size_t stack_size, void (*entry)(), const char* name);
void entered(Fiber& scheduler);
void destroy_fiber(Fiber& fiber);

// Returns when something switches back to `from`; never if `from` ends here.
void switch_fiber(Fiber& from, Fiber& to, bool from_ends = false);

}  // namespace emu
