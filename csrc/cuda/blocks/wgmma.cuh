// The mainloop of the kernels for large shapes on sm_90a, which forward_wgmma.cuh and backward_wgmma.cuh share: tiles
// that TMA brings, wgmma multiplies and TMA takes away.
//
// One block a multiprocessor stays for the whole launch and takes tile after tile. One thread of its first warpgroup,
// the producer, has TMA fill a ring of stages in shared memory; two more warpgroups, the consumers, multiply them with
// wgmma, 64 rows of the tile each. The ring runs on across tiles: the next tile's stages fill while this one's epilogue
// works. What a box has beyond the end of a matrix is zero, and is left out when a tile is stored, so that ragged sizes
// cost nothing and need no code.
//
// In a cluster of two, the blocks take tiles one below the other. They need the same B: each loads a part of it, into
// both. Where K is split, a cluster is as many times as large, and takes one tile a block of the first part of K.
#pragma once
#include "cuda/blocks/math.cuh"
#include "cuda/ptx/ptx_sm90.cuh"
#include "cuda/ptx/tensor_map.cuh"

namespace rnn_ext::cuda {

template <typename T_, Math kMath, int BN_, int kCluster_, int kParts_ = 1>
struct WgmmaShape {
  using T = T_;
  static constexpr bool kTf32 = kMath == Math::kTf32;        // rounded to it on the way into shared memory
  static constexpr bool kSplit = kMath == Math::kSplitTf32;  // into two tf32 numbers
  static constexpr int BM = 128, BN = BN_, BK = kTileRowBytes / sizeof(T), kCluster = kCluster_;
  static constexpr int kParts = kParts_, kBlocks = kCluster * kParts;  // parts of K, blocks of a cluster
  static constexpr int kConsumers = BM / 64;                           // warpgroups
  static constexpr int kConsumerThreads = 128 * kConsumers, kThreads = 128 + kConsumerThreads;
  static constexpr int kAssistants = 96;  // threads of the producer's warpgroup that are not its warp
  static constexpr int kStageBytes = (BM + BN) * kTileRowBytes;
  static constexpr int kLowStages = kSplit ? 2 : 0;                        // of the numbers' low parts
  static constexpr int kStages = 192 * 1024 / kStageBytes - kLowStages;    // 4, 6 and 8 for BN = 256, 128 and 64
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // for 128 sums a thread
  static_assert(sizeof(T) == (kTf32 || kSplit ? 4 : 2));
  static_assert(!kSplit || BN <= 128, "two sums an element, if split");
  static_assert(BN % 64 == 0 && BN <= 256 && BN / kCluster <= 256, "one wgmma, one box");
  static_assert(128 * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536, "what a multiprocessor has");
  static_assert(kStages >= 4);
};

// All tiles start at multiples of 1024 bytes, where the swizzle is in phase.
template <typename Shape>
struct WgmmaRing {
  using T = typename Shape::T;
  static constexpr int kStoreRows = 16,
                       kStoreColumns = kTileRowBytes / sizeof(T);  // of the output, by a warp at a time
  T a[Shape::kStages][Shape::BM * Shape::BK];
  T b[Shape::kStages][Shape::BN * Shape::BK];
  T out[4 * Shape::kConsumers][2][kStoreRows * kStoreColumns];
  uint64_t full[Shape::kStages], empty[Shape::kStages];
};

// A place in a ring, and the parity of its current use.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The persistent order: bands of tiles 2048 rows high, each walked column by column. So the tiles that the
// multiprocessors work on at one time form a patch about as wide as high, which is what needs the fewest bytes from
// memory. tiles_m counts clusters.
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

// Which part of K this block has, and the rank in the cluster of the first of the blocks that share B with it.
template <typename Shape>
__device__ __forceinline__ int part_of_k() {
  return Shape::kParts == 1 ? 0 : static_cast<int>(ptx::cluster_rank()) / Shape::kCluster;
}
template <typename Shape>
__device__ __forceinline__ int first_rank() {
  return part_of_k<Shape>() * Shape::kCluster;
}

// ---- the producer ---------------------------------------------------------------------------------------------------

// Fills the next k_tiles stages: load(k, a, b, full) asks TMA for k-tile k, all of whose bytes, from this block or its
// peer, it is to count at `full`. One thread.
template <typename Shape, typename Load>
__device__ __forceinline__ void fill_stages(WgmmaRing<Shape>& ring, RingPosition<Shape::kStages>& at, int k_tiles,
                                            Load load) {
#pragma unroll 1
  for (int k = 0; k < k_tiles; ++k, at.advance()) {
    uint64_t* const full = &ring.full[at.stage];
    ptx::mbarrier_wait(&ring.empty[at.stage], at.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, Shape::kStageBytes - (RNN_EXT_PLANTED(wrong_byte_count) ? 128 : 0));
    load(k, ring.a[at.stage], ring.b[at.stage], full);
  }
}

// Waits until all that was filled has been released. Before that the block must not exit: the other one's consumers
// have yet to arrive at its barriers. One thread.
template <typename Shape>
__device__ __forceinline__ void await_release(WgmmaRing<Shape>& ring, RingPosition<Shape::kStages>& at) {
#pragma unroll 1
  for (int i = 0; i < Shape::kStages; ++i, at.advance()) ptx::mbarrier_wait(&ring.empty[at.stage], at.parity ^ 1);
}

// A box of B at (x, y): into all blocks of the cluster.
template <typename Shape>
__device__ __forceinline__ void load_shared(typename Shape::T* b, const CUtensorMap* map, int x, int y,
                                            uint64_t* full) {
  if constexpr (Shape::kCluster == 1) {
    ptx::tma_load(b, map, x, y, full);
  } else {
    ptx::tma_load_multicast(b, map, x, y, full,
                            static_cast<uint16_t>(((1 << Shape::kCluster) - 1) << first_rank<Shape>()));
  }
}

// ---- the consumers --------------------------------------------------------------------------------------------------

// Tells the producers that this warpgroup is done with a stage: those of all blocks that write to it.
template <typename Shape>
__device__ __forceinline__ void release_stage(WgmmaRing<Shape>& ring, int stage, int rank) {
  const int peer = static_cast<int>(threadIdx.x) % 128;
  if (peer >= Shape::kCluster) return;
  if constexpr (Shape::kCluster == 1) {
    ptx::mbarrier_arrive(&ring.empty[stage]);
  } else {
    ptx::mbarrier_arrive_cluster(ptx::cluster_address(
        &ring.empty[stage], first_rank<Shape>() + (RNN_EXT_PLANTED(peer_not_asked) ? rank : peer)));
  }
}

// sums = the products of the next k_tiles > 0 stages: this warpgroup's 64 rows. A tile of an operand along its rows
// is one of its matrix's rows as they lie in memory: blocks of BK = 64 rows of k, of 64 rows or columns of the product
// each.
template <typename Shape, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
__device__ __forceinline__ void multiply(WgmmaRing<Shape>& ring, RingPosition<Shape::kStages>& at, int k_tiles,
                                         int rank, float (&sums)[Shape::BN / 2]) {
  constexpr bool kTransposedA = kMajorA == Major::kRows, kTransposedB = kMajorB == Major::kRows;
  constexpr int kBlock = 64 * Shape::BK, kBlockBytes = 64 * kTileRowBytes;
  constexpr int kNextA = kTransposedA ? 16 * kTileRowBytes : 32, kNextB = kTransposedB ? 16 * kTileRowBytes : 32;
  const int warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
  int previous = 0;
  for (int k = 0; k < k_tiles; ++k, at.advance()) {
    if (!RNN_EXT_PLANTED(no_wait_for_tile)) ptx::mbarrier_wait(&ring.full[at.stage], at.parity);
    const typename Shape::T *const tile_a = ring.a[at.stage] + warpgroup * kBlock, *const tile_b = ring.b[at.stage];
    const uint64_t a = kTransposedA ? ptx::wgmma_mn_major(tile_a, kBlockBytes) : ptx::wgmma_k_major(tile_a);
    const uint64_t b = kTransposedB ? ptx::wgmma_mn_major(tile_b, kBlockBytes) : ptx::wgmma_k_major(tile_b);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTileRowBytes / 32; ++i) {
      const bool adds = k > 0 || i > 0 || RNN_EXT_PLANTED(wgmma_adds_to_garbage);
      ptx::wgmma<typename Shape::T, Shape::BN, kTransposedA, kTransposedB>(sums, ptx::wgmma_advance(a, kNextA * i),
                                                                           ptx::wgmma_advance(b, kNextB * i), adds);
    }
    ptx::wgmma_commit();
    if (RNN_EXT_PLANTED(early_release)) release_stage(ring, at.stage, rank);
    ptx::wgmma_wait<1>();  // the previous stage has been read
    if (k > 0 && !RNN_EXT_PLANTED(early_release)) release_stage(ring, previous, rank);
    previous = at.stage;
  }
  if (!RNN_EXT_PLANTED(no_wait_for_wgmma)) ptx::wgmma_wait_all(sums);
  if (!RNN_EXT_PLANTED(early_release)) release_stage(ring, previous, rank);
}

// Stores 16 rows of kWidth columns, this warp's of the tile, from (row, column) of the matrix on: through shared
// memory, 128 bytes a row at a time in two buffers. put(out, part) writes those of one part, at swizzled places. TMA
// leaves out what lies beyond the matrix.
template <typename Shape, int kWidth = Shape::BN, typename Put>
__device__ __forceinline__ void store_rows(const CUtensorMap* map, WgmmaRing<Shape>& ring, int row, int column,
                                           bool is_leader, int& buffer, Put put) {
  constexpr int kColumns = WgmmaRing<Shape>::kStoreColumns;
  const int warp = static_cast<int>(threadIdx.x) / 32 - 4;
  static_assert(kWidth % kColumns == 0);
#pragma unroll
  for (int part = 0; part < kWidth / kColumns; ++part, buffer ^= 1) {
    auto* const out = ring.out[warp][buffer];
    if (is_leader && !RNN_EXT_PLANTED(no_wait_for_stores)) ptx::tma_store_wait_read<1>();
    __syncwarp();
    put(out, part);
    if (!RNN_EXT_PLANTED(no_proxy_fence)) ptx::fence_proxy_async();
    __syncwarp();
    if (is_leader) {
      ptx::tma_store(map, out, column + part * kColumns, row);
      ptx::tma_store_commit();
    }
  }
}

// A part of 16-bit elements. pair(block, i) is this lane's pair of the 8-column block `block`, i = 0 in the upper and 1
// in the lower 8 rows: what it holds of the sums from 4 block + 2 i on.
template <typename T, typename Pair>
__device__ __forceinline__ void put_pairs(T* out, Pair pair) {
  // stmatrix takes the upper and the lower 8 rows of two blocks, and from this lane the address of this row:
  const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8, row_there = matrix % 2 * 8 + lane % 8;
#pragma unroll
  for (int block = 0; block < 8; block += 2) {
    uint32_t fragment[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 both = pair(block + i / 2, i % 2);
      fragment[i] = pack<T>(both.x, both.y);
    }
    const int piece = (block + matrix / 2) ^ (row_there % 8);
    ptx::stmatrix_x4(out + row_there * (kTileRowBytes / sizeof(T)) + piece * 8, fragment);
  }
}

// ---- both -----------------------------------------------------------------------------------------------------------

// What a block does: produce(at, first, step, rank) in one thread, consume(first, step, rank) in the consumers,
// assist(first, step) in the other warps of the producer's warpgroup. Tiles first, first + step... are the cluster's,
// and `rank` is this block's there. What thread 0 has done before, such as initing barriers, all of them see.
template <typename Shape, typename Produce, typename Assist, typename Consume>
__device__ __forceinline__ void run_specialised(WgmmaRing<Shape>& ring, Produce produce, Assist assist,
                                                Consume consume) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      ptx::mbarrier_init(&ring.full[i], 1);
      ptx::mbarrier_init(&ring.empty[i], Shape::kConsumers * Shape::kCluster);
    }
    if (!RNN_EXT_PLANTED(no_fence_of_inits)) ptx::fence_mbarrier_init();
  }
  int rank = 0;
  if constexpr (Shape::kBlocks > 1) {
    rank = static_cast<int>(ptx::cluster_rank()) % Shape::kCluster;
    ptx::cluster_arrive_relaxed();  // the inits are all that there is to see, and their fence takes care of them
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }

  const int first = static_cast<int>(blockIdx.x) / Shape::kBlocks, step = static_cast<int>(gridDim.x) / Shape::kBlocks;
  if (threadIdx.x < 128) {
    ptx::release_registers<Shape::kProducerRegisters>();
    if (threadIdx.x >= 32) {
      assist(first, step);
    } else if (ptx::elect_one()) {
      RingPosition<Shape::kStages> at;
      produce(at, first, step, rank);
      if (Shape::kCluster > 1 && !RNN_EXT_PLANTED(peer_exits_early)) await_release(ring, at);
    }
  } else {
    ptx::claim_registers<Shape::kConsumerRegisters>();
    consume(first, step, rank);
  }
}

}  // namespace rnn_ext::cuda
