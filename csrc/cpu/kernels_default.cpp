// The kernels for any CPU: the compiler's vectors at its baseline.
#include <cmath>

#include "kernels.h"
#include "kernels_macros.h"

namespace rnn_ext::cpu {
namespace {

#include "vec_default.h"

#include "kernels_impl.h"

}  // namespace

const KernelTable& kernels_default() {
  static constexpr KernelTable table = {"default", kernels<float>(), kernels<double>(), kernels<c10::BFloat16>(),
                                        kernels<c10::Half>()};
  return table;
}

}  // namespace rnn_ext::cpu
