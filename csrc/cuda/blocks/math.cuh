// Scalars: conversions to and from the type that sums are kept in, and the nonlinearities.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "core/params.h"
#include "cuda/plan/types.h"
#include "cuda/ptx/ptx.cuh"

namespace rnn_ext::cuda {

template <typename T>
constexpr Dtype kDtype = sizeof(T) == 8                   ? Dtype::kDouble
                         : sizeof(T) == 4                 ? Dtype::kFloat
                         : std::is_same<T, __half>::value ? Dtype::kHalf
                                                          : Dtype::kBFloat16;

// f(T) of every dtype, for explicit instantiations.
#ifndef RNN_EXT_FOR_EACH_DTYPE  // fewer in some builds of the tests
#define RNN_EXT_FOR_EACH_DTYPE(f) f(float) f(double) f(__half) f(__nv_bfloat16)
#endif

// fp16 and bf16 accumulate in fp32.
template <typename T>
using Accumulator = std::conditional_t<sum_bytes_of(kDtype<T>) == 8, double, float>;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T narrow(Accumulator<T> v) {
  return v;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Two values rounded to T, the first in the low 16 bits.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}

// f(z). relu is a comparison and not fmax, which would swallow a NaN.
__device__ __forceinline__ float activate(float z, Nonlinearity f) {
  if (f == Nonlinearity::kTanh) return tanhf(z);
  if (f == Nonlinearity::kRelu) return z < 0.f ? 0.f : z;
  return 1.f / (1.f + expf(-z));
}
__device__ __forceinline__ double activate(double z, Nonlinearity f) {
  if (f == Nonlinearity::kTanh) return tanh(z);
  if (f == Nonlinearity::kRelu) return z < 0. ? 0. : z;
  return 1. / (1. + exp(-z));
}

// The same, rounded to T. Where that is 16 bits, tanh and the logistic function, which is (1 + tanh(z / 2)) / 2, may be
// approximated: one instruction each.
template <typename T>
__device__ __forceinline__ T activate(Accumulator<T> z, Nonlinearity f) {
  if constexpr (sizeof(T) == 2) {
    if (f == Nonlinearity::kTanh) return narrow<T>(ptx::tanh_approx(z));
  }
  return narrow<T>(activate(z, f));
}

}  // namespace rnn_ext::cuda
