// What the kernels of a recurrence are told: the part of a layer's pass that goes step by step. What all rows need at
// once (x Wᵀ before the forward, the weights' gradients after the backward) is a product of ATen's.
//
//   forward    h_t = f(z_t + h_{t-1} Uᵀ)            z_t = x_t Wᵀ + b_ih + b_hh is there
//   backward   dz_t = (dh_t + dz_{t+1} U) f'(h_t)   from the stored h_t; dh_0 = dz_1 U
//
// No torch types. Pointers are to device memory, those of Steps' tables too. Rows that a step does not have are neither
// read nor written. Each h_t and dz_t is rounded to T before the next step sees it.
#pragma once
#include <type_traits>

#include "core/params.h"
#include "sequence/params.h"

namespace rnn_ext::cuda {

template <typename T>
struct RecurrenceForwardParams {
  using Acc = std::conditional_t<sizeof(T) == 8, double, float>;  // Accumulator<T>

  Steps steps;
  bool reverse;         // from each row's last step to its first
  Matrix<T> weight_hh;  // U: (H, H), any strides
  int64_t hidden_size;
  Nonlinearity nonlinearity;
  Rows<const Acc> z;  // (H), unit column stride
  Matrix<T> hx;       // (B, H), in the data's order, as h_n; null: zeros
  Rows<T> output;     // (H), unit column stride
  T* h_n;             // (B, H), contiguous, not hx's memory; hx's row, or zeros, where a row has no step
};

template <typename T>
struct RecurrenceBackwardParams {
  Steps steps;
  bool reverse;         // the forward's: this goes the other way
  Matrix<T> weight_hh;  // U: (H, H), any strides
  int64_t hidden_size;
  Nonlinearity nonlinearity;
  Rows<const T> grad_output;  // (H), any strides; null: zeros
  Matrix<T> grad_h_n;         // (B, H), in the data's order, any strides; null: zeros
  Rows<const T> output;       // (H), any strides
  Rows<T> grad_z;             // (H), unit column stride
  T* grad_hx;                 // (B, H), contiguous, in the data's order; null: not asked for. grad_h_n's row, or zeros,
                              // where a row has no step
};

}  // namespace rnn_ext::cuda
