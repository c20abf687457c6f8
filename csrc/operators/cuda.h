// What the operators on CUDA tensors share: the GPU as the plans see it, and products whose sums keep their precision.
#pragma once
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>

#include <array>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

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

// Planning takes microseconds, and a model calls with the same few cases again and again: each thread remembers some,
// by `sizes`, those of the case. `variable` names the environment variable that forces a kernel.
template <typename Case, typename Plan>
Plan remembered_plan(Plan (&make_plan)(const Case&, const cuda::Device&, const char*), const Case& c,
                     std::initializer_list<int64_t> sizes, int device, const char* variable) {
  struct Entry {
    int device = -1;
    Case c;
    std::string forced;
    Plan plan;
  };
  static thread_local std::array<Entry, 64> remembered;
  const char* const value = std::getenv(variable);
  const std::string_view forced = value != nullptr ? value : "";
  size_t hash = static_cast<size_t>(c.dtype);
  for (const int64_t size : sizes) hash = hash * 31 + static_cast<size_t>(size) * 5;
  Entry& entry = remembered[hash % remembered.size()];
  if (entry.device != device || !(entry.c == c) || entry.forced != forced) {
    try {
      const auto plan = make_plan(c, describe_device(device), value);
      entry = {device, c, std::string(forced), plan};
    } catch (const std::invalid_argument& error) {
      TORCH_CHECK_VALUE(false, error.what());
    }
  }
  return entry.plan;
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
