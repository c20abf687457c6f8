// The forward pass of the cell.
//
// Few rows: x and W (and h and U) are both contiguous along K, so an output is a dot product, whose accumulators run
// over both parts of K.
//
// Many rows: the sums across lanes would cost more than they must, so zᵀ = W xᵀ is a sum of outer products: elements of
// W broadcast against vectors of a panel of xᵀ, which is some rows of x, transposed into a small buffer. W is by far
// the larger operand, and is read as it lies, or, when large, copied for several panels.
//
// Either way z exists only as a block, which goes through bias and activation to the output.
#pragma once

constexpr int64_t kChunkBytes = 1 << 19;  // of W and U, to stay in L2 while all rows pass
constexpr int64_t kCopyBytes = 1 << 20;   // of W and U, beyond which blocks of them are copied

// K, the terms of a sum: those of x, and those of h if it is there.
template <typename T>
INLINE int64_t terms_of(const ForwardParams<T>& p) {
  return p.weights.input_size + (p.hx.data ? p.weights.hidden_size : 0);
}

// z[i, j] += the run [begin, end) of the concatenated K, for MR rows from row and n <= NR columns from col.
template <int MR, int NR, typename T>
__attribute__((noinline)) void dot_tile(const ForwardParams<T>& p, int64_t row, int64_t col, int64_t n, int64_t begin,
                                        int64_t end, acc_t<T>* z, int64_t z_stride) {
  using Vec = typename VecOf<T>::type;
  typename Vec::V acc[MR][NR];
  UNROLL for (int i = 0; i < MR; ++i) { UNROLL for (int j = 0; j < NR; ++j) acc[i][j] = Vec::zero(); }
  const int64_t I = p.weights.input_size;
  if (begin < I)
    accumulate_operand<MR, NR, Vec>(acc, p.input, p.weights.weight_ih, row, col, n, begin, smaller(end, I));
  if (end > I)
    accumulate_operand<MR, NR, Vec>(acc, p.hx, p.weights.weight_hh, row, col, n, begin < I ? 0 : begin - I, end - I);
  UNROLL for (int i = 0; i < MR; ++i) {
    acc_t<T> sums[NR];
    UNROLL for (int j = 0; j < NR; j += 4) Vec::sum4(&acc[i][j], sums + j);
    if (n == NR) {
      UNROLL for (int j = 0; j < NR; ++j) z[i * z_stride + j] += sums[j];
    } else {
      for (int64_t j = 0; j < n; ++j) z[i * z_stride + j] += sums[j];
    }
  }
}

// MR rows of a chunk of columns: z, then the output. Not inlined, or each MR would have its own z on the caller's
// stack.
template <int MR, typename T>
__attribute__((noinline)) void forward_rows(const ForwardParams<T>& p, int64_t row, int64_t col, int64_t cols,
                                            const acc_t<T>* bias) {
  constexpr int NR = dot_cols<MR, typename VecOf<T>::type>();
  // 64 terms a lane: a tile's rows of x stay in L1 while W passes, and a lane's rounding error stays small.
  constexpr int64_t kDotRun = 64 * VecOf<T>::type::kLanes;
  acc_t<T> z[MR * kMaxChunk];
  for (int i = 0; i < MR; ++i) {
    for (int64_t j = 0; j < cols; ++j) z[i * cols + j] = bias[j];
  }
  const int64_t K = terms_of(p);
  for (int64_t k = 0; k < K; k += kDotRun) {
    for (int64_t j = 0; j < cols; j += NR) {
      dot_tile<MR, NR>(p, row, col + j, smaller(NR, cols - j), k, smaller(k + kDotRun, K), z + j, cols);
    }
  }
  T* output = p.output + row * p.weights.hidden_size + col;
  if (cols == p.weights.hidden_size) {  // the rows are one run of the output
    activate_run(p.weights.nonlinearity, z, output, MR * cols);
  } else {
    for (int i = 0; i < MR; ++i)
      activate_run(p.weights.nonlinearity, z + i * cols, output + i * p.weights.hidden_size, cols);
  }
}

template <typename T>
void forward_few(const ForwardParams<T>& p, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
  constexpr int kRows = VecOf<T>::type::kDotRows;
  const int64_t K = terms_of(p);
  const int64_t fitting = kChunkBytes / static_cast<int64_t>(sizeof(T)) / (K + 1) / 8 * 8;
  const int64_t chunk = fitting < 32 ? 32 : smaller(fitting, kMaxChunk);
  for (int64_t col = col_begin; col < col_end; col += chunk) {
    const int64_t cols = smaller(chunk, col_end - col);
    acc_t<T> bias[kMaxChunk];
    add_biases(p, col, cols, bias);
    // Tiles of nearly equal height: 8 rows are 4 + 4, not 6 + 2.
    for (int64_t row = row_begin; row < row_end;) {
      const int64_t left = row_end - row, tiles = (left + kRows - 1) / kRows, rows = (left + tiles - 1) / tiles;
      switch (rows) {
        case 1:
          forward_rows<1>(p, row, col, cols, bias);
          break;
        case 2:
          forward_rows<2>(p, row, col, cols, bias);
          break;
        case 3:
          forward_rows<3>(p, row, col, cols, bias);
          break;
        case 4:
          forward_rows<smaller_int(4, kRows)>(p, row, col, cols, bias);
          break;
        case 5:
          forward_rows<smaller_int(5, kRows)>(p, row, col, cols, bias);
          break;
        case 6:
          forward_rows<smaller_int(6, kRows)>(p, row, col, cols, bias);
          break;
      }
      row += rows;
    }
  }
}

// -------------------------------------------------------------------------------------------------- forward, many rows

// W as it lies, for one panel; or a copy of a block of it, which up to kPanels panels share, with rows that don't
// compete for the same lines of the cache, as those a power of two apart would.
enum class Weight { kInPlace, kCopied };

template <int NV, Weight weight, typename T>
struct alignas(64) ForwardBuffers {
  static constexpr bool kCopies = weight == Weight::kCopied;
  static constexpr int kWidth = NV * VecOf<T>::type::kLanes;
  static constexpr int kCopyStride = kRun + 64 / sizeof(T);
  acc_t<T> totals[kCopies ? kPanels : 1][kBlock * kWidth];
  acc_t<T> packed[kRun * kWidth];
  T copy[kCopies ? kBlock * kCopyStride : 1];
};

// Rows in panels of NV vectors.
template <int NV, Weight how, typename T>
__attribute__((noinline)) void forward_panels(const ForwardParams<T>& p, int64_t row, int64_t rows, int64_t col_begin,
                                              int64_t col_end) {
  using S = acc_t<T>;
  using Buffers = ForwardBuffers<NV, how, T>;
  constexpr int kWidth = Buffers::kWidth, kCopyStride = Buffers::kCopyStride;
  auto& [totals, packed, copy] = scratch<Buffers>();
  for (int64_t col = col_begin; col < col_end; col += kBlock) {
    const int64_t cols = smaller(kBlock, col_end - col);
    bool first = true;
    const auto add_operand = [&](const Matrix<T>& a, const Matrix<T>& weight, int64_t k_size) {
      for (int64_t k = 0; k < k_size; k += kRun, first = false) {
        const int64_t steps = smaller(kRun, k_size - k);
        const T* w = weight.data + col * weight.row_stride + k;
        int64_t w_stride = weight.row_stride;
        if (how == Weight::kCopied) {
          for (int64_t c = 0; c < cols; ++c, w += w_stride) {
            __builtin_memcpy(copy + c * kCopyStride, w, steps * sizeof(T));
          }
          w = copy;
          w_stride = kCopyStride;
        }
        for (int64_t b = 0; b < rows; b += kWidth) {
          const T* x = a.data + (row + b) * a.row_stride + k;
          pack_transposed<NV>(x, a.row_stride, smaller(kWidth, rows - b), steps, packed);
          const PanelRun<T, S, T> run = {.a = w,
                                         .a_row_stride = w_stride,
                                         .a_col_stride = 1,
                                         .m = packed,
                                         .m_stride = kWidth,
                                         .steps = steps,
                                         .totals = totals[b / kWidth],
                                         .first = first,
                                         .c = nullptr,
                                         .c_stride = 0};
          outer_panel<NV, Edge::kWhole, Source::kPacked>(run, cols, 0);
        }
      }
    };
    add_operand(p.input, p.weights.weight_ih, p.weights.input_size);
    if (p.hx.data) add_operand(p.hx, p.weights.weight_hh, p.weights.hidden_size);
    if (first) __builtin_memset(totals, 0, sizeof(totals));
    for (int64_t b = 0; b < rows; b += kWidth) {
      epilogue_transposed<NV>(p, totals[b / kWidth], row + b, smaller(kWidth, rows - b), col, cols);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- forward

template <typename T>
void forward(const ForwardParams<T>& p, int64_t row, int64_t row_end, int64_t col_begin, int64_t col_end) {
  constexpr int kLanes = VecOf<T>::type::kLanes;
  const int64_t in_panels = rows_in_panels(p.batch, p.weights.hidden_size, outer_panel_shape(kLanes));
  const int64_t panels_end = smaller(in_panels, row_end);
  // The copy of a block of doubles would take half a megabyte.
  constexpr Weight kLarge = sizeof(T) < 8 ? Weight::kCopied : Weight::kInPlace;
  const bool copies =
      kLarge == Weight::kCopied && terms_of(p) * p.weights.hidden_size * static_cast<int64_t>(sizeof(T)) > kCopyBytes;
  while (row < panels_end) {
    const int64_t left = panels_end - row;
    int64_t rows = smaller(2 * kLanes, left);
    if (rows <= kLanes) {
      forward_panels<1, Weight::kInPlace>(p, row, rows, col_begin, col_end);
    } else if (copies && left >= 4 * kLanes) {
      rows = smaller(kPanels, left / (2 * kLanes)) * 2 * kLanes;
      forward_panels<2, kLarge>(p, row, rows, col_begin, col_end);
    } else {
      forward_panels<2, Weight::kInPlace>(p, row, rows, col_begin, col_end);
    }
    row += rows;
  }
  if (row < row_end) forward_few(p, row, row_end, col_begin, col_end);
}
