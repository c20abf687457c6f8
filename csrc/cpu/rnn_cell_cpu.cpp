// The launcher: chooses the instruction set once, and for each call how to cut the work over threads. No sum is ever
// split between threads, so results don't depend on how many there are.
#include "rnn_cell_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "kernels.h"

namespace rnn_ext::cpu {
namespace {

const KernelTable& choose_table() {
  const char* asked = std::getenv("RNN_EXT_CPU_CAPABILITY");
  const bool any = asked == nullptr || *asked == '\0';
#ifdef RNN_EXT_CPU_X86
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (any || std::strcmp(asked, "avx512") == 0)) return kernels_avx512();
  if (has_avx2 && (any || std::strcmp(asked, "default") != 0)) return kernels_avx2();
#else
  (void)any;
#endif
  return kernels_default();
}

const KernelTable& table() {
  static const KernelTable& chosen = choose_table();
  return chosen;
}

template <typename T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels() {
  return table().f32;
}
template <>
const Kernels<double>& kernels() {
  return table().f64;
}
template <>
const Kernels<c10::BFloat16>& kernels() {
  return table().bf16;
}
template <>
const Kernels<c10::Half>& kernels() {
  return table().f16;
}

// Multiply-adds below which waking other threads costs more than they save.
constexpr int64_t kSerialWork = 1 << 18;

// Calls f(row_begin, row_end, col_begin, col_end) over blocks of a (rows, cols) output, each multiply_adds long. The
// blocks' edges are multiples of a tile's sides, so no tile is cut by a thread's share.
template <typename F>
void parallel_blocks(int64_t rows, int64_t cols, int64_t multiply_adds_each, const F& f) {
  if (rows == 0 || cols == 0) return;
  const int64_t work = rows * cols * std::max<int64_t>(multiply_adds_each, 1);
  if (work < kSerialWork || at::get_num_threads() == 1 || at::in_parallel_region()) return f(0, rows, 0, cols);
  constexpr int64_t kRowTile = 12, kColTile = 64;
  const int64_t row_tiles = (rows + kRowTile - 1) / kRowTile, col_tiles = (cols + kColTile - 1) / kColTile;
  const bool by_columns = col_tiles >= row_tiles;
  const int64_t tiles = by_columns ? col_tiles : row_tiles;
  const int64_t grain = std::max<int64_t>(1, kSerialWork / 2 / (work / tiles + 1));
  at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    if (by_columns) {
      f(0, rows, begin * kColTile, std::min(end * kColTile, cols));
    } else {
      f(begin * kRowTile, std::min(end * kRowTile, rows), 0, cols);
    }
  });
}

template <typename T>
void parallel_product(const Product<T>& g) {
  parallel_blocks(g.rows, g.cols, g.inner, [&](int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
    kernels<T>().product(g, row_begin, row_end, col_begin, col_end);
  });
}

}  // namespace

const char* cpu_capability() { return table().capability; }

template <typename T>
void rnn_cell_forward(const ForwardParams<T>& p) {
  const int64_t inner = p.input_size + (p.hx.data ? p.hidden_size : 0);
  parallel_blocks(p.batch, p.hidden_size, inner,
                  [&](int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
                    kernels<T>().forward(p, row_begin, row_end, col_begin, col_end);
                  });
}

template <typename T>
void rnn_cell_backward(const BackwardParams<T>& p) {
  using S = acc_t<T>;
  const int64_t B = p.batch, I = p.input_size, H = p.hidden_size;
  // dz is used up to four times: computed once, in the accumulation type.
  constexpr int64_t kStackSize = 1024;
  S on_stack[kStackSize];
  std::unique_ptr<S[]> on_heap(B * H > kStackSize ? new S[B * H] : nullptr);
  S* dz = on_heap ? on_heap.get() : on_stack;
  parallel_blocks(1, H, B, [&](int64_t, int64_t, int64_t col_begin, int64_t col_end) {
    kernels<T>().grad_z(p, dz, col_begin, col_end);
  });

  const auto grad_data = [&](const Matrix<T>& weight, T* grad, int64_t N) {
    if (grad) parallel_product<T>({dz, H, 1, weight.data, weight.row_stride, grad, N, B, N, H});
  };
  const auto grad_weight = [&](const Matrix<T>& operand, T* grad, int64_t N) {
    if (grad) parallel_product<T>({dz, 1, H, operand.data, operand.row_stride, grad, N, H, N, B});
  };
  grad_data(p.weight_ih, p.grad_input, I);
  grad_data(p.weight_hh, p.grad_hx, H);
  grad_weight(p.input, p.grad_weight_ih, I);
  if (p.hx.data) {
    grad_weight(p.hx, p.grad_weight_hh, H);
  } else if (p.grad_weight_hh) {
    std::memset(static_cast<void*>(p.grad_weight_hh), 0, H * H * sizeof(T));
  }
}

template void rnn_cell_forward(const ForwardParams<float>&);
template void rnn_cell_forward(const ForwardParams<double>&);
template void rnn_cell_forward(const ForwardParams<c10::BFloat16>&);
template void rnn_cell_forward(const ForwardParams<c10::Half>&);
template void rnn_cell_backward(const BackwardParams<float>&);
template void rnn_cell_backward(const BackwardParams<double>&);
template void rnn_cell_backward(const BackwardParams<c10::BFloat16>&);
template void rnn_cell_backward(const BackwardParams<c10::Half>&);

}  // namespace rnn_ext::cpu
