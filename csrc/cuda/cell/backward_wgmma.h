// The launcher of backward_wgmma.cuh, apart from it: the kernels take long to compile.
#pragma once
#include <cuda_runtime_api.h>

#include "cell/params.h"
#include "cuda/plan/cell_backward.h"

namespace rnn_ext::cuda {

template <typename T>
constexpr bool kBackwardWgmmaComputes = sizeof(T) == 2;

// Whether the kernel can compute this: of what is asked for and of what it is made of, the inner strides are 1 and all
// rows start at multiples of 16 bytes; and there is something to sum up.
template <typename T>
bool backward_wgmma_takes(const BackwardParams<T>& p);

// With output tiles 128 high and BN = 256 or 128 wide, for what it takes, on sm_90a. `blocks`: whole clusters, of
// which each takes tile after tile. `workspace`: 16-byte aligned, of BackwardWgmmaWorkspace's size, and this call's
// alone until its kernels have run.
template <typename T, int BN>
cudaError_t launch_backward_wgmma(const BackwardParams<T>& p, int64_t blocks, void* workspace, cudaStream_t stream);

}  // namespace rnn_ext::cuda
