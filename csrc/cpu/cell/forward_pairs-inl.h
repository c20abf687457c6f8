// The forward pass of the cell in bfloat16, by pairs of terms.
#pragma once

struct alignas(64) PairForwardBuffers {
  float totals[kPairBlock * kPairWidth];
  float packed[kPairs * kPairWidth];
};

// At most kPairWidth rows.
void forward_pair_panel(const ForwardParams<BFloat16>& p, int64_t row, int64_t rows, int64_t col_begin,
                        int64_t col_end) {
  auto& [totals, packed] = scratch<PairForwardBuffers>();
  for (int64_t col = col_begin; col < col_end; col += kPairBlock) {
    const int64_t cols = smaller(kPairBlock, col_end - col);
    bool first = true;
    const auto add_run = [&](const BFloat16* x, int64_t x_stride, const BFloat16* w, int64_t w_stride, int64_t terms) {
      pack_pairs_transposed(x, x_stride, rows, terms, packed);
      pair_panel({.a = w,
                  .a_row_stride = w_stride,
                  .a_pair_stride = 2,
                  .m = packed,
                  .pairs = (terms + 1) / 2,
                  .totals = totals,
                  .first = first,
                  .c = nullptr,
                  .c_stride = 0},
                 cols, 0);
      first = false;
    };
    const auto add_operand = [&](const Matrix<BFloat16>& a, const Matrix<BFloat16>& weight, int64_t k_size) {
      const BFloat16* x = a.data + row * a.row_stride;
      const BFloat16* w = weight.data + col * weight.row_stride;
      const int64_t even = k_size / 2 * 2;
      for (int64_t k = 0; k < even; k += 2 * kPairs) {
        add_run(x + k, a.row_stride, w + k, weight.row_stride, smaller(2 * kPairs, even - k));
      }
      if (even < k_size) {  // the last term is a run of its own, with W's one from here and a zero
        BFloat16 last[kPairBlock][2] = {};
        for (int64_t c = 0; c < cols; ++c) last[c][0] = w[c * weight.row_stride + even];
        add_run(x + even, a.row_stride, last[0], 2, 1);
      }
    };
    add_operand(p.input, p.weights.weight_ih, p.weights.input_size);
    if (p.hx.data) add_operand(p.hx, p.weights.weight_hh, p.weights.hidden_size);
    if (first) __builtin_memset(totals, 0, sizeof(totals));
    epilogue_transposed<2>(p, totals, row, rows, col, cols);
  }
}

void forward_by_pairs(const ForwardParams<BFloat16>& p, int64_t row, int64_t row_end, int64_t col_begin,
                      int64_t col_end) {
  static_assert(kPairPanelShape.rows == kPairWidth);
  const int64_t in_panels = rows_in_panels(p.batch, p.weights.hidden_size, kPairPanelShape);
  const int64_t panels_end = smaller(in_panels, row_end);
  for (; row < panels_end; row += kPairWidth) {
    forward_pair_panel(p, row, smaller(kPairWidth, panels_end - row), col_begin, col_end);
  }
  if (row < row_end) kernels_avx512().bf16.forward(p, row, row_end, col_begin, col_end);
}
