// Panels of bfloat16 for vdpbf16ps: words are pairs of neighbouring terms (pairs-inl.h says what the instruction does),
// so that rows of bfloat16 are words as they lie. What it multiplies is rounded to bfloat16, so dz is too, as the input
// of PyTorch's own products; sums are in float32.
#pragma once

// 32 elements so far apart; zeros where there are fewer than that.
INLINE __m512i load32(const BFloat16* p, int64_t stride, int64_t n) {
  if (stride == 1) return load32(p, n);
  alignas(64) BFloat16 buffer[32] = {};
  for (int64_t j = 0; j < smaller(n, 32); ++j) buffer[j] = p[j * stride];
  return _mm512_load_si512(buffer);
}

struct Pairs {
  using S = float;
  using Vec = VecF32;
  using V = __m512;

  static INLINE V add(V x, V m, V sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)m); }
  static constexpr int kTerms = 2;
  static INLINE constexpr int64_t words(int64_t terms) { return (terms + 1) / 2; }
  using Element = BFloat16;
  static INLINE Element* elements(S* words) { return reinterpret_cast<Element*>(words); }
  static INLINE const Element* elements(const S* words) { return reinterpret_cast<const Element*>(words); }
  static INLINE int64_t words_stride(int64_t terms) { return padded_stride<S>(words(terms)); }
  static INLINE void keep(Element* to, V v, int64_t n) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_mov_epi16(first16(n), rounded));
  }
  static INLINE V broadcast(const S* word) {  // perhaps of a tensor's bfloat16
    int pair;
    __builtin_memcpy(&pair, word, sizeof(pair));
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }

  static void pack(const BFloat16* m, int64_t inner_stride, int64_t col_stride, int64_t inner, int64_t cols,
                   int64_t begin, int64_t end, S* packed) {
    constexpr int kWidth = PanelsOf<S>::kWidth, kLanes = PanelsOf<S>::kLanes;
    for (int64_t p = begin; p < end; ++p) {
      const int vectors = panel_vectors<S>(cols, p), width = vectors * kLanes;
      S* const to = packed + p * kWidth * words(inner);
      const int64_t col = p * kWidth, n = smaller(width, cols - col);
      if (inner_stride == 1) {
        pack_turned(m + col * col_stride, col_stride, inner, n, width, to);
      } else {
        PanelWriter writer(to, n, vectors, col_stride);
        for (int64_t k = 0; k < inner; ++k) writer.add(m + k * inner_stride + col * col_stride);
        writer.finish();
      }
    }
  }

  static void pack_strip(const S* a, int64_t stride, int64_t rows, S* strip) {
    constexpr int kStrip = PanelsOf<S>::kRows;
    const auto row = [&](int64_t r) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + r * stride)));
    };
    for (int64_t r = 0; r < rows; r += 2, strip += kStrip) {
      const __m512i even = row(r), odd = r + 1 < rows ? row(r + 1) : _mm512_setzero_si512();
      _mm512_mask_storeu_epi32(strip, first16(kStrip), _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }

  class PanelWriter {
   public:
    PanelWriter(S* panel, int64_t cols, int vectors, int64_t col_stride)
        : to_(panel), cols_(cols), vectors_(vectors), col_stride_(col_stride) {}

    INLINE void add(const BFloat16* row) {
      const __m512i elements = load(row);
      if (odd_) {
        store(elements);
      } else {
        even_ = elements;
      }
      odd_ = !odd_;
    }
    void finish() {
      if (odd_) store(_mm512_setzero_si512());
    }

   private:
    INLINE __m512i load(const BFloat16* row) const {
      return row ? load32(row, col_stride_, cols_) : _mm512_setzero_si512();
    }

    INLINE void store(__m512i odd) {
      const __m512i j = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i left = _mm512_or_si512(j, _mm512_slli_epi32(_mm512_add_epi32(j, _mm512_set1_epi32(32)), 16));
      _mm512_storeu_si512(to_, _mm512_permutex2var_epi16(even_, left, odd));
      if (vectors_ == 2) {
        const __m512i right = _mm512_add_epi32(left, _mm512_set1_epi32(16 << 16 | 16));
        _mm512_storeu_si512(to_ + 16, _mm512_permutex2var_epi16(even_, right, odd));
      }
      to_ += vectors_ * Vec::kLanes;
    }

    S* to_;
    const int64_t cols_;
    const int vectors_;
    const int64_t col_stride_;
    __m512i even_ = _mm512_setzero_si512();
    bool odd_ = false;
  };

 private:
  static INLINE __mmask16 first16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }

  // packed[k, c] = m[c, 2k] and m[c, 2k + 1], for n rows of m; zeros up to the width.
  static void pack_turned(const BFloat16* m, int64_t stride, int64_t terms, int64_t n, int width, S* packed) {
    for (int64_t k = 0; k < terms; k += 32) {
      const int64_t pairs = words(smaller(32, terms - k));
      for (int j = 0; j < width; j += 16) {
        V v[16];
        UNROLL for (int i = 0; i < 16; ++i) {
          const int64_t c = j + i;
          v[i] = c < n ? _mm512_castsi512_ps(load32(m + c * stride + k, terms - k)) : Vec::zero();
        }
        Vec::transpose(v);
        UNROLL for (int i = 0; i < 16; ++i) {
          if (i < pairs) Vec::store(packed + (k / 2 + i) * width + j, v[i]);
        }
      }
    }
  }
};

// Rows that stay in bfloat16, as in rows-inl.h.
INLINE void load_row(const BFloat16* from, int64_t stride, int64_t size, int64_t begin, int64_t end, BFloat16* to) {
  for (int64_t j = begin; j < end; j += 32) {
    _mm512_storeu_si512(to + j, load32(from + j * stride, stride, size - j));
  }
}

INLINE void store_row(const BFloat16* from, int64_t size, int64_t begin, int64_t end, BFloat16* to) {
  for (int64_t j = begin; j < end; j += 32) {
    _mm512_mask_storeu_epi16(to + j, first32(size - j), _mm512_loadu_si512(from + j));
  }
}
