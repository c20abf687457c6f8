// The low-overhead eager path: pybind11 entry points that call the dispatcher's typed handles below autograd, and the
// test that says whether a call may take it.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/extension.h>
#include <torch/library.h>

#include "cpu/rnn_cell_cpu.h"
#include "ops.h"

namespace rnn_ext {
namespace {

namespace py = pybind11;

#ifdef RNN_EXT_WITH_CUDA
constexpr bool kCudaBuilt = true;
#else
constexpr bool kCudaBuilt = false;
#endif

using ForwardOp = Tensor(const Tensor&, const OptTensor&, const Tensor&, const Tensor&, const OptTensor&,
                         const OptTensor&, std::string_view);
using BackwardOp = std::vector<Tensor>(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&,
                                       const OptTensor&, const OptTensor&, std::string_view, OutputMask);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// A Python string's own characters; anything else is no nonlinearity, and nn.RNNCell's error for one.
std::string_view as_name(const py::handle& object) {
  TORCH_CHECK(PyUnicode_Check(object.ptr()), "Unknown nonlinearity: ", std::string(py::str(object)));
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
  if (!data) throw py::error_already_set();
  return {data, static_cast<size_t>(size)};
}

Tensor rnn_cell(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                const OptTensor& bias_ih, const OptTensor& bias_hh, const py::handle& nonlinearity) {
  static const auto op = find_op<ForwardOp>("rnn_ext::rnn_cell");
  const auto name = as_name(nonlinearity);
  const py::gil_scoped_release no_gil;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, name);
}

std::vector<Tensor> rnn_cell_backward(const Tensor& grad_output, const Tensor& output, const OptTensor& input,
                                      const OptTensor& hx, const OptTensor& weight_ih, const OptTensor& weight_hh,
                                      std::string_view nonlinearity, OutputMask output_mask) {
  static const auto op = find_op<BackwardOp>("rnn_ext::rnn_cell_backward");
  const py::gil_scoped_release no_gil;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(grad_output, output, input, hx, weight_ih, weight_hh, nonlinearity, output_mask);
}

// The ways through rnn_ext.rnn_cell, chosen anew for each call.
enum class Path : int {
  kAten,      // the plain ATen composition: whatever the fused kernels don't take
  kKernel,    // the fused kernel alone: no gradient is needed
  kAutograd,  // RNNCellFunction
  kOperator,  // torch.ops.rnn_ext.rnn_cell, whose Autocast kernel casts first
};

bool is_fused_dtype(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}

// A dense tensor on a device that has our kernels, with no wrapper around it (functorch, subclass, sparse, quantized,
// functionalized, negated: all carry a dispatch key beyond these) and without a forward-mode tangent.
bool is_plain(const Tensor& t) {
  static const uint64_t plain_keys =
      (c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::ADInplaceOrView}) |
       c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset)
          .raw_repr() |
      c10::full_backend_mask;
  return (t.key_set().raw_repr() & ~plain_keys) == 0 && (t.is_cpu() || (kCudaBuilt && t.is_cuda())) &&
         is_fused_dtype(t.scalar_type()) && !t._fw_grad(/*level=*/0).defined();
}

bool transforms_active() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::jit::tracer::isTracing();
}

// True where a backward pass over these tensors (or None) may run the fused kernel: nothing in it is differentiated.
bool is_fused_backward(const py::args& tensors) {
  if (transforms_active() || at::GradMode::is_enabled()) return false;
  for (const auto& object : tensors) {
    if (!object.is_none() && !is_plain(THPVariable_Unpack(object.ptr()))) return false;
  }
  return true;
}

Path choose_path(const py::handle& input_, const py::handle& hx, const py::handle& weight_ih,
                 const py::handle& weight_hh_, const py::handle& bias_ih, const py::handle& bias_hh) {
  if (transforms_active()) return Path::kAten;
  if (!THPVariable_CheckExact(input_.ptr()) || !THPVariable_CheckExact(weight_hh_.ptr())) return Path::kAten;
  const Tensor& input = THPVariable_Unpack(input_.ptr());
  const Tensor& weight_hh = THPVariable_Unpack(weight_hh_.ptr());
  if (!is_plain(input)) return Path::kAten;
  const bool autocast = at::autocast::is_autocast_enabled(input.device().type());

  bool requires_grad = false;
  for (const auto& object : {input_, weight_ih, weight_hh_, hx, bias_ih, bias_hh}) {
    if (object.is_none()) continue;
    if (!THPVariable_CheckExact(object.ptr())) return Path::kAten;  // a subclass may override the ATen calls
    const Tensor& t = THPVariable_Unpack(object.ptr());
    if (!is_plain(t) || t.device() != input.device()) return Path::kAten;
    if (t.scalar_type() != input.scalar_type() && !autocast) return Path::kAten;
    requires_grad |= t.requires_grad();
  }
  for (const auto& bias : {bias_ih, bias_hh}) {  // nn.RNNCell broadcasts biases of other shapes
    if (bias.is_none()) continue;
    const Tensor& t = THPVariable_Unpack(bias.ptr());
    if (t.dim() != 1 || weight_hh.dim() != 2 || t.size(0) != weight_hh.size(1)) return Path::kAten;
  }
  if (autocast) return Path::kOperator;
  return requires_grad && at::GradMode::is_enabled() ? Path::kAutograd : Path::kKernel;
}

PYBIND11_MODULE(_C, m) {
  m.attr("cuda_built") = kCudaBuilt;
  m.attr("cuda_archs") = RNN_EXT_CUDA_ARCHS;
  py::enum_<Path>(m, "Path")
      .value("ATEN", Path::kAten)
      .value("KERNEL", Path::kKernel)
      .value("AUTOGRAD", Path::kAutograd)
      .value("OPERATOR", Path::kOperator);
  m.def("choose_path", [](const py::handle& input, const py::handle& hx, const py::handle& weight_ih,
                          const py::handle& weight_hh, const py::handle& bias_ih, const py::handle& bias_hh) {
    return static_cast<int>(choose_path(input, hx, weight_ih, weight_hh, bias_ih, bias_hh));
  });
  m.def("is_fused_backward", &is_fused_backward);
  m.def("check_sizes", &check_sizes);
  m.def("rnn_cell", &rnn_cell);
  m.def("rnn_cell_backward", &rnn_cell_backward);
  m.def("cpu_capability", &cpu::cpu_capability);
}

}  // namespace
}  // namespace rnn_ext
