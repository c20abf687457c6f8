// The operators on CUDA tensors: checks, allocation on the current stream's device, and the step down to csrc/cuda.
// The kernels take any strides, so no operand is ever copied.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "cell/ops.h"
#include "cuda/cell/launch.h"
#include "operators/cuda.h"
#include "operators/device_type.h"

namespace rnn_ext {
namespace {

// ---- the forward's plan ---------------------------------------------------------------------------------------------

// Whether three products of tf32, which keep float32's accuracy, may replace one of float32.
bool allows_split_tf32() {
  try {
    return cuda::allows_split_tf32(std::getenv("RNN_EXT_3XTF32"));
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

// Counters for the blocks that share a tile through global memory. They are zero between launches, so those of one
// stream, which follow each other, share a set. A captured graph may run beside the stream that it was captured on, and
// gets its own, which a node of the graph clears.
Tensor counters_of(c10::DeviceIndex device, cudaStream_t stream) {
  const auto zeros = [&] { return at::zeros({cuda::kMaxCounters}, at::device({at::kCUDA, device}).dtype(at::kInt)); };
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) return zeros();
  using Key = std::pair<c10::DeviceIndex, unsigned long long>;
  static std::mutex mutex;
  static auto& sets = *new std::map<Key, Tensor>;  // never destroyed: CUDA may be gone before it
  unsigned long long id = 0;
  C10_CUDA_CHECK(cudaStreamGetId(stream, &id));
  const std::lock_guard<std::mutex> lock(mutex);
  Tensor& set = sets[{device, id}];
  if (!set.defined()) set = zeros();
  return set;
}

// The products of a plan that leaves them to cuBLAS, through ATen and by the user's precision settings: (1 or 2, B, H),
// in float32 where they are of 16 bits.
Tensor cublas_products(const CellArguments& a) {
  const c10::impl::ExcludeDispatchKeyGuard nothing_around(c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                                          c10::autocast_dispatch_keyset);
  const auto options = a.input.element_size() == 2 ? a.input.options().dtype(at::kFloat) : a.input.options();
  auto products = at::empty({a.hx.has_value() ? 2 : 1, batch_size(a.input), a.weight_hh.size(0)}, options);
  const auto multiply = [&](int64_t i, const Tensor& operand, const Tensor& weight) {
    const auto rows = operand.dim() == 1 ? operand.unsqueeze(0) : operand;
    auto product = products.select(0, i);
    multiply_to_sums(product, rows, weight.t());
  };
  multiply(0, a.input, a.weight_ih);
  if (a.hx.has_value()) multiply(1, *a.hx, a.weight_hh);
  return products;
}

// ---- the operators --------------------------------------------------------------------------------------------------

Tensor rnn_cell_cuda(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                     const OptTensor& bias_ih_, const OptTensor& bias_hh_, std::string_view name) {
  const auto nonlinearity = check_forward({input, hx, weight_ih, weight_hh, bias_ih_, bias_hh_, name});
  const c10::cuda::CUDAGuard guard(input.device());
  const auto device = guard.current_device().index();
  const auto bias_ih = contiguous(bias_ih_), bias_hh = contiguous(bias_hh_);
  const CellArguments arguments = {input, hx, weight_ih, weight_hh, bias_ih, bias_hh, name};
  auto output = empty_output(arguments);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "rnn_cell", [&] {
    using T = DeviceType<scalar_t>;
    const auto p = forward_params<T>(arguments, output, nonlinearity);
    if (output.numel() == 0) return;
    constexpr bool is_float = std::is_same<T, float>::value;
    const auto c = cuda::forward_case(p, is_float && allows_tf32(), is_float && allows_split_tf32());
    const auto plan =
        remembered_plan(cuda::plan_forward, c, {c.batch, c.input_size, c.hidden_size}, device, "RNN_EXT_KERNEL");
    const auto stream = c10::cuda::getCurrentCUDAStream();
    Tensor workspace, counters;
    if (plan.family == cuda::ForwardPlan::Family::kCublas) {
      workspace = cublas_products(arguments);
    } else if (plan.workspace_bytes > 0) {
      workspace = at::empty({plan.workspace_bytes}, input.options().dtype(at::kByte));
      counters = counters_of(device, stream);
    }
    C10_CUDA_CHECK(
        cuda::rnn_cell_forward(p, plan, as_pointer<void>(workspace), as_pointer<uint32_t>(counters), stream));
  });
  return output;
}

std::vector<Tensor> rnn_cell_backward_cuda(const Tensor& grad_output, const Tensor& output, const OptTensor& input,
                                           const OptTensor& hx, const OptTensor& weight_ih, const OptTensor& weight_hh,
                                           std::string_view name, OutputMask output_mask) {
  const CellBackwardArguments arguments = {grad_output, output, input, hx, weight_ih, weight_hh, name, output_mask};
  const auto nonlinearity = check_backward(arguments);
  const c10::cuda::CUDAGuard guard(output.device());
  const int device = guard.current_device().index();
  auto gradients = empty_gradients(arguments);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, output.scalar_type(), "rnn_cell_backward", [&] {
    using T = DeviceType<scalar_t>;
    const auto p = backward_params<T>(arguments, gradients, nonlinearity);
    const auto c = cuda::backward_case(p);
    const auto plan = remembered_plan(cuda::plan_backward, c, {c.batch, c.input_size, c.hidden_size}, device,
                                      "RNN_EXT_BACKWARD_KERNEL");
    // From the caching allocator: its memory goes to others only behind the kernels on this stream.
    const Tensor workspace =
        plan.workspace_bytes > 0 ? at::empty({plan.workspace_bytes}, output.options().dtype(at::kByte)) : Tensor();
    C10_CUDA_CHECK(cuda::rnn_cell_backward(p, plan, as_pointer<void>(workspace), c10::cuda::getCurrentCUDAStream()));
  });
  return asked_gradients(std::move(gradients));
}

}  // namespace

TORCH_LIBRARY_IMPL(rnn_ext, CUDA, m) {
  m.impl("rnn_cell", &rnn_cell_cuda);
  m.impl("rnn_cell_backward", &rnn_cell_backward_cuda);
}

}  // namespace rnn_ext
