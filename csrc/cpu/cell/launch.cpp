// The launcher: chooses for each call how to cut the work over threads. No sum is ever
// split between threads, so the fused kernels' results don't depend on how many there are.
#include "cpu/cell/launch.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/aten_gemm.h"
#include "cpu/isa.h"

namespace rnn_ext::cpu {
namespace {

// Multiply-adds up to which one thread does the work: about 5 µs. Threads that spin take 1 µs to start, but those that
// have gone to sleep, after milliseconds without work, take 100 µs and now and then milliseconds.
int64_t serial_work() { return isa() == Isa::kDefault ? 1 << 16 : 1 << 18; }

// The same unit for one element of a pass over memory, and of an activation.
constexpr int64_t kElementWork = 16, kActivationWork = 64;

// Multiply-adds, B · K · H, of a forward and of a backward product pair from which ATen's GEMMs take over. In backward
// also from a number of weights, K · H: the kernels read W in panels of columns, which is slow beyond the L2 cache
// unless there are enough rows of dz to pay for it.
//
// Where one overtakes the other depends on the CPU, and slowly on the size: with AVX2, float crosses in forward at
// about 2^27 on a Xeon, double with AVX-512 at 2^24. On the wrong side of these compromises either loses a sixth at
// most, while nn.RNNCell, which also passes over z three more times, loses more. On an EPYC with AVX-512 the library is
// ahead with double in forward alone, from 2^28. Vectors of 16 bytes without FMA are no match for it beyond small
// sizes.
struct GemmThreshold {
  int64_t forward, backward, backward_weights;
};
template <typename T>
GemmThreshold gemm_threshold() {
  if (isa() == Isa::kDefault) return {1 << 18, 1 << 18, 1 << 18};
  constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  if (isa() >= Isa::kAvx512 && is_amd()) return {sizeof(T) == 4 ? kNever : 1 << 28, kNever, kNever};
  if (sizeof(T) == 4) return {1 << 27, 1 << 27, 1 << 20};
  return {1 << 26, 1 << 26, 1 << 19};
}

// Calls f(begin, end) on runs of 0..size, a multiple of tile long, in several threads where the multiply-adds (each, of
// one element) are worth it.
template <typename F>
void parallel_runs(int64_t size, int64_t tile, int64_t multiply_adds_each, const F& f) {
  if (size == 0) return;
  const int64_t work = size * multiply_adds_each;
  if (work <= serial_work()) return f(0, size);
  const int64_t tiles = (size + tile - 1) / tile;
  const int64_t grain = std::max<int64_t>(1, serial_work() / 2 / (work / tiles + 1));
  at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) { f(begin * tile, std::min(end * tile, size)); });
}

// Whether the backward's products are the library's.
template <typename T>
bool backward_by_library(const BackwardParams<T>& p) {
  if constexpr (!kHasAtenGemm<T>) return false;
  const int64_t weights = p.weights.hidden_size * (p.weights.input_size + (p.hx.data ? p.weights.hidden_size : 0));
  const GemmThreshold threshold = gemm_threshold<T>();
  return p.batch > 0 && (p.batch * weights >= threshold.backward || weights >= threshold.backward_weights);
}

// The forward's output cut into tiles as high as the kernels' panels of rows, numbered row by row, so that a thread's
// are whole rows of tiles where there are enough: then no two threads write to the same line of the cache, nor
// transpose the same x.
template <typename T>
struct OutputTiles {
  static constexpr int64_t kRows = std::is_same_v<T, c10::BFloat16> ? 32 : 16, kCols = 16;

  const ForwardParams<T>& p;
  int64_t rows = std::max<int64_t>(p.batch / kRows, 1);  // the last row of tiles is higher than the others
  int64_t cols = (p.weights.hidden_size + kCols - 1) / kCols;

  void compute(int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) const {
    kernels<T>().forward(p, row_begin * kRows, row_end == rows ? p.batch : row_end * kRows, col_begin * kCols,
                         std::min(col_end * kCols, p.weights.hidden_size));
  }

  // In few rectangles: the rest of a row, whole rows, the beginning of one.
  void compute_run(int64_t begin, int64_t end) const {
    while (begin < end) {
      const int64_t row = begin / cols, col = begin % cols;
      const int64_t whole_rows = col == 0 ? (end - begin) / cols : 0;
      if (whole_rows > 0) {
        compute(row, row + whole_rows, 0, cols);
        begin += whole_rows * cols;
      } else {
        const int64_t in_this_row = std::min(end - begin, cols - col);
        compute(row, row + 1, col, col + in_this_row);
        begin += in_this_row;
      }
    }
  }
};

// Rows a large power of two apart would compete for the same lines of the cache.
template <typename S>
int64_t dz_row_stride(int64_t cols) {
  return cols % 256 == 0 ? cols + 64 / sizeof(S) : cols;
}

// The elements of dz that there is memory for at a time: nn.RNNCell's backward takes as many of type T as dz has, and
// this one no more, but for a constant, or if that were less than a row or a column. In 16 bits, dz in the accumulation
// type can be twice that.
constexpr int64_t kSpareBytes = 1 << 19;
template <typename T>
int64_t most_dz(int64_t rows, int64_t cols) {
  const int64_t within = (rows * cols * sizeof(T) + kSpareBytes) / sizeof(acc_t<T>);
  return std::max({within, rows, dz_row_stride<acc_t<T>>(cols)});
}

// The length of n equal parts of size, in whole vectors.
int64_t length_of_part(int64_t size, int64_t n) { return ((size + n - 1) / n + 15) / 16 * 16; }

// The columns of a block of dz: few blocks, of whole vectors where they fit.
template <typename S>
int64_t columns_within(int64_t rows, int64_t cols, int64_t most) {
  const auto fits = [&](int64_t n) { return rows * dz_row_stride<S>(n) <= most; };
  const int64_t fitting = std::max<int64_t>(most / rows, 1);
  for (int64_t n = (cols + fitting - 1) / fitting; n <= cols / 16; ++n) {
    if (fits(length_of_part(cols, n))) return length_of_part(cols, n);
  }
  return fitting;
}

// The rows of a block of dz, the same way; one, if none is fitting.
int64_t rows_within(int64_t rows, int64_t fitting) {
  fitting = std::max<int64_t>(fitting, 1);
  return std::min(fitting, length_of_part(rows, (rows + fitting - 1) / fitting));
}

// The backward's products, each cut into panels of columns, and all panels in one list for the threads: they share an
// inner size times rows of B · H, so that a panel of one is as much work as of any other.
template <typename T>
class ProductList {
 public:
  static constexpr int64_t kPanel = 32;

  void add(const Product<T>& g) {
    if (g.c == nullptr || g.rows == 0 || g.cols == 0) return;
    first_panel_[size_ + 1] = panels() + (g.cols + kPanel - 1) / kPanel;
    products_[size_++] = g;
  }

  int64_t panels() const { return first_panel_[size_]; }

  void compute_run(int64_t begin, int64_t end) const {
    for (int i = 0; i < size_; ++i) {
      const int64_t from = std::max(begin, first_panel_[i]), to = std::min(end, first_panel_[i + 1]);
      if (from < to) compute_panels(products_[i], i, from - first_panel_[i], to - first_panel_[i]);
    }
  }

 private:
  // Where the time goes into stores, a product is cut into as many runs of whole rows instead, if it has them.
  void compute_panels(const Product<T>& g, int i, int64_t from, int64_t to) const {
    const int64_t panels = first_panel_[i + 1] - first_panel_[i];
    if (g.inner < kFewTerms && g.rows >= panels) {
      kernels<T>().product(g, g.rows * from / panels, g.rows * to / panels, 0, g.cols);
    } else {
      kernels<T>().product(g, 0, g.rows, from * kPanel, std::min(to * kPanel, g.cols));
    }
  }

  Product<T> products_[4];
  int64_t first_panel_[5] = {0};
  int size_ = 0;
};

}  // namespace

template <typename T>
void rnn_cell_forward(const ForwardParams<T>& p) {
  const int64_t B = p.batch, H = p.weights.hidden_size;
  const int64_t K = p.weights.input_size + (p.hx.data ? H : 0);
  if constexpr (kHasAtenGemm<T>) {
    if (B * H * K >= gemm_threshold<T>().forward) {
      aten_gemm_forward(p);
      parallel_runs(B, 1, kActivationWork * H, [&](int64_t begin, int64_t end) { kernels<T>().finish(p, begin, end); });
      return;
    }
  }
  if (B == 0 || H == 0) return;
  if (B * H * (K + 1) <= serial_work()) return kernels<T>().forward(p, 0, B, 0, H);
  const OutputTiles<T> tiles{p};
  parallel_runs(tiles.rows * tiles.cols, 1, tiles.kRows * tiles.kCols * (K + 1),
                [&](int64_t begin, int64_t end) { tiles.compute_run(begin, end); });
}

template <typename T>
void grad_z(const BackwardParams<T>& p, const DzBlock<T>& dz) {
  parallel_runs(dz.cols(), 64, kElementWork * dz.rows(), [&](int64_t begin, int64_t end) {
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
    if (all_rows && all_cols && dz.row_stride == H && backward_by_library(p)) return aten_gemm_backward(p, dz.data);
  }
  ProductList<T> products;
  const auto add_rows = [&](const Matrix<T>& weight, T* gradient, int64_t size) {
    if (!all_cols || !gradient) return;
    products.add({dz.data, dz.row_stride, 1, weight.data, weight.row_stride, gradient + dz.row_begin * size, size,
                  dz.rows(), size, H, B});
  };
  const auto add_columns = [&](const Matrix<T>& operand, T* gradient, int64_t size) {
    if (!all_rows || !gradient) return;
    products.add({dz.data, 1, dz.row_stride, operand.data, operand.row_stride, gradient + dz.col_begin * size, size,
                  dz.cols(), size, B, H});
  };
  // In this order two threads have one product of either kind each, as one kind takes a little longer.
  add_rows(p.weights.weight_ih, p.grad_input, I);
  add_columns(p.input, p.grad_weight_ih, I);
  add_rows(p.weights.weight_hh, p.grad_hx, H);
  if (p.hx.data) add_columns(p.hx, p.grad_weight_hh, H);
  parallel_runs(products.panels(), 1, dz.rows() * dz.cols() * products.kPanel,
                [&](int64_t begin, int64_t end) { products.compute_run(begin, end); });
}

namespace {

// The backward with dz computed twice, a block at a time: blocks of columns, each of which gives its own rows of the
// gradients of weights and biases, and blocks of rows for the other two. No sum goes over more than one block, and the
// results are those of dz as a whole, bit for bit. Blocks of rows stay in the L2 cache; those of columns are as wide as
// there is memory for, since x and h are packed for each.
template <typename T>
void backward_in_blocks(const BackwardParams<T>& p, acc_t<T>* dz, int64_t most) {
  using S = acc_t<T>;
  const int64_t B = p.batch, H = p.weights.hidden_size;
  const auto compute = [&](const DzBlock<T>& block) {
    grad_z(p, block);
    gradients_from_dz(p, block);
  };
  if (p.grad_weight_ih || (p.grad_weight_hh && p.hx.data) || p.grad_bias) {
    const int64_t cols = columns_within<S>(B, H, most);
    for (int64_t col = 0; col < H; col += cols) {
      const int64_t end = std::min(col + cols, H);
      compute({dz, dz_row_stride<S>(end - col), 0, B, col, end});
    }
  }
  if (p.grad_input || p.grad_hx) {
    constexpr int64_t kCached = (1 << 20) / sizeof(S);
    const int64_t row_stride = dz_row_stride<S>(H), rows = rows_within(B, std::min(most, kCached) / row_stride);
    for (int64_t row = 0; row < B; row += rows) compute({dz, row_stride, row, std::min(row + rows, B), 0, H});
  }
}

}  // namespace

template <typename T>
void rnn_cell_backward(const BackwardParams<T>& p) {
  using S = acc_t<T>;
  const int64_t B = p.batch, H = p.weights.hidden_size;
  if (!p.hx.data && p.grad_weight_hh) std::memset(static_cast<void*>(p.grad_weight_hh), 0, H * H * sizeof(T));
  const int64_t row_stride = backward_by_library(p) ? H : dz_row_stride<S>(H);
  const int64_t most = most_dz<T>(B, H), size = std::min(B * row_stride, most);
  constexpr int64_t kStackSize = 1024;
  S on_stack[kStackSize];
  at::TensorBase allocated;  // by PyTorch, so that its profiler sees it, and its error names the size
  if (size > kStackSize) allocated = at::detail::empty_cpu({size}, c10::CppTypeToScalarType<S>::value);
  S* const dz = allocated.defined() ? allocated.mutable_data_ptr<S>() : on_stack;
  if (B * row_stride > most) return backward_in_blocks(p, dz, most);
  const DzBlock<T> whole = {dz, row_stride, 0, B, 0, H};
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
