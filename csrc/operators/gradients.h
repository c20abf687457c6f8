// The gradients that a backward operator is asked for.
#pragma once
#include <array>
#include <utility>
#include <vector>

#include "operators/operands.h"

namespace rnn_ext {

// In the order in which the operators return them: of what the cell and a layer over a sequence take alike.
enum Gradient : size_t { kGradInput, kGradHx, kGradWeightIh, kGradWeightHh, kGradBiasIh, kGradBiasHh, kNumGradients };
using OutputMask = std::array<bool, kNumGradients>;
using Gradients = std::array<Tensor, kNumGradients>;  // undefined where not asked for

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
