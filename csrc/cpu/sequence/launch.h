// The CPU's entry points for a layer over a sequence, for float, double, c10::BFloat16 and c10::Half.
#pragma once
#include <functional>

#include "sequence/params.h"

namespace rnn_ext::cpu {

// Both leave alone what belongs to steps that a row doesn't have. Strides may be any but where the params say
// otherwise.
template <typename T>
void rnn_layer_forward(const LayerForwardParams<T>& p);

// Calls take_weights() once, before grad_weight_ih and grad_weight_hh are written: it sets them, if they are asked for.
// Until then their memory may serve something else.
template <typename T>
void rnn_layer_backward(LayerBackwardParams<T>& p, const std::function<void()>& take_weights);

}  // namespace rnn_ext::cpu
