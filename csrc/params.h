// What a kernel is told: plain pointers, sizes and strides. No torch types below this line of the design.
//
//   B batch, I input_size, H hidden_size.   x: (B, I)   h: (B, H)   W = weight_ih: (H, I)   U = weight_hh: (H, H)
//
//   forward    output = f(x Wᵀ + b_ih + h Uᵀ + b_hh)
//   backward   dz = grad_output · f'(output)     [grad_input | grad_hx] = dz [W | U]
//              [grad_weight_ih | grad_weight_hh] = dzᵀ [x | h]     grad_bias = Σ_B dz
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

template <typename T>
struct ForwardParams {
  Matrix<T> input;      // (B, I)
  Matrix<T> hx;         // (B, H), absent: h = 0, and that half of K is skipped
  Matrix<T> weight_ih;  // (H, I)
  Matrix<T> weight_hh;  // (H, H)
  const T* bias_ih;     // (H), contiguous, or null
  const T* bias_hh;     // (H), contiguous, or null
  T* output;            // (B, H), contiguous
  int64_t batch, input_size, hidden_size;
  Nonlinearity nonlinearity;
};

// Gradients whose pointer is null are not computed. All outputs are contiguous.
template <typename T>
struct BackwardParams {
  Matrix<T> grad_output;  // (B, H)
  Matrix<T> output;       // (B, H), the stored h'
  Matrix<T> input;        // (B, I)
  Matrix<T> hx;           // (B, H) or absent
  Matrix<T> weight_ih;    // (H, I)
  Matrix<T> weight_hh;    // (H, H)
  T* grad_input;          // (B, I)
  T* grad_hx;             // (B, H); null when hx is absent
  T* grad_weight_ih;      // (H, I)
  T* grad_weight_hh;      // (H, H); zeros when hx is absent
  T* grad_bias;           // (H)
  T* grad_bias_copy;      // (H), the same once more for the other bias
  int64_t batch, input_size, hidden_size;
  Nonlinearity nonlinearity;
};

}  // namespace rnn_ext
