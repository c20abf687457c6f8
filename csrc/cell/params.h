// What the cell's kernels are told.
//
//   B batch, I input_size, H hidden_size.   x: (B, I)   h: (B, H)   W = weight_ih: (H, I)   U = weight_hh: (H, H)
//
//   forward    output = f(x Wᵀ + b_ih + h Uᵀ + b_hh)
//   backward   dz = grad_output · f'(output)     [grad_input | grad_hx] = dz [W | U]
//              [grad_weight_ih | grad_weight_hh] = dzᵀ [x | h]     grad_bias = Σ_B dz
#pragma once
#include "core/params.h"

namespace rnn_ext {

template <typename T>
struct ForwardParams {
  Matrix<T> input;  // (B, I)
  Matrix<T> hx;     // (B, H), absent: h = 0, and its part of K is skipped
  Weights<T> weights;
  T* output;  // (B, H), contiguous
  int64_t batch;
};

// Gradients whose pointer is null are not computed. All outputs are contiguous.
template <typename T>
struct BackwardParams {
  Matrix<T> grad_output;  // (B, H)
  Matrix<T> output;       // (B, H), the stored h'
  Matrix<T> input;        // (B, I)
  Matrix<T> hx;           // (B, H) or absent
  Weights<T> weights;     // without the biases, which no gradient depends on
  T* grad_input;          // (B, I)
  T* grad_hx;             // (B, H); null when hx is absent
  T* grad_weight_ih;      // (H, I)
  T* grad_weight_hh;      // (H, H); zeros when hx is absent
  T* grad_bias;           // (H)
  T* grad_bias_copy;      // (H), the same once more for the other bias
  int64_t batch;
};

}  // namespace rnn_ext
