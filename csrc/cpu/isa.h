// The instruction set that the kernels run on here, and so which target's they are: chosen once.
#pragma once
#include <type_traits>

#include "cpu/kernels.h"

namespace rnn_ext::cpu {

// In order: each has all that those before it have.
enum class Isa { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

// The best that the CPU and this build have, or a lesser one that the environment variable RNN_EXT_CPU_CAPABILITY asks
// for, read once. This and all below raise ValueError in every call where that names none, or more than there is.
Isa isa();

int64_t vector_bytes();

// As RNN_EXT_CPU_CAPABILITY has it: "default", "avx2", "avx512" or "avx512_bf16".
const char* cpu_capability();

const KernelTable& kernel_table();

// Its kernels for an element type.
template <typename T>
const Kernels<T>& kernels() {
  const KernelTable& table = kernel_table();
  if constexpr (std::is_same_v<T, float>) {
    return table.f32;
  } else if constexpr (std::is_same_v<T, double>) {
    return table.f64;
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return table.bf16;
  } else {
    static_assert(std::is_same_v<T, c10::Half>);
    return table.f16;
  }
}

// Not an instruction set, but AVX-512 goes with other sizes there.
bool is_amd();

}  // namespace rnn_ext::cpu
