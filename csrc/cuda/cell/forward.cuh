// Two of the forward's kernel families, declared apart from their kernels, which take long to compile; the third is in
// forward_wgmma.h. cell_forward.h says which of them runs when.
#pragma once
#include "cell/params.h"
#include "cuda/blocks/operand.cuh"
#include "cuda/plan/cell_forward.h"

namespace rnn_ext::cuda {

// What all operands are aligned to, with unit stride along K, as in Operand.
template <typename T>
int common_vector_bytes(const ForwardParams<T>& p) {
  const int64_t B = p.batch, I = p.weights.input_size, H = p.weights.hidden_size;
  int bytes = min(vector_bytes(p.input, B, I, true), vector_bytes(p.weights.weight_ih, H, I, true));
  if (p.hx.data != nullptr) {
    bytes = min(bytes, min(vector_bytes(p.hx, B, H, true), vector_bytes(p.weights.weight_hh, H, H, true)));
  }
  return bytes;
}

// Instantiated in instances/, a file a dtype, by the macros below.
template <typename T>
cudaError_t launch_forward_gemv(const ForwardParams<T>& p, const ForwardPlan& plan, cudaStream_t stream);
template <typename T>
cudaError_t launch_forward_tiled(const ForwardParams<T>& p, const ForwardPlan& plan, void* workspace,
                                 uint32_t* counters, cudaStream_t stream);

// The last of the launches where cuBLAS multiplies, in forward_cublas.cu. `workspace`: its products.
template <typename T>
cudaError_t launch_forward_cublas(const ForwardParams<T>& p, const void* workspace, cudaStream_t stream);

}  // namespace rnn_ext::cuda

#define RNN_EXT_INSTANTIATE_FORWARD_GEMV(T) \
  template cudaError_t rnn_ext::cuda::launch_forward_gemv(const ForwardParams<T>&, const ForwardPlan&, cudaStream_t);
#define RNN_EXT_INSTANTIATE_FORWARD_TILED(T)                                                                   \
  template cudaError_t rnn_ext::cuda::launch_forward_tiled(const ForwardParams<T>&, const ForwardPlan&, void*, \
                                                           uint32_t*, cudaStream_t);
