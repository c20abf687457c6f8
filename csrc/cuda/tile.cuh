// One output tile of a GEMM on the FP32 or FP64 pipes: acc[m, n] += Σ_k a(m, k) b(n, k), for operands that are any
// functions of their two indices. Forward and backward differ only in what they hand in, so strides, dtypes, the
// recomputed dz and the ragged edges are all in those functions and in the bounds given here.
#pragma once
#include <cstdint>

#include "operand.cuh"

namespace rnn_ext::cuda {

// A BM×BN tile, BK deep; each thread holds TM×TN of it, rows BM/TM and columns BN/TN apart.
template <int BM_, int BN_, int BK_, int TM_, int TN_>
struct TileShape {
  static constexpr int BM = BM_, BN = BN_, BK = BK_, TM = TM_, TN = TN_;
  static constexpr int kRows = BM / TM, kColumns = BN / TN, kThreads = kRows * kColumns;
  static_assert(BM % TM == 0 && BN % TN == 0, "threads must tile the tile");
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps in one block");
  static_assert(kThreads >= BM, "column sums take one thread a row");
};

// k is the slow index, so that a warp reads along m or n; one element of padding spreads the transposing stores.
template <typename Acc, typename Shape>
struct TileSmem {
  Acc a[Shape::BK][Shape::BM + 1];
  Acc b[Shape::BK][Shape::BN + 1];
};

template <typename Acc, typename Shape>
struct Tile {
  TileSmem<Acc, Shape>& smem;
  Acc acc[Shape::TM][Shape::TN] = {};
  Acc a_sum = 0;  // Σ_k a(m, k) of row m = threadIdx.x, where asked for

  __device__ explicit Tile(TileSmem<Acc, Shape>& s) : smem(s) {
    if (RNN_EXT_PLANTED(accumulator_not_cleared)) acc[0][0] = Acc(1);
  }

  static __device__ int row(int i) { return static_cast<int>(threadIdx.x) / Shape::kColumns + i * Shape::kRows; }
  static __device__ int column(int j) { return static_cast<int>(threadIdx.x) % Shape::kColumns + j * Shape::kColumns; }

  // Adds the product of a (rows m < m_end) and b (columns n < n_end) over k < k_end. The flags say which index of an
  // operand is contiguous in memory, for coalescing; neither changes the result.
  template <bool kAContiguousInK, bool kBContiguousInK, bool kSumA, typename LoadA, typename LoadB>
  __device__ void accumulate(int64_t m0, int64_t m_end, int64_t n0, int64_t n_end, int64_t k_end, LoadA load_a,
                             LoadB load_b) {
    for (int64_t k0 = 0; k0 < k_end; k0 += Shape::BK) {
      if (!RNN_EXT_PLANTED(no_barrier_before_fill)) __syncthreads();  // every thread is done with the previous slice
      fill<kAContiguousInK>(smem.a, m0, m_end, k0, k_end, load_a);
      fill<kBContiguousInK>(smem.b, n0, n_end, k0, k_end, load_b);
      if (RNN_EXT_PLANTED(divergent_barrier) && threadIdx.x == 0) return;
      if (!RNN_EXT_PLANTED(no_barrier_after_fill)) __syncthreads();
#pragma unroll 8
      for (int k = 0; k < Shape::BK; ++k) {
        Acc a[Shape::TM], b[Shape::TN];
#pragma unroll
        for (int i = 0; i < Shape::TM; ++i) a[i] = smem.a[k][row(RNN_EXT_PLANTED(wrong_fragment_row) ? 0 : i)];
#pragma unroll
        for (int j = 0; j < Shape::TN; ++j) b[j] = smem.b[k][column(j)];
#pragma unroll
        for (int i = 0; i < Shape::TM; ++i) {
#pragma unroll
          for (int j = 0; j < Shape::TN; ++j) acc[i][j] += a[i] * b[j];
        }
      }
      if (kSumA && threadIdx.x < Shape::BM) {
        for (int k = 0; k < Shape::BK; ++k) a_sum += smem.a[k][threadIdx.x];
      }
    }
  }

  // Calls store(m, n, acc) for the elements that lie inside the matrix.
  template <typename Store>
  __device__ void for_each(int64_t m0, int64_t m_end, int64_t n0, int64_t n_end, Store store) const {
#pragma unroll
    for (int i = 0; i < Shape::TM; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::TN; ++j) {
        const int64_t m = m0 + row(i), n = n0 + column(j);
        const bool has_row = m < m_end || RNN_EXT_PLANTED(no_store_row_bound);
        const bool has_column = n < n_end || RNN_EXT_PLANTED(no_store_column_bound);
        if (has_row && has_column) store(m, n, acc[i][j]);
      }
    }
  }

 private:
  // One operand's slice, zeros beyond its edges.
  template <bool kContiguousInK, int kWidth, typename Load>
  static __device__ void fill(Acc (&slice)[Shape::BK][kWidth], int64_t r0, int64_t r_end, int64_t k0, int64_t k_end,
                              Load load) {
    constexpr int kRows = kWidth - 1;
#pragma unroll 4
    for (int e = static_cast<int>(threadIdx.x); e < kRows * Shape::BK; e += Shape::kThreads) {
      const int r = kContiguousInK ? e / Shape::BK : e % kRows;
      const int k = kContiguousInK ? e % Shape::BK : e / kRows;
      const bool has_row = r0 + r < r_end;
      const bool has_k = k0 + k < k_end;
      slice[RNN_EXT_PLANTED(shared_index_out_of_range) ? k + 1 : k][r] =
          has_row && has_k ? load(r0 + r, k0 + k) : Acc(0);
    }
  }
};

// Many small tiles while the grid is too small to fill the GPU, larger ones with more reuse beyond.
using SmallTile = TileShape<16, 32, 32, 2, 2>;
using LargeTile = TileShape<64, 64, 16, 4, 4>;
constexpr int64_t kTilesToFillGpu = 128;  // about one a multiprocessor on the large data-centre GPUs

template <typename T>
__device__ __forceinline__ Accumulator<T> load(const Matrix<T>& m, int64_t row, int64_t column) {
  return widen(m.data[row * m.row_stride + column * m.col_stride]);
}

}  // namespace rnn_ext::cuda
