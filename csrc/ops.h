// What the operators' CPU and CUDA kernels share: argument checks in nn.RNNCell's words, and the step from tensors to
// the kernels' params structs.
#pragma once
#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <string_view>
#include <vector>

#include "params.h"

namespace rnn_ext {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// The gradients rnn_cell_backward can be asked for, in the order in which it returns them.
enum Gradient : size_t { kGradInput, kGradHx, kGradWeightIh, kGradWeightHh, kGradBiasIh, kGradBiasHh, kNumGradients };
using OutputMask = std::array<bool, kNumGradients>;

// The nonlinearity of that name, or nn.RNNCell's RuntimeError; and its name.
Nonlinearity parse_nonlinearity(std::string_view name);
std::string_view name_of(Nonlinearity nonlinearity);

// Raises nn.RNNCell's errors for sizes that don't fit together, given ranks that do. Symbolic sizes are allowed; dtypes
// and devices are not looked at.
void check_sizes(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh);

// All that a kernel relies on, checked in nn.RNNCell's order and words: ranks, nonlinearity, sizes, then dtypes and
// devices. Returns the nonlinearity of that name. The backward's operands may be absent where no asked gradient needs
// them; an absent hx stands for zeros.
Nonlinearity check_forward(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                           const OptTensor& bias_ih, const OptTensor& bias_hh, std::string_view nonlinearity);
Nonlinearity check_backward(const Tensor& grad_output, const Tensor& output, const OptTensor& input,
                            const OptTensor& hx, const OptTensor& weight_ih, const OptTensor& weight_hh,
                            std::string_view nonlinearity, OutputMask output_mask);

// A new tensor for the output, and for each gradient that output_mask asks for (the others stay undefined).
Tensor empty_output(const Tensor& input, const Tensor& weight_hh);
std::array<Tensor, kNumGradients> empty_gradients(const Tensor& output, const OptTensor& input,
                                                  const OptTensor& weight_ih, OutputMask output_mask);

// The gradients that were asked for, in order, as the operator returns them.
std::vector<Tensor> asked_gradients(std::array<Tensor, kNumGradients> gradients);

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

template <typename T>
ForwardParams<T> forward_params(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih,
                                const Tensor& weight_hh, const OptTensor& bias_ih, const OptTensor& bias_hh,
                                const Tensor& output, Nonlinearity nonlinearity) {
  return {as_matrix<T>(input),
          as_matrix<T>(hx),
          as_matrix<T>(weight_ih),
          as_matrix<T>(weight_hh),
          as_pointer<T>(bias_ih),
          as_pointer<T>(bias_hh),
          as_pointer<T>(output),
          batch_size(input),
          weight_ih.size(1),
          weight_hh.size(1),
          nonlinearity};
}

template <typename T>
BackwardParams<T> backward_params(const Tensor& grad_output, const Tensor& output, const OptTensor& input,
                                  const OptTensor& hx, const OptTensor& weight_ih, const OptTensor& weight_hh,
                                  const std::array<Tensor, kNumGradients>& gradients, Nonlinearity nonlinearity) {
  return {as_matrix<T>(grad_output),
          as_matrix<T>(output),
          as_matrix<T>(input),
          as_matrix<T>(hx),
          as_matrix<T>(weight_ih),
          as_matrix<T>(weight_hh),
          as_pointer<T>(gradients[kGradInput]),
          as_pointer<T>(gradients[kGradHx]),
          as_pointer<T>(gradients[kGradWeightIh]),
          as_pointer<T>(gradients[kGradWeightHh]),
          as_pointer<T>(gradients[gradients[kGradBiasIh].defined() ? kGradBiasIh : kGradBiasHh]),
          as_pointer<T>(gradients[kGradBiasIh].defined() ? gradients[kGradBiasHh] : Tensor()),
          batch_size(output),
          weight_ih.has_value() ? weight_ih->size(1)
          : input.has_value()   ? input->size(-1)
                                : 0,
          output.size(-1),
          nonlinearity};
}

}  // namespace rnn_ext
