// Sums of outer products: elements of A, one by one, broadcast against vectors of M, which is contiguous along its
// columns. So no lanes are ever summed, and A may lie in memory as it likes.
//
// A panel is some columns of M and of C = A M, one or two vectors of them, for all rows.
#pragma once

constexpr int kRun = 256;      // terms summed in registers before they are added to the totals
constexpr int kBlock = 264;    // rows whose totals are kept
constexpr int kPackRows = 24;  // packing pays from here
constexpr int kPanels = 4;     // that are worked on together where the operands are large

// How a panel of M lies in memory: as it is given, or packed, its rows next to each other and padded with zeros.
enum class Source { kInPlace, kPacked };

// One run of the inner dimension of a block of C, one panel (NV vectors) wide.
template <typename A, typename M, typename C>
struct PanelRun {
  const A* a;
  int64_t a_row_stride, a_col_stride;
  const M* m;
  int64_t m_stride;
  int64_t steps;
  acc_t<C>* totals;  // one panel width a row
  bool first;        // the totals are not yet there
  C* c;              // null: the totals are not yet complete
  int64_t c_stride;
};

// sums[i][j] += Σ_k a[i, k] · (vector j of m[k]).
template <typename Vec, Edge edge, Source source, int MR, int NV, typename M>
INLINE void add_outer_products(typename Vec::V (&sums)[MR][NV], const typename Vec::S* a, int64_t a_row_stride,
                               int64_t a_col_stride, const M* m, int64_t m_stride, int64_t steps, int64_t n) {
  constexpr int kLanes = Vec::kLanes;
  constexpr bool kMasked = edge == Edge::kPartial && source == Source::kInPlace;
  for (int64_t k = 0; k < steps; ++k, a += a_col_stride, m += source == Source::kPacked ? NV * kLanes : m_stride) {
    typename Vec::V row[NV];
    UNROLL for (int j = 0; j < NV; ++j) {
      row[j] = kMasked && j == NV - 1 ? Vec::load(m + j * kLanes, n) : Vec::load(m + j * kLanes);
    }
    UNROLL for (int i = 0; i < MR; ++i) {
      const typename Vec::V broadcast = Vec::set(a[i * a_row_stride]);
      UNROLL for (int j = 0; j < NV; ++j) sums[i][j] = Vec::fma(broadcast, row[j], sums[i][j]);
    }
  }
}

template <typename Vec, int MR, int NV>
INLINE void add_totals(typename Vec::V (&sums)[MR][NV], const typename Vec::S* totals) {
  UNROLL for (int i = 0; i < MR; ++i) {
    UNROLL for (int j = 0; j < NV; ++j) sums[i][j] += Vec::load(totals + (i * NV + j) * Vec::kLanes);
  }
}

template <typename Vec, int MR, int NV>
INLINE void store_totals(const typename Vec::V (&sums)[MR][NV], typename Vec::S* totals) {
  UNROLL for (int i = 0; i < MR; ++i) {
    UNROLL for (int j = 0; j < NV; ++j) Vec::store(totals + (i * NV + j) * Vec::kLanes, sums[i][j]);
  }
}

template <typename Vec, Edge edge, int MR, int NV, typename C>
INLINE void store_rows(const typename Vec::V (&sums)[MR][NV], C* c, int64_t c_stride, int64_t n) {
  UNROLL for (int i = 0; i < MR; ++i) {
    UNROLL for (int j = 0; j < NV; ++j) {
      C* to = c + i * c_stride + j * Vec::kLanes;
      if (edge == Edge::kPartial && j == NV - 1) {
        Vec::store(to, sums[i][j], n);
      } else {
        Vec::store(to, sums[i][j]);
      }
    }
  }
}

// A large C comes from beyond the L2 cache: it is fetched while the sums are computed.
template <int MR, int NV, int kLanes, typename C>
INLINE void prefetch_rows(const C* c, int64_t c_stride) {
  UNROLL for (int i = 0; i < MR; ++i) {
    UNROLL for (int j = 0; j < NV; ++j) __builtin_prefetch(c + i * c_stride + j * kLanes, 1);
  }
}

// MR rows of a run, from `row` on. kPartial: of the last vector only n columns are there.
template <int MR, int NV, Edge edge, Source source, typename S, typename M, typename C>
__attribute__((noinline)) void outer_tile(const PanelRun<S, M, C>& g, const S* a, int64_t a_row_stride, int64_t row,
                                          int64_t n) {
  using Vec = typename VecOf<S>::type;
  S* totals = g.totals + row * NV * Vec::kLanes;
  C* c = g.c ? g.c + row * g.c_stride : nullptr;
  typename Vec::V sums[MR][NV];
  UNROLL for (int i = 0; i < MR; ++i) { UNROLL for (int j = 0; j < NV; ++j) sums[i][j] = Vec::zero(); }
  if (c) prefetch_rows<MR, NV, Vec::kLanes>(c, g.c_stride);
  add_outer_products<Vec, edge, source>(sums, a, a_row_stride, g.a_col_stride, g.m, g.m_stride, g.steps, n);
  if (!g.first) add_totals<Vec>(sums, totals);
  if (c) {
    store_rows<Vec, edge>(sums, c, g.c_stride, n);
  } else {
    store_totals<Vec>(sums, totals);
  }
}

// The same for any A. One in 16 bits (unit column stride) is widened first, a tile's rows at a time.
template <int MR, int NV, Edge edge, Source source, typename A, typename M, typename C>
INLINE void outer_rows(const PanelRun<A, M, C>& g, int64_t row, int64_t n) {
  using S = acc_t<C>;
  if constexpr (sizeof(A) == sizeof(S)) {
    outer_tile<MR, NV, edge, source>(g, g.a + row * g.a_row_stride, g.a_row_stride, row, n);
  } else {
    using Vec = typename VecOf<C>::type;
    alignas(64) S a[MR * kRun];
    for (int i = 0; i < MR; ++i) {
      const A* from = g.a + (row + i) * g.a_row_stride;
      int64_t k = 0;
      for (; k + Vec::kLanes <= g.steps; k += Vec::kLanes) Vec::store(a + i * kRun + k, Vec::load(from + k));
      if (k < g.steps) Vec::store(a + i * kRun + k, Vec::load(from + k, g.steps - k), g.steps - k);
    }
    const PanelRun<S, M, C> wide = {.a = a,
                                    .a_row_stride = kRun,
                                    .a_col_stride = 1,
                                    .m = g.m,
                                    .m_stride = g.m_stride,
                                    .steps = g.steps,
                                    .totals = g.totals,
                                    .first = g.first,
                                    .c = g.c,
                                    .c_stride = g.c_stride};
    outer_tile<MR, NV, edge, source>(wide, a, kRun, row, n);
  }
}

template <int NV, Edge edge, Source source, typename A, typename M, typename C>
void outer_panel(const PanelRun<A, M, C>& g, int64_t rows, int64_t n) {
  constexpr int kRows = VecOf<C>::type::kOuterRows;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) outer_rows<kRows, NV, edge, source>(g, row, n);
  if (kRows > 8 && row + 8 <= rows) outer_rows<8, NV, edge, source>(g, row, n), row += 8;
  if (row + 4 <= rows) outer_rows<4, NV, edge, source>(g, row, n), row += 4;
  if (row + 2 <= rows) outer_rows<2, NV, edge, source>(g, row, n), row += 2;
  if (row < rows) outer_rows<1, NV, edge, source>(g, row, n);
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
