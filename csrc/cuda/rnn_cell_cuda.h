// The CUDA launchers: one entry each way, for float, double, __half and __nv_bfloat16. They choose the kernel,
// launch it on the stream and check the launch. They neither allocate nor synchronise, and they know nothing of torch;
// where the backward's plan asks for a workspace, the caller brings it.
#pragma once
#include <cuda_runtime_api.h>

#include "../params.h"
#include "backward_plan.h"

namespace rnn_ext::cuda {

template <typename T>
cudaError_t rnn_cell_forward(const ForwardParams<T>& p, cudaStream_t stream);

// `workspace`: plan.workspace_bytes, 16-byte aligned, uninitialised, and this call's alone until its kernels have run.
template <typename T>
cudaError_t plan_rnn_cell_backward(const BackwardParams<T>& p, BackwardPlan* plan);
template <typename T>
cudaError_t rnn_cell_backward(const BackwardParams<T>& p, const BackwardPlan& plan, void* workspace,
                              cudaStream_t stream);

}  // namespace rnn_ext::cuda
