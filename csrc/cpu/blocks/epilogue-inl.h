// The way from z to the output, which never stores z: biases, activation, rounding to the output's type.
#pragma once

template <typename T>
void add_biases(const ForwardParams<T>& p, int64_t col, int64_t cols, acc_t<T>* bias) {
  for (int64_t j = 0; j < cols; ++j) {
    bias[j] = p.weights.bias_ih ? static_cast<acc_t<T>>(p.weights.bias_ih[col + j]) : 0;
    if (p.weights.bias_hh) bias[j] += static_cast<acc_t<T>>(p.weights.bias_hh[col + j]);
  }
}

// output = f(zᵀ + bias) for rows <= NV vectors of rows, zᵀ (cols, NV vectors).
template <int NV, typename T>
void epilogue_transposed(const ForwardParams<T>& p, const acc_t<T>* zt, int64_t row, int64_t rows, int64_t col,
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

template <typename T>
void epilogue(const ForwardParams<T>& p, int64_t row, int64_t row_end) {
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
