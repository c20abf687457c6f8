// The gradients that a backward operator is asked for.
#pragma once
#include <ATen/ops/empty.h>

#include <array>
#include <utility>
#include <vector>

#include "operators/operands.h"

namespace rnn_ext {

// In the order in which the operators return them: of what the cell and a layer over a sequence take alike.
enum Gradient : size_t { kGradInput, kGradHx, kGradWeightIh, kGradWeightHh, kGradBiasIh, kGradBiasHh, kNumGradients };
using OutputMask = std::array<bool, kNumGradients>;
using Gradients = std::array<Tensor, kNumGradients>;  // undefined where not asked for

// New ones, where a backward's arguments ask for them; state_shape() is hx's.
template <typename Arguments, typename StateShape>
Gradients empty_gradients_of(const Arguments& a, const StateShape& state_shape) {
  const auto empty = [&](c10::SymIntArrayRef shape) { return at::empty_symint(shape, a.output.options()); };
  const auto hidden_size = a.output.sym_size(-1);
  Gradients gradients;
  if (a.output_mask[kGradInput]) {
    auto shape = a.output.sym_sizes().vec();
    shape.back() = a.weight_ih->sym_size(1);
    gradients[kGradInput] = empty(shape);
  }
  if (a.output_mask[kGradHx]) gradients[kGradHx] = empty(state_shape());
  if (a.output_mask[kGradWeightIh]) gradients[kGradWeightIh] = empty({hidden_size, a.input->sym_size(-1)});
  if (a.output_mask[kGradWeightHh]) gradients[kGradWeightHh] = empty({hidden_size, hidden_size});
  if (a.output_mask[kGradBiasIh]) gradients[kGradBiasIh] = empty({hidden_size});
  if (a.output_mask[kGradBiasHh]) gradients[kGradBiasHh] = empty({hidden_size});
  return gradients;
}

// Those that were asked for, in order, as the operators return them.
inline std::vector<Tensor> asked_gradients(Gradients gradients) {
  std::vector<Tensor> asked;
  asked.reserve(kNumGradients);
  for (auto& gradient : gradients) {
    if (gradient.defined()) asked.push_back(std::move(gradient));
  }
  return asked;
}

}  // namespace rnn_ext
