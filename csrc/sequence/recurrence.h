// A layer's passes with a recurrence in the middle: what ATen multiplies for all rows at once before the forward and
// after the backward. `Device` launches the recurrence and what else ATen has no words for; the tests have one that
// runs on the CPU.
//
//   device.forward(params, host), device.backward(params, host)      as recurrence_forward and recurrence_backward
//   device.write_table(numbers, size, table)                         to the device's memory
//   device.previous_states(steps, reverse, hidden_size, output, hx, previous)
//   device.multiply_to_sums(sums, a, b)                              sums = a b, in the sums' dtype
#pragma once
#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

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
                  order = numbers(steps_.order, steps_.batch), firsts = numbers(steps_.firsts, steps_.batch);
    const int64_t all = counts + begins + order + firsts;
    if (all == 0) return;
    memory_ = at::empty({all}, data.options().dtype(at::kLong));
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
    write(steps_.firsts, firsts);
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
  return {steps, all.batch, from(all.counts), from(all.begins), all.order, all.firsts};
}

// The same steps of the layer's data; `begin` as Steps has it.
inline Tensor data_of_steps(const Tensor& data, const LayerOptions& options, const Steps& host, int64_t begin,
                            int64_t steps) {
  if (begin == 0 && steps == host.steps && options.is_flat(data.dim())) return data;
  if (!options.batch_sizes.has_value()) return data.narrow(options.batch_first ? 1 : 0, begin, steps);
  const int64_t last = begin + steps - 1;
  return data.narrow(0, host.begin(begin), host.begin(last) + host.count(last) - host.begin(begin));
}

// (rows of all steps, features), whatever the layout: a view where data is contiguous.
inline Tensor all_rows(const Tensor& data) { return data.flatten(0, -2); }

// z is there for as many steps at a time as this many bytes hold, or for one; of jagged data, for all.
constexpr int64_t kMostBytesOfZ = int64_t{256} << 20;

template <class Device>
std::tuple<Tensor, Tensor> layer_forward_on(const Device& device, const LayerArguments& a, Nonlinearity nonlinearity,
                                            int64_t most_bytes_of_z = kMostBytesOfZ) {
  const LayerOptions& options = a.options;
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
  const bool jagged = host.firsts != nullptr;
  const int64_t at_a_time = jagged ? host.steps : std::min(host.steps, std::max<int64_t>(1, most_bytes_of_z / bytes));

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
  const DeviceSteps tables(device, a.output, options);
  const Steps &host = tables.host(), &steps = tables.device();
  check_batch(host, a.hx, "hx");
  check_batch(host, a.grad_h_n, "grad_h_n");
  const auto gradients = empty_layer_gradients(a);
  const auto asked = asked_gradients(gradients);
  if (asked.empty()) return asked;
  const bool padded = options.lengths.has_value() && !options.is_flat(a.output.dim());
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
