// What multiplies one slice of a tile out of shared memory, by the unit that does it: tensor cores for fp16, bf16 and
// tf32, tensor cores for fp64, or the FP32 and FP64 pipes. An engine owns its threads' accumulators, knows the layouts
// that it reads without bank conflicts, and in the end puts the accumulators into shared memory.
//
// A block's warps may also share out the depth of a slice among kGroups > 1 groups, each with accumulators for the
// whole tile: that is how a small tile employs enough threads. The groups' sums are then added in order.
#pragma once
#include "cuda/blocks/operand.cuh"
#include "cuda/plan/types.h"

namespace rnn_ext::cuda {

// ---- shapes ---------------------------------------------------------------------------------------------------------

// A BM×BN tile, BK deep, by kWarpsM × kWarpsN warps with equal parts of it, kGroups times over.
template <int BM_, int BN_, int BK_, int kWarpsM_, int kWarpsN_, int kGroups_, int kStages_, int kBlocksPerSm_>
struct WarpShape {
  static constexpr int BM = BM_, BN = BN_, BK = BK_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kGroups = kGroups_;
  static constexpr int kStages = kStages_, kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kWarpM = BM / kWarpsM, kWarpN = BN / kWarpsN;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN * kGroups;
  static_assert(BM % kWarpsM == 0 && BN % kWarpsN == 0 && kThreads <= 1024);
};

// A BM×BN tile, BK deep; each thread has TM×TN of it, in 4×4 pieces that lie apart.
template <int BM_, int BN_, int BK_, int TM_, int TN_, int kGroups_, int kStages_, int kBlocksPerSm_>
struct ThreadShape {
  static constexpr int BM = BM_, BN = BN_, BK = BK_, TM = TM_, TN = TN_, kGroups = kGroups_;
  static constexpr int kStages = kStages_, kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreadsM = BM / TM, kThreadsN = BN / TN, kThreads = kThreadsM * kThreadsN * kGroups;
  static_assert(TM % 4 == 0 && TN % 4 == 0 && BM % TM == 0 && BN % TN == 0 && kThreads <= 1024);
  static_assert(kThreadsN % 8 == 0 && kThreadsM % 4 == 0, "a warp takes 4 by 8 threads' parts");
  static_assert(BK % kGroups == 0);
};

// What all threads have summed, in shared memory, a tile for each group. 8 elements more a row take the 8 rows of a
// tensor core's fragment to different banks.
template <typename Acc, int BM, int BN, int kGroups>
struct SumTile {
  static constexpr int kStride = BN + 8;
  Acc sums[kGroups][BM * kStride];
};

// ---- fp16, bf16, tf32 on tensor cores -------------------------------------------------------------------------------

// T = float multiplies as tf32: operands rounded to 11 significant bits, sums in fp32.
template <typename T, class Shape_, Major kMajorA, Major kMajorB>
class TensorCoreEngine {
 public:
  using Shape = Shape_;
  using Acc = float;
  using LayoutA = SwizzledLayout<T, kMajorA, Shape::BM, Shape::BK>;
  using LayoutB = SwizzledLayout<T, kMajorB, Shape::BN, Shape::BK>;
  using Sums = SumTile<Acc, Shape::BM, Shape::BN, Shape::kGroups>;
  static_assert(std::is_same<T, float>::value || sizeof(T) == 2);

  __device__ __forceinline__ void multiply(const T* a, const T* b) {
    uint32_t fragments_a[2][kTilesM][4], fragments_b[2][kTilesN][2];
    load(fragments_a[0], fragments_b[0], a, b, group() * kStepK);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step + 1 < kSteps) {  // the next step's fragments are on their way while this one's are multiplied
        load(fragments_a[(step + 1) % 2], fragments_b[(step + 1) % 2], a, b,
             (group() + (step + 1) * Shape::kGroups) * kStepK);
      }
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          multiply(acc_[i][j], fragments_a[step % 2][RNN_EXT_PLANTED(wrong_fragment) ? 0 : i],
                   fragments_b[step % 2][j]);
        }
      }
    }
  }

  __device__ __forceinline__ void put(Sums& s) const {
    Acc* const sums = s.sums[group()] + (warp_m() + lane() / 4) * Sums::kStride + warp_n() + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {  // 8 rows
          *reinterpret_cast<Vector<Acc, 8>*>(sums + (i * 16 + lower * 8) * Sums::kStride +
                                             j * 8) = {{acc_[i][j][lower * 2], acc_[i][j][lower * 2 + 1]}};
        }
      }
    }
  }

 private:
  static constexpr int kStepK = 32 / static_cast<int>(sizeof(T));  // k of one instruction
  static constexpr int kTilesM = Shape::kWarpM / 16, kTilesN = Shape::kWarpN / 8;
  static constexpr int kSteps = Shape::BK / kStepK / Shape::kGroups;
  // ldmatrix transposes 16-bit elements alone.
  static_assert(sizeof(T) == 2 || (kMajorA == Major::kK && kMajorB == Major::kK));
  static_assert(Shape::kWarpM % 16 == 0 && Shape::kWarpN % 16 == 0 && Shape::BK % (kStepK * Shape::kGroups) == 0);

  float acc_[kTilesM][kTilesN][4] = {};

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
  static __device__ __forceinline__ int group() {
    return Shape::kGroups == 1 ? 0 : warp() / (Shape::kWarpsM * Shape::kWarpsN);
  }
  static __device__ __forceinline__ int warp_m() { return warp() / Shape::kWarpsN % Shape::kWarpsM * Shape::kWarpM; }
  static __device__ __forceinline__ int warp_n() { return warp() % Shape::kWarpsN * Shape::kWarpN; }

  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (sizeof(T) == 2) {
      ptx::mma_m16n8k16<T>(c, a, b);
    } else {
      ptx::mma_m16n8k8_tf32(c, a, b);
    }
  }

  // The fragments of one instruction step, which starts at k.
  static __device__ __forceinline__ void load(uint32_t (&a)[kTilesM][4], uint32_t (&b)[kTilesN][2], const T* tile_a,
                                              const T* tile_b, int k) {
    constexpr int kMatrixK = kStepK / 2;  // of one 8x8 matrix of 16-bit elements, or 8x4 of tf32
    const int matrix = lane() / 8, row = lane() % 8;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      const int m = warp_m() + i * 16;
      if constexpr (kMajorA == Major::kK) {
        ptx::ldmatrix_x4(a[i], tile_a + LayoutA::offset(m + matrix % 2 * 8 + row, k + matrix / 2 * kMatrixK));
      } else {
        ptx::ldmatrix_x4</*kTransposed=*/true>(a[i],
                                               tile_a + LayoutA::offset(m + matrix % 2 * 8, k + matrix / 2 * 8 + row));
      }
    }
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      const int n = warp_n() + j * 8;
      uint32_t pair[4];
      if constexpr (kMajorB == Major::kK) {
        ptx::ldmatrix_x4(pair, tile_b + LayoutB::offset(n + matrix / 2 * 8 + row, k + matrix % 2 * kMatrixK));
      } else {
        ptx::ldmatrix_x4</*kTransposed=*/true>(pair,
                                               tile_b + LayoutB::offset(n + matrix / 2 * 8, k + matrix % 2 * 8 + row));
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) b[j + r / 2][r % 2] = pair[r];
    }
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[i][r] = ptx::to_tf32(__uint_as_float(a[i][r]));
      }
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) b[j][r] = ptx::to_tf32(__uint_as_float(b[j][r]));
      }
    }
  }
};

// ---- fp64 on tensor cores -------------------------------------------------------------------------------------------

// Two m8n8k4 products take 8 successive k between them: lane t of a group has 2t for the first and 2t + 1 for the
// second, which it gets by one 16-byte read where k is contiguous. Any order of k will do, if A and B have the same.
template <class Shape_, Major kMajorA, Major kMajorB>
class Fp64Engine {
 public:
  using Shape = Shape_;
  using Acc = double;
  using LayoutA = SwizzledLayout<double, kMajorA, Shape::BM, Shape::BK>;
  using LayoutB = SwizzledLayout<double, kMajorB, Shape::BN, Shape::BK>;
  using Sums = SumTile<Acc, Shape::BM, Shape::BN, Shape::kGroups>;

  __device__ __forceinline__ void multiply(const double* a, const double* b) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int k = (group() + step * Shape::kGroups) * 8;
      Vector<double, 16> fragments_a[kTilesM], fragments_b[kTilesN];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) load<LayoutA>(fragments_a[i], a, warp_m() + i * 8, k);
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) load<LayoutB>(fragments_b[j], b, warp_n() + j * 8, k);
#pragma unroll
      for (int product = 0; product < 2; ++product) {
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
          for (int j = 0; j < kTilesN; ++j) {
            ptx::mma_m8n8k4_f64(acc_[i][j], fragments_a[i].v[product], fragments_b[j].v[product]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void put(Sums& s) const {
    Acc* const sums = s.sums[group()] + (warp_m() + lane() / 4) * Sums::kStride + warp_n() + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        *reinterpret_cast<Vector<Acc, 16>*>(sums + i * 8 * Sums::kStride + j * 8) = {{acc_[i][j][0], acc_[i][j][1]}};
      }
    }
  }

 private:
  static constexpr int kTilesM = Shape::kWarpM / 8, kTilesN = Shape::kWarpN / 8;
  static constexpr int kSteps = Shape::BK / 8 / Shape::kGroups;
  static_assert(Shape::kWarpM % 8 == 0 && Shape::kWarpN % 8 == 0 && Shape::BK % (8 * Shape::kGroups) == 0);

  double acc_[kTilesM][kTilesN][2] = {};

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
  static __device__ __forceinline__ int group() {
    return Shape::kGroups == 1 ? 0 : warp() / (Shape::kWarpsM * Shape::kWarpsN);
  }
  static __device__ __forceinline__ int warp_m() { return warp() / Shape::kWarpsN % Shape::kWarpsM * Shape::kWarpM; }
  static __device__ __forceinline__ int warp_n() { return warp() % Shape::kWarpsN * Shape::kWarpN; }

  template <class Layout>
  static __device__ __forceinline__ void load(Vector<double, 16>& fragment, const double* tile, int row, int k) {
    if constexpr (Layout::kMajor == Major::kK) {
      fragment =
          *reinterpret_cast<const Vector<double, 16>*>(tile + Layout::offset(row + lane() / 4, k + lane() % 4 * 2));
    } else {
#pragma unroll
      for (int product = 0; product < 2; ++product) {
        fragment.v[product] = tile[Layout::offset(row + lane() / 4, k + lane() % 4 * 2 + product)];
      }
    }
  }
};

// ---- the FP32 and FP64 pipes ----------------------------------------------------------------------------------------

// IEEE fp32 everywhere, fp64 below sm_80, and what else an architecture has no tensor core for. T is what the operands
// are, which multiply in the accumulator's precision. A thread reads its rows of one k as vectors of 4; of the 8 lanes
// whose 16 bytes are served together, all have the same rows of A and successive ones of B.
template <typename T, class Shape_, Major kMajorA, Major kMajorB>
class SimtEngine {
 public:
  using Shape = Shape_;
  using Acc = Accumulator<T>;
  using LayoutA = DepthMajorLayout<Acc, kMajorA, Shape::BM, Shape::BK>;
  using LayoutB = DepthMajorLayout<Acc, kMajorB, Shape::BN, Shape::BK>;
  using Sums = SumTile<Acc, Shape::BM, Shape::BN, Shape::kGroups>;

  __device__ __forceinline__ void multiply(const Acc* a, const Acc* b) {
    a += LayoutA::offset(thread_m() * 4, group());
    b += LayoutB::offset(thread_n() * 4, group());
    Acc fragment_a[2][Shape::TM], fragment_b[2][Shape::TN];
    load<kStepM, Shape::TM>(fragment_a[0], a);
    load<kStepN, Shape::TN>(fragment_b[0], b);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step + 1 < kSteps) {
        load<kStepM, Shape::TM>(fragment_a[(step + 1) % 2], a + (step + 1) * Shape::kGroups * LayoutA::kStride);
        load<kStepN, Shape::TN>(fragment_b[(step + 1) % 2], b + (step + 1) * Shape::kGroups * LayoutB::kStride);
      }
#pragma unroll
      for (int i = 0; i < Shape::TM; ++i) {
#pragma unroll
        for (int j = 0; j < Shape::TN; ++j) {
          acc_[i][j] += fragment_a[step % 2][RNN_EXT_PLANTED(wrong_fragment) ? 0 : i] * fragment_b[step % 2][j];
        }
      }
    }
  }

  __device__ __forceinline__ void put(Sums& s) const {
    Acc* const sums = s.sums[group()];
#pragma unroll
    for (int i = 0; i < Shape::TM; ++i) {
      const int m = thread_m() * 4 + i / 4 * kStepM + i % 4;
#pragma unroll
      for (int j = 0; j < Shape::TN; j += kPerRead) {
        const int n = thread_n() * 4 + j / 4 * kStepN + j % 4;
        Read v;
#pragma unroll
        for (int l = 0; l < kPerRead; ++l) v.v[l] = acc_[i][j + l];
        *reinterpret_cast<Read*>(sums + m * Sums::kStride + n) = v;
      }
    }
  }

 private:
  using Read = Vector<Acc, 16>;
  static constexpr int kPerRead = Read::kSize, kSteps = Shape::BK / Shape::kGroups;
  static constexpr int kStepM = Shape::kThreadsM * 4, kStepN = Shape::kThreadsN * 4;  // between pieces of 4

  Acc acc_[Shape::TM][Shape::TN] = {};

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp() {
    return static_cast<int>(threadIdx.x) / 32 % (Shape::kThreadsM * Shape::kThreadsN / 32);
  }
  static __device__ __forceinline__ int group() {
    return Shape::kGroups == 1 ? 0 : static_cast<int>(threadIdx.x) / (Shape::kThreadsM * Shape::kThreadsN);
  }
  static __device__ __forceinline__ int thread_m() { return warp() / (Shape::kThreadsN / 8) * 4 + lane() / 8; }
  static __device__ __forceinline__ int thread_n() { return warp() % (Shape::kThreadsN / 8) * 8 + lane() % 8; }

  template <int kStep, int kCount>
  static __device__ __forceinline__ void load(Acc (&fragment)[kCount], const Acc* line) {
#pragma unroll
    for (int i = 0; i < kCount; i += kPerRead) {
      const Read v = *reinterpret_cast<const Read*>(line + i / 4 * kStep + i % 4);
#pragma unroll
      for (int l = 0; l < kPerRead; ++l) fragment[i + l] = v.v[l];
    }
  }
};

// ---- the choice -----------------------------------------------------------------------------------------------------

template <typename T, Math kMath, class Shape, Major kMajorA, Major kMajorB>
struct EngineOf {
  static_assert(kMath == Math::kTf32 ? std::is_same<T, float>::value : !std::is_same<T, float>::value);
  using type = TensorCoreEngine<T, Shape, kMajorA, kMajorB>;
};
template <class Shape, Major kMajorA, Major kMajorB>
struct EngineOf<double, Math::kTensorCore, Shape, kMajorA, kMajorB> {
  using type = Fp64Engine<Shape, kMajorA, kMajorB>;
};
template <typename T, class Shape, Major kMajorA, Major kMajorB>
struct EngineOf<T, Math::kSimt, Shape, kMajorA, kMajorB> {
  using type = SimtEngine<T, Shape, kMajorA, kMajorB>;
};
template <typename T, Math kMath, class Shape, Major kMajorA, Major kMajorB>
using Engine = typename EngineOf<T, kMath, Shape, kMajorA, kMajorB>::type;

}  // namespace rnn_ext::cuda
