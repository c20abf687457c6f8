// Shared memory and launches: the one place for both, so that the same kernel source compiles under nvcc and, in the
// tests, under a host compiler with the runtime in tests/cuda_host (which defines RNN_EXT_CUDA_HOST and its own
// macros).
//
//   RNN_EXT_SMEM(T, s);                                        T& s names the block's dynamic shared memory
//   RNN_EXT_LAUNCH(kernel, grid, block, smem_bytes, stream, args...)   yields the launch's cudaError_t
//   RNN_EXT_LAUNCH_CLUSTER(kernel, grid, block, cluster, smem_bytes, stream, args...)
//                                                              the same in clusters of 1 to 8 blocks, from sm_90 on,
//                                                              each on a multiprocessor of its own if there are enough;
//                                                              or of up to 16 where the device allows it, else as below
//   RNN_EXT_LAUNCH_EARLY(kernel, grid, block, smem_bytes, stream, early, args...)
//                                                              the same as RNN_EXT_LAUNCH, and if `early`, the kernel
//                                                              may start before the one before it has ended. It calls
//                                                              ptx::wait_for_previous_launch before it touches memory
//   RNN_EXT_LAUNCH_COOPERATIVE(kernel, grid, block, smem_bytes, stream, args...)
//                                                              the same as RNN_EXT_LAUNCH, with all blocks resident at
//                                                              once, so that they may wait for one another. If the
//                                                              device has no room for them, nothing is launched, and it
//                                                              yields cudaErrorCooperativeLaunchTooLarge, which is not
//                                                              left behind as the last error
//   RNN_EXT_PLANTED(fault)                                     never true here: see tests/cuda_host/fixtures/faults.h
#pragma once

#ifdef RNN_EXT_CUDA_HOST
#include "cuda_host.h"
#else
#include <cuda_runtime.h>

#include <utility>

#define RNN_EXT_SMEM(T, s)                                        \
  extern __shared__ __align__(1024) unsigned char rnn_ext_smem[]; \
  T& s = *reinterpret_cast<T*>(rnn_ext_smem)

namespace rnn_ext::cuda {

constexpr size_t kDefaultSmemLimit = 48 * 1024;  // above it a kernel must opt in

constexpr unsigned kPortableClusterSize = 8;

enum class LaunchKind { kPlain, kEarly, kCooperative };

template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, dim3 cluster, LaunchKind kind, size_t smem_bytes,
                   cudaStream_t stream, A&&... args) {
  if (smem_bytes > kDefaultSmemLimit) {
    const cudaError_t e =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(smem_bytes));
    if (e != cudaSuccess) return e;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  const unsigned cluster_blocks = cluster.x * cluster.y * cluster.z;
  if (cluster_blocks > 1) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {cluster.x, cluster.y, cluster.z};
    // By default, blocks of which several fit one multiprocessor may share it while others are idle.
    attributes[1].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
    attributes[1].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicySpread;
    config.numAttrs = 2;
  } else if (kind == LaunchKind::kEarly) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  } else if (kind == LaunchKind::kCooperative) {
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    config.numAttrs = 1;
  }
  if (cluster_blocks > kPortableClusterSize) {
    const void* const function = reinterpret_cast<const void*>(kernel);
    int have_room = 0;
    cudaError_t e = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (e == cudaSuccess) e = cudaOccupancyMaxActiveClusters(&have_room, function, &config);
    if (e != cudaSuccess) return e;
    if (have_room == 0) return cudaErrorCooperativeLaunchTooLarge;
  }
  const cudaError_t e = cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...);
  if (e == cudaErrorCooperativeLaunchTooLarge) (void)cudaGetLastError();
  return e;
}

}  // namespace rnn_ext::cuda

#define RNN_EXT_LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  RNN_EXT_LAUNCH_CLUSTER(kernel, grid, block, dim3(1), smem_bytes, stream, __VA_ARGS__)

#define RNN_EXT_LAUNCH_CLUSTER(kernel, grid, block, cluster, smem_bytes, stream, ...)                            \
  ::rnn_ext::cuda::launch(kernel, grid, block, cluster, ::rnn_ext::cuda::LaunchKind::kPlain, smem_bytes, stream, \
                          __VA_ARGS__)

#define RNN_EXT_LAUNCH_EARLY(kernel, grid, block, smem_bytes, stream, early, ...)                              \
  ::rnn_ext::cuda::launch(kernel, grid, block, dim3(1),                                                        \
                          (early) ? ::rnn_ext::cuda::LaunchKind::kEarly : ::rnn_ext::cuda::LaunchKind::kPlain, \
                          smem_bytes, stream, __VA_ARGS__)

#define RNN_EXT_LAUNCH_COOPERATIVE(kernel, grid, block, smem_bytes, stream, ...)                                       \
  ::rnn_ext::cuda::launch(kernel, grid, block, dim3(1), ::rnn_ext::cuda::LaunchKind::kCooperative, smem_bytes, stream, \
                          __VA_ARGS__)

#define RNN_EXT_PLANTED(fault) false
#endif
