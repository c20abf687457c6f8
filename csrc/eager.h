// The eager path of rnn_ext.rnn_cell: what may take it, its node in the autograd graph, and its gradients.
#pragma once
#include "ops.h"

namespace rnn_ext {

#ifdef RNN_EXT_WITH_CUDA
constexpr bool kCudaBuilt = true;
#else
constexpr bool kCudaBuilt = false;
#endif

// The cell, recorded for autograd where a gradient is needed. Nothing where the fused kernels don't take the operands,
// or a mode asks for ATen's operators.
OptTensor rnn_cell_eager(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                         const OptTensor& bias_ih, const OptTensor& bias_hh, std::string_view nonlinearity);

// The fused forward, out of autograd's sight.
Tensor rnn_cell_below_autograd(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih,
                               const Tensor& weight_hh, const OptTensor& bias_ih, const OptTensor& bias_hh,
                               std::string_view nonlinearity);

// The asked gradients, in order. They come from the fused backward, or, where something is still to be differentiated
// (create_graph, a functorch transform, forward-mode AD), from the formulas of rnn_ext/_aten.py on the saved tensors:
// the saved output is connected to the graph, so every further derivative follows.
std::vector<Tensor> rnn_cell_gradients(const Tensor& grad_output, const Tensor& output, const OptTensor& input,
                                       const OptTensor& hx, const OptTensor& weight_ih, const OptTensor& weight_hh,
                                       std::string_view nonlinearity, OutputMask output_mask);

}  // namespace rnn_ext
