// What the kernels of a layer over a sequence are told: one layer, one direction. No torch types.
#pragma once
#include "core/host_device.h"
#include "core/params.h"

namespace rnn_ext {

// Which rows of the batch each step has, and where they lie. The batch is ordered so that a step's rows are its first
// count(t): padded data, packed data, jagged data, and padded data with lengths differ in the tables alone.
struct Steps {
  int64_t steps, batch;
  const int64_t* counts = nullptr;  // (steps), never rising; null: the whole batch at every step
  const int64_t* begins = nullptr;  // (steps), packed data: the number of the step's first row; null: that of the step
  const int64_t* order = nullptr;   // (batch): which row of the data a row of the batch is; null: the same
  const int64_t* firsts = nullptr;  // (batch), jagged data: the number of the row's first step; null: that of the row

  RNN_EXT_HOST_DEVICE int64_t count(int64_t t) const { return counts ? counts[t] : batch; }
  RNN_EXT_HOST_DEVICE int64_t begin(int64_t t) const { return begins ? begins[t] : t; }
  RNN_EXT_HOST_DEVICE int64_t place(int64_t b) const { return order ? order[b] : b; }
  RNN_EXT_HOST_DEVICE int64_t first(int64_t b) const { return firsts ? firsts[b] : place(b); }
};

// The rows of all steps: one of `size` elements for each step and each row of the batch that it has. Strides count
// elements.
template <typename T>
struct Rows {
  T* data = nullptr;  // null: absent
  int64_t step_stride = 0, row_stride = 0, col_stride = 1;

  RNN_EXT_HOST_DEVICE T* at(const Steps& steps, int64_t t, int64_t b) const {
    return data + steps.begin(t) * step_stride + steps.first(b) * row_stride;
  }
};

// Matrices of a row for each row of the batch (hx, h_n and their gradients) are in the data's order, as Steps::place
// says.
template <typename T>
struct LayerForwardParams {
  Steps steps;
  bool reverse;  // from each row's last step to its first
  Weights<T> weights;
  Rows<const T> input;  // (I)
  Matrix<T> hx;         // (B, H); null: zeros
  Rows<T> output;       // (H), unit column stride
  T* h_n;               // (B, H), contiguous
};

template <typename T>
struct LayerBackwardParams {
  Steps steps;
  bool reverse;
  Weights<T> weights;         // without biases
  Rows<const T> grad_output;  // (H); null: zeros
  Matrix<T> grad_h_n;         // (B, H); null: zeros
  Rows<const T> output;       // (H), unit column stride
  Rows<const T> input;        // (I)
  Matrix<T> hx;               // (B, H), unit column stride; null: zeros
  Rows<T> grad_input;         // (I), unit column stride; this and the following: null where not asked for
  T* grad_hx;                 // (B, H), contiguous, as the following
  T* grad_weight_ih;          // (H, I)
  T* grad_weight_hh;          // (H, H)
  T* grad_bias;               // (H)
};

}  // namespace rnn_ext
