// The operators under autocast: as nn.RNNCell and nn.RNN they are on its low-precision list. ATen's header for it
// brings all of ATen's operators along: only autocast.cpp includes that.
#pragma once
#include <type_traits>

#include "operators/find_op.h"
#include "operators/operands.h"

namespace rnn_ext {

bool is_autocast_enabled(at::DeviceType device_type);

// The dtype is the one in force now (torch.library.register_autocast would freeze one), and the cast weights are kept
// for the rest of the autocast region; whole numbers are left alone.
Tensor autocast(const Tensor& t, at::DeviceType device_type);
OptTensor autocast(const OptTensor& t, at::DeviceType device_type);

// Autocast's cache would keep casts of the weights made here, which have no graph, for those who do need one.
class WithoutAutocastCache {
 public:
  WithoutAutocastCache();
  ~WithoutAutocastCache();

 private:
  const bool enabled_;
};

// The kernel of an operator `Op`, which has a kName and a Signature: casts the tensors and calls it.
template <at::DeviceType device_type, typename Op, typename Signature = typename Op::Signature>
struct Autocast;

template <at::DeviceType device_type, typename Op, typename Result, typename... Arguments>
struct Autocast<device_type, Op, Result(Arguments...)> {
  static Result call(Arguments... arguments) {
    constexpr auto key = device_type == at::kCUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const auto cast = [&](const auto& argument) {
      using Argument = std::decay_t<decltype(argument)>;
      if constexpr (std::is_same_v<Argument, Tensor> || std::is_same_v<Argument, OptTensor>) {
        return autocast(argument, device_type);
      } else {
        return argument;
      }
    };
    static const auto op = find_op<Result(Arguments...)>(Op::kName);
    return op.call(cast(arguments)...);
  }
};

}  // namespace rnn_ext
