// The typed handle of a registered operator: a call through it costs no look-up, and no boxing.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

namespace rnn_ext {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace rnn_ext
