// Two of the backward's kernel families, each compiled in files of its own; the third is in backward_wgmma.h.
// backward_plan.h says which of them runs when.
#pragma once
#include "rnn_cell_cuda.h"

namespace rnn_ext::cuda {

template <typename T>
cudaError_t launch_backward_gemv(const BackwardParams<T>& p, const BackwardPlan& plan, cudaStream_t stream);

template <typename T>
cudaError_t launch_backward_tiled(const BackwardParams<T>& p, const BackwardPlan& plan, void* workspace,
                                  cudaStream_t stream);

}  // namespace rnn_ext::cuda
