// The launcher: does what the plan says. No sum is ever split between threads, so the fused kernels' results don't
// depend on how many there are.
#include "cpu/cell/launch.h"

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cstring>

#include "cpu/aten_gemm.h"
#include "cpu/cell/plan.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace rnn_ext::cpu {
namespace {

template <typename T>
CellSizes sizes_of(const ForwardParams<T>& p) {
  return {p.batch, p.weights.input_size, p.weights.hidden_size, p.hx.data != nullptr};
}
template <typename T>
CellSizes sizes_of(const BackwardParams<T>& p) {
  return {p.batch, p.weights.input_size, p.weights.hidden_size, p.hx.data != nullptr};
}

// A rectangle of the output's tiles.
template <typename T>
void compute_tiles(const ForwardParams<T>& p, const OutputTiles<T>& tiles, int64_t row_begin, int64_t row_end,
                   int64_t col_begin, int64_t col_end) {
  kernels<T>().forward(p, row_begin * kTileRows<T>, row_end == tiles.rows ? p.batch : row_end * kTileRows<T>,
                       col_begin * kTileCols, std::min(col_end * kTileCols, p.weights.hidden_size));
}

// A run of them, in at most three rectangles: the rest of a row, whole rows, the beginning of one.
template <typename T>
void compute_tiles(const ForwardParams<T>& p, const OutputTiles<T>& tiles, int64_t begin, int64_t end) {
  const int64_t cols = tiles.cols;
  if (const int64_t col = begin % cols; col != 0) {
    const int64_t row = begin / cols, rest = std::min(cols - col, end - begin);
    compute_tiles(p, tiles, row, row + 1, col, col + rest);
    begin += rest;
  }
  const int64_t row = begin / cols, row_end = end / cols;
  if (row < row_end) compute_tiles(p, tiles, row, row_end, 0, cols);
  if (begin < end && end % cols != 0) compute_tiles(p, tiles, row_end, row_end + 1, 0, end % cols);
}

// The backward's products as one list of strips for the threads.
template <typename T>
class ProductList {
 public:
  void add(const Product<T>& product) {
    if (product.c == nullptr || product.rows == 0 || product.cols == 0) return;
    const Entry entry = {product, strips_, strips_of(product.cols)};
    entries_[size_++] = entry;
    strips_ += entry.strips;
  }

  int64_t strips() const { return strips_; }

  void compute(int64_t begin, int64_t end) const {
    for (int i = 0; i < size_; ++i) {
      const Entry& entry = entries_[i];
      const int64_t from = std::max<int64_t>(begin - entry.first, 0), to = std::min(end - entry.first, entry.strips);
      if (from < to) compute_strips(entry.product, from, to, entry.strips);
    }
  }

 private:
  struct Entry {
    Product<T> product;
    int64_t first, strips;  // its own, in the list
  };

  // Where the time goes into stores, a product is cut into as many runs of whole rows instead, if it has them.
  static void compute_strips(const Product<T>& product, int64_t from, int64_t to, int64_t strips) {
    if (product.inner < kFewTerms && product.rows >= strips) {
      kernels<T>().product(product, product.rows * from / strips, product.rows * to / strips, 0, product.cols);
    } else {
      kernels<T>().product(product, 0, product.rows, from * kStripCols, std::min(to * kStripCols, product.cols));
    }
  }

  Entry entries_[4];
  int size_ = 0;
  int64_t strips_ = 0;
};

}  // namespace

template <typename T>
void rnn_cell_forward(const ForwardParams<T>& p) {
  const int64_t B = p.batch, H = p.weights.hidden_size;
  const ForwardPlan plan = plan_forward<T>(sizes_of(p));
  if constexpr (kHasAtenGemm<T>) {
    if (plan.products == Products::kAtenGemm) {
      aten_gemm_forward(p);
      parallel_runs(plan.schedule, [&](int64_t begin, int64_t end) { kernels<T>().epilogue(p, begin, end); });
      return;
    }
  }
  if (B == 0 || H == 0) return;
  if (plan.serial) return kernels<T>().forward(p, 0, B, 0, H);
  const OutputTiles<T> tiles(B, H);
  parallel_runs(plan.schedule, [&](int64_t begin, int64_t end) { compute_tiles(p, tiles, begin, end); });
}

template <typename T>
void grad_z(const BackwardParams<T>& p, const DzBlock<T>& dz) {
  parallel_runs(dz_schedule(dz.rows(), dz.cols()), [&](int64_t begin, int64_t end) {
    kernels<T>().grad_z(p, dz, dz.col_begin + begin, dz.col_begin + end);
  });
  if (p.grad_bias_copy && dz.rows() == p.batch) {
    std::memcpy(static_cast<void*>(p.grad_bias_copy + dz.col_begin), p.grad_bias + dz.col_begin, dz.cols() * sizeof(T));
  }
}

template <typename T>
void gradients_from_dz(const BackwardParams<T>& p, const DzBlock<T>& dz) {
  const int64_t B = p.batch, I = p.weights.input_size, H = p.weights.hidden_size;
  const bool all_rows = dz.rows() == B, all_cols = dz.cols() == H;
  if constexpr (kHasAtenGemm<T>) {
    if (all_rows && all_cols && dz.row_stride == H && products_of_backward<T>(sizes_of(p)) == Products::kAtenGemm) {
      return aten_gemm_backward(p, dz.data);
    }
  }
  ProductList<T> products;
  // The rows of dz [W | U] of this block.
  const auto add_rows = [&](const Matrix<T>& weight, T* gradient, int64_t size) {
    if (!all_cols || !gradient) return;
    products.add({.a = dz.data,
                  .a_row_stride = dz.row_stride,
                  .a_col_stride = 1,
                  .m = weight.data,
                  .m_stride = weight.row_stride,
                  .c = gradient + dz.row_begin * size,
                  .c_stride = size,
                  .rows = dz.rows(),
                  .cols = size,
                  .inner = H,
                  .whole_rows = B});
  };
  // The rows of dzᵀ [x | h] of this block's columns.
  const auto add_columns = [&](const Matrix<T>& operand, T* gradient, int64_t size) {
    if (!all_rows || !gradient) return;
    products.add({.a = dz.data,
                  .a_row_stride = 1,
                  .a_col_stride = dz.row_stride,
                  .m = operand.data,
                  .m_stride = operand.row_stride,
                  .c = gradient + dz.col_begin * size,
                  .c_stride = size,
                  .rows = dz.cols(),
                  .cols = size,
                  .inner = B,
                  .whole_rows = H});
  };
  // In this order two threads have one product of either kind each, as one kind takes a little longer.
  add_rows(p.weights.weight_ih, p.grad_input, I);
  add_columns(p.input, p.grad_weight_ih, I);
  add_rows(p.weights.weight_hh, p.grad_hx, H);
  if (p.hx.data) add_columns(p.hx, p.grad_weight_hh, H);
  parallel_runs(strip_schedule(products.strips(), dz.rows(), dz.cols()),
                [&](int64_t begin, int64_t end) { products.compute(begin, end); });
}

namespace {

// The backward with dz computed twice, a block at a time.
template <typename T>
void backward_in_blocks(const BackwardParams<T>& p, const BackwardPlan& plan, acc_t<T>* dz) {
  const int64_t B = p.batch, H = p.weights.hidden_size;
  const auto compute = [&](int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
    const DzBlock<T> block = {dz, dz_row_stride<acc_t<T>>(col_end - col_begin), row_begin, row_end, col_begin, col_end};
    grad_z(p, block);
    gradients_from_dz(p, block);
  };
  if (p.grad_weight_ih || (p.grad_weight_hh && p.hx.data) || p.grad_bias) {
    for (int64_t col = 0; col < H; col += plan.block_cols) compute(0, B, col, std::min(col + plan.block_cols, H));
  }
  if (p.grad_input || p.grad_hx) {
    for (int64_t row = 0; row < B; row += plan.block_rows) compute(row, std::min(row + plan.block_rows, B), 0, H);
  }
}

}  // namespace

template <typename T>
void rnn_cell_backward(const BackwardParams<T>& p) {
  using S = acc_t<T>;
  const int64_t B = p.batch, H = p.weights.hidden_size;
  if (!p.hx.data && p.grad_weight_hh) std::memset(static_cast<void*>(p.grad_weight_hh), 0, H * H * sizeof(T));
  const BackwardPlan plan = plan_backward<T>(sizes_of(p));
  constexpr int64_t kStackSize = 1024;
  S on_stack[kStackSize];
  at::TensorBase allocated;  // by PyTorch, so that its profiler sees it, and its error names the size
  if (plan.dz_size > kStackSize) {
    allocated = at::detail::empty_cpu({plan.dz_size}, c10::CppTypeToScalarType<S>::value);
  }
  S* const dz = allocated.defined() ? allocated.mutable_data_ptr<S>() : on_stack;
  if (!plan.whole) return backward_in_blocks(p, plan, dz);
  const DzBlock<T> whole = {dz, plan.row_stride, 0, B, 0, H};
  grad_z(p, whole);
  gradients_from_dz(p, whole);
}

template void rnn_cell_forward(const ForwardParams<float>&);
template void rnn_cell_forward(const ForwardParams<double>&);
template void rnn_cell_forward(const ForwardParams<c10::BFloat16>&);
template void rnn_cell_forward(const ForwardParams<c10::Half>&);
template void rnn_cell_backward(const BackwardParams<float>&);
template void rnn_cell_backward(const BackwardParams<double>&);
template void rnn_cell_backward(const BackwardParams<c10::BFloat16>&);
template void rnn_cell_backward(const BackwardParams<c10::Half>&);
template void grad_z(const BackwardParams<float>&, const DzBlock<float>&);
template void grad_z(const BackwardParams<double>&, const DzBlock<double>&);
template void grad_z(const BackwardParams<c10::BFloat16>&, const DzBlock<c10::BFloat16>&);
template void grad_z(const BackwardParams<c10::Half>&, const DzBlock<c10::Half>&);
template void gradients_from_dz(const BackwardParams<float>&, const DzBlock<float>&);
template void gradients_from_dz(const BackwardParams<double>&, const DzBlock<double>&);
template void gradients_from_dz(const BackwardParams<c10::BFloat16>&, const DzBlock<c10::BFloat16>&);
template void gradients_from_dz(const BackwardParams<c10::Half>&, const DzBlock<c10::Half>&);

}  // namespace rnn_ext::cpu
