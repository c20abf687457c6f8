// The CUDA launchers: one entry each way, for float, double, __half and __nv_bfloat16. They launch on the stream and
// check the launch; what the driver has against a tensor map is a std::runtime_error. They neither allocate nor
// synchronise, and they know nothing of torch; where a plan asks for a workspace, the caller brings it.
#pragma once
#include <cuda_runtime_api.h>

#include "cell/params.h"
#include "cuda/plan/cell_backward.h"
#include "cuda/plan/cell_forward.h"

namespace rnn_ext::cuda {

// What plan_forward chooses a kernel for: the params, and which precisions the user allows for fp32.
template <typename T>
ForwardCase forward_case(const ForwardParams<T>& p, bool tf32, bool split_tf32);

// Runs a plan for this very case. `workspace` holds plan.workspace_bytes, aligned to 16, and, where the plan asks for
// them, cuBLAS's products; `counters` kMaxCounters that are zero, and are zero again afterwards. Both are of this
// launch alone while it runs, and null where there is no workspace_bytes.
template <typename T>
cudaError_t rnn_cell_forward(const ForwardParams<T>& p, const ForwardPlan& plan, void* workspace, uint32_t* counters,
                             cudaStream_t stream);

// What plan_backward chooses a kernel for.
template <typename T>
BackwardCase backward_case(const BackwardParams<T>& p);

// Runs a plan for this very case. `workspace`: plan.workspace_bytes, 16-byte aligned, uninitialised, and this call's
// alone until its kernels have run.
template <typename T>
cudaError_t rnn_cell_backward(const BackwardParams<T>& p, const BackwardPlan& plan, void* workspace,
                              cudaStream_t stream);

}  // namespace rnn_ext::cuda
