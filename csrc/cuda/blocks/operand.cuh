// Operands on their way from global to shared memory: what a tile takes of a matrix, how it lies in shared memory, and
// the two ways to bring it there. cp.async (sm_80 and later) keeps several slices in flight without registers; the
// other way goes through registers, which every architecture has and which can compute on the way.
//
// A product is C[m, n] = Σ_k A(m, k) B(n, k): an operand has `rows` (m or n) and a depth k, and either index may be the
// one that is contiguous in memory. All edges are ragged; what lies beyond them is zero in shared memory.
#pragma once
#include <cstdint>
#include <type_traits>

#include "core/alignment.h"
#include "core/params.h"
#include "cuda/blocks/math.cuh"
#include "cuda/plan/types.h"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/ptx.cuh"

namespace rnn_ext::cuda {

// ---- in global memory -----------------------------------------------------------------------------------------------

// A matrix as an operand. vector_bytes is 16, 8 or 4 if the contiguous index has stride 1 and every line along it
// starts at a multiple of as many bytes; 0 lets it lie anyhow, and it is read element by element.
template <typename T>
struct Operand {
  using Element = T;
  static constexpr int kParts = 1;

  const T* data = nullptr;
  int64_t row_stride = 0, k_stride = 0;
  int vector_bytes = 0;

  __device__ const Operand& part(int) const { return *this; }
};

// Two matrices of which each pair of elements makes one of the operand, in the accumulator's precision; the result is
// rounded to T. Derived classes have `Accumulator<T> combine(Accumulator<T> first, Accumulator<T> second) const`, which
// must make zero of two zeros.
template <typename T>
struct CombinedOperand {
  using Element = T;
  static constexpr int kParts = 2;

  Operand<T> parts[2];

  __device__ const Operand<T>& part(int i) const { return parts[i]; }
};

// The widest vector that a matrix allows along its major index.
template <typename T>
int vector_bytes(const Matrix<T>& m, int64_t rows, int64_t columns, bool along_columns) {
  if ((along_columns ? m.col_stride : m.row_stride) != 1 && (along_columns ? columns : rows) > 1) return 0;
  const int64_t line = (along_columns ? rows : columns) > 1 ? (along_columns ? m.row_stride : m.col_stride) : 0;
  for (const int bytes : {16, 8, 4}) {
    if (bytes >= static_cast<int>(sizeof(T)) && lines_are_aligned(m.data, line, bytes)) return bytes;
  }
  return 0;
}

// A matrix whose rows are the operand's: (rows, K).
template <typename T>
Operand<T> operand_by_rows(const Matrix<T>& m, int64_t rows, int64_t k, Major major) {
  return {m.data, m.row_stride, m.col_stride, vector_bytes(m, rows, k, major == Major::kK)};
}

// A matrix whose columns are the operand's rows: (K, rows).
template <typename T>
Operand<T> operand_by_columns(const Matrix<T>& m, int64_t rows, int64_t k, Major major) {
  return {m.data, m.col_stride, m.row_stride, vector_bytes(m, k, rows, major == Major::kRows)};
}

// ---- in shared memory -----------------------------------------------------------------------------------------------

// As in global memory, in lines along the major index, of 16-byte chunks. Without padding, the chunks of a line change
// places by an exclusive or with bits of the line's number, chosen so that each of the reads named below takes its
// lanes to different banks. A copied line keeps its bytes together, so the copies have no conflicts either.
template <typename T, Major kMajor_, int kRows_, int kDepth_>
struct SwizzledLayout {
  using Element = T;
  static constexpr Major kMajor = kMajor_;
  static constexpr int kRows = kRows_, kDepth = kDepth_, kSize = kRows * kDepth;
  static constexpr int kLines = kMajor == Major::kK ? kRows : kDepth;
  static constexpr int kLength = kMajor == Major::kK ? kDepth : kRows;
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T)), kChunks = kLength / kPerChunk;
  static constexpr bool kTransposes = false;
  static_assert(kLength % kPerChunk == 0 && (kChunks & (kChunks - 1)) == 0 && kChunks >= 2);

  static __device__ __forceinline__ int swizzle(int line) {
    constexpr int kPer128 = kChunks >= 8 ? 1 : 8 / kChunks;                        // lines in all 32 banks
    if (sizeof(T) <= 4) return line / kPer128 & (kChunks >= 8 ? 7 : kChunks - 1);  // ldmatrix: a chunk of 8 lines
    if (kMajor == Major::kK) return kChunks >= 8 ? (line & 1) << 2 : 0;  // 16-byte reads of 4 chunks of 2 lines
    return (line >> 1 << 1) & (kChunks >= 8 ? 7 : kChunks - 1);          // 8-byte reads, lines 0 2 4 6 by 4 elements
  }
  static __device__ __forceinline__ int line_offset(int line, int at) {
    return line * kLength + ((at / kPerChunk) ^ swizzle(line)) * kPerChunk + at % kPerChunk;
  }
  static __device__ __forceinline__ int offset(int row, int k) {
    return kMajor == Major::kK ? line_offset(row, k) : line_offset(k, row);
  }
};

// For the FP32 and FP64 pipes: rows are contiguous whatever they were in global memory, so that a thread reads several
// of one k as a vector. 4 more elements a line spread the transposing copies over all banks.
template <typename T, Major kMajor_, int kRows_, int kDepth_>
struct DepthMajorLayout {
  using Element = T;
  static constexpr Major kMajor = kMajor_;
  static constexpr int kRows = kRows_, kDepth = kDepth_, kStride = kRows + 4, kSize = kDepth * kStride;
  static constexpr int kLines = kMajor == Major::kK ? kRows : kDepth;
  static constexpr int kLength = kMajor == Major::kK ? kDepth : kRows;
  static constexpr bool kTransposes = kMajor == Major::kK;
  static_assert(kDepth % 8 == 0 && kRows % 4 == 0);

  static __device__ __forceinline__ int offset(int row, int k) { return k * kStride + row; }
  static __device__ __forceinline__ int line_offset(int line, int at) {
    return kMajor == Major::kK ? offset(line, at) : offset(at, line);
  }
};

// ---- the way there --------------------------------------------------------------------------------------------------

// The piece of a matrix that goes into one tile: `lines` of `length` elements lie inside the matrix. 64-bit offsets to
// its first element, and from line to line.
template <typename T>
struct Window {
  const T* data;
  int64_t line_stride, stride;
  int lines, length;
  int vector_bytes;
};

template <class Layout, typename T>
__device__ __forceinline__ Window<T> window(const Operand<T>& o, int64_t row, int64_t row_end, int64_t k,
                                            int64_t k_end) {
  int rows = static_cast<int>(min(row_end - row, int64_t{Layout::kRows}));
  int depth = static_cast<int>(min(k_end - k, int64_t{Layout::kDepth}));
  if (RNN_EXT_PLANTED(no_row_bound)) rows = Layout::kRows;
  if (RNN_EXT_PLANTED(no_k_bound)) depth = Layout::kDepth;
  const T* data = o.data + row * o.row_stride + k * o.k_stride;
  return Layout::kMajor == Major::kK ? Window<T>{data, o.row_stride, o.k_stride, rows, depth, o.vector_bytes}
                                     : Window<T>{data, o.k_stride, o.row_stride, depth, rows, o.vector_bytes};
}

// By cp.async. Units of 4 bytes and more: 16-bit elements need vector_bytes >= 4.
template <class Layout, class Source, int kThreads>
class AsyncCopy {
  using T = typename Source::Element;
  static_assert(std::is_same<T, typename Layout::Element>::value && Source::kParts == 1, "bytes move as they are");

 public:
  static __device__ __forceinline__ void start(T* tile, const Source& source, int64_t row, int64_t row_end, int64_t k,
                                               int64_t k_end) {
    const Window<T> w = window<Layout>(source, row, row_end, k, k_end);
    if constexpr (Layout::kTransposes) {
      copy_elements(tile, w);
    } else if (w.vector_bytes == 16 || RNN_EXT_PLANTED(misaligned_vector_copy)) {
      copy_vectors<16>(tile, w);
    } else if (w.vector_bytes == 8 && sizeof(T) < 8) {
      copy_vectors<8>(tile, w);
    } else if constexpr (sizeof(T) == 2) {
      copy_vectors<4>(tile, w);
    } else {
      copy_elements(tile, w);
    }
  }

 private:
  template <int kBytes>
  static __device__ __forceinline__ void copy_vectors(T* tile, const Window<T>& w) {
    constexpr int kUnit = kBytes / static_cast<int>(sizeof(T)), kUnits = Layout::kLength / kUnit;
    constexpr int kTotal = kUnits * Layout::kLines, kPerThread = static_cast<int>(ceil_div(kTotal, kThreads));
#pragma unroll(kBytes == 16 ? kPerThread : 4)
    for (int i = 0; i < kPerThread; ++i) {
      const int unit = static_cast<int>(threadIdx.x) + i * kThreads;
      if (kTotal % kThreads != 0 && unit >= kTotal) break;
      const int line = unit / kUnits, at = unit % kUnits * kUnit;
      const int elements = line < w.lines ? max(min(w.length - at, kUnit), 0) : 0;
      if (elements == 0 && RNN_EXT_PLANTED(ragged_tail_not_cleared)) continue;
      const T* const from = elements > 0 ? w.data + line * w.line_stride + at : w.data;
      ptx::cp_async<kBytes>(tile + Layout::line_offset(line, at), from, elements * static_cast<int>(sizeof(T)));
    }
  }

  // A warp takes 8 elements of 4 lines: whole sectors of global memory, and different banks where it transposes.
  static __device__ __forceinline__ void copy_elements(T* tile, const Window<T>& w) {
    constexpr int kTotal = Layout::kLines * Layout::kLength, kPerThread = static_cast<int>(ceil_div(kTotal, kThreads));
#pragma unroll(Layout::kTransposes ? kPerThread : 4)
    for (int i = 0; i < kPerThread; ++i) {
      const int e = static_cast<int>(threadIdx.x) + i * kThreads;
      if (kTotal % kThreads != 0 && e >= kTotal) break;
      const int line = e / 8 % Layout::kLines, at = e / (8 * Layout::kLines) * 8 + e % 8;
      const bool inside = line < w.lines && at < w.length;
      if (!inside && RNN_EXT_PLANTED(ragged_tail_not_cleared)) continue;
      const T* const from = inside ? w.data + line * w.line_stride + at * w.stride : w.data;
      ptx::cp_async<sizeof(T)>(tile + Layout::line_offset(line, at), from, inside ? int{sizeof(T)} : 0);
    }
  }
};

// `kBytes` of elements that are loaded and stored as one.
template <typename T, int kBytes>
struct alignas(kBytes) Vector {
  static constexpr int kSize = kBytes / static_cast<int>(sizeof(T));
  T v[kSize];
};

// One store of 16 bytes to global memory. An assignment the compiler may take apart, and does in the epilogues.
template <typename T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, 16>& v) {
  uint4 bits;
  memcpy(&bits, &v, sizeof bits);
  __stwb(reinterpret_cast<uint4*>(to), bits);
}

// Through registers, 16 bytes a unit: `load` starts the reads, `store` waits for them, combines the parts, converts to
// the layout's type and writes the tile.
template <class Layout, class Source, int kThreads>
class StagedCopy {
  using T = typename Source::Element;
  using Element = typename Layout::Element;
  using Unit = Vector<T, 16>;
  static constexpr int kUnits = Layout::kLength / Unit::kSize, kTotal = kUnits * Layout::kLines;
  static constexpr int kPerThread = static_cast<int>(ceil_div(kTotal, kThreads));
  static_assert(Layout::kLength % Unit::kSize == 0);

 public:
  __device__ __forceinline__ void load(const Source& source, int64_t row, int64_t row_end, int64_t k, int64_t k_end) {
#pragma unroll
    for (int part = 0; part < Source::kParts; ++part) {
      const Window<T> w = window<Layout>(source.part(part), row, row_end, k, k_end);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int unit = static_cast<int>(threadIdx.x) + i * kThreads;
        if (kTotal % kThreads != 0 && unit >= kTotal) break;
        load_unit(units_[part][i], w, unit / kUnits, unit % kUnits * Unit::kSize);
      }
    }
  }

  __device__ __forceinline__ void store(Element* tile, const Source& source) const {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int unit = static_cast<int>(threadIdx.x) + i * kThreads;
      if (kTotal % kThreads != 0 && unit >= kTotal) break;
      const int line = unit / kUnits, at = unit % kUnits * Unit::kSize;
      if constexpr (std::is_same<T, Element>::value && !Layout::kTransposes) {
        Unit result;
#pragma unroll
        for (int j = 0; j < Unit::kSize; ++j) result.v[j] = element(source, i, j);
        *reinterpret_cast<Unit*>(tile + Layout::line_offset(line, at)) = result;
      } else {
#pragma unroll
        for (int j = 0; j < Unit::kSize; ++j) {
          tile[Layout::line_offset(line, at + j)] = static_cast<Element>(widen(element(source, i, j)));
        }
      }
    }
  }

 private:
  Unit units_[Source::kParts][kPerThread];

  __device__ __forceinline__ T element(const Source& source, int i, int j) const {
    if constexpr (Source::kParts == 1) {
      return units_[0][i].v[j];
    } else {
      return narrow<T>(source.combine(widen(units_[0][i].v[j]), widen(units_[1][i].v[j])));
    }
  }

  template <int kBytes>
  static __device__ __forceinline__ void load_pieces(Unit& unit, const T* from) {
    using Piece = Vector<T, kBytes>;
#pragma unroll
    for (int j = 0; j < Unit::kSize; j += Piece::kSize) {
      *reinterpret_cast<Piece*>(unit.v + j) = *reinterpret_cast<const Piece*>(from + j);
    }
  }

  static __device__ __forceinline__ void load_unit(Unit& unit, const Window<T>& w, int line, int at) {
    const T* const from = w.data + line * w.line_stride + at * w.stride;
    const bool whole = line < w.lines && at + Unit::kSize <= w.length;
    if (whole && (w.vector_bytes == 16 || RNN_EXT_PLANTED(misaligned_staged_load))) {
      load_pieces<16>(unit, from);
    } else if (whole && w.vector_bytes == 8 && sizeof(T) < 8) {
      load_pieces<8>(unit, from);
    } else if (whole && w.vector_bytes == 4 && sizeof(T) < 4) {
      load_pieces<(sizeof(T) < 4 ? 4 : 8)>(unit, from);
    } else {
#pragma unroll
      for (int j = 0; j < Unit::kSize; ++j) {
        const bool inside = line < w.lines && at + j < w.length;
        unit.v[j] = inside ? from[j * w.stride] : narrow<T>(0);
      }
    }
  }
};

}  // namespace rnn_ext::cuda
