// Dot products. Both operands are contiguous along K: a tile of sums keeps one vector accumulator a sum and shares each
// loaded vector with a row or a column of the tile; nothing is packed. The lanes are summed at the end.
#pragma once

// The columns of a tile of MR rows: two groups of four where the registers allow it.
template <int MR, typename Vec>
constexpr int dot_cols() {
  return MR * 8 <= Vec::kDotSums ? 8 : 4;
}

// acc[i][j] += a[i, :k_size] · w[j, :k_size], lane by lane.
template <int MR, int NR, typename Vec, typename T>
INLINE void accumulate_dots(typename Vec::V (&acc)[MR][NR], const T* a, int64_t a_stride, const T* const (&w)[NR],
                            int64_t k_size) {
  using V = typename Vec::V;
  int64_t k = 0;
  for (; k + Vec::kLanes <= k_size; k += Vec::kLanes) {
    V wv[NR];
    UNROLL for (int j = 0; j < NR; ++j) wv[j] = Vec::load(w[j] + k);
    UNROLL for (int i = 0; i < MR; ++i) {
      const V av = Vec::load(a + i * a_stride + k);
      UNROLL for (int j = 0; j < NR; ++j) acc[i][j] = Vec::fma(av, wv[j], acc[i][j]);
    }
  }
  if (k < k_size) {
    const int64_t n = k_size - k;
    V wv[NR];
    UNROLL for (int j = 0; j < NR; ++j) wv[j] = Vec::load(w[j] + k, n);
    UNROLL for (int i = 0; i < MR; ++i) {
      const V av = Vec::load(a + i * a_stride + k, n);
      UNROLL for (int j = 0; j < NR; ++j) acc[i][j] = Vec::fma(av, wv[j], acc[i][j]);
    }
  }
}

// The same for a run [begin, end) of the terms of one operand, x or h, W's (or U's) rows being col, col + 1, ... Past
// the n-th they are copies of it, whose sums are dropped.
template <int MR, int NR, typename Vec, typename T>
INLINE void accumulate_operand(typename Vec::V (&acc)[MR][NR], const Matrix<T>& a, const Matrix<T>& weight, int64_t row,
                               int64_t col, int64_t n, int64_t begin, int64_t end) {
  const T* w[NR];
  UNROLL for (int j = 0; j < NR; ++j) w[j] = weight.data + (col + smaller(j, n - 1)) * weight.row_stride + begin;
  accumulate_dots<MR, NR, Vec>(acc, a.data + row * a.row_stride + begin, a.row_stride, w, end - begin);
}
