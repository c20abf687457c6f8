// The loop that all tiled kernels share: a ring of slices in shared memory, filled ahead while the engine multiplies.
//
//   C[m, n] += Σ_k A(m, k) B(n, k)    over one or two segments of k, each with its own pair of operands
//
// The forward's segments are (x, W) and (h, U); nothing is concatenated in memory, and no slice has k of both. A block
// may take any range of the slices, which is how K is split over blocks.
#pragma once
#include "cuda/blocks/engine.cuh"
#include "cuda/ptx/ptx_sm90.cuh"

namespace rnn_ext::cuda {

template <class SourceA, class SourceB>
struct Segment {
  SourceA a;
  SourceB b;
  int64_t depth = 0;
};

// The rows [m, m_end) and columns [n, n_end) of C, of which the tile takes the first.
struct TileBounds {
  int64_t m, m_end, n, n_end;
};

// Whether a loop also adds up the rows of A.
enum class RowSums { kNone, kOfA };

// Fill::kAsync: cp.async where an operand is one matrix of the engine's element type (sm_80 and later); without, or for
// a combined operand, the next slice waits in registers. An engine and an operand that can't use it just don't.
template <class Engine_, class SourceA, class SourceB, Fill kFill>
struct Mainloop {
  using Engine = Engine_;
  using Shape = typename Engine::Shape;
  using Acc = typename Engine::Acc;
  using LayoutA = typename Engine::LayoutA;
  using LayoutB = typename Engine::LayoutB;
  using Operands = Segment<SourceA, SourceB>;

  template <class Layout, class Source>
  static constexpr bool is_async = kFill == Fill::kAsync && Source::kParts == 1 &&
                                   std::is_same<typename Source::Element, typename Layout::Element>::value;
  static constexpr bool kAsyncA = is_async<LayoutA, SourceA>, kAsyncB = is_async<LayoutB, SourceB>;
  static constexpr int kStagesA = kAsyncA ? Shape::kStages : 2, kStagesB = kAsyncB ? Shape::kStages : 2;
  static constexpr int kAhead = kAsyncA || kAsyncB ? Shape::kStages - 1 : 1;  // slices on their way
  static_assert(Shape::kStages >= 2);

  struct Ring {
    alignas(128) typename LayoutA::Element a[kStagesA][LayoutA::kSize];
    alignas(128) typename LayoutB::Element b[kStagesB][LayoutB::kSize];
  };
  union Smem {
    Ring ring;
    typename Engine::Sums sums;  // afterwards
  };

  // How many slices the segments have.
  static __host__ __device__ int slices(int64_t depth) { return static_cast<int>(ceil_div(depth, Shape::BK)); }

  // The slices [begin, end) of the segments on their way through the ring. Those that come by cp.async are kAhead
  // slices ahead; of what comes through registers, the next slice waits there, and shared memory has two places for it.
  template <int kSegments>
  class Pipeline {
   public:
    __device__ __forceinline__ Pipeline(Ring& ring, const Operands& first, const Operands& second,
                                        const TileBounds& tile, int begin, int end)
        : ring_(ring), first_(first), second_(second), tile_(tile), begin_(begin), end_(end) {}

    __device__ __forceinline__ void prologue() {
      if constexpr (kAsyncA || kAsyncB) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (begin_ + i < end_) start(begin_ + i, i);
          ptx::cp_async_commit();
        }
      }
      if constexpr (!kAsyncA || !kAsyncB) {
        load(begin_);
        store(begin_, 0);
      }
    }

    // Slice i is there for all, and all are done with slice i - 1, whose place slice i + kAhead takes.
    __device__ __forceinline__ void wait() {
      if constexpr (kAsyncA || kAsyncB) {
        if (RNN_EXT_PLANTED(missed_cp_async_wait)) {
          ptx::cp_async_wait<kAhead>();
        } else {
          ptx::cp_async_wait<kAhead - 1>();
        }
      }
      if (!RNN_EXT_PLANTED(no_stage_barrier)) __syncthreads();
    }

    // Before slice i is multiplied: starts what comes after it.
    __device__ __forceinline__ void refill(int i) {
      if constexpr (kAsyncA || kAsyncB) {
        if (i + kAhead < end_) start(i + kAhead, next_stage_);
        ptx::cp_async_commit();
      }
      if constexpr (!kAsyncA || !kAsyncB) {
        if (i + 1 < end_) load(i + 1);
      }
    }

    __device__ __forceinline__ const typename LayoutA::Element* a(int i) const {
      return ring_.a[kAsyncA ? read_stage() : staged(i)];
    }
    __device__ __forceinline__ const typename LayoutB::Element* b(int i) const {
      return ring_.b[kAsyncB ? read_stage() : staged(i)];
    }

    // After it has been multiplied: what waits in registers goes to shared memory.
    __device__ __forceinline__ void advance(int i) {
      if constexpr (!kAsyncA || !kAsyncB) {
        if (i + 1 < end_) store(i + 1, staged(i) ^ 1);
      }
      stage_ = stage_ == kAhead ? 0 : stage_ + 1;
      next_stage_ = next_stage_ == kAhead ? 0 : next_stage_ + 1;
    }

   private:
    Ring& ring_;
    const Operands &first_, &second_;
    const TileBounds& tile_;
    const int begin_, end_;
    int stage_ = 0, next_stage_ = kAhead;
    StagedCopy<LayoutA, SourceA, Shape::kThreads> staged_a_;
    StagedCopy<LayoutB, SourceB, Shape::kThreads> staged_b_;

    __device__ __forceinline__ int read_stage() const { return RNN_EXT_PLANTED(wrong_stage) ? next_stage_ : stage_; }
    __device__ __forceinline__ int staged(int i) const { return (i - begin_) % 2; }

    // use(operands, k) of the segment that slice `index` is in, which starts at k.
    template <typename Use>
    __device__ __forceinline__ void with_slice(int index, Use use) const {
      if constexpr (kSegments == 2) {
        const int first_slices = slices(first_.depth);
        const bool in_first = index < first_slices;
        const int64_t k = int64_t{in_first ? index : index - first_slices} * Shape::BK;
        const Operands operands = in_first ? first_ : second_;
        use(operands, k);
      } else {
        use(first_, int64_t{index} * Shape::BK);
      }
    }
    __device__ __forceinline__ void start(int index, int stage) {
      with_slice(index, [&](const Operands& s, int64_t k) {
        if constexpr (kAsyncA) {
          AsyncCopy<LayoutA, SourceA, Shape::kThreads>::start(ring_.a[stage], s.a, tile_.m, tile_.m_end, k, s.depth);
        }
        if constexpr (kAsyncB) {
          AsyncCopy<LayoutB, SourceB, Shape::kThreads>::start(ring_.b[stage], s.b, tile_.n, tile_.n_end, k, s.depth);
        }
      });
    }
    __device__ __forceinline__ void load(int index) {
      with_slice(index, [&](const Operands& s, int64_t k) {
        if constexpr (!kAsyncA) staged_a_.load(s.a, tile_.m, tile_.m_end, k, s.depth);
        if constexpr (!kAsyncB) staged_b_.load(s.b, tile_.n, tile_.n_end, k, s.depth);
      });
    }
    __device__ __forceinline__ void store(int index, int stage) {
      with_slice(index, [&](const Operands& s, int64_t) {
        if constexpr (!kAsyncA) staged_a_.store(ring_.a[stage], s.a);
        if constexpr (!kAsyncB) staged_b_.store(ring_.b[stage], s.b);
      });
    }
  };

  // Multiplies slices [begin, end) of the two segments into the engine's accumulators. With RowSums::kOfA, thread
  // r < BM also adds up row r of A, unless sums_rows is false. Shared memory is free for other use after the caller's
  // next barrier.
  template <RowSums kRowSums = RowSums::kNone, int kSegments = 2>
  static __device__ __forceinline__ void run(Smem& smem, Engine& engine, const Operands& first, const Operands& second,
                                             const TileBounds& tile, int begin, int end,
                                             [[maybe_unused]] Acc* row_sum = nullptr,
                                             [[maybe_unused]] bool sums_rows = true) {
    static_assert(kRowSums == RowSums::kNone || Shape::kThreads >= Shape::BM, "one thread a row");
    if (begin >= end) return;
    Pipeline<kSegments> pipeline(smem.ring, first, second, tile, begin, end);
    pipeline.prologue();
    for (int i = begin; i < end; ++i) {
      pipeline.wait();
      pipeline.refill(i);
      const auto *const a = pipeline.a(i), *const b = pipeline.b(i);
      // Without columns, the row sums are all there is to it.
      if (kRowSums == RowSums::kNone || tile.n < tile.n_end || RNN_EXT_PLANTED(backward_zeros_not_exact)) {
        engine.multiply(a, b);
      }
      if constexpr (kRowSums == RowSums::kOfA) {
        const int row = static_cast<int>(threadIdx.x);
        if (row < Shape::BM && sums_rows) {
#pragma unroll 8
          for (int k = 0; k < Shape::BK; ++k) *row_sum += static_cast<Acc>(widen(a[LayoutA::offset(row, k)]));
        }
      }
      pipeline.advance(i);
    }
  }

  // The same of one segment.
  template <RowSums kRowSums = RowSums::kNone>
  static __device__ __forceinline__ void run(Smem& smem, Engine& engine, const Operands& only, const TileBounds& tile,
                                             int begin, int end, Acc* row_sum = nullptr, bool sums_rows = true) {
    run<kRowSums, 1>(smem, engine, only, only, tile, begin, end, row_sum, sums_rows);
  }

  // Puts the block's sums into shared memory, where all of its threads see them on return.
  static __device__ __forceinline__ void put_sums(Smem& smem, const Engine& engine) {
    __syncthreads();  // the last slice has been read
    engine.put(smem.sums);
    if (!RNN_EXT_PLANTED(no_barrier_before_epilogue)) __syncthreads();
  }

  // The block's sums of kSize successive columns, its groups of warps in order.
  template <int kSize>
  static __device__ __forceinline__ void add_sums(const typename Engine::Sums& s, int row, int column,
                                                  Acc (&sum)[kSize]) {
    constexpr int kRead = kSize * static_cast<int>(sizeof(Acc)) > 16 ? 16 : kSize * static_cast<int>(sizeof(Acc));
    using Read = Vector<Acc, kRead>;
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      const Acc* from = s.sums[group] + row * Engine::Sums::kStride + column;
#pragma unroll
      for (int i = 0; i < kSize; i += Read::kSize) {
        const Read v = *reinterpret_cast<const Read*>(from + i);
#pragma unroll
        for (int j = 0; j < Read::kSize; ++j) sum[i + j] += v.v[j];
      }
    }
  }

  // Calls use(row, column, sums) for each vector of kSize columns of the tile's rows [row_begin, row_end), in the
  // tile's coordinates; every thread takes its share. What lies beyond the matrix's edges comes along.
  template <int kSize, typename Use>
  static __device__ __forceinline__ void for_each_vector(int row_begin, int row_end, Use use) {
    constexpr int kPerRow = Shape::BN / kSize;
    for (int e = row_begin * kPerRow + static_cast<int>(threadIdx.x); e < row_end * kPerRow; e += Shape::kThreads) {
      use(e / kPerRow, e % kPerRow * kSize);
    }
  }

  // The columns of kSize that a thread has in every row, and what it calls use(row) with: its share of rows
  // [begin, end), in the tile's coordinates. Together the threads cover the tile once.
  template <int kSize>
  static __device__ __forceinline__ int vector_column() {
    return static_cast<int>(threadIdx.x) % (Shape::BN / kSize) * kSize;
  }
  template <int kSize, typename Use>
  static __device__ __forceinline__ void for_each_row(int begin, int end, Use use) {
    constexpr int kPerRow = Shape::BN / kSize;
    static_assert(Shape::kThreads % kPerRow == 0);
    for (int row = begin + static_cast<int>(threadIdx.x) / kPerRow; row < end; row += Shape::kThreads / kPerRow)
      use(row);
  }

  // The same of at most kMost rows, the thread's i-th as use(i, row): for results that stay in registers, of so many.
  template <int kSize, int kMost>
  static constexpr int kRowsOfThread = static_cast<int>(ceil_div(kMost, Shape::kThreads / (Shape::BN / kSize)));
  template <int kSize, int kMost, typename Use>
  static __device__ __forceinline__ void for_each_row_by_number(int begin, int end, Use use) {
    constexpr int kStep = Shape::kThreads / (Shape::BN / kSize);
#pragma unroll
    for (int i = 0; i < kRowsOfThread<kSize, kMost>; ++i) {
      const int row = begin + static_cast<int>(threadIdx.x) / (Shape::BN / kSize) + i * kStep;
      if (row < end) use(i, row);
    }
  }

  // Adds the sums of all groups into the first one's, in the first `rows` rows.
  static __device__ __forceinline__ void fold_groups(typename Engine::Sums& s, int rows) {
    using Read = Vector<Acc, 16>;
    const int column = vector_column<Read::kSize>();
    for_each_row<Read::kSize>(0, rows, [&](int row) {
      Acc sums[Read::kSize] = {};
      add_sums(s, row, column, sums);
      Read v;
#pragma unroll
      for (int i = 0; i < Read::kSize; ++i) v.v[i] = sums[i];
      *reinterpret_cast<Read*>(s.sums[0] + row * Engine::Sums::kStride + column) = v;
    });
  }

  // As add_sums, of the folded sums of block `rank` of the cluster.
  template <int kSize>
  static __device__ __forceinline__ void add_cluster_sums(const typename Engine::Sums& s, int rank, int row, int column,
                                                          Acc (&sum)[kSize]) {
    using Read = Vector<Acc, 16>;
    static_assert(kSize % Read::kSize == 0);
    const uint32_t from = ptx::cluster_address(s.sums[0] + row * Engine::Sums::kStride + column, rank);
#pragma unroll
    for (int i = 0; i < kSize; i += Read::kSize) {
      const Read v = ptx::ld_cluster<Read>(from + static_cast<uint32_t>(i * sizeof(Acc)));
#pragma unroll
      for (int j = 0; j < Read::kSize; ++j) sum[i + j] += v.v[j];
    }
  }
};

}  // namespace rnn_ext::cuda
