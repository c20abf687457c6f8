// The threads' memory for the kernels' blocks.
#include <c10/core/impl/alloc_cpu.h>

#include <memory>

#include "cpu/kernels.h"

namespace rnn_ext::cpu {

void* scratch_memory() {
  struct Free {
    void operator()(void* data) const { c10::free_cpu(data); }
  };
  thread_local const std::unique_ptr<void, Free> memory(c10::alloc_cpu(kScratchBytes));
  return memory.get();
}

}  // namespace rnn_ext::cpu
