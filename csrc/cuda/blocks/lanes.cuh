// Sums over the lanes of a warp.
#pragma once
#include "cuda/ptx/launch.cuh"

namespace rnn_ext::cuda {

template <typename Acc, int kSize>
struct LaneSums {
  Acc v[kSize];
};

// The sums of N values over each kLanes neighbouring lanes, in an order that depends on nothing else; both are powers
// of two. Each step halves what a lane still has to add: lane l of them returns the sums of N / kLanes values from
// value l * N / kLanes on, or of that one where values are fewer than lanes.
template <int kLanes, int N, typename Acc>
__device__ __forceinline__ auto sum_over_lanes(const Acc (&values)[N]) {
  constexpr int kOffset = kLanes / 2;
  if constexpr (kLanes == 1) {
    LaneSums<Acc, N> sums;
#pragma unroll
    for (int i = 0; i < N; ++i) sums.v[i] = values[i];
    return sums;
  } else if constexpr (N == 1) {
    const Acc sum[1] = {values[0] + __shfl_xor_sync(0xffffffffu, values[0], kOffset)};
    return sum_over_lanes<kOffset>(sum);
  } else {
    const bool upper = (threadIdx.x & kOffset) != 0;
    Acc left[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const Acc low = values[i], high = values[i + N / 2];
      left[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kOffset);
    }
    return sum_over_lanes<kOffset>(left);
  }
}

}  // namespace rnn_ext::cuda
