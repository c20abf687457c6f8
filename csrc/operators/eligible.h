// What may take the eager path, past the dispatcher's Python kernels.
#pragma once
#include "operators/operands.h"

namespace rnn_ext {

#ifdef RNN_EXT_WITH_CUDA
constexpr bool kCudaBuilt = true;
#else
constexpr bool kCudaBuilt = false;
#endif

// A dense tensor of a dtype and on a device that have our kernels, with no wrapper around it (functorch, subclass,
// sparse, quantized, functionalized, negated) and without a forward-mode tangent.
bool is_plain(const Tensor& t);
inline bool is_plain(const OptTensor& t) { return !t.has_value() || is_plain(*t); }

// Whether a functorch transform or TorchScript's tracer asks for ATen's operators.
bool transforms_active();

}  // namespace rnn_ext
