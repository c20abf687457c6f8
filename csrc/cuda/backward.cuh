// The backward cell in one launch, over two unlike lists of tiles:
//
//   data tiles      [grad_input | grad_hx] = dz [W | U]                     (B, I + H), K = H
//   weight tiles    [grad_weight_ih | grad_weight_hh] = dzᵀ [x | h]         (H, I + H), K = B
//
// dz = grad_output · f'(output) is formed again wherever an operand needs it, which spares a launch, a buffer and a
// grid barrier. grad_bias = Σ_B dz falls out of the weight tiles of the first column: they hold dzᵀ, whose row sums it
// is. Gradients nobody asked for have no tiles. The longer list goes first, so that the short tiles fill the tail.
// Every output element is summed by one thread in one order: bitwise the same from run to run.
#pragma once
#include "tile.cuh"

namespace rnn_ext::cuda {

// ---- kernel
// ----------------------------------------------------------------------------------------------------------

// A list's tiles: `rows` by the columns of its first and its second matrix.
struct TileList {
  int64_t rows, first, second;
  __host__ __device__ int64_t size() const { return rows * (first + second); }
};

struct BackwardPlan {
  TileList data, weight;
  bool data_first;
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) backward_tiled(BackwardParams<T> p, BackwardPlan plan) {
  using Acc = Accumulator<T>;
  using Smem = TileSmem<Acc, Shape>;
  static_assert(sizeof(Smem) <= 48 * 1024, "fits without opting in to more shared memory");
  RNN_EXT_SMEM(Smem, smem);

  int64_t index = blockIdx.x;
  const int64_t front = plan.data_first ? plan.data.size() : plan.weight.size();
  const bool in_front = index < front;
  if (!in_front) index -= front;
  const bool is_data = in_front == plan.data_first;
  const TileList& list = is_data ? plan.data : plan.weight;

  const int64_t column = index / list.rows, m0 = index % list.rows * Shape::BM;
  const bool is_first = column < list.first;
  const int64_t n0 = (is_first ? column : column - list.first) * Shape::BN;
  const int64_t n_end = is_first ? p.input_size : p.hidden_size;

  const auto dz = [&](int64_t b, int64_t j) {
    return activate_backward(load(p.grad_output, b, j), load(p.output, b, j), p.nonlinearity);
  };

  Tile<Acc, Shape> tile(smem);
  if (is_data) {
    const Matrix<T>& weight = is_first ? p.weight_ih : p.weight_hh;
    T* const out = is_first ? p.grad_input : p.grad_hx;
    tile.template accumulate<true, false, false>(m0, p.batch, n0, n_end, p.hidden_size, dz,
                                                 [&](int64_t n, int64_t k) { return load(weight, k, n); });
    tile.for_each(m0, p.batch, n0, n_end, [&](int64_t m, int64_t n, Acc v) { out[m * n_end + n] = narrow<T>(v); });
    return;
  }

  const Matrix<T>& operand = is_first ? p.input : p.hx;
  T* const out = is_first ? p.grad_weight_ih : p.grad_weight_hh;
  const bool sums_bias = (column == 0 || RNN_EXT_PLANTED(every_column_writes_bias)) && p.grad_bias;
  const bool has_operand = out && operand.data;
  const auto dz_transposed = [&](int64_t m, int64_t k) { return dz(k, m); };
  const auto load_operand = [&](int64_t n, int64_t k) { return has_operand ? load(operand, k, n) : Acc(0); };
  if (sums_bias) {
    tile.template accumulate<false, false, true>(m0, p.hidden_size, n0, n_end, p.batch, dz_transposed, load_operand);
    const int64_t m = m0 + threadIdx.x;
    if (threadIdx.x < Shape::BM && m < p.hidden_size) {
      p.grad_bias[m] = narrow<T>(tile.a_sum);
      if (p.grad_bias_copy) p.grad_bias_copy[m] = p.grad_bias[m];
    }
  } else if (has_operand) {
    tile.template accumulate<false, false, false>(m0, p.hidden_size, n0, n_end, p.batch, dz_transposed, load_operand);
  }
  if (out) {
    tile.for_each(m0, p.hidden_size, n0, n_end, [&](int64_t m, int64_t n, Acc v) {
      out[m * n_end + n] = narrow<T>(has_operand ? v : Acc(0));  // no hx: exact zeros, whatever dz holds
    });
  }
}

// ---- launcher
// --------------------------------------------------------------------------------------------------------

template <typename T, typename Shape>
BackwardPlan plan_backward(const BackwardParams<T>& p) {
  const int64_t columns_i = ceil_div(p.input_size, Shape::BN), columns_h = ceil_div(p.hidden_size, Shape::BN);
  BackwardPlan plan;
  plan.data = {ceil_div(p.batch, Shape::BM), p.grad_input ? columns_i : 0, p.grad_hx ? columns_h : 0};
  plan.weight = {ceil_div(p.hidden_size, Shape::BM), p.grad_weight_ih ? columns_i : 0,
                 p.grad_weight_hh ? columns_h : 0};
  // The bias needs one column of weight tiles, even if it is the only gradient asked for.
  if (p.grad_bias && plan.weight.first + plan.weight.second == 0) plan.weight.second = 1;
  plan.data_first = p.hidden_size >= p.batch;
  return plan;
}

template <typename T, typename Shape>
cudaError_t launch_backward_tiled(const BackwardParams<T>& p, cudaStream_t stream) {
  const BackwardPlan plan = plan_backward<T, Shape>(p);
  const int64_t tiles = plan.data.size() + plan.weight.size();
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  return RNN_EXT_LAUNCH((backward_tiled<T, Shape>), dim3(static_cast<unsigned>(tiles)), dim3(Shape::kThreads),
                        sizeof(TileSmem<Accumulator<T>, Shape>), stream, p, plan);
}

}  // namespace rnn_ext::cuda
