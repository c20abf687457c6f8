// The operators' schemas, their argument checks, and the kernels that need no device: Meta (shapes alone, symbolic ones
// too) and Autocast. Their autograd formulas are registered by rnn_ext/ops.py.
#include "cell/ops.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "operators/autocast.h"
#include "operators/checks.h"

namespace rnn_ext {
namespace {

void check_bias(const Tensor& input, const OptTensor& bias, const c10::SymInt& hidden_size, const char* name) {
  if (!bias.has_value()) return;
  TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == hidden_size, name, " must have shape [", hidden_size,
              "], but got ", bias->sym_sizes());
  check_like(input, *bias, name);
}

void check_ranks(const Tensor& input, const OptTensor& hx) {
  TORCH_CHECK_VALUE(input.dim() == 1 || input.dim() == 2, "RNNCell: Expected input to be 1D or 2D, got ", input.dim(),
                    "D instead");
  TORCH_CHECK_VALUE(!hx.has_value() || hx->dim() == 1 || hx->dim() == 2,
                    "RNNCell: Expected hidden to be 1D or 2D, got ", hx.has_value() ? hx->dim() : 0, "D instead");
}

}  // namespace

void check_sizes(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh) {
  TORCH_CHECK(weight_ih.dim() > 0, "weight_ih must be 2D, got 0D instead");
  TORCH_CHECK_INDEX(weight_hh.dim() == 2, "weight_hh must be 2D, got ", weight_hh.dim(), "D instead");
  const bool unbatched = input.dim() == 1;
  const auto hidden_size = weight_hh.sym_size(1);
  TORCH_CHECK(input.sym_size(-1) == weight_ih.sym_size(-1), "input has inconsistent input_size: got ",
              input.sym_size(-1), " expected ", weight_ih.sym_size(-1));
  TORCH_CHECK(weight_ih.sym_size(0) == hidden_size, "weight_ih first dim must be 1 * hidden_size = ", hidden_size,
              ", but got ", weight_ih.sym_size(0));
  if (hx.has_value()) {
    TORCH_CHECK(unbatched || input.sym_size(0) == hx->sym_size(0), "Input batch size ", input.sym_size(0),
                " doesn't match hidden0 batch size ", hx->sym_size(0));
    TORCH_CHECK_INDEX(unbatched || hx->dim() == 2, "RNNCell: Expected hidden to be 2D for a 2D input, got shape ",
                      hx->sym_sizes());
    const auto got = hx->sym_size(unbatched ? 0 : 1);
    TORCH_CHECK(got == hidden_size, "hidden0 has inconsistent hidden_size: got ", got, ", expected ", hidden_size);
    TORCH_CHECK(!unbatched || hx->dim() == 1, "RNNCell: Expected hidden to be 1D for a 1D input, got shape ",
                hx->sym_sizes());
  }
  TORCH_CHECK(weight_ih.dim() == 2, "weight_ih must be 2D, got ", weight_ih.dim(), "D instead");
  TORCH_CHECK(weight_hh.sym_size(0) == hidden_size, "weight_hh first dim must be 1 * hidden_size = ", hidden_size,
              ", but got ", weight_hh.sym_size(0));
}

Nonlinearity check_forward(const CellArguments& a) {
  check_ranks(a.input, a.hx);
  const auto nonlinearity = parse_nonlinearity(a.nonlinearity);
  check_sizes(a.input, a.hx, a.weight_ih, a.weight_hh);
  check_like(a.input, a.weight_ih, "weight_ih");
  check_like(a.input, a.weight_hh, "weight_hh");
  if (a.hx.has_value()) check_like(a.input, *a.hx, "hx");
  check_bias(a.input, a.bias_ih, a.weight_hh.sym_size(1), "bias_ih");
  check_bias(a.input, a.bias_hh, a.weight_hh.sym_size(1), "bias_hh");
  return nonlinearity;
}

Nonlinearity check_backward(const CellBackwardArguments& a) {
  const auto nonlinearity = parse_nonlinearity(a.nonlinearity);
  TORCH_CHECK(a.output.dim() == 1 || a.output.dim() == 2, "output must be 1D or 2D, got ", a.output.dim(), "D instead");
  const auto check_shape = [&](const Tensor& t, c10::SymIntArrayRef shape, const char* name) {
    TORCH_CHECK(t.sym_sizes() == shape, name, " must have shape ", shape, ", but got ", t.sym_sizes());
    check_like(a.output, t, name);
  };
  const auto hidden_size = a.output.sym_size(-1);
  check_shape(a.grad_output, a.output.sym_sizes(), "grad_output");
  if (a.hx.has_value()) check_shape(*a.hx, a.output.sym_sizes(), "hx");
  if (a.weight_hh.has_value()) check_shape(*a.weight_hh, {hidden_size, hidden_size}, "weight_hh");
  if (a.weight_ih.has_value()) {
    TORCH_CHECK(a.weight_ih->dim() == 2, "weight_ih must be 2D, got ", a.weight_ih->dim(), "D instead");
    check_shape(*a.weight_ih, {hidden_size, a.weight_ih->sym_size(1)}, "weight_ih");
  }
  if (a.input.has_value()) {
    TORCH_CHECK(a.input->dim() == a.output.dim(), "input must be ", a.output.dim(), "D, got ", a.input->dim(),
                "D instead");
    auto shape = a.output.sym_sizes().vec();
    shape.back() = (a.weight_ih.has_value() ? *a.weight_ih : *a.input).sym_size(-1);
    check_shape(*a.input, shape, "input");
  }
  TORCH_CHECK(a.weight_ih.has_value() || !a.output_mask[kGradInput], "the gradient of input needs weight_ih");
  TORCH_CHECK(a.weight_hh.has_value() || !a.output_mask[kGradHx], "the gradient of hx needs weight_hh");
  TORCH_CHECK(a.input.has_value() || !a.output_mask[kGradWeightIh], "the gradient of weight_ih needs input");
  return nonlinearity;
}

Tensor empty_output(const CellArguments& a) {
  const auto hidden_size = a.weight_hh.sym_size(1);
  return a.input.dim() == 1 ? at::empty_symint({hidden_size}, a.input.options())
                            : at::empty_symint({a.input.sym_size(0), hidden_size}, a.input.options());
}

Gradients empty_gradients(const CellBackwardArguments& a) {
  return empty_gradients_of(a, [&] { return a.output.sym_sizes(); });
}

namespace {

Tensor rnn_cell_meta(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                     const OptTensor& bias_ih, const OptTensor& bias_hh, std::string_view nonlinearity) {
  const CellArguments arguments = {input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity};
  check_forward(arguments);
  return empty_output(arguments);
}

std::vector<Tensor> rnn_cell_backward_meta(const Tensor& grad_output, const Tensor& output, const OptTensor& input,
                                           const OptTensor& hx, const OptTensor& weight_ih, const OptTensor& weight_hh,
                                           std::string_view nonlinearity, OutputMask output_mask) {
  const CellBackwardArguments arguments = {grad_output, output,    input,        hx,
                                           weight_ih,   weight_hh, nonlinearity, output_mask};
  check_backward(arguments);
  return asked_gradients(empty_gradients(arguments));
}

struct Cell {
  static constexpr auto kName = "rnn_ext::rnn_cell";
  using Signature = decltype(rnn_cell_meta);
};

}  // namespace

TORCH_LIBRARY(rnn_ext, m) {
  m.def(
      "rnn_cell(Tensor input, Tensor? hx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih=None, "
      "Tensor? bias_hh=None, str nonlinearity=\"tanh\") -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rnn_cell_backward(Tensor grad_output, Tensor output, Tensor? input, Tensor? hx, Tensor? weight_ih, "
      "Tensor? weight_hh, str nonlinearity, bool[6] output_mask) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(rnn_ext, Meta, m) {
  m.impl("rnn_cell", &rnn_cell_meta);
  m.impl("rnn_cell_backward", &rnn_cell_backward_meta);
}

TORCH_LIBRARY_IMPL(rnn_ext, AutocastCPU, m) { m.impl("rnn_cell", &Autocast<at::kCPU, Cell>::call); }
TORCH_LIBRARY_IMPL(rnn_ext, AutocastCUDA, m) { m.impl("rnn_cell", &Autocast<at::kCUDA, Cell>::call); }

}  // namespace rnn_ext
