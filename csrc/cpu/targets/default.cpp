// The kernels for any CPU: the compiler's vectors at its baseline.
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/macros.h"

namespace rnn_ext::cpu {
namespace {

#include "cpu/simd/vec_default-inl.h"
#include "cpu/targets/kernels-inl.h"

}  // namespace

const KernelTable& kernels_default() {
  static constexpr KernelTable table = {"default", kernels<float>(), kernels<double>(), kernels<c10::BFloat16>(),
                                        kernels<c10::Half>()};
  return table;
}

}  // namespace rnn_ext::cpu
