// What the cell's operators share on every device: argument checks in nn.RNNCell's words, outputs, and the step from
// tensors to the kernels' params.
#pragma once
#include "cell/params.h"
#include "operators/gradients.h"
#include "operators/operands.h"

namespace rnn_ext {

// The arguments of rnn_cell and of rnn_cell_backward: references, good for the length of a call.
struct CellArguments {
  const Tensor& input;
  const OptTensor& hx;
  const Tensor& weight_ih;
  const Tensor& weight_hh;
  const OptTensor& bias_ih;
  const OptTensor& bias_hh;
  std::string_view nonlinearity;
};

// Operands may be absent where no asked gradient needs them; an absent hx stands for zeros.
struct CellBackwardArguments {
  const Tensor& grad_output;
  const Tensor& output;
  const OptTensor& input;
  const OptTensor& hx;
  const OptTensor& weight_ih;
  const OptTensor& weight_hh;
  std::string_view nonlinearity;
  OutputMask output_mask;
};

// Raises nn.RNNCell's errors for sizes that don't fit together, given ranks that do. Symbolic sizes are allowed; dtypes
// and devices are not looked at.
void check_sizes(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh);

// All that a kernel relies on, checked in nn.RNNCell's order and words: ranks, nonlinearity, sizes, then dtypes and
// devices. Returns the nonlinearity of that name.
Nonlinearity check_forward(const CellArguments& arguments);
Nonlinearity check_backward(const CellBackwardArguments& arguments);

// A new tensor for the output, and for each gradient that output_mask asks for (the others stay undefined).
Tensor empty_output(const CellArguments& arguments);
Gradients empty_gradients(const CellBackwardArguments& arguments);

template <typename T>
ForwardParams<T> forward_params(const CellArguments& a, const Tensor& output, Nonlinearity nonlinearity) {
  const Weights<T> weights = {as_matrix<T>(a.weight_ih),
                              as_matrix<T>(a.weight_hh),
                              as_pointer<T>(a.bias_ih),
                              as_pointer<T>(a.bias_hh),
                              a.weight_ih.size(1),
                              a.weight_hh.size(1),
                              nonlinearity};
  return {as_matrix<T>(a.input), as_matrix<T>(a.hx), weights, as_pointer<T>(output), batch_size(a.input)};
}

template <typename T>
BackwardParams<T> backward_params(const CellBackwardArguments& a, const Gradients& gradients,
                                  Nonlinearity nonlinearity) {
  const int64_t input_size = a.weight_ih.has_value() ? a.weight_ih->size(1)
                             : a.input.has_value()   ? a.input->size(-1)
                                                     : 0;
  const bool bias_ih = gradients[kGradBiasIh].defined();
  BackwardParams<T> p{};
  p.grad_output = as_matrix<T>(a.grad_output);
  p.output = as_matrix<T>(a.output);
  p.input = as_matrix<T>(a.input);
  p.hx = as_matrix<T>(a.hx);
  p.weights = {as_matrix<T>(a.weight_ih),
               as_matrix<T>(a.weight_hh),
               nullptr,
               nullptr,
               input_size,
               a.output.size(-1),
               nonlinearity};
  p.grad_input = as_pointer<T>(gradients[kGradInput]);
  p.grad_hx = as_pointer<T>(gradients[kGradHx]);
  p.grad_weight_ih = as_pointer<T>(gradients[kGradWeightIh]);
  p.grad_weight_hh = as_pointer<T>(gradients[kGradWeightHh]);
  p.grad_bias = as_pointer<T>(gradients[bias_ih ? kGradBiasIh : kGradBiasHh]);
  p.grad_bias_copy = as_pointer<T>(bias_ih ? gradients[kGradBiasHh] : Tensor());
  p.batch = batch_size(a.output);
  return p;
}

}  // namespace rnn_ext
