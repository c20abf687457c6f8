// The backward launcher: which kernel runs when.
#include "backward.h"
#include "operand.cuh"

namespace rnn_ext::cuda {

cudaError_t backward_device(BackwardDevice* device) {
  int id = 0, major = 0, minor = 0, smem = 0;
  cudaError_t error = cudaGetDevice(&id);
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, id);
  };
  get(&major, cudaDevAttrComputeCapabilityMajor);
  get(&minor, cudaDevAttrComputeCapabilityMinor);
  get(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  get(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device->compute_capability = 10 * major + minor;
  device->smem_per_block = smem;
  return error;
}

template <typename T>
BackwardCase backward_case(const BackwardParams<T>& p) {
  BackwardCase c = {p.batch,
                    p.input_size,
                    p.hidden_size,
                    BackwardDtypeOf<T>::value,
                    p.grad_input != nullptr,
                    p.grad_hx != nullptr,
                    p.grad_weight_ih != nullptr,
                    p.grad_weight_hh != nullptr,
                    p.grad_bias != nullptr,
                    16};
  const auto need = [&](bool needed, const Matrix<T>& m, int64_t rows, int64_t columns) {
    if (needed && m.data != nullptr) c.vector_bytes = std::min(c.vector_bytes, vector_bytes(m, rows, columns, true));
  };
  need(c.grad_input, p.weight_ih, p.hidden_size, p.input_size);
  need(c.grad_hx, p.weight_hh, p.hidden_size, p.hidden_size);
  need(c.grad_weight_ih, p.input, p.batch, p.input_size);
  need(c.grad_weight_hh, p.hx, p.batch, p.hidden_size);
  return c;
}

// Up to kMaxGemvBatch rows there is no reuse for tiles, and the plan stays empty. Beyond, plan_backward chooses among
// the table's kernels.
template <typename T>
cudaError_t plan_rnn_cell_backward(const BackwardParams<T>& p, BackwardPlan* plan) {
  *plan = {};
  if (p.batch <= kMaxGemvBatch) return cudaSuccess;
  BackwardDevice device;
  const cudaError_t error = backward_device(&device);
  if (error == cudaSuccess) *plan = plan_backward(backward_case(p), device);
  return error;
}

template <typename T>
cudaError_t rnn_cell_backward(const BackwardParams<T>& p, const BackwardPlan& plan, void* workspace,
                              cudaStream_t stream) {
  return plan.kernel < 0 ? launch_backward_gemv(p, stream) : launch_backward_tiled(p, plan, workspace, stream);
}

#define RNN_EXT_INSTANTIATE(T)                                                          \
  template BackwardCase backward_case(const BackwardParams<T>&);                        \
  template cudaError_t plan_rnn_cell_backward(const BackwardParams<T>&, BackwardPlan*); \
  template cudaError_t rnn_cell_backward(const BackwardParams<T>&, const BackwardPlan&, void*, cudaStream_t)
RNN_EXT_INSTANTIATE(float);
RNN_EXT_INSTANTIATE(double);
RNN_EXT_INSTANTIATE(__half);
RNN_EXT_INSTANTIATE(__nv_bfloat16);
#undef RNN_EXT_INSTANTIATE

}  // namespace rnn_ext::cuda
