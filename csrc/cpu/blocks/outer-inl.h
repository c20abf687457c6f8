// Sums of outer products: elements of A, one by one, broadcast against vectors of M, which is contiguous along its
// columns. So no lanes are ever summed, and A may lie in memory as it likes.
#pragma once

constexpr int kRun = 256;      // terms summed in registers before they are added to the totals
constexpr int kBlock = 264;    // rows whose totals are kept
constexpr int kPackRows = 24;  // packing pays from here
constexpr int kPanels = 4;     // that are worked on together where the operands are large

// One run of the inner dimension of a block of C = A M, one panel (NV vectors) wide.
template <typename A, typename M, typename C>
struct Panel {
  const A* a;
  int64_t a_row_stride, a_col_stride;
  const M* m;  // as it lies, or packed: the panel's width apart, padded with zeros
  int64_t m_stride;
  int64_t steps;
  acc_t<C>* totals;  // one panel width a row
  bool first;        // the totals are not yet there
  C* c;              // null: the totals are not yet complete
  int64_t c_stride;
};

// MR rows of a panel. partial: of the last vector only n columns are there.
template <int MR, int NV, bool partial, bool packed, typename S, typename M, typename C>
__attribute__((noinline)) void outer_tile(const Panel<S, M, C>& g, const S* a, int64_t a_row_stride, int64_t row,
                                          int64_t n) {
  using Vec = typename VecOf<S>::type;
  using V = typename Vec::V;
  constexpr int kLanes = Vec::kLanes;
  V acc[MR][NV];
  UNROLL for (int i = 0; i < MR; ++i) { UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = Vec::zero(); }
  if (g.c) {  // a large C comes from beyond the L2 cache: fetched while the sums are computed
    UNROLL for (int i = 0; i < MR; ++i) {
      UNROLL for (int j = 0; j < NV; ++j) __builtin_prefetch(g.c + (row + i) * g.c_stride + j * kLanes, 1);
    }
  }
  const M* m = g.m;
  for (int64_t k = 0; k < g.steps; ++k, a += g.a_col_stride, m += packed ? NV * kLanes : g.m_stride) {
    V mv[NV];
    UNROLL for (int j = 0; j < NV; ++j) {
      mv[j] = partial && !packed && j == NV - 1 ? Vec::load(m + j * kLanes, n) : Vec::load(m + j * kLanes);
    }
    UNROLL for (int i = 0; i < MR; ++i) {
      const V av = Vec::set(a[i * a_row_stride]);
      UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = Vec::fma(av, mv[j], acc[i][j]);
    }
  }
  S* totals = g.totals + row * NV * kLanes;
  if (!g.first) {
    UNROLL for (int i = 0; i < MR; ++i) {
      UNROLL for (int j = 0; j < NV; ++j) acc[i][j] += Vec::load(totals + (i * NV + j) * kLanes);
    }
  }
  if (!g.c) {
    UNROLL for (int i = 0; i < MR; ++i) {
      UNROLL for (int j = 0; j < NV; ++j) Vec::store(totals + (i * NV + j) * kLanes, acc[i][j]);
    }
    return;
  }
  UNROLL for (int i = 0; i < MR; ++i) {
    C* c = g.c + (row + i) * g.c_stride;
    UNROLL for (int j = 0; j < NV; ++j) {
      if (partial && j == NV - 1) {
        Vec::store(c + j * kLanes, acc[i][j], n);
      } else {
        Vec::store(c + j * kLanes, acc[i][j]);
      }
    }
  }
}

// The same for any A. One in 16 bits (unit column stride) is widened first, a tile's rows at a time.
template <int MR, int NV, bool partial, bool packed, typename A, typename M, typename C>
INLINE void outer_rows(const Panel<A, M, C>& g, int64_t row, int64_t n) {
  using S = acc_t<C>;
  if constexpr (sizeof(A) == sizeof(S)) {
    outer_tile<MR, NV, partial, packed>(g, g.a + row * g.a_row_stride, g.a_row_stride, row, n);
  } else {
    using Vec = typename VecOf<C>::type;
    alignas(64) S a[MR * kRun];
    for (int i = 0; i < MR; ++i) {
      const A* from = g.a + (row + i) * g.a_row_stride;
      int64_t k = 0;
      for (; k + Vec::kLanes <= g.steps; k += Vec::kLanes) Vec::store(a + i * kRun + k, Vec::load(from + k));
      if (k < g.steps) Vec::store(a + i * kRun + k, Vec::load(from + k, g.steps - k), g.steps - k);
    }
    const Panel<S, M, C> wide = {a, kRun, 1, g.m, g.m_stride, g.steps, g.totals, g.first, g.c, g.c_stride};
    outer_tile<MR, NV, partial, packed>(wide, a, kRun, row, n);
  }
}

template <int NV, bool partial, bool packed, typename A, typename M, typename C>
void outer_panel(const Panel<A, M, C>& g, int64_t rows, int64_t n) {
  constexpr int kRows = VecOf<C>::type::kOuterRows;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) outer_rows<kRows, NV, partial, packed>(g, row, n);
  if (kRows > 8 && row + 8 <= rows) outer_rows<8, NV, partial, packed>(g, row, n), row += 8;
  if (row + 4 <= rows) outer_rows<4, NV, partial, packed>(g, row, n), row += 4;
  if (row + 2 <= rows) outer_rows<2, NV, partial, packed>(g, row, n), row += 2;
  if (row < rows) outer_rows<1, NV, partial, packed>(g, row, n);
}

// packed[k, b] = x[b, k] for rows <= NV vectors of rows; zeros where there are fewer.
template <int NV, typename T>
void pack_transposed(const T* x, int64_t x_stride, int64_t rows, int64_t steps, acc_t<T>* packed) {
  using Vec = typename VecOf<T>::type;
  constexpr int kLanes = Vec::kLanes;
  for (int64_t k = 0; k < steps; k += kLanes) {
    const int64_t n = smaller(kLanes, steps - k);
    for (int j = 0; j < NV; ++j) {
      typename Vec::V v[kLanes];
      UNROLL for (int i = 0; i < kLanes; ++i) {
        const int64_t b = j * kLanes + i;
        const T* from = x + b * x_stride + k;
        v[i] = b >= rows ? Vec::zero() : n == kLanes ? Vec::load(from) : Vec::load(from, n);
      }
      Vec::transpose(v);
      acc_t<T>* to = packed + k * NV * kLanes + j * kLanes;
      UNROLL for (int i = 0; i < kLanes; ++i) {
        if (i < n) Vec::store(to + i * NV * kLanes, v[i]);
      }
    }
  }
}
