// C = A M by outer products, where M is contiguous along C's columns: as both products of the backward are.
#pragma once

template <int NV, int kMost, typename T>
struct alignas(64) ProductBuffers {
  static constexpr int kWidth = NV * VecOf<T>::type::kLanes;
  acc_t<T> totals[kMost][kBlock * kWidth];
  acc_t<T> packed[kMost][kRun * kWidth];
};

// Up to kMost neighbouring panels of a block of C, whose packed rows of M were next to each other in memory. One panel
// of less than kPackRows rows is not packed.
template <int NV, Edge edge, int kMost, typename T>
__attribute__((noinline)) void product_panels(const Product<T>& g, int64_t row, int64_t rows, int64_t col,
                                              int64_t panels, int64_t n) {
  using Vec = typename VecOf<T>::type;
  using S = acc_t<T>;
  using Buffers = ProductBuffers<NV, kMost, T>;
  constexpr int kLanes = Vec::kLanes, kWidth = Buffers::kWidth;
  auto& [totals, packed] = scratch<Buffers>();
  const S* a = g.a + row * g.a_row_stride;
  T* c = g.c + row * g.c_stride + col;
  for (int64_t k = 0; k == 0 || k < g.inner; k += kRun, a += kRun * g.a_col_stride) {
    const int64_t steps = smaller(kRun, g.inner - k);
    const T* m = g.m + k * g.m_stride + col;
    T* c_if_last = k + kRun >= g.inner ? c : nullptr;
    if (kMost == 1 && rows < kPackRows) {
      const PanelRun<S, T, T> run = {.a = a,
                                     .a_row_stride = g.a_row_stride,
                                     .a_col_stride = g.a_col_stride,
                                     .m = m,
                                     .m_stride = g.m_stride,
                                     .steps = steps,
                                     .totals = totals[0],
                                     .first = k == 0,
                                     .c = c_if_last,
                                     .c_stride = g.c_stride};
      outer_panel<NV, edge, Source::kInPlace>(run, rows, n);
      continue;
    }
    for (int64_t i = 0; i < steps; ++i, m += g.m_stride) {
      for (int64_t w = 0; w < panels; ++w) {
        UNROLL for (int j = 0; j < NV; ++j) {
          const T* from = m + w * kWidth + j * kLanes;
          const bool cut = edge == Edge::kPartial && j == NV - 1;
          Vec::store(packed[w] + i * kWidth + j * kLanes, cut ? Vec::load(from, n) : Vec::load(from));
        }
      }
    }
    for (int64_t w = 0; w < panels; ++w) {
      const PanelRun<S, S, T> run = {.a = a,
                                     .a_row_stride = g.a_row_stride,
                                     .a_col_stride = g.a_col_stride,
                                     .m = packed[w],
                                     .m_stride = kWidth,
                                     .steps = steps,
                                     .totals = totals[w],
                                     .first = k == 0,
                                     .c = c_if_last ? c_if_last + w * kWidth : nullptr,
                                     .c_stride = g.c_stride};
      outer_panel<NV, edge, Source::kPacked>(run, rows, n);
    }
  }
}

template <typename T>
void product(const Product<T>& g, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
  using Vec = typename VecOf<T>::type;
  constexpr int kLanes = Vec::kLanes, kWidth = 2 * kLanes;
  // With few terms, to store a tile's rows from one end to the other; with many, to pack M as seldom as possible.
  const int64_t block = g.inner < kFewTerms ? Vec::kOuterRows : kBlock;
  for (int64_t row = row_begin; row < row_end; row += block) {
    const int64_t rows = smaller(block, row_end - row);
    int64_t col = col_begin;
    while (rows >= kPackRows && col + 2 * kWidth <= col_end) {
      const int64_t panels = smaller(kPanels, (col_end - col) / kWidth);
      product_panels<2, Edge::kWhole, kPanels>(g, row, rows, col, panels, kLanes);
      col += panels * kWidth;
    }
    for (; col + kWidth <= col_end; col += kWidth) product_panels<2, Edge::kWhole, 1>(g, row, rows, col, 1, kLanes);
    if (col + kLanes < col_end) {
      product_panels<2, Edge::kPartial, 1>(g, row, rows, col, 1, col_end - col - kLanes);
    } else if (col + kLanes == col_end) {
      product_panels<1, Edge::kWhole, 1>(g, row, rows, col, 1, kLanes);
    } else if (col < col_end) {
      product_panels<1, Edge::kPartial, 1>(g, row, rows, col, 1, col_end - col);
    }
  }
}
