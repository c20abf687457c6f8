// The launcher of backward_wgmma.cuh, apart from it: the kernels take long to compile.
#pragma once
#include <cuda_runtime_api.h>

#include "../params.h"

namespace rnn_ext::cuda {

template <typename T>
constexpr bool kBackwardWgmmaComputes = sizeof(T) == 2;

// Whether the kernel can compute this: of what is asked for and of what it is made of, the inner strides are 1 and all
// rows start at multiples of 16 bytes; and there is something to sum up.
template <typename T>
bool backward_wgmma_takes(const BackwardParams<T>& p);

// dz in 16-bit elements, and after it what backward_dz sums up for the bias.
struct BackwardWgmmaWorkspace {
  int64_t dz_stride, sums, bytes;  // from row to row, in elements; where the sums start; all of it

  constexpr BackwardWgmmaWorkspace(int64_t batch, int64_t hidden_size, bool grad_bias)
      : dz_stride((hidden_size + 7) / 8 * 8),
        sums(batch * dz_stride * 2),
        bytes(sums + (grad_bias ? (batch + 31) / 32 * hidden_size * 4 : 0)) {}
};

// With output tiles 128 high and BN = 256 or 128 wide, for what it takes, on sm_90a. `workspace`: 16-byte aligned, of
// BackwardWgmmaWorkspace's size, and this call's alone until its kernels have run.
template <typename T, int BN>
cudaError_t launch_backward_wgmma(const BackwardParams<T>& p, void* workspace, cudaStream_t stream);

}  // namespace rnn_ext::cuda
