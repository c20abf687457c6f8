// The forward cell where cuBLAS multiplies: what is left to do with x Wᵀ and h Uᵀ, which stand in memory in the
// accumulator's precision. output = f(x Wᵀ + h Uᵀ + b_ih + b_hh), a column a thread; bound by memory.
#pragma once
#include "cuda/blocks/epilogue.cuh"
#include "cuda/cell/forward.cuh"

namespace rnn_ext::cuda {

// ---- kernel ---------------------------------------------------------------------------------------------------------

constexpr int kCublasThreads = 256, kCublasRows = 8;  // of a block; rows a block's threads have in flight

template <typename T>
struct ForwardCublasParams {
  const Accumulator<T>* products[2];  // (B, H), contiguous; the second is null if h is absent
  const T *bias_ih, *bias_hh;
  T* output;
  int64_t batch, hidden_size;
  Nonlinearity nonlinearity;
};

template <typename T>
__global__ void __launch_bounds__(kCublasThreads) forward_cublas(ForwardCublasParams<T> p) {
  using Acc = Accumulator<T>;
  const int64_t column = int64_t{blockIdx.x} * kCublasThreads + threadIdx.x;
  if (column >= p.hidden_size && !RNN_EXT_PLANTED(cublas_no_column_bound)) return;
  const Epilogue<T, 1> epilogue(p.bias_ih, p.bias_hh, p.nonlinearity, column, 1);
#pragma unroll kCublasRows
  for (int64_t row = blockIdx.y; row < p.batch; row += gridDim.y) {
    const int64_t i = row * p.hidden_size + column;
    const Acc z = p.products[0][i] + (p.products[1] != nullptr ? p.products[1][i] : Acc(0));
    p.output[i] = epilogue.output(z);
  }
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <typename T>
cudaError_t launch_forward_cublas(const ForwardParams<T>& p, const void* workspace, cudaStream_t stream) {
  const auto* const products = static_cast<const Accumulator<T>*>(workspace);
  ForwardCublasParams<T> q;
  q.products[0] = products;
  q.products[1] = p.hx.data != nullptr ? products + p.batch * p.weights.hidden_size : nullptr;
  q.bias_ih = p.weights.bias_ih;
  q.bias_hh = p.weights.bias_hh;
  q.output = p.output;
  q.batch = p.batch;
  q.hidden_size = p.weights.hidden_size;
  q.nonlinearity = p.weights.nonlinearity;
  constexpr int64_t kMaxRows = 65535;  // of a grid
  const dim3 grid(static_cast<unsigned>(ceil_div(p.weights.hidden_size, kCublasThreads)),
                  static_cast<unsigned>(std::min(kMaxRows, ceil_div(p.batch, kCublasRows))));
  return RNN_EXT_LAUNCH((forward_cublas<T>), grid, dim3(kCublasThreads), 0, stream, q);
}

}  // namespace rnn_ext::cuda
