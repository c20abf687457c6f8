// The operators on CUDA tensors: checks, allocation on the current stream's device, and the step down to csrc/cuda.
// The kernels take any strides, so no operand is ever copied.
#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include "cuda/rnn_cell_cuda.h"
#include "ops.h"

namespace rnn_ext {
namespace {

template <typename T>
struct DeviceType {
  using type = T;
};
template <>
struct DeviceType<at::Half> {
  using type = __half;
};
template <>
struct DeviceType<at::BFloat16> {
  using type = __nv_bfloat16;
};

// Biases are vectors read once: the kernels take them contiguous.
OptTensor contiguous(const OptTensor& t) { return t.has_value() ? OptTensor(t->contiguous()) : t; }

Tensor rnn_cell_cuda(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                     const OptTensor& bias_ih_, const OptTensor& bias_hh_, std::string_view name) {
  const auto nonlinearity = check_forward(input, hx, weight_ih, weight_hh, bias_ih_, bias_hh_, name);
  const c10::cuda::CUDAGuard guard(input.device());
  const auto bias_ih = contiguous(bias_ih_), bias_hh = contiguous(bias_hh_);
  auto output = empty_output(input, weight_hh);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "rnn_cell", [&] {
    using T = typename DeviceType<scalar_t>::type;
    C10_CUDA_CHECK(cuda::rnn_cell_forward(
        forward_params<T>(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, output, nonlinearity),
        c10::cuda::getCurrentCUDAStream()));
  });
  return output;
}

std::vector<Tensor> rnn_cell_backward_cuda(const Tensor& grad_output, const Tensor& output, const OptTensor& input,
                                           const OptTensor& hx, const OptTensor& weight_ih, const OptTensor& weight_hh,
                                           std::string_view name, OutputMask output_mask) {
  const auto nonlinearity = check_backward(grad_output, output, input, hx, weight_ih, weight_hh, name, output_mask);
  const c10::cuda::CUDAGuard guard(output.device());
  auto gradients = empty_gradients(output, input, weight_ih, output_mask);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, output.scalar_type(), "rnn_cell_backward", [&] {
    using T = typename DeviceType<scalar_t>::type;
    const auto p = backward_params<T>(grad_output, output, input, hx, weight_ih, weight_hh, gradients, nonlinearity);
    cuda::BackwardPlan plan;
    C10_CUDA_CHECK(cuda::plan_rnn_cell_backward(p, &plan));
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
