#include "cpu/isa.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>

#ifdef RNN_EXT_CPU_X86
#include <cpuid.h>
#endif

namespace rnn_ext::cpu {
namespace {

#ifdef RNN_EXT_CPU_X86
// __builtin_cpu_supports knows f16c from GCC 11 on.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}

#ifdef RNN_EXT_CPU_AVX512_BF16
bool has_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1 << 5) != 0;
}
#endif
#endif

const char* name_of(Isa isa) {
  constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<int>(isa)];
}

// The most that this CPU, and this build, can run.
Isa best_isa() {
#ifdef RNN_EXT_CPU_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef RNN_EXT_CPU_AVX512_BF16
  if (has_avx512 && has_avx512_bf16()) return Isa::kAvx512Bf16;
#endif
  if (has_avx512) return Isa::kAvx512;
  if (has_avx2) return Isa::kAvx2;
#endif
  return Isa::kDefault;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* asked = std::getenv("RNN_EXT_CPU_CAPABILITY");
  if (asked == nullptr || *asked == '\0') return best;
  for (const Isa isa : {Isa::kDefault, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (std::strcmp(asked, name_of(isa)) != 0) continue;
    TORCH_CHECK_VALUE(isa <= best, "RNN_EXT_CPU_CAPABILITY=", asked,
                      ", but the most that this CPU and this build have is ", name_of(best));
    return isa;
  }
  TORCH_CHECK_VALUE(false, "RNN_EXT_CPU_CAPABILITY must be default, avx2, avx512, avx512_bf16 or unset, got ", asked);
}

const KernelTable& table_of(Isa isa) {
#ifdef RNN_EXT_CPU_X86
#ifdef RNN_EXT_CPU_AVX512_BF16
  if (isa == Isa::kAvx512Bf16) return kernels_avx512_bf16();
#endif
  if (isa == Isa::kAvx512) return kernels_avx512();
  if (isa == Isa::kAvx2) return kernels_avx2();
#endif
  return kernels_default();
}

}  // namespace

// A setting that is refused is refused in every call: the initialisation of a static that throws is tried again.
Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

const KernelTable& kernel_table() {
  static const KernelTable& chosen = table_of(isa());
  return chosen;
}

int64_t vector_bytes() { return isa() >= Isa::kAvx512 ? 64 : isa() == Isa::kAvx2 ? 32 : 16; }

const char* cpu_capability() { return name_of(isa()); }

bool is_amd() {
#ifdef RNN_EXT_CPU_X86
  return __builtin_cpu_is("amd");  // isa() has asked the CPU
#else
  return false;
#endif
}

}  // namespace rnn_ext::cpu
