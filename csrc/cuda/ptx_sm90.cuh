// Inline PTX and polling loops of sm_90 and later; ptx.cuh has the rest and says how wrappers are made.
#pragma once
#include "ptx.cuh"
#ifdef RNN_EXT_CUDA_HOST
#include "hopper.h"
#endif

// RNN_EXT_PTX_SM90(device, host): one of the two, or a trap below that architecture.
#if defined(RNN_EXT_CUDA_HOST)
#define RNN_EXT_PTX_SM90(device, host) host
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RNN_EXT_PTX_SM90(device, host) device
#else
#define RNN_EXT_PTX_SM90(device, host) __trap()
#endif

namespace rnn_ext::cuda::ptx {

// ---- clusters -------------------------------------------------------------------------------------------------------
//
// The blocks of RNN_EXT_LAUNCH_CLUSTER. What the threads of a cluster wrote before cluster_arrive, in global memory or
// in anyone's shared memory, all of them see after cluster_wait. A block's shared memory may be touched by others only
// between a cluster_sync that it has taken part in, which says that it has started, and one that it has yet to pass,
// without which it might have exited.

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

// The two halves of a barrier of all threads of the cluster; none may exit before it has waited.
RNN_EXT_PTX_INLINE void cluster_arrive([[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM90(asm volatile("barrier.cluster.arrive.release;" :: : "memory"), emu::cluster_arrive(where));
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

}  // namespace rnn_ext::cuda::ptx
