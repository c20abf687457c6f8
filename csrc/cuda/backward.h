// The backward's launchers, each compiled in files of its own, and what chooses among them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backward_plan.h"
#include "rnn_cell_cuda.h"

namespace rnn_ext::cuda {

constexpr int kMaxGemvBatch = 8;

template <typename T>
cudaError_t launch_backward_gemv(const BackwardParams<T>& p, cudaStream_t stream);

template <typename T>
cudaError_t launch_backward_tiled(const BackwardParams<T>& p, const BackwardPlan& plan, void* workspace,
                                  cudaStream_t stream);

// What plan_backward has to know of the params.
template <typename T>
BackwardCase backward_case(const BackwardParams<T>& p);

// The current device.
cudaError_t backward_device(BackwardDevice* device);

template <typename T>
struct BackwardDtypeOf;
template <>
struct BackwardDtypeOf<float> {
  static constexpr BackwardDtype value = BackwardDtype::kFloat;
};
template <>
struct BackwardDtypeOf<double> {
  static constexpr BackwardDtype value = BackwardDtype::kDouble;
};
template <>
struct BackwardDtypeOf<__half> {
  static constexpr BackwardDtype value = BackwardDtype::kHalf;
};
template <>
struct BackwardDtypeOf<__nv_bfloat16> {
  static constexpr BackwardDtype value = BackwardDtype::kBFloat16;
};

}  // namespace rnn_ext::cuda
