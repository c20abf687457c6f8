// f and its derivative on vectors, and f on a run of elements.
#pragma once

// f(kind), with the kind for the compiler to see, as the type of the argument.
template <Nonlinearity nonlinearity>
struct Kind {
  static constexpr Nonlinearity value = nonlinearity;
};
template <typename F>
INLINE void with_kind(Nonlinearity nonlinearity, const F& f) {
  switch (nonlinearity) {
    case Nonlinearity::kTanh:
      return f(Kind<Nonlinearity::kTanh>());
    case Nonlinearity::kRelu:
      return f(Kind<Nonlinearity::kRelu>());
    case Nonlinearity::kSigmoid:
      return f(Kind<Nonlinearity::kSigmoid>());
  }
}

template <Nonlinearity kind, typename Vec>
INLINE typename Vec::V activate(typename Vec::V z) {
  if (kind == Nonlinearity::kTanh) return Vec::tanh(z);
  if (kind == Nonlinearity::kRelu) return Vec::zero_unless_positive(z, z);  // a NaN stays a NaN
  return Vec::set(1) / (Vec::set(1) + Vec::exp(-z));
}

template <Nonlinearity kind, typename Vec>
INLINE typename Vec::V activation_grad(typename Vec::V grad, typename Vec::V y) {
  if (kind == Nonlinearity::kTanh) return grad * ((Vec::set(1) - y) * (Vec::set(1) + y));  // 1 - y² would cancel near 1
  if (kind == Nonlinearity::kRelu) return Vec::zero_unless_positive(grad, y);  // as aten::threshold_backward
  return grad * ((Vec::set(1) - y) * y);
}

template <Nonlinearity kind, typename T>
void activate_run(const acc_t<T>* z, T* output, int64_t n) {
  using Vec = typename VecOf<T>::type;
  int64_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) Vec::store(output + i, activate<kind, Vec>(Vec::load(z + i)));
  if (i < n) Vec::store(output + i, activate<kind, Vec>(Vec::load(z + i, n - i)), n - i);
}

template <typename T>
void activate_run(Nonlinearity kind, const acc_t<T>* z, T* output, int64_t n) {
  with_kind(kind, [&](auto known) { activate_run<known.value>(z, output, n); });
}
