// Vectors of 16 floats or 8 doubles, AVX-512 (F, BW, DQ, VL). exp, and tanh of doubles, are SLEEF's, which libtorch_cpu
// exports and ATen itself uses.
#pragma once

#include "cpu/simd/tanh-inl.h"

struct VecF32 {
  using S = float;
  using V = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kDotRows = 6, kDotSums = 24;  // of a tile of dot products
  static constexpr int kOuterRows = 12;              // of a tile of outer products, two vectors wide

  static INLINE V zero() { return _mm512_setzero_ps(); }
  static INLINE V set(float x) { return _mm512_set1_ps(x); }
  static INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static INLINE V tanh(V x) { return tanh_f32<VecF32>(x); }
  static INLINE V exp(V x) { return Sleef_expf16_u10(x); }
  static INLINE V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static INLINE V power_of_two(V n) { return _mm512_scalef_ps(set(1), n); }  // of whole numbers from -126 to 0
  static INLINE V magnitude_up_to(V x, V most) { return _mm512_min_ps(most, _mm512_abs_ps(x)); }  // NaN for a NaN
  static INLINE V with_sign_of(V sign, V x) { return _mm512_or_ps(x, _mm512_and_ps(sign, set(-0.f))); }  // x >= 0
  static INLINE V where_less(V a, V b, V then, V otherwise) {
    return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), then);
  }
  // x where pick is not <= 0 (so also where pick is NaN), elsewhere 0.
  static INLINE V zero_unless_positive(V x, V pick) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(pick, _mm512_setzero_ps(), _CMP_NLE_UQ), x);
  }

  static INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

  static INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  static INLINE V load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static INLINE void store(float* p, V v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }

  static INLINE V widen_bf16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
  static INLINE __m256i narrow_bf16(V v) {  // rounds to nearest even; NaN gives the quiet NaN
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_srli_epi32(rounded, 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(rounded);
  }
  static INLINE V load(const c10::BFloat16* p) {
    return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static INLINE V load(const c10::BFloat16* p, int64_t n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
  static INLINE void store(c10::BFloat16* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v));
  }
  static INLINE void store(c10::BFloat16* p, V v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(v)); }

  static INLINE __m256i narrow_f16(V v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static INLINE V load(const c10::Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static INLINE V load(const c10::Half* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static INLINE void store(c10::Half* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(v)); }
  static INLINE void store(c10::Half* p, V v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow_f16(v)); }

  // sums[j] = the sum of v[j]'s lanes.
  static INLINE void sum4(const V* v, float* sums) {
    const V ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const V cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const V abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 sums8 = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(sums8), _mm256_extractf128_ps(sums8, 1)));
  }

  static INLINE void transpose(V (&v)[16]) {
    V t[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
      v[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      v[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      v[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      v[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    // v[4g + c] holds columns c, 4 + c, 8 + c, 12 + c of rows 4g to 4g + 3: a transpose of 4×4 blocks remains.
    UNROLL for (int c = 0; c < 4; ++c) {
      t[c] = _mm512_shuffle_f32x4(v[c], v[4 + c], 0x88);
      t[4 + c] = _mm512_shuffle_f32x4(v[c], v[4 + c], 0xdd);
      t[8 + c] = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0x88);
      t[12 + c] = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0xdd);
    }
    UNROLL for (int c = 0; c < 4; ++c) {
      v[c] = _mm512_shuffle_f32x4(t[c], t[8 + c], 0x88);
      v[4 + c] = _mm512_shuffle_f32x4(t[4 + c], t[12 + c], 0x88);
      v[8 + c] = _mm512_shuffle_f32x4(t[c], t[8 + c], 0xdd);
      v[12 + c] = _mm512_shuffle_f32x4(t[4 + c], t[12 + c], 0xdd);
    }
  }
};

struct VecF64 {
  using S = double;
  using V = __m512d;
  static constexpr int kLanes = 8;
  static constexpr int kDotRows = 6, kDotSums = 24;  // of a tile of dot products
  static constexpr int kOuterRows = 12;              // of a tile of outer products, two vectors wide

  static INLINE V zero() { return _mm512_setzero_pd(); }
  static INLINE V set(double x) { return _mm512_set1_pd(x); }
  static INLINE V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static INLINE V tanh(V x) { return Sleef_tanhd8_u10(x); }
  static INLINE V exp(V x) { return Sleef_expd8_u10(x); }
  static INLINE V zero_unless_positive(V x, V pick) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(pick, _mm512_setzero_pd(), _CMP_NLE_UQ), x);
  }

  static INLINE __mmask8 first(int64_t n) { return static_cast<__mmask8>((1u << n) - 1); }

  static INLINE V load(const double* p) { return _mm512_loadu_pd(p); }
  static INLINE V load(const double* p, int64_t n) { return _mm512_maskz_loadu_pd(first(n), p); }
  static INLINE void store(double* p, V v) { _mm512_storeu_pd(p, v); }
  static INLINE void store(double* p, V v, int64_t n) { _mm512_mask_storeu_pd(p, first(n), v); }

  static INLINE void sum4(const V* v, double* sums) {
    const V ab = _mm512_add_pd(_mm512_unpacklo_pd(v[0], v[1]), _mm512_unpackhi_pd(v[0], v[1]));
    const V cd = _mm512_add_pd(_mm512_unpacklo_pd(v[2], v[3]), _mm512_unpackhi_pd(v[2], v[3]));
    const __m256d ab2 = _mm256_add_pd(_mm512_castpd512_pd256(ab), _mm512_extractf64x4_pd(ab, 1));
    const __m256d cd2 = _mm256_add_pd(_mm512_castpd512_pd256(cd), _mm512_extractf64x4_pd(cd, 1));
    _mm256_storeu_pd(sums,
                     _mm256_add_pd(_mm256_permute2f128_pd(ab2, cd2, 0x20), _mm256_permute2f128_pd(ab2, cd2, 0x31)));
  }

  static INLINE void transpose(V (&v)[8]) {
    V t[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
      t[i] = _mm512_unpacklo_pd(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_pd(v[i], v[i + 1]);
    }
    // t[2g + c] holds columns c, 2 + c, 4 + c, 6 + c of rows 2g and 2g + 1: a transpose of 2×2 blocks remains.
    UNROLL for (int c = 0; c < 2; ++c) {
      const V even_lo = _mm512_shuffle_f64x2(t[c], t[2 + c], 0x88), odd_lo = _mm512_shuffle_f64x2(t[c], t[2 + c], 0xdd);
      const V even_hi = _mm512_shuffle_f64x2(t[4 + c], t[6 + c], 0x88);
      const V odd_hi = _mm512_shuffle_f64x2(t[4 + c], t[6 + c], 0xdd);
      v[c] = _mm512_shuffle_f64x2(even_lo, even_hi, 0x88);
      v[2 + c] = _mm512_shuffle_f64x2(odd_lo, odd_hi, 0x88);
      v[4 + c] = _mm512_shuffle_f64x2(even_lo, even_hi, 0xdd);
      v[6 + c] = _mm512_shuffle_f64x2(odd_lo, odd_hi, 0xdd);
    }
  }
};
