// U on the chip, and what multiplies it with the state, for the kernels of resident.cuh.
//
// A step multiplies U with the state: y[n] = Σ_k U(n, k) s[k] for each row of the block. A thread has some rows n and a
// part of k, the same at every step, so its part of U is nobody else's: it lies in registers as far as they reach, and
// then in shared memory at the thread's own places, which needs neither barriers nor a layout without bank conflicts.
#pragma once
#include <climits>
#include <utility>

#include "cuda/blocks/lanes.cuh"
#include "cuda/blocks/operand.cuh"
#include "cuda/plan/resident.h"

namespace rnn_ext::cuda {

// ---- the thread's part of U -----------------------------------------------------------------------------------------

// U, or in the backward Uᵀ, in global memory, and how it is read.
template <typename T>
struct ResidentWeights {
  enum class Reads { kAlongK, kAlongN, kElements };

  const T* data;
  int64_t n_stride, k_stride;
  int size;
  Reads reads;

  ResidentWeights(const Matrix<T>& u, int64_t hidden_size, bool transposed)
      : data(u.data),
        n_stride(transposed ? u.col_stride : u.row_stride),
        k_stride(transposed ? u.row_stride : u.col_stride),
        size(static_cast<int>(hidden_size)) {
    constexpr int kAlongK = 16, kAlongN = 4 * sizeof(T);  // bytes; either is all inside or all beyond the edge
    reads = k_stride == 1 && size * sizeof(T) % kAlongK == 0 && lines_are_aligned(data, n_stride, kAlongK)
                ? Reads::kAlongK
            : n_stride == 1 && size % 4 == 0 && lines_are_aligned(data, k_stride, kAlongN) ? Reads::kAlongN
                                                                                           : Reads::kElements;
  }

  // kRows rows from n on, 2 or 4, from column k on, kBytes of each, as words; zeros beyond the edges. Pointers go from
  // line to line, and barriers of the warp keep the compiler from having more on its way than registers can take.
  template <int kRows, int kBytes>
  __device__ __forceinline__ void load(uint32_t (&words)[kRows][kBytes / 4], int n, int k) const {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T)), kPart = 4 * kPerWord;  // 16 bytes of a row
    const T* from = data + n * n_stride + k * k_stride;
    const int edge = RNN_EXT_PLANTED(resident_no_weight_edge) ? size + 3 : size;
    if (reads == Reads::kAlongK) {
#pragma unroll
      for (int i = 0; i < kRows; ++i, from += n_stride) {
#pragma unroll
        for (int part = 0; part < kBytes / 16; ++part) {
          Vector<uint32_t, 16> v = {};
          if (n + i < size && k + part * kPart < size) {
            v = *reinterpret_cast<const Vector<uint32_t, 16>*>(from + part * kPart);
          }
#pragma unroll
          for (int w = 0; w < 4; ++w) words[i][part * 4 + w] = v.v[w];
        }
      }
    } else if (reads == Reads::kAlongN) {
      using Read = Vector<uint32_t, kRows * sizeof(T)>;
#pragma unroll
      for (int part = 0; part < kBytes / 16; ++part) {
        Read v[kPart] = {};
#pragma unroll
        for (int j = 0; j < kPart; ++j, from += k_stride) {
          if (n < size && k + part * kPart + j < size) v[j] = *reinterpret_cast<const Read*>(from);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            if constexpr (kPerWord == 1) {
              words[i][part * 4 + w] = v[w].v[i];
            } else {
              const uint32_t low = v[2 * w].v[i / 2], high = v[2 * w + 1].v[i / 2];
              words[i][part * 4 + w] = i % 2 == 0 ? (low & 0xffff) | high << 16 : low >> 16 | (high & 0xffff0000);
            }
          }
        }
        __syncwarp();
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i, from += n_stride) {
        const T* element = from;
#pragma unroll
        for (int w = 0; w < kBytes / 4; ++w) {
          T v[kPerWord];
#pragma unroll
          for (int e = 0; e < kPerWord; ++e, element += k_stride) {
            v[e] = n + i < edge && k + w * kPerWord + e < edge ? *element : narrow<T>(0);
          }
          memcpy(&words[i][w], v, sizeof v);
          if (w % 2 != 0) __syncwarp();
        }
      }
    }
  }
};

using WeightUnit = Vector<uint32_t, 16>;

// A thread's part of U: the first kChunks of its `chunks` in registers, the others in shared memory.
template <int kChunks, int kUnits>
class ThreadWeights {
 public:
  // load(chunk, units) brings them from global memory.
  template <typename Load>
  __device__ __forceinline__ ThreadWeights(WeightUnit* shared, int chunks, Load load)
      : shared_(shared + threadIdx.x), chunks_(chunks) {
#pragma unroll 1
    for (int c = kChunks; c < chunks; ++c) {  // first, while registers are free
      WeightUnit units[kUnits];
      load(c, units);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) *place(c, u) = units[u];
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c < chunks) load(c, registers_[c]);
    }
  }

  // use(chunk, units) of all chunks, in order.
  template <typename Use>
  __device__ __forceinline__ void for_each(Use use) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c < chunks_) use(c, registers_[c]);
    }
#pragma unroll 1
    for (int c = kChunks; c < chunks_; ++c) {
      WeightUnit units[kUnits];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) units[u] = *place(c, u);
      use(c, units);
    }
  }

 private:
  WeightUnit registers_[kChunks][kUnits];
  WeightUnit* shared_;
  int chunks_;

  __device__ __forceinline__ WeightUnit* place(int chunk, int unit) const {
    return shared_ + ((chunk - kChunks) * kUnits + unit) * static_cast<int>(blockDim.x);
  }
};

// ---- products -------------------------------------------------------------------------------------------------------
//
// A product has, of each pass's rows, kRuns runs of kRun neighbouring columns a thread: those of row(i) of the pass
// from column() on. They are where the sums end up. Of `thread` among those with a part of k, as all functions here.

// Which chunks of k a thread has: every `splits`th from `first` on, `count` of them.
struct ChunkRange {
  int first, splits, count;

  __device__ __forceinline__ ChunkRange(int first, int splits, int chunks)
      : first(first), splits(splits), count((chunks - first + splits - 1) / splits) {}
  __device__ __forceinline__ int operator[](int i) const { return first + i * splits; }
};

// The FP32 pipes. Eight lanes share the k of four columns, 16 bytes of a chunk each, and the warp has 16 columns.
template <int kKernel>
class SimtProduct {
  static constexpr ResidentKernel k = kResident[kKernel];
  static constexpr int kLanes = 8, kColumns = 4, kRows = k.rows;
  static_assert(k.warp_columns == 32 / kLanes * kColumns);

 public:
  using Element = float;
  static constexpr int kRuns = 1, kRun = kRows * kColumns > kLanes ? kRows *kColumns / kLanes : 1;

  // Columns of U from `column` on; `shared`: for what registers don't hold.
  __device__ __forceinline__ SimtProduct(const ResidentWeights<float>& u, int column, int thread, ChunkRange chunks,
                                         WeightUnit* shared)
      : chunks_(chunks), weights_(shared, chunks.count, [&](int c, WeightUnit (&units)[kColumns]) {
          uint32_t words[4][4];
          u.template load<4, 16>(words, column + first_column(thread), chunks[c] * 32 + lane() * 4);
#pragma unroll
          for (int i = 0; i < kColumns; ++i) memcpy(&units[i], words[i], 16);
        }) {
  }

  static __device__ __forceinline__ int row(int) { return first_sum() / kColumns; }
  // Beyond all columns where two lanes have the same sum: one of them is enough.
  static __device__ __forceinline__ int column(int thread) {
    return kRows * kColumns < kLanes && lane() % 2 != 0 ? INT_MAX / 2 : first_column(thread) + first_sum() % kColumns;
  }
  static __device__ __forceinline__ float state(float v) { return v; }

  __device__ __forceinline__ void multiply(const unsigned char* state, int stride, float (&sums)[kRuns][kRun]) const {
    float acc[kRows * kColumns] = {};
    state += lane() * 16;
    weights_.for_each([&](int c, const WeightUnit(&units)[kColumns]) {
      const unsigned char* const from = state + chunks_[c] * kResidentChunk;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto s = *reinterpret_cast<const Vector<float, 16>*>(from + r * stride);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[r * kColumns + i] += __uint_as_float(units[i].v[e]) * s.v[e];
        }
      }
    });
    const auto mine = sum_over_lanes<kLanes>(acc);
#pragma unroll
    for (int j = 0; j < kRun; ++j) sums[0][j] = mine.v[j];
  }

 private:
  ChunkRange chunks_;
  ThreadWeights<k.register_chunks, k.units()> weights_;

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  static __device__ __forceinline__ int first_column(int thread) { return thread / kLanes * kColumns; }
  static __device__ __forceinline__ int first_sum() { return lane() * kRows * kColumns / kLanes; }
};

// Tensor cores, U's rows as those of A and the batch's as the columns of B: one or two tiles of 16 by 32 bytes of k a
// warp, in two sums each that don't wait for each other. Both orders that the hardware leaves free are chosen for wide
// accesses. Of k, lane t of four has 32 successive bytes of a chunk, in A and B alike. And of the warp's rows of U,
// lanes 4 g to 4 g + 3 have two successive ones for each tile, which are then neighbouring columns of the result.
template <typename T, int kKernel>
class TensorCoreProduct {
  static constexpr ResidentKernel k = kResident[kKernel];
  static constexpr int kTiles = k.warp_columns / 16, kSteps = 4;  // of U's rows; of k in a chunk
  static constexpr int kPerLane = 32 / static_cast<int>(sizeof(T));

 public:
  using Element = std::conditional_t<sizeof(T) == 2, T, uint32_t>;
  static constexpr int kRuns = 2, kRun = 2 * kTiles;
  static_assert(k.rows == 8 && k.units() == kTiles * kSteps);

  __device__ __forceinline__ TensorCoreProduct(const ResidentWeights<T>& u, int first, int thread, ChunkRange chunks,
                                               WeightUnit* shared)
      : chunks_(chunks), weights_(shared, chunks.count, [&](int c, WeightUnit (&units)[kTiles * kSteps]) {
          uint32_t words[kRun][8];
          u.template load<kRun, 32>(words, first + column(thread), (chunks[c] * 4 + t()) * kPerLane);
#pragma unroll
          for (int n = 0; n < kRun; ++n) {
#pragma unroll
            for (int w = 0; w < 8; ++w) {
              const uint32_t word = sizeof(T) == 2 ? words[n][w] : ptx::to_tf32(__uint_as_float(words[n][w]));
              units[w / 2 * kTiles + n / 2].v[n % 2 + w % 2 * 2] = word;
            }
          }
        }) {
  }

  static __device__ __forceinline__ int row(int run) { return t() * 2 + run; }
  static __device__ __forceinline__ int column(int thread) { return thread / 4 * kRun; }
  static __device__ __forceinline__ Element state(T v) {
    if constexpr (sizeof(T) == 2) {
      return v;
    } else {
      return ptx::to_tf32(v);
    }
  }

  __device__ __forceinline__ void multiply(const unsigned char* state, int stride, float (&sums)[kRuns][kRun]) const {
    float acc[kTiles][2][4] = {};
    state += static_cast<int>(threadIdx.x) / 4 % 8 * stride + t() * 32;
    weights_.for_each([&](int c, const WeightUnit(&units)[kTiles * kSteps]) {
      const auto* const from = reinterpret_cast<const WeightUnit*>(state + chunks_[c] * kResidentChunk);
      const WeightUnit s[2] = {from[0], from[1]};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t b[2] = {s[step / 2].v[step % 2 * 2], s[step / 2].v[step % 2 * 2 + 1]};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if constexpr (sizeof(T) == 2) {
            ptx::mma_m16n8k16<T>(acc[i][step % 2], units[step * kTiles + i].v, b);
          } else {
            ptx::mma_m16n8k8_tf32(acc[i][step % 2], units[step * kTiles + i].v, b);
          }
        }
      }
    });
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int n = 0; n < kRun; ++n) {
        sums[run][n] = acc[n / 2][0][n % 2 * 2 + run] + acc[n / 2][1][n % 2 * 2 + run];
      }
    }
  }

 private:
  ChunkRange chunks_;
  ThreadWeights<k.register_chunks, k.units()> weights_;

  static __device__ __forceinline__ int t() { return static_cast<int>(threadIdx.x) % 4; }
};

template <typename T, int kKernel>
using ResidentProduct =
    std::conditional_t<kResident[kKernel].math == Math::kSimt, SimtProduct<kKernel>, TensorCoreProduct<T, kKernel>>;

}  // namespace rnn_ext::cuda
