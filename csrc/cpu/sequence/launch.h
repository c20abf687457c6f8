// The CPU's entry points for a layer over a sequence, for float, double, c10::BFloat16 and c10::Half.
#pragma once
#include "sequence/params.h"

namespace rnn_ext::cpu {

// Both leave alone what belongs to steps that a row doesn't have. Strides may be any but where the params say
// otherwise.
template <typename T>
void rnn_layer_forward(const LayerForwardParams<T>& p);

template <typename T>
void rnn_layer_backward(const LayerBackwardParams<T>& p);

}  // namespace rnn_ext::cpu
