// The operators on CPU tensors: checks, allocation, and the step down to csrc/cpu.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "cell/ops.h"
#include "cpu/cell/launch.h"

namespace rnn_ext {
namespace {

Tensor rnn_cell_cpu(const Tensor& input_, const OptTensor& hx_, const Tensor& weight_ih_, const Tensor& weight_hh_,
                    const OptTensor& bias_ih_, const OptTensor& bias_hh_, std::string_view name) {
  const auto nonlinearity = check_forward({input_, hx_, weight_ih_, weight_hh_, bias_ih_, bias_hh_, name});
  const auto input = unit_columns(input_), weight_ih = unit_columns(weight_ih_), weight_hh = unit_columns(weight_hh_);
  const auto hx = unit_columns(hx_), bias_ih = contiguous(bias_ih_), bias_hh = contiguous(bias_hh_);
  const CellArguments arguments = {input, hx, weight_ih, weight_hh, bias_ih, bias_hh, name};
  auto output = empty_output(arguments);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "rnn_cell", [&] {
    cpu::rnn_cell_forward(forward_params<scalar_t>(arguments, output, nonlinearity));
  });
  return output;
}

std::vector<Tensor> rnn_cell_backward_cpu(const Tensor& grad_output, const Tensor& output_, const OptTensor& input_,
                                          const OptTensor& hx_, const OptTensor& weight_ih_,
                                          const OptTensor& weight_hh_, std::string_view name, OutputMask output_mask) {
  const auto nonlinearity =
      check_backward({grad_output, output_, input_, hx_, weight_ih_, weight_hh_, name, output_mask});
  // grad_output is read in any strides, since it often is one element, expanded.
  const auto output = unit_columns(output_);
  const auto input = unit_columns(input_), hx = unit_columns(hx_);
  const auto weight_ih = unit_columns(weight_ih_), weight_hh = unit_columns(weight_hh_);
  const CellBackwardArguments arguments = {grad_output, output, input, hx, weight_ih, weight_hh, name, output_mask};
  auto gradients = empty_gradients(arguments);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, output.scalar_type(), "rnn_cell_backward", [&] {
    cpu::rnn_cell_backward(backward_params<scalar_t>(arguments, gradients, nonlinearity));
  });
  return asked_gradients(std::move(gradients));
}

}  // namespace

TORCH_LIBRARY_IMPL(rnn_ext, CPU, m) {
  m.impl("rnn_cell", &rnn_cell_cpu);
  m.impl("rnn_cell_backward", &rnn_cell_backward_cpu);
}

}  // namespace rnn_ext
