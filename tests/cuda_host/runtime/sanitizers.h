// What the runtime tells AddressSanitizer and ThreadSanitizer; nothing without them.
//
// The runtime itself is compiled without -fsanitize, because its bookkeeping is not the kernel's memory traffic. So the
// build says with EMU_ASAN or EMU_TSAN which sanitizer the rest of the program has.
#pragma once
#include <cstddef>

#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#endif
#ifdef EMU_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace emu {

#ifdef EMU_TSAN
constexpr bool kTsan = true;
#else
constexpr bool kTsan = false;
#endif

// A point through which one thread's writes become visible to another: the runtime uses one wherever CUDA promises that
// order, and nowhere else.
class Edge {
 public:
#ifdef EMU_TSAN
  void release() { __tsan_release(this); }
  void acquire() { __tsan_acquire(this); }
#else
  void release() {}
  void acquire() {}
#endif

 private:
  char anchor_ = 0;
};

// As long as it lives, what happens is another thread's doing. It comes after what the scheduler, whose fiber must be
// given, knows of; a fiber made by a CUDA thread would come after all that this thread has done. To make one takes half
// a millisecond: with `lasting`, where it is kept, the same thread serves again, and comes after all that it has seen.
class AnotherThread {
 public:
#ifdef EMU_TSAN
  AnotherThread(void* scheduler, const char* name, void** lasting = nullptr)
      : caller_(__tsan_get_current_fiber()),
        fiber_(lasting != nullptr ? *lasting : nullptr),
        lasts_(lasting != nullptr) {
    if (fiber_ == nullptr) {
      __tsan_switch_to_fiber(scheduler, __tsan_switch_to_fiber_no_sync);
      fiber_ = __tsan_create_fiber(0);
      if (lasts_) *lasting = fiber_;
    }
    __tsan_set_fiber_name(fiber_, name);
    __tsan_switch_to_fiber(fiber_, __tsan_switch_to_fiber_no_sync);
  }
  ~AnotherThread() {
    __tsan_switch_to_fiber(caller_, __tsan_switch_to_fiber_no_sync);
    if (!lasts_) __tsan_destroy_fiber(fiber_);
  }
#else
  AnotherThread(void*, const char*, void** = nullptr) {}
#endif
  AnotherThread(const AnotherThread&) = delete;

#ifdef EMU_TSAN
 private:
  void *caller_, *fiber_;
  bool lasts_;
#endif
};

inline void forbid_access([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#ifdef EMU_ASAN
  __asan_poison_memory_region(p, bytes);
#endif
}

inline void allow_access([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#ifdef EMU_ASAN
  __asan_unpoison_memory_region(p, bytes);
#endif
}

}  // namespace emu
