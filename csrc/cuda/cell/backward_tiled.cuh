// The backward cell on tiles: a list of two unlike kinds of them, which a grid of resident blocks shares out.
//
//   data tiles      [grad_input | grad_hx] = dz [W | U]                     (B, I + H), K = H
//   weight tiles    [grad_weight_ih | grad_weight_hh] = dzᵀ [x | h]         (H, I + H), K = B
//
// In one launch, dz = grad_output · f'(output) is formed again wherever an operand needs it, on the way from registers
// to shared memory: in fp32 (fp64), then rounded to the operand's dtype as nn.RNNCell rounds it. That spares a launch,
// a buffer and a grid barrier. grad_bias = Σ_B dz falls out of the weight tiles of the first column, which hold dzᵀ,
// whose row sums it is. Gradients nobody asked for have no tiles. Every output element is summed by one block in one
// order: bitwise the same from run to run.
#pragma once
#include "cuda/blocks/mainloop.cuh"
#include "cuda/cell/backward.cuh"

namespace rnn_ext::cuda {

// ---- kernel ---------------------------------------------------------------------------------------------------------

// One of the two matrices, of input_size or hidden_size columns, that either kind of tiles has.
template <typename T>
struct BackwardHalf {
  Operand<T> weight, operand;     // W or U; x or h, whose data is null if h is absent
  T *grad_operand, *grad_weight;  // contiguous; null: not asked for
  int64_t columns;
  bool vector_stores;  // rows of both gradients are 16-byte aligned
};

template <typename T, class Dz>
struct BackwardTiledParams {
  Dz dz, dz_transposed;     // (B, H), (H, B)
  BackwardHalf<T> half[2];  // of input_size columns, of hidden_size columns
  T *grad_bias, *grad_bias_copy;
  int64_t batch, hidden_size;
  BackwardSchedule schedule;
};

// Writes the tile's sums to a contiguous matrix of tile.n_end columns.
template <class Loop, typename T>
__device__ __forceinline__ void store_backward_tile(const typename Loop::Engine::Sums& sums, T* out,
                                                    const TileBounds& tile, bool vector_stores) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  using Acc = typename Loop::Acc;
  const int64_t rows_left = RNN_EXT_PLANTED(backward_no_store_row_bound) ? Loop::Shape::BM : tile.m_end - tile.m;
  const int rows = static_cast<int>(min(rows_left, int64_t{Loop::Shape::BM}));
  const auto values = [&](int row, int column) {
    Acc v[kVector] = {};
    Loop::add_sums(sums, row, column, v);
    Vector<T, 16> rounded;
#pragma unroll
    for (int i = 0; i < kVector; ++i) rounded.v[i] = narrow<T>(v[i]);
    return rounded;
  };
  T* const corner = out + tile.m * tile.n_end + tile.n;
  const int columns = static_cast<int>(min(tile.n_end - tile.n, int64_t{Loop::Shape::BN}));
  if (vector_stores || RNN_EXT_PLANTED(backward_misaligned_store)) {  // rows of whole vectors: all of one or nothing
    Loop::template for_each_vector<kVector>(0, rows, [&](int row, int column) {
      if (column < columns) store_vector(corner + row * tile.n_end + column, values(row, column));
    });
  } else {
    Loop::template for_each_vector<kVector>(0, rows, [&](int row, int column) {
      const Vector<T, 16> v = values(row, column);
      T* const to = corner + row * tile.n_end + column;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (column + i < columns || RNN_EXT_PLANTED(backward_no_store_column_bound)) to[i] = v.v[i];
      }
    });
  }
}

template <typename T, class DataLoop, class WeightLoop, class Dz>
__global__ void __launch_bounds__(DataLoop::Shape::kThreads, DataLoop::Shape::kBlocksPerSm)
    backward_tiled(BackwardTiledParams<T, Dz> p) {
  using Acc = Accumulator<T>;
  union Smem {
    typename DataLoop::Smem data;
    typename WeightLoop::Smem weight;
  };
  static_assert(sizeof(Smem) <= 99 * 1024, "fits sm_86, which has the least of sm_80 and later");
  static_assert(DataLoop::Shape::kThreads == WeightLoop::Shape::kThreads);
  RNN_EXT_SMEM(Smem, smem);

  for (int64_t index = blockIdx.x; index < p.schedule.size(); index += gridDim.x) {
    const BackwardSchedule::Tile t = p.schedule.at(index);
    const BackwardHalf<T> half = t.matrix == 0 ? p.half[0] : p.half[1];
    // The sums of the tile before have been read.
    if (index >= gridDim.x && !RNN_EXT_PLANTED(backward_no_barrier_between_tiles)) __syncthreads();
    if (t.is_data) {
      using Shape = typename DataLoop::Shape;
      const TileBounds tile = {t.row * Shape::BM, p.batch, t.column * Shape::BN, half.columns};
      typename DataLoop::Engine engine;
      const typename DataLoop::Operands operands = {p.dz, half.weight, p.hidden_size};
      DataLoop::run(smem.data, engine, operands, tile, 0, DataLoop::slices(p.hidden_size));
      DataLoop::put_sums(smem.data, engine);
      store_backward_tile<DataLoop>(smem.data.sums, half.grad_operand, tile, half.vector_stores);
    } else {
      using Shape = typename WeightLoop::Shape;
      const TileBounds tile = {t.row * Shape::BM, p.hidden_size, t.column * Shape::BN, half.columns};
      const bool sums_bias =
          p.grad_bias != nullptr && (t.is_first_column || RNN_EXT_PLANTED(backward_every_column_writes_bias));
      // Without x or h, or where only the bias is asked for, the tile has no columns to read, and its sums stay zero.
      const bool has_operand = half.operand.data != nullptr && half.grad_weight != nullptr;
      TileBounds read = tile;
      if (!has_operand) read.n_end = read.n;
      typename WeightLoop::Engine engine;
      Acc row_sum = 0;
      const typename WeightLoop::Operands operands = {p.dz_transposed, half.operand, p.batch};
      WeightLoop::template run<true>(smem.weight, engine, operands, read, 0,
                                     has_operand || sums_bias ? WeightLoop::slices(p.batch) : 0, &row_sum, sums_bias);
      if (sums_bias) {
        const int64_t m = tile.m + threadIdx.x;
        if (threadIdx.x < Shape::BM && m < p.hidden_size) {
          p.grad_bias[m] = narrow<T>(row_sum);
          if (p.grad_bias_copy != nullptr) p.grad_bias_copy[m] = narrow<T>(row_sum);
        }
      }
      if (half.grad_weight != nullptr) {
        WeightLoop::put_sums(smem.weight, engine);
        store_backward_tile<WeightLoop>(smem.weight.sums, half.grad_weight, tile, half.vector_stores);
      }
    }
  }
}

// ---- launcher -------------------------------------------------------------------------------------------------------

// The mainloops that row `kRow` of the table describes.
template <typename T, int kRow>
struct BackwardLoops {
  static constexpr BackwardTiledKernel k = kBackwardTiled[kRow];
  static constexpr Math kMath = k.tensor_cores ? Math::kTensorCore : Math::kSimt;
  using Dz = std::conditional_t<k.fused, DzOperand<T>, Operand<T>>;

  template <bool kWarps, int bm, int bn, int bk, int parts_m, int parts_n, int groups, int stages>
  struct ShapeOf {
    using type = WarpShape<bm, bn, bk, parts_m, parts_n, groups, stages, k.blocks_per_sm>;
  };
  template <int bm, int bn, int bk, int parts_m, int parts_n, int groups, int stages>
  struct ShapeOf<false, bm, bn, bk, parts_m, parts_n, groups, stages> {
    using type = ThreadShape<bm, bn, bk, parts_m, parts_n, groups, stages, k.blocks_per_sm>;
  };
  using DataShape = typename ShapeOf<k.tensor_cores, k.data.bm, k.data.bn, k.data.bk, k.data.parts_m, k.data.parts_n,
                                     k.data.groups, k.data.stages>::type;
  using WeightShape = typename ShapeOf<k.tensor_cores, k.weight.bm, k.weight.bn, k.weight.bk, k.weight.parts_m,
                                       k.weight.parts_n, k.weight.groups, k.weight.stages>::type;
  // Along which index neighbours lie next to each other in memory, if all is contiguous.
  using Data = Mainloop<Engine<T, kMath, DataShape, Major::kK, Major::kRows>, Dz, Operand<T>, k.async>;
  using Weight = Mainloop<Engine<T, kMath, WeightShape, Major::kRows, Major::kRows>, Dz, Operand<T>, k.async>;
  static constexpr size_t kSmem = std::max(sizeof(typename Data::Smem), sizeof(typename Weight::Smem));
  static_assert(kSmem == k.smem_bytes(kDtype<T>), "the plan's idea of it");
};

template <typename T>
BackwardHalf<T> backward_half(const Matrix<T>& weight, const Matrix<T>& operand, T* grad_operand, T* grad_weight,
                              int64_t batch, int64_t hidden_size, int64_t columns) {
  const auto aligned = [&](const T* p) {
    return p == nullptr || (columns * int64_t{sizeof(T)} % 16 == 0 && reinterpret_cast<uintptr_t>(p) % 16 == 0);
  };
  return {operand_by_columns(weight, columns, hidden_size, Major::kRows),
          operand_by_columns(operand, columns, batch, Major::kRows),
          grad_operand,
          grad_weight,
          columns,
          aligned(grad_operand) && aligned(grad_weight)};
}

template <typename T, int kRow>
cudaError_t launch_backward_row(const BackwardParams<T>& p, const BackwardPlan& plan, [[maybe_unused]] void* workspace,
                                cudaStream_t stream) {
  using Loops = BackwardLoops<T, kRow>;
  using Dz = typename Loops::Dz;
  BackwardTiledParams<T, Dz> q;
  if constexpr (Loops::k.fused) {
    q.dz = dz_sources(p).by_rows();
    q.dz_transposed = dz_sources(p).by_columns();
  } else {
    T* const rounded = static_cast<T*>(workspace);
    const cudaError_t error = launch_grad_z(dz_sources(p), rounded, plan.dz_stride, nullptr, stream);
    if (error != cudaSuccess) return error;
    const Matrix<T> m = {rounded, plan.dz_stride, 1};
    q.dz = operand_by_rows(m, p.batch, p.weights.hidden_size, Major::kK);
    q.dz_transposed = operand_by_columns(m, p.weights.hidden_size, p.batch, Major::kRows);
  }
  q.half[0] = backward_half(p.weights.weight_ih, p.input, p.grad_input, p.grad_weight_ih, p.batch,
                            p.weights.hidden_size, p.weights.input_size);
  q.half[1] = backward_half(p.weights.weight_hh, p.hx, p.grad_hx, p.grad_weight_hh, p.batch, p.weights.hidden_size,
                            p.weights.hidden_size);
  q.grad_bias = p.grad_bias;
  q.grad_bias_copy = p.grad_bias_copy;
  q.batch = p.batch;
  q.hidden_size = p.weights.hidden_size;
  q.schedule = plan.schedule;
  return RNN_EXT_LAUNCH((backward_tiled<T, typename Loops::Data, typename Loops::Weight, Dz>),
                        dim3(static_cast<unsigned>(plan.blocks)), dim3(Loops::DataShape::kThreads), Loops::kSmem,
                        stream, q);
}

// Of the table's rows only those for T are compiled.
template <typename T, int... kRows>
cudaError_t launch_backward_rows(const BackwardParams<T>& p, const BackwardPlan& plan, void* workspace,
                                 cudaStream_t stream, std::integer_sequence<int, kRows...>) {
  cudaError_t error = cudaErrorInvalidValue;
  const auto try_row = [&](auto row) {
    if constexpr (kBackwardTiled[row].takes(kDtype<T>)) {
      if (plan.kernel == row) error = launch_backward_row<T, row>(p, plan, workspace, stream);
    }
  };
  (try_row(std::integral_constant<int, kRows>{}), ...);
  return error;
}

template <typename T>
cudaError_t launch_backward_tiled(const BackwardParams<T>& p, const BackwardPlan& plan, void* workspace,
                                  cudaStream_t stream) {
  return launch_backward_rows(p, plan, workspace, stream, std::make_integer_sequence<int, kNumBackwardTiled>{});
}

}  // namespace rnn_ext::cuda
