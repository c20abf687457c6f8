#include "cpu/sequence/team.h"

#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rnn_ext::cpu {

void Team::wait(int member) {
  if (flags_.empty()) return;
  constexpr int kPauses = 2000;
  const int64_t arrivals = flags_[member].arrivals.load(std::memory_order_relaxed) + 1;
  flags_[member].arrivals.store(arrivals, std::memory_order_release);
  for (const Flag& flag : flags_) {
    for (int tries = 0; flag.arrivals.load(std::memory_order_acquire) < arrivals; ++tries) {
      if (tries > kPauses) {
        std::this_thread::yield();
      } else {
#if defined(__x86_64__)
        _mm_pause();
#endif
      }
    }
  }
}

}  // namespace rnn_ext::cpu
