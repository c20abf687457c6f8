// Products with weights that are packed once for many uses: C = A P, with P in panels two vectors wide. Columns of C
// lie along the lanes and elements of A are broadcast, so that no lanes are ever summed. All in the accumulation type.
//
// C's rows are padded to whole vectors, as are the panels, whose padding is zero.
//
// What is multiplied is a word: an element of the accumulation type (Singles), or a pair of bfloat16
// (panel_pairs-inl.h).
#pragma once

template <typename S>
struct PanelsOf {
  using Vec = typename VecOf<S>::type;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kWidth = 2 * kLanes;
  static constexpr int kRows = Vec::kOuterRows;  // of a tile
  // Terms that are summed in registers before they are added to C: 16 KB of a panel, which stay in the L1 cache while
  // the tiles of all rows use them. One sum of all terms would be slower, and less accurate.
  static constexpr int kRun = (1 << 14) / (kWidth * sizeof(S));
};

template <typename S>
INLINE int64_t padded(int64_t cols) {
  constexpr int kLanes = PanelsOf<S>::kLanes;
  return (cols + kLanes - 1) / kLanes * kLanes;
}

// The distance of rows: those a large power of two apart would compete for the same lines of the cache.
template <typename S>
INLINE int64_t padded_stride(int64_t cols) {
  const int64_t size = padded<S>(cols);
  return size * sizeof(S) % 1024 == 0 ? size + 64 / sizeof(S) : size;
}

template <typename S>
INLINE int64_t panel_count(int64_t cols) {
  return (cols + PanelsOf<S>::kWidth - 1) / PanelsOf<S>::kWidth;
}

// Of panel p of so many columns: vectors, 2 but perhaps for the last.
template <typename S>
INLINE int panel_vectors(int64_t cols, int64_t p) {
  return cols - p * PanelsOf<S>::kWidth > PanelsOf<S>::kLanes ? 2 : 1;
}

template <typename S>
INLINE int64_t panels_size(int64_t cols, int64_t inner) {
  return panel_count<S>(cols) * PanelsOf<S>::kWidth * inner;
}

// n elements `stride` apart, as a vector; zeros where there are fewer.
template <typename Vec, typename T>
INLINE typename Vec::V load_strided(const T* p, int64_t stride, int64_t n) {
  if (stride == 1) return n >= Vec::kLanes ? Vec::load(p) : Vec::load(p, n);
  typename Vec::S buffer[Vec::kLanes] = {};
  for (int64_t i = 0; i < smaller(n, Vec::kLanes); ++i) buffer[i] = static_cast<typename Vec::S>(p[i * stride]);
  return Vec::load(buffer);
}

// The terms of a sum one by one.
template <typename T>
struct Singles {
  using S = acc_t<T>;
  using Vec = typename VecOf<T>::type;
  using V = typename Vec::V;

  static INLINE V add(V x, V m, V sum) { return Vec::fma(x, m, sum); }
  static constexpr int kTerms = 1;  // of a word
  static INLINE constexpr int64_t words(int64_t terms) { return terms; }
  // Rows of A are kept as words, whose elements are these.
  using Element = S;
  static INLINE Element* elements(S* words) { return words; }
  static INLINE const Element* elements(const S* words) { return words; }
  static INLINE int64_t words_stride(int64_t terms) { return padded_stride<S>(terms); }
  // Stores a vector of a row, of which n elements are there: of a pair's terms one may be missing.
  static INLINE void keep(Element* to, V v, int64_t /*n*/) { Vec::store(to, v); }
  static INLINE V broadcast(const S* word) { return Vec::set(*word); }
  static void pack(const T* m, int64_t inner_stride, int64_t col_stride, int64_t inner, int64_t cols, int64_t begin,
                   int64_t end, S* packed);

  // For sums over the rows of A: see below.
  static void pack_strip(const S* a, int64_t stride, int64_t rows, S* strip);

  // Rows of a panel that come one by one, from anywhere; null stands for zeros.
  class PanelWriter {
   public:
    PanelWriter(S* panel, int64_t cols, int vectors, int64_t col_stride)
        : to_(panel), cols_(cols), vectors_(vectors), col_stride_(col_stride) {}

    INLINE void add(const T* row) {
      UNROLL for (int j = 0; j < 2; ++j) {
        if (j == vectors_) break;
        const int64_t col = j * Vec::kLanes;
        Vec::store(to_ + col, row ? load_strided<Vec>(row + col * col_stride_, col_stride_, cols_ - col) : Vec::zero());
      }
      to_ += vectors_ * Vec::kLanes;
    }
    void finish() {}

   private:
    S* to_;
    const int64_t cols_;
    const int vectors_;
    const int64_t col_stride_;
  };
};

// Panels [begin, end): panel[k, c] = m[k · inner_stride + c · col_stride], of the `cols` columns that there are.
template <typename T>
void Singles<T>::pack(const T* m, int64_t inner_stride, int64_t col_stride, int64_t inner, int64_t cols, int64_t begin,
                      int64_t end, S* packed) {
  constexpr int kLanes = Vec::kLanes, kWidth = PanelsOf<S>::kWidth;
  for (int64_t p = begin; p < end; ++p) {
    const int vectors = panel_vectors<S>(cols, p), width = vectors * kLanes;
    S* to = packed + p * kWidth * inner;
    for (int j = 0; j < vectors; ++j, to += kLanes) {
      const int64_t col = p * kWidth + j * kLanes, n = smaller(kLanes, cols - col);
      const T* from = m + col * col_stride;
      if (inner_stride != 1) {
        for (int64_t k = 0; k < inner; ++k) {
          Vec::store(to + k * width, load_strided<Vec>(from + k * inner_stride, col_stride, n));
        }
        continue;
      }
      for (int64_t k = 0; k < inner; k += kLanes) {
        const int64_t terms = smaller(kLanes, inner - k);
        typename Vec::V v[kLanes];
        UNROLL for (int i = 0; i < kLanes; ++i) {
          const T* row = from + i * col_stride + k;
          if (i < n) __builtin_prefetch(row + 8 * kLanes);  // as many streams as no hardware follows
          v[i] = i >= n ? Vec::zero() : terms == kLanes ? Vec::load(row) : Vec::load(row, terms);
        }
        Vec::transpose(v);
        UNROLL for (int i = 0; i < kLanes; ++i) {
          if (i < terms) Vec::store(to + (k + i) * width, v[i]);
        }
      }
    }
  }
}

// Columns of A side by side, so that a tile reads them one after another: strip[r, i] = a[r, i].
template <typename T>
void Singles<T>::pack_strip(const S* a, int64_t stride, int64_t rows, S* strip) {
  constexpr int kStrip = PanelsOf<S>::kRows, kLanes = PanelsOf<S>::kLanes;
  // What is too much in a row's last vector, the next row writes over; the last row must not write into another strip,
  // which may be another thread's.
  for (int64_t r = 0; r < rows; ++r) {
    UNROLL for (int i = 0; i < kStrip; i += kLanes) {
      const typename Vec::V v = Vec::load(a + r * stride + i);
      if (kStrip - i < kLanes && r + 1 == rows) {
        Vec::store(strip + r * kStrip + i, v, kStrip - i);
      } else {
        Vec::store(strip + r * kStrip + i, v);
      }
    }
  }
}

template <typename S>
struct PanelProduct {
  const S* a;
  int64_t a_stride;
  const S* panels;
  int64_t inner;  // words
  const S* init;  // what the products are added to; null: zeros
  int64_t init_stride;
  S* c;
  int64_t c_stride;
  int64_t cols;
};

// Where a tile has few rows, its sums are kept in several parts, so that each addition need not wait for the last. That
// is another order of addition: it is for the caller to choose it by the problem, not by a block of it.
enum class Parts : int { kOne = 1, kTwo = 2, kFour = 4 };
INLINE Parts parts_for(int64_t rows) { return rows <= 2 ? Parts::kFour : rows <= 4 ? Parts::kTwo : Parts::kOne; }

// c += a · panel for MR rows, or init + that.
template <typename Terms, int MR, int NV, int kParts, typename S>
__attribute__((noinline)) void panel_tile(const S* a, int64_t a_stride, const S* panel, int64_t terms, const S* init,
                                          int64_t init_stride, S* c, int64_t c_stride) {
  using Vec = typename VecOf<S>::type;
  using V = typename Vec::V;
  constexpr int kLanes = Vec::kLanes;
  V acc[kParts][MR][NV];
  UNROLL for (int s = 0; s < kParts; ++s) {
    UNROLL for (int i = 0; i < MR; ++i) { UNROLL for (int j = 0; j < NV; ++j) acc[s][i][j] = Vec::zero(); }
  }
  // A pointer for every three rows, base + {0, 1, 2} · stride being address modes; the asm keeps it so.
  const S* rows[(MR + 2) / 3];
  UNROLL for (int i = 0; i < (MR + 2) / 3; ++i) rows[i] = a + 3 * i * a_stride;
  int64_t k = 0;
  for (; k + kParts <= terms; k += kParts, panel += kParts * NV * kLanes) {
    UNROLL for (int s = 0; s < kParts; ++s) {
      V b[NV];
      UNROLL for (int j = 0; j < NV; ++j) b[j] = Vec::load(panel + (s * NV + j) * kLanes);
      UNROLL for (int i = 0; i < MR; ++i) {
        const V x = Terms::broadcast(rows[i / 3] + i % 3 * a_stride + s);
        UNROLL for (int j = 0; j < NV; ++j) acc[s][i][j] = Terms::add(x, b[j], acc[s][i][j]);
      }
    }
    UNROLL for (int i = 0; i < (MR + 2) / 3; ++i) {
      rows[i] += kParts;
      __asm__("" : "+r"(rows[i]));
    }
  }
  if constexpr (kParts > 1) {
    for (int64_t rest = 0; k < terms; ++k, ++rest, panel += NV * kLanes) {
      UNROLL for (int i = 0; i < MR; ++i) {
        const V x = Terms::broadcast(rows[i / 3] + i % 3 * a_stride + rest);
        UNROLL for (int j = 0; j < NV; ++j) acc[0][i][j] = Terms::add(x, Vec::load(panel + j * kLanes), acc[0][i][j]);
      }
    }
    UNROLL for (int width = kParts / 2; width > 0; width /= 2) {
      UNROLL for (int s = 0; s < width; ++s) {
        UNROLL for (int i = 0; i < MR; ++i) {
          UNROLL for (int j = 0; j < NV; ++j) acc[s][i][j] += acc[s + width][i][j];
        }
      }
    }
  }
  UNROLL for (int i = 0; i < MR; ++i) {
    UNROLL for (int j = 0; j < NV; ++j) {
      if (init) acc[0][i][j] += Vec::load(init + i * init_stride + j * kLanes);
      Vec::store(c + i * c_stride + j * kLanes, acc[0][i][j]);
    }
  }
}

template <typename Terms, int MR, int NV, int kParts, typename S>
INLINE void panel_tile_of(int64_t height, const S* a, int64_t a_stride, const S* panel, int64_t terms, const S* init,
                          int64_t init_stride, S* c, int64_t c_stride) {
  if (MR == 1 || height == MR) {
    return panel_tile<Terms, MR, NV, kParts>(a, a_stride, panel, terms, init, init_stride, c, c_stride);
  }
  if constexpr (MR > 1) {
    panel_tile_of<Terms, MR - 1, NV, kParts>(height, a, a_stride, panel, terms, init, init_stride, c, c_stride);
  }
}

template <typename Terms, int NV, int kParts, int kMost, typename S>
void panel_rows(const PanelProduct<S>& g, int64_t rows, int64_t panel) {
  constexpr int kRun = PanelsOf<S>::kRun, kWidth = PanelsOf<S>::kWidth, kLanes = PanelsOf<S>::kLanes;
  const S* packed = g.panels + panel * kWidth * g.inner;
  const S* init = g.init ? g.init + panel * kWidth : nullptr;
  S* c = g.c + panel * kWidth;
  const int64_t tiles = (rows + kMost - 1) / kMost, height = rows / tiles, higher = rows % tiles;
  int64_t k = 0;
  do {  // also without terms: then C is init
    const int64_t terms = smaller(kRun, g.inner - k);
    int64_t row = 0;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t rows_of_tile = height + (i < higher);
      const S* add = k > 0 ? c + row * g.c_stride : init ? init + row * g.init_stride : nullptr;
      panel_tile_of<Terms, kMost, NV, kParts>(rows_of_tile, g.a + row * g.a_stride + k, g.a_stride,
                                              packed + k * NV * kLanes, terms, add, k > 0 ? g.c_stride : g.init_stride,
                                              c + row * g.c_stride, g.c_stride);
      row += rows_of_tile;
    }
    k += terms;
  } while (k < g.inner);
}

// The panels [begin, end) of so many rows of C.
template <typename Terms, typename S>
void panel_product(const PanelProduct<S>& g, int64_t rows, int64_t begin, int64_t end, Parts parts) {
  if (rows <= 0) return;
  constexpr int kRows = PanelsOf<S>::kRows, kFewer = kRows / 3, kFewest = kRows >= 12 ? 2 : 1;
  for (int64_t p = begin; p < end; ++p) {
    const bool wide = panel_vectors<S>(g.cols, p) == 2;
    switch (parts) {
      case Parts::kOne:
        wide ? panel_rows<Terms, 2, 1, kRows>(g, rows, p) : panel_rows<Terms, 1, 1, kRows>(g, rows, p);
        break;
      case Parts::kTwo:
        wide ? panel_rows<Terms, 2, 2, kFewer>(g, rows, p) : panel_rows<Terms, 1, 2, 2 * kFewer>(g, rows, p);
        break;
      case Parts::kFour:
        wide ? panel_rows<Terms, 2, 4, kFewest>(g, rows, p) : panel_rows<Terms, 1, 4, 2 * kFewest>(g, rows, p);
        break;
    }
  }
}
