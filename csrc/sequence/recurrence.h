// A layer's passes with a recurrence in the middle: what ATen multiplies for all rows at once before the forward and
// after the backward. `Device` launches the recurrence and what else ATen has no words for; the tests have one that
// runs on the CPU.
//
//   device.forward(params, host), device.backward(params, host)      as recurrence_forward and recurrence_backward
//   device.write_table(numbers, size, table)                         to the device's memory
//   device.previous_states(steps, reverse, hidden_size, output, hx, previous)
//   device.multiply_to_sums(sums, a, b)                              sums = a b, in the sums' dtype
#pragma once
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <vector>

#include "cuda/sequence/params.h"
#include "operators/device_type.h"
#include "sequence/ops.h"

namespace rnn_ext {

// The steps of a layer, and their tables on the data's device.
class DeviceSteps {
 public:
  template <class Device>
  DeviceSteps(const Device& device, const Tensor& data, const LayerOptions& options)
      : tables_(data, options), steps_(tables_.steps()) {
    const auto numbers = [&](const int64_t* table, int64_t size) { return table != nullptr ? size : 0; };
    const int64_t counts = numbers(steps_.counts, steps_.steps), begins = numbers(steps_.begins, steps_.steps),
                  order = numbers(steps_.order, steps_.batch);
    if (counts + begins + order == 0) return;
    memory_ = at::empty({counts + begins + order}, data.options().dtype(at::kLong));
    int64_t* next = memory_.mutable_data_ptr<int64_t>();
    const auto write = [&](const int64_t*& table, int64_t size) {
      if (table == nullptr) return;
      device.write_table(table, size, next);
      table = next;
      next += size;
    };
    write(steps_.counts, counts);
    write(steps_.begins, begins);
    write(steps_.order, order);
  }

  const Steps& host() const { return tables_.steps(); }
  const Steps& device() const { return steps_; }

 private:
  const StepTables tables_;
  Steps steps_;
  Tensor memory_;
};

// Steps [begin, begin + steps) of `all`, for rows that start at the first of them.
inline Steps steps_from(const Steps& all, int64_t begin, int64_t steps) {
  const auto from = [&](const int64_t* table) { return table != nullptr ? table + begin : nullptr; };
  return {steps, all.batch, from(all.counts), from(all.begins), all.order};
}

// The same steps of the layer's data; `begin` as Steps has it.
inline Tensor data_of_steps(const Tensor& data, const LayerOptions& options, const Steps& host, int64_t begin,
                            int64_t steps) {
  if (!options.batch_sizes.has_value()) return data.narrow(options.batch_first ? 1 : 0, begin, steps);
  const int64_t last = begin + steps - 1;
  return data.narrow(0, host.begin(begin), host.begin(last) + host.count(last) - host.begin(begin));
}

// (rows of all steps, features), whatever the layout: a view where data is contiguous.
inline Tensor all_rows(const Tensor& data) { return data.flatten(0, -2); }

// z is there for as many steps at a time as this many bytes hold, or for one.
constexpr int64_t kMostBytesOfZ = int64_t{256} << 20;

// Jagged data in the order of packed data, which the kernels have addresses for: the rows of each step together, and of
// the batch those that have a step, the longest first.
class JaggedAsPacked {
 public:
  template <class Device>
  JaggedAsPacked(const Device& device, const Tensor& data, const LayerOptions& options) {
    const StepTables tables(data, options);
    const Steps& steps = tables.steps();
    const int64_t batch = steps.steps > 0 ? steps.count(0) : 0;
    std::vector<int64_t> rows;
    rows.reserve(data.size(0));
    for (int64_t t = 0; t < steps.steps; ++t) {
      for (int64_t b = 0; b < steps.count(t); ++b) rows.push_back(steps.begin(t) + steps.first(b));
    }
    const auto on_device = [&](const int64_t* numbers, int64_t size) {
      auto table = at::empty({size}, data.options().dtype(at::kLong));
      if (size > 0) device.write_table(numbers, size, table.template mutable_data_ptr<int64_t>());
      return table;
    };
    rows_ = on_device(rows.data(), static_cast<int64_t>(rows.size()));
    order_ = on_device(steps.order, batch);
    auto sizes = at::empty({steps.steps}, at::kLong);
    std::copy_n(steps.counts, steps.steps, sizes.mutable_data_ptr<int64_t>());
    batch_sizes_ = sizes;
  }

  bool empty() const { return batch_sizes_->numel() == 0; }
  LayerOptions options(const LayerOptions& of) const {
    return {of.nonlinearity, of.reverse, false, none_, batch_sizes_};
  }
  Tensor data(const Tensor& t) const { return t.index_select(0, rows_); }
  OptTensor data(const OptTensor& t) const { return t.has_value() ? OptTensor(data(*t)) : std::nullopt; }
  OptTensor state(const OptTensor& t) const {
    return t.has_value() ? OptTensor(t->index_select(0, order_)) : std::nullopt;
  }
  // And back. Rows of the batch without a step keep the other state, or zeros.
  void data_to(Tensor to, const Tensor& packed) const { to.index_copy_(0, rows_, packed); }
  void state_to(Tensor to, const Tensor& packed, const OptTensor& other) const {
    other.has_value() ? to.copy_(*other) : to.zero_();
    if (!empty()) to.index_copy_(0, order_, packed);
  }

 private:
  Tensor rows_, order_;
  OptTensor batch_sizes_;
  const OptTensor none_;
};

inline bool is_jagged(const Tensor& data, const LayerOptions& options) {
  return options.lengths.has_value() && options.is_flat(data.dim());
}

template <class Device>
std::tuple<Tensor, Tensor> layer_forward_on(const Device& device, const LayerArguments& a, Nonlinearity nonlinearity,
                                            int64_t most_bytes_of_z = kMostBytesOfZ);

template <class Device>
std::vector<Tensor> layer_backward_on(const Device& device, const LayerBackwardArguments& a, Nonlinearity nonlinearity);

template <class Device>
std::tuple<Tensor, Tensor> jagged_forward_on(const Device& device, const LayerArguments& a, Nonlinearity nonlinearity,
                                             int64_t most_bytes_of_z) {
  const JaggedAsPacked as_packed(device, a.input, a.options);
  auto [output, h_n] = empty_layer_outputs(a);
  Tensor packed_h_n;
  if (!as_packed.empty()) {
    const auto hx = as_packed.state(a.hx);
    const auto input = as_packed.data(a.input);
    const auto found = layer_forward_on(
        device, {input, hx, a.weight_ih, a.weight_hh, a.bias_ih, a.bias_hh, as_packed.options(a.options)}, nonlinearity,
        most_bytes_of_z);
    as_packed.data_to(output, std::get<0>(found));
    packed_h_n = std::get<1>(found);
  }
  as_packed.state_to(h_n, packed_h_n, a.hx);
  return {output, h_n};
}

template <class Device>
std::vector<Tensor> jagged_backward_on(const Device& device, const LayerBackwardArguments& a,
                                       Nonlinearity nonlinearity) {
  const JaggedAsPacked as_packed(device, a.output, a.options);
  auto gradients = empty_layer_gradients(a);
  if (as_packed.empty()) {
    for (const auto& gradient : gradients) {
      if (gradient.defined()) gradient.zero_();
    }
    if (gradients[kGradHx].defined()) as_packed.state_to(gradients[kGradHx], {}, a.grad_h_n);
    return asked_gradients(gradients);
  }
  const auto grad_output = as_packed.data(a.grad_output), input = as_packed.data(a.input);
  const auto grad_h_n = as_packed.state(a.grad_h_n), hx = as_packed.state(a.hx);
  const auto output = as_packed.data(a.output);
  const auto found = layer_backward_on(
      device,
      {grad_output, grad_h_n, output, input, hx, a.weight_ih, a.weight_hh, as_packed.options(a.options), a.output_mask},
      nonlinearity);
  auto next = found.begin();
  for (size_t i = 0; i < kNumGradients; ++i) {
    if (!a.output_mask[i]) continue;
    const Tensor packed = *next++;
    if (i == kGradInput) {
      as_packed.data_to(gradients[i], packed);
    } else if (i == kGradHx) {
      as_packed.state_to(gradients[i], packed, a.grad_h_n);
    } else {
      gradients[i] = packed;
    }
  }
  return asked_gradients(gradients);
}

template <class Device>
std::tuple<Tensor, Tensor> layer_forward_on(const Device& device, const LayerArguments& a, Nonlinearity nonlinearity,
                                            int64_t most_bytes_of_z) {
  const LayerOptions& options = a.options;
  if (is_jagged(a.input, options)) return jagged_forward_on(device, a, nonlinearity, most_bytes_of_z);
  const DeviceSteps tables(device, a.input, options);
  const Steps &host = tables.host(), &steps = tables.device();
  check_batch(host, a.hx, "hx");
  auto [output, h_n] = empty_layer_outputs(a);
  clear_padding(output, options);
  const int64_t H = a.weight_hh.size(1);
  if (host.steps == 0) {
    a.hx.has_value() ? h_n.copy_(*a.hx) : h_n.zero_();
    return {output, h_n};
  }
  const auto sums = a.input.options().dtype(a.input.element_size() == 2 ? at::kFloat : a.input.scalar_type());
  Tensor bias = a.bias_ih.has_value() ? a.bias_ih->to(sums.dtype()) : Tensor();
  if (a.bias_hh.has_value()) bias = bias.defined() ? bias + *a.bias_hh : a.bias_hh->to(sums.dtype());
  const int64_t bytes = std::max<int64_t>(1, host.batch * H * static_cast<int64_t>(sums.dtype().itemsize()));
  const int64_t at_a_time = std::min(host.steps, std::max<int64_t>(1, most_bytes_of_z / bytes));

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, a.input.scalar_type(), "rnn_layer",
                                  [&, &output = output, &h_n = h_n] {
                                    using T = DeviceType<scalar_t>;
                                    using Params = cuda::RecurrenceForwardParams<T>;
                                    OptTensor state = a.hx;
                                    for (int64_t done = 0; done < host.steps; done += at_a_time) {
                                      const int64_t count = std::min(at_a_time, host.steps - done);
                                      const int64_t begin = options.reverse ? host.steps - done - count : done;
                                      const auto input = data_of_steps(a.input, options, host, begin, count);
                                      auto shape = input.sizes().vec();
                                      shape.back() = H;
                                      const auto z = at::empty(shape, sums);
                                      auto rows = all_rows(z);
                                      device.multiply_to_sums(rows, all_rows(input), a.weight_ih.t());
                                      if (bias.defined()) rows.add_(bias);

                                      const bool last = done + count == host.steps;
                                      const auto next = last ? h_n : at::empty_like(h_n);
                                      Params p{};
                                      p.steps = steps_from(steps, begin, count);
                                      p.reverse = options.reverse;
                                      p.weight_hh = as_matrix<T>(a.weight_hh);
                                      p.hidden_size = H;
                                      p.nonlinearity = nonlinearity;
                                      p.z = as_rows<const typename Params::Acc>(z, options);
                                      p.hx = as_matrix<T>(state);
                                      p.output = as_rows<T>(output, options);
                                      p.h_n = as_pointer<T>(next);
                                      // Packed data's steps begin where they did among all of them, the others' at 0.
                                      if (host.begins != nullptr) {
                                        p.z.data -= host.begin(begin) * p.z.step_stride;
                                      } else {
                                        p.output.data += begin * p.output.step_stride;
                                      }
                                      device.forward(p, steps_from(host, begin, count));
                                      state = next;
                                    }
                                  });
  return {output, h_n};
}

// Which rows of padded data have no step: (T, B, 1), or (B, T, 1) with batch_first.
template <class Device>
Tensor padding_of(const Device& device, const Tensor& data, const LayerOptions& options) {
  const auto numbers = options.lengths->contiguous();
  const auto lengths = at::empty({numbers.size(0)}, data.options().dtype(at::kLong));
  device.write_table(numbers.const_data_ptr<int64_t>(), numbers.size(0), lengths.mutable_data_ptr<int64_t>());
  const auto steps = at::arange(data.size(options.batch_first ? 1 : 0), lengths.options());
  const auto padding = options.batch_first ? steps.ge(lengths.unsqueeze(1)) : steps.unsqueeze(1).ge(lengths);
  return padding.unsqueeze(-1);
}

template <class Device>
std::vector<Tensor> layer_backward_on(const Device& device, const LayerBackwardArguments& a,
                                      Nonlinearity nonlinearity) {
  const LayerOptions& options = a.options;
  if (is_jagged(a.output, options)) return jagged_backward_on(device, a, nonlinearity);
  const DeviceSteps tables(device, a.output, options);
  const Steps &host = tables.host(), &steps = tables.device();
  check_batch(host, a.hx, "hx");
  check_batch(host, a.grad_h_n, "grad_h_n");
  const auto gradients = empty_layer_gradients(a);
  const auto asked = asked_gradients(gradients);
  if (asked.empty()) return asked;
  const bool padded = options.lengths.has_value();
  const int64_t H = a.output.size(-1);
  const auto empty = [&] {
    return padded ? at::zeros(a.output.sizes(), a.output.options()) : at::empty(a.output.sizes(), a.output.options());
  };
  const auto grad_z = empty();
  Tensor previous = gradients[kGradWeightHh].defined() ? empty() : Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, a.output.scalar_type(), "rnn_layer_backward", [&] {
    using T = DeviceType<scalar_t>;
    cuda::RecurrenceBackwardParams<T> p{};
    p.steps = steps;
    p.reverse = options.reverse;
    p.weight_hh = as_matrix<T>(a.weight_hh);
    p.hidden_size = H;
    p.nonlinearity = nonlinearity;
    p.grad_output = as_rows<const T>(a.grad_output.value_or(Tensor()), options);
    p.grad_h_n = as_matrix<T>(a.grad_h_n);
    p.output = as_rows<const T>(a.output, options);
    p.grad_z = as_rows<T>(grad_z, options);
    p.grad_hx = as_pointer<T>(gradients[kGradHx]);
    device.backward(p, host);
    if (previous.defined()) {
      device.previous_states(steps, options.reverse, H, p.output, as_matrix<T>(a.hx), as_rows<T>(previous, options));
    }
  });

  // Padding has a dz of zeros. But what lies there in the input need not be finite, nor need the weights be.
  const auto dz = all_rows(grad_z);
  const auto padding = padded ? padding_of(device, a.output, options) : Tensor();
  if (gradients[kGradInput].defined()) {
    auto rows = all_rows(gradients[kGradInput]);
    at::mm_out(rows, dz, *a.weight_ih);
    if (padded) gradients[kGradInput].masked_fill_(padding, 0);
  }
  if (gradients[kGradWeightIh].defined()) {
    Tensor to = gradients[kGradWeightIh];
    at::mm_out(to, dz.t(), all_rows(padded ? a.input->masked_fill(padding, 0) : *a.input));
  }
  if (previous.defined()) {
    Tensor to = gradients[kGradWeightHh];
    at::mm_out(to, dz.t(), all_rows(previous));
  }
  const bool bias_ih = gradients[kGradBiasIh].defined();
  Tensor grad_bias = gradients[bias_ih ? kGradBiasIh : kGradBiasHh];
  if (grad_bias.defined()) at::sum_out(grad_bias, dz, 0);
  if (bias_ih && gradients[kGradBiasHh].defined()) gradients[kGradBiasHh].copy_(grad_bias);
  return asked;
}

}  // namespace rnn_ext
