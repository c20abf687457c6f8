// The products of large cells, by the GEMMs that ATen uses (MKL, oneDNN): where these beat the kernels of this folder.
// They go to ATen's CPU functions directly, past the dispatcher, so that no mode or autocast sees them. float and
// double alone: a product in 16 bits would be rounded before the next is added, and oneDNN's bf16 GEMM has been seen to
// spread a NaN to other rows.
#pragma once
#include <type_traits>

#include "cell/params.h"

namespace rnn_ext::cpu {

template <typename T>
constexpr bool kHasAtenGemm = std::is_floating_point_v<T>;

// output = x Wᵀ + h Uᵀ.
template <typename T>
void aten_gemm_forward(const ForwardParams<T>& p);

// The gradients of input, hx and weights that are asked for, from dz (B, H), contiguous; weight_hh's only with an hx.
template <typename T>
void aten_gemm_backward(const BackwardParams<T>& p, const T* dz);

}  // namespace rnn_ext::cpu
