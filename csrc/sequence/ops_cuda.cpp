// The operators of a layer over a sequence on CUDA tensors: checks, and a recurrence by the kernels of csrc/cuda. They
// take any strides. Nothing waits for the GPU, so that a CUDA graph can hold a call.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/sequence/launch.h"
#include "operators/cuda.h"
#include "sequence/recurrence.h"

namespace rnn_ext {
namespace {

// The GPU at hand and its current stream, as recurrence.h asks for it.
class Gpu {
 public:
  explicit Gpu(const Tensor& t) : guard_(t.device()), stream_(c10::cuda::getCurrentCUDAStream()), bytes_(t.options()) {}

  template <typename T>
  void forward(const cuda::RecurrenceForwardParams<T>& p, const Steps& host) const {
    run(p, [&](const auto& plan, void* workspace) { return recurrence_forward(p, host, plan, workspace, stream_); });
  }
  template <typename T>
  void backward(const cuda::RecurrenceBackwardParams<T>& p, const Steps& host) const {
    run(p, [&](const auto& plan, void* workspace) { return recurrence_backward(p, host, plan, workspace, stream_); });
  }
  void write_table(const int64_t* numbers, int64_t size, int64_t* table) const {
    C10_CUDA_CHECK(cuda::write_table(numbers, size, table, stream_));
  }
  template <typename T>
  void previous_states(const Steps& steps, bool reverse, int64_t hidden_size, const Rows<const T>& output,
                       const Matrix<T>& hx, const Rows<T>& previous) const {
    C10_CUDA_CHECK(cuda::previous_states(steps, reverse, hidden_size, output, hx, previous, stream_));
  }
  void multiply_to_sums(Tensor& sums, const Tensor& a, const Tensor& b) const { rnn_ext::multiply_to_sums(sums, a, b); }

 private:
  const c10::cuda::CUDAGuard guard_;
  const c10::cuda::CUDAStream stream_;
  const at::TensorOptions bytes_;
  const c10::impl::ExcludeDispatchKeyGuard nothing_around_{c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                                           c10::autocast_dispatch_keyset};

  template <typename Params, typename Launch>
  void run(const Params& p, Launch launch) const {
    cuda::SequenceCase c = cuda::recurrence_case(p);
    c.tf32 = c.dtype == cuda::Dtype::kFloat && allows_tf32();
    cudaError_t error = launch_planned(c, launch);
    if (error == cudaErrorCooperativeLaunchTooLarge) {  // others have a part of the GPU
      c.whole_gpu = false;
      error = launch_planned(c, launch);
    }
    C10_CUDA_CHECK(error);
  }

  template <typename Launch>
  cudaError_t launch_planned(const cuda::SequenceCase& c, Launch launch) const {
    const auto plan =
        remembered_plan(cuda::plan_sequence, c, {c.steps, c.batch, c.hidden_size, c.backward, c.whole_gpu},
                        guard_.current_device().index(), "RNN_EXT_SEQUENCE_KERNEL");
    // From the caching allocator: its memory goes to others only behind the kernels on this stream.
    const auto workspace = at::empty({plan.workspace_bytes}, bytes_.dtype(at::kByte));
    return launch(plan, as_pointer<void>(workspace));
  }
};

std::tuple<Tensor, Tensor> rnn_layer_cuda(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih,
                                          const Tensor& weight_hh, const OptTensor& bias_ih, const OptTensor& bias_hh,
                                          std::string_view name, bool reverse, bool batch_first,
                                          const OptTensor& lengths, const OptTensor& batch_sizes) {
  const LayerArguments arguments = {
      input, hx, weight_ih, weight_hh, bias_ih, bias_hh, {name, reverse, batch_first, lengths, batch_sizes}};
  const auto nonlinearity = check_layer_forward(arguments);
  return layer_forward_on(Gpu(input), arguments, nonlinearity);
}

std::vector<Tensor> rnn_layer_backward_cuda(const OptTensor& grad_output, const OptTensor& grad_h_n,
                                            const Tensor& output, const OptTensor& input, const OptTensor& hx,
                                            const OptTensor& weight_ih, const OptTensor& weight_hh,
                                            std::string_view name, OutputMask output_mask, bool reverse,
                                            bool batch_first, const OptTensor& lengths, const OptTensor& batch_sizes) {
  const LayerOptions options = {name, reverse, batch_first, lengths, batch_sizes};
  const LayerBackwardArguments arguments = {grad_output, grad_h_n,  output,  input,      hx,
                                            weight_ih,   weight_hh, options, output_mask};
  const auto nonlinearity = check_layer_backward(arguments);
  return layer_backward_on(Gpu(output), arguments, nonlinearity);
}

}  // namespace

TORCH_LIBRARY_IMPL(rnn_ext, CUDA, m) {
  m.impl("rnn_layer", &rnn_layer_cuda);
  m.impl("rnn_layer_backward", &rnn_layer_backward_cuda);
}

}  // namespace rnn_ext
