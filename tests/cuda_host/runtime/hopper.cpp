#include "hopper.h"

#include <cstring>
#include <new>

#include "scheduler.h"
#include "tensor_core.h"

namespace emu {
namespace {

// ---- mbarrier -------------------------------------------------------------------------------------------------------

// What the 64 bits in shared memory hold here; their layout is nobody's business on the device either.
struct Mbarrier {
  int32_t bytes;  // expected and not landed yet; below zero when a peer's copy lands before its own block expects it
  uint16_t pending, count;
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));
constexpr uint16_t kInitialised = 0x4000, kPhase = 0x8000, kCountMask = 0x0fff;  // in `count`
constexpr int kMaxBytes = 1 << 20;  // what the device's count of bytes stays below, on either side of zero

uint32_t phase_of(const Mbarrier& m) { return (m.count & kPhase) != 0 ? 1 : 0; }

// The edges of the two parities, to who waits and to who also acquires more; ThreadSanitizer knows an edge by its
// address alone.
Edge& edge_of(Mbarrier& m, uint32_t phase, Acquires by) {
  return *reinterpret_cast<Edge*>(reinterpret_cast<char*>(&m) + phase + 2 * static_cast<int>(by));
}

// Everyone who uses a barrier reads it, as far as ThreadSanitizer sees: then only the init can race with them.
Mbarrier& existing(void* barrier, const char* what, Where where) {
  auto& m = *static_cast<Mbarrier*>(barrier);
  (void)traffic::load64(barrier);
  if ((m.count & ~(kCountMask | kPhase)) != kInitialised) fail(where, "%s: no mbarrier.init yet", what);
  return m;
}

void update(Block& block, Mbarrier& m, int arrivals, int bytes, Where where, Acquires seen_by = Acquires::kBlock) {
  const uint32_t phase = phase_of(m);
  edge_of(m, phase, seen_by).release();
  if (m.pending < arrivals) fail(where, "mbarrier: more arrivals than its count of %d", m.count & kCountMask);
  m.pending -= arrivals;
  m.bytes += bytes;
  if (m.bytes >= kMaxBytes || m.bytes <= -kMaxBytes) fail(where, "mbarrier: a balance of %d bytes", m.bytes);
  if (m.pending == 0 && m.bytes == 0) {
    m.count ^= kPhase;
    m.pending = m.count & kCountMask;
    wake_all(block, &m);
  }
}

WgmmaQueue& own_queue() { return self().block->wgmma[self().warp() / 4]; }

}  // namespace

void mbarrier_init(uint64_t* barrier, uint32_t count, Where where) {
  check_shared(barrier, 8, 8, "mbarrier.init", where);
  if (count == 0 || count > kCountMask) fail(where, "mbarrier.init: a count of %u", count);
  traffic::store64(barrier, 0);
  *reinterpret_cast<Mbarrier*>(barrier) = {0, static_cast<uint16_t>(count),
                                           static_cast<uint16_t>(count | kInitialised)};
}

void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes, Where where) {
  check_shared(barrier, 8, 8, "mbarrier.arrive", where);
  if (expected_bytes >= kMaxBytes) fail(where, "mbarrier.arrive.expect_tx: %u bytes", expected_bytes);
  update(*self().block, existing(barrier, "mbarrier.arrive", where), 1, static_cast<int>(expected_bytes), where);
}

void mbarrier_arrive_cluster(uint32_t address, bool releases, Where where) {
  void* barrier = cluster_memory(address, 8, "mbarrier.arrive", where);
  const uint32_t rank = address >> kRankShift;
  Cluster& cluster = *self().block->cluster;
  if (releases || rank == cluster_rank()) {
    update(cluster.blocks[rank], existing(barrier, "mbarrier.arrive", where), 1, 0, where,
           rank != cluster_rank() ? Acquires::kCluster : Acquires::kBlock);
    return;
  }
  // Of this thread's own accesses the other block learns nothing.
  Edge& reads = own_queue().edge;
  const AnotherThread message(scheduler_fiber(), "arrival at another block's mbarrier");
  cluster.inits.acquire();
  reads.acquire();
  update(cluster.blocks[rank], existing(barrier, "mbarrier.arrive", where), 1, 0, where);
}

void fence_mbarrier_init() { self().block->cluster->inits.release(); }

void mbarrier_wait(uint64_t* barrier, uint32_t parity, Acquires acquires, Where where) {
  check_shared(barrier, 8, 8, "mbarrier wait", where);
  Mbarrier& m = existing(barrier, "mbarrier wait", where);
  if (parity > 1) fail(where, "mbarrier wait: parity %u", parity);
  while (phase_of(m) == parity) block_on(&m, "mbarrier wait", where);
  edge_of(m, parity, Acquires::kBlock).acquire();
  if (acquires != Acquires::kBlock) edge_of(m, parity, Acquires::kShared).acquire();
  if (acquires == Acquires::kCluster) edge_of(m, parity, Acquires::kCluster).acquire();
}

namespace {

struct AsyncStoreWork {
  uint32_t words[4], count;
  uint32_t* to;
  Block* block;
  Mbarrier* barrier;
  Edge* issued;
  Where where;
};

// ThreadSanitizer's threads for the stores, one for each barrier as far as they reach: who has waited at one barrier
// has seen nothing of another's. What such a thread has seen of earlier stores hides no race with what theirs replace:
// there, the issuing thread's own write stands for the store.
constexpr size_t kAsyncStoreThreads = 61;
void* async_store_threads[kAsyncStoreThreads];

void run_async_store(void* p) {
  const auto& work = *static_cast<const AsyncStoreWork*>(p);
  if (work.block->live == 0) {
    const auto rank = static_cast<int>(work.block - work.block->cluster->blocks);
    fail(work.where, "st.async: block %d of the cluster has returned before the store has landed", rank);
  }
  work.issued->acquire();
  for (uint32_t i = 0; i < work.count; ++i) traffic::store32(work.to + i, work.words[i]);
  update(*work.block, *work.barrier, 0, -static_cast<int>(4 * work.count), work.where, Acquires::kShared);
}

}  // namespace

void st_async(uint32_t address, const uint32_t* words, size_t count, uint32_t barrier_address, Where where) {
  Cluster& cluster = *self().block->cluster;
  if (cluster.size == 1) fail(where, "st.async: in a cluster of one block");
  const uint32_t rank = address >> kRankShift;
  if (rank != barrier_address >> kRankShift) {
    fail(where, "st.async: to block %u, with a barrier of block %u", rank, barrier_address >> kRankShift);
  }
  AsyncStoreWork work = {};
  work.count = static_cast<uint32_t>(count);
  for (size_t i = 0; i < count; ++i) work.words[i] = words[i];
  work.to = static_cast<uint32_t*>(cluster_memory(address, 4 * count, "st.async", where));
  work.barrier = &existing(cluster_memory(barrier_address, 8, "st.async's mbarrier", where), "st.async", where);
  work.block = &cluster.blocks[rank];
  work.where = where;
  engine_wait_for_room();
  // From now until it has landed the place may hold anything.
  traffic::scribble(reinterpret_cast<char*>(work.to), 4 * count);
  work.issued = &next_operation_edge();
  work.issued->release();
  const auto number = reinterpret_cast<uintptr_t>(work.barrier) / sizeof(Mbarrier);
  engine_push(nullptr, work, run_async_store, where, &async_store_threads[number % kAsyncStoreThreads]);
}

void fence_proxy_async() { self().block->async_proxy.release(); }

// ---- TMA ------------------------------------------------------------------------------------------------------------

namespace {

constexpr int kRowBytes = 128;

struct TensorMap {
  uint64_t magic;
  char* base;
  int64_t rows, columns, stride;  // columns in elements, stride in bytes
  int element, box_rows;
  bool rounds_to_tf32;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint64_t kMagic = 0x70616d5f726f736e;

uint32_t swizzle(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// Copies a box between the matrix and the tile at `tile` in the block's shared memory, in pieces of 16 bytes.
void copy_box(const TensorMap& map, Block& block, uint32_t tile, int x, int y, bool load) {
  for (int r = 0; r < map.box_rows; ++r) {
    const int64_t row = int64_t{y} + r;
    for (int piece = 0; piece < kRowBytes; piece += 16) {
      char* const shared = block.smem + (swizzle(tile + r * kRowBytes + piece) - kSmemBase);
      for (int at = 0; at < 16; at += map.element) {
        const int64_t column = int64_t{x} + (piece + at) / map.element;
        const bool inside = row >= 0 && row < map.rows && column >= 0 && column < map.columns;
        char* const global = map.base + row * map.stride + column * map.element;
        if (load && map.element == 2) traffic::store16(shared + at, inside ? traffic::load16(global) : 0);
        if (load && map.element == 4) {
          const uint32_t v = inside ? traffic::load32(global) : 0;
          traffic::store32(shared + at, map.rounds_to_tf32 ? round_to_tf32_even(v) : v);
        }
        if (!load && inside && map.element == 2) traffic::store16(global, traffic::load16(shared + at));
        if (!load && inside && map.element == 4) traffic::store32(global, traffic::load32(shared + at));
      }
    }
  }
}

struct LoadWork {
  TensorMap map;
  Block* block;
  uint32_t tile;
  Mbarrier* barrier;
  int x, y;
  Edge* issued;
  Where where;
};

void run_load(void* p) {
  const auto& work = *static_cast<const LoadWork*>(p);
  work.issued->acquire();
  copy_box(work.map, *work.block, work.tile, work.x, work.y, /*load=*/true);
  work.block->async_proxy.release();
  update(*work.block, *work.barrier, 0, -work.map.box_rows * kRowBytes, work.where);
}

struct StoreWork {
  TensorMap map;
  Thread* thread;
  uint32_t tile;
  int x, y;
};

void run_store(void* p) {
  const auto& work = *static_cast<const StoreWork*>(p);
  work.thread->block->async_proxy.acquire();
  copy_box(work.map, *work.thread->block, work.tile, work.x, work.y, /*load=*/false);
  work.thread->stores_read.release();
  ++work.thread->stores_done;
  wake_all(*work.thread->block, &work.thread->stores_done);
}

const TensorMap& known(const CUtensorMap* map, const char* what, Where where) {
  const auto& m = *reinterpret_cast<const TensorMap*>(map);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail(where, "%s: the tensor map is not 64-byte aligned", what);
  if (m.magic != kMagic) fail(where, "%s: not a tensor map", what);
  return m;
}

uint32_t tile_offset(const void* shared, const TensorMap& map, const char* what, Where where) {
  check_shared(shared, static_cast<size_t>(map.box_rows) * kRowBytes, 128, what, where);
  return shared_address(shared, where) & ((1u << kRankShift) - 1);
}

}  // namespace

CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (!has_context) return CUDA_ERROR_INVALID_CONTEXT;
  const bool is_16_bit = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const bool is_tf32 = type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  const int element = is_16_bit ? 2 : 4;
  if (rank != 2 || (!is_16_bit && !is_tf32 && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT32) ||
      interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle != CU_TENSOR_MAP_SWIZZLE_128B ||
      box[0] * element != kRowBytes) {
    throw Error("cuTensorMapEncodeTiled: the host knows only float tiles of 128-byte rows with the 128-byte swizzle");
  }
  constexpr cuuint64_t kMaxSize = cuuint64_t{1} << 32, kMaxStride = cuuint64_t{1} << 40;
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0 || base == nullptr || reinterpret_cast<uintptr_t>(map) % 64 != 0 ||
      sizes[0] == 0 || sizes[0] > kMaxSize || sizes[1] == 0 || sizes[1] > kMaxSize || strides[0] % 16 != 0 ||
      strides[0] >= kMaxStride || box[0] > 256 || box[1] == 0 || box[1] > 256 || element_strides[0] != 1 ||
      element_strides[1] != 1) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::memset(static_cast<void*>(map), 0, sizeof *map);
  new (map) TensorMap{kMagic,
                      static_cast<char*>(base),
                      static_cast<int64_t>(sizes[1]),
                      static_cast<int64_t>(sizes[0]),
                      static_cast<int64_t>(strides[0]),
                      element,
                      static_cast<int>(box[1]),
                      is_tf32};
  return CUDA_SUCCESS;
}

void check_tensor_map(const CUtensorMap* map, Where where) { known(map, "prefetch.tensormap", where); }

void tma_load(void* shared, const CUtensorMap* map, int x, int y, uint64_t* barrier, uint32_t block_mask, Where where) {
  const Thread& me = self();
  const TensorMap& m = known(map, "TMA load", where);
  const uint32_t tile = tile_offset(shared, m, "TMA load", where);
  check_shared(barrier, 8, 8, "TMA load's mbarrier", where);
  if (block_mask == 0) block_mask = 1u << cluster_rank();
  if (block_mask >> cluster_size() != 0) {
    fail(where, "TMA multicast: mask %x in a cluster of %u", block_mask, cluster_size());
  }
  for (uint32_t rank = 0; rank < cluster_size(); ++rank) {
    if ((block_mask >> rank & 1) == 0) continue;
    Block& block = me.block->cluster->blocks[rank];
    if (block.live == 0) fail(where, "TMA multicast: block %u of the cluster has returned", rank);
    char* const own = reinterpret_cast<char*>(barrier);
    Mbarrier& peer_barrier = existing(block.smem + (own - me.block->smem), "TMA load", where);
    // From now until it has landed the tile may hold anything.
    traffic::scribble(block.smem + (tile - kSmemBase), static_cast<size_t>(m.box_rows) * kRowBytes);
    Edge& issued = next_operation_edge();
    issued.release();
    engine_push(nullptr, LoadWork{m, &block, tile, &peer_barrier, x, y, &issued, where}, run_load, where);
  }
}

void tma_store(const CUtensorMap* map, const void* shared, int x, int y, Where where) {
  Thread& me = self();
  const TensorMap& m = known(map, "TMA store", where);
  if (m.rounds_to_tf32) fail(where, "TMA store: nothing says what it makes of tf32");
  const uint32_t tile = tile_offset(shared, m, "TMA store", where);
  ++me.stores_issued;
  me.where = where;
  engine_push(&me, StoreWork{m, &me, tile, x, y}, run_store, where);
}

void tma_store_commit() {
  Thread& me = self();
  me.store_groups[me.store_group_count++ % kMaxGroups] = me.stores_issued;
}

void tma_store_wait_read(int groups, Where where) {
  Thread& me = self();
  const int last = me.store_group_count - groups;
  if (groups >= kMaxGroups) fail(where, "cp.async.bulk.wait_group: %d groups", groups);
  if (last <= 0) return;
  while (me.stores_done < me.store_groups[(last - 1) % kMaxGroups]) {
    block_on(&me.stores_done, "cp.async.bulk.wait_group", where);
  }
  me.stores_read.acquire();
}

// ---- warps ----------------------------------------------------------------------------------------------------------

bool elect_one(Where where) {
  // Which lane it is, the hardware does not say: not the one that everybody expects.
  warp_collective(~0u, "elect.sync", where, nullptr, nullptr);
  return lane_index() == 5;
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

namespace {

constexpr int kMaxN = 256, kMaxK = 16;

double value_of(const void* p, WgmmaType type, int i) {
  switch (type) {
    case WgmmaType::kF16:
      return half_value(static_cast<const uint16_t*>(p)[i]);
    case WgmmaType::kBf16:
      return bfloat16_value(static_cast<const uint16_t*>(p)[i]);
    default:
      return tf32_value(static_cast<const uint32_t*>(p)[i]);
  }
}

// Reads an operand, to[k][m or n < rows], through its descriptor as the hardware does: by address, 16 bytes at a time,
// with the swizzle on the address.
void read_operand(const Block& block, uint64_t descriptor, WgmmaType type, bool mn_major, int rows, double (*to)[kMaxN],
                  Where where) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 62 != 1) fail(where, "wgmma: only the 128-byte swizzle is emulated");
  if ((descriptor >> 49 & 7) != 0 || (start & 0x380) != 0) {
    fail(where, "wgmma: address %05x, at which the swizzle is not in phase", start);
  }
  const int element = type == WgmmaType::kTf32 ? 4 : 2, per_piece = 16 / element, k_end = 32 / element;
  const int slow_end = mn_major ? k_end : rows, fast_end = mn_major ? rows : k_end;
  for (int slow = 0; slow < slow_end; ++slow) {
    for (int fast = 0; fast < fast_end; fast += per_piece) {
      const int across = fast * element;  // bytes along the contiguous index; beyond 128, in the next tile
      const uint32_t logical =
          start + across / kRowBytes * leading + across % kRowBytes + slow / 8 * stride + slow % 8 * kRowBytes;
      const uint32_t offset = swizzle(logical) - kSmemBase;
      if (offset + 16 > block.smem_bytes) {
        fail(where, "wgmma: descriptor %016lx reaches outside shared memory", static_cast<unsigned long>(descriptor));
      }
      const uint64_t piece[2] = {traffic::load64(block.smem + offset), traffic::load64(block.smem + offset + 8)};
      for (int i = 0; i < per_piece; ++i) {
        const double v = value_of(piece, type, i);
        (mn_major ? to[slow][fast + i] : to[fast + i][slow]) = v;
      }
    }
  }
}

struct MultiplyWork {
  Block* block;
  int warpgroup, index;
};

void run_multiply(void* p) {
  const auto& work = *static_cast<const MultiplyWork*>(p);
  Block& block = *work.block;
  WgmmaQueue& queue = block.wgmma[work.warpgroup];
  const Wgmma& op = queue.operations[work.index % kMaxWgmma];
  const WgmmaShape& shape = op.shape;
  static double A[kMaxK][kMaxN], B[kMaxK][kMaxN], products[64][kMaxN];
  block.async_proxy.acquire();
  read_operand(block, op.a, shape.type, shape.transposed_a, 64, A, op.where);
  read_operand(block, op.b, shape.type, shape.transposed_b, shape.n, B, op.where);
  const int k_end = shape.type == WgmmaType::kTf32 ? 8 : 16;
  for (int row = 0; row < 64; ++row) {
    double* const sum = products[row];
    for (int column = 0; column < kMaxN; ++column) sum[column] = 0;
    for (int k = 0; k < k_end; ++k) {
      const double a = A[k][row];
      for (int first = 0; first < shape.n; first += 64) {
        for (int i = 0; i < 64; ++i) sum[first + i] += a * B[k][first + i];  // of constant length: vectorised
      }
    }
  }
  for (int t = 0; t < 4 * kWarp; ++t) {
    float* const d = block.threads[work.warpgroup * 4 * kWarp + t].accumulators[work.index % kMaxWgmma];
    for (int i = 0; i < shape.n / 2; ++i) {
      const int row = t / kWarp * 16 + t % kWarp / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      d[i] = round_toward_zero((shape.add ? d[i] : 0.0) + products[row][column]);
    }
  }
  ++queue.done;
  queue.edge.release();
  wake_all(block, &queue);
}

bool alike(const Wgmma& x, const Wgmma& y) {
  return x.a == y.a && x.b == y.b && x.shape.type == y.shape.type && x.shape.n == y.shape.n &&
         x.shape.transposed_a == y.shape.transposed_a && x.shape.transposed_b == y.shape.transposed_b &&
         x.shape.add == y.shape.add;
}

// One warp's part: the last of the four to issue an operation starts it.
void issue(void* const* lanes, uint32_t) {
  const auto& op = *static_cast<const Wgmma*>(lanes[0]);
  for (int l = 1; l < kWarp; ++l) {
    if (!alike(op, *static_cast<const Wgmma*>(lanes[l]))) fail(op.where, "wgmma: the lanes disagree");
  }
  WgmmaQueue& queue = own_queue();
  const int index = queue.issued[self().warp() % 4]++;
  if (index - queue.done >= kMaxWgmma) fail(op.where, "wgmma: more than %d in flight", kMaxWgmma);
  Wgmma& common = queue.operations[index % kMaxWgmma];
  int issued = 0;
  for (int count : queue.issued) issued += count > index ? 1 : 0;
  if (issued == 1) {
    common = op;
  } else if (!alike(op, common)) {
    fail(op.where, "wgmma: the warps of a warpgroup disagree");
  }
  if (issued == 4) {
    engine_push(&queue, MultiplyWork{self().block, self().warp() / 4, index}, run_multiply, op.where);
  }
}

}  // namespace

void wgmma(float* d, uint64_t a, uint64_t b, WgmmaShape shape, Where where) {
  Thread& me = self();
  if (me.block->size / kWarp < me.warp() / 4 * 4 + 4) fail(where, "wgmma: not a warpgroup of 128 threads");
  if (!me.wgmma_fenced) fail(where, "wgmma: no wgmma_fence since the accumulators were used");
  me.accumulators[own_queue().issued[me.warp() % 4] % kMaxWgmma] = d;
  Wgmma op{a, b, shape, where};
  warp_collective(~0u, "wgmma", where, &op, issue);
}

void wgmma_fence() { self().wgmma_fenced = true; }

void wgmma_commit() {
  Thread& me = self();
  me.wgmma_groups[me.wgmma_group_count++ % kMaxGroups] = own_queue().issued[me.warp() % 4];
}

void wgmma_wait(int groups, Where where) {
  Thread& me = self();
  if (groups >= kMaxGroups) fail(where, "wgmma.wait_group: %d groups", groups);
  if (groups == 0) me.wgmma_fenced = false;
  const int last = me.wgmma_group_count - groups;
  if (last <= 0) return;
  WgmmaQueue& queue = own_queue();
  while (queue.done < me.wgmma_groups[(last - 1) % kMaxGroups]) block_on(&queue, "wgmma.wait_group", where);
  queue.edge.acquire();
}

}  // namespace emu
