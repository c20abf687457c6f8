// Work shared out to threads.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "cpu/isa.h"

namespace rnn_ext::cpu {

// Multiply-adds up to which one thread does the work: about 5 µs. Threads that spin take 1 µs to start, but those that
// have gone to sleep, after milliseconds without work, take 100 µs and now and then milliseconds.
inline int64_t serial_work() { return isa() == Isa::kDefault ? 1 << 16 : 1 << 18; }

// How a loop over 0..size is shared out: in tiles, of which a thread takes grain at least; all to one thread where
// grain is 0.
struct Schedule {
  int64_t size = 0, tile = 1, tiles = 0, grain = 0;

  Schedule() = default;
  // Several threads where the multiply-adds (each, of one element) are worth it.
  Schedule(int64_t size, int64_t tile, int64_t multiply_adds_each)
      : size(size), tile(tile), tiles((size + tile - 1) / tile) {
    const int64_t work = size * multiply_adds_each;
    if (work > serial_work()) grain = std::max<int64_t>(1, serial_work() / 2 / (work / tiles + 1));
  }

  // At most.
  int64_t threads() const {
    return grain == 0 ? 1 : std::min<int64_t>(at::get_num_threads(), (tiles + grain - 1) / grain);
  }
};

// Calls f(begin, end) on runs of 0..size, whole tiles but for the end.
template <typename F>
void parallel_runs(const Schedule& schedule, const F& f) {
  if (schedule.size == 0) return;
  if (schedule.grain == 0) return f(0, schedule.size);
  at::parallel_for(0, schedule.tiles, schedule.grain, [&](int64_t begin, int64_t end) {
    f(begin * schedule.tile, std::min(end * schedule.tile, schedule.size));
  });
}

}  // namespace rnn_ext::cpu
