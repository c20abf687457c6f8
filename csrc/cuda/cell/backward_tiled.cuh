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

template <typename T>
struct BackwardTiledSide : BackwardSide<T, Operand<T>> {
  bool vector_stores;  // rows of both gradients are 16-byte aligned
};

template <typename T, class Dz>
struct BackwardTiledParams {
  Dz dz, dz_transposed;           // (B, H), (H, B)
  BackwardTiledSide<T> sides[2];  // the input's, the hidden state's
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
    const BackwardTiledSide<T> side = t.matrix == 0 ? p.sides[0] : p.sides[1];
    // The sums of the tile before have been read.
    if (index >= gridDim.x && !RNN_EXT_PLANTED(backward_no_barrier_between_tiles)) __syncthreads();
    if (t.is_data) {
      using Shape = typename DataLoop::Shape;
      const TileBounds tile = {t.row * Shape::BM, p.batch, t.column * Shape::BN, side.columns};
      typename DataLoop::Engine engine;
      const typename DataLoop::Operands operands = {p.dz, side.weight, p.hidden_size};
      DataLoop::run(smem.data, engine, operands, tile, 0, DataLoop::slices(p.hidden_size));
      DataLoop::put_sums(smem.data, engine);
      store_backward_tile<DataLoop>(smem.data.sums, side.grad_operand, tile, side.vector_stores);
    } else {
      using Shape = typename WeightLoop::Shape;
      const TileBounds tile = {t.row * Shape::BM, p.hidden_size, t.column * Shape::BN, side.columns};
      const bool sums_bias =
          p.grad_bias != nullptr && (t.is_first_column || RNN_EXT_PLANTED(backward_every_column_writes_bias));
      // Without x or h, or where only the bias is asked for, the tile has no columns to read, and its sums stay zero.
      const bool has_operand = side.operand.data != nullptr && side.grad_weight != nullptr;
      TileBounds read = tile;
      if (!has_operand) read.n_end = read.n;
      typename WeightLoop::Engine engine;
      Acc row_sum = 0;
      const typename WeightLoop::Operands operands = {p.dz_transposed, side.operand, p.batch};
      WeightLoop::template run<RowSums::kOfA>(smem.weight, engine, operands, read, 0,
                                              has_operand || sums_bias ? WeightLoop::slices(p.batch) : 0, &row_sum,
                                              sums_bias);
      if (sums_bias) {
        const int64_t m = tile.m + threadIdx.x;
        if (threadIdx.x < Shape::BM && m < p.hidden_size) {
          p.grad_bias[m] = narrow<T>(row_sum);
          if (p.grad_bias_copy != nullptr) p.grad_bias_copy[m] = narrow<T>(row_sum);
        }
      }
      if (side.grad_weight != nullptr) {
        WeightLoop::put_sums(smem.weight, engine);
        store_backward_tile<WeightLoop>(smem.weight.sums, side.grad_weight, tile, side.vector_stores);
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
  static constexpr Fill kFill = k.async ? Fill::kAsync : Fill::kStaged;
  using Dz = std::conditional_t<k.fused, DzOperand<T>, Operand<T>>;

  static constexpr BackwardTileShape d = k.data, w = k.weight;
  using DataShape =
      std::conditional_t<k.tensor_cores,
                         WarpShape<d.bm, d.bn, d.bk, d.parts_m, d.parts_n, d.groups, d.stages, k.blocks_per_sm>,
                         ThreadShape<d.bm, d.bn, d.bk, d.parts_m, d.parts_n, d.groups, d.stages, k.blocks_per_sm>>;
  using WeightShape =
      std::conditional_t<k.tensor_cores,
                         WarpShape<w.bm, w.bn, w.bk, w.parts_m, w.parts_n, w.groups, w.stages, k.blocks_per_sm>,
                         ThreadShape<w.bm, w.bn, w.bk, w.parts_m, w.parts_n, w.groups, w.stages, k.blocks_per_sm>>;
  // Along which index neighbours lie next to each other in memory, if all is contiguous.
  using Data = Mainloop<Engine<T, kMath, DataShape, Major::kK, Major::kRows>, Dz, Operand<T>, kFill>;
  using Weight = Mainloop<Engine<T, kMath, WeightShape, Major::kRows, Major::kRows>, Dz, Operand<T>, kFill>;
  static constexpr size_t kSmem = std::max(sizeof(typename Data::Smem), sizeof(typename Weight::Smem));
  static_assert(kSmem == k.smem_bytes(kDtype<T>), "the plan's idea of it");
};

template <typename T>
BackwardTiledSide<T> backward_tiled_side(const BackwardSide<T>& s, int64_t batch, int64_t hidden_size) {
  const auto aligned = [&](const T* gradient) {
    return gradient == nullptr || lines_are_aligned(gradient, s.columns, 16);
  };
  BackwardTiledSide<T> side;
  side.weight = operand_by_columns(s.weight, s.columns, hidden_size, Major::kRows);
  side.operand = operand_by_columns(s.operand, s.columns, batch, Major::kRows);
  side.grad_operand = s.grad_operand;
  side.grad_weight = s.grad_weight;
  side.columns = s.columns;
  side.vector_stores = aligned(s.grad_operand) && aligned(s.grad_weight);
  return side;
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
  q.sides[0] = backward_tiled_side(input_side(p), p.batch, p.weights.hidden_size);
  q.sides[1] = backward_tiled_side(hidden_side(p), p.batch, p.weights.hidden_size);
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
