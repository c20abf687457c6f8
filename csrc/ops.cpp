// The operators' schemas, their argument checks, and the kernels that need no device: Meta (shapes alone, symbolic ones
// too) and Autocast. Their autograd formulas are registered by rnn_ext/ops.py.
#include "ops.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace rnn_ext {

namespace {

void check_like(const Tensor& input, const Tensor& other, const char* name) {
  TORCH_CHECK(other.scalar_type() == input.scalar_type(), "expected input and ", name,
              " to have the same dtype, but got ", input.scalar_type(), " and ", other.scalar_type());
  TORCH_CHECK(other.device() == input.device(), "expected input and ", name, " on the same device, but got ",
              input.device(), " and ", other.device());
}

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

Nonlinearity parse_nonlinearity(std::string_view name) {
  for (const auto kind : {Nonlinearity::kTanh, Nonlinearity::kRelu, Nonlinearity::kSigmoid}) {
    if (name == name_of(kind)) return kind;
  }
  TORCH_CHECK(false, "Unknown nonlinearity: ", name);
}

std::string_view name_of(Nonlinearity nonlinearity) {
  switch (nonlinearity) {
    case Nonlinearity::kTanh:
      return "tanh";
    case Nonlinearity::kRelu:
      return "relu";
    default:
      return "sigmoid";
  }
}

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

Nonlinearity check_forward(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                           const OptTensor& bias_ih, const OptTensor& bias_hh, std::string_view nonlinearity) {
  check_ranks(input, hx);
  const auto parsed = parse_nonlinearity(nonlinearity);
  check_sizes(input, hx, weight_ih, weight_hh);
  check_like(input, weight_ih, "weight_ih");
  check_like(input, weight_hh, "weight_hh");
  if (hx.has_value()) check_like(input, *hx, "hx");
  check_bias(input, bias_ih, weight_hh.sym_size(1), "bias_ih");
  check_bias(input, bias_hh, weight_hh.sym_size(1), "bias_hh");
  return parsed;
}

Nonlinearity check_backward(const Tensor& grad_output, const Tensor& output, const OptTensor& input,
                            const OptTensor& hx, const OptTensor& weight_ih, const OptTensor& weight_hh,
                            std::string_view nonlinearity, OutputMask output_mask) {
  const auto parsed = parse_nonlinearity(nonlinearity);
  TORCH_CHECK(output.dim() == 1 || output.dim() == 2, "output must be 1D or 2D, got ", output.dim(), "D instead");
  const auto check_shape = [&](const Tensor& t, c10::SymIntArrayRef shape, const char* name) {
    TORCH_CHECK(t.sym_sizes() == shape, name, " must have shape ", shape, ", but got ", t.sym_sizes());
    check_like(output, t, name);
  };
  const auto hidden_size = output.sym_size(-1);
  check_shape(grad_output, output.sym_sizes(), "grad_output");
  if (hx.has_value()) check_shape(*hx, output.sym_sizes(), "hx");
  if (weight_hh.has_value()) check_shape(*weight_hh, {hidden_size, hidden_size}, "weight_hh");
  if (weight_ih.has_value()) {
    TORCH_CHECK(weight_ih->dim() == 2, "weight_ih must be 2D, got ", weight_ih->dim(), "D instead");
    check_shape(*weight_ih, {hidden_size, weight_ih->sym_size(1)}, "weight_ih");
  }
  if (input.has_value()) {
    TORCH_CHECK(input->dim() == output.dim(), "input must be ", output.dim(), "D, got ", input->dim(), "D instead");
    auto shape = output.sym_sizes().vec();
    shape.back() = (weight_ih.has_value() ? *weight_ih : *input).sym_size(-1);
    check_shape(*input, shape, "input");
  }
  TORCH_CHECK(weight_ih.has_value() || !output_mask[kGradInput], "the gradient of input needs weight_ih");
  TORCH_CHECK(weight_hh.has_value() || !output_mask[kGradHx], "the gradient of hx needs weight_hh");
  TORCH_CHECK(input.has_value() || !output_mask[kGradWeightIh], "the gradient of weight_ih needs input");
  return parsed;
}

Tensor empty_output(const Tensor& input, const Tensor& weight_hh) {
  const auto hidden_size = weight_hh.sym_size(1);
  return input.dim() == 1 ? at::empty_symint({hidden_size}, input.options())
                          : at::empty_symint({input.sym_size(0), hidden_size}, input.options());
}

std::array<Tensor, kNumGradients> empty_gradients(const Tensor& output, const OptTensor& input,
                                                  const OptTensor& weight_ih, OutputMask output_mask) {
  const auto empty = [&](c10::SymIntArrayRef shape) { return at::empty_symint(shape, output.options()); };
  const auto hidden_size = output.sym_size(-1);
  std::array<Tensor, kNumGradients> gradients;
  if (output_mask[kGradInput]) {
    auto shape = output.sym_sizes().vec();
    shape.back() = weight_ih->sym_size(1);
    gradients[kGradInput] = empty(shape);
  }
  if (output_mask[kGradHx]) gradients[kGradHx] = empty(output.sym_sizes());
  if (output_mask[kGradWeightIh]) gradients[kGradWeightIh] = empty({hidden_size, input->sym_size(-1)});
  if (output_mask[kGradWeightHh]) gradients[kGradWeightHh] = empty({hidden_size, hidden_size});
  if (output_mask[kGradBiasIh]) gradients[kGradBiasIh] = empty({hidden_size});
  if (output_mask[kGradBiasHh]) gradients[kGradBiasHh] = empty({hidden_size});
  return gradients;
}

std::vector<Tensor> asked_gradients(std::array<Tensor, kNumGradients> gradients) {
  std::vector<Tensor> asked;
  asked.reserve(kNumGradients);
  for (auto& gradient : gradients) {
    if (gradient.defined()) asked.push_back(std::move(gradient));
  }
  return asked;
}

namespace {

Tensor rnn_cell_meta(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                     const OptTensor& bias_ih, const OptTensor& bias_hh, std::string_view nonlinearity) {
  check_forward(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity);
  return empty_output(input, weight_hh);
}

std::vector<Tensor> rnn_cell_backward_meta(const Tensor& grad_output, const Tensor& output, const OptTensor& input,
                                           const OptTensor& hx, const OptTensor& weight_ih, const OptTensor& weight_hh,
                                           std::string_view nonlinearity, OutputMask output_mask) {
  check_backward(grad_output, output, input, hx, weight_ih, weight_hh, nonlinearity, output_mask);
  return asked_gradients(empty_gradients(output, input, weight_ih, output_mask));
}

// nn.RNNCell is on autocast's low-precision list. The dtype is the one in force now (torch.library.register_autocast
// would freeze one), and cached_cast keeps the cast weights for the rest of the autocast region.
template <at::DeviceType device_type>
Tensor rnn_cell_autocast(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                         const OptTensor& bias_ih, const OptTensor& bias_hh, std::string_view nonlinearity) {
  constexpr auto key = device_type == at::kCUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto dtype = at::autocast::get_autocast_dtype(device_type);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(dtype, t, device_type); };
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rnn_ext::rnn_cell", "").typed<decltype(rnn_cell_meta)>();
  return op.call(cast(input), cast(hx), cast(weight_ih), cast(weight_hh), cast(bias_ih), cast(bias_hh), nonlinearity);
}

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

TORCH_LIBRARY_IMPL(rnn_ext, AutocastCPU, m) { m.impl("rnn_cell", &rnn_cell_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(rnn_ext, AutocastCUDA, m) { m.impl("rnn_cell", &rnn_cell_autocast<at::kCUDA>); }

}  // namespace rnn_ext
