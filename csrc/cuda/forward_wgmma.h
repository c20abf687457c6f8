// The launcher of forward_wgmma.cuh, apart from it: the kernels take long to compile.
#pragma once
#include <cuda_runtime_api.h>

#include "../params.h"

namespace rnn_ext::cuda {

// Not double; and not float in the widest tiles, whose two sums an element no thread has the registers for.
template <typename T, int BN>
constexpr bool kForwardWgmmaComputes = sizeof(T) == 2 || (sizeof(T) == 4 && BN <= 128);

// Whether the copy engine can take all operands and the output: the inner strides are 1, all rows start at multiples of
// 16 bytes, and there is something to sum up.
template <typename T>
bool forward_wgmma_takes(const ForwardParams<T>& p);

// With output tiles 128 high and BN = 256, 128 or 64 wide, for what it takes, on sm_90a. `blocks`: whole clusters, of
// which each takes tile after tile.
template <typename T, int BN>
cudaError_t launch_forward_wgmma(const ForwardParams<T>& p, int64_t blocks, cudaStream_t stream);

}  // namespace rnn_ext::cuda
