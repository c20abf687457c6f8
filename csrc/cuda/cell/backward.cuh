// Two of the backward's kernel families, each instantiated in instances/, a file a dtype, by the macros below; the
// third is in backward_wgmma.h. cell_backward.h says which of them runs when.
#pragma once
#include "cuda/blocks/grad_z.cuh"
#include "cuda/cell/launch.h"

namespace rnn_ext::cuda {

template <typename T>
DzSources<T> dz_sources(const BackwardParams<T>& p) {
  return {p.grad_output, p.output, p.weights.nonlinearity, p.batch, p.weights.hidden_size};
}

// One of the two sides of a step: the input's (x, W) or the hidden state's (h, U), of as many columns.
template <typename T, class M = Matrix<T>>
struct BackwardSide {
  M weight, operand;              // W or U; x or h, whose data is null if h is absent
  T *grad_operand, *grad_weight;  // contiguous; null: not asked for
  int64_t columns;
};

template <typename T>
BackwardSide<T> input_side(const BackwardParams<T>& p) {
  return {p.weights.weight_ih, p.input, p.grad_input, p.grad_weight_ih, p.weights.input_size};
}
template <typename T>
BackwardSide<T> hidden_side(const BackwardParams<T>& p) {
  return {p.weights.weight_hh, p.hx, p.grad_hx, p.grad_weight_hh, p.weights.hidden_size};
}

template <typename T>
cudaError_t launch_backward_gemv(const BackwardParams<T>& p, const BackwardPlan& plan, cudaStream_t stream);

template <typename T>
cudaError_t launch_backward_tiled(const BackwardParams<T>& p, const BackwardPlan& plan, void* workspace,
                                  cudaStream_t stream);

}  // namespace rnn_ext::cuda

#define RNN_EXT_INSTANTIATE_BACKWARD_GEMV(T) \
  template cudaError_t rnn_ext::cuda::launch_backward_gemv(const BackwardParams<T>&, const BackwardPlan&, cudaStream_t);
#define RNN_EXT_INSTANTIATE_BACKWARD_TILED(T)                                                                     \
  template cudaError_t rnn_ext::cuda::launch_backward_tiled(const BackwardParams<T>&, const BackwardPlan&, void*, \
                                                            cudaStream_t);
