// What ops.h declares: argument checks, outputs, and the tables of steps.
#include "sequence/ops.h"

#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>

#include "operators/checks.h"

namespace rnn_ext {
namespace {

void check_shape(const Tensor& like, const Tensor& t, c10::SymIntArrayRef shape, const char* name) {
  TORCH_CHECK(t.sym_sizes() == shape, name, " must have shape ", shape, ", but got ", t.sym_sizes());
  check_like(like, t, name);
}

void check_shape(const Tensor& like, const OptTensor& t, c10::SymIntArrayRef shape, const char* name) {
  if (t.has_value()) check_shape(like, *t, shape, name);
}

// Packed data's is where a state says it, so that graphs with symbolic sizes need not look into batch_sizes.
c10::SymInt batch_of(const Tensor& data, const LayerOptions& options, const OptTensor& state = std::nullopt) {
  if (!options.is_flat(data.dim())) return data.sym_size(options.batch_first ? 0 : 1);
  if (options.lengths.has_value()) return options.lengths->sym_size(0);
  if (state.has_value() && state->dim() == 2) return state->sym_size(0);
  return at::_local_scalar_dense(options.batch_sizes->select(0, 0)).toSymInt();
}

void check_layout(const Tensor& data, const LayerOptions& options, const char* name) {
  const int64_t dim = options.is_flat(data.dim()) ? 2 : 3;
  TORCH_CHECK(data.dim() == dim, name, " must be ", dim, "D, got ", data.dim(), "D instead");
  const auto check_numbers = [](const OptTensor& numbers, const char* name) {
    if (!numbers.has_value()) return;
    TORCH_CHECK(numbers->dim() == 1 && numbers->scalar_type() == at::kLong, name, " must be a 1D tensor of int64, got ",
                numbers->dim(), "D of ", numbers->scalar_type());
    TORCH_CHECK(numbers->is_cpu() || numbers->is_meta(), name, " must be on the CPU, got ", numbers->device());
  };
  check_numbers(options.lengths, "lengths");
  check_numbers(options.batch_sizes, "batch_sizes");
  TORCH_CHECK(!options.lengths.has_value() || !options.batch_sizes.has_value(),
              "lengths are for padded or jagged data, but there are batch_sizes, which packed data has");
  if (dim == 2) {
    TORCH_CHECK(!options.batch_first, "packed or jagged data has no batch_first");
    TORCH_CHECK(!options.batch_sizes.has_value() || options.batch_sizes->sym_size(0) > 0,
                "Expected sequence length to be larger than 0 in RNN");
    return;
  }
  TORCH_CHECK(data.sym_size(options.batch_first ? 1 : 0) > 0, "Expected sequence length to be larger than 0 in RNN");
  if (options.lengths.has_value()) {
    const auto batch = batch_of(data, options);
    TORCH_CHECK(options.lengths->sym_size(0) == batch, "lengths must have shape [", batch, "], but got ",
                options.lengths->sym_sizes());
  }
}

}  // namespace

Nonlinearity check_layer_forward(const LayerArguments& a) {
  check_layout(a.input, a.options, "input");
  const auto nonlinearity = parse_nonlinearity(a.options.nonlinearity);
  TORCH_CHECK(a.weight_ih.dim() == 2, "weight_ih must be 2D, got ", a.weight_ih.dim(), "D instead");
  TORCH_CHECK(a.weight_hh.dim() == 2, "weight_hh must be 2D, got ", a.weight_hh.dim(), "D instead");
  const auto hidden_size = a.weight_hh.sym_size(1);
  TORCH_CHECK(a.input.sym_size(-1) == a.weight_ih.sym_size(1), "input has inconsistent input_size: got ",
              a.input.sym_size(-1), " expected ", a.weight_ih.sym_size(1));
  check_shape(a.input, a.weight_ih, {hidden_size, a.weight_ih.sym_size(1)}, "weight_ih");
  check_shape(a.input, a.weight_hh, {hidden_size, hidden_size}, "weight_hh");
  if (a.hx.has_value()) check_shape(a.input, *a.hx, {batch_of(a.input, a.options, a.hx), hidden_size}, "hx");
  check_shape(a.input, a.bias_ih, {hidden_size}, "bias_ih");
  check_shape(a.input, a.bias_hh, {hidden_size}, "bias_hh");
  return nonlinearity;
}

Nonlinearity check_layer_backward(const LayerBackwardArguments& a) {
  check_layout(a.output, a.options, "output");
  const auto nonlinearity = parse_nonlinearity(a.options.nonlinearity);
  const auto hidden_size = a.output.sym_size(-1);
  check_shape(a.output, a.grad_output, a.output.sym_sizes(), "grad_output");
  if (a.grad_h_n.has_value() || a.hx.has_value()) {
    const auto batch = batch_of(a.output, a.options, a.hx.has_value() ? a.hx : a.grad_h_n);
    check_shape(a.output, a.grad_h_n, {batch, hidden_size}, "grad_h_n");
    check_shape(a.output, a.hx, {batch, hidden_size}, "hx");
  }
  check_shape(a.output, a.weight_hh, {hidden_size, hidden_size}, "weight_hh");
  if (a.weight_ih.has_value()) {
    TORCH_CHECK(a.weight_ih->dim() == 2, "weight_ih must be 2D, got ", a.weight_ih->dim(), "D instead");
    check_shape(a.output, a.weight_ih, {hidden_size, a.weight_ih->sym_size(1)}, "weight_ih");
  }
  if (a.input.has_value()) {
    TORCH_CHECK(a.input->dim() == a.output.dim(), "input must be ", a.output.dim(), "D, got ", a.input->dim(),
                "D instead");
    auto shape = a.output.sym_sizes().vec();
    shape.back() = (a.weight_ih.has_value() ? *a.weight_ih : *a.input).sym_size(-1);
    check_shape(a.output, a.input, shape, "input");
  }
  const bool any = std::any_of(a.output_mask.begin(), a.output_mask.end(), [](bool asked) { return asked; });
  TORCH_CHECK(a.weight_hh.has_value() || !any, "every gradient needs weight_hh");
  TORCH_CHECK(a.weight_ih.has_value() || !a.output_mask[kGradInput], "the gradient of input needs weight_ih");
  TORCH_CHECK(a.input.has_value() || !a.output_mask[kGradWeightIh], "the gradient of weight_ih needs input");
  return nonlinearity;
}

std::tuple<Tensor, Tensor> empty_layer_outputs(const LayerArguments& a) {
  auto shape = a.input.sym_sizes().vec();
  shape.back() = a.weight_hh.sym_size(1);
  const c10::SymInt state[] = {batch_of(a.input, a.options, a.hx), shape.back()};
  return {at::empty_symint(shape, a.input.options()), at::empty_symint(state, a.input.options())};
}

Gradients empty_layer_gradients(const LayerBackwardArguments& a) {
  return empty_gradients_of(
      a, [&] { return std::vector<c10::SymInt>{batch_of(a.output, a.options, a.hx), a.output.sym_size(-1)}; });
}

StepTables::StepTables(const Tensor& data, const LayerOptions& options) {
  if (options.batch_sizes.has_value()) {
    batch_sizes_ = options.batch_sizes->contiguous();
    const auto* sizes = batch_sizes_.const_data_ptr<int64_t>();
    const int64_t steps = batch_sizes_.size(0);
    begins_.resize(steps);
    int64_t rows = 0;
    for (int64_t t = 0; t < steps; ++t) {
      TORCH_CHECK(sizes[t] >= 0 && (t == 0 || sizes[t] <= sizes[t - 1]),
                  "batch_sizes must fall, or stay the same, from step to step, got ", sizes[t], " at step ", t,
                  t > 0 ? " after " : "", t > 0 ? std::to_string(sizes[t - 1]) : "");
      begins_[t] = rows;
      rows += sizes[t];
    }
    TORCH_CHECK(rows == data.size(0), "batch_sizes say that there are ", rows, " rows, but the data has ",
                data.size(0));
    steps_ = {steps, sizes[0], sizes, begins_.data()};
    return;
  }
  const bool jagged = options.is_flat(data.dim());
  const int64_t steps = data.size(options.batch_first ? 1 : 0);  // jagged data's: of all rows
  const int64_t batch = jagged ? options.lengths->size(0) : data.size(options.batch_first ? 0 : 1);
  steps_ = {steps, batch};
  if (!options.lengths.has_value()) return;
  const auto lengths = options.lengths->contiguous();
  const auto* length = lengths.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK_VALUE(length[b] >= 0 && length[b] <= steps, "lengths must be from 0 to ", steps, ", got ", length[b],
                      " at ", b);
  }
  order_.resize(batch);
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });
  const int64_t longest = batch > 0 ? length[order_[0]] : 0;
  counts_.resize(longest);
  for (int64_t t = 0, count = batch; t < longest; ++t) {
    while (count > 0 && length[order_[count - 1]] <= t) --count;
    counts_[t] = count;
  }
  steps_ = {longest, batch, counts_.data(), nullptr, order_.data()};
  if (!jagged) return;
  std::vector<int64_t> firsts(batch);
  int64_t rows = 0;
  for (int64_t b = 0; b < batch; ++b) {
    firsts[b] = rows;
    rows += length[b];
  }
  TORCH_CHECK_VALUE(rows == steps, "lengths say that there are ", rows, " steps in all, but the jagged data has ",
                    steps);
  firsts_.resize(batch);
  std::transform(order_.begin(), order_.end(), firsts_.begin(), [&](int64_t b) { return firsts[b]; });
  steps_.firsts = firsts_.data();
}

void check_batch(const Steps& steps, const OptTensor& state, const char* name) {
  TORCH_CHECK(!state.has_value() || state->size(0) == steps.batch, name, " must have ", steps.batch,
              " rows, as the first step has, but got ", state.has_value() ? state->size(0) : 0);
}

}  // namespace rnn_ext
