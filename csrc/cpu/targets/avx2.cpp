// The kernels for AVX2 with FMA and F16C. A pragma, not a compiler flag, sets the instruction set, since build tools
// give one set of flags to all files; every header outside of this folder comes before it.
#include "cpu/kernels.h"
#include "cpu/macros.h"

#ifdef RNN_EXT_CPU_X86
#include <immintrin.h>

RNN_EXT_TARGET_BEGIN("avx2,fma,f16c")

extern "C" __m256 Sleef_expf8_u10(__m256);
extern "C" __m256d Sleef_tanhd4_u10(__m256d);
extern "C" __m256d Sleef_expd4_u10(__m256d);

namespace rnn_ext::cpu {
namespace {

#include "cpu/simd/vec_avx2-inl.h"
#include "cpu/targets/kernels-inl.h"

constexpr KernelTable table = {"avx2", kernels<float>(), kernels<double>(), kernels<c10::BFloat16>(),
                               kernels<c10::Half>()};

}  // namespace
}  // namespace rnn_ext::cpu

RNN_EXT_TARGET_END

const rnn_ext::cpu::KernelTable& rnn_ext::cpu::kernels_avx2() { return table; }

#endif  // RNN_EXT_CPU_X86
