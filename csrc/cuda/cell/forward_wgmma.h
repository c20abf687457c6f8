// The launcher of forward_wgmma.cuh, apart from it: the kernels take long to compile.
#pragma once
#include <cuda_runtime_api.h>

#include "cell/params.h"
#include "cuda/plan/cell_forward.h"

namespace rnn_ext::cuda {

// Whether TMA can take all operands and the output: the inner strides are 1, all rows start at multiples of 16 bytes,
// and there is something to sum up.
template <typename T>
bool forward_wgmma_takes(const ForwardParams<T>& p);

// For what it takes, on sm_90a.
template <typename T>
cudaError_t launch_forward_wgmma(const ForwardParams<T>& p, const ForwardPlan& plan, cudaStream_t stream);

}  // namespace rnn_ext::cuda
