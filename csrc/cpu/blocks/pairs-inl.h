// bfloat16 products by vdpbf16ps, which adds two neighbouring terms of the inner dimension to each of 16 float32 sums.
//
// They are outer products, as in outer-inl.h, of words of 32 bits that hold a pair of terms each: words of A broadcast
// against vectors of words of a packed panel. In forward A is W, whose pairs lie ready in memory, and the panel is xᵀ.
// In backward A is dz or its transpose, rounded to bfloat16, as the input of PyTorch's own products is; the bias
// gradient has been summed before.
//
// The instruction rounds to nearest even, takes subnormal terms and sums (below 2⁻¹²⁶) for zero, and spreads NaN and
// Inf as a multiplication and an addition do. So where an odd number of terms leaves a word with one only, both
// operands need a zero for the other: what lies behind a row may be NaN.

#pragma once

using c10::BFloat16;

constexpr int kPairs = 128;        // a run: words summed in registers before they are added to the totals
constexpr int kPairWidth = 32;     // words of a panel's row: two vectors
constexpr int kPairTile = 12;      // rows of a tile
constexpr int kPairBlock = 528;    // forward: columns of z whose totals are kept
constexpr int kProductRows = 96;   // backward: a block of A
constexpr int kProductCols = 256;  // backward: panels that share a packed block of A

// One run of the inner dimension of a block of C = A M, one panel wide.
struct PairPanelRun {
  const BFloat16* a;
  int64_t a_row_stride, a_pair_stride;
  const float* m;  // packed words
  int64_t pairs;
  float* totals;  // kPairWidth a row
  bool first;     // the totals are not yet there
  BFloat16* c;    // null: the totals are not yet complete
  int64_t c_stride;
};

INLINE __mmask32 first32(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }

// MR rows of a panel, n columns of which are stored to C.
template <int MR>
__attribute__((noinline)) void pair_tile(const PairPanelRun& g, int64_t row, int64_t n) {
  using Vec = VecF32;
  __m512 acc[MR][2];
  UNROLL for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = Vec::zero();
  // A pointer for every three rows, base + {0, 1, 2} · stride being address modes. The asm keeps it so: left alone, GCC
  // makes an offset for each row, too many for the registers.
  const int64_t a_row_stride = g.a_row_stride, a_pair_stride = g.a_pair_stride;
  const BFloat16* a[(MR + 2) / 3];
  UNROLL for (int i = 0; i < MR; i += 3) a[i / 3] = g.a + (row + i) * a_row_stride;
  const float* m = g.m;
  for (int64_t k = 0; k < g.pairs; ++k, m += kPairWidth) {
    const __m512bh m0 = (__m512bh)Vec::load(m), m1 = (__m512bh)Vec::load(m + 16);
    UNROLL for (int i = 0; i < MR; ++i) {
      int word;
      __builtin_memcpy(&word, a[i / 3] + i % 3 * a_row_stride, sizeof(word));
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(word);
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], pair, m0);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], pair, m1);
    }
    UNROLL for (int i = 0; i < (MR + 2) / 3; ++i) {
      a[i] += a_pair_stride;
      __asm__("" : "+r"(a[i]));
    }
  }
  float* totals = g.totals + row * kPairWidth;
  if (!g.first) {
    UNROLL for (int i = 0; i < MR; ++i) {
      acc[i][0] += Vec::load(totals + i * kPairWidth);
      acc[i][1] += Vec::load(totals + i * kPairWidth + 16);
    }
  }
  if (!g.c) {
    UNROLL for (int i = 0; i < MR; ++i) {
      Vec::store(totals + i * kPairWidth, acc[i][0]);
      Vec::store(totals + i * kPairWidth + 16, acc[i][1]);
    }
    return;
  }
  UNROLL for (int i = 0; i < MR; ++i) {
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(acc[i][1], acc[i][0]);
    BFloat16* c = g.c + (row + i) * g.c_stride;
    if (n >= kPairWidth) {
      _mm512_storeu_si512(c, rounded);
    } else {
      _mm512_mask_storeu_epi16(c, first32(n), rounded);
    }
  }
}

void pair_panel(const PairPanelRun& g, int64_t rows, int64_t n) {
  int64_t row = 0;
  for (; row + kPairTile <= rows; row += kPairTile) pair_tile<kPairTile>(g, row, n);
  if (row + 8 <= rows) pair_tile<8>(g, row, n), row += 8;
  if (row + 4 <= rows) pair_tile<4>(g, row, n), row += 4;
  if (row + 2 <= rows) pair_tile<2>(g, row, n), row += 2;
  if (row < rows) pair_tile<1>(g, row, n);
}

// 32 elements as bfloat16; zeros where there are fewer than that.
INLINE __m512i load32(const BFloat16* p, int64_t n) { return _mm512_maskz_loadu_epi16(first32(n), p); }
INLINE __m512i load32(const float* p, int64_t n) {
  const __mmask32 mask = first32(n);
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// packed[k, b] = x[b, 2k] and x[b, 2k + 1], for rows <= kPairWidth of x; zeros where there are fewer.
void pack_pairs_transposed(const BFloat16* x, int64_t x_stride, int64_t rows, int64_t terms, float* packed) {
  for (int64_t k = 0; k < terms; k += 32) {
    const int64_t pairs = (smaller(32, terms - k) + 1) / 2;
    for (int j = 0; j < kPairWidth; j += 16) {
      __m512 v[16];
      UNROLL for (int i = 0; i < 16; ++i) {
        const int64_t b = j + i;
        v[i] = b < rows ? _mm512_castsi512_ps(load32(x + b * x_stride + k, terms - k)) : VecF32::zero();
      }
      VecF32::transpose(v);
      float* to = packed + k / 2 * kPairWidth + j;
      UNROLL for (int i = 0; i < 16; ++i) {
        if (i < pairs) VecF32::store(to + i * kPairWidth, v[i]);
      }
    }
  }
}

// m's rows 2k and 2k + 1 as one row of words, in panels of kPairWidth columns, the last one filled with zeros.
template <typename T>
void pack_pairs(const T* m, int64_t m_stride, int64_t cols, int64_t terms, float* packed, int64_t pair_stride,
                int64_t panel_stride) {
  // Word j is element j of both rows.
  const __m512i j = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i left = _mm512_or_si512(j, _mm512_slli_epi32(_mm512_add_epi32(j, _mm512_set1_epi32(32)), 16));
  const __m512i right = _mm512_add_epi32(left, _mm512_set1_epi32(16 << 16 | 16));
  for (int64_t k = 0; k < terms; k += 2, m += 2 * m_stride, packed += pair_stride) {
    float* to = packed;
    for (int64_t col = 0; col < cols; col += kPairWidth, to += panel_stride) {
      const __m512i even = load32(m + col, cols - col);
      const __m512i odd = k + 1 < terms ? load32(m + m_stride + col, cols - col) : _mm512_setzero_si512();
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, left, odd));
      _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, right, odd));
    }
  }
}

// The pairs within a's rows, kPairs a row.
void round_rows(const float* a, int64_t a_stride, int64_t rows, int64_t terms, float* rounded) {
  for (int64_t i = 0; i < rows; ++i, a += a_stride, rounded += kPairs) {
    for (int64_t k = 0; k < terms; k += 32) _mm512_storeu_si512(rounded + k / 2, load32(a + k, terms - k));
  }
}

struct alignas(64) PairProductBuffers {
  float totals[kProductCols / kPairWidth][kProductRows * kPairWidth];
  float a[kProductRows * kPairs];
  float m[kProductCols / kPairWidth][kPairs * kPairWidth];
};

void product_by_pairs(const Product<BFloat16>& g, int64_t row_begin, int64_t row_end, int64_t col_begin,
                      int64_t col_end) {
  if (!pairs_pay(g.whole_rows, g.inner)) {
    return kernels_avx512().bf16.product(g, row_begin, row_end, col_begin, col_end);
  }
  auto& buffers = scratch<PairProductBuffers>();
  const auto* a = reinterpret_cast<const BFloat16*>(buffers.a);
  const bool transposed = g.a_col_stride != 1;
  for (int64_t row = row_begin; row < row_end; row += kProductRows) {
    const int64_t rows = smaller(kProductRows, row_end - row);
    for (int64_t col = col_begin; col < col_end; col += kProductCols) {
      const int64_t cols = smaller(kProductCols, col_end - col);
      for (int64_t k = 0; k < g.inner; k += 2 * kPairs) {
        const int64_t terms = smaller(2 * kPairs, g.inner - k);
        const float* dz = g.a + row * g.a_row_stride + k * g.a_col_stride;
        if (transposed) {
          pack_pairs(dz, g.a_col_stride, rows, terms, buffers.a, kProductRows, kPairWidth);
        } else {
          round_rows(dz, g.a_row_stride, rows, terms, buffers.a);
        }
        pack_pairs(g.m + k * g.m_stride + col, g.m_stride, cols, terms, buffers.m[0], kPairWidth, kPairs * kPairWidth);
        for (int64_t j = 0; j < cols; j += kPairWidth) {
          BFloat16* c = k + terms == g.inner ? g.c + row * g.c_stride + col + j : nullptr;
          float* totals = buffers.totals[j / kPairWidth];
          const float* m = buffers.m[j / kPairWidth];
          const int64_t a_row_stride = transposed ? 2 : 2 * kPairs, a_pair_stride = transposed ? 2 * kProductRows : 2;
          pair_panel({.a = a,
                      .a_row_stride = a_row_stride,
                      .a_pair_stride = a_pair_stride,
                      .m = m,
                      .pairs = (terms + 1) / 2,
                      .totals = totals,
                      .first = k == 0,
                      .c = c,
                      .c_stride = g.c_stride},
                     rows, cols - j);
        }
      }
    }
  }
}
