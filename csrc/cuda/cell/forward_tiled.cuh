// The forward as a tiled product: output = f(x Wᵀ + b_ih + h Uᵀ + b_hh), a tile of the output to a block. The two GEMMs
// are one over a concatenated K = I + H: the mainloop takes slices of (x, W) first, then of (h, U).
//
// Where there are too few tiles for the GPU, `splits` blocks share the K of a tile in the same launch. On sm_90 they
// are a cluster: each adds up a part of the rows out of all blocks' shared memory. Elsewhere each leaves its sums in
// global memory and counts; the last one to arrive adds them up. Either way in the order of K: bitwise the same in
// every run.
#pragma once
#include <utility>

#include "cuda/blocks/epilogue.cuh"
#include "cuda/blocks/mainloop.cuh"
#include "cuda/cell/forward.cuh"
#include "cuda/ptx/ptx_sm90.cuh"

namespace rnn_ext::cuda {

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <typename T>
struct ForwardTiledParams {
  Segment<Operand<T>, Operand<T>> input, hx;  // (x, W) and (h, U); a depth of 0 where hx is absent
  const T* bias_ih;
  const T* bias_hh;
  T* output;
  int64_t batch, hidden_size;
  Nonlinearity nonlinearity;
  bool vector_stores;  // the output's rows are 16-byte aligned
  int splits;
  bool cluster;
  Accumulator<T>* partials;  // [tile][split][BM][BN], where K is split without a cluster
  uint32_t* counters;        // [tile], zero between launches
};

// The output's side of a tile: a thread has the same few columns in all of its rows.
template <typename T, class Loop>
struct ForwardTiledOutput {
  using Acc = typename Loop::Acc;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  using Sums = Acc[kVector];

  const ForwardTiledParams<T>& p;
  int64_t m, n;      // where the tile's rows and this thread's columns start
  int rows, column;  // the rows inside the matrix; this thread's first column in the tile
  Epilogue<T, kVector> epilogue;

  __device__ __forceinline__ ForwardTiledOutput(const ForwardTiledParams<T>& p, const TileBounds& tile)
      : p(p),
        m(tile.m),
        n(tile.n + Loop::template vector_column<kVector>()),
        column(Loop::template vector_column<kVector>()),
        epilogue(p.bias_ih, p.bias_hh, p.nonlinearity, n,
                 static_cast<int>(max(min(p.hidden_size - n, int64_t{kVector}), int64_t{0}))) {
    const int64_t rows_left = RNN_EXT_PLANTED(no_output_row_bound) ? Loop::Shape::BM : p.batch - m;
    rows = static_cast<int>(min(rows_left, int64_t{Loop::Shape::BM}));
  }

  __device__ __forceinline__ void store(int row, const Sums& sums) const {
    epilogue.store(p.output + (m + row) * p.hidden_size + n, sums, p.vector_stores);
  }
};

// Where the block has all of K.
template <typename T, class Loop>
__device__ __forceinline__ void store_tile(const typename Loop::Smem& smem, const ForwardTiledOutput<T, Loop>& out) {
  using Out = ForwardTiledOutput<T, Loop>;
  Loop::template for_each_row<Out::kVector>(0, out.rows, [&](int row) {
    typename Out::Sums sums = {};
    Loop::add_sums(smem.sums, row, out.column, sums);
    out.store(row, sums);
  });
}

// Where the blocks of a cluster share K: each adds up and stores a part of the rows.
template <typename T, class Loop>
__device__ __forceinline__ void add_up_in_cluster(typename Loop::Smem& smem, const ForwardTiledOutput<T, Loop>& out,
                                                  int split, int splits) {
  using Out = ForwardTiledOutput<T, Loop>;
  if constexpr (Loop::Shape::kGroups > 1) Loop::fold_groups(smem.sums, out.rows);
  if (!RNN_EXT_PLANTED(no_cluster_sync)) ptx::cluster_sync();  // all blocks' sums are there
  const int first_row = out.rows * split / splits, end_row = out.rows * (split + 1) / splits;
  constexpr int kMostRows = Loop::Shape::BM / 2;  // of two blocks or more
  typename Out::Sums sums[Loop::template kRowsOfThread<Out::kVector, kMostRows>] = {};
  Loop::template for_each_row_by_number<Out::kVector, kMostRows>(first_row, end_row, [&](int i, int row) {
#pragma unroll 4
    for (int rank = 0; rank < splits; ++rank) Loop::add_cluster_sums(smem.sums, rank, row, out.column, sums[i]);
  });
  // No block exits while others read its sums. Relaxed would not do: the loads might still be under way. But nothing
  // is stored yet whose way to memory a release would wait for.
  if (!RNN_EXT_PLANTED(no_cluster_exit_sync)) ptx::cluster_arrive();
  Loop::template for_each_row_by_number<Out::kVector, kMostRows>(first_row, end_row,
                                                                 [&](int i, int row) { out.store(row, sums[i]); });
  if (!RNN_EXT_PLANTED(no_cluster_exit_sync)) ptx::cluster_wait();
}

// Where blocks share K through global memory, at `partials`, of [split][BM][BN]: the last one to count adds up.
template <typename T, class Loop>
__device__ __forceinline__ void add_up_in_workspace(const typename Loop::Smem& smem,
                                                    const ForwardTiledOutput<T, Loop>& out, unsigned split, int splits,
                                                    typename Loop::Acc* partials, uint32_t* counter) {
  using Out = ForwardTiledOutput<T, Loop>;
  using Shape = typename Loop::Shape;
  using Partial = Vector<typename Loop::Acc, 16>;
  static_assert(Out::kVector % Partial::kSize == 0);
  const auto partial = [&](unsigned s, int row) {
    return partials + (int64_t{s} * Shape::BM + row) * Shape::BN + out.column;
  };
  Loop::template for_each_row<Out::kVector>(0, out.rows, [&](int row) {
    typename Out::Sums sums = {};
    Loop::add_sums(smem.sums, row, out.column, sums);
#pragma unroll
    for (int i = 0; i < Out::kVector; i += Partial::kSize) {
      Partial v;
#pragma unroll
      for (int j = 0; j < Partial::kSize; ++j) v.v[j] = sums[i + j];
      store_vector(partial(split, row) + i, v);
    }
  });
  __syncthreads();  // the block's sums are on their way before it is counted
  bool last = false;
  if (threadIdx.x == 0) {
    const uint32_t limit = static_cast<uint32_t>(splits) - !RNN_EXT_PLANTED(counter_not_reset);
    last = ptx::atomic_inc_acq_rel(counter, limit) == static_cast<uint32_t>(splits) - 1;
  }
  if (!__syncthreads_or(last) && !RNN_EXT_PLANTED(every_block_adds_up)) return;
  Loop::template for_each_row<Out::kVector>(0, out.rows, [&](int row) {
    typename Out::Sums sums = {};
#pragma unroll 4
    for (int s = 0; s < splits; ++s) {
      const typename Loop::Acc* const from = partial(static_cast<unsigned>(s), row);
#pragma unroll
      for (int i = 0; i < Out::kVector; i += Partial::kSize) {
        const Partial v = *reinterpret_cast<const Partial*>(from + i);
#pragma unroll
        for (int j = 0; j < Partial::kSize; ++j) sums[i + j] += v.v[j];
      }
    }
    out.store(row, sums);
  });
}

template <typename T, class Loop>
__global__ void __launch_bounds__(Loop::Shape::kThreads, Loop::Shape::kBlocksPerSm)
    forward_tiled(ForwardTiledParams<T> p) {
  using Shape = typename Loop::Shape;
  using Smem = typename Loop::Smem;
  static_assert(sizeof(Smem) <= 99 * 1024, "fits sm_86, which has the least of sm_80 and later");
  RNN_EXT_SMEM(Smem, smem);

  const unsigned tile_index = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
  const unsigned tiles_m = static_cast<unsigned>(ceil_div(p.batch, Shape::BM));
  const TileBounds tile = {int64_t{tile_index % tiles_m} * Shape::BM, p.batch,
                           int64_t{tile_index / tiles_m} * Shape::BN, p.hidden_size};

  typename Loop::Engine engine;
  const int slices = Loop::slices(p.input.depth) + (RNN_EXT_PLANTED(hx_forgotten) ? 0 : Loop::slices(p.hx.depth));
  const auto first_slice = [&](unsigned s) { return static_cast<int>(int64_t{slices} * s / p.splits); };
  Loop::run(smem, engine, p.input, p.hx, tile, first_slice(split), first_slice(split + 1));

  const ForwardTiledOutput<T, Loop> out(p, tile);
  Loop::put_sums(smem, engine);
  if (p.splits == 1) {
    store_tile(smem, out);
  } else if (p.cluster) {
    add_up_in_cluster(smem, out, static_cast<int>(split), p.splits);
  } else {
    add_up_in_workspace(smem, out, split, p.splits,
                        p.partials + int64_t{tile_index} * p.splits * (Shape::BM * Shape::BN), &p.counters[tile_index]);
  }
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <typename T, int kRow>
cudaError_t launch_forward_row(const ForwardParams<T>& p, const ForwardPlan& plan, void* workspace, uint32_t* counters,
                               cudaStream_t stream) {
  constexpr ForwardTiledKernel k = kForwardTiled[kRow];
  using Shape =
      std::conditional_t<k.math == Math::kSimt,
                         ThreadShape<k.bm, k.bn, k.bk, k.parts_m, k.parts_n, k.groups, k.stages, k.blocks_per_sm>,
                         WarpShape<k.bm, k.bn, k.bk, k.parts_m, k.parts_n, k.groups, k.stages, k.blocks_per_sm>>;
  using Loop = Mainloop<Engine<T, k.math, Shape, Major::kK, Major::kK>, Operand<T>, Operand<T>, k.fill>;
  static_assert(k.threads() == Shape::kThreads && k.smem_bytes(kDtype<T>) == sizeof(typename Loop::Smem));

  ForwardTiledParams<T> t;
  t.input = {operand_by_rows(p.input, p.batch, p.weights.input_size, Major::kK),
             operand_by_rows(p.weights.weight_ih, p.weights.hidden_size, p.weights.input_size, Major::kK),
             p.weights.input_size};
  t.hx = {operand_by_rows(p.hx, p.batch, p.weights.hidden_size, Major::kK),
          operand_by_rows(p.weights.weight_hh, p.weights.hidden_size, p.weights.hidden_size, Major::kK),
          p.hx.data != nullptr ? p.weights.hidden_size : 0};
  t.bias_ih = p.weights.bias_ih;
  t.bias_hh = p.weights.bias_hh;
  t.output = p.output;
  t.batch = p.batch;
  t.hidden_size = p.weights.hidden_size;
  t.nonlinearity = p.weights.nonlinearity;
  t.vector_stores = lines_are_aligned(p.output, p.weights.hidden_size, 16);
  t.splits = plan.splits;
  t.cluster = plan.reduction == Reduction::kCluster;
  t.partials = static_cast<Accumulator<T>*>(workspace);
  t.counters = counters;
  const dim3 cluster(t.cluster ? static_cast<unsigned>(plan.splits) : 1);
  return RNN_EXT_LAUNCH_CLUSTER((forward_tiled<T, Loop>), dim3(static_cast<unsigned>(plan.blocks)),
                                dim3(Shape::kThreads), cluster,
                                sizeof(typename Loop::Smem) - RNN_EXT_PLANTED(shared_memory_too_small), stream, t);
}

template <typename T, int... kRows>
cudaError_t launch_forward_tiled(std::integer_sequence<int, kRows...>, const ForwardParams<T>& p,
                                 const ForwardPlan& plan, void* workspace, uint32_t* counters, cudaStream_t stream) {
  cudaError_t e = cudaErrorInvalidValue;
  const auto try_row = [&](auto row) {
    if constexpr (kForwardTiled[row()].takes(kDtype<T>)) {
      if (plan.kernel == row()) e = launch_forward_row<T, row()>(p, plan, workspace, counters, stream);
    }
  };
  (try_row(std::integral_constant<int, kRows>()), ...);
  return e;
}

template <typename T>
cudaError_t launch_forward_tiled(const ForwardParams<T>& p, const ForwardPlan& plan, void* workspace,
                                 uint32_t* counters, cudaStream_t stream) {
  return launch_forward_tiled(std::make_integer_sequence<int, kNumForwardTiled>(), p, plan, workspace, counters,
                              stream);
}

}  // namespace rnn_ext::cuda
