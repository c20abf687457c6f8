// The bfloat16 kernels for AVX-512 with vdpbf16ps; everything else is avx512.cpp's. Not built by compilers that
// don't know the instruction (GCC before 10).
#include "cpu/kernels.h"
#include "cpu/macros.h"

#ifdef RNN_EXT_CPU_AVX512_BF16
#include <immintrin.h>

RNN_EXT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

extern "C" __m512 Sleef_expf16_u10(__m512);
extern "C" __m512d Sleef_tanhd8_u10(__m512d);
extern "C" __m512d Sleef_expd8_u10(__m512d);

namespace rnn_ext::cpu {
namespace {

#include "cpu/simd/vec_avx512-inl.h"
#include "cpu/blocks/common-inl.h"
#include "cpu/blocks/activation-inl.h"
#include "cpu/blocks/epilogue-inl.h"
#include "cpu/blocks/pairs-inl.h"
#include "cpu/blocks/panels-inl.h"
#include "cpu/blocks/panel_pairs-inl.h"
#include "cpu/cell/forward_pairs-inl.h"
#include "cpu/sequence/rows-inl.h"
#include "cpu/sequence/forward-inl.h"
#include "cpu/sequence/backward-inl.h"

}  // namespace
}  // namespace rnn_ext::cpu

RNN_EXT_TARGET_END

namespace rnn_ext::cpu {
namespace {

LayerKernels<c10::BFloat16> layer_by_pairs(int64_t hidden_size) {
  if (is_narrow<float>(hidden_size)) return kernels_avx512().bf16.layer(hidden_size);
  return layer_kernels<c10::BFloat16, Pairs>(hidden_size);
}

KernelTable make_table() {
  KernelTable table = kernels_avx512();
  table.capability = "avx512_bf16";
  table.bf16.forward = &forward_by_pairs;
  table.bf16.product = &product_by_pairs;
  table.bf16.layer = &layer_by_pairs;
  return table;
}

}  // namespace

const KernelTable& kernels_avx512_bf16() {
  static const KernelTable table = make_table();
  return table;
}

}  // namespace rnn_ext::cpu

#endif  // RNN_EXT_CPU_AVX512_BF16
