// The operators of a layer over a sequence on the CPU.
#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "cpu/sequence/launch.h"
#include "operators/checks.h"
#include "operators/find_op.h"
#include "sequence/ops.h"

namespace rnn_ext {
namespace {

bool is_padded(const LayerOptions& options) { return !options.lengths.has_value() && !options.batch_sizes.has_value(); }

// A few steps with large weights go through the cell's operators: the layer's kernels would pack the weights, which
// takes longer than to read them once or twice; for a few rows from beyond the caches, than to read them many times.
// (Measured in one thread: 2048 units, B = 1. In backward packing pays from the second step, as the weights' gradients
// of all steps are then one product.)
bool is_a_few_cells(const LayerArguments& a) {
  constexpr int64_t kCached = 1 << 16, kBeyondCaches = 1 << 21, kFewRows = 4;
  const int64_t weights = a.weight_ih.numel() + a.weight_hh.numel();
  if (!is_padded(a.options) || weights < kCached) return false;
  const int64_t steps = a.input.size(a.options.batch_first ? 1 : 0);
  if (weights < kBeyondCaches) return steps <= 3;
  return steps <= (a.input.size(a.options.batch_first ? 0 : 1) <= kFewRows ? 32 : 8);
}

bool is_one_cell(const LayerBackwardArguments& a) {
  return is_padded(a.options) && a.output.size(a.options.batch_first ? 1 : 0) == 1 && a.output.size(-1) >= 256;
}

Tensor step_of(const Tensor& t, const LayerOptions& options, int64_t s) {
  const int64_t dim = options.batch_first ? 1 : 0;
  return t.select(dim, options.reverse ? t.size(dim) - 1 - s : s);
}

std::tuple<Tensor, Tensor> cells_forward(const LayerArguments& a) {
  using Signature = Tensor(const Tensor&, const OptTensor&, const Tensor&, const Tensor&, const OptTensor&,
                           const OptTensor&, std::string_view);
  static const auto cell = find_op<Signature>("rnn_ext::rnn_cell");
  auto [output, h_n] = empty_layer_outputs(a);
  OptTensor h = a.hx.has_value() ? *a.hx : at::zeros_like(h_n);
  for (int64_t s = 0; s < a.input.size(a.options.batch_first ? 1 : 0); ++s) {
    h = cell.call(step_of(a.input, a.options, s), h, a.weight_ih, a.weight_hh, a.bias_ih, a.bias_hh,
                  a.options.nonlinearity);
    step_of(output, a.options, s).copy_(*h);
  }
  return {output, *h};
}

std::vector<Tensor> cell_backward(const LayerBackwardArguments& a) {
  using Signature = std::vector<Tensor>(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&,
                                        const OptTensor&, const OptTensor&, std::string_view, OutputMask);
  static const auto cell = find_op<Signature>("rnn_ext::rnn_cell_backward");
  const auto output = step_of(a.output, a.options, 0);
  Tensor grad = a.grad_h_n.value_or(Tensor());
  if (a.grad_output.has_value()) {
    const auto of_step = step_of(*a.grad_output, a.options, 0);
    grad = grad.defined() ? grad + of_step : of_step;
  }
  if (!grad.defined()) grad = at::zeros_like(output);
  const OptTensor input = a.input.has_value() ? OptTensor(step_of(*a.input, a.options, 0)) : std::nullopt;
  auto gradients = cell.call(grad, output, input, a.hx.has_value() ? *a.hx : at::zeros_like(output), a.weight_ih,
                             a.weight_hh, a.options.nonlinearity, a.output_mask);
  if (a.output_mask[kGradInput]) gradients[0] = gradients[0].unsqueeze(a.options.batch_first ? 1 : 0);
  return gradients;
}

std::tuple<Tensor, Tensor> rnn_layer_cpu(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih,
                                         const Tensor& weight_hh, const OptTensor& bias_ih_, const OptTensor& bias_hh_,
                                         std::string_view name, bool reverse, bool batch_first,
                                         const OptTensor& lengths, const OptTensor& batch_sizes) {
  const LayerOptions options = {name, reverse, batch_first, lengths, batch_sizes};
  const LayerArguments arguments = {input, hx, weight_ih, weight_hh, bias_ih_, bias_hh_, options};
  const auto nonlinearity = check_layer_forward(arguments);
  if (is_a_few_cells(arguments)) return cells_forward(arguments);
  const StepTables tables(input, options);
  check_batch(tables.steps(), hx, "hx");
  const auto bias_ih = contiguous(bias_ih_), bias_hh = contiguous(bias_hh_);
  auto [output, h_n] = empty_layer_outputs(arguments);
  clear_padding(output, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "rnn_layer",
                                  [&, &output = output, &h_n = h_n] {
                                    LayerForwardParams<scalar_t> p{};
                                    p.steps = tables.steps();
                                    p.reverse = reverse;
                                    p.weights = {as_matrix<scalar_t>(weight_ih),
                                                 as_matrix<scalar_t>(weight_hh),
                                                 as_pointer<scalar_t>(bias_ih),
                                                 as_pointer<scalar_t>(bias_hh),
                                                 weight_ih.size(1),
                                                 weight_hh.size(1),
                                                 nonlinearity};
                                    p.input = as_rows<const scalar_t>(input, options);
                                    p.hx = as_matrix<scalar_t>(hx);
                                    p.output = as_rows<scalar_t>(output, options);
                                    p.h_n = as_pointer<scalar_t>(h_n);
                                    cpu::rnn_layer_forward(p);
                                  });
  return {output, h_n};
}

std::vector<Tensor> rnn_layer_backward_cpu(const OptTensor& grad_output, const OptTensor& grad_h_n,
                                           const Tensor& output_, const OptTensor& input, const OptTensor& hx_,
                                           const OptTensor& weight_ih, const OptTensor& weight_hh,
                                           std::string_view name, OutputMask output_mask, bool reverse,
                                           bool batch_first, const OptTensor& lengths, const OptTensor& batch_sizes) {
  const LayerOptions options = {name, reverse, batch_first, lengths, batch_sizes};
  const LayerBackwardArguments arguments = {grad_output, grad_h_n,  output_, input,      hx_,
                                            weight_ih,   weight_hh, options, output_mask};
  const auto nonlinearity = check_layer_backward(arguments);
  if (is_one_cell(arguments)) return cell_backward(arguments);
  const StepTables tables(output_, options);
  check_batch(tables.steps(), hx_, "hx");
  check_batch(tables.steps(), grad_h_n, "grad_h_n");
  const auto output = unit_columns(output_);
  const auto hx = unit_columns(hx_);
  if (output_mask == OutputMask{}) return {};
  auto without_weights = arguments;
  without_weights.output_mask[kGradWeightIh] = without_weights.output_mask[kGradWeightHh] = false;
  auto gradients = empty_layer_gradients(without_weights);
  if (gradients[kGradInput].defined()) clear_padding(gradients[kGradInput], options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, output.scalar_type(), "rnn_layer_backward", [&] {
    const auto& grad_bias = gradients[gradients[kGradBiasIh].defined() ? kGradBiasIh : kGradBiasHh];
    LayerBackwardParams<scalar_t> p{};
    p.steps = tables.steps();
    p.reverse = reverse;
    p.weights.weight_ih = as_matrix<scalar_t>(weight_ih);
    p.weights.weight_hh = as_matrix<scalar_t>(weight_hh);
    p.weights.input_size = input.has_value() ? input->size(-1) : weight_ih.has_value() ? weight_ih->size(1) : 0;
    p.weights.hidden_size = output.size(-1);
    p.weights.nonlinearity = nonlinearity;
    p.grad_output = as_rows<const scalar_t>(grad_output.value_or(Tensor()), options);
    p.grad_h_n = as_matrix<scalar_t>(grad_h_n);
    p.output = as_rows<const scalar_t>(output, options);
    p.input = as_rows<const scalar_t>(input.value_or(Tensor()), options);
    p.hx = as_matrix<scalar_t>(hx);
    p.grad_input = as_rows<scalar_t>(gradients[kGradInput], options);
    p.grad_hx = as_pointer<scalar_t>(gradients[kGradHx]);
    p.grad_bias = as_pointer<scalar_t>(grad_bias);
    cpu::rnn_layer_backward<scalar_t>(p, [&] {
      const auto take = [&](Gradient which, int64_t size) {
        if (output_mask[which]) gradients[which] = at::empty({p.weights.hidden_size, size}, output.options());
        return as_pointer<scalar_t>(gradients[which]);
      };
      p.grad_weight_ih = take(kGradWeightIh, p.weights.input_size);
      p.grad_weight_hh = take(kGradWeightHh, p.weights.hidden_size);
    });
  });
  if (gradients[kGradBiasIh].defined() && gradients[kGradBiasHh].defined()) {
    gradients[kGradBiasHh].copy_(gradients[kGradBiasIh]);
  }
  return asked_gradients(std::move(gradients));
}

}  // namespace

TORCH_LIBRARY_IMPL(rnn_ext, CPU, m) {
  m.impl("rnn_layer", &rnn_layer_cpu);
  m.impl("rnn_layer_backward", &rnn_layer_backward_cpu);
}

}  // namespace rnn_ext
