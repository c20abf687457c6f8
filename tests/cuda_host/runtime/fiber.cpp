#include "fiber.h"

#include <cstdint>

#include "sanitizers.h"
#ifdef EMU_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

#ifndef EMU_UCONTEXT
// Saves the callee-saved registers on the old stack and its pointer in *save, then restores those of the new one.
__attribute__((naked, noinline)) static void swap_stacks(void** /*save*/, void* /*load*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
constexpr int kSavedRegisters = 6;
#endif

void adopt_thread(Fiber& fiber) {
  fiber = Fiber{};  // AddressSanitizer reports this stack's bounds at the first switch away from it
#ifdef EMU_TSAN
  fiber.tsan_fiber = __tsan_get_current_fiber();
#endif
}

void create_fiber(Fiber& fiber, char* stack_low, size_t stack_size, void (*entry)(),
                  [[maybe_unused]] const char* name) {
  fiber.stack_low = stack_low;
  fiber.stack_size = stack_size;
  fiber.asan_fake_stack = nullptr;
#ifdef EMU_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_low;
  fiber.context.uc_stack.ss_size = stack_size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // As if `entry` had just been called from nowhere: its return address is null, which also ends a debugger's walk.
  void** top = reinterpret_cast<void**>(stack_low + stack_size - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - kSavedRegisters;
#endif
#ifdef EMU_TSAN
  if (fiber.tsan_fiber == nullptr) fiber.tsan_fiber = __tsan_create_fiber(0);
  __tsan_set_fiber_name(fiber.tsan_fiber, name);
#endif
}

void destroy_fiber([[maybe_unused]] Fiber& fiber) {
#ifdef EMU_TSAN
  void* const me = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
  __tsan_switch_to_fiber(me, 0);  // with an edge, unlike all others: what the fiber did lies before what follows
  __tsan_destroy_fiber(fiber.tsan_fiber);
  fiber.tsan_fiber = nullptr;
#endif
}

void entered([[maybe_unused]] Fiber& scheduler) {
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_low, &scheduler.stack_size);
#endif
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool from_ends) {
#ifdef EMU_ASAN
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.asan_fake_stack, to.stack_low, to.stack_size);
#endif
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMU_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

}  // namespace emu
