// The CUDA toolkit's names for PyTorch's scalar types.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace rnn_ext {

template <typename T>
struct DeviceTypeOf {
  using type = T;
};
template <>
struct DeviceTypeOf<c10::Half> {
  using type = __half;
};
template <>
struct DeviceTypeOf<c10::BFloat16> {
  using type = __nv_bfloat16;
};
template <typename T>
using DeviceType = typename DeviceTypeOf<T>::type;

}  // namespace rnn_ext
