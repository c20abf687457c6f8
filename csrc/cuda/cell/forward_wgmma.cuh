// The forward cell for large shapes on sm_90a, in one launch: output = f(x Wᵀ + b_ih + h Uᵀ + b_hh), fp16, bf16 and
// fp32, which is rounded to tf32 where that is allowed and else made of three products of tf32. wgmma.cuh says how
// tiles of the output are computed.
//
// The two GEMMs are one over K = ⌈I / BK⌉ + ⌈H / BK⌉ k-tiles: at the first boundary the producer goes over from the
// tensor maps of (x, W) to those of (h, U), and nobody else notices.
//
// It is TMA that rounds to tf32, on its way to shared memory: tensor_map.cuh says what is known of how. A number too
// large for that may become an infinity, as it does in the other tf32 kernels.
//
// Where there are too few tiles for the GPU, the blocks of a cluster share the K of a tile. Each leaves its sums where
// its stages were, and adds up a part of the columns out of all blocks' shared memory, in the order of K: bitwise the
// same in every run.
//
// 3xtf32: a number is high + low, two tf32 numbers that keep 22 of its 24 bits, and a product is high high +
// high low + low high. The consumers split each stage in shared memory before they multiply it, the next one's while
// the tensor cores are busy with this one's. The tensor cores' own sums are truncated, which over a long K would be a
// drift; they serve for one stage alone, small products first, and are then added to sums that round to nearest.
#pragma once
#include <cfloat>

#include "cell/params.h"
#include "cuda/blocks/epilogue.cuh"
#include "cuda/blocks/wgmma.cuh"

namespace rnn_ext::cuda {

template <typename T>
struct ForwardWgmmaArguments {
  CUtensorMap input, hx, weight_ih, weight_hh, output;
  ForwardParams<T> params;
  int tiles_m, tiles_n;  // tiles of the output; tiles_m counts clusters
  int k_tiles_input, k_tiles_hx;
};

// The low parts lie as the high parts do.
template <typename Shape>
struct ForwardWgmmaLowSmem {
  float a_low[Shape::kLowStages][Shape::BM * Shape::BK];
  float b_low[Shape::kLowStages][Shape::BN * Shape::BK];
};

struct Nothing {};

template <typename Shape>
struct ForwardWgmmaSmem : std::conditional_t<Shape::kSplit, ForwardWgmmaLowSmem<Shape>, Nothing>, WgmmaRing<Shape> {
  float bias[2][Shape::BN];  // b_ih + b_hh, of this tile and of the next
  uint64_t bias_full[2], bias_empty[2];
  uint64_t sums_full, sums_read;  // where K is split: by the warps of all blocks that share it
};

// The k-tiles that are this block's.
struct KTiles {
  int begin, end;
};
template <typename Shape, typename T>
__device__ __forceinline__ KTiles k_tiles_of_block(const ForwardWgmmaArguments<T>& p) {
  const int all = p.k_tiles_input + p.k_tiles_hx, part = part_of_k<Shape>();
  return {all * part / Shape::kParts, all * (part + 1) / Shape::kParts};
}

// ---- the producer ---------------------------------------------------------------------------------------------------

// One thread.
template <typename Shape, typename T>
__device__ void fill_ring(const ForwardWgmmaArguments<T>& p, ForwardWgmmaSmem<Shape>& smem,
                          RingPosition<Shape::kStages>& at, int first, int step, int rank) {
  constexpr int kRowsOfB = Shape::BN / Shape::kCluster;
  const KTiles mine = k_tiles_of_block<Shape>(p);
  for (int index = first; index < p.tiles_m * p.tiles_n; index += step) {
    const TileAt<Shape> tile(index, p.tiles_m, p.tiles_n);
    const int m0 = (tile.m * Shape::kCluster + rank) * Shape::BM;
    const int n0 = tile.n * Shape::BN + rank * kRowsOfB;
    fill_stages<Shape>(smem, at, mine.end - mine.begin, [&](int i, T* a, T* b, uint64_t* full) {
      const int k = i + (RNN_EXT_PLANTED(same_part_of_k) ? 0 : mine.begin);
      const bool is_input = k < p.k_tiles_input;
      const int k0 = (is_input ? k : k - p.k_tiles_input) * Shape::BK;
      ptx::tma_load(a, is_input ? &p.input : &p.hx, k0, m0, full);
      const CUtensorMap* const weight = is_input || RNN_EXT_PLANTED(weights_not_switched) ? &p.weight_ih : &p.weight_hh;
      load_shared<Shape>(b + rank * kRowsOfB * Shape::BK, weight, k0, n0, full);
    });
  }
}

// The bias of every tile, by the warps that have nothing else to do: it is there long before the sums are.
template <typename Shape, typename T>
__device__ void fetch_bias(const ForwardWgmmaArguments<T>& p, ForwardWgmmaSmem<Shape>& smem, int first, int step) {
  RingPosition<2> at;
  for (int index = first; index < p.tiles_m * p.tiles_n; index += step, at.advance()) {
    const TileAt<Shape> tile(index, p.tiles_m, p.tiles_n);
    if (!RNN_EXT_PLANTED(bias_overwritten)) ptx::mbarrier_wait(&smem.bias_empty[at.stage], at.parity ^ 1);
    for (int i = static_cast<int>(threadIdx.x) - 32; i < Shape::BN; i += Shape::kAssistants) {
      const int n = tile.n * Shape::BN + i;
      const bool is_inside = n < p.params.weights.hidden_size;
      smem.bias[at.stage][i] =
          bias_at(p.params.weights.bias_ih, n, is_inside) + bias_at(p.params.weights.bias_hh, n, is_inside);
    }
    ptx::mbarrier_arrive(&smem.bias_full[at.stage]);
  }
}

// ---- the consumers --------------------------------------------------------------------------------------------------

// f(z), to be rounded to T. The logistic function is not made of tanh.approx, whose error far exceeds its small values.
template <typename T, Nonlinearity f>
__device__ __forceinline__ float activate_for(float z) {
  if constexpr (std::is_same_v<T, float>) return activate(z, f);
  if constexpr (f == Nonlinearity::kTanh) return ptx::tanh_approx(z);
  if constexpr (f == Nonlinearity::kRelu) return z < 0.f ? 0.f : z;
  return __fdividef(1.f, 1.f + __expf(-z));
}

// An element by the FP32 pipe, where three products gave NaN: that is what they make of every infinity, and of numbers
// that round to one.
template <Nonlinearity f>
__device__ __forceinline__ float recompute(const ForwardParams<float>& p, int64_t row, int64_t column, float bias) {
  if (row >= p.batch || column >= p.weights.hidden_size) return 0.f;
  float z = 0.f;
#pragma unroll 1
  for (int64_t k = 0; k < p.weights.input_size && z == z; ++k) {
    z = fmaf(p.input.data[row * p.input.row_stride + k],
             p.weights.weight_ih.data[column * p.weights.weight_ih.row_stride + k], z);
  }
#pragma unroll 1
  for (int64_t k = 0; k < p.weights.hidden_size && p.hx.data != nullptr && z == z; ++k) {
    z = fmaf(p.hx.data[row * p.hx.row_stride + k],
             p.weights.weight_hh.data[column * p.weights.weight_hh.row_stride + k], z);
  }
  return activate(z + bias, f);
}

// f(sums + bias) of this warp's 16 rows of the tile from (row, column) on.
template <Nonlinearity f, typename Shape, typename T>
__device__ void store_output(const ForwardWgmmaArguments<T>& p, ForwardWgmmaSmem<Shape>& smem,
                             const float (&acc)[Shape::BN / Shape::kParts / 2], const float* bias, int row, int column,
                             bool is_leader, int& buffer) {
  constexpr int kColumns = WgmmaRing<Shape>::kStoreColumns;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  store_rows<Shape, Shape::BN / Shape::kParts>(&p.output, smem, row, column, is_leader, buffer, [&](T* out, int part) {
    const auto pair = [&](int block, int i) {
      const int local = part * (kColumns / 8) + block;
      const float2 b = *reinterpret_cast<const float2*>(bias + local * 8 + lane % 4 * 2);
      const float* const z = acc + local * 4 + i * 2;
      return float2{activate_for<T, f>(z[0] + b.x), activate_for<T, f>(z[1] + b.y)};
    };
    if constexpr (sizeof(T) == 2) {
      put_pairs(out, pair);
    } else {
      const auto place = [&](int block, int i) {
        const int row_there = i * 8 + lane / 4, piece = (block * 2 + lane % 4 / 2) ^ (row_there % 8);
        return out + row_there * kColumns + piece * 4 + lane % 2 * 2;
      };
      bool is_nan = false;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 both = pair(i / 2, i % 2);
        is_nan |= both.x != both.x || both.y != both.y;
        *reinterpret_cast<float2*>(place(i / 2, i % 2)) = both;
      }
      if (Shape::kSplit && is_nan && !RNN_EXT_PLANTED(split_nan_left)) {
#pragma unroll 1
        for (int i = 0; i < 16; ++i) {
          float& v = place(i / 4, i / 2 % 2)[i % 2];
          const int local = part * kColumns + i / 4 * 8 + lane % 4 * 2 + i % 2;
          if (v != v) v = recompute<f>(p.params, row + i / 2 % 2 * 8 + lane / 4, column + local, bias[local]);
        }
      }
    }
  });
}

// Of `floats` numbers, the high parts where they are, and the low parts to `low`. By all consumers together.
template <typename Shape, int floats>
__device__ __forceinline__ void split(float* tile, float* low) {
  const auto round = [](float v) { return __uint_as_float(ptx::to_tf32(v)); };
#pragma unroll
  for (int i = (static_cast<int>(threadIdx.x) - 128) * 4; i < floats; i += Shape::kConsumerThreads * 4) {
    const float4 v = *reinterpret_cast<const float4*>(tile + i);
    const float4 high = {round(v.x), round(v.y), round(v.z), round(v.w)};
    *reinterpret_cast<float4*>(tile + i) = high;
    *reinterpret_cast<float4*>(low + i) = {round(v.x - high.x), round(v.y - high.y), round(v.z - high.z),
                                           round(v.w - high.w)};
  }
}

// The same as three products of tf32.
template <typename Shape>
__device__ __forceinline__ void multiply_split(ForwardWgmmaSmem<Shape>& smem, RingPosition<Shape::kStages>& at,
                                               int k_tiles, int rank, float (&sums)[Shape::BN / 2]) {
  constexpr int N = Shape::BN, kSteps = kTileRowBytes / 32;
  const int warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
  float of_stage[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sums[i] = 0.f;
  // Of a stage's low parts. It alternates from tile to tile, too: others may still multiply the last ones of the tile
  // before.
  static_assert(Shape::kStages % Shape::kLowStages == 0);
  const auto low = [&](int k) { return (RNN_EXT_PLANTED(low_parts_by_tile) ? k : at.stage) % Shape::kLowStages; };
  // Splits the stage that comes next, for all consumers to see once they have passed a barrier.
  const auto split_next = [&](int k) {
    ptx::mbarrier_wait(&smem.full[at.stage], at.parity);
    split<Shape, Shape::BM * Shape::BK>(smem.a[at.stage], smem.a_low[low(k)]);
    split<Shape, Shape::BN * Shape::BK>(smem.b[at.stage], smem.b_low[low(k)]);
    if (!RNN_EXT_PLANTED(split_no_proxy_fence)) ptx::fence_proxy_async();
  };
  const auto barrier = [] {
    if (!RNN_EXT_PLANTED(split_no_barrier)) ptx::named_barrier_sync(2, Shape::kConsumerThreads);
  };
  const auto start = [&](int k) {
    const int own = warpgroup * 64 * Shape::BK;
    const uint64_t a[2] = {ptx::wgmma_k_major(smem.a[at.stage] + own), ptx::wgmma_k_major(smem.a_low[low(k)] + own)};
    const uint64_t b[2] = {ptx::wgmma_k_major(smem.b[at.stage]), ptx::wgmma_k_major(smem.b_low[low(k)])};
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 3 * kSteps; ++i) {  // low high, high low, high high
      const int product = i / kSteps, step = i % kSteps;
      if (RNN_EXT_PLANTED(split_no_cross_term) && product == 1) continue;
      ptx::wgmma<float, N>(of_stage, ptx::wgmma_advance(a[product == 0], 32 * step),
                           ptx::wgmma_advance(b[product == 1], 32 * step),
                           i > 0 || (k > 0 && RNN_EXT_PLANTED(split_long_sums)));
    }
    ptx::wgmma_commit();
  };
  const auto add_stage = [&](int stage) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[i] = RNN_EXT_PLANTED(split_long_sums) ? of_stage[i] : sums[i] + of_stage[i];
    release_stage(smem, stage, rank);
  };
  split_next(0);
  barrier();
  start(0);
  for (int k = 1; k < k_tiles; ++k) {
    const int previous = at.stage;
    at.advance();
    split_next(k);
    ptx::wgmma_wait_all(of_stage);
    barrier();  // which also says that everyone is done with the low parts that split_next(k + 1) will overwrite
    add_stage(previous);
    start(k);
  }
  ptx::wgmma_wait_all(of_stage);
  add_stage(at.stage);
  at.advance();
}

// Where K is split: the sums of all parts of it, of this block's part of the columns. The stages have been read by
// everyone, and none are to come.
template <typename Shape>
__device__ __forceinline__ void add_up_parts(ForwardWgmmaSmem<Shape>& smem, int rank, const float (&own)[Shape::BN / 2],
                                             float (&all)[Shape::BN / Shape::kParts / 2]) {
  constexpr int kVectors = Shape::BN / 8;  // a thread's, of four sums each
  static_assert(sizeof smem.b >= kVectors * Shape::kConsumerThreads * sizeof(float4) && kVectors % Shape::kParts == 0);
  const int consumer = static_cast<int>(threadIdx.x) - 128, lane = consumer % 32;
  auto* const sums = reinterpret_cast<float4*>(smem.b) + consumer;
  if (!RNN_EXT_PLANTED(sums_over_stages)) ptx::named_barrier_sync(1, Shape::kConsumerThreads);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    sums[i * Shape::kConsumerThreads] = {own[4 * i], own[4 * i + 1], own[4 * i + 2], own[4 * i + 3]};
  }
  __syncwarp();
  if (lane < Shape::kParts) {
    const uint32_t there = ptx::cluster_address(&smem.sums_full, lane * Shape::kCluster + rank);
    if (RNN_EXT_PLANTED(sums_not_released)) {
      ptx::mbarrier_arrive_cluster(there);
    } else {
      ptx::mbarrier_arrive_release_cluster(there);
    }
  }
  if (!RNN_EXT_PLANTED(no_wait_for_sums)) ptx::mbarrier_wait_acquire_cluster(&smem.sums_full, 0);
#pragma unroll
  for (float& v : all) v = 0.f;
  const float4* const from = sums + part_of_k<Shape>() * (kVectors / Shape::kParts) * Shape::kConsumerThreads;
#pragma unroll
  for (int part = 0; part < Shape::kParts; ++part) {
    const uint32_t there = ptx::cluster_address(from, part * Shape::kCluster + rank);
#pragma unroll
    for (int i = 0; i < kVectors / Shape::kParts; ++i) {
      const auto v = ptx::ld_cluster<float4>(there + i * Shape::kConsumerThreads * sizeof(float4));
      all[4 * i] += v.x, all[4 * i + 1] += v.y, all[4 * i + 2] += v.z, all[4 * i + 3] += v.w;
    }
  }
}

// One warpgroup.
template <typename Shape, typename T>
__device__ void drain_ring(const ForwardWgmmaArguments<T>& p, ForwardWgmmaSmem<Shape>& smem, int first, int step,
                           int rank) {
  const int consumer = static_cast<int>(threadIdx.x) - 128;
  const bool is_leader = ptx::elect_one();
  float acc[Shape::BN / 2];
  RingPosition<Shape::kStages> at;
  RingPosition<2> bias_at;
  if (RNN_EXT_PLANTED(wrong_phase)) at.parity = 1;
  int out_buffer = 0;
  const KTiles mine = k_tiles_of_block<Shape>(p);
  for (int index = first; index < p.tiles_m * p.tiles_n; index += step, bias_at.advance()) {
    const TileAt<Shape> tile(index, p.tiles_m, p.tiles_n);
    const int m0 = (tile.m * Shape::kCluster + rank) * Shape::BM, n0 = tile.n * Shape::BN;
    if constexpr (Shape::kSplit) {
      multiply_split<Shape>(smem, at, mine.end - mine.begin, rank, acc);
    } else {
      multiply<Shape>(smem, at, mine.end - mine.begin, rank, acc);
    }

    if (!RNN_EXT_PLANTED(no_wait_for_bias)) ptx::mbarrier_wait(&smem.bias_full[bias_at.stage], bias_at.parity);
    const int row = m0 + consumer / 32 * 16;
    const auto store = [&](const float(&sums)[Shape::BN / Shape::kParts / 2]) {
      const int column = part_of_k<Shape>() * (Shape::BN / Shape::kParts);
      const float* const bias = smem.bias[bias_at.stage] + column;
      switch (p.params.weights.nonlinearity) {
        case Nonlinearity::kTanh:
          store_output<Nonlinearity::kTanh>(p, smem, sums, bias, row, n0 + column, is_leader, out_buffer);
          break;
        case Nonlinearity::kRelu:
          store_output<Nonlinearity::kRelu>(p, smem, sums, bias, row, n0 + column, is_leader, out_buffer);
          break;
        case Nonlinearity::kSigmoid:
          store_output<Nonlinearity::kSigmoid>(p, smem, sums, bias, row, n0 + column, is_leader, out_buffer);
          break;
      }
    };
    if constexpr (Shape::kParts == 1) {
      store(acc);
    } else {
      float sums[Shape::BN / Shape::kParts / 2];
      add_up_parts<Shape>(smem, rank, acc, sums);
      store(sums);
      // What was loaded is there, as it has been stored. This block must not exit before the others can say so.
      const int lane = consumer % 32;
      if (lane < Shape::kParts) {
        ptx::mbarrier_arrive_release_cluster(ptx::cluster_address(&smem.sums_read, lane * Shape::kCluster + rank));
      }
    }
    if (Shape::kParts > 1) break;  // one tile alone: the compiler need not keep `acc` for the next
    if (is_leader) ptx::mbarrier_arrive(&smem.bias_empty[bias_at.stage]);  // the warp had to meet after its last use
  }
  if (RNN_EXT_PLANTED(no_wait_for_wgmma)) ptx::wgmma_wait_all(acc);
  if (is_leader) ptx::tma_store_wait_read<0>();
  if (Shape::kParts > 1 && !RNN_EXT_PLANTED(sums_not_kept)) ptx::mbarrier_wait_acquire_cluster(&smem.sums_read, 0);
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Thread 0, first of all.
template <typename Shape, typename T>
__device__ void prepare(const ForwardWgmmaArguments<T>& p, ForwardWgmmaSmem<Shape>& smem) {
  ptx::prefetch_tensor_map(&p.input);
  ptx::prefetch_tensor_map(&p.weight_ih);
  if (p.k_tiles_hx > 0) ptx::prefetch_tensor_map(&p.hx);
  if (p.k_tiles_hx > 0) ptx::prefetch_tensor_map(&p.weight_hh);
  ptx::prefetch_tensor_map(&p.output);
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(&smem.bias_full[i], Shape::kAssistants);
    ptx::mbarrier_init(&smem.bias_empty[i], Shape::kConsumerThreads / 32);
  }
  ptx::mbarrier_init(&smem.sums_full, Shape::kParts * Shape::kConsumerThreads / 32);
  ptx::mbarrier_init(&smem.sums_read, Shape::kParts * Shape::kConsumerThreads / 32);
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    forward_wgmma(const __grid_constant__ ForwardWgmmaArguments<typename Shape::T> p) {
  using Smem = ForwardWgmmaSmem<Shape>;
  static_assert(sizeof(Smem) <= 227 * 1024, "what a block can have on sm_90");
  RNN_EXT_SMEM(Smem, smem);
  if (threadIdx.x == 0) prepare(p, smem);
  run_specialised<Shape>(
      smem, [&](auto& at, int first, int step, int rank) { fill_ring<Shape>(p, smem, at, first, step, rank); },
      [&](int first, int step) { fetch_bias<Shape>(p, smem, first, step); },
      [&](int first, int step, int rank) { drain_ring<Shape>(p, smem, first, step, rank); });
}

}  // namespace rnn_ext::cuda
