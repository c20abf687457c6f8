// Inline PTX and polling loops of sm_90 and later; ptx.cuh has the rest and says how wrappers are made. wgmma,
// setmaxnreg and fast multicast belong to sm_90a alone.
#pragma once
#include <cuda.h>  // CUtensorMap: types only, nothing of libcuda is linked

#include <type_traits>

#include "cuda/ptx/ptx.cuh"
#ifdef RNN_EXT_CUDA_HOST
#include "hopper.h"
#endif

// RNN_EXT_PTX_SM90, RNN_EXT_PTX_SM90A (device, host): one of the two, or a trap on another architecture.
#if defined(RNN_EXT_CUDA_HOST)
#define RNN_EXT_PTX_SM90(device, host) host
#define RNN_EXT_PTX_SM90A(device, host) host
#else
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RNN_EXT_PTX_SM90(device, host) device
#else
#define RNN_EXT_PTX_SM90(device, host) __trap()
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RNN_EXT_PTX_SM90A(device, host) device
#else
#define RNN_EXT_PTX_SM90A(device, host) __trap()
#endif
#endif

// The same for what a kernel of every architecture may leave out.
#if defined(RNN_EXT_CUDA_HOST)
#define RNN_EXT_PTX_SM90_OR_NOTHING(device, host) host
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RNN_EXT_PTX_SM90_OR_NOTHING(device, host) device
#else
#define RNN_EXT_PTX_SM90_OR_NOTHING(device, host) (void)0
#endif

namespace rnn_ext::cuda::ptx {

// Whether the architecture that is compiled for has clusters: elsewhere their kernels can be left empty.
#if defined(RNN_EXT_CUDA_HOST) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

// ---- launches that overlap ------------------------------------------------------------------------------------------
//
// A kernel of RNN_EXT_LAUNCH_EARLY may run while the one before it in the stream still does, as soon as all of that
// one's blocks have called let_next_launch_start or have ended. Older architectures launch no kernel early.

RNN_EXT_PTX_INLINE void let_next_launch_start() {
  RNN_EXT_PTX_SM90_OR_NOTHING(asm volatile("griddepcontrol.launch_dependents;" :: : "memory"), (void)0);
}

// Waits until the launch before has ended, and with it all before that one: from here on its results are there, and
// what it reads may be overwritten. Every thread has to call it, or the next launch would not know when all before have
// ended.
RNN_EXT_PTX_INLINE void wait_for_previous_launch([[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90_OR_NOTHING(asm volatile("griddepcontrol.wait;" :: : "memory"), emu::wait_for_previous_launch());
}

// Brings what lies there to the L2 cache. That is no read: it may be done before the wait, even if the launch before
// writes there.
RNN_EXT_PTX_INLINE void prefetch_to_l2([[maybe_unused]] const void* global) {
  RNN_EXT_PTX_SM90_OR_NOTHING(asm volatile("prefetch.global.L2 [%0];" ::"l"(global)), (void)0);
}

// ---- clusters -------------------------------------------------------------------------------------------------------
//
// The blocks of RNN_EXT_LAUNCH_CLUSTER. What the threads of a cluster wrote before cluster_arrive, in global memory or
// in anyone's shared memory, all of them see after cluster_wait. A block's shared memory may be touched by others only
// after a barrier of the cluster that it has taken part in, which says that it has started, and before one that it has
// yet to pass, or another sign that it still waits for, without which it might have exited.

// This block's rank in the cluster, and the number of blocks there.
RNN_EXT_PTX_INLINE uint32_t cluster_rank() {
  uint32_t rank = 0;
  RNN_EXT_PTX_SM90(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)), rank = emu::cluster_rank());
  return rank;
}
RNN_EXT_PTX_INLINE uint32_t cluster_size() {
  uint32_t size = 0;
  RNN_EXT_PTX_SM90(asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size)), size = emu::cluster_size());
  return size;
}

// The two parts of a barrier of all threads of the cluster; none may exit before it has waited.
RNN_EXT_PTX_INLINE void cluster_arrive([[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(asm volatile("barrier.cluster.arrive.release;" :: : "memory"), emu::cluster_arrive(where));
}
// Says that this thread is here, and nothing of what it has read or written but the mbarriers that it has inited, if
// fence_mbarrier_init came before. It costs no memory barrier, which would wait for all writes under way.
RNN_EXT_PTX_INLINE void cluster_arrive_relaxed([[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(asm volatile("barrier.cluster.arrive.relaxed;" :: : "memory"), emu::cluster_arrive_relaxed(where));
}
RNN_EXT_PTX_INLINE void cluster_wait([[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(asm volatile("barrier.cluster.wait.acquire;" :: : "memory"), emu::cluster_wait(where));
}
RNN_EXT_PTX_INLINE void cluster_sync([[maybe_unused]] Where where = Where::here()) {
  ptx::cluster_arrive(where);
  ptx::cluster_wait(where);
}

// The address, for the functions below, of the same place in the shared memory of block `rank`.
RNN_EXT_PTX_INLINE uint32_t cluster_address(const void* shared, uint32_t rank,
                                            [[maybe_unused]] Where where = Where::here()) {
  uint32_t address = 0;
  RNN_EXT_PTX_SM90(
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank)),
      address = emu::cluster_address(shared, rank, where));
  return address;
}

// A T of 4, 8 or 16 bytes, aligned to its size, in any block's shared memory.
template <typename T>
RNN_EXT_PTX_INLINE T ld_cluster(uint32_t address, [[maybe_unused]] Where where = Where::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one load of 32, 64 or 128 bits");
  uint32_t words[sizeof(T) / 4] = {};
  if constexpr (sizeof(T) == 4) {
    RNN_EXT_PTX_SM90(asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory"),
                     emu::ld_cluster(words, address, where));
  } else if constexpr (sizeof(T) == 8) {
    RNN_EXT_PTX_SM90(asm volatile("ld.shared::cluster.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]),
                                  "=r"(words[1]) : "r"(address) : "memory"),
                     emu::ld_cluster(words, address, where));
  } else {
    RNN_EXT_PTX_SM90(asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(words[0]), "=r"(words[1]),
                                  "=r"(words[2]), "=r"(words[3]) : "r"(address) : "memory"),
                     emu::ld_cluster(words, address, where));
  }
  T value;
  memcpy(&value, words, sizeof value);
  return value;
}
template <typename T>
RNN_EXT_PTX_INLINE void st_cluster(uint32_t address, T value, [[maybe_unused]] Where where = Where::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one store of 32, 64 or 128 bits");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof value);
  if constexpr (sizeof(T) == 4) {
    RNN_EXT_PTX_SM90(asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(words[0]) : "memory"),
                     emu::st_cluster(address, words, where));
  } else if constexpr (sizeof(T) == 8) {
    RNN_EXT_PTX_SM90(asm volatile("st.shared::cluster.v2.u32 [%0], {%1,%2};" ::"r"(address), "r"(words[0]),
                                  "r"(words[1]) : "memory"),
                     emu::st_cluster(address, words, where));
  } else {
    RNN_EXT_PTX_SM90(asm volatile("st.shared::cluster.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(words[0]),
                                  "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory"),
                     emu::st_cluster(address, words, where));
  }
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------
//
// A 64-bit barrier in shared memory, whose phases end when `count` arrivals have happened and as many bytes as were
// expected have landed. Phases alternate between parity 0 and 1: a fresh barrier is in one of parity 0, and a wait for
// parity 1 passes at once.
//
// What was written before an arrival is visible after the wait for its phase, within one block, and so is what the copy
// engine brings, whichever block asked for it. Of what other blocks wrote by themselves, only what came before
// mbarrier_arrive_release_cluster is visible, and only after mbarrier_wait_acquire_cluster. Both are dear: the one
// waits until all of its thread's writes have reached the whole GPU, the other empties the L1 cache. What st_async
// brings is visible after mbarrier_wait_acquire_shared, too.

RNN_EXT_PTX_INLINE void mbarrier_init(uint64_t* barrier, uint32_t count, [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory"),
      emu::mbarrier_init(barrier, count, where));
}

// After the inits, and before the block's or cluster's barrier that shows them to others: for TMA, too.
RNN_EXT_PTX_INLINE void fence_mbarrier_init() {
  RNN_EXT_PTX_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"), emu::fence_mbarrier_init());
}

RNN_EXT_PTX_INLINE void mbarrier_arrive(uint64_t* barrier, [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory"),
                   emu::mbarrier_arrive(barrier, 0, where));
}

// At the barrier in any block of the cluster that cluster_address gave. To another block it says only that this one is
// done with something: that wgmma whose results were waited for have read their operands.
RNN_EXT_PTX_INLINE void mbarrier_arrive_cluster(uint32_t address, [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory"),
                   emu::mbarrier_arrive_cluster(address, /*releases=*/false, where));
}
// The same, and publishes what this thread has written or seen.
RNN_EXT_PTX_INLINE void mbarrier_arrive_release_cluster(uint32_t address,
                                                        [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory"),
      emu::mbarrier_arrive_cluster(address, /*releases=*/true, where));
}

// Arrives, and adds to what the phase expects to land.
RNN_EXT_PTX_INLINE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes,
                                                  [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                                "r"(bytes) : "memory"),
                   emu::mbarrier_arrive(barrier, bytes, where));
}

// Waits until the barrier's current phase is not, or no more, of this parity.
RNN_EXT_PTX_INLINE void mbarrier_wait(uint64_t* barrier, uint32_t parity,
                                      [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(asm volatile("{\n.reg .pred done;\nWAIT:\n"
                                "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                                "@!done bra WAIT;\n}" ::"r"(shared_address(barrier)),
                                "r"(parity) : "memory"),
                   emu::mbarrier_wait(barrier, parity, emu::Acquires::kBlock, where));
}
RNN_EXT_PTX_INLINE void mbarrier_wait_acquire_cluster(uint64_t* barrier, uint32_t parity,
                                                      [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(asm volatile("{\n.reg .pred done;\nWAIT:\n"
                                "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                                "@!done bra WAIT;\n}" ::"r"(shared_address(barrier)),
                                "r"(parity) : "memory"),
                   emu::mbarrier_wait(barrier, parity, emu::Acquires::kCluster, where));
}
// As mbarrier_wait, and shows what st_async has brought. It leaves the L1 cache as it is, but waits for all loads that
// this thread has under way, as a fence does.
RNN_EXT_PTX_INLINE void mbarrier_wait_acquire_shared(uint64_t* barrier, uint32_t parity,
                                                     [[maybe_unused]] Where where = Where::here()) {
#if defined(__CUDACC__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1208  // its PTX has no such fence
  mbarrier_wait_acquire_cluster(barrier, parity);
#else
  RNN_EXT_PTX_SM90(asm volatile("{\n.reg .pred done;\nWAIT:\n"
                                "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 done, [%0], %1;\n"
                                "@!done bra WAIT;\n"
                                "fence.acquire.sync_restrict::shared::cluster.cluster;\n"
                                "fence.acquire.cta;\n}" ::"r"(shared_address(barrier)),
                                "r"(parity) : "memory"),
                   emu::mbarrier_wait(barrier, parity, emu::Acquires::kShared, where));
#endif
}

// Stores a T of 4, 8 or 16 bytes, aligned to its size, asynchronously: at some later moment, in any order with others,
// and when it is there, its bytes count at a barrier of the same block, in the phase that this is then in. They may
// come before the phase expects them. Both addresses are of cluster_address, in a cluster of more than one block.
//
// The bytes count with .release.cluster (PTX ISA, st.async), which the block's own scope, the default of a wait, does
// not cover: the value is visible after mbarrier_wait_acquire_shared or mbarrier_wait_acquire_cluster. Nothing else
// that this thread wrote is. What the value replaces must have been read before.
template <typename T>
RNN_EXT_PTX_INLINE void st_async(uint32_t address, T value, uint32_t barrier_address,
                                 [[maybe_unused]] Where where = Where::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one store of 32, 64 or 128 bits");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof value);
  if constexpr (sizeof(T) == 4) {
    RNN_EXT_PTX_SM90(
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
                     "r"(words[0]), "r"(barrier_address) : "memory"),
        emu::st_async(address, words, barrier_address, where));
  } else if constexpr (sizeof(T) == 8) {
    RNN_EXT_PTX_SM90(asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, "
                                  "[%3];" ::"r"(address),
                                  "r"(words[0]), "r"(words[1]), "r"(barrier_address) : "memory"),
                     emu::st_async(address, words, barrier_address, where));
  } else {
    RNN_EXT_PTX_SM90(
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], "
                     "{%1,%2,%3,%4}, [%5];" ::"r"(address),
                     "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(barrier_address) : "memory"),
        emu::st_async(address, words, barrier_address, where));
  }
}

// ---- proxies --------------------------------------------------------------------------------------------------------

// TMA and the tensor cores see this thread's writes to shared memory only after this fence. What they wrote themselves
// needs none.
RNN_EXT_PTX_INLINE void fence_proxy_async() {
  RNN_EXT_PTX_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"), emu::fence_proxy_async());
}

// ---- bulk copies of tiles -------------------------------------------------------------------------------------------
//
// By TMA, one thread asking. A tile is a box of a row-major matrix as tensor_map.cuh describes it, 128 bytes wide. In
// shared memory, where it must be 128-byte aligned, row r has the 128 bytes from 128 r, its 16-byte pieces in the order
// that the 128-byte swizzle gives: bits 4 to 6 of the address are xored with bits 7 to 9. x and y are the column and
// row of the box's first element.

RNN_EXT_PTX_INLINE void prefetch_tensor_map(const CUtensorMap* map, [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"), emu::check_tensor_map(map, where));
}

// Loads a tile, zeros where the box leaves the matrix. All of its bytes, zeros too, count at the barrier.
RNN_EXT_PTX_INLINE void tma_load(void* shared, const CUtensorMap* map, int x, int y, uint64_t* barrier,
                                 [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                                "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
                                "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)) : "memory"),
                   emu::tma_load(shared, map, x, y, barrier, 0, where));
}

// The same into the same place of every block of the cluster whose bit is in the mask, each with its own barrier.
RNN_EXT_PTX_INLINE void tma_load_multicast(void* shared, const CUtensorMap* map, int x, int y, uint64_t* barrier,
                                           uint16_t block_mask, [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90A(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                                 ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
                                 "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)), "h"(block_mask) : "memory"),
                    emu::tma_load(shared, map, x, y, barrier, block_mask, where));
}

// Stores a tile, but for what lies outside the matrix. Groups of stores are waited for as with cp.async.
RNN_EXT_PTX_INLINE void tma_store(const CUtensorMap* map, const void* shared, int x, int y,
                                  [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
                   "r"(x), "r"(y), "r"(shared_address(shared)) : "memory"),
      emu::tma_store(map, shared, x, y, where));
}
RNN_EXT_PTX_INLINE void tma_store_commit() {
  RNN_EXT_PTX_SM90(asm volatile("cp.async.bulk.commit_group;" :: : "memory"), emu::tma_store_commit());
}

// Waits until at most the `kGroups` latest groups of this thread still have to read shared memory.
template <int kGroups>
RNN_EXT_PTX_INLINE void tma_store_wait_read([[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory"),
                   emu::tma_store_wait_read(kGroups, where));
}

// Four 8x8 matrices of 16-bit elements, the other way round than ldmatrix_x4: lane 8 i + r gives the 16-byte aligned
// address of row r of matrix i, lane l holds elements 2 (l % 4) and the next of row l / 4.
RNN_EXT_PTX_INLINE void stmatrix_x4(void* row, const uint32_t (&fragment)[4],
                                    [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
                   "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3]) : "memory"),
      emu::stmatrix_x4(row, fragment, where));
}

// ---- warps ----------------------------------------------------------------------------------------------------------

// True in one lane of a converged warp, always the same one.
RNN_EXT_PTX_INLINE bool elect_one([[maybe_unused]] Where where = Where::here()) {
  uint32_t elected = 0;
  RNN_EXT_PTX_SM90(
      asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected)),
      elected = emu::elect_one(where));
  return elected != 0;
}

// Registers that the threads of a warpgroup may use from here on: fewer, then more in the others. All warpgroups of a
// block launched with __launch_bounds__(threads, 1) must do one or the other, and the sum must not exceed 64 K.
template <int kRegisters>
RNN_EXT_PTX_INLINE void release_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "counts that setmaxnreg takes");
  RNN_EXT_PTX_SM90A(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)), (void)0);
}
template <int kRegisters>
RNN_EXT_PTX_INLINE void claim_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "counts that setmaxnreg takes");
  RNN_EXT_PTX_SM90A(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)), (void)0);
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------
//
// Four warps multiply tiles in shared memory, asynchronously. Both operands are tiles as tma_load leaves them, at
// 1024-byte aligned addresses, and are handed over as descriptors:
//
//   K-major    rows are M or N, 128 bytes of k each. The next 16 (32-bit: 8) k are 32 bytes further on.
//   MN-major   rows are k, 64 16-bit elements of M or N each; the next 64 are another tile, `next_64` bytes further
//              on. The next 16 k are 2048 bytes further on.

constexpr uint32_t kSwizzleAtom = 1024;  // eight rows of 128 bytes, after which the swizzle repeats

RNN_EXT_PTX_INLINE uint64_t wgmma_descriptor(const void* shared, uint32_t leading, Where where) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  constexpr uint64_t k128ByteSwizzle = 1;
  return field(ptx::shared_address(shared, where)) | field(leading) << 16 | field(kSwizzleAtom) << 32 |
         k128ByteSwizzle << 62;
}
RNN_EXT_PTX_INLINE uint64_t wgmma_k_major(const void* shared, Where where = Where::here()) {
  return wgmma_descriptor(shared, 16, where);  // the leading dimension's offset is not looked at
}
RNN_EXT_PTX_INLINE uint64_t wgmma_mn_major(const void* shared, uint32_t next_64, Where where = Where::here()) {
  return wgmma_descriptor(shared, next_64, where);
}
// The same tile, `bytes` further on.
RNN_EXT_PTX_INLINE uint64_t wgmma_advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Before the first wgmma, and between other uses of the accumulators and the next.
RNN_EXT_PTX_INLINE void wgmma_fence() {
  RNN_EXT_PTX_SM90A(asm volatile("wgmma.fence.sync.aligned;" :: : "memory"), emu::wgmma_fence());
}

// Ends a group of this warp's wgmma.
RNN_EXT_PTX_INLINE void wgmma_commit() {
  RNN_EXT_PTX_SM90A(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"), emu::wgmma_commit());
}

// Waits until at most the `kGroups` latest groups are under way. With 0, the accumulators may be used; naming them
// keeps the compiler from doing that any earlier.
template <int kGroups>
RNN_EXT_PTX_INLINE void wgmma_wait([[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90A(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory"),
                    emu::wgmma_wait(kGroups, where));
}
template <int kCount>
RNN_EXT_PTX_INLINE void wgmma_wait_all([[maybe_unused]] float (&d)[kCount],
                                       [[maybe_unused]] Where where = Where::here()) {
  wgmma_wait<0>(where);
#pragma unroll
  for (int i = 0; i < kCount; ++i) RNN_EXT_PTX_SM90A(asm volatile("" : "+f"(d[i])::"memory"), (void)0);
}

#define RNN_EXT_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define RNN_EXT_REGISTERS_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," RNN_EXT_TEN(1) RNN_EXT_TEN(2) "%30,%31"
#define RNN_EXT_REGISTERS_64                                                                   \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," RNN_EXT_TEN(1) RNN_EXT_TEN(2) RNN_EXT_TEN(3) RNN_EXT_TEN(4) \
      RNN_EXT_TEN(5) "%60,%61,%62,%63"
#define RNN_EXT_REGISTERS_128                                                                                 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," RNN_EXT_TEN(1) RNN_EXT_TEN(2) RNN_EXT_TEN(3) RNN_EXT_TEN(4) RNN_EXT_TEN(5) \
      RNN_EXT_TEN(6) RNN_EXT_TEN(7) RNN_EXT_TEN(8) RNN_EXT_TEN(9) RNN_EXT_TEN(10)                             \
          RNN_EXT_TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127"
#define RNN_EXT_IN_OUT_8(i)                                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define RNN_EXT_IN_OUT_32(i) \
  RNN_EXT_IN_OUT_8(i), RNN_EXT_IN_OUT_8(i + 8), RNN_EXT_IN_OUT_8(i + 16), RNN_EXT_IN_OUT_8(i + 24)
#define RNN_EXT_IN_OUT_64(i) RNN_EXT_IN_OUT_32(i), RNN_EXT_IN_OUT_32(i + 32)
#define RNN_EXT_IN_OUT_128(i) RNN_EXT_IN_OUT_64(i), RNN_EXT_IN_OUT_64(i + 64)

// `a`, `b`, ... are the numbers of the operands after the accumulators.
#define RNN_EXT_WGMMA_16BIT(n, type, registers, a, b, p, ta, tb)                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type \
               "." type " {" RNN_EXT_REGISTERS_##registers "}, %" #a ", %" #b ", p, 1, 1, %" #ta ", %" #tb ";\n}"   \
               : RNN_EXT_IN_OUT_##registers(0)                                                                      \
               : "l"(desc_a), "l"(desc_b), "r"(add), "n"(kTransposedA), "n"(kTransposedB))
#define RNN_EXT_WGMMA_TF32(n, registers, a, b, p)                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n  \
               "k8.f32.tf32.tf32 {" RNN_EXT_REGISTERS_##registers "}, %" #a ", %" #b ", p, 1, 1;\n}" \
               : RNN_EXT_IN_OUT_##registers(0)                                                       \
               : "l"(desc_a), "l"(desc_b), "r"(add))
#define RNN_EXT_WGMMA(n, registers, a, b, p, ta, tb)            \
  if constexpr (std::is_same_v<T, float>) {                     \
    RNN_EXT_WGMMA_TF32(n, registers, a, b, p);                  \
  } else if constexpr (std::is_same_v<T, __half>) {             \
    RNN_EXT_WGMMA_16BIT(n, "f16", registers, a, b, p, ta, tb);  \
  } else {                                                      \
    RNN_EXT_WGMMA_16BIT(n, "bf16", registers, a, b, p, ta, tb); \
  }

// d (64 x N) = (add ? d : 0) + a (64 x k) b (k x N): k = 16 for T = __half and __nv_bfloat16, 8 for float, which stands
// for tf32: the unit ignores the low 13 bits. Transposed: the operand is MN-major, 16-bit types alone. Thread
// 32 w + 4 g + t of the warpgroup holds rows 16 w + g + {0, 8} and columns 8 j + 2 t + {0, 1} of d as
// d[4 j + {0, 2} + {0, 1}].
template <typename T, int N, bool kTransposedA = false, bool kTransposedB = false>
RNN_EXT_PTX_INLINE void wgmma(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, int add,
                              [[maybe_unused]] Where where = Where::here()) {
  static_assert(N == 64 || N == 128 || N == 256, "sizes written out below");
  static_assert(sizeof(T) == 2 || !(kTransposedA || kTransposedB), "tf32 operands are K-major");
#ifdef RNN_EXT_CUDA_HOST
  constexpr emu::WgmmaType type = std::is_same_v<T, float>    ? emu::WgmmaType::kTf32
                                  : std::is_same_v<T, __half> ? emu::WgmmaType::kF16
                                                              : emu::WgmmaType::kBf16;
  emu::wgmma(d, desc_a, desc_b, {type, N, kTransposedA, kTransposedB, add != 0}, where);
#elif !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (N == 64) {
    RNN_EXT_WGMMA(64, 32, 32, 33, 34, 35, 36);
  } else if constexpr (N == 128) {
    RNN_EXT_WGMMA(128, 64, 64, 65, 66, 67, 68);
  } else {
    RNN_EXT_WGMMA(256, 128, 128, 129, 130, 131, 132);
  }
#else
  __trap();
#endif
}

}  // namespace rnn_ext::cuda::ptx
