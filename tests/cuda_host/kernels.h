// The project's launchers by name: the table from which test_kernels.cpp and torch_ops.cpp take what they drive. A new
// kernel gets a line here.
#pragma once
#include "backward.cuh"
#include "backward_gemv.cuh"
#include "forward.cuh"
#include "forward_wgmma.h"
#include "rnn_cell_cuda.h"

namespace rnn_ext::cuda {

template <typename T>
struct ForwardKernel {
  const char* name;
  cudaError_t (*launch)(const ForwardParams<T>&, cudaStream_t);
  bool (*takes)(const ForwardParams<T>&) = nullptr;  // null: everything
};
template <typename T>
constexpr ForwardKernel<T> kForwardKernels[] = {
    {"forward_as_launched", &rnn_cell_forward<T>},
    {"forward_tiled_small", &launch_forward_tiled<T, SmallTile>},
    {"forward_tiled_large", &launch_forward_tiled<T, LargeTile>},
    {"forward_wgmma_64", &launch_forward_wgmma<T, 64>, &forward_wgmma_takes<T>},
    {"forward_wgmma_128", &launch_forward_wgmma<T, 128>, &forward_wgmma_takes<T>},
    {"forward_wgmma_256", &launch_forward_wgmma<T, 256>, &forward_wgmma_takes<T>},
};

template <typename T>
struct BackwardKernel {
  const char* name;
  cudaError_t (*launch)(const BackwardParams<T>&, cudaStream_t);
  int64_t max_batch = INT64_MAX;
};
template <typename T>
constexpr BackwardKernel<T> kBackwardKernels[] = {
    {"backward_as_launched", &rnn_cell_backward<T>},
    {"backward_gemv", &launch_backward_gemv<T>, kMaxGemvBatch},
    {"backward_tiled_small", &launch_backward_tiled<T, SmallTile>},
    {"backward_tiled_large", &launch_backward_tiled<T, LargeTile>},
};

}  // namespace rnn_ext::cuda
