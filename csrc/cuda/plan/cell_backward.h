// Which backward kernel runs when, and in which order a tiled one computes its tiles: the table of kernels, what the
// choice depends on, and the schedule. Plain C++ without torch or CUDA.
#pragma once
#include <cstdint>
#include <string>

#include "cuda/plan/types.h"

namespace rnn_ext::cuda {

// ---- the schedule ---------------------------------------------------------------------------------------------------

// The tiles of the two products, a list that nobody writes down. Block b of a grid of G takes tiles b, b + G, b + 2
// G... The kind whose tiles take longer comes first, and of the weight gradients' tiles those that also sum up the bias
// gradient, so that short tiles fill the end. Neighbours on the list share a column of tiles, and with it the reads of
// [W | U] or of [x | h].
struct BackwardSchedule {
  // Tiles of one kind: `rows` by the columns of the matrix of input_size and of the one of hidden_size.
  struct Kind {
    int64_t rows = 0, columns[2] = {0, 0};
    RNN_EXT_HOST_DEVICE int64_t size() const { return rows * (columns[0] + columns[1]); }
  };
  struct Tile {
    bool is_data;  // of [grad_input | grad_hx], else of [grad_weight_ih | grad_weight_hh]
    int matrix;    // 0: the one of input_size columns, 1: the one of hidden_size
    int64_t row, column;
    bool is_first_column;  // of its kind
  };

  Kind data, weight;
  bool data_first = true;

  RNN_EXT_HOST_DEVICE int64_t size() const { return data.size() + weight.size(); }

  RNN_EXT_HOST_DEVICE Tile at(int64_t index) const {
    const int64_t front = data_first ? data.size() : weight.size();
    const bool in_front = index < front;
    const bool is_data = in_front == data_first;
    const Kind& kind = is_data ? data : weight;
    if (!in_front) index -= front;
    const int64_t column = divide(index, kind.rows), row = index - column * kind.rows;
    const bool second = column >= kind.columns[0];
    return {is_data, second ? 1 : 0, row, second ? column - kind.columns[0] : column, column == 0};
  }

  // 64-bit divisions are a hundred instructions, at the start of every tile.
  static RNN_EXT_HOST_DEVICE int64_t divide(int64_t a, int64_t b) {
    if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return a / b;
  }
};

// ---- the kernels ----------------------------------------------------------------------------------------------------

// `gemv`: a block a strip of the weights' columns, which it reads once; every dtype and architecture, up to this many
// rows.
constexpr int kBackwardGemvMaxBatch = 8;

// A bm×bn tile in slices bk deep, by parts_m×parts_n warps (tensor cores) or of parts_m×parts_n elements a thread (the
// FP32 and FP64 pipes), `groups` times over.
struct BackwardTileShape {
  int bm, bn, bk, parts_m, parts_n, groups, stages;
};

// `tiled`. The numbers instantiate the kernel's template, so a row here and the code can't disagree.
struct BackwardTiledKernel {
  const char* name;
  bool fp32, fp64, fp16, bf16;  // the dtypes
  bool tensor_cores;
  bool async;  // cp.async for what isn't dz; 16-bit operands must then be 4-byte aligned, with unit stride along rows
  bool fused;  // dz is formed anew for each tile: one launch. Else it is read from a workspace: two
  BackwardTileShape data, weight;
  int blocks_per_sm;      // what registers are limited for
  int first_sm, last_sm;  // compute capabilities, 10 * major + minor

  constexpr bool takes(Dtype dtype) const { return is_marked(dtype, fp32, fp64, fp16, bf16); }
  // Bytes of a mainloop's ring, of which dz has two slices where it is formed in registers, and of the sums that take
  // its place.
  constexpr size_t smem_bytes(const BackwardTileShape& t, Dtype dtype) const {
    const size_t sum_bytes = sum_bytes_of(dtype);
    const size_t element = tensor_cores ? bytes_of(dtype) : sum_bytes, padding = tensor_cores ? 0 : 4;
    const size_t a = (t.bm + padding) * t.bk * element * (async && !fused ? t.stages : 2);
    const size_t b = (t.bn + padding) * t.bk * element * (async ? t.stages : 2);
    const size_t sums = sum_bytes * t.groups * t.bm * (t.bn + 8);
    return a + b > sums ? a + b : sums;
  }
  constexpr size_t smem_bytes(Dtype dtype) const {
    const size_t of_data = smem_bytes(data, dtype), of_weight = smem_bytes(weight, dtype);
    return of_data > of_weight ? of_data : of_weight;
  }
};

// small: few batch rows, where [grad_input | grad_hx] has few tiles and the time of one, K = H deep, counts: narrow and
//        deep, with all of a slice's weights in flight.
// mid:   more batch rows, where the reads of [W | U] count.
// large: where reading dh' and h' again for every tile costs more than a launch that writes dz for all of them. All
//        operands come by cp.async, and tiles are as large as registers allow.
// staged: what cp.async can't copy, and GPUs without it. The last rows are there for those alone.
// clang-format off
constexpr BackwardTiledKernel kBackwardTiled[] = {
  // name            fp32   fp64   fp16   bf16   tensor async  fused   data                          weight                        bl  sm
  {"tiled_small",    false, false, true,  true,  true,  true,  true,  {16, 32, 128, 1, 2, 2, 3},    {64, 64, 32, 2, 2, 1, 3},     3,  80, kAnySm},
  {"tiled_mid",      false, false, true,  true,  true,  true,  true,  {32, 64, 64, 1, 2, 2, 3},     {64, 64, 32, 2, 2, 1, 3},     3,  80, kAnySm},
  {"tiled_small",    true,  false, false, false, false, true,  true,  {16, 32, 64, 4, 4, 4, 3},     {64, 64, 16, 8, 4, 1, 3},     3,  80, kAnySm},
  {"tiled_mid",      true,  false, false, false, false, true,  true,  {32, 64, 32, 8, 4, 2, 3},     {64, 64, 16, 8, 4, 1, 3},     3,  80, kAnySm},
  {"tiled_small",    false, true,  false, false, true,  true,  true,  {16, 32, 32, 1, 2, 2, 3},     {32, 64, 16, 2, 2, 1, 3},     3,  80, kAnySm},
  {"tiled_mid",      false, true,  false, false, true,  true,  true,  {32, 64, 16, 2, 2, 1, 3},     {32, 64, 16, 2, 2, 1, 3},     3,  80, kAnySm},
  {"tiled_large",    false, false, true,  true,  true,  true,  false, {128, 128, 32, 2, 4, 1, 4},   {128, 128, 32, 2, 4, 1, 4},   1,  80, kAnySm},
  {"tiled_large",    true,  false, false, false, false, true,  false, {128, 128, 16, 8, 8, 1, 3},   {128, 128, 16, 8, 8, 1, 3},   1,  80, kAnySm},
  {"tiled_large",    false, true,  false, false, true,  true,  false, {64, 64, 16, 2, 2, 1, 3},     {64, 64, 16, 2, 2, 1, 3},     2,  80, kAnySm},
  {"tiled_staged",   false, false, false, true,  true,  false, true,  {32, 64, 64, 1, 2, 2, 2},     {64, 64, 32, 2, 2, 1, 2},     2,  80, kAnySm},
  {"tiled_staged",   false, false, true,  false, true,  false, true,  {32, 64, 64, 1, 2, 2, 2},     {64, 64, 32, 2, 2, 1, 2},     2,  75, kAnySm},
  {"tiled_staged",   true,  false, false, true,  false, false, true,  {16, 32, 32, 4, 4, 4, 2},     {64, 64, 16, 8, 4, 1, 2},     3,  75, 75},
  {"tiled_staged",   false, true,  false, false, false, false, true,  {16, 32, 16, 4, 4, 4, 2},     {32, 64, 16, 4, 4, 1, 2},     2,  75, 75},
};
// clang-format on
constexpr int kNumBackwardTiled = static_cast<int>(sizeof(kBackwardTiled) / sizeof(kBackwardTiled[0]));

// `wgmma`: fp16 and bf16 on sm_90a, in tiles of 128 by bn; dz goes to a workspace.
struct BackwardWgmmaKernel {
  const char* name;
  int bn;
  int cluster;  // blocks that share the wider operand

  static constexpr int bm = 128;
  constexpr bool takes(Dtype dtype) const { return bytes_of(dtype) == 2; }
};
constexpr BackwardWgmmaKernel kBackwardWgmma[] = {{"wgmma_128x256", 256, 2}, {"wgmma_128x128", 128, 1}};
constexpr int kNumBackwardWgmma = static_cast<int>(sizeof(kBackwardWgmma) / sizeof(kBackwardWgmma[0]));

// Its workspace: dz in 16-bit elements, and after it what grad_z sums up for the bias.
struct BackwardWgmmaWorkspace {
  int64_t dz_stride, sums, bytes;  // from row to row, in elements; where the sums start; all of it

  constexpr BackwardWgmmaWorkspace(int64_t batch, int64_t hidden_size, bool grad_bias)
      : dz_stride((hidden_size + 7) / 8 * 8),
        sums(batch * dz_stride * 2),
        bytes(sums + (grad_bias ? (batch + 31) / 32 * hidden_size * 4 : 0)) {}
};

// ---- the choice -----------------------------------------------------------------------------------------------------

// All that the choice depends on.
struct BackwardCase {
  int64_t batch, input_size, hidden_size;
  Dtype dtype;
  bool grad_input, grad_hx, grad_weight_ih, grad_weight_hh, grad_bias;
  int vector_bytes;  // what the needed ones of W, U, x and h are aligned to, with unit stride along rows; 0: less than
                     // 4
  bool tensor_maps;  // TMA can take all that is read and written, but dh' and h', and there is something

  bool operator==(const BackwardCase& o) const {
    return batch == o.batch && input_size == o.input_size && hidden_size == o.hidden_size && dtype == o.dtype &&
           grad_input == o.grad_input && grad_hx == o.grad_hx && grad_weight_ih == o.grad_weight_ih &&
           grad_weight_hh == o.grad_weight_hh && grad_bias == o.grad_bias && vector_bytes == o.vector_bytes &&
           tensor_maps == o.tensor_maps;
  }
};

struct BackwardPlan {
  enum class Family { kGemv, kTiled, kWgmma };
  Family family = Family::kGemv;
  int kernel = -1;            // the row of kBackwardTiled or kBackwardWgmma
  int strip_bytes = 0;        // gemv: of a row of the weights
  BackwardSchedule schedule;  // tiled
  int64_t blocks = 0;         // none if nothing is asked for, or of no elements
  int64_t dz_stride = 0;      // where dz goes to a workspace: elements from row to row, 16-byte aligned
  int64_t workspace_bytes = 0;
  double microseconds = 0;  // what the model predicts

  bool takes(Dtype dtype) const {  // whether it is compiled for it
    return family == Family::kTiled   ? kBackwardTiled[kernel].takes(dtype)
           : family == Family::kWgmma ? kBackwardWgmma[kernel].takes(dtype)
                                      : true;
  }
  int launches() const { return workspace_bytes > 0 ? 2 : 1; }
  const char* name() const {
    return family == Family::kGemv    ? "gemv"
           : family == Family::kTiled ? kBackwardTiled[kernel].name
                                      : kBackwardWgmma[kernel].name;
  }
};

// The best kernel by the model, or the one that `forced` names (null or empty: no force). Without force there is always
// one: each dtype has a row without conditions for either range of architectures. Throws std::invalid_argument if there
// is no such kernel or it can't take the case.
BackwardPlan plan_backward(const BackwardCase& c, const Device& device, const char* forced);

// The choice and the alternatives, with the model's reasons, for people.
std::string explain_backward(const BackwardCase& c, const Device& device, const char* forced);

}  // namespace rnn_ext::cuda
