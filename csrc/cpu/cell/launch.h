// The CPU kernels' entry points: one each way, for float, double, c10::BFloat16 and c10::Half.
#pragma once
#include "cell/params.h"
#include "cpu/kernels.h"

namespace rnn_ext::cpu {

// Both assume unit column strides (col_stride is ignored), but for grad_output; rows may lie at any distance, 0
// included.
template <typename T>
void rnn_cell_forward(const ForwardParams<T>& p);

template <typename T>
void rnn_cell_backward(const BackwardParams<T>& p);

// The backward's two steps, for callers that have memory for dz, or dz itself.
//
// A block of dz, and, where it has all rows, the bias gradients of its columns.
template <typename T>
void grad_z(const BackwardParams<T>& p, const DzBlock<T>& dz);

// What follows from a block of dz, of the gradients that are asked for: with all columns of dz, its rows of dX = dZ W
// and dH = dZ U; with all rows, its columns' rows of dW = dZᵀ X and dU = dZᵀ H. p.grad_output, p.output and the bias
// gradients are not looked at.
template <typename T>
void gradients_from_dz(const BackwardParams<T>& p, const DzBlock<T>& dz);

}  // namespace rnn_ext::cpu
