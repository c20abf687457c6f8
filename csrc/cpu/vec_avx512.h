// Vectors of 16 floats or 8 doubles, AVX-512 (F, BW, DQ, VL). Included inside the namespace and the target region of
// kernels_avx512.cpp. tanh and exp are SLEEF's, which libtorch_cpu exports and ATen itself uses.

struct VecF32 {
  using S = float;
  using V = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kProductRows = 12;

  static INLINE V zero() { return _mm512_setzero_ps(); }
  static INLINE V set(float x) { return _mm512_set1_ps(x); }
  static INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static INLINE V tanh(V x) { return Sleef_tanhf16_u10(x); }
  static INLINE V exp(V x) { return Sleef_expf16_u10(x); }
  // x where pick is not <= 0 (so also where pick is NaN), elsewhere 0.
  static INLINE V zero_unless_positive(V x, V pick) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(pick, _mm512_setzero_ps(), _CMP_NLE_UQ), x);
  }

  static INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

  static INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  static INLINE V load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static INLINE void store(float* p, V v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }

  static INLINE V widen_bf16(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
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

  static INLINE __m256i narrow_f16(V v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static INLINE V load(const c10::Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static INLINE V load(const c10::Half* p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static INLINE void store(c10::Half* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(v)); }
  static INLINE void store(c10::Half* p, V v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow_f16(v)); }

  // sums[j] = the sum of v[j]'s lanes.
  static INLINE void sum4(const V* v, float* sums) {
    const V ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const V cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const V abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
};

struct VecF64 {
  using S = double;
  using V = __m512d;
  static constexpr int kLanes = 8;
  static constexpr int kProductRows = 12;

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
};
