// Which kernels the cell runs on the CPU, and when: the launcher does what a plan says, and
// `python -m rnn_ext --explain B I H DTYPE --cpu` prints it. Which family of the fused kernels takes which rows is
// families.h's.
//
// The plan is the cell's own: of a sequence, the rows, the threads and the memory are shared out otherwise.
#pragma once
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace rnn_ext::cpu {

struct CellSizes {
  int64_t batch, input_size, hidden_size;
  bool hx;

  int64_t terms() const { return input_size + (hx ? hidden_size : 0); }  // K
  int64_t weights() const { return hidden_size * terms(); }
};

// Who computes the products: the fused kernels, which keep z in registers and caches, or ATen's GEMM.
enum class Products { kFused, kAtenGemm };

// The fused forward's output is cut into tiles for the threads, as high as the kernels' panels of rows, numbered row by
// row, so that a thread's are whole rows of tiles where there are enough: then no two threads write to the same line of
// the cache, nor transpose the same x.
template <typename T>
constexpr int64_t kTileRows = std::is_same_v<T, c10::BFloat16> ? 32 : 16;
constexpr int64_t kTileCols = 16;

template <typename T>
struct OutputTiles {
  int64_t rows, cols;

  OutputTiles(int64_t batch, int64_t hidden_size)
      : rows(std::max<int64_t>(batch / kTileRows<T>, 1)),  // the last row of tiles is higher than the others
        cols((hidden_size + kTileCols - 1) / kTileCols) {}
};

struct ForwardPlan {
  Products products;
  bool serial;        // kFused: by one call of the kernel
  Schedule schedule;  // otherwise: of the tiles; kAtenGemm: of the rows that get their biases and f
};
template <typename T>
ForwardPlan plan_forward(const CellSizes& sizes);

// dz is computed once; or twice, if nn.RNNCell's backward would take less memory than that: in blocks of columns, each
// of which gives its own rows of the gradients of weights and biases, and in blocks of rows for the other two. No sum
// goes over more than one block, and the results are those of dz as a whole, bit for bit.
struct BackwardPlan {
  Products products;
  bool whole;
  int64_t row_stride;              // whole: of dz
  int64_t block_cols, block_rows;  // not whole: of dz
  int64_t dz_size;                 // the elements there is memory for
};
template <typename T>
BackwardPlan plan_backward(const CellSizes& sizes);
template <typename T>
Products products_of_backward(const CellSizes& sizes);

Schedule dz_schedule(int64_t rows, int64_t cols);

// The fused backward's products are cut into strips of columns, and all strips are one list for the threads: they share
// an inner size times rows of B · H, so that a strip of one is as much work as of any other.
constexpr int64_t kStripCols = 32;
constexpr int64_t strips_of(int64_t cols) { return (cols + kStripCols - 1) / kStripCols; }
Schedule strip_schedule(int64_t strips, int64_t dz_rows, int64_t dz_cols);

// The distance of rows of dz, whose elements are of type S. Rows a large power of two apart would compete for the same
// lines of the cache.
template <typename S>
constexpr int64_t dz_row_stride(int64_t cols) {
  return cols % 256 == 0 ? cols + 64 / sizeof(S) : cols;
}

// For people: what runs, and why, with hx and for all gradients. Raises ValueError for a dtype that there is no kernel
// for.
std::string explain(int64_t batch, int64_t input_size, int64_t hidden_size, c10::ScalarType dtype);

}  // namespace rnn_ext::cpu
