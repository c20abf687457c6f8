// Views of the params as tensors, and one GEMM a product.
#include "cpu/aten_gemm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <c10/core/TensorOptions.h>

namespace rnn_ext::cpu {
namespace {

template <typename T>
at::Tensor view(const T* data, int64_t rows, int64_t cols, int64_t row_stride) {
  return at::from_blob(const_cast<T*>(data), {rows, cols}, {row_stride, 1},
                       at::dtype(c10::CppTypeToScalarType<T>::value));
}

template <typename T>
at::Tensor view(const Matrix<T>& m, int64_t rows, int64_t cols) {
  return view(m.data, rows, cols, m.row_stride);
}

}  // namespace

template <typename T>
void aten_gemm_forward(const ForwardParams<T>& p) {
  const int64_t B = p.batch, I = p.weights.input_size, H = p.weights.hidden_size;
  at::Tensor output = view(p.output, B, H, H);
  at::cpu::mm_out(output, view(p.input, B, I), view(p.weights.weight_ih, H, I).t());
  if (p.hx.data) at::cpu::addmm_out(output, output, view(p.hx, B, H), view(p.weights.weight_hh, H, H).t());
}

template <typename T>
void aten_gemm_backward(const BackwardParams<T>& p, const T* dz_data) {
  const int64_t B = p.batch, I = p.weights.input_size, H = p.weights.hidden_size;
  const at::Tensor dz = view(dz_data, B, H, H);
  const auto product = [](T* out_data, const at::Tensor& a, const at::Tensor& b) {
    if (out_data == nullptr) return;
    at::Tensor out = view(out_data, a.size(0), b.size(1), b.size(1));
    at::cpu::mm_out(out, a, b);
  };
  product(p.grad_input, dz, view(p.weights.weight_ih, H, I));
  product(p.grad_hx, dz, view(p.weights.weight_hh, H, H));
  product(p.grad_weight_ih, dz.t(), view(p.input, B, I));
  if (p.hx.data) product(p.grad_weight_hh, dz.t(), view(p.hx, B, H));
}

template void aten_gemm_forward(const ForwardParams<float>&);
template void aten_gemm_forward(const ForwardParams<double>&);
template void aten_gemm_backward(const BackwardParams<float>&, const float*);
template void aten_gemm_backward(const BackwardParams<double>&, const double*);

}  // namespace rnn_ext::cpu
