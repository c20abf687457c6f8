// The forward for a few batch rows: output = f(x Wᵀ + b_ih + h Uᵀ + b_hh) as dot products. A group of warps takes a few
// rows of [W | U] and multiplies them with all rows of [x | h]; every weight is read once, in 16-byte loads that are
// all started before the first is used. x and h are small and come from L1.
//
// What limits it is L2: an H100's 132 SMs see some 300 clocks of latency and take up to 64 bytes a clock each, which
// asks for 19 KiB in flight an SM. A thread has 4 or 8 loads of 16 bytes of weights under way, a block of 256 threads
// 16 or 32 KiB, and an SM has two blocks. K is shared among a block's warps until there is a block for every SM: at H =
// 256, fp32, a row of 512 is one load for each of 4 warps, and the whole problem one round of loads.
//
// Such a problem takes hardly longer than its launch. On sm_90 the launch overlaps the end of the kernel before it, and
// in that time the first weights are fetched to L2; nothing is read before that kernel has ended.
#pragma once
#include "cuda/blocks/epilogue.cuh"
#include "cuda/blocks/lanes.cuh"
#include "cuda/cell/forward.cuh"
#include "cuda/ptx/ptx_sm90.cuh"

namespace rnn_ext::cuda {

// ---- kernel ---------------------------------------------------------------------------------------------------------

// kBytes: 16 where all operands allow it, else the size of an element, at any strides.
template <typename T, int kBatch, int kRows, int kBytes>
struct ForwardGemvTraits {
  using Acc = Accumulator<T>;
  using Unit = Vector<T, kBytes>;
  static constexpr bool kVectors = kBytes > static_cast<int>(sizeof(T));
  static constexpr int kValues = kRows * kBatch;
  static constexpr int kRounds = kValues > 32 ? kValues / 32 : 1, kPerRound = kValues / kRounds;
  static constexpr int kLanesPerValue = 32 / kPerRound;
  // How many 16-byte loads of weights, and so how many units of K, a thread starts before it uses any: what fits 128
  // registers, where elements of 16 bits take more once they are converted.
  static constexpr int kWeightLoads = sizeof(T) == 8                 ? (kBatch > 4   ? 2
                                                                        : kBatch > 2 ? 4
                                                                                     : 8)
                                      : sizeof(T) == 2 || kBatch > 4 ? 4
                                                                     : 8;
  static constexpr int kUnroll = kVectors                       ? (kWeightLoads > kRows ? kWeightLoads / kRows : 1)
                                 : kBatch == 1                  ? 16
                                 : kBatch == 8 && sizeof(T) < 8 ? 4
                                                                : 2;

  struct Smem {
    Acc sums[kForwardGemvWarps][kValues];
  };
};

template <typename T, int kBatch, int kRows, int kBytes>
__global__ void __launch_bounds__(kForwardGemvWarps * 32, kBatch > 8 ? 1 : 2)
    forward_gemv(ForwardParams<T> p, int warps_per_row) {
  using G = ForwardGemvTraits<T, kBatch, kRows, kBytes>;
  using Acc = typename G::Acc;
  using Unit = typename G::Unit;
  using Smem = typename G::Smem;
  static_assert(sizeof(Smem) <= 48 * 1024, "fits without opting in to more shared memory");
  RNN_EXT_SMEM(Smem, smem);

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int part = warp % warps_per_row;  // of K
  const int64_t n0 = (int64_t{blockIdx.x} * (kForwardGemvWarps / warps_per_row) + warp / warps_per_row) * kRows;
  const int last_row =
      static_cast<int>(min(int64_t{kRows}, p.weights.hidden_size - n0)) - 1;  // may be negative: no rows
  const int last_batch = static_cast<int>(p.batch) - 1;

  ptx::let_next_launch_start();
  if (G::kVectors && last_row >= 0) {
    const int64_t units_x = p.weights.input_size / Unit::kSize;
    const int64_t units = units_x + (p.hx.data != nullptr ? p.weights.hidden_size / Unit::kSize : 0);
#pragma unroll
    for (int i = 0; i < G::kUnroll; ++i) {
      const int64_t u = part * 32 + lane + i * warps_per_row * 32;
      if (u >= units) break;
      const Matrix<T>& weight = u < units_x ? p.weights.weight_ih : p.weights.weight_hh;
      const T* const from = weight.data + n0 * weight.row_stride + (u < units_x ? u : u - units_x) * Unit::kSize;
#pragma unroll
      for (int r = 0; r < kRows; ++r) ptx::prefetch_to_l2(from + min(r, last_row) * weight.row_stride);
    }
  }
  if (!RNN_EXT_PLANTED(no_wait_for_previous_launch)) ptx::wait_for_previous_launch();

  Acc acc[kRows][kBatch] = {};
  const auto add = [&](const Unit(&w)[kRows], const Unit(&x)[kBatch]) {
#pragma unroll
    for (int i = 0; i < Unit::kSize; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) acc[r][b] += widen(w[r].v[i]) * widen(x[b].v[i]);
      }
    }
  };

  if (last_row >= 0) {
    // K in units, those of (x, W) first, then those of (h, U).
    const int64_t units_x = p.weights.input_size / Unit::kSize;
    const int64_t units = units_x + (p.hx.data != nullptr ? p.weights.hidden_size / Unit::kSize : 0);
    // Rows beyond the edge read the last one again, which costs nothing and spares the loop a test.
    const auto read = [&](int64_t u, Unit(&w)[kRows], Unit(&x)[kBatch]) {
      const bool first = u < units_x;
      const int64_t at = (first ? u : u - units_x) * Unit::kSize;
      const Matrix<T> weight = first ? p.weights.weight_ih : p.weights.weight_hh, operand = first ? p.input : p.hx;
      const T* from = weight.data + n0 * weight.row_stride + (G::kVectors ? at : at * weight.col_stride);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = RNN_EXT_PLANTED(no_gemv_row_bound) ? r : min(r, last_row);
        w[r] = *reinterpret_cast<const Unit*>(from + row * weight.row_stride);
      }
      from = operand.data + (G::kVectors ? at : at * operand.col_stride);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        x[b] = *reinterpret_cast<const Unit*>(from + min(b, last_batch) * operand.row_stride);
      }
    };

    const int64_t stride = warps_per_row * 32;
    for (int64_t u = part * 32 + lane; u < units; u += G::kUnroll * stride) {
      Unit w[G::kUnroll][kRows] = {}, x[G::kUnroll][kBatch] = {};  // zeros beyond the end
#pragma unroll
      for (int i = 0; i < G::kUnroll; ++i) {
        if (u + i * stride < units) read(u + i * stride, w[i], x[i]);
      }
#pragma unroll
      for (int i = 0; i < G::kUnroll; ++i) add(w[i], x[i]);
    }
    if constexpr (G::kVectors) {  // the elements behind the last whole vector
      const auto add_tail = [&](const Matrix<T>& weight, const Matrix<T>& operand, int64_t depth) {
        const int64_t k = depth / Unit::kSize * Unit::kSize + lane;
        if (part != 0 || (k >= depth && !RNN_EXT_PLANTED(no_gemv_k_bound)) || lane >= Unit::kSize) return;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            acc[r][b] += widen(weight.data[(n0 + min(r, last_row)) * weight.row_stride + k]) *
                         widen(operand.data[min(b, last_batch) * operand.row_stride + k]);
          }
        }
      };
      add_tail(p.weights.weight_ih, p.input, p.weights.input_size);
      if (p.hx.data != nullptr) add_tail(p.weights.weight_hh, p.hx, p.weights.hidden_size);
    }
  }

#pragma unroll
  for (int round = 0; round < G::kRounds; ++round) {
    Acc values[G::kPerRound];
#pragma unroll
    for (int i = 0; i < G::kPerRound; ++i) {
      values[i] = acc[(round * G::kPerRound + i) / kBatch][(round * G::kPerRound + i) % kBatch];
    }
    const Acc sum = sum_over_lanes<32>(values).v[0];
    if (lane % G::kLanesPerValue == 0) smem.sums[warp][round * G::kPerRound + lane / G::kLanesPerValue] = sum;
  }
  if (!RNN_EXT_PLANTED(no_gemv_barrier)) __syncthreads();

  // One thread an output adds the parts of K in order.
  const int groups = kForwardGemvWarps / warps_per_row;
  for (int e = static_cast<int>(threadIdx.x); e < groups * G::kValues; e += kForwardGemvWarps * 32) {
    const int group = e / G::kValues, row = e % G::kValues / kBatch, batch = e % kBatch;
    const int64_t n = (int64_t{blockIdx.x} * groups + group) * kRows + row;
    if (n >= p.weights.hidden_size || batch >= p.batch) continue;
    Acc z = 0;
    for (int w = 0; w < warps_per_row; ++w) z += smem.sums[group * warps_per_row + w][e % G::kValues];
    const Epilogue<T, 1> epilogue(p.weights.bias_ih, p.weights.bias_hh, p.weights.nonlinearity, n, 1);
    p.output[batch * p.weights.hidden_size + n] = epilogue.output(z);
  }
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <typename T, int kBatch, int kBytes>
cudaError_t launch_forward_gemv_of(const ForwardParams<T>& p, const ForwardPlan& plan, cudaStream_t stream) {
  constexpr int kRows = forward_gemv_rows(kBatch, kDtype<T>);
  return RNN_EXT_LAUNCH_EARLY(
      (forward_gemv<T, kBatch, kRows, kBytes>), dim3(static_cast<unsigned>(plan.blocks)), dim3(kForwardGemvWarps * 32),
      (sizeof(typename ForwardGemvTraits<T, kBatch, kRows, kBytes>::Smem)), stream, plan.early, p, plan.warps_per_row);
}

template <typename T>
cudaError_t launch_forward_gemv(const ForwardParams<T>& p, const ForwardPlan& plan, cudaStream_t stream) {
  constexpr int kMost = forward_gemv_max_batch(kDtype<T>), kVector = 16, kElement = static_cast<int>(sizeof(T));
  const bool vectors = common_vector_bytes(p) == 16;
  switch (forward_gemv_batch(p.batch, kDtype<T>, vectors)) {
    case 1:
      return vectors ? launch_forward_gemv_of<T, 1, kVector>(p, plan, stream)
                     : launch_forward_gemv_of<T, 1, kElement>(p, plan, stream);
    case 2:
      return launch_forward_gemv_of<T, 2, kVector>(p, plan, stream);
    case 4:
      return launch_forward_gemv_of<T, 4, kVector>(p, plan, stream);
    case 8:
      return vectors ? launch_forward_gemv_of<T, 8, kVector>(p, plan, stream)
                     : launch_forward_gemv_of<T, 8, kElement>(p, plan, stream);
    default:
      return vectors ? launch_forward_gemv_of<T, kMost, kVector>(p, plan, stream)
                     : launch_forward_gemv_of<T, kMost, kElement>(p, plan, stream);
  }
}

}  // namespace rnn_ext::cuda
