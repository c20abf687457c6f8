// The backward cell for large shapes on sm_90a, fp16 and bf16, in two launches. The first writes dz to a workspace and
// starts the bias gradient's sums; the second computes all that is left as tiles of wgmma.cuh, of two kinds:
//
//   data tiles      [grad_input | grad_hx] = dz [W | U]                     (B, I + H), K = H
//   weight tiles    [grad_weight_ih | grad_weight_hh] = dzᵀ [x | h]         (H, I + H), K = B
//
// The tensor cores read an operand along either index, so nothing is transposed on the way: whatever a tile needs of a
// matrix comes in boxes of 64 rows and 64 columns as they lie in memory, of dz one for each consumer. W, U, x and h
// have K rows in both kinds; only dz lies along K in the one and across it in the other.
//
// The kind with the longer K comes first, so that short tiles fill the end. Gradients nobody asked for have no tiles.
// Every element is summed up by one block in one order: bitwise the same from run to run.
#pragma once
#include "cuda/blocks/wgmma.cuh"
#include "cuda/cell/backward.cuh"

namespace rnn_ext::cuda {

// Of both arrays, the first is of the matrix of input_size columns, the second of the one of hidden_size.
struct BackwardWgmmaKind {
  bool is_data;
  int tiles_m;  // counts clusters
  int tiles_n[2];
  int k_tiles[2];  // 0 if there is no h: zeros
  CUtensorMap operand[2], gradient[2];

  __host__ __device__ int columns() const { return tiles_n[0] + tiles_n[1]; }
  __host__ __device__ int64_t size() const { return int64_t{tiles_m} * columns(); }
};

template <typename T>
struct BackwardWgmmaArguments {
  CUtensorMap dz;
  BackwardWgmmaKind kinds[2];  // in the order of the list
  const float* sums;           // (sums_rows, H), whose sum is grad_bias
  T *grad_bias, *grad_bias_copy;
  int64_t sums_rows, hidden_size;
};

// Calls f(kind, matrix, row, column, k_tiles) for each of this block's tiles, which starts there.
template <typename Shape, typename T, typename F>
__device__ __forceinline__ void for_each_tile(const BackwardWgmmaArguments<T>& p, int first, int step, int rank, F f) {
  const int front = static_cast<int>(p.kinds[0].size()), all = front + static_cast<int>(p.kinds[1].size());
  for (int index = first; index < all; index += step) {
    const BackwardWgmmaKind& kind = p.kinds[index < front ? 0 : 1];
    const TileAt<Shape> tile(index < front ? index : index - front, kind.tiles_m, kind.columns());
    const int matrix = tile.n < kind.tiles_n[0] ? 0 : 1;
    const int row = (tile.m * Shape::kCluster + rank) * Shape::BM;
    f(kind, matrix, row, (matrix == 0 ? tile.n : tile.n - kind.tiles_n[0]) * Shape::BN, kind.k_tiles[matrix]);
  }
}

// ---- the producer's warpgroup ---------------------------------------------------------------------------------------

// One thread.
template <typename Shape, typename T>
__device__ void fill_ring(const BackwardWgmmaArguments<T>& p, WgmmaRing<Shape>& ring, RingPosition<Shape::kStages>& at,
                          int first, int step, int rank) {
  constexpr int kBox = 64, kOwn = Shape::BN / Shape::kCluster;  // columns to load
  static_assert(Shape::BK == kBox && kOwn % kBox == 0);
  for_each_tile<Shape>(
      p, first, step, rank, [&](const BackwardWgmmaKind& kind, int matrix, int row, int column, int k_tiles) {
        const bool is_data = kind.is_data;
        const CUtensorMap* const operand = &kind.operand[RNN_EXT_PLANTED(backward_matrix_not_switched) ? 0 : matrix];
        fill_stages<Shape>(ring, at, k_tiles, [&](int k, T* a, T* b, uint64_t* full) {
          const int k0 = k * Shape::BK;
#pragma unroll
          for (int i = 0; i < Shape::BM; i += kBox) {
            const int m0 = row + (RNN_EXT_PLANTED(backward_same_box_twice) ? 0 : i);
            ptx::tma_load(a + i * kBox, &p.dz, is_data ? k0 : m0, is_data ? m0 : k0, full);
          }
#pragma unroll
          for (int i = 0; i < kOwn; i += kBox) {
            const int n = rank * kOwn + i;
            load_shared<Shape>(b + n * kBox, operand, column + n, k0, full);
          }
        });
      });
}

// grad_bias, by the warps that have nothing else to do.
template <typename Shape, typename T>
__device__ void add_up_bias(const BackwardWgmmaArguments<T>& p) {
  constexpr int kThreads = Shape::kAssistants;
  if (p.grad_bias == nullptr) return;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x - 32;
  for (int64_t n = first; n < p.hidden_size; n += int64_t{gridDim.x} * kThreads) {
    float sum = 0.f;
#pragma unroll 8
    for (int64_t i = RNN_EXT_PLANTED(backward_bias_row_left_out) ? 1 : 0; i < p.sums_rows; ++i)
      sum += p.sums[i * p.hidden_size + n];
    p.grad_bias[n] = narrow<T>(sum);
    if (p.grad_bias_copy != nullptr) p.grad_bias_copy[n] = narrow<T>(sum);
  }
}

// ---- the consumers --------------------------------------------------------------------------------------------------

// One warpgroup.
template <typename Shape, typename T>
__device__ void drain_ring(const BackwardWgmmaArguments<T>& p, WgmmaRing<Shape>& ring, int first, int step, int rank) {
  constexpr int kColumns = WgmmaRing<Shape>::kStoreColumns;
  const int warp = static_cast<int>(threadIdx.x) / 32 - 4;
  const bool is_leader = ptx::elect_one();
  RingPosition<Shape::kStages> at;
  int buffer = 0;
  for_each_tile<Shape>(p, first, step, rank,
                       [&](const BackwardWgmmaKind& kind, int matrix, int row, int column, int k_tiles) {
                         float acc[Shape::BN / 2];
#pragma unroll
                         for (float& v : acc) v = RNN_EXT_PLANTED(backward_zeros_left) ? 1.f : 0.f;
                         if (k_tiles > 0) {
                           if (kind.is_data || RNN_EXT_PLANTED(backward_kind_not_switched)) {
                             multiply<Shape, Major::kK, Major::kRows>(ring, at, k_tiles, rank, acc);
                           } else {
                             multiply<Shape, Major::kRows, Major::kRows>(ring, at, k_tiles, rank, acc);
                           }
                         }
                         store_rows<Shape>(&kind.gradient[matrix], ring, row + warp * 16, column, is_leader, buffer,
                                           [&](T* out, int part) {
                                             put_pairs(out, [&](int block, int i) {
                                               const float* const v = acc + (part * (kColumns / 8) + block) * 4 + i * 2;
                                               return float2{v[0], v[1]};
                                             });
                                           });
                       });
  if (is_leader) ptx::tma_store_wait_read<0>();
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <typename T>
__device__ void prefetch_tensor_maps(const BackwardWgmmaArguments<T>& p) {
  ptx::prefetch_tensor_map(&p.dz);
  for (const BackwardWgmmaKind& kind : p.kinds) {
    for (int i = 0; i < 2; ++i) {
      if (kind.k_tiles[i] > 0) ptx::prefetch_tensor_map(&kind.operand[i]);
      if (kind.tiles_n[i] > 0) ptx::prefetch_tensor_map(&kind.gradient[i]);
    }
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    backward_wgmma(const __grid_constant__ BackwardWgmmaArguments<typename Shape::T> p) {
  using Smem = WgmmaRing<Shape>;
  static_assert(sizeof(Smem) <= 227 * 1024, "what a block can have on sm_90");
  RNN_EXT_SMEM(Smem, ring);
  if (threadIdx.x == 0) prefetch_tensor_maps(p);
  run_specialised<Shape>(
      ring, [&](auto& at, int first, int step, int rank) { fill_ring<Shape>(p, ring, at, first, step, rank); },
      [&](int, int) { add_up_bias<Shape>(p); },
      [&](int first, int step, int rank) { drain_ring<Shape>(p, ring, first, step, rank); });
}

}  // namespace rnn_ext::cuda
