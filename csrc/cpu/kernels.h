// What one instruction set's translation unit offers to the launcher: serial kernels over a block of work. The launcher
// (cell/launch.cpp) cuts the work into blocks, chooses threads and the instruction set.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cell/params.h"
#include "cpu/acc_type.h"
#include "cpu/cell/families.h"
#include "cpu/sequence/kernels.h"

namespace rnn_ext::cpu {

// C = A M, for A (rows, inner) of accumulation type with any strides, M (inner, cols) and C (rows, cols) with unit
// column stride. Transposing A costs nothing, since its elements are broadcast one by one.
template <typename T>
struct Product {
  const acc_t<T>* a;
  int64_t a_row_stride, a_col_stride;
  const T* m;
  int64_t m_stride;
  T* c;
  int64_t c_stride;
  int64_t rows, cols, inner;
  int64_t whole_rows;  // of the product that this is a block of rows of: what blocks there are must not choose a kernel
};

// A block of dz (B, H) that is in memory.
template <typename T>
struct DzBlock {
  acc_t<T>* data;  // at (row_begin, col_begin)
  int64_t row_stride;
  int64_t row_begin, row_end, col_begin, col_end;

  int64_t rows() const { return row_end - row_begin; }
  int64_t cols() const { return col_end - col_begin; }
};

// Of a product's inner dimension: with fewer, the time goes into stores.
constexpr int64_t kFewTerms = 24;

template <typename T>
struct Kernels {
  // output[rows, columns] of the whole forward pass.
  void (*forward)(const ForwardParams<T>& p, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end);
  // output[rows] = f(output[rows] + b_ih + b_hh), for products that ATen's GEMM has left in output.
  void (*epilogue)(const ForwardParams<T>& p, int64_t row_begin, int64_t row_end);
  // dz[rows, columns] = grad_output · f'(output), for all rows of the block; and, where these are all of dz's, their
  // sums into grad_bias, if asked.
  void (*grad_z)(const BackwardParams<T>& p, const DzBlock<T>& dz, int64_t col_begin, int64_t col_end);
  // A block of C = A M.
  void (*product)(const Product<T>& g, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end);
  LayerKernels<T> (*layer)(int64_t hidden_size);
};

// The calling thread's own memory for the blocks that a kernel works on: as the kernel before left it, aligned to 64
// bytes, freed when the thread ends; of its pages those exist that were written to. A kernel has 32 KB of stack at most
// (setup.py holds it to that), since a thread may have 128 KB in all. Memory from the allocator anew in each call would
// go back to the system after it, and faulting its pages in again has been seen to cost 20 µs.
constexpr int64_t kScratchBytes = 1 << 19;
void* scratch_memory();

struct KernelTable {
  const char* capability;
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<c10::BFloat16> bf16;
  Kernels<c10::Half> f16;
};

const KernelTable& kernels_default();
#if defined(__x86_64__) && defined(__linux__)
#define RNN_EXT_CPU_X86 1
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
#if __has_include(<avx512bf16intrin.h>)
#define RNN_EXT_CPU_AVX512_BF16 1
const KernelTable& kernels_avx512_bf16();
#endif
#endif

}  // namespace rnn_ext::cpu
