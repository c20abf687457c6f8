// The backward launcher: from a plan to its kernel.
#include "cuda/blocks/operand.cuh"
#include "cuda/cell/backward.cuh"
#include "cuda/cell/backward_wgmma.h"

namespace rnn_ext::cuda {

template <typename T>
BackwardCase backward_case(const BackwardParams<T>& p) {
  BackwardCase c;
  c.batch = p.batch;
  c.input_size = p.weights.input_size;
  c.hidden_size = p.weights.hidden_size;
  c.dtype = kDtype<T>;
  c.grad_input = p.grad_input != nullptr;
  c.grad_hx = p.grad_hx != nullptr;
  c.grad_weight_ih = p.grad_weight_ih != nullptr;
  c.grad_weight_hh = p.grad_weight_hh != nullptr;
  c.grad_bias = p.grad_bias != nullptr;
  c.vector_bytes = 16;
  c.tensor_maps = backward_wgmma_takes(p);
  const auto need = [&](const T* gradient, const Matrix<T>& m, int64_t rows, int64_t columns) {
    if (gradient == nullptr || m.data == nullptr) return;
    c.vector_bytes = std::min(c.vector_bytes, vector_bytes(m, rows, columns, true));
  };
  for (const BackwardSide<T>& s : {input_side(p), hidden_side(p)}) {
    need(s.grad_operand, s.weight, p.weights.hidden_size, s.columns);
    need(s.grad_weight, s.operand, p.batch, s.columns);
  }
  return c;
}

template <typename T>
cudaError_t rnn_cell_backward(const BackwardParams<T>& p, const BackwardPlan& plan, void* workspace,
                              cudaStream_t stream) {
  if (plan.blocks == 0) return cudaSuccess;
  switch (plan.family) {
    case BackwardPlan::Family::kGemv:
      return launch_backward_gemv(p, plan, stream);
    case BackwardPlan::Family::kTiled:
      return launch_backward_tiled(p, plan, workspace, stream);
    case BackwardPlan::Family::kWgmma:
      return kBackwardWgmma[plan.kernel].bn == 256 ? launch_backward_wgmma<T, 256>(p, plan.blocks, workspace, stream)
                                                   : launch_backward_wgmma<T, 128>(p, plan.blocks, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

#define RNN_EXT_INSTANTIATE(T)                                   \
  template BackwardCase backward_case(const BackwardParams<T>&); \
  template cudaError_t rnn_cell_backward(const BackwardParams<T>&, const BackwardPlan&, void*, cudaStream_t);
RNN_EXT_FOR_EACH_DTYPE(RNN_EXT_INSTANTIATE)
#undef RNN_EXT_INSTANTIATE

}  // namespace rnn_ext::cuda
