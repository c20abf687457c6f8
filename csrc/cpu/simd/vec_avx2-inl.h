// Vectors of 8 floats or 4 doubles, AVX2 with FMA and F16C. exp, and tanh of doubles, are SLEEF's, which libtorch_cpu
// exports and ATen itself uses.
#pragma once

#include "cpu/simd/tanh-inl.h"

struct VecF32 {
  using S = float;
  using V = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kDotRows = 3, kDotSums = 12;  // of a tile of dot products
  static constexpr int kOuterRows = 6;               // of a tile of outer products, two vectors wide

  static INLINE V zero() { return _mm256_setzero_ps(); }
  static INLINE V set(float x) { return _mm256_set1_ps(x); }
  static INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static INLINE V tanh(V x) { return tanh_f32<VecF32>(x); }
  static INLINE V exp(V x) { return Sleef_expf8_u10(x); }
  static INLINE V round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static INLINE V power_of_two(V n) {  // of whole numbers from -126 to 0
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static INLINE V magnitude_up_to(V x, V most) {  // NaN for a NaN
    return _mm256_min_ps(most, _mm256_andnot_ps(set(-0.f), x));
  }
  static INLINE V with_sign_of(V sign, V x) { return _mm256_or_ps(x, _mm256_and_ps(sign, set(-0.f))); }  // x >= 0
  static INLINE V where_less(V a, V b, V then, V otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  // x where pick is not <= 0 (so also where pick is NaN), elsewhere 0.
  static INLINE V zero_unless_positive(V x, V pick) {
    return _mm256_and_ps(x, _mm256_cmp_ps(pick, _mm256_setzero_ps(), _CMP_NLE_UQ));
  }

  static INLINE __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  static INLINE V load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
  static INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static INLINE void store(float* p, V v, int64_t n) { _mm256_maskstore_ps(p, first(n), v); }

  // AVX2 has no masked access to 16-bit elements: part of a vector goes through the stack.
  static INLINE __m128i load_bits(const void* p, int64_t n) {
    alignas(16) uint16_t buffer[8] = {};
    __builtin_memcpy(buffer, p, n * sizeof(uint16_t));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
  }
  static INLINE void store_bits(void* p, __m128i v, int64_t n) {
    alignas(16) uint16_t buffer[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(buffer), v);
    __builtin_memcpy(p, buffer, n * sizeof(uint16_t));
  }

  static INLINE V widen_bf16(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
  static INLINE __m128i narrow_bf16(V v) {  // rounds to nearest even; NaN gives the quiet NaN
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  static INLINE V load(const c10::BFloat16* p) {
    return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static INLINE V load(const c10::BFloat16* p, int64_t n) { return widen_bf16(load_bits(p, n)); }
  static INLINE void store(c10::BFloat16* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
  static INLINE void store(c10::BFloat16* p, V v, int64_t n) { store_bits(p, narrow_bf16(v), n); }

  static INLINE __m128i narrow_f16(V v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static INLINE V load(const c10::Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static INLINE V load(const c10::Half* p, int64_t n) { return _mm256_cvtph_ps(load_bits(p, n)); }
  static INLINE void store(c10::Half* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(v)); }
  static INLINE void store(c10::Half* p, V v, int64_t n) { store_bits(p, narrow_f16(v), n); }

  // sums[j] = the sum of v[j]'s lanes.
  static INLINE void sum4(const V* v, float* sums) {
    const V ab = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
    const V cd = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
    const V abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }

  static INLINE void transpose(V (&v)[8]) {
    V t[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
      v[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      v[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      v[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      v[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    UNROLL for (int c = 0; c < 4; ++c) {
      t[c] = _mm256_permute2f128_ps(v[c], v[4 + c], 0x20);
      t[4 + c] = _mm256_permute2f128_ps(v[c], v[4 + c], 0x31);
    }
    UNROLL for (int i = 0; i < 8; ++i) v[i] = t[i];
  }
};

struct VecF64 {
  using S = double;
  using V = __m256d;
  static constexpr int kLanes = 4;
  static constexpr int kDotRows = 3, kDotSums = 12;  // of a tile of dot products
  static constexpr int kOuterRows = 6;               // of a tile of outer products, two vectors wide

  static INLINE V zero() { return _mm256_setzero_pd(); }
  static INLINE V set(double x) { return _mm256_set1_pd(x); }
  static INLINE V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static INLINE V tanh(V x) { return Sleef_tanhd4_u10(x); }
  static INLINE V exp(V x) { return Sleef_expd4_u10(x); }
  static INLINE V zero_unless_positive(V x, V pick) {
    return _mm256_and_pd(x, _mm256_cmp_pd(pick, _mm256_setzero_pd(), _CMP_NLE_UQ));
  }

  static INLINE __m256i first(int64_t n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }

  static INLINE V load(const double* p) { return _mm256_loadu_pd(p); }
  static INLINE V load(const double* p, int64_t n) { return _mm256_maskload_pd(p, first(n)); }
  static INLINE void store(double* p, V v) { _mm256_storeu_pd(p, v); }
  static INLINE void store(double* p, V v, int64_t n) { _mm256_maskstore_pd(p, first(n), v); }

  static INLINE void sum4(const V* v, double* sums) {
    const V ab = _mm256_add_pd(_mm256_unpacklo_pd(v[0], v[1]), _mm256_unpackhi_pd(v[0], v[1]));
    const V cd = _mm256_add_pd(_mm256_unpacklo_pd(v[2], v[3]), _mm256_unpackhi_pd(v[2], v[3]));
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31)));
  }

  static INLINE void transpose(V (&v)[4]) {
    V t[4];
    UNROLL for (int i = 0; i < 4; i += 2) {
      t[i] = _mm256_unpacklo_pd(v[i], v[i + 1]);
      t[i + 1] = _mm256_unpackhi_pd(v[i], v[i + 1]);
    }
    UNROLL for (int c = 0; c < 2; ++c) {
      v[c] = _mm256_permute2f128_pd(t[c], t[2 + c], 0x20);
      v[2 + c] = _mm256_permute2f128_pd(t[c], t[2 + c], 0x31);
    }
  }
};
