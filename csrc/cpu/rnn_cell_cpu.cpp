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

// Calls f(begin, end) on runs of 0..size, a multiple of tile long, in several threads where the multiply-adds (each, of
// one element) are worth it.
template <typename F>
void parallel_runs(int64_t size, int64_t tile, int64_t multiply_adds_each, const F& f) {
  if (size == 0) return;
  const int64_t work = size * multiply_adds_each;
  if (work < kSerialWork) return f(0, size);
  const int64_t tiles = (size + tile - 1) / tile;
  const int64_t grain = std::max<int64_t>(1, kSerialWork / 2 / (work / tiles + 1));
  at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) { f(begin * tile, std::min(end * tile, size)); });
}

}  // namespace

const char* cpu_capability() { return table().capability; }

template <typename T>
void rnn_cell_forward(const ForwardParams<T>& p) {
  const int64_t B = p.batch, H = p.hidden_size;
  const int64_t K = p.input_size + (p.hx.data ? H : 0);
  // The longer side is cut: then the threads share the smaller operand, and each reads its own part of the larger.
  if (H >= B) {
    parallel_runs(H, 16, B * (K + 1), [&](int64_t begin, int64_t end) { kernels<T>().forward(p, 0, B, begin, end); });
  } else {
    parallel_runs(B, 12, H * (K + 1), [&](int64_t begin, int64_t end) { kernels<T>().forward(p, begin, end, 0, H); });
  }
}

template <typename T>
void rnn_cell_backward(const BackwardParams<T>& p) {
  using S = acc_t<T>;
  const int64_t B = p.batch, I = p.input_size, H = p.hidden_size;
  // dz is used up to four times: computed once, in the accumulation type. Rows a large power of two apart would
  // compete for the same lines of the cache.
  const int64_t dz_stride = H % 256 == 0 ? H + 64 / sizeof(S) : H;
  constexpr int64_t kStackSize = 1024;
  S on_stack[kStackSize];
  std::unique_ptr<S[]> on_heap(B * dz_stride > kStackSize ? new S[B * dz_stride] : nullptr);
  S* dz = on_heap ? on_heap.get() : on_stack;
  parallel_runs(H, 64, 8 * B, [&](int64_t begin, int64_t end) { kernels<T>().grad_z(p, dz, dz_stride, begin, end); });

  // Up to four products, a column of each being as much work as of any other: one list of panels for all threads.
  Product<T> products[4];
  int64_t first_panel[5] = {0};
  int n = 0;
  constexpr int64_t kPanel = 32;
  const auto add = [&](const Product<T>& g) {
    if (g.c == nullptr || g.rows == 0 || g.cols == 0) return;
    first_panel[n + 1] = first_panel[n] + (g.cols + kPanel - 1) / kPanel;
    products[n++] = g;
  };
  add({dz, dz_stride, 1, p.weight_ih.data, p.weight_ih.row_stride, p.grad_input, I, B, I, H});
  add({dz, dz_stride, 1, p.weight_hh.data, p.weight_hh.row_stride, p.grad_hx, H, B, H, H});
  add({dz, 1, dz_stride, p.input.data, p.input.row_stride, p.grad_weight_ih, I, H, I, B});
  if (p.hx.data) {
    add({dz, 1, dz_stride, p.hx.data, p.hx.row_stride, p.grad_weight_hh, H, H, H, B});
  } else if (p.grad_weight_hh) {
    std::memset(static_cast<void*>(p.grad_weight_hh), 0, H * H * sizeof(T));
  }
  parallel_runs(first_panel[n], 1, B * H * kPanel, [&](int64_t begin, int64_t end) {
    for (int i = 0; i < n; ++i) {
      const int64_t col_begin = std::max<int64_t>(begin - first_panel[i], 0) * kPanel;
      const int64_t col_end = std::min((end - first_panel[i]) * kPanel, products[i].cols);
      if (col_begin < col_end) kernels<T>().product(products[i], 0, products[i].rows, col_begin, col_end);
    }
  });
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
