// f and its derivative on vectors, and f on a run of elements.
#pragma once

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
  switch (kind) {
    case Nonlinearity::kTanh:
      return activate_run<Nonlinearity::kTanh>(z, output, n);
    case Nonlinearity::kRelu:
      return activate_run<Nonlinearity::kRelu>(z, output, n);
    case Nonlinearity::kSigmoid:
      return activate_run<Nonlinearity::kSigmoid>(z, output, n);
  }
}
