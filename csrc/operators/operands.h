// From tensors to what kernels are told.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "core/params.h"

namespace rnn_ext {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// A (B, N) operand; an unbatched one is its single row.
template <typename T>
Matrix<T> as_matrix(const Tensor& t) {
  const auto* data = static_cast<const T*>(t.const_data_ptr());
  return t.dim() == 1 ? Matrix<T>{data, 0, t.stride(0)} : Matrix<T>{data, t.stride(0), t.stride(1)};
}

template <typename T>
Matrix<T> as_matrix(const OptTensor& t) {
  return t.has_value() ? as_matrix<T>(*t) : Matrix<T>{};
}

template <typename T>
T* as_pointer(const Tensor& t) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

template <typename T>
const T* as_pointer(const OptTensor& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

inline int64_t batch_size(const Tensor& t) { return t.dim() == 1 ? 1 : t.size(0); }

// The CPU kernels read rows with unit stride between columns, at any distance from each other.
inline Tensor unit_columns(const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous(); }
inline OptTensor unit_columns(const OptTensor& t) { return t.has_value() ? OptTensor(unit_columns(*t)) : t; }

// Biases are vectors read once: the kernels take them contiguous.
inline OptTensor contiguous(const OptTensor& t) { return t.has_value() ? OptTensor(t->contiguous()) : t; }

}  // namespace rnn_ext
