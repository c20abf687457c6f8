// The forward launcher: from a plan to its kernel.
#include "forward.cuh"
#include "rnn_cell_cuda.h"

namespace rnn_ext::cuda {

template <typename T>
ForwardCase forward_case(const ForwardParams<T>& p, bool tf32) {
  return {p.batch, p.input_size, p.hidden_size, p.hx.data != nullptr, kDtype<T>, common_vector_bytes(p), tf32};
}

template <typename T>
cudaError_t rnn_cell_forward(const ForwardParams<T>& p, const ForwardPlan& plan, void* workspace, uint32_t* counters,
                             cudaStream_t stream) {
  if (p.batch == 0 || p.hidden_size == 0) return cudaSuccess;
  return plan.family == ForwardPlan::Family::kGemv ? launch_gemv(p, plan, stream)
                                                   : launch_tiled(p, plan, workspace, counters, stream);
}

#define RNN_EXT_INSTANTIATE(T)                                      \
  template ForwardCase forward_case(const ForwardParams<T>&, bool); \
  template cudaError_t rnn_cell_forward(const ForwardParams<T>&, const ForwardPlan&, void*, uint32_t*, cudaStream_t);
RNN_EXT_INSTANTIATE(float)
RNN_EXT_INSTANTIATE(double)
RNN_EXT_INSTANTIATE(__half)
RNN_EXT_INSTANTIATE(__nv_bfloat16)
#undef RNN_EXT_INSTANTIATE

}  // namespace rnn_ext::cuda
