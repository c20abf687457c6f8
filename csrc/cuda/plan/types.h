// What the plans of all directions and the kernels share: dtypes, ways to multiply and to fill, a GPU. Plain C++.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/host_device.h"

namespace rnn_ext::cuda {

enum class Dtype : int { kFloat, kDouble, kHalf, kBFloat16 };

constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }

// Of a sum: fp16 and bf16 are summed up in fp32.
constexpr int sum_bytes_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : 4; }

// Whether a row of a table is marked for the dtype.
constexpr bool is_marked(Dtype dtype, bool fp32, bool fp64, bool fp16, bool bf16) {
  return dtype == Dtype::kFloat ? fp32 : dtype == Dtype::kDouble ? fp64 : dtype == Dtype::kHalf ? fp16 : bf16;
}

RNN_EXT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What multiplies.
enum class Math {
  kTensorCore,  // fp16 from sm_75, bf16 and fp64 from sm_80
  kTf32,        // fp32 rounded to tf32, from sm_80, where PyTorch's matmul setting allows it
  kSplitTf32,   // fp32 as three products of tf32, which keep its accuracy: sm_90a
  kSimt,        // the FP32 and FP64 pipes: everything, everywhere
};

// How operands reach shared memory.
enum class Fill {
  kAsync,   // cp.async, from sm_80; 16-bit operands must be 4-byte aligned, with unit stride along K
  kStaged,  // through registers: any alignment, any strides, every architecture
};

// The index of an operand, of `rows` and a depth k, that neighbouring addresses differ in.
enum class Major { kK, kRows };

constexpr int kAnySm = 1000;

struct Device {
  int compute_capability = 90;  // 10 * major + minor
  int multiprocessors = 132;
  size_t smem_per_block = 227 * 1024;
};

}  // namespace rnn_ext::cuda
