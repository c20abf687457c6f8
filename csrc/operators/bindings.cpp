// The Python module: the low-overhead eager path, the checks that Python code shares, and facts about the build.
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "cell/autograd.h"
#include "cpu/cell/plan.h"
#include "cpu/isa.h"
#include "cuda/plan/cell_backward.h"
#include "cuda/plan/cell_forward.h"
#include "cuda/plan/sequence.h"
#include "operators/autocast.h"
#include "operators/eligible.h"
#include "sequence/autograd.h"

namespace rnn_ext {
namespace {

namespace py = pybind11;

// A Python string's own characters; anything else is no nonlinearity, and nn.RNNCell's error for one.
std::string_view as_name(const py::handle& object) {
  TORCH_CHECK(PyUnicode_Check(object.ptr()), "Unknown nonlinearity: ", std::string(py::str(object)));
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
  if (!data) throw py::error_already_set();
  return {data, static_cast<size_t>(size)};
}

// Whether it is a tensor of no subclass, which might override the ATen calls, or None where that is allowed.
bool is_exact_tensor(const py::handle& object) { return THPVariable_CheckExact(object.ptr()); }
bool is_exact_or_none(const py::handle& object) { return object.is_none() || is_exact_tensor(object); }

const Tensor& as_tensor(const py::handle& object) { return THPVariable_Unpack(object.ptr()); }
OptTensor as_optional(const py::handle& object) {
  return object.is_none() ? std::nullopt : OptTensor(as_tensor(object));
}

// Whether a call is so short that to let other Python threads run meanwhile would take longer: a tenth of the smallest.
bool is_short(const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh) {
  constexpr int64_t kMultiplyAdds = 1 << 17;
  const int64_t rows = input.dim() > 1 && input.size(-1) > 0 ? input.numel() / input.size(-1) : 1;
  return input.is_cpu() && rows * (weight_ih.numel() + weight_hh.numel()) < kMultiplyAdds;
}

// The fused cell; None where the fused kernels don't take these arguments. pybind11's way in costs as much as a small
// cell's arithmetic.
PyObject* rnn_cell(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 7, "rnn_cell takes 7 arguments, but got ", count);
  const py::handle input = arguments[0], hx = arguments[1], weight_ih = arguments[2], weight_hh = arguments[3],
                   bias_ih = arguments[4], bias_hh = arguments[5];
  if (at::impl::torch_function_mode_enabled() || !is_exact_tensor(input) || !is_exact_tensor(weight_ih) ||
      !is_exact_tensor(weight_hh) || !is_exact_or_none(hx) || !is_exact_or_none(bias_ih) ||
      !is_exact_or_none(bias_hh)) {
    Py_RETURN_NONE;
  }
  const auto name = as_name(arguments[6]);
  OptTensor output;
  {
    std::optional<py::gil_scoped_release> no_gil;
    if (!is_short(as_tensor(input), as_tensor(weight_ih), as_tensor(weight_hh))) no_gil.emplace();
    output = rnn_cell_eager({as_tensor(input), as_optional(hx), as_tensor(weight_ih), as_tensor(weight_hh),
                             as_optional(bias_ih), as_optional(bias_hh), name});
  }
  if (!output.has_value()) Py_RETURN_NONE;
  return THPVariable_Wrap(*std::move(output));
  END_HANDLE_TH_ERRORS
}

// The same for a layer over a sequence: (output, h_n), or None. The last argument says whether hx and h_n have nn.RNN's
// dimension of layers in front, of size 1: to add and remove it in Python takes as long as a tiny sequence.
PyObject* rnn_layer(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 12, "rnn_layer takes 12 arguments, but got ", count);
  const py::handle input = arguments[0], hx = arguments[1], weight_ih = arguments[2], weight_hh = arguments[3],
                   bias_ih = arguments[4], bias_hh = arguments[5], lengths = arguments[9], batch_sizes = arguments[10];
  if (at::impl::torch_function_mode_enabled() || !is_exact_tensor(input) || !is_exact_or_none(hx) ||
      !is_exact_or_none(bias_ih) || !is_exact_or_none(bias_hh) || !is_exact_or_none(lengths) ||
      !is_exact_or_none(batch_sizes) || !is_exact_tensor(weight_ih) || !is_exact_tensor(weight_hh)) {
    Py_RETURN_NONE;
  }
  const auto name = as_name(arguments[6]);
  const auto is_true = [&](int i) { return py::handle(arguments[i]).cast<bool>(); };
  const bool reverse = is_true(7), batch_first = is_true(8), with_layers = is_true(11);
  std::optional<std::tuple<Tensor, Tensor>> outputs;
  {
    const OptTensor lengths_ = as_optional(lengths), batch_sizes_ = as_optional(batch_sizes);
    std::optional<py::gil_scoped_release> no_gil;
    if (!is_short(as_tensor(input), as_tensor(weight_ih), as_tensor(weight_hh))) no_gil.emplace();
    outputs = rnn_layer_eager({as_tensor(input),
                               as_optional(hx),
                               as_tensor(weight_ih),
                               as_tensor(weight_hh),
                               as_optional(bias_ih),
                               as_optional(bias_hh),
                               {name, reverse, batch_first, lengths_, batch_sizes_}},
                              with_layers);
  }
  if (!outputs.has_value()) Py_RETURN_NONE;
  const auto output = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::get<0>(*std::move(outputs))));
  const auto h_n = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::get<1>(*std::move(outputs))));
  return PyTuple_Pack(2, output.ptr(), h_n.ptr());
  END_HANDLE_TH_ERRORS
}

// What getattr(module, name) gives for each of the names. nn.Module's __getattr__ is Python, and for four parameters
// takes longer than the rest of a small cell: it is passed over where Python would come to it and it would find the
// name in a plain dict of parameters. So properties, attributes of the class or the object, overridden look-ups, and
// parameters in a container of their own count as they do elsewhere.
PyObject* get_parameters(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2 && PyTuple_Check(arguments[1]), "get_parameters takes a module and a tuple of names");
  const py::handle module = arguments[0], names = arguments[1];
  static PyObject* const getattr_name = PyUnicode_InternFromString("__getattr__");
  static PyObject* const getattribute_name = PyUnicode_InternFromString("__getattribute__");
  static PyObject* const parameters_name = PyUnicode_InternFromString("_parameters");
  static PyObject* const object_getattribute = _PyType_Lookup(&PyBaseObject_Type, getattribute_name);
  static PyObject* const module_getattr =
      py::object(py::module_::import("torch.nn").attr("Module").attr("__getattr__")).release().ptr();

  PyTypeObject* const type = Py_TYPE(module.ptr());
  const auto attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
  if (!attributes) throw py::error_already_set();
  PyObject* parameters = nullptr;
  if (_PyType_Lookup(type, getattr_name) == module_getattr &&
      _PyType_Lookup(type, getattribute_name) == object_getattribute) {
    parameters = PyDict_GetItemWithError(attributes.ptr(), parameters_name);
    if (parameters != nullptr && !PyDict_CheckExact(parameters)) parameters = nullptr;
  }
  py::tuple found(PyTuple_GET_SIZE(names.ptr()));
  for (size_t i = 0; i < found.size(); ++i) {
    PyObject* const name = PyTuple_GET_ITEM(names.ptr(), static_cast<Py_ssize_t>(i));
    PyObject* value = nullptr;
    if (parameters != nullptr && _PyType_Lookup(type, name) == nullptr &&
        PyDict_GetItemWithError(attributes.ptr(), name) == nullptr) {
      value = Py_XNewRef(PyDict_GetItemWithError(parameters, name));
    }
    if (value == nullptr && PyErr_Occurred() == nullptr) value = PyObject_GetAttr(module.ptr(), name);
    if (value == nullptr) throw py::error_already_set();
    PyTuple_SET_ITEM(found.ptr(), static_cast<Py_ssize_t>(i), value);
  }
  return found.release().ptr();
  END_HANDLE_TH_ERRORS
}

template <typename Function>
PyMethodDef method(const char* name, Function* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}
PyMethodDef kMethods[] = {
    method("rnn_cell", &rnn_cell), method("rnn_layer", &rnn_layer), method("get_parameters", &get_parameters), {}};

Tensor below_autograd(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                      const OptTensor& bias_ih, const OptTensor& bias_hh, const py::handle& nonlinearity) {
  const auto name = as_name(nonlinearity);
  const py::gil_scoped_release no_gil;
  const WithoutAutocastCache no_cache;
  return rnn_cell_below_autograd({input, hx, weight_ih, weight_hh, bias_ih, bias_hh, name});
}

std::vector<Tensor> gradients(const Tensor& grad_output, const Tensor& output, const OptTensor& input,
                              const OptTensor& hx, const OptTensor& weight_ih, const OptTensor& weight_hh,
                              std::string_view nonlinearity, OutputMask output_mask) {
  const py::gil_scoped_release no_gil;
  return rnn_cell_gradients({grad_output, output, input, hx, weight_ih, weight_hh, nonlinearity, output_mask});
}

void check_explained_sizes(int64_t batch, int64_t input_size, int64_t hidden_size) {
  TORCH_CHECK_VALUE(batch > 0 && input_size >= 0 && hidden_size > 0, "expected positive sizes, got batch ", batch,
                    ", input_size ", input_size, ", hidden_size ", hidden_size);
}

cuda::Dtype dtype_of_kernels(at::ScalarType dtype) {
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
                    "no kernel computes in ", dtype);
  return dtype == at::kFloat    ? cuda::Dtype::kFloat
         : dtype == at::kDouble ? cuda::Dtype::kDouble
         : dtype == at::kHalf   ? cuda::Dtype::kHalf
                                : cuda::Dtype::kBFloat16;
}

// Which kernels run on this CPU, forward and backward, and why.
std::string explain_cpu(int64_t batch, int64_t input_size, int64_t hidden_size, const at::ScalarType dtype) {
  check_explained_sizes(batch, input_size, hidden_size);
  return cpu::explain(batch, input_size, hidden_size, dtype);
}

// Also without CUDA: which kernels a GPU would run, forward and backward, and why.
std::string explain(int64_t batch, int64_t input_size, int64_t hidden_size, const at::ScalarType dtype,
                    int compute_capability, int multiprocessors, int64_t smem_per_block, bool tf32,
                    const std::string& split_tf32, const std::string& forced, const std::string& forced_backward) {
  check_explained_sizes(batch, input_size, hidden_size);
  const auto kind = dtype_of_kernels(dtype);
  // Contiguous tensors, as PyTorch's allocator aligns them.
  int vector_bytes = 16;
  while (vector_bytes > 0 && ((input_size | hidden_size) * cuda::bytes_of(kind)) % vector_bytes != 0) {
    vector_bytes = vector_bytes > 4 ? vector_bytes / 2 : 0;
  }
  const cuda::Device device = {compute_capability, multiprocessors, static_cast<size_t>(smem_per_block)};
  const bool tensor_maps = vector_bytes == 16 && input_size > 0;
  cuda::ForwardCase forward = {batch, input_size, hidden_size, /*hx=*/true, kind, vector_bytes, tensor_maps};
  forward.tf32 = tf32;
  forward.split_tf32 = cuda::allows_split_tf32(split_tf32.c_str());
  const cuda::BackwardCase all = {batch, input_size, hidden_size, kind,         true,       true,
                                  true,  true,       true,        vector_bytes, tensor_maps};
  return cuda::explain_forward(forward, device, forced.c_str()) + "\n" +
         cuda::explain_backward(all, device, forced_backward.c_str());
}

// The same for the steps of a layer over a sequence.
std::string explain_sequence(int64_t steps, int64_t batch, int64_t input_size, int64_t hidden_size,
                             const at::ScalarType dtype, int compute_capability, int multiprocessors,
                             int64_t smem_per_block, const std::string& forced) {
  check_explained_sizes(batch, input_size, hidden_size);
  TORCH_CHECK_VALUE(steps > 0, "expected a positive number of steps, got ", steps);
  const auto kind = dtype_of_kernels(dtype);
  const cuda::Device device = {compute_capability, multiprocessors, static_cast<size_t>(smem_per_block)};
  const bool aligned = hidden_size * cuda::bytes_of(kind) % 16 == 0;
  const cuda::SequenceCase forward = {steps, batch, hidden_size, kind, /*backward=*/false, /*packs_weight=*/!aligned};
  const cuda::SequenceCase backward = {steps, batch, hidden_size, kind, /*backward=*/true, /*packs_weight=*/true};
  return cuda::explain_sequence(forward, device, forced.c_str()) + "\n" +
         cuda::explain_sequence(backward, device, forced.c_str());
}

PYBIND11_MODULE(_C, m) {
  m.attr("cuda_built") = kCudaBuilt;
  m.attr("cuda_archs") = RNN_EXT_CUDA_ARCHS;
  PyModule_AddFunctions(m.ptr(), kMethods);
  m.def("rnn_cell_below_autograd", &below_autograd);
  m.def("rnn_cell_gradients", &gradients);
  m.def("check_sizes", &check_sizes);
  m.def("explain", &explain);
  m.def("explain_sequence", &explain_sequence);
  m.def("explain_cpu", &explain_cpu);
  m.def("cpu_capability", &cpu::cpu_capability);
}

}  // namespace
}  // namespace rnn_ext
