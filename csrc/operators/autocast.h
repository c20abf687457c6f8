// The operators under autocast: as nn.RNNCell and nn.RNN they are on its low-precision list.
#pragma once
#include <ATen/autocast_mode.h>

#include <type_traits>

#include "operators/find_op.h"
#include "operators/operands.h"

namespace rnn_ext {

// The kernel of an operator `Op`, which has a kName and a Signature: casts the tensors and calls it. The dtype is the
// one in force now (torch.library.register_autocast would freeze one), and cached_cast keeps the cast weights for the
// rest of the autocast region; it leaves whole numbers alone.
template <at::DeviceType device_type, typename Op, typename Signature = typename Op::Signature>
struct Autocast;

template <at::DeviceType device_type, typename Op, typename Result, typename... Arguments>
struct Autocast<device_type, Op, Result(Arguments...)> {
  static Result call(Arguments... arguments) {
    constexpr auto key = device_type == at::kCUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const auto dtype = at::autocast::get_autocast_dtype(device_type);
    const auto cast = [&](const auto& argument) {
      using Argument = std::decay_t<decltype(argument)>;
      if constexpr (std::is_same_v<Argument, Tensor> || std::is_same_v<Argument, OptTensor>) {
        return at::autocast::cached_cast(dtype, argument, device_type);
      } else {
        return argument;
      }
    };
    static const auto op = find_op<Result(Arguments...)>(Op::kName);
    return op.call(cast(arguments)...);
  }
};

}  // namespace rnn_ext
