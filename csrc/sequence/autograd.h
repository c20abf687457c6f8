// The eager path of a layer over a sequence: past the dispatcher's Python kernels, with one node in the autograd graph.
#pragma once
#include "sequence/ops.h"

namespace rnn_ext {

// (output, h_n), recorded for autograd where that is needed; nothing where the kernels don't take these arguments.
// with_layers: hx and h_n are (1, B, H).
std::optional<std::tuple<Tensor, Tensor>> rnn_layer_eager(const LayerArguments& arguments, bool with_layers);

}  // namespace rnn_ext
