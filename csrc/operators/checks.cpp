#include "operators/checks.h"

namespace rnn_ext {

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

void check_like(const Tensor& input, const Tensor& other, const char* name) {
  TORCH_CHECK(other.scalar_type() == input.scalar_type(), "expected input and ", name,
              " to have the same dtype, but got ", input.scalar_type(), " and ", other.scalar_type());
  TORCH_CHECK(other.device() == input.device(), "expected input and ", name, " on the same device, but got ",
              input.device(), " and ", other.device());
}

}  // namespace rnn_ext
