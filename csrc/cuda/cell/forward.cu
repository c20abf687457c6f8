// The forward launcher: from a plan to its kernel.
#include "cuda/cell/forward.cuh"
#include "cuda/cell/forward_wgmma.h"
#include "cuda/cell/launch.h"

namespace rnn_ext::cuda {

template <typename T>
ForwardCase forward_case(const ForwardParams<T>& p, bool tf32, bool split_tf32) {
  ForwardCase c;
  c.batch = p.batch;
  c.input_size = p.weights.input_size;
  c.hidden_size = p.weights.hidden_size;
  c.hx = p.hx.data != nullptr;
  c.dtype = kDtype<T>;
  c.vector_bytes = common_vector_bytes(p);
  c.tensor_maps = forward_wgmma_takes(p);
  c.tf32 = tf32;
  c.split_tf32 = split_tf32;
  return c;
}

template <typename T>
cudaError_t rnn_cell_forward(const ForwardParams<T>& p, const ForwardPlan& plan, void* workspace, uint32_t* counters,
                             cudaStream_t stream) {
  if (p.batch == 0 || p.weights.hidden_size == 0) return cudaSuccess;
  switch (plan.family) {
    case ForwardPlan::Family::kGemv:
      return launch_forward_gemv(p, plan, stream);
    case ForwardPlan::Family::kTiled:
      return launch_forward_tiled(p, plan, workspace, counters, stream);
    case ForwardPlan::Family::kWgmma:
      return launch_forward_wgmma(p, plan, stream);
    case ForwardPlan::Family::kCublas:
      return launch_forward_cublas(p, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

#define RNN_EXT_INSTANTIATE(T)                                            \
  template ForwardCase forward_case(const ForwardParams<T>&, bool, bool); \
  template cudaError_t rnn_cell_forward(const ForwardParams<T>&, const ForwardPlan&, void*, uint32_t*, cudaStream_t);
RNN_EXT_FOR_EACH_DTYPE(RNN_EXT_INSTANTIATE)
#undef RNN_EXT_INSTANTIATE

}  // namespace rnn_ext::cuda
