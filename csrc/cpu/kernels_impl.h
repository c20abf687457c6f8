// The kernels, written once over a vector type and compiled once for each instruction set: kernels_<isa>.cpp includes
// this inside a namespace of its own, all of it with internal linkage, after vec_<isa>.h. Nothing from std:: is used
// here: an inline function of the library compiled for AVX-512 could be the copy that the linker keeps for everyone.
//
// Forward: x and W (and h and U) are both contiguous along K, so an output is a dot product. A tile of outputs keeps one
// vector accumulator an output and shares each loaded vector with a row or a column of the tile; this needs no packing.
// The accumulators run over both halves of K, then are summed across lanes, and a small block of z on the stack goes
// through bias and activation to the output.
//
// Backward: both products have their right-hand matrix contiguous along N, so a tile of outputs is a sum of outer
// products: elements of dz, or of its transpose, broadcast against vectors of W or of x.

template <typename T>
struct VecOf {
  using type = VecF32;
};
template <>
struct VecOf<double> {
  using type = VecF64;
};

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

// ------------------------------------------------------------------------------------------------------------- forward

constexpr int kBlockCols = 64;     // columns of z on the stack
constexpr int kBlockSize = 8192;   // elements of z on the stack
constexpr int kBlockRows = kBlockSize / kBlockCols;

// acc[i][j] += a[i, :k] · w[j, :k], lane by lane. partial: only the first k lanes of one vector.
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

// z[i, j] for MR rows from row and n <= NR columns from col.
template <int MR, int NR, typename T>
void dot_tile(const ForwardParams<T>& p, int64_t row, int64_t col, int64_t n, const acc_t<T>* bias, acc_t<T>* z,
              int64_t z_stride) {
  using Vec = typename VecOf<T>::type;
  typename Vec::V acc[MR][NR];
  UNROLL for (int i = 0; i < MR; ++i) {
    UNROLL for (int j = 0; j < NR; ++j) acc[i][j] = Vec::zero();
  }
  // Columns past the last are computed as copies of it, and dropped.
  const T* w[NR];
  UNROLL for (int j = 0; j < NR; ++j) {
    w[j] = p.weight_ih.data + (col + smaller(j, n - 1)) * p.weight_ih.row_stride;
  }
  accumulate_dots<MR, NR, Vec>(acc, p.input.data + row * p.input.row_stride, p.input.row_stride, w, p.input_size);
  if (p.hx.data) {
    UNROLL for (int j = 0; j < NR; ++j) {
      w[j] = p.weight_hh.data + (col + smaller(j, n - 1)) * p.weight_hh.row_stride;
    }
    accumulate_dots<MR, NR, Vec>(acc, p.hx.data + row * p.hx.row_stride, p.hx.row_stride, w, p.hidden_size);
  }
  UNROLL for (int i = 0; i < MR; ++i) {
    acc_t<T> sums[NR];
    UNROLL for (int j = 0; j < NR; j += 4) Vec::sum4(&acc[i][j], sums + j);
    for (int j = 0; j < n; ++j) z[i * z_stride + j] = sums[j] + bias[j];
  }
}

// The columns of z for MR rows.
template <int MR, int NR, typename T>
void dot_rows(const ForwardParams<T>& p, int64_t row, int64_t col, int64_t cols, const acc_t<T>* bias, acc_t<T>* z,
              int64_t z_stride) {
  for (int64_t j = 0; j < cols; j += NR) {
    dot_tile<MR, NR>(p, row, col + j, smaller(NR, cols - j), bias + j, z + j, z_stride);
  }
}

template <typename T>
void forward_block(const ForwardParams<T>& p, int64_t row, int64_t rows, int64_t col, int64_t cols,
                   const acc_t<T>* bias) {
  alignas(64) acc_t<T> z[kBlockSize];
  int64_t i = 0;
  // A tile of four columns of W stays in L1 while the block's rows pass by it.
  for (int64_t j = 0; j < cols; j += 4) {
    for (i = 0; i + 4 <= rows; i += 4) {
      dot_tile<4, 4>(p, row + i, col + j, smaller(4, cols - j), bias + j, z + i * cols + j, cols);
    }
  }
  switch (rows - i) {
    case 3:
      dot_rows<3, 4>(p, row + i, col, cols, bias, z + i * cols, cols);
      break;
    case 2:
      dot_rows<2, 4>(p, row + i, col, cols, bias, z + i * cols, cols);
      break;
    case 1:
      dot_rows<1, 8>(p, row + i, col, cols, bias, z + i * cols, cols);
      break;
  }
  T* output = p.output + row * p.hidden_size + col;
  if (cols == p.hidden_size) {  // the block is one run of the output
    activate_run(p.nonlinearity, z, output, rows * cols);
  } else {
    for (i = 0; i < rows; ++i) activate_run(p.nonlinearity, z + i * cols, output + i * p.hidden_size, cols);
  }
}

template <typename T>
void forward(const ForwardParams<T>& p, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
  for (int64_t col = col_begin; col < col_end; col += kBlockCols) {
    const int64_t cols = smaller(kBlockCols, col_end - col);
    acc_t<T> bias[kBlockCols];
    for (int64_t j = 0; j < cols; ++j) {
      bias[j] = p.bias_ih ? static_cast<acc_t<T>>(p.bias_ih[col + j]) : 0;
      if (p.bias_hh) bias[j] += static_cast<acc_t<T>>(p.bias_hh[col + j]);
    }
    for (int64_t row = row_begin; row < row_end; row += kBlockRows) {
      forward_block(p, row, smaller(kBlockRows, row_end - row), col, cols, bias);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

// One vector of columns of dz, and its sum over the batch. n: the columns in it, the last vector being partial.
template <Nonlinearity kind, bool partial, typename T>
INLINE void grad_z_column(const BackwardParams<T>& p, acc_t<T>* dz, int64_t col, int64_t n) {
  using Vec = typename VecOf<T>::type;
  using V = typename Vec::V;
  // A cascade: every sum is of at most kRun terms, since the rounding error of a long running sum grows with its length.
  constexpr int64_t kRun = 16;
  constexpr int kLevels = 4;
  V sums[kLevels];
  UNROLL for (int level = 0; level < kLevels; ++level) sums[level] = Vec::zero();
  for (int64_t b = 0; b < p.batch;) {
    for (const int64_t run_end = smaller(b + kRun, p.batch); b < run_end; ++b) {
      const T* grad = p.grad_output.data + b * p.grad_output.row_stride + col;
      const T* y = p.output.data + b * p.output.row_stride + col;
      acc_t<T>* out = dz + b * p.hidden_size + col;
      if (partial) {
        const V d = activation_grad<kind, Vec>(Vec::load(grad, n), Vec::load(y, n));
        sums[0] += d;
        Vec::store(out, d, n);
      } else {
        const V d = activation_grad<kind, Vec>(Vec::load(grad), Vec::load(y));
        sums[0] += d;
        Vec::store(out, d);
      }
    }
    int64_t runs = b;
    for (int level = 1; level < kLevels && runs % kRun == 0; ++level, runs /= kRun) {
      sums[level] += sums[level - 1];
      sums[level - 1] = Vec::zero();
    }
  }
  const V total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if (p.grad_bias) Vec::store(p.grad_bias + col, total, n);
}

template <Nonlinearity kind, typename T>
void grad_z_columns(const BackwardParams<T>& p, acc_t<T>* dz, int64_t col_begin, int64_t col_end) {
  constexpr int kLanes = VecOf<T>::type::kLanes;
  int64_t col = col_begin;
  for (; col + kLanes <= col_end; col += kLanes) grad_z_column<kind, false>(p, dz, col, kLanes);
  if (col < col_end) grad_z_column<kind, true>(p, dz, col, col_end - col);
}

template <typename T>
void grad_z(const BackwardParams<T>& p, acc_t<T>* dz, int64_t col_begin, int64_t col_end) {
  switch (p.nonlinearity) {
    case Nonlinearity::kTanh:
      return grad_z_columns<Nonlinearity::kTanh>(p, dz, col_begin, col_end);
    case Nonlinearity::kRelu:
      return grad_z_columns<Nonlinearity::kRelu>(p, dz, col_begin, col_end);
    case Nonlinearity::kSigmoid:
      return grad_z_columns<Nonlinearity::kSigmoid>(p, dz, col_begin, col_end);
  }
}

// MR rows and NV vectors of columns of C = A M; of the last vector n columns where partial.
template <int MR, int NV, bool partial, typename T>
void product_tile(const Product<T>& g, int64_t row, int64_t col, int64_t n) {
  using Vec = typename VecOf<T>::type;
  using V = typename Vec::V;
  constexpr int kLanes = Vec::kLanes;
  constexpr int64_t kRun = 256;  // two levels of sums, for the same reason as in grad_z_column
  V total[MR][NV];
  for (int64_t run = 0; run == 0 || run < g.inner; run += kRun) {
    V acc[MR][NV];
    UNROLL for (int i = 0; i < MR; ++i) {
      UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = Vec::zero();
    }
    const int64_t steps = smaller(kRun, g.inner - run);
    const acc_t<T>* a = g.a + row * g.a_row_stride + run * g.a_col_stride;
    const T* m = g.m + run * g.m_stride + col;
    for (int64_t k = 0; k < steps; ++k, a += g.a_col_stride, m += g.m_stride) {
      V mv[NV];
      UNROLL for (int j = 0; j < NV; ++j) {
        mv[j] = partial && j == NV - 1 ? Vec::load(m + j * kLanes, n) : Vec::load(m + j * kLanes);
      }
      UNROLL for (int i = 0; i < MR; ++i) {
        const V av = Vec::set(a[i * g.a_row_stride]);
        UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = Vec::fma(av, mv[j], acc[i][j]);
      }
    }
    UNROLL for (int i = 0; i < MR; ++i) {
      UNROLL for (int j = 0; j < NV; ++j) total[i][j] = run == 0 ? acc[i][j] : total[i][j] + acc[i][j];
    }
  }
  UNROLL for (int i = 0; i < MR; ++i) {
    T* c = g.c + (row + i) * g.c_stride + col;
    UNROLL for (int j = 0; j < NV; ++j) {
      if (partial && j == NV - 1) {
        Vec::store(c + j * kLanes, total[i][j], n);
      } else {
        Vec::store(c + j * kLanes, total[i][j]);
      }
    }
  }
}

template <int NV, bool partial, typename T>
void product_rows(const Product<T>& g, int64_t row, int64_t row_end, int64_t col, int64_t n) {
  constexpr int kRows = VecOf<T>::type::kProductRows;
  for (; row + kRows <= row_end; row += kRows) product_tile<kRows, NV, partial>(g, row, col, n);
  if (kRows > 8 && row + 8 <= row_end) product_tile<8, NV, partial>(g, row, col, n), row += 8;
  if (row + 4 <= row_end) product_tile<4, NV, partial>(g, row, col, n), row += 4;
  if (row + 2 <= row_end) product_tile<2, NV, partial>(g, row, col, n), row += 2;
  if (row < row_end) product_tile<1, NV, partial>(g, row, col, n);
}

template <typename T>
void product(const Product<T>& g, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
  constexpr int kLanes = VecOf<T>::type::kLanes;
  int64_t col = col_begin;
  for (; col + 2 * kLanes <= col_end; col += 2 * kLanes) product_rows<2, false>(g, row_begin, row_end, col, kLanes);
  if (col + kLanes < col_end) {
    product_rows<2, true>(g, row_begin, row_end, col, col_end - col - kLanes);
  } else if (col + kLanes == col_end) {
    product_rows<1, false>(g, row_begin, row_end, col, kLanes);
  } else if (col < col_end) {
    product_rows<1, true>(g, row_begin, row_end, col, col_end - col);
  }
}

// --------------------------------------------------------------------------------------------------------------- table

template <typename T>
constexpr Kernels<T> kernels() {
  return {&forward<T>, &grad_z<T>, &product<T>};
}
