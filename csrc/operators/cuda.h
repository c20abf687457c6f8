// What the operators on CUDA tensors share: the GPU as the plans see it, and products whose sums keep their precision.
#pragma once
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>

#include "cuda/plan/types.h"
#include "operators/operands.h"

namespace rnn_ext {

// Whether PyTorch's precision setting, in its old or its new form, lets float32 products be computed in tf32. It is
// read from where both keep it: allowTF32CuBLAS() would complain about a mix of the two.
inline bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
             at::Float32Precision::TF32 &&
         !at::NoTF32Guard::should_disable_tf32();
}

inline cuda::Device describe_device(int index) {
  const auto attribute = [&](cudaDeviceAttr what) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, what, index));
    return value;
  };
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMultiProcessorCount),
          static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))};
}

// sums = a b, in float32 where a and b are of 16 bits.
inline void multiply_to_sums(Tensor& sums, const Tensor& a, const Tensor& b) {
  if (a.element_size() == 2) {
    at::mm_out(sums, a, b, at::kFloat);
  } else {
    at::mm_out(sums, a, b);
  }
}

}  // namespace rnn_ext
