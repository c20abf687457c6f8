// The type that sums are accumulated in, and activations computed in.
#pragma once

namespace rnn_ext::cpu {

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

}  // namespace rnn_ext::cpu
