// The node is a C++ torch::autograd::Function: the same as rnn_ext.RNNCellFunction, without Python's cost a call.
#include "cell/autograd.h"

#include <torch/csrc/utils/pybind.h>

#include "operators/autocast.h"
#include "operators/checks.h"
#include "operators/eligible.h"
#include "operators/find_op.h"
#include "operators/node.h"

namespace rnn_ext {
namespace {

Tensor call_forward(const CellArguments& a) {
  using Signature = Tensor(const Tensor&, const OptTensor&, const Tensor&, const Tensor&, const OptTensor&,
                           const OptTensor&, std::string_view);
  static const auto op = find_op<Signature>("rnn_ext::rnn_cell");
  return op.call(a.input, a.hx, a.weight_ih, a.weight_hh, a.bias_ih, a.bias_hh, a.nonlinearity);
}

std::vector<Tensor> call_backward(const CellBackwardArguments& a) {
  using Signature = std::vector<Tensor>(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&,
                                        const OptTensor&, const OptTensor&, std::string_view, OutputMask);
  static const auto op = find_op<Signature>("rnn_ext::rnn_cell_backward");
  return op.call(a.grad_output, a.output, a.input, a.hx, a.weight_ih, a.weight_hh, a.nonlinearity, a.output_mask);
}

struct RNNCellBackward : torch::autograd::Function<RNNCellBackward> {
  static constexpr auto kName = "RNNCellBackward";

  static std::vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const std::vector<Tensor>& grad_outputs) {
    std::vector<Tensor> gradients(kNumGradients);
    if (!grad_outputs[0].defined()) return gradients;
    OutputMask needed{};
    for (size_t i = 0; i < kNumGradients; ++i) needed[i] = ctx->needs_input_grad(i);
    const auto saved = ctx->get_saved_variables();
    const auto optional = [&](size_t i) { return saved[i].defined() ? OptTensor(saved[i]) : std::nullopt; };
    const auto nonlinearity = static_cast<Nonlinearity>(ctx->saved_data["nonlinearity"].toInt());
    auto found = rnn_cell_gradients(
        {grad_outputs[0], saved[0], optional(1), optional(2), optional(3), optional(4), name_of(nonlinearity), needed});
    auto next = found.begin();
    for (size_t i = 0; i < kNumGradients; ++i) {
      if (needed[i]) gradients[i] = std::move(*next++);
    }
    return gradients;
  }
};

Tensor apply(const CellArguments& a) {
  auto output = rnn_cell_below_autograd(a);
  const auto needed_by = [](const Tensor& other, const Tensor& t) { return other.requires_grad() ? t : Tensor(); };
  const auto to_save = [&]() -> std::vector<Tensor> {
    return {output, needed_by(a.weight_ih, a.input), a.hx ? needed_by(a.weight_hh, *a.hx) : Tensor(),
            needed_by(a.input, a.weight_ih), a.hx ? needed_by(*a.hx, a.weight_hh) : Tensor()};
  };
  const auto options = [&](auto& saved_data) {
    saved_data["nonlinearity"] = static_cast<int64_t>(parse_nonlinearity(a.nonlinearity));
  };
  record<RNNCellBackward>({output}, to_save, options, a.input, a.hx, a.weight_ih, a.weight_hh, a.bias_ih, a.bias_hh);
  return output;
}

}  // namespace

Tensor rnn_cell_below_autograd(const CellArguments& arguments) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_forward(arguments);
}

std::vector<Tensor> rnn_cell_gradients(const CellBackwardArguments& a) {
  // RNNCellFunction saves its operands as they were before autocast; connected to the graph, as these casts are.
  const auto like_output = [&](const OptTensor& t) {
    return t.has_value() && t->scalar_type() != a.output.scalar_type() ? t->to(a.output.scalar_type()) : t;
  };
  const auto input = like_output(a.input), hx = like_output(a.hx);
  const auto weight_ih = like_output(a.weight_ih), weight_hh = like_output(a.weight_hh);
  if (!transforms_active() && !at::GradMode::is_enabled() && is_plain(a.grad_output) && is_plain(a.output) &&
      is_plain(input) && is_plain(hx) && is_plain(weight_ih) && is_plain(weight_hh)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_backward({a.grad_output, a.output, input, hx, weight_ih, weight_hh, a.nonlinearity, a.output_mask});
  }
  const pybind11::gil_scoped_acquire gil;
  const auto formulas = pybind11::module_::import("rnn_ext._aten").attr("rnn_cell_backward");
  return formulas(a.grad_output, a.output, input, hx, weight_ih, weight_hh, a.nonlinearity, a.output_mask)
      .cast<std::vector<Tensor>>();
}

OptTensor rnn_cell_eager(const CellArguments& a) {
  if (transforms_active() || !is_plain(a.input)) return std::nullopt;
  const bool autocast = is_autocast_enabled(a.input.device().type());
  bool requires_grad = a.input.requires_grad();
  const auto fits = [&](const Tensor& t) {
    requires_grad |= t.requires_grad();
    return is_plain(t) && t.device() == a.input.device() && (t.scalar_type() == a.input.scalar_type() || autocast);
  };
  const auto bias_fits = [&](const OptTensor& bias) {  // nn.RNNCell broadcasts biases of other shapes
    return !bias.has_value() ||
           (bias->dim() == 1 && a.weight_hh.dim() == 2 && bias->size(0) == a.weight_hh.size(1) && fits(*bias));
  };
  if (!fits(a.weight_ih) || !fits(a.weight_hh) || (a.hx.has_value() && !fits(*a.hx)) || !bias_fits(a.bias_ih) ||
      !bias_fits(a.bias_hh)) {
    return std::nullopt;
  }
  if (autocast) return call_forward(a);  // the operator's Autocast kernel casts first
  return requires_grad && at::GradMode::is_enabled() ? apply(a) : rnn_cell_below_autograd(a);
}

}  // namespace rnn_ext
