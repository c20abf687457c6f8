// The backward cell for B <= 8, in one launch. There is too little reuse for tiles; what counts is that the weights are
// read and their gradients written once, in wide accesses, with many of them in flight.
//
// A block owns a strip of columns of [W | U] and walks down all H rows of it. Row k of the strip takes part twice, each
// time with the same eight or fewer numbers dz[:, k]:
//
//   [grad_input | grad_hx][:, strip] += dz[:, k] [W | U][k, strip]               (a transposed gemv: Σ over k)
//   [grad_weight_ih | grad_weight_hh][k, strip] = dz[:, k]ᵀ [x | h][:, strip]    (an outer product)
//
// so one pass serves both, with the sums over k and the strip of [x | h] in registers. dz is formed once a block and
// kept in shared memory. No block waits for another: a strip needs all of K, which the rows of the block's threads and
// then a reduction through shared memory, in a fixed order, cover. Strips are as narrow as it takes to occupy the GPU,
// down to a 32-byte sector.
#pragma once
#include <cstdint>

#include "cuda/blocks/operand.cuh"
#include "cuda/cell/backward.cuh"

namespace rnn_ext::cuda {

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Neighbouring elements that move in one access.
template <typename T, int n>
struct alignas(n * sizeof(T)) Pack {
  T v[n];
};

template <typename T, int kBatch_>
struct BackwardGemvTraits {
  using Acc = Accumulator<T>;
  static constexpr int kBatch = kBatch_;
  static constexpr int kThreads = 256;
  // On a multiprocessor: one loads dz while another streams. Eight rows of doubles take too many registers for two.
  static constexpr int kMinBlocks = sizeof(Acc) * kBatch > 32 ? 1 : 2;
  // Columns of a thread: 16 bytes, or 8 where the kBatch × columns sums, and as many operands, would take more than 64
  // registers. Where rows are not aligned for that, two or one, accessed one by one.
  static constexpr int kWide = sizeof(T) == 2 && kBatch == kBackwardGemvMaxBatch ? 4 : 16 / sizeof(T);
  static constexpr int kNarrow = sizeof(T) == 2 ? 2 : 1;
  static constexpr int kUnroll = kBatch * kWide * sizeof(Acc) >= 64 ? 4 : 8;  // loads in flight: as registers allow
  static constexpr int kDzRows = 32 * 1024 / (kBatch * sizeof(Acc));
  static constexpr int kMinLanes = 32 / (kWide * sizeof(T));
  static constexpr int kMaxLanes = 128 / (kWide * sizeof(T));
  static_assert(kMaxLanes <= 32, "the reduction ends within a warp");
  static_assert(kDzRows % (kUnroll * kThreads / kMinLanes) == 0, "steps do not straddle refills of dz");
};

template <typename Traits>
union BackwardGemvSmem {
  using Acc = typename Traits::Acc;
  Pack<Acc, Traits::kBatch> dz[Traits::kDzRows];
  Acc partial[Traits::kBatch * Traits::kWide][Traits::kThreads];
};

template <typename T>
struct BackwardGemvSide : BackwardSide<T> {
  int64_t strips;
  int lanes_log2;  // threads across a strip
  bool wide;       // all rows are aligned for kWide elements
};

template <typename T>
struct BackwardGemvParams {
  Matrix<T> grad_output, output;
  BackwardGemvSide<T> hh, ih;
  T *grad_bias, *grad_bias_copy;
  int64_t batch, hidden_size;
  Derivative<Accumulator<T>> derivative;
};

// How neighbouring elements move: all of them in one access, or one by one.
enum class Access { kWide, kSingle };

// `columns` of n neighbouring elements, zeros beyond; where access is wide, columns is n or 0.
template <int n, Access kAccess, typename T>
__device__ __forceinline__ Pack<T, n> load_pack(const T* p, int64_t stride, int columns) {
  Pack<T, n> pack = {};
  if constexpr (kAccess == Access::kWide) {
    if (columns > 0) pack = *reinterpret_cast<const Pack<T, n>*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i < columns || RNN_EXT_PLANTED(gemv_no_column_bound)) pack.v[i] = p[i * stride];
    }
  }
  return pack;
}

template <int n, Access kAccess, typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, n>& pack, int columns) {
  if constexpr (kAccess == Access::kWide) {
    if (columns > 0) *reinterpret_cast<Pack<T, n>*>(p) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i < columns) p[i] = pack.v[i];
    }
  }
}

// dz of all batch rows at column k; zeros for the rows past the batch.
template <typename Traits, typename T>
__device__ __forceinline__ Pack<typename Traits::Acc, Traits::kBatch> backward_gemv_dz(const BackwardGemvParams<T>& p,
                                                                                       int64_t k) {
  using Acc = typename Traits::Acc;
  T grad[Traits::kBatch], output[Traits::kBatch];
#pragma unroll
  for (int b = 0; b < Traits::kBatch; ++b) {  // all loads before the first use, and without branches
    const int64_t row = min(int64_t(b), p.batch - 1);
    grad[b] = p.grad_output.data[row * p.grad_output.row_stride + k * p.grad_output.col_stride];
    output[b] = p.output.data[row * p.output.row_stride + k * p.output.col_stride];
  }
  Pack<Acc, Traits::kBatch> dz;
#pragma unroll
  for (int b = 0; b < Traits::kBatch; ++b) {
    dz.v[b] = b < p.batch ? p.derivative.dz(widen(grad[b]), widen(output[b])) : Acc(0);
  }
  return dz;
}

// One strip, whose rows are accessed n columns a thread.
template <typename Traits, int n, Access kAccess, typename T>
__device__ __forceinline__ void backward_gemv_strip(const BackwardGemvParams<T>& p, const BackwardGemvSide<T>& side,
                                                    int64_t strip, bool writes_bias, BackwardGemvSmem<Traits>& smem) {
  using Acc = typename Traits::Acc;
  constexpr int kBatch = Traits::kBatch, kUnroll = Traits::kUnroll;
  const int thread = static_cast<int>(threadIdx.x);
  const int lanes = 1 << side.lanes_log2, rows = Traits::kThreads >> side.lanes_log2;
  const int64_t strip_start = strip * lanes * n;
  const int64_t column = strip_start + (thread & (lanes - 1)) * n;
  const int columns = static_cast<int>(max(int64_t(0), min(int64_t(n), side.columns - column)));
  const int row = thread >> side.lanes_log2;
  const bool has_operand = side.operand.data && side.grad_weight;

  // Each weight's next value is on its way as soon as the previous one is used, across barriers too.
  Pack<T, n> weight[kUnroll];
  const T* next = side.weight.data + row * side.weight.row_stride + column * side.weight.col_stride;
  const int64_t next_stride = rows * side.weight.row_stride;
  const auto load_weight = [&](int64_t k) {
    Pack<T, n> pack = {};
    const bool inside = k < p.hidden_size || RNN_EXT_PLANTED(gemv_no_row_bound);
    if (side.grad_operand && inside) pack = load_pack<n, kAccess>(next, side.weight.col_stride, columns);
    next += next_stride;
    return pack;
  };
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) weight[u] = load_weight(row + u * rows);

  Acc operand[kBatch][n], acc[kBatch][n];
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    Pack<T, n> pack = {};
    if (has_operand && b < p.batch) {
      const int64_t offset = b * side.operand.row_stride + column * side.operand.col_stride;
      pack = load_pack<n, kAccess>(side.operand.data + offset, side.operand.col_stride, columns);
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      operand[b][i] = widen(pack.v[i]);
      acc[b][i] = 0;
    }
  }

  const int step = kUnroll * rows;
  T* out = side.grad_weight + row * side.columns + column;
  for (int64_t first = 0; first < p.hidden_size; first += Traits::kDzRows) {
    const int end = static_cast<int>(min(int64_t(Traits::kDzRows), p.hidden_size - first));
    if (first > 0 && !RNN_EXT_PLANTED(gemv_no_barrier_before_refill)) __syncthreads();
    // Rows past the end, up to a whole step, are zeros.
    for (int r = thread; r < (end + step - 1) / step * step; r += Traits::kThreads) {
      Pack<Acc, kBatch> dz = {};
      if (r < end && p.batch > 0) dz = backward_gemv_dz<Traits>(p, first + r);
      smem.dz[r] = dz;
      if (writes_bias && r < end) {
        Acc sum = dz.v[0];
#pragma unroll
        for (int b = 1; b < kBatch; ++b) sum += dz.v[b];
        p.grad_bias[first + r] = narrow<T>(sum);
        if (p.grad_bias_copy) p.grad_bias_copy[first + r] = narrow<T>(sum);
      }
    }
    if (!RNN_EXT_PLANTED(gemv_no_barrier_after_fill)) __syncthreads();

    for (int r0 = row; r0 < end; r0 += step) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int r = r0 + u * rows;
        const Pack<Acc, kBatch> dz = smem.dz[r];
        if (side.grad_operand) {
#pragma unroll
          for (int i = 0; i < n; ++i) {
            const Acc w = widen(weight[u].v[i]);
#pragma unroll
            for (int b = 0; b < kBatch; ++b) acc[b][i] += dz.v[b] * w;
          }
          weight[u] = load_weight(first + r + step);
        }
        if (side.grad_weight && (r < end || RNN_EXT_PLANTED(gemv_no_row_bound))) {
          Pack<T, n> pack;
#pragma unroll
          for (int i = 0; i < n; ++i) {
            Acc sum = dz.v[0] * operand[0][i];
#pragma unroll
            for (int b = 1; b < kBatch; ++b) sum += dz.v[b] * operand[b][i];
            pack.v[i] = narrow<T>(has_operand ? sum : Acc(0));  // no hx: exact zeros, whatever dz holds
          }
          store_pack<n, kAccess>(out, pack, columns);
        }
        out += rows * side.columns;
      }
    }
  }
  if (!side.grad_operand) return;

  // The sum over the block's rows: a warp takes all threads' share of one (b, i), then its lanes of one column.
  if (!RNN_EXT_PLANTED(gemv_no_barrier_before_reduction)) __syncthreads();
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
#pragma unroll
    for (int i = 0; i < n; ++i) smem.partial[b * n + i][thread] = acc[b][i];
  }
  __syncthreads();
  const int lane = thread % 32;
  for (int value = thread / 32; value < kBatch * n; value += Traits::kThreads / 32) {
    Acc sum = 0;
#pragma unroll
    for (int t = 0; t < Traits::kThreads; t += 32) sum += smem.partial[value][t + lane];
    for (int offset = 16; offset >= lanes; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    const int b = value / n;
    const int64_t c = strip_start + lane * n + value % n;
    if (lane < lanes && b < p.batch && c < side.columns) side.grad_operand[b * side.columns + c] = narrow<T>(sum);
  }
}

template <typename T, int kBatch>
__global__ void __launch_bounds__(BackwardGemvTraits<T, kBatch>::kThreads, BackwardGemvTraits<T, kBatch>::kMinBlocks)
    backward_gemv(BackwardGemvParams<T> p) {
  using Traits = BackwardGemvTraits<T, kBatch>;
  using Smem = BackwardGemvSmem<Traits>;
  static_assert(sizeof(Smem) <= 48 * 1024, "fits without opting in to more shared memory");
  RNN_EXT_SMEM(Smem, smem);
  const bool is_hh = blockIdx.x < p.hh.strips;
  const BackwardGemvSide<T>& side = is_hh ? p.hh : p.ih;
  const int64_t strip = is_hh ? blockIdx.x : blockIdx.x - p.hh.strips;
  const bool writes_bias = p.grad_bias && (blockIdx.x == 0 || RNN_EXT_PLANTED(gemv_every_block_writes_bias));
  if (side.wide) {
    backward_gemv_strip<Traits, Traits::kWide, Access::kWide>(p, side, strip, writes_bias, smem);
  } else {
    backward_gemv_strip<Traits, Traits::kNarrow, Access::kSingle>(p, side, strip, writes_bias, smem);
  }
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <typename Traits, typename T>
BackwardGemvSide<T> backward_gemv_side(const BackwardSide<T>& s, int strip_bytes) {
  BackwardGemvSide<T> side;
  static_cast<BackwardSide<T>&>(side) = s;
  if (s.grad_operand == nullptr) side.weight = {};
  if (s.grad_weight == nullptr) side.operand = {};
  const auto aligned = [](const Matrix<T>& m) {
    constexpr int64_t kWideBytes = Traits::kWide * sizeof(T);
    return m.data == nullptr || (m.col_stride == 1 && lines_are_aligned(m.data, m.row_stride, kWideBytes));
  };
  side.wide = aligned(side.weight) && aligned(side.operand) && aligned({s.grad_weight, s.columns});
  const int lanes = strip_bytes / ((side.wide ? Traits::kWide : Traits::kNarrow) * int(sizeof(T)));
  side.lanes_log2 = 0;
  while (1 << side.lanes_log2 < lanes) ++side.lanes_log2;
  const bool wanted = s.grad_operand != nullptr || s.grad_weight != nullptr;
  side.strips = wanted ? ceil_div(s.columns * int64_t(sizeof(T)), strip_bytes) : 0;
  return side;
}

template <typename T, int kBatch>
cudaError_t launch_backward_gemv_of(const BackwardParams<T>& p, const BackwardPlan& plan, cudaStream_t stream) {
  using Traits = BackwardGemvTraits<T, kBatch>;
  BackwardGemvParams<T> q;
  q.grad_output = p.grad_output;
  q.output = p.output;
  q.hh = backward_gemv_side<Traits>(hidden_side(p), plan.strip_bytes);
  q.ih = backward_gemv_side<Traits>(input_side(p), plan.strip_bytes);
  q.grad_bias = p.grad_bias;
  q.grad_bias_copy = p.grad_bias_copy;
  q.batch = p.batch;
  q.hidden_size = p.weights.hidden_size;
  q.derivative = Derivative<Accumulator<T>>(p.weights.nonlinearity);
  // The bias needs one block, even if it is the only gradient asked for.
  if (q.hh.strips + q.ih.strips == 0 && p.grad_bias) q.hh.strips = 1;
  return RNN_EXT_LAUNCH((backward_gemv<T, kBatch>), dim3(static_cast<unsigned>(plan.blocks)), dim3(Traits::kThreads),
                        sizeof(BackwardGemvSmem<Traits>), stream, q);
}

template <typename T>
cudaError_t launch_backward_gemv(const BackwardParams<T>& p, const BackwardPlan& plan, cudaStream_t stream) {
  if (p.batch <= 1) return launch_backward_gemv_of<T, 1>(p, plan, stream);
  if (p.batch <= 2) return launch_backward_gemv_of<T, 2>(p, plan, stream);
  if (p.batch <= 4) return launch_backward_gemv_of<T, 4>(p, plan, stream);
  return launch_backward_gemv_of<T, 8>(p, plan, stream);
}

}  // namespace rnn_ext::cuda
