#include "sequence/autograd.h"

#include <torch/csrc/utils/pybind.h>

#include "operators/autocast.h"
#include "operators/checks.h"
#include "operators/eligible.h"
#include "operators/find_op.h"
#include "operators/node.h"

namespace rnn_ext {
namespace {

std::tuple<Tensor, Tensor> call_forward(const LayerArguments& a) {
  using Signature =
      std::tuple<Tensor, Tensor>(const Tensor&, const OptTensor&, const Tensor&, const Tensor&, const OptTensor&,
                                 const OptTensor&, std::string_view, bool, bool, const OptTensor&, const OptTensor&);
  static const auto op = find_op<Signature>("rnn_ext::rnn_layer");
  const auto& o = a.options;
  return op.call(a.input, a.hx, a.weight_ih, a.weight_hh, a.bias_ih, a.bias_hh, o.nonlinearity, o.reverse,
                 o.batch_first, o.lengths, o.batch_sizes);
}

std::vector<Tensor> call_backward(const LayerBackwardArguments& a) {
  using Signature = std::vector<Tensor>(const OptTensor&, const OptTensor&, const Tensor&, const OptTensor&,
                                        const OptTensor&, const OptTensor&, const OptTensor&, std::string_view,
                                        OutputMask, bool, bool, const OptTensor&, const OptTensor&);
  static const auto op = find_op<Signature>("rnn_ext::rnn_layer_backward");
  const auto& o = a.options;
  return op.call(a.grad_output, a.grad_h_n, a.output, a.input, a.hx, a.weight_ih, a.weight_hh, o.nonlinearity,
                 a.output_mask, o.reverse, o.batch_first, o.lengths, o.batch_sizes);
}

// By the kernels, or by differentiable formulas where a graph of the gradients is asked for.
std::vector<Tensor> gradients_of(const LayerBackwardArguments& a) {
  if (!transforms_active() && !at::GradMode::is_enabled() && is_plain(a.grad_output) && is_plain(a.grad_h_n) &&
      is_plain(a.output) && is_plain(a.input) && is_plain(a.hx) && is_plain(a.weight_ih) && is_plain(a.weight_hh)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_backward(a);
  }
  const pybind11::gil_scoped_acquire gil;
  const auto formulas = pybind11::module_::import("rnn_ext._aten").attr("rnn_layer_backward");
  const auto& o = a.options;
  return formulas(a.grad_output, a.grad_h_n, a.output, a.input, a.hx, a.weight_ih, a.weight_hh, o.nonlinearity,
                  a.output_mask, o.reverse, o.batch_first, o.lengths, o.batch_sizes)
      .cast<std::vector<Tensor>>();
}

struct RNNLayerBackward : torch::autograd::Function<RNNLayerBackward> {
  static constexpr auto kName = "RNNLayerBackward";

  static std::vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const std::vector<Tensor>& grad_outputs) {
    std::vector<Tensor> gradients(kNumGradients);
    const auto optional = [](const Tensor& t) { return t.defined() ? OptTensor(t) : std::nullopt; };
    const auto one_layer = [&](const Tensor& t) { return optional(t.defined() && t.dim() == 3 ? t.select(0, 0) : t); };
    if (!grad_outputs[0].defined() && !grad_outputs[1].defined()) return gradients;
    OutputMask needed{};
    for (size_t i = 0; i < kNumGradients; ++i) needed[i] = ctx->needs_input_grad(i);
    const auto saved = ctx->get_saved_variables();
    const auto& data = ctx->saved_data;
    const auto nonlinearity = static_cast<Nonlinearity>(data.at("nonlinearity").toInt());
    const auto lengths = optional(saved[5]), batch_sizes = optional(saved[6]);
    const LayerOptions options = {name_of(nonlinearity), data.at("reverse").toBool(), data.at("batch_first").toBool(),
                                  lengths, batch_sizes};
    auto found = gradients_of({optional(grad_outputs[0]), one_layer(grad_outputs[1]), saved[0], optional(saved[1]),
                               optional(saved[2]), optional(saved[3]), optional(saved[4]), options, needed});
    auto next = found.begin();
    for (size_t i = 0; i < kNumGradients; ++i) {
      if (needed[i]) gradients[i] = std::move(*next++);
    }
    return gradients;
  }
};

std::tuple<Tensor, Tensor> below_autograd(const LayerArguments& a, bool with_layers) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  auto outputs = call_forward(a);
  if (with_layers) {  // in place, since it is new: no view, and no node for one
    const Tensor& h_n = std::get<1>(outputs);
    h_n.unsafeGetTensorImpl()->set_sizes_contiguous({1, h_n.size(0), h_n.size(1)});
  }
  return outputs;
}

std::tuple<Tensor, Tensor> apply(const LayerArguments& a, bool with_layers) {
  const auto [output, h_n] = below_autograd(a, with_layers);
  const auto needed_by = [](const Tensor& other, const Tensor& t) { return other.requires_grad() ? t : Tensor(); };
  const auto to_save = [&, &output = output]() -> std::vector<Tensor> {
    return {output,
            needed_by(a.weight_ih, a.input),
            a.hx ? needed_by(a.weight_hh, *a.hx) : Tensor(),
            needed_by(a.input, a.weight_ih),
            a.weight_hh,
            a.options.lengths.value_or(Tensor()),
            a.options.batch_sizes.value_or(Tensor())};
  };
  const auto options = [&](auto& saved_data) {
    saved_data["nonlinearity"] = static_cast<int64_t>(parse_nonlinearity(a.options.nonlinearity));
    saved_data["reverse"] = a.options.reverse;
    saved_data["batch_first"] = a.options.batch_first;
  };
  record<RNNLayerBackward>({output, h_n}, to_save, options, a.input, a.hx, a.weight_ih, a.weight_hh, a.bias_ih,
                           a.bias_hh);
  return {output, h_n};
}

}  // namespace

std::optional<std::tuple<Tensor, Tensor>> rnn_layer_eager(const LayerArguments& given, bool with_layers) {
  if (transforms_active() || !is_plain(given.input) || !is_plain(given.hx)) {
    return std::nullopt;
  }
  const bool has_layers = with_layers && given.hx.has_value() && given.hx->dim() == 3 && given.hx->size(0) == 1;
  if (with_layers && given.hx.has_value() && !has_layers) return std::nullopt;
  const OptTensor hx = has_layers ? OptTensor(given.hx->select(0, 0)) : given.hx;
  const LayerArguments a = {given.input,   hx,           given.weight_ih, given.weight_hh, given.bias_ih,
                            given.bias_hh, given.options};
  const bool autocast = is_autocast_enabled(a.input.device().type());
  bool requires_grad = false;
  const auto fits = [&](const Tensor& t) {
    requires_grad |= t.requires_grad();
    return is_plain(t) && t.device() == a.input.device() && (t.scalar_type() == a.input.scalar_type() || autocast);
  };
  const auto optional_fits = [&](const OptTensor& t) { return !t.has_value() || fits(*t); };
  if (!fits(a.input) || !fits(a.weight_ih) || !fits(a.weight_hh) || !optional_fits(a.hx) || !optional_fits(a.bias_ih) ||
      !optional_fits(a.bias_hh)) {
    return std::nullopt;
  }
  if (autocast) {  // the operator's Autocast kernel casts first
    auto [output, h_n] = call_forward(a);
    return std::make_tuple(output, with_layers ? h_n.unsqueeze(0) : h_n);
  }
  return requires_grad && at::GradMode::is_enabled() ? apply(a, with_layers) : below_autograd(a, with_layers);
}

}  // namespace rnn_ext
