// The eager path of rnn_ext.rnn_cell: what may take it, its node in the autograd graph, and its gradients.
#pragma once
#include "cell/ops.h"

namespace rnn_ext {

// The cell, recorded for autograd where a gradient is needed. Nothing where the fused kernels don't take the operands,
// or a mode asks for ATen's operators.
OptTensor rnn_cell_eager(const CellArguments& arguments);

// The fused forward, out of autograd's sight.
Tensor rnn_cell_below_autograd(const CellArguments& arguments);

// The asked gradients, in order. They come from the fused backward, or, where something is still to be differentiated
// (create_graph, a functorch transform, forward-mode AD), from the formulas of rnn_ext/_aten.py on the saved tensors:
// the saved output is connected to the graph, so every further derivative follows.
std::vector<Tensor> rnn_cell_gradients(const CellBackwardArguments& arguments);

}  // namespace rnn_ext
