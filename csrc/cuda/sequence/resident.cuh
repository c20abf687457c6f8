// The kernels that keep U on the chip, as far as both directions share them: rows of global memory, the walk over the
// steps, launches. forward_resident.cuh says what for.
//
// Blocks that share U have all of k and a part of n each. So a block needs all of the state, of which it makes a part:
// exchange.cuh says how the others' parts come to it. Where a block's columns occupy few warps, others have parts of k
// for the same columns, and the first of them adds up.
#pragma once
#include "cuda/sequence/exchange.cuh"
#include "cuda/sequence/resident.h"
#include "cuda/sequence/resident_product.cuh"

namespace rnn_ext::cuda {

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
  static constexpr ResidentKernel k = kResident[kKernel];
  static constexpr int kStates = k.states(), kSums = k.sums();

 public:
  using Product = ResidentProduct<T, kKernel>;
  static constexpr int kRows = k.rows, kRuns = Product::kRuns, kRun = Product::kRun;
  static_assert(kRun == kResident[kKernel].run() && kRuns * kRun == kSums);

  __device__ __forceinline__ ResidentBlock(ResidentSmem& smem, const ResidentTask<T>& task)
      : smem_(smem),
        task_(task),
        column_(split() == 0 ? first_column() + Product::column(thread()) : INT_MAX / 2),
        product_(task.weights, first_column(), thread(), ChunkRange(split(), splits(), task.chunks), weights()),
        exchange_(smem, task) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if (thread < kResidentMaxRows) {
      const int64_t b = first_row() + thread;
      const bool is_mine = thread < task.block_rows && b < task.steps.batch;
      smem.lengths[thread] = is_mine ? length_of(task.steps, b) : 0;
      smem.places[thread] = is_mine ? task.steps.place(b) : 0;
      smem.firsts[thread] = is_mine ? task.steps.first(b) : 0;
    }
    for (unsigned char* p = state(0) + thread * 16; p < state(kStates); p += threads * 16) {
      if (!RNN_EXT_PLANTED(resident_state_not_cleared)) *reinterpret_cast<WeightUnit*>(p) = {};
    }
    if (!RNN_EXT_PLANTED(resident_no_table_barrier)) __syncthreads();
    longest_ = smem.lengths[0];
  }

  __device__ __forceinline__ int hidden_size() const { return task_.weights.size; }
  __device__ __forceinline__ int rows() const {
    return static_cast<int>(min(int64_t{task_.block_rows}, task_.steps.batch - first_row()));
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
  // Whether it is the first of those that have these rows.
  __device__ __forceinline__ bool is_first_part() const { return part() == 0; }
  // The thread's first. It is beyond all of them where another thread goes on with its sums.
  __device__ __forceinline__ int column() const { return column_; }
  // How many from there on there are; may be negative.
  __device__ __forceinline__ int inside() const { return hidden_size() - column_; }

  // All states of an element, before the first step. A barrier must follow.
  __device__ __forceinline__ void start_with(int row, int column, T v) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      reinterpret_cast<typename Product::Element*>(state(i) + row * task_.state_stride)[column] = Product::state(v);
    }
  }

  // A step is one pass over U for each kRows rows, and an exchange. For each run of each step's rows,
  //   prefetch(row, begin)                   brings what the step needs to the L2 cache, some steps ahead
  //   read(inputs, row, begin)               begins to read it, before the product
  //   step(sums, inputs, row, t, v)          leaves the next state in v[kRun] and returns true; false: there is none
  //   write(row, t, begin, v)                what step has left, after others have been sent it
  // `begin` is Steps::begin(t).
  template <class Inputs, typename Prefetch, typename Read, typename Step, typename Write>
  __device__ __forceinline__ void run(Prefetch prefetch, Read read, Step step, Write write) {
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
    exchange_.start();  // all have called start_with
    // In a cluster nobody waits for a warp without columns. It could fall behind by two steps, and then wait for a
    // phase that has come and gone.
    if (k.sharing == Sharing::kCluster && splits() == 1 && !__any_sync(0xffffffffu, inside() > 0) &&
        !RNN_EXT_PLANTED(cluster_idle_warp_stays)) {
      return;
    }
    int passes = 0;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const int t = step_of(i);
      const bool goes_on = i + 1 < steps;
      const unsigned char* const now = exchange_.state(i);
      exchange_.receive(i, goes_on, [&](int of) { return rows_at(step_of(of)); });
      bool is_last = false;
#pragma unroll 1
      for (int pass = 0; !is_last; ++pass, ++passes) {
        float sums[kRuns][kRun];
        product_.multiply(now + pass * kRows * task_.state_stride, task_.state_stride, sums);
        if (splits() > 1) add_up(sums, passes % 2);
        exchange_.has_read();
        T v[kRuns][kRun] = {};
        bool is_state[kRuns];
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
          const int row = pass * kRows + Product::row(run);
          is_state[run] = inside() > 0 && step(sums[run], inputs[run], row, t, v[run]);
          if (!is_state[run] || !goes_on) continue;
          Vector<typename Product::Element, kRun* static_cast<int>(sizeof(T))> result;
#pragma unroll
          for (int j = 0; j < kRun; ++j) {
            // U has zeros for it, but zero times what is no number is none.
            result.v[j] = Product::state(j < inside() ? v[run][j] : narrow<T>(0));
          }
          exchange_.send(i, row, column() * static_cast<int>(sizeof(T)), result);
        }
        is_last = pass + 1 == task_.passes || !has_work(pass + 1, t);
        if (is_last && goes_on) exchange_.finish();
        const int64_t begin = begin_of(t);
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
          if (is_state[run]) write(pass * kRows + Product::row(run), t, begin, v[run]);
        }
        read_pass(is_last ? 0 : pass + 1, is_last && !RNN_EXT_PLANTED(resident_wrong_step) ? i + 1 : i);
      }
    }
  }

 private:
  ResidentSmem& smem_;
  const ResidentTask<T>& task_;
  int column_;
  Product product_;
  Exchange<T, k.sharing> exchange_;
  int longest_;

  // Which of the blocks that share U it is, and the first of its rows of the batch.
  __device__ __forceinline__ int part() const {
    return k.sharing == Sharing::kNone ? 0 : static_cast<int>(blockIdx.x) % task_.parts;
  }
  __device__ __forceinline__ int64_t first_row() const {
    return int64_t{blockIdx.x} / (k.sharing == Sharing::kNone ? 1 : task_.parts) * task_.block_rows;
  }
  // Divisions, which no step should wait for.
  __device__ __forceinline__ int first_column() const { return part() * task_.columns; }
  __device__ __forceinline__ int splits() const { return k.sharing == Sharing::kNone ? 1 : task_.splits; }
  // Which part of k is the thread's, and its number among those that have it.
  __device__ __forceinline__ int split() const {
    return k.sharing == Sharing::kNone ? 0 : static_cast<int>(threadIdx.x) / task_.column_threads;
  }
  __device__ __forceinline__ int thread() const {
    return static_cast<int>(threadIdx.x) - split() * task_.column_threads;
  }

  __device__ __forceinline__ unsigned char* state(int i) const { return state_of(smem_, task_, i); }
  __device__ __forceinline__ float* sums_of_splits() const { return reinterpret_cast<float*>(state(kStates)); }
  __device__ __forceinline__ WeightUnit* weights() const {
    return reinterpret_cast<WeightUnit*>(sums_of_splits() + 2 * (splits() - 1) * task_.column_threads * kSums);
  }

  __device__ __forceinline__ int step_of(int i) const { return task_.up ? i : longest_ - 1 - i; }
  __device__ __forceinline__ int64_t begin_of(int t) const { return t >= 0 && t < longest_ ? task_.steps.begin(t) : t; }
  // How many of the rows have step t, not less than 0. The whole warp has to ask.
  __device__ __forceinline__ int rows_at(int t) const {
    const int row = static_cast<int>(threadIdx.x) % 32;
    return __popc(__ballot_sync(0xffffffffu, row < kResidentMaxRows && length(row % kResidentMaxRows) > t));
  }
  // Whether the pass has a row with step t, or one that step t comes after.
  __device__ __forceinline__ bool has_work(int pass, int t) const {
    return t < length(pass * kRows) + (task_.up ? task_.more_steps : 0);
  }

  // Adds up the parts of k, for the threads that have the first one.
  __device__ __forceinline__ void add_up(float (&sums)[kRuns][kRun], int buffer) const {
    const int thread = static_cast<int>(threadIdx.x), adders = task_.column_threads;
    const int others = static_cast<int>(blockDim.x) - adders;
    float* const from = sums_of_splits() + buffer * others * kSums;  // `others` of each of a thread's sums
    if (thread >= adders) {
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) from[(run * kRun + j) * others + thread - adders] = sums[run][j];
      }
    }
    if (!RNN_EXT_PLANTED(resident_no_sum_barrier)) __syncthreads();
    if (thread >= adders) return;
#pragma unroll 1
    for (int other = thread; other < others; other += adders) {
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) sums[run][j] += from[(run * kRun + j) * others + other];
      }
    }
  }
};

// ---- launches -------------------------------------------------------------------------------------------------------

template <typename T, class Params>
ResidentTask<T> resident_task(const Params& p, const ResidentKernel& k, const ResidentLaunch& l, void* workspace,
                              bool backward, int more_steps) {
  const int64_t H = p.hidden_size;
  return {p.steps,
          ResidentWeights<T>(p.weight_hh, H, backward),
          p.reverse == backward,
          l.block_rows,
          k.passes(l.block_rows),
          k.passes(l.block_rows) * k.rows,
          l.parts,
          k.columns(H, l.parts),
          l.splits,
          k.column_threads(H, l.parts),
          k.chunks(H, kDtype<T>),
          k.state_stride(H, kDtype<T>),
          static_cast<int>(ceil_div(H, k.run()) * k.run() * sizeof(T)),
          more_steps,
          static_cast<unsigned char*>(workspace),
          k.sharing == Sharing::kGrid ? GridWorkspace(k, p.steps.batch, H, kDtype<T>, l).states : 0};
}

// The launch of a kernel of row `k`, the way it shares U.
template <Sharing kSharing, typename T, class Kernel, class... Args>
cudaError_t launch_resident(Kernel kernel, const ResidentKernel& k, const ResidentTask<T>& task,
                            const ResidentLaunch& l, cudaStream_t stream, const Args&... args) {
  const int64_t H = task.weights.size;
  const dim3 grid(static_cast<unsigned>(l.slices(task.steps.batch) * l.parts)), block(k.threads(H, l));
  const size_t smem = k.smem_bytes(H, kDtype<T>, l);
  if constexpr (kSharing == Sharing::kNone) {
    return RNN_EXT_LAUNCH(kernel, grid, block, smem, stream, args...);
  } else if constexpr (kSharing == Sharing::kCluster) {
    return RNN_EXT_LAUNCH_CLUSTER(kernel, grid, block, dim3(l.parts), smem, stream, args...);
  } else {
    return RNN_EXT_LAUNCH_COOPERATIVE(kernel, grid, block, smem, stream, args...);
  }
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
