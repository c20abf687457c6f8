// Host bodies of the wrappers of csrc/cuda/ptx/ptx_sm90.cuh.
//
// The asynchronous proxy (TMA and wgmma) is a thread apart. It learns of a thread's writes to shared memory through
// fence_proxy_async alone, of its own earlier copies by itself, and of the place in time at which a copy was asked for;
// it never learns of anything through a barrier of threads.
#pragma once
#include <cuda.h>

#include "runtime.h"
#include "traffic.h"

namespace emu {

// ---- shared memory of a cluster -------------------------------------------------------------------------------------

// `words` words of shared memory of any block of the cluster. The blocks must be there; that they still are when the
// access happens, and not only by luck, ThreadSanitizer checks.
template <size_t words>
void ld_cluster(uint32_t (&value)[words], uint32_t address, Where where) {
  const auto* from = static_cast<const uint32_t*>(cluster_memory(address, 4 * words, "ld.shared::cluster", where));
  for (size_t i = 0; i < words; ++i) value[i] = traffic::load32(from + i);
}
template <size_t words>
void st_cluster(uint32_t address, const uint32_t (&value)[words], Where where) {
  auto* to = static_cast<uint32_t*>(cluster_memory(address, 4 * words, "st.shared::cluster", where));
  for (size_t i = 0; i < words; ++i) traffic::store32(to + i, value[i]);
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------

void mbarrier_init(uint64_t* barrier, uint32_t count, Where where);
void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes, Where where);
void mbarrier_arrive_cluster(uint32_t address, bool releases, Where where);
// What a wait shows: what the block's own threads and the copy engine have written; that and what st.async has brought;
// that and what other blocks have released.
enum class Acquires { kBlock, kShared, kCluster };
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Acquires acquires, Where where);
void fence_mbarrier_init();

// The store lands as a piece of engine work of its own, after all that its thread had done before. More lenient than
// the device in one thing: whoever waits for it is taken to see what else that thread had written before, too.
void st_async(uint32_t address, const uint32_t* words, size_t count, uint32_t barrier_address, Where where);
template <size_t count>
void st_async(uint32_t address, const uint32_t (&words)[count], uint32_t barrier_address, Where where) {
  st_async(address, words, count, barrier_address, where);
}

void fence_proxy_async();

// ---- TMA ------------------------------------------------------------------------------------------------------------

// The driver's function, as far as it is used here; what it refuses, this does too.
CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);
void check_tensor_map(const CUtensorMap* map, Where where);

// A mask of 0 stands for the block itself.
void tma_load(void* shared, const CUtensorMap* map, int x, int y, uint64_t* barrier, uint32_t block_mask, Where where);
void tma_store(const CUtensorMap* map, const void* shared, int x, int y, Where where);
void tma_store_commit();
void tma_store_wait_read(int groups, Where where);

// ---- warps ----------------------------------------------------------------------------------------------------------

bool elect_one(Where where);

// ---- wgmma ----------------------------------------------------------------------------------------------------------

enum class WgmmaType { kF16, kBf16, kTf32 };
struct WgmmaShape {
  WgmmaType type;
  int n;
  bool transposed_a, transposed_b, add;
};
void wgmma(float* d, uint64_t a, uint64_t b, WgmmaShape shape, Where where);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups, Where where);

}  // namespace emu
