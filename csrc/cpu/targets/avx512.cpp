// The kernels for AVX-512 (F, BW, DQ, VL). A pragma, not a compiler flag, sets the instruction set, since build tools
// give one set of flags to all files; every header outside of this folder comes before it.
#include "cpu/kernels.h"
#include "cpu/macros.h"

#ifdef RNN_EXT_CPU_X86
#include <immintrin.h>

RNN_EXT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

extern "C" __m512 Sleef_expf16_u10(__m512);
extern "C" __m512d Sleef_tanhd8_u10(__m512d);
extern "C" __m512d Sleef_expd8_u10(__m512d);

namespace rnn_ext::cpu {
namespace {

#include "cpu/simd/vec_avx512-inl.h"
#include "cpu/targets/kernels-inl.h"

constexpr KernelTable table = {"avx512", kernels<float>(), kernels<double>(), kernels<c10::BFloat16>(),
                               kernels<c10::Half>()};

}  // namespace
}  // namespace rnn_ext::cpu

RNN_EXT_TARGET_END

const rnn_ext::cpu::KernelTable& rnn_ext::cpu::kernels_avx512() { return table; }

#endif  // RNN_EXT_CPU_X86
