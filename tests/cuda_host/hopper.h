// Host bodies of the wrappers of csrc/cuda/ptx_sm90.cuh.
#pragma once
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

}  // namespace emu
