// The CUDA launchers as PyTorch operators on CPU tensors, run by the host runtime: with them pytest drives the kernels
// through the same checks as the CPU path. Kernels are named as in kernels.h; `seed` picks the schedule.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <string>

#include "cell/ops.h"
#include "kernels.h"
#include "operators/device_type.h"

namespace rnn_ext {
namespace {

template <typename Kernel, size_t n>
const Kernel& find(const Kernel (&kernels)[n], const std::string& name) {
  for (const Kernel& kernel : kernels) {
    if (name == kernel.name) return kernel;
  }
  TORCH_CHECK_VALUE(false, "no kernel ", name, " in kernels.h");
}

// NaN, so that an element that no thread writes shows.
Tensor unwritten(at::IntArrayRef size, const Tensor& like) {
  return at::full(size, std::numeric_limits<double>::quiet_NaN(), like.options());
}

Tensor forward(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
               const OptTensor& bias_ih, const OptTensor& bias_hh, int64_t nonlinearity, const std::string& kernel,
               int64_t seed) {
  emu::set_options_from_seed(static_cast<uint64_t>(seed));
  const Tensor output = unwritten({input.size(0), weight_hh.size(0)}, input);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "forward", [&] {
    using T = DeviceType<scalar_t>;
    const auto p = forward_params<T>({input, hx, weight_ih, weight_hh, bias_ih, bias_hh, ""}, output,
                                     static_cast<Nonlinearity>(nonlinearity));
    TORCH_CHECK(find(cuda::kForwardKernels<T>, kernel).launch(p, nullptr) == cudaSuccess, "the launch failed");
  });
  return output;
}

std::vector<Tensor> backward(const Tensor& grad_output, const Tensor& output, const Tensor& input, const OptTensor& hx,
                             const Tensor& weight_ih, const Tensor& weight_hh, int64_t nonlinearity,
                             const std::string& kernel, int64_t seed) {
  emu::set_options_from_seed(static_cast<uint64_t>(seed));
  std::array<Tensor, kNumGradients> gradients;
  gradients[kGradInput] = unwritten(input.sizes(), input);
  if (hx.has_value()) gradients[kGradHx] = unwritten(hx->sizes(), input);
  gradients[kGradWeightIh] = unwritten(weight_ih.sizes(), input);
  gradients[kGradWeightHh] = unwritten(weight_hh.sizes(), input);
  gradients[kGradBiasIh] = unwritten({weight_hh.size(0)}, input);
  gradients[kGradBiasHh] = unwritten({weight_hh.size(0)}, input);
  const OptTensor some_input = input, some_weight_ih = weight_ih, some_weight_hh = weight_hh;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "backward", [&] {
    using T = DeviceType<scalar_t>;
    const auto p =
        backward_params<T>({grad_output, output, some_input, hx, some_weight_ih, some_weight_hh, "", OutputMask{}},
                           gradients, static_cast<Nonlinearity>(nonlinearity));
    TORCH_CHECK(find(cuda::kBackwardKernels<T>, kernel).launch(p, nullptr) == cudaSuccess, "the launch failed");
  });
  std::vector<Tensor> asked;
  for (const Tensor& g : gradients) {
    if (g.defined()) asked.push_back(g);
  }
  return asked;
}

template <typename Kernel, size_t n>
std::vector<std::string> names(const Kernel (&kernels)[n]) {
  std::vector<std::string> all;
  for (const Kernel& kernel : kernels) all.emplace_back(kernel.name);
  return all;
}

}  // namespace

TORCH_LIBRARY(rnn_ext_cuda_host, m) {
  m.def(
      "forward(Tensor input, Tensor? hx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
      "int nonlinearity, str kernel, int seed) -> Tensor");
  m.def(
      "backward(Tensor grad_output, Tensor output, Tensor input, Tensor? hx, Tensor weight_ih, Tensor weight_hh, "
      "int nonlinearity, str kernel, int seed) -> Tensor[]");
  m.def("forward_kernels() -> str[]", [] { return names(cuda::kForwardKernels<float>); });
  m.def("backward_kernels() -> str[]", [] { return names(cuda::kBackwardKernels<float>); });
}

TORCH_LIBRARY_IMPL(rnn_ext_cuda_host, CPU, m) {
  m.impl("forward", &forward);
  m.impl("backward", &backward);
}

}  // namespace rnn_ext
