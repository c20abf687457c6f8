// The kernels, written once over a vector type and compiled once for each instruction set: kernels_<isa>.cpp includes
// this inside a namespace of its own, all of it with internal linkage, after vec_<isa>.h. Nothing from std:: is used
// here: an inline function of the library compiled for AVX-512 could be the copy that the linker keeps for everyone.
//
// Forward, few rows: x and W (and h and U) are both contiguous along K, so an output is a dot product. A tile of
// outputs keeps one vector accumulator an output and shares each loaded vector with a row or a column of the tile;
// nothing is packed. The accumulators run over both halves of K, then are summed across lanes.
//
// Forward, many rows: the sums across lanes would cost more than they must, so a panel of rows of x is transposed into
// a small buffer, and zᵀ is a sum of outer products: elements of W broadcast against vectors of the panel. W is by far
// the larger operand, and is read as it lies, or, when large, copied for several panels.
//
// Either way z exists only as a block, which goes through bias and activation to the output.
//
// Backward: both products have their right-hand matrix contiguous along N; the same outer products, with elements of
// dz, or of its transpose, broadcast against vectors of W or of x.

template <typename T>
struct VecOf {
  using type = VecF32;
};
template <>
struct VecOf<double> {
  using type = VecF64;
};

// A kernel's blocks in the thread's memory. Of one kernel at a time: they don't nest.
template <typename Buffers>
INLINE Buffers& scratch() {
  static_assert(sizeof(Buffers) <= kScratchBytes);
  return *static_cast<Buffers*>(scratch_memory());
}

constexpr int smaller_int(int a, int b) { return a < b ? a : b; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---------------------------------------------------------------------------------------------------------- activation

template <Nonlinearity kind, typename Vec>
INLINE typename Vec::V activate(typename Vec::V z) {
  if (kind == Nonlinearity::kTanh) return Vec::tanh(z);
  if (kind == Nonlinearity::kRelu) return Vec::zero_unless_positive(z, z);  // a NaN stays a NaN
  return Vec::set(1) / (Vec::set(1) + Vec::exp(-z));
}

template <Nonlinearity kind, typename Vec>
INLINE typename Vec::V activation_grad(typename Vec::V grad, typename Vec::V y) {
  if (kind == Nonlinearity::kTanh) return grad * ((Vec::set(1) - y) * (Vec::set(1) + y));  // 1 - y² would cancel near 1
  if (kind == Nonlinearity::kRelu) return Vec::zero_unless_positive(grad, y);  // as aten::threshold_backward
  return grad * ((Vec::set(1) - y) * y);
}

template <Nonlinearity kind, typename T>
void activate_run(const acc_t<T>* z, T* output, int64_t n) {
  using Vec = typename VecOf<T>::type;
  int64_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) Vec::store(output + i, activate<kind, Vec>(Vec::load(z + i)));
  if (i < n) Vec::store(output + i, activate<kind, Vec>(Vec::load(z + i, n - i)), n - i);
}

template <typename T>
void activate_run(Nonlinearity kind, const acc_t<T>* z, T* output, int64_t n) {
  switch (kind) {
    case Nonlinearity::kTanh:
      return activate_run<Nonlinearity::kTanh>(z, output, n);
    case Nonlinearity::kRelu:
      return activate_run<Nonlinearity::kRelu>(z, output, n);
    case Nonlinearity::kSigmoid:
      return activate_run<Nonlinearity::kSigmoid>(z, output, n);
  }
}

// ------------------------------------------------------------------------------------------------------ outer products

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

// ------------------------------------------------------------------------------------------------------------- forward

constexpr int kPanelCols = 48;            // from which the kernel for many rows pays
constexpr int kMaxChunk = 256;            // columns of z
constexpr int64_t kChunkBytes = 1 << 19;  // of W and U, to stay in L2 while all rows pass
constexpr int64_t kCopyBytes = 1 << 20;   // of W and U, beyond which blocks of them are copied

// K, the terms of a sum: those of x, and those of h if it is there.
template <typename T>
INLINE int64_t terms_of(const ForwardParams<T>& p) {
  return p.weights.input_size + (p.hx.data ? p.weights.hidden_size : 0);
}

template <typename T>
void add_biases(const ForwardParams<T>& p, int64_t col, int64_t cols, acc_t<T>* bias) {
  for (int64_t j = 0; j < cols; ++j) {
    bias[j] = p.weights.bias_ih ? static_cast<acc_t<T>>(p.weights.bias_ih[col + j]) : 0;
    if (p.weights.bias_hh) bias[j] += static_cast<acc_t<T>>(p.weights.bias_hh[col + j]);
  }
}

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

// The same for a run [begin, end) of one half of K, W's rows being col, col + 1, ... Past the n-th they are copies of
// it, whose sums are dropped.
template <int MR, int NR, typename Vec, typename T>
INLINE void accumulate_half(typename Vec::V (&acc)[MR][NR], const Matrix<T>& a, const Matrix<T>& weight, int64_t row,
                            int64_t col, int64_t n, int64_t begin, int64_t end) {
  const T* w[NR];
  UNROLL for (int j = 0; j < NR; ++j) w[j] = weight.data + (col + smaller(j, n - 1)) * weight.row_stride + begin;
  accumulate_dots<MR, NR, Vec>(acc, a.data + row * a.row_stride + begin, a.row_stride, w, end - begin);
}

// z[i, j] += the run [begin, end) of the concatenated K, for MR rows from row and n <= NR columns from col.
template <int MR, int NR, typename T>
__attribute__((noinline)) void dot_tile(const ForwardParams<T>& p, int64_t row, int64_t col, int64_t n, int64_t begin,
                                        int64_t end, acc_t<T>* z, int64_t z_stride) {
  using Vec = typename VecOf<T>::type;
  typename Vec::V acc[MR][NR];
  UNROLL for (int i = 0; i < MR; ++i) { UNROLL for (int j = 0; j < NR; ++j) acc[i][j] = Vec::zero(); }
  const int64_t I = p.weights.input_size;
  if (begin < I) accumulate_half<MR, NR, Vec>(acc, p.input, p.weights.weight_ih, row, col, n, begin, smaller(end, I));
  if (end > I)
    accumulate_half<MR, NR, Vec>(acc, p.hx, p.weights.weight_hh, row, col, n, begin < I ? 0 : begin - I, end - I);
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

// output = f(zᵀ + bias) for rows <= NV vectors of rows, zᵀ (cols, NV vectors).
template <int NV, typename T>
void finish_transposed(const ForwardParams<T>& p, const acc_t<T>* zt, int64_t row, int64_t rows, int64_t col,
                       int64_t cols) {
  using Vec = typename VecOf<T>::type;
  using S = acc_t<T>;
  constexpr int kLanes = Vec::kLanes;
  constexpr int kWidth = NV * kLanes;
  constexpr int kChunk = 64;
  for (int64_t chunk = 0; chunk < cols; chunk += kChunk) {
    const int64_t n = smaller(kChunk, cols - chunk);
    S bias[kChunk] = {};
    alignas(64) S z[kWidth * kChunk];
    add_biases(p, col + chunk, n, bias);
    for (int64_t c = 0; c < n; c += kLanes) {
      const typename Vec::V bias_v = Vec::load(bias + c);
      for (int j = 0; j < NV; ++j) {
        typename Vec::V v[kLanes];
        UNROLL for (int i = 0; i < kLanes; ++i) {
          v[i] = Vec::load(zt + (chunk + smaller(c + i, n - 1)) * kWidth + j * kLanes);
        }
        Vec::transpose(v);
        UNROLL for (int i = 0; i < kLanes; ++i) Vec::store(z + (j * kLanes + i) * kChunk + c, v[i] + bias_v);
      }
    }
    for (int64_t b = 0; b < rows; ++b) {
      activate_run(p.weights.nonlinearity, z + b * kChunk, p.output + (row + b) * p.weights.hidden_size + col + chunk,
                   n);
    }
  }
}

template <int NV, bool kCopies, typename T>
struct alignas(64) ForwardBuffers {
  static constexpr int kWidth = NV * VecOf<T>::type::kLanes;
  static constexpr int kCopyStride = kRun + 64 / sizeof(T);
  acc_t<T> totals[kCopies ? kPanels : 1][kBlock * kWidth];
  acc_t<T> packed[kRun * kWidth];
  T copy[kCopies ? kBlock * kCopyStride : 1];
};

// Rows in panels of NV vectors. kCopies: up to kPanels of them share a copy of a block of W, made with rows that don't
// compete for the same lines of the cache, as those a power of two apart would; otherwise one panel, and W as it lies.
template <int NV, bool kCopies, typename T>
__attribute__((noinline)) void forward_panels(const ForwardParams<T>& p, int64_t row, int64_t rows, int64_t col_begin,
                                              int64_t col_end) {
  using S = acc_t<T>;
  using Buffers = ForwardBuffers<NV, kCopies, T>;
  constexpr int kWidth = Buffers::kWidth, kCopyStride = Buffers::kCopyStride;
  auto& [totals, packed, copy] = scratch<Buffers>();
  for (int64_t col = col_begin; col < col_end; col += kBlock) {
    const int64_t cols = smaller(kBlock, col_end - col);
    bool first = true;
    const auto add_half = [&](const Matrix<T>& a, const Matrix<T>& weight, int64_t k_size) {
      for (int64_t k = 0; k < k_size; k += kRun, first = false) {
        const int64_t steps = smaller(kRun, k_size - k);
        const T* w = weight.data + col * weight.row_stride + k;
        int64_t w_stride = weight.row_stride;
        if (kCopies) {
          for (int64_t c = 0; c < cols; ++c, w += w_stride) {
            __builtin_memcpy(copy + c * kCopyStride, w, steps * sizeof(T));
          }
          w = copy;
          w_stride = kCopyStride;
        }
        for (int64_t b = 0; b < rows; b += kWidth) {
          const T* x = a.data + (row + b) * a.row_stride + k;
          pack_transposed<NV>(x, a.row_stride, smaller(kWidth, rows - b), steps, packed);
          const Panel<T, S, T> panel = {w, w_stride, 1, packed, kWidth, steps, totals[b / kWidth], first, nullptr, 0};
          outer_panel<NV, false, true>(panel, cols, 0);
        }
      }
    };
    add_half(p.input, p.weights.weight_ih, p.weights.input_size);
    if (p.hx.data) add_half(p.hx, p.weights.weight_hh, p.weights.hidden_size);
    if (first) __builtin_memset(totals, 0, sizeof(totals));
    for (int64_t b = 0; b < rows; b += kWidth) {
      finish_transposed<NV>(p, totals[b / kWidth], row + b, smaller(kWidth, rows - b), col, cols);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- forward

template <typename T>
void forward(const ForwardParams<T>& p, int64_t row, int64_t row_end, int64_t col_begin, int64_t col_end) {
  constexpr int kLanes = VecOf<T>::type::kLanes;
  // A panel's cost is that of its full width: taken where at most a fifth would be lost. Transposing needs enough
  // columns to be worth it. Both by the sizes of the cell: a thread's share must not change the result.
  const int64_t rest = p.batch % kLanes, in_panels = p.batch - (rest * 5 >= kLanes * 4 ? 0 : rest);
  const int64_t panels_end = p.weights.hidden_size >= kPanelCols ? smaller(in_panels, row_end) : row;
  constexpr bool kCopies = sizeof(T) < 8;  // the copy of a block of doubles would take half a megabyte
  const bool copies = kCopies && terms_of(p) * p.weights.hidden_size * static_cast<int64_t>(sizeof(T)) > kCopyBytes;
  while (row < panels_end) {
    const int64_t left = panels_end - row;
    int64_t rows = smaller(2 * kLanes, left);
    if (rows <= kLanes) {
      forward_panels<1, false>(p, row, rows, col_begin, col_end);
    } else if (copies && left >= 4 * kLanes) {
      rows = smaller(kPanels, left / (2 * kLanes)) * 2 * kLanes;
      forward_panels<2, kCopies>(p, row, rows, col_begin, col_end);
    } else {
      forward_panels<2, false>(p, row, rows, col_begin, col_end);
    }
    row += rows;
  }
  if (row < row_end) forward_few(p, row, row_end, col_begin, col_end);
}

template <typename T>
void finish(const ForwardParams<T>& p, int64_t row, int64_t row_end) {
  for (int64_t col = 0; col < p.weights.hidden_size; col += kMaxChunk) {
    const int64_t cols = smaller(kMaxChunk, p.weights.hidden_size - col);
    acc_t<T> bias[kMaxChunk], z[kMaxChunk];
    add_biases(p, col, cols, bias);
    for (int64_t b = row; b < row_end; ++b) {
      T* output = p.output + b * p.weights.hidden_size + col;
      for (int64_t j = 0; j < cols; ++j) z[j] = output[j] + bias[j];
      activate_run(p.weights.nonlinearity, z, output, cols);
    }
  }
}

// ------------------------------------------------------------------------------------------------------ backward: dz

// dz for NV vectors of columns, and its sums over the batch. partial: the last vector has n columns.
template <Nonlinearity kind, int NV, bool partial, typename T>
void grad_z_strip(const BackwardParams<T>& p, const DzBlock<T>& dz, int64_t col, int64_t n) {
  using Vec = typename VecOf<T>::type;
  using V = typename Vec::V;
  constexpr int kLanes = Vec::kLanes;
  // A cascade: every sum is of at most 16 terms, since the rounding error of a long running sum grows with its length.
  constexpr int64_t kRunRows = 16;
  constexpr int kLevels = 4;
  // Columns of grad_output that are not next to each other are gathered; once, where the rows are all the same one.
  const Matrix<T>& grad_output = p.grad_output;
  const bool gathers = grad_output.col_stride != 1;
  const int64_t cols = (NV - 1) * kLanes + n;
  T gathered[NV * kLanes];
  V sums[kLevels][NV];
  UNROLL for (int level = 0; level < kLevels; ++level) {
    UNROLL for (int j = 0; j < NV; ++j) sums[level][j] = Vec::zero();
  }
  for (int64_t b = 0; b < dz.rows();) {
    V run[NV];
    UNROLL for (int j = 0; j < NV; ++j) run[j] = Vec::zero();
    for (const int64_t run_end = smaller(b + kRunRows, dz.rows()); b < run_end; ++b) {
      const T* grad = grad_output.data + (dz.row_begin + b) * grad_output.row_stride + col * grad_output.col_stride;
      if (gathers) {
        if (b == 0 || grad_output.row_stride != 0) {
          for (int64_t j = 0; j < cols; ++j) gathered[j] = grad[j * grad_output.col_stride];
        }
        grad = gathered;
      }
      const T* y = p.output.data + (dz.row_begin + b) * p.output.row_stride + col;
      acc_t<T>* out = dz.data + b * dz.row_stride + (col - dz.col_begin);
      UNROLL for (int j = 0; j < NV; ++j, grad += kLanes, y += kLanes, out += kLanes) {
        if (partial && j == NV - 1) {
          const V d = activation_grad<kind, Vec>(Vec::load(grad, n), Vec::load(y, n));
          run[j] += d;
          Vec::store(out, d, n);
        } else {
          const V d = activation_grad<kind, Vec>(Vec::load(grad), Vec::load(y));
          run[j] += d;
          Vec::store(out, d);
        }
      }
    }
    UNROLL for (int j = 0; j < NV; ++j) sums[0][j] += run[j];
    int64_t runs = b / kRunRows;
    for (int level = 1; level < kLevels && runs % kRunRows == 0; ++level, runs /= kRunRows) {
      UNROLL for (int j = 0; j < NV; ++j) {
        sums[level][j] += sums[level - 1][j];
        sums[level - 1][j] = Vec::zero();
      }
    }
  }
  if (!p.grad_bias || dz.rows() < p.batch) return;
  UNROLL for (int j = 0; j < NV; ++j) {
    const V total = (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]);
    if (partial && j == NV - 1) {
      Vec::store(p.grad_bias + col + j * kLanes, total, n);
    } else {
      Vec::store(p.grad_bias + col + j * kLanes, total);
    }
  }
}

template <Nonlinearity kind, typename T>
void grad_z_columns(const BackwardParams<T>& p, const DzBlock<T>& dz, int64_t col, int64_t col_end) {
  constexpr int kLanes = VecOf<T>::type::kLanes;
  for (; col + 4 * kLanes <= col_end; col += 4 * kLanes) grad_z_strip<kind, 4, false>(p, dz, col, kLanes);
  for (; col + kLanes <= col_end; col += kLanes) grad_z_strip<kind, 1, false>(p, dz, col, kLanes);
  if (col < col_end) grad_z_strip<kind, 1, true>(p, dz, col, col_end - col);
}

template <typename T>
void grad_z(const BackwardParams<T>& p, const DzBlock<T>& dz, int64_t col_begin, int64_t col_end) {
  switch (p.weights.nonlinearity) {
    case Nonlinearity::kTanh:
      return grad_z_columns<Nonlinearity::kTanh>(p, dz, col_begin, col_end);
    case Nonlinearity::kRelu:
      return grad_z_columns<Nonlinearity::kRelu>(p, dz, col_begin, col_end);
    case Nonlinearity::kSigmoid:
      return grad_z_columns<Nonlinearity::kSigmoid>(p, dz, col_begin, col_end);
  }
}

// ------------------------------------------------------------------------------------------------ backward: products

template <int NV, int kMost, typename T>
struct alignas(64) ProductBuffers {
  static constexpr int kWidth = NV * VecOf<T>::type::kLanes;
  acc_t<T> totals[kMost][kBlock * kWidth];
  acc_t<T> packed[kMost][kRun * kWidth];
};

// Up to kMost neighbouring panels of a block of C, whose packed rows of M were next to each other in memory. One panel
// of less than kPackRows rows is not packed.
template <int NV, bool partial, int kMost, typename T>
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
      const Panel<S, T, T> panel = {a,     g.a_row_stride, g.a_col_stride, m,         g.m_stride,
                                    steps, totals[0],      k == 0,         c_if_last, g.c_stride};
      outer_panel<NV, partial, false>(panel, rows, n);
      continue;
    }
    for (int64_t i = 0; i < steps; ++i, m += g.m_stride) {
      for (int64_t w = 0; w < panels; ++w) {
        UNROLL for (int j = 0; j < NV; ++j) {
          const T* from = m + w * kWidth + j * kLanes;
          const bool cut = partial && j == NV - 1;
          Vec::store(packed[w] + i * kWidth + j * kLanes, cut ? Vec::load(from, n) : Vec::load(from));
        }
      }
    }
    for (int64_t w = 0; w < panels; ++w) {
      T* c_there = c_if_last ? c_if_last + w * kWidth : nullptr;
      const Panel<S, S, T> panel = {a,     g.a_row_stride, g.a_col_stride, packed[w], kWidth,
                                    steps, totals[w],      k == 0,         c_there,   g.c_stride};
      outer_panel<NV, partial, true>(panel, rows, n);
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
      product_panels<2, false, kPanels>(g, row, rows, col, panels, kLanes);
      col += panels * kWidth;
    }
    for (; col + kWidth <= col_end; col += kWidth) product_panels<2, false, 1>(g, row, rows, col, 1, kLanes);
    if (col + kLanes < col_end) {
      product_panels<2, true, 1>(g, row, rows, col, 1, col_end - col - kLanes);
    } else if (col + kLanes == col_end) {
      product_panels<1, false, 1>(g, row, rows, col, 1, kLanes);
    } else if (col < col_end) {
      product_panels<1, true, 1>(g, row, rows, col, 1, col_end - col);
    }
  }
}

// --------------------------------------------------------------------------------------------------------------- table

template <typename T>
constexpr Kernels<T> kernels() {
  return {&forward<T>, &finish<T>, &grad_z<T>, &product<T>};
}
