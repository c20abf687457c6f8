// The end of a forward: output = f(z + b_ih + b_hh), the biases added in this order, stored within the output's edges.
#pragma once
#include "cuda/blocks/operand.cuh"

namespace rnn_ext::cuda {

// An element of a bias that may be absent, or zero beyond the edge.
template <typename T>
__device__ __forceinline__ Accumulator<T> bias_at(const T* bias, int64_t column, bool is_inside = true) {
  return bias != nullptr && is_inside ? widen(bias[column]) : Accumulator<T>(0);
}

// Of kColumns neighbouring columns from `column` on, of which the first `columns` are inside: the same for all rows.
template <typename T, int kColumns>
struct Epilogue {
  using Acc = Accumulator<T>;
  Acc bias[2][kColumns];
  int columns;
  Nonlinearity nonlinearity;

  __device__ __forceinline__ Epilogue(const T* bias_ih, const T* bias_hh, Nonlinearity f, int64_t column, int columns)
      : columns(columns), nonlinearity(f) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      bias[0][i] = bias_at(bias_ih, column + i, i < columns);
      bias[1][i] = bias_at(bias_hh, column + i, i < columns);
    }
  }

  __device__ __forceinline__ T output(Acc z, int i = 0) const {
    return activate<T>(z + bias[0][i] + bias[1][i], nonlinearity);
  }

  // The outputs of a row. `whole`: rows are of whole vectors, aligned for them, so that it is all of one or nothing.
  __device__ __forceinline__ void store(T* to, const Acc (&z)[kColumns], bool whole) const {
    static_assert(kColumns * sizeof(T) == 16);
    Vector<T, 16> outputs;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) outputs.v[i] = output(z[i], i);
    if (whole || RNN_EXT_PLANTED(misaligned_vector_store)) {
      if (columns > 0) store_vector(to, outputs);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (i < columns || RNN_EXT_PLANTED(no_output_column_bound)) to[i] = outputs.v[i];
      }
    }
  }
};

}  // namespace rnn_ext::cuda
