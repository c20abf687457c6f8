// Vectors of 4 floats or 2 doubles in the compiler's own vector extension: for every CPU, with no intrinsics.
#pragma once

template <typename Scalar, int lanes>
struct VecPortable {
  using S = Scalar;
  typedef S V __attribute__((vector_size(lanes * sizeof(S))));
  static constexpr int kLanes = lanes;
  static constexpr int kDotRows = 3, kDotSums = 12;  // of a tile of dot products
  static constexpr int kOuterRows = 4;               // of a tile of outer products, two vectors wide

  static INLINE V zero() { return V{}; }
  static INLINE V set(S x) {
    V v;
    for (int i = 0; i < kLanes; ++i) v[i] = x;
    return v;
  }
  static INLINE V fma(V a, V b, V c) { return a * b + c; }
  // In double, then rounded: the C library's tanhf may be off by 2 ulp.
  static INLINE V tanh(V x) {
    for (int i = 0; i < kLanes; ++i) x[i] = static_cast<S>(::tanh(static_cast<double>(x[i])));
    return x;
  }
  static INLINE V exp(V x) {
    for (int i = 0; i < kLanes; ++i) x[i] = static_cast<S>(::exp(static_cast<double>(x[i])));
    return x;
  }
  // x where pick is not <= 0 (so also where pick is NaN), elsewhere 0.
  static INLINE V zero_unless_positive(V x, V pick) {
    for (int i = 0; i < kLanes; ++i) x[i] = pick[i] <= 0 ? 0 : x[i];
    return x;
  }

  static INLINE V load(const S* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(V));
    return v;
  }
  static INLINE void store(S* p, V v) { __builtin_memcpy(p, &v, sizeof(V)); }

  template <typename T>
  static INLINE V load(const T* p) {
    return load(p, kLanes);
  }
  template <typename T>
  static INLINE V load(const T* p, int64_t n) {
    V v = zero();
    for (int i = 0; i < n; ++i) v[i] = static_cast<S>(p[i]);
    return v;
  }
  template <typename T>
  static INLINE void store(T* p, V v) {
    store(p, v, kLanes);
  }
  template <typename T>
  static INLINE void store(T* p, V v, int64_t n) {
    for (int i = 0; i < n; ++i) p[i] = static_cast<T>(v[i]);
  }

  // sums[j] = the sum of v[j]'s lanes.
  static INLINE void sum4(const V* v, S* sums) {
    for (int j = 0; j < 4; ++j) {
      sums[j] = v[j][0];
      for (int i = 1; i < kLanes; ++i) sums[j] += v[j][i];
    }
  }

  static INLINE void transpose(V (&v)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < i; ++j) {
        const S x = v[i][j];
        v[i][j] = v[j][i];
        v[j][i] = x;
      }
    }
  }
};

using VecF32 = VecPortable<float, 4>;
using VecF64 = VecPortable<double, 2>;
