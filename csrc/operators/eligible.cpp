#include "operators/eligible.h"

#include <c10/core/impl/LocalDispatchKeySet.h>

namespace rnn_ext {

bool is_plain(const Tensor& t) {
  static const uint64_t plain_keys =  // whatever is wrapped around a tensor has a key beyond these
      (c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::ADInplaceOrView}) |
       c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset)
          .raw_repr() |
      c10::full_backend_mask;
  const auto dtype = t.scalar_type();
  return (t.key_set().raw_repr() & ~plain_keys) == 0 && (t.is_cpu() || (kCudaBuilt && t.is_cuda())) &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf) &&
         !t._fw_grad(/*level=*/0).defined();
}

bool transforms_active() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer);
}

}  // namespace rnn_ext
