// Checks that every operator makes, in the words of PyTorch's own modules.
#pragma once
#include "operators/operands.h"

namespace rnn_ext {

// The nonlinearity of that name, or nn.RNNCell's RuntimeError; and its name.
Nonlinearity parse_nonlinearity(std::string_view name);
std::string_view name_of(Nonlinearity nonlinearity);

// The other operand has the input's dtype, and is on its device.
void check_like(const Tensor& input, const Tensor& other, const char* name);

}  // namespace rnn_ext
