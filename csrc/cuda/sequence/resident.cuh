// What the `resident` kernels of both directions share: U on the chip, the state that goes from step to step, and the
// walk over the steps. forward_resident.cuh says what for.
//
// A step multiplies U with the state: y[n] = Σ_k U(n, k) s[k] for each row of the block. A thread has some rows n and a
// part of k, the same at every step, so its part of U is nobody else's: it lies in registers as far as they reach, and
// then in shared memory at the thread's own places, which needs neither barriers nor a layout without bank conflicts.
#pragma once
#include <climits>
#include <utility>

#include "cuda/blocks/lanes.cuh"
#include "cuda/blocks/operand.cuh"
#include "cuda/ptx/ptx_sm90.cuh"
#include "cuda/sequence/resident.h"

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

  // Rows n to n + 3 from column k on, kBytes of each, as words; zeros beyond the edges. Pointers go from line to line,
  // and barriers of the warp keep the compiler from having more on its way than registers can take.
  template <int kBytes>
  __device__ __forceinline__ void load(uint32_t (&words)[4][kBytes / 4], int n, int k) const {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T)), kPart = 4 * kPerWord;  // 16 bytes of a row
    const T* from = data + n * n_stride + k * k_stride;
    const int edge = RNN_EXT_PLANTED(resident_no_weight_edge) ? size + 3 : size;
    if (reads == Reads::kAlongK) {
#pragma unroll
      for (int i = 0; i < 4; ++i, from += n_stride) {
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
      using Read = Vector<uint32_t, 4 * sizeof(T)>;
#pragma unroll
      for (int part = 0; part < kBytes / 16; ++part) {
        Read v[kPart] = {};
#pragma unroll
        for (int j = 0; j < kPart; ++j, from += k_stride) {
          if (n < size && k + part * kPart + j < size) v[j] = *reinterpret_cast<const Read*>(from);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
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
      for (int i = 0; i < 4; ++i, from += n_stride) {
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

template <int kChunks, int kUnits>
class ThreadWeights {
 public:
  // load(chunk, units) brings them from global memory.
  template <typename Load>
  __device__ __forceinline__ ThreadWeights(WeightUnit* shared, int chunks, Load load)
      : shared_(shared + threadIdx.x), chunks_(chunks) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c < chunks) load(c, registers_[c]);
    }
#pragma unroll 1
    for (int c = kChunks; c < chunks; ++c) {
      WeightUnit units[kUnits];
      load(c, units);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) *place(c, u) = units[u];
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
// from column() on. They are where the sums end up.

// The FP32 pipes. Eight lanes share the k of four columns, 16 bytes of a chunk each, and the warp has 16 columns.
template <int kKernel>
class SimtProduct {
  static constexpr ResidentKernel k = kResident[kKernel];
  static constexpr int kLanes = 8, kColumns = 4, kRows = k.rows;

 public:
  using Element = float;
  static constexpr int kRuns = 1, kRun = kRows * kColumns > kLanes ? kRows *kColumns / kLanes : 1;

  __device__ __forceinline__ SimtProduct(const ResidentWeights<float>& u, WeightUnit* shared, int chunks)
      : weights_(shared, chunks, [&](int chunk, WeightUnit (&units)[kColumns]) {
          uint32_t words[4][4];
          u.template load<16>(words, first_column(), chunk * 32 + lane() * 4);
#pragma unroll
          for (int i = 0; i < kColumns; ++i) memcpy(&units[i], words[i], 16);
        }) {
  }

  static __device__ __forceinline__ int row(int) { return first_sum() / kColumns; }
  // Beyond all columns where two lanes have the same sum: one of them is enough.
  static __device__ __forceinline__ int column() {
    return kRows * kColumns < kLanes && lane() % 2 != 0 ? INT_MAX / 2 : first_column() + first_sum() % kColumns;
  }
  static __device__ __forceinline__ float state(float v) { return v; }

  __device__ __forceinline__ void multiply(const unsigned char* state, int stride, float (&sums)[kRuns][kRun]) const {
    float acc[kRows * kColumns] = {};
    state += lane() * 16;
    weights_.for_each([&](int chunk, const WeightUnit(&units)[kColumns]) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto s = *reinterpret_cast<const Vector<float, 16>*>(state + r * stride + chunk * kResidentChunk);
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
  ThreadWeights<k.register_chunks, k.units()> weights_;

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  static __device__ __forceinline__ int first_column() { return static_cast<int>(threadIdx.x) / kLanes * kColumns; }
  static __device__ __forceinline__ int first_sum() { return lane() * kRows * kColumns / kLanes; }
};

// Tensor cores, U's rows as those of A and the batch's as the columns of B: two tiles of 16 by 32 bytes of k a warp, in
// two sums that don't wait for each other. Both orders that the hardware leaves free are chosen for wide accesses. Of
// k, lane t of four has 32 successive bytes of a chunk, in A and B alike. And of the warp's 32 rows of U, lanes 4 g to
// 4 g + 3 have four successive ones, which are then four neighbouring columns of the result.
template <typename T, int kKernel>
class TensorCoreProduct {
  static constexpr ResidentKernel k = kResident[kKernel];
  static constexpr int kTiles = 2, kSteps = 4;  // of U's rows; of k in a chunk
  static constexpr int kPerLane = 32 / static_cast<int>(sizeof(T));

 public:
  using Element = std::conditional_t<sizeof(T) == 2, T, uint32_t>;
  static constexpr int kRuns = 2, kRun = 4;
  static_assert(k.rows == 8 && k.units() == kTiles * kSteps);

  __device__ __forceinline__ TensorCoreProduct(const ResidentWeights<T>& u, WeightUnit* shared, int chunks)
      : weights_(shared, chunks, [&](int chunk, WeightUnit (&units)[kTiles * kSteps]) {
          uint32_t words[4][8];
          u.template load<32>(words, column(), (chunk * 4 + t()) * kPerLane);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int w = 0; w < 8; ++w) {
              const uint32_t word = sizeof(T) == 2 ? words[n][w] : ptx::to_tf32(__uint_as_float(words[n][w]));
              units[w / 2 * kTiles + n / 2].v[n % 2 + w % 2 * 2] = word;
            }
          }
        }) {
  }

  static __device__ __forceinline__ int row(int run) { return t() * 2 + run; }
  static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) / 4 * 4; }
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
    weights_.for_each([&](int chunk, const WeightUnit(&units)[kTiles * kSteps]) {
      const auto* const from = reinterpret_cast<const WeightUnit*>(state + chunk * kResidentChunk);
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
  ThreadWeights<k.register_chunks, k.units()> weights_;

  static __device__ __forceinline__ int t() { return static_cast<int>(threadIdx.x) % 4; }
};

template <typename T, int kKernel>
using ResidentProduct =
    std::conditional_t<kResident[kKernel].math == Math::kSimt, SimtProduct<kKernel>, TensorCoreProduct<T, kKernel>>;

// ---- rows of global memory ------------------------------------------------------------------------------------------

// A run of neighbouring elements as words, which a load fills without anyone waiting for it.
template <typename T, int kRun>
struct Run {
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T)), kWords = kRun / kPerWord;
  static_assert(kRun % kPerWord == 0);
  alignas(kRun * sizeof(T)) uint32_t words[kWords];

  __device__ __forceinline__ T operator[](int j) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[j]);
    } else {
      const auto bits = static_cast<uint16_t>(words[j / 2] >> j % 2 * 16);
      T v;
      memcpy(static_cast<void*>(&v), &bits, sizeof v);
      return v;
    }
  }
  __device__ __forceinline__ void set(int word, const T (&v)[kPerWord]) { memcpy(&words[word], v, 4); }
};

// The rows of all steps, in runs of which the first `inside` elements, at least one, are there.
template <typename T, int kRun>
struct ResidentRows {
  using Run = cuda::Run<std::remove_const_t<T>, kRun>;

  Rows<T> rows;
  bool vectors = false;  // runs are aligned, and all of one is there

  ResidentRows() = default;
  ResidentRows(const Rows<T>& r, int64_t hidden_size) : rows(r) {
    vectors = r.col_stride == 1 && hidden_size % kRun == 0 && lines_are_aligned(r.data, r.step_stride, sizeof(Run)) &&
              lines_are_aligned(r.data, r.row_stride, sizeof(Run));
  }

  __device__ __forceinline__ T* at(int64_t begin, int64_t first, int column) const {
    return rows.data + begin * rows.step_stride + first * rows.row_stride + column * rows.col_stride;
  }
  // Without vectors, 16-bit elements are waited for.
  __device__ __forceinline__ void load(Run& run, const T* from, int inside) const {
    if (vectors) {
      run = *reinterpret_cast<const Run*>(from);
    } else {
#pragma unroll
      for (int word = 0; word < Run::kWords; ++word) {
        std::remove_const_t<T> v[Run::kPerWord] = {};
#pragma unroll
        for (int e = 0; e < Run::kPerWord; ++e) {
          const int j = word * Run::kPerWord + e;
          if (j < inside) v[e] = from[j * rows.col_stride];
        }
        run.set(word, v);
      }
    }
  }
  __device__ __forceinline__ void store(T* to, const T (&v)[kRun], int inside) const {
    if (vectors) {
      Run run;
      memcpy(run.words, v, sizeof run.words);
      *reinterpret_cast<Run*>(to) = run;
    } else {
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (j < inside) to[j] = v[j];
      }
    }
  }
};

// ---- the walk over the steps ----------------------------------------------------------------------------------------

struct ResidentSmem {
  int64_t places[kResidentMaxRows];  // of the block's rows, in hx and its like
  int64_t firsts[kResidentMaxRows];  // in the data, which jagged data has elsewhere
  int lengths[kResidentMaxRows];     // 0 where there is no such row
  // Then two states, and what of U registers don't hold.
};
static_assert(sizeof(ResidentSmem) == kResidentTables);

// What a kernel is told besides its direction's params.
template <typename T>
struct ResidentTask {
  Steps steps;
  ResidentWeights<T> weights;
  bool up;  // from each row's first step to its last
  int block_rows, passes;
  int chunks, state_stride;
  int more_steps;  // after the last: 0 or 1
};

// How many steps have row b: they are the first ones.
__device__ __forceinline__ int length_of(const Steps& steps, int64_t b) {
  int has = 0, has_not = static_cast<int>(steps.steps);
  if (steps.counts == nullptr) return has_not;
  while (has < has_not) {
    const int middle = has + (has_not - has) / 2;
    if (steps.counts[middle] > b) {
      has = middle + 1;
    } else {
      has_not = middle;
    }
  }
  return has;
}

// A block's rows of the batch on their way through the steps. Constructed by all of its threads.
template <typename T, int kKernel>
class ResidentBlock {
 public:
  using Product = ResidentProduct<T, kKernel>;
  static constexpr int kRows = kResident[kKernel].rows, kRuns = Product::kRuns, kRun = Product::kRun;

  __device__ __forceinline__ ResidentBlock(ResidentSmem& smem, const ResidentTask<T>& task)
      : smem_(smem), task_(task), product_(task.weights, reinterpret_cast<WeightUnit*>(state(2)), task.chunks) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if (thread < kResidentMaxRows) {
      const int64_t b = int64_t{blockIdx.x} * task.block_rows + thread;
      const bool is_mine = thread < task.block_rows && b < task.steps.batch;
      smem.lengths[thread] = is_mine ? length_of(task.steps, b) : 0;
      const int64_t place = is_mine && task.steps.order != nullptr ? task.steps.order[b] : b;
      smem.places[thread] = place;
      smem.firsts[thread] = is_mine && task.steps.firsts != nullptr ? task.steps.firsts[b] : place;
    }
    for (unsigned char* p = state(0) + thread * 16; p < state(2); p += threads * 16) {
      if (!RNN_EXT_PLANTED(resident_state_not_cleared)) *reinterpret_cast<WeightUnit*>(p) = {};
    }
    if (!RNN_EXT_PLANTED(resident_no_table_barrier)) __syncthreads();
    longest_ = smem.lengths[0];
  }

  __device__ __forceinline__ int hidden_size() const { return task_.weights.size; }
  __device__ __forceinline__ int rows() const {
    return static_cast<int>(min(int64_t{task_.block_rows}, task_.steps.batch - int64_t{blockIdx.x} * task_.block_rows));
  }
  __device__ __forceinline__ int length(int row) const { return smem_.lengths[row]; }
  __device__ __forceinline__ int64_t place(int row) const { return smem_.places[row]; }
  __device__ __forceinline__ int64_t first(int row) const { return smem_.firsts[row]; }
  // A row's first and last step on the way.
  __device__ __forceinline__ int first_step(int row) const { return task_.up ? 0 : length(row) - 1; }
  __device__ __forceinline__ int last_step(int row) const { return task_.up ? length(row) - 1 : 0; }
  __device__ __forceinline__ int step_after(int row) const { return task_.up ? length(row) : -1; }
  __device__ __forceinline__ bool has(int row, int t) const {
    return t >= 0 && t < (RNN_EXT_PLANTED(resident_no_length) && row < rows() ? longest_ : length(row));
  }
  // How many of the thread's columns from column() on there are; may be negative.
  __device__ __forceinline__ int inside() const { return hidden_size() - Product::column(); }

  // Both states of an element, before the first step. A barrier must follow.
  __device__ __forceinline__ void start_with(int row, int column, T v) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      reinterpret_cast<typename Product::Element*>(state(i) + row * task_.state_stride)[column] = Product::state(v);
    }
  }

  // A step is one pass over U for each kRows rows, and one barrier. For each run of each step's rows,
  //   prefetch(row, begin)                   brings what the step needs to the L2 cache, some steps ahead
  //   read(inputs, row, begin)               begins to read it, before the product
  //   step(sums, inputs, row, t, begin, v)   leaves the next state in v[kRun] and returns true; false: there is none
  // `begin` is Steps::begin(t).
  template <class Inputs, typename Prefetch, typename Read, typename Step>
  __device__ __forceinline__ void run(Prefetch prefetch, Read read, Step step) {
    constexpr int kAhead = 8;
    const int steps = longest_ + task_.more_steps;
    Inputs inputs[kRuns] = {};
    const auto read_pass = [&](int pass, int i) {
      const int t = step_of(i), far = step_of(i + kAhead);
      const int64_t begin = begin_of(t), far_begin = begin_of(far);
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        const int row = pass * kRows + Product::row(run);
        if (inside() > 0 && has(row, t)) read(inputs[run], row, begin);
        if (inside() > 0 && has(row, far)) prefetch(row, far_begin);
      }
    };
    read_pass(0, 0);
    if (!RNN_EXT_PLANTED(resident_no_first_barrier)) __syncthreads();  // all have called start_with
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const int t = step_of(i);
      const unsigned char* const now = state(i % 2);
      unsigned char* const next = state(RNN_EXT_PLANTED(resident_one_state) ? i % 2 : (i + 1) % 2);
#pragma unroll 1
      for (int pass = 0; pass < task_.passes; ++pass) {
        float sums[kRuns][kRun];
        product_.multiply(now + pass * kRows * task_.state_stride, task_.state_stride, sums);
        const int64_t begin = begin_of(t);
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
          const int row = pass * kRows + Product::row(run);
          T v[kRun];
          if (inside() <= 0 || !step(sums[run], inputs[run], row, t, begin, v)) continue;
          Vector<typename Product::Element, kRun* static_cast<int>(sizeof(T))> result;
#pragma unroll
          for (int j = 0; j < kRun; ++j) {
            // U has zeros for it, but zero times what is no number is none.
            result.v[j] = Product::state(j < inside() ? v[j] : narrow<T>(0));
          }
          *reinterpret_cast<decltype(result)*>(next + row * task_.state_stride +
                                               Product::column() * static_cast<int>(sizeof(T))) = result;
        }
        const bool is_last = pass + 1 == task_.passes;
        read_pass(is_last ? 0 : pass + 1, is_last && !RNN_EXT_PLANTED(resident_wrong_step) ? i + 1 : i);
      }
      if (!RNN_EXT_PLANTED(resident_no_step_barrier)) __syncthreads();
    }
  }

 private:
  ResidentSmem& smem_;
  const ResidentTask<T>& task_;
  Product product_;
  int longest_;

  __device__ __forceinline__ unsigned char* state(int i) const {
    return reinterpret_cast<unsigned char*>(&smem_ + 1) + i * task_.passes * kRows * task_.state_stride;
  }
  __device__ __forceinline__ int step_of(int i) const { return task_.up ? i : longest_ - 1 - i; }
  __device__ __forceinline__ int64_t begin_of(int t) const {
    return task_.steps.begins != nullptr && t >= 0 && t < longest_ ? task_.steps.begins[t] : t;
  }
};

// ---- launches -------------------------------------------------------------------------------------------------------

template <typename T, class Params>
ResidentTask<T> resident_task(const Params& p, const ResidentKernel& k, int block_rows, bool backward, int more_steps) {
  const int64_t H = p.hidden_size;
  return {p.steps,
          ResidentWeights<T>(p.weight_hh, H, backward),
          p.reverse == backward,
          block_rows,
          k.passes(block_rows),
          k.chunks(H, kDtype<T>),
          k.state_stride(H, kDtype<T>),
          more_steps};
}

// launch(std::integral_constant<int, kernel>) of a row of kResident that T has.
template <typename T, int kKernel = 0, typename Launch>
cudaError_t with_resident_kernel(int kernel, Launch launch) {
  if constexpr (kKernel == kNumResident) {
    return cudaErrorInvalidValue;
  } else {
    if constexpr (kResident[kKernel].takes(kDtype<T>)) {
      if (kernel == kKernel) return launch(std::integral_constant<int, kKernel>());
    }
    return with_resident_kernel<T, kKernel + 1>(kernel, launch);
  }
}

}  // namespace rnn_ext::cuda
