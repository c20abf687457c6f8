// The schemas of a layer over a sequence, and the kernels that need no device: Meta and Autocast. Its autograd formulas
// are registered by rnn_ext/ops.py.
#include "sequence/ops.h"

#include <torch/library.h>

#include "operators/autocast.h"

namespace rnn_ext {
namespace {

using std::string_view;

std::tuple<Tensor, Tensor> rnn_layer_meta(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih,
                                          const Tensor& weight_hh, const OptTensor& bias_ih, const OptTensor& bias_hh,
                                          string_view nonlinearity, bool reverse, bool batch_first,
                                          const OptTensor& lengths, const OptTensor& batch_sizes) {
  const LayerArguments arguments = {
      input, hx, weight_ih, weight_hh, bias_ih, bias_hh, {nonlinearity, reverse, batch_first, lengths, batch_sizes}};
  check_layer_forward(arguments);
  return empty_layer_outputs(arguments);
}

std::vector<Tensor> rnn_layer_backward_meta(const OptTensor& grad_output, const OptTensor& grad_h_n,
                                            const Tensor& output, const OptTensor& input, const OptTensor& hx,
                                            const OptTensor& weight_ih, const OptTensor& weight_hh,
                                            string_view nonlinearity, OutputMask output_mask, bool reverse,
                                            bool batch_first, const OptTensor& lengths, const OptTensor& batch_sizes) {
  const LayerBackwardArguments arguments = {
      grad_output, grad_h_n,  output,    input,
      hx,          weight_ih, weight_hh, {nonlinearity, reverse, batch_first, lengths, batch_sizes},
      output_mask};
  check_layer_backward(arguments);
  return asked_gradients(empty_layer_gradients(arguments));
}

struct Layer {
  static constexpr auto kName = "rnn_ext::rnn_layer";
  using Signature = decltype(rnn_layer_meta);
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(rnn_ext, m) {
  m.def(
      "rnn_layer(Tensor input, Tensor? hx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih=None, "
      "Tensor? bias_hh=None, str nonlinearity=\"tanh\", bool reverse=False, bool batch_first=False, "
      "Tensor? lengths=None, Tensor? batch_sizes=None) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rnn_layer_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor output, Tensor? input, Tensor? hx, "
      "Tensor? weight_ih, Tensor? weight_hh, str nonlinearity, bool[6] output_mask, bool reverse, bool batch_first, "
      "Tensor? lengths, Tensor? batch_sizes) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(rnn_ext, Meta, m) {
  m.impl("rnn_layer", &rnn_layer_meta);
  m.impl("rnn_layer_backward", &rnn_layer_backward_meta);
}

TORCH_LIBRARY_IMPL(rnn_ext, AutocastCPU, m) { m.impl("rnn_layer", &Autocast<at::kCPU, Layer>::call); }
TORCH_LIBRARY_IMPL(rnn_ext, AutocastCUDA, m) { m.impl("rnn_layer", &Autocast<at::kCUDA, Layer>::call); }

}  // namespace rnn_ext
