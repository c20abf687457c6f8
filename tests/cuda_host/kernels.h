// The project's launchers by name: the table from which test_kernels.cpp and torch_ops.cpp take what they drive. A new
// kernel gets a line here.
#pragma once
#include "cuda/cell/backward.cuh"
#include "cuda/cell/backward_wgmma.h"
#include "cuda/cell/forward.cuh"
#include "cuda/cell/forward_wgmma.h"
#include "cuda/cell/launch.h"

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace rnn_ext::cuda {

// In cuBLAS's place.
template <typename T>
void multiply_as_cublas(const ForwardParams<T>& p, Accumulator<T>* products) {
  const auto multiply = [&](const Matrix<T>& a, const Matrix<T>& weight, int64_t depth) {
    for (int64_t i = 0; i < p.batch * p.weights.hidden_size; ++i) {
      const int64_t row = i / p.weights.hidden_size, column = i % p.weights.hidden_size;
      Accumulator<T> sum = 0;
      for (int64_t k = 0; k < depth; ++k) {
        sum += widen(a.data[row * a.row_stride + k * a.col_stride]) *
               widen(weight.data[column * weight.row_stride + k * weight.col_stride]);
      }
      *products++ = sum;
    }
  };
  multiply(p.input, p.weights.weight_ih, p.weights.input_size);
  if (p.hx.data != nullptr) multiply(p.hx, p.weights.weight_hh, p.weights.hidden_size);
}

// As ops_cuda.cpp does it: a workspace that holds anything, counters that are zero and must be so again.
template <typename T>
cudaError_t launch_plan(const ForwardParams<T>& p, const ForwardPlan& plan) {
  std::unique_ptr<unsigned char[]> workspace(new unsigned char[plan.workspace_bytes]);
  std::fill_n(workspace.get(), plan.workspace_bytes, 0xff);  // NaN
  if (plan.family == ForwardPlan::Family::kCublas)
    multiply_as_cublas(p, reinterpret_cast<Accumulator<T>*>(workspace.get()));
  std::vector<uint32_t> counters(kMaxCounters);
  const cudaError_t e = rnn_cell_forward(p, plan, workspace.get(), counters.data(), nullptr);
  for (const uint32_t counter : counters) {
    if (counter != 0) throw std::logic_error("FAIL a counter is not left at zero, as expected");
  }
  return e;
}

// The kernel that would run on a GPU of this compute capability.
template <typename T, int kComputeCapability>
cudaError_t launch_forward(const ForwardParams<T>& p, cudaStream_t) {
  return launch_plan(p, plan_forward(forward_case(p, false, true), {kComputeCapability}, nullptr));
}

// Tiles 128 high and BN wide, on as many multiprocessors as the test says. fp32: as three products of tf32. K is split
// as often as it can be, up to kSplits.
template <typename T, int BN, int kSplits = 1>
cudaError_t launch_wgmma(const ForwardParams<T>& p, cudaStream_t) {
  const int64_t bk = 128 / sizeof(T);
  const int64_t k_tiles =
      ceil_div(p.weights.input_size, bk) + (p.hx.data != nullptr ? ceil_div(p.weights.hidden_size, bk) : 0);
  int splits = kSplits;
  while (splits > k_tiles) splits /= 2;
  const std::string name = (sizeof(T) == 4 ? "3xtf32_128x" : "wgmma_128x") + std::to_string(BN);
  const std::string forced = name + ":" + std::to_string(splits);
  return launch_plan(p, plan_forward(forward_case(p, false, true), {90, emu::options.multiprocessors}, forced.c_str()));
}

template <typename T>
struct ForwardKernel {
  const char* name;
  cudaError_t (*launch)(const ForwardParams<T>&, cudaStream_t);
  bool (*takes)(const ForwardParams<T>&) = nullptr;  // null: everything
  bool computes = true;                              // this dtype at all
};
template <typename T>
constexpr ForwardKernel<T> kForwardKernels[] = {
    {"forward_as_launched", &launch_forward<T, 90>},
    {"forward_as_launched_sm_80", &launch_forward<T, 80>},
    {"forward_as_launched_sm_75", &launch_forward<T, 75>},
    {"forward_wgmma_64", &launch_wgmma<T, 64>, &forward_wgmma_takes<T>},
    {"forward_wgmma_128", &launch_wgmma<T, 128>, &forward_wgmma_takes<T>},
    {"forward_wgmma_256", &launch_wgmma<T, 256>, &forward_wgmma_takes<T>, sizeof(T) == 2},
    {"forward_wgmma_in_2", &launch_wgmma<T, 256, 2>, &forward_wgmma_takes<T>, sizeof(T) == 2},
    {"forward_wgmma_in_4", &launch_wgmma<T, 256, 4>, &forward_wgmma_takes<T>, sizeof(T) == 2},
};

// With a workspace of exactly the size that the plan asks for, where an out-of-bounds access shows.
template <typename T>
cudaError_t launch_with_workspace(const BackwardParams<T>& p, const BackwardPlan& plan, cudaStream_t stream) {
  const std::unique_ptr<char[]> workspace(new char[plan.workspace_bytes]);
  return rnn_cell_backward(p, plan, plan.workspace_bytes > 0 ? workspace.get() : nullptr, stream);
}
// The kernel that would run on a GPU, or the one of that name on a GPU of that compute capability. Where T has none of
// that name there, the one that would run.
template <typename T>
cudaError_t launch_backward_as_planned(const BackwardParams<T>& p, cudaStream_t stream) {
  return launch_with_workspace(p, plan_backward(backward_case(p), {}, nullptr), stream);
}
enum BackwardName { kGemv, kSmall, kMid, kLarge, kStaged, kWgmma128, kWgmma256 };
template <typename T, BackwardName kName, int kComputeCapability>
cudaError_t launch_backward_named(const BackwardParams<T>& p, cudaStream_t stream) {
  constexpr const char* kNames[] = {"gemv",         "tiled_small",   "tiled_mid",    "tiled_large",
                                    "tiled_staged", "wgmma_128x128", "wgmma_128x256"};
  const BackwardCase c = backward_case(p);
  const bool tiled = kName >= kSmall && kName <= kStaged;  // on one multiprocessor, so that blocks have several tiles
  const Device device = {kComputeCapability, tiled ? 1 : emu::options.multiprocessors};
  BackwardPlan plan;
  try {
    plan = plan_backward(c, device, kNames[kName]);
  } catch (const std::invalid_argument&) {
    plan = plan_backward(c, device, nullptr);
  }
  return launch_with_workspace(p, plan, stream);
}

template <typename T>
struct BackwardLauncher {
  const char* name;
  cudaError_t (*launch)(const BackwardParams<T>&, cudaStream_t);
  bool rounds_dz = true;  // to the operands' dtype, as nn.RNNCell does
  int64_t max_batch = INT64_MAX;
  bool (*takes)(const BackwardParams<T>&) = nullptr;  // null: everything
  bool computes = true;                               // this dtype at all
};
template <typename T>
constexpr BackwardLauncher<T> kBackwardKernels[] = {
    {"backward_as_launched", &launch_backward_as_planned<T>},
    {"backward_gemv", &launch_backward_named<T, kGemv, 90>, false, kBackwardGemvMaxBatch},
    {"backward_tiled_small", &launch_backward_named<T, kSmall, 90>},
    {"backward_tiled_mid", &launch_backward_named<T, kMid, 90>},
    {"backward_tiled_large", &launch_backward_named<T, kLarge, 90>},
    {"backward_tiled_staged", &launch_backward_named<T, kStaged, 80>},
    {"backward_tiled_turing", &launch_backward_named<T, kStaged, 75>},
    {"backward_wgmma_128", &launch_backward_named<T, kWgmma128, 90>, true, INT64_MAX, &backward_wgmma_takes<T>,
     kBackwardWgmmaComputes<T>},
    {"backward_wgmma_256", &launch_backward_named<T, kWgmma256, 90>, true, INT64_MAX, &backward_wgmma_takes<T>,
     kBackwardWgmmaComputes<T>},
};

}  // namespace rnn_ext::cuda
