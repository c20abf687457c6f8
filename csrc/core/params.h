// What every kernel is told: plain pointers, sizes and strides. No torch types below this line of the design.
//
// Strides count elements, not bytes.
#pragma once
#include <cstdint>

namespace rnn_ext {

enum class Nonlinearity : int { kTanh, kRelu, kSigmoid };

// A read-only matrix; a null pointer stands for an absent operand.
template <typename T>
struct Matrix {
  const T* data = nullptr;
  int64_t row_stride = 0;
  int64_t col_stride = 1;
};

// What a layer of the network learns: z = W x + b_ih + U h + b_hh, and the f of h' = f(z). I input_size, H hidden_size.
template <typename T>
struct Weights {
  Matrix<T> weight_ih;  // W: (H, I)
  Matrix<T> weight_hh;  // U: (H, H)
  const T* bias_ih;     // (H), contiguous, or null
  const T* bias_hh;     // (H), contiguous, or null
  int64_t input_size, hidden_size;
  Nonlinearity nonlinearity;
};

}  // namespace rnn_ext
