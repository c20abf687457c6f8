// The forward cell for large shapes on sm_90a, in one launch: output = f(x Wᵀ + b_ih + h Uᵀ + b_hh), fp16 and bf16.
//
// One block a multiprocessor stays for the whole launch and takes tile after tile of the output. One thread of its
// first warpgroup, the producer, has the copy engine fill a ring of stages in shared memory; two more warpgroups
// multiply them with wgmma, 64 rows of the tile each. The two GEMMs are one over K = ⌈I / BK⌉ + ⌈H / BK⌉ k-tiles: at
// the first boundary the producer goes over from the tensor maps of (x, W) to those of (h, U), and nobody else notices.
// What a box has beyond the end of a matrix is zero, so that ragged sizes cost nothing and need no code. The ring runs
// on across tiles: the next tile's stages fill while this one's epilogue works.
//
// In a cluster of two, the blocks take tiles one below the other. They need the same weights: each loads half of
// them, into both.
#pragma once
#include "math.cuh"
#include "ptx_sm90.cuh"
#include "tensor_map.cuh"

namespace rnn_ext::cuda {

template <typename T_, int BN_, int kCluster_>
struct WgmmaShape {
  using T = T_;
  static constexpr int BM = 128, BN = BN_, BK = kTileRowBytes / sizeof(T), kCluster = kCluster_;
  static constexpr int kConsumers = BM / 64;  // warpgroups
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kStageBytes = (BM + BN) * kTileRowBytes;
  static constexpr int kStages = 192 * 1024 / kStageBytes;                 // 4, 6 and 8 for BN = 256, 128 and 64
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // BN = 256 has 128 accumulators a thread
  static_assert(sizeof(T) == 2, "the epilogue stores 16-bit pairs");
  static_assert(BN % 64 == 0 && BN <= 256 && BN / kCluster <= 256, "one wgmma, one box");
  static_assert(128 * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536, "what a multiprocessor has");
  static_assert(kStages >= 4);
};

template <typename T>
struct WgmmaArguments {
  CUtensorMap input, hx, weight_ih, weight_hh, output;
  const T* bias_ih;
  const T* bias_hh;
  int hidden_size;
  int tiles_m, tiles_n;  // tiles of the output; tiles_m counts clusters
  int k_tiles_input, k_tiles_hx;
  Nonlinearity nonlinearity;
};

// All tiles start at multiples of 1024 bytes, where the swizzle is in phase.
template <typename Shape>
struct WgmmaSmem {
  using T = typename Shape::T;
  static constexpr int kStoreRows = 16, kStoreColumns = 64;  // of the output, by one warp at a time
  T a[Shape::kStages][Shape::BM * Shape::BK];
  T b[Shape::kStages][Shape::BN * Shape::BK];
  T out[4 * Shape::kConsumers][2][kStoreRows * kStoreColumns];
  float bias[2][Shape::BN];  // b_ih + b_hh, of this tile and of the one before
  uint64_t full[Shape::kStages], empty[Shape::kStages];
};

// A place in the ring, and the parity of its current use.
template <typename Shape>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == Shape::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The persistent order: bands of tiles 2048 rows high, each walked column by column. So the tiles that the
// multiprocessors work on at one time form a patch about as wide as high, which is what needs the fewest bytes from
// memory.
template <typename Shape>
struct TileAt {
  int m, n;
  __device__ TileAt(int index, int tiles_m, int tiles_n) {
    constexpr int kBand = 2048 / Shape::BM / Shape::kCluster;
    const int band = index / (kBand * tiles_n), in_band = index % (kBand * tiles_n);
    const int rows = min(kBand, tiles_m - band * kBand);
    m = band * kBand + in_band % rows;
    n = in_band / rows;
  }
};

// ---- the producer ---------------------------------------------------------------------------------------------------

// One thread.
template <typename Shape, typename T>
__device__ void fill_ring(const WgmmaArguments<T>& p, WgmmaSmem<Shape>& smem, int first, int step, int rank) {
  constexpr int kRowsOfB = Shape::BN / Shape::kCluster;
  RingPosition<Shape> at;
  for (int index = first; index < p.tiles_m * p.tiles_n; index += step) {
    const TileAt<Shape> tile(index, p.tiles_m, p.tiles_n);
    const int m0 = (tile.m * Shape::kCluster + rank) * Shape::BM;
    const int n0 = tile.n * Shape::BN + rank * kRowsOfB;
    for (int k = 0; k < p.k_tiles_input + p.k_tiles_hx; ++k, at.advance()) {
      const bool is_input = k < p.k_tiles_input;
      const int k0 = (is_input ? k : k - p.k_tiles_input) * Shape::BK;
      uint64_t* const full = &smem.full[at.stage];
      ptx::mbarrier_wait(&smem.empty[at.stage], at.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, Shape::kStageBytes - (RNN_EXT_PLANTED(wrong_byte_count) ? 128 : 0));
      ptx::tma_load(smem.a[at.stage], is_input ? &p.input : &p.hx, k0, m0, full);
      const CUtensorMap* const weight = is_input || RNN_EXT_PLANTED(weights_not_switched) ? &p.weight_ih : &p.weight_hh;
      T* const b = smem.b[at.stage] + rank * kRowsOfB * Shape::BK;
      if constexpr (Shape::kCluster == 1) {
        ptx::tma_load(b, weight, k0, n0, full);
      } else {
        ptx::tma_load_multicast(b, weight, k0, n0, full, (1 << Shape::kCluster) - 1);
      }
    }
  }
}

// ---- the consumers --------------------------------------------------------------------------------------------------

// f(z), to be rounded to 16 bits. The logistic function is not made of tanh.approx, whose error far exceeds its small
// values.
template <Nonlinearity f>
__device__ __forceinline__ float activate_for_16_bits(float z) {
  if constexpr (f == Nonlinearity::kTanh) return ptx::tanh_approx(z);
  if constexpr (f == Nonlinearity::kRelu) return z < 0.f ? 0.f : z;
  return __fdividef(1.f, 1.f + __expf(-z));
}

// One warp's 16 rows from (row, column) on: bias, activation, and out through shared memory, 64 columns at a time in
// two buffers. The copy engine leaves out what lies beyond the matrix.
template <Nonlinearity f, typename Shape, typename T>
__device__ void store_rows(const WgmmaArguments<T>& p, WgmmaSmem<Shape>& smem, const float (&acc)[Shape::BN / 2],
                           const float* bias, int row, int column, bool is_leader, int& buffer) {
  using Smem = WgmmaSmem<Shape>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32 - 4;
  // stmatrix takes the upper and the lower 8 rows of two 8-column blocks, and from this lane the address of this row:
  const int matrix = lane / 8, matrix_row = matrix % 2 * 8 + lane % 8;
#pragma unroll
  for (int part = 0; part < Shape::BN / Smem::kStoreColumns; ++part, buffer ^= 1) {
    T* const out = smem.out[warp][buffer];
    if (is_leader && !RNN_EXT_PLANTED(no_wait_for_stores)) ptx::tma_store_wait_read<1>();
    __syncwarp();
#pragma unroll
    for (int block = 0; block < 8; block += 2) {
      uint32_t fragment[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int local = part * 8 + block + i / 2;  // the 8-column block, within the tile
        const float2 b = *reinterpret_cast<const float2*>(bias + local * 8 + lane % 4 * 2);
        const float* const z = acc + local * 4 + i % 2 * 2;
        fragment[i] = pack<T>(activate_for_16_bits<f>(z[0] + b.x), activate_for_16_bits<f>(z[1] + b.y));
      }
      const int piece = (block + matrix / 2) ^ (matrix_row % 8);
      ptx::stmatrix_x4(out + matrix_row * Smem::kStoreColumns + piece * 8, fragment);
    }
    if (!RNN_EXT_PLANTED(no_proxy_fence)) ptx::fence_proxy_async();
    __syncwarp();
    if (is_leader) {
      ptx::tma_store(&p.output, out, column + part * Smem::kStoreColumns, row);
      ptx::tma_store_commit();
    }
  }
}

// One warpgroup.
template <typename Shape, typename T>
__device__ void drain_ring(const WgmmaArguments<T>& p, WgmmaSmem<Shape>& smem, int first, int step, int rank) {
  constexpr int kConsumerThreads = 128 * Shape::kConsumers;
  const int consumer = static_cast<int>(threadIdx.x) - 128, warpgroup = consumer / 128;
  const bool is_leader = ptx::elect_one();
  const auto release = [&](int stage) {
    const int peer = consumer % 128;
    if (peer >= Shape::kCluster) return;
    if constexpr (Shape::kCluster == 1) {
      ptx::mbarrier_arrive(&smem.empty[stage]);
    } else {
      ptx::mbarrier_arrive_cluster(
          ptx::cluster_address(&smem.empty[stage], RNN_EXT_PLANTED(peer_not_asked) ? rank : peer));
    }
  };

  float acc[Shape::BN / 2];
  RingPosition<Shape> at;
  if (RNN_EXT_PLANTED(wrong_phase)) at.parity = 1;
  int bias_buffer = 0, out_buffer = 0;
  for (int index = first; index < p.tiles_m * p.tiles_n; index += step, bias_buffer ^= 1) {
    const TileAt<Shape> tile(index, p.tiles_m, p.tiles_n);
    const int m0 = (tile.m * Shape::kCluster + rank) * Shape::BM, n0 = tile.n * Shape::BN;
    if (consumer < Shape::BN) {
      const int n = n0 + consumer;
      float b = 0.f;
      if (p.bias_ih && n < p.hidden_size) b += widen(p.bias_ih[n]);
      if (p.bias_hh && n < p.hidden_size) b += widen(p.bias_hh[n]);
      smem.bias[bias_buffer][consumer] = b;
    }

    int previous = 0;
    for (int k = 0; k < p.k_tiles_input + p.k_tiles_hx; ++k, at.advance()) {
      if (!RNN_EXT_PLANTED(no_wait_for_tile)) ptx::mbarrier_wait(&smem.full[at.stage], at.parity);
      const uint64_t a = ptx::wgmma_k_major(smem.a[at.stage] + warpgroup * 64 * Shape::BK);
      const uint64_t b = ptx::wgmma_k_major(smem.b[at.stage]);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kTileRowBytes / 32; ++i) {
        const bool adds = k > 0 || i > 0 || RNN_EXT_PLANTED(wgmma_adds_to_garbage);
        ptx::wgmma<T, Shape::BN>(acc, ptx::wgmma_advance(a, 32 * i), ptx::wgmma_advance(b, 32 * i), adds);
      }
      ptx::wgmma_commit();
      if (RNN_EXT_PLANTED(early_release)) release(at.stage);
      ptx::wgmma_wait<1>();  // the previous stage has been read
      if (k > 0 && !RNN_EXT_PLANTED(early_release)) release(previous);
      previous = at.stage;
    }
    if (!RNN_EXT_PLANTED(no_wait_for_wgmma)) ptx::wgmma_wait_all(acc);
    if (!RNN_EXT_PLANTED(early_release)) release(previous);

    // The bias is there. And whoever stages the next but one's has waited here for everyone to be done with this one.
    if (!RNN_EXT_PLANTED(no_barrier_before_bias)) ptx::named_barrier_sync(1, kConsumerThreads);
    const int row = m0 + consumer / 32 * 16;
    const float* const bias = smem.bias[bias_buffer];
    switch (p.nonlinearity) {
      case Nonlinearity::kTanh:
        store_rows<Nonlinearity::kTanh>(p, smem, acc, bias, row, n0, is_leader, out_buffer);
        break;
      case Nonlinearity::kRelu:
        store_rows<Nonlinearity::kRelu>(p, smem, acc, bias, row, n0, is_leader, out_buffer);
        break;
      case Nonlinearity::kSigmoid:
        store_rows<Nonlinearity::kSigmoid>(p, smem, acc, bias, row, n0, is_leader, out_buffer);
        break;
    }
  }
  if (RNN_EXT_PLANTED(no_wait_for_wgmma)) ptx::wgmma_wait_all(acc);
  if (is_leader) ptx::tma_store_wait_read<0>();
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    forward_wgmma(const __grid_constant__ WgmmaArguments<typename Shape::T> p) {
  using Smem = WgmmaSmem<Shape>;
  static_assert(sizeof(Smem) <= 227 * 1024, "what a block can have on sm_90");
  RNN_EXT_SMEM(Smem, smem);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      ptx::mbarrier_init(&smem.full[i], 1);
      ptx::mbarrier_init(&smem.empty[i], Shape::kConsumers * Shape::kCluster);
    }
    ptx::fence_mbarrier_init();
  }
  int rank = 0;
  if constexpr (Shape::kCluster > 1) {
    rank = static_cast<int>(ptx::cluster_rank());
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }

  const int first = static_cast<int>(blockIdx.x) / Shape::kCluster,
            step = static_cast<int>(gridDim.x) / Shape::kCluster;
  if (threadIdx.x < 128) {
    ptx::release_registers<Shape::kProducerRegisters>();
    if (threadIdx.x < 32 && ptx::elect_one()) fill_ring<Shape>(p, smem, first, step, rank);
  } else {
    ptx::claim_registers<Shape::kConsumerRegisters>();
    drain_ring<Shape>(p, smem, first, step, rank);
  }
  // Until both are done, the other block may write to this one's stages and arrive at its barriers.
  if constexpr (Shape::kCluster > 1) {
    if (!RNN_EXT_PLANTED(peer_exits_early)) ptx::cluster_sync();
  }
}

}  // namespace rnn_ext::cuda
