// The CUDA launchers: one entry each way, for float, double, __half and __nv_bfloat16. They choose the kernel,
// launch it on the stream and check the launch. They neither allocate nor synchronise, and they know nothing of torch.
#pragma once
#include <cuda_runtime_api.h>

#include "../params.h"

namespace rnn_ext::cuda {

template <typename T>
cudaError_t rnn_cell_forward(const ForwardParams<T>& p, cudaStream_t stream);

template <typename T>
cudaError_t rnn_cell_backward(const BackwardParams<T>& p, cudaStream_t stream);

}  // namespace rnn_ext::cuda
