// Which tiled backward kernel runs when, and in which order its tiles are computed: the table of kernels, the model
// that picks one of them, and the schedule. Plain C++ without torch or CUDA.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "dispatch.h"

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

enum class BackwardDtype : int { kFloat, kDouble, kHalf, kBFloat16 };

constexpr int bytes_of(BackwardDtype dtype) {
  return dtype == BackwardDtype::kDouble ? 8 : dtype == BackwardDtype::kFloat ? 4 : 2;
}

// A bm×bn tile in slices bk deep, by parts_m×parts_n warps (tensor cores) or of parts_m×parts_n elements a thread (the
// FP32 and FP64 pipes), `slices` times over.
struct BackwardTileShape {
  int bm, bn, bk, parts_m, parts_n, slices, stages;
};

// The numbers instantiate the kernel's template, so a row here and the code can't disagree.
struct BackwardKernel {
  const char* name;
  bool fp32, fp64, fp16, bf16;  // the dtypes
  bool tensor_cores;
  bool async;  // cp.async for what isn't dz; 16-bit operands must then be 4-byte aligned, with unit stride along rows
  bool fused;  // dz is formed anew for each tile: one launch. Else it is read from a workspace: two
  BackwardTileShape data, weight;
  int blocks_per_sm;      // what registers are limited for
  int first_sm, last_sm;  // compute capabilities, 10 * major + minor

  constexpr bool takes(BackwardDtype dtype) const {
    return dtype == BackwardDtype::kFloat    ? fp32
           : dtype == BackwardDtype::kDouble ? fp64
           : dtype == BackwardDtype::kHalf   ? fp16
                                             : bf16;
  }
};

constexpr int kAnyLaterSm = 1000;

// small: few batch rows, where [grad_input | grad_hx] has few tiles and the time of one, K = H deep, counts: narrow and
//        deep, with all of a slice's weights in flight.
// mid:   more batch rows, where the reads of [W | U] count.
// large: where reading dh' and h' again for every tile costs more than a launch that writes dz for all of them. All
//        operands come by cp.async, and tiles are as large as registers allow.
// staged: what cp.async can't copy, and GPUs without it. The last rows are there for those alone.
// clang-format off
constexpr BackwardKernel kBackwardTiled[] = {
  // name            fp32   fp64   fp16   bf16   tensor async  fused   data                          weight                        bl  sm
  {"tiled_small",    false, false, true,  true,  true,  true,  true,  {16, 32, 128, 1, 2, 2, 3},    {64, 64, 32, 2, 2, 1, 3},     3,  80, kAnyLaterSm},
  {"tiled_mid",      false, false, true,  true,  true,  true,  true,  {32, 64, 64, 1, 2, 2, 3},     {64, 64, 32, 2, 2, 1, 3},     3,  80, kAnyLaterSm},
  {"tiled_small",    true,  false, false, false, false, true,  true,  {16, 32, 64, 4, 4, 4, 3},     {64, 64, 16, 8, 4, 1, 3},     3,  80, kAnyLaterSm},
  {"tiled_mid",      true,  false, false, false, false, true,  true,  {32, 64, 32, 8, 4, 2, 3},     {64, 64, 16, 8, 4, 1, 3},     3,  80, kAnyLaterSm},
  {"tiled_small",    false, true,  false, false, true,  true,  true,  {16, 32, 32, 1, 2, 2, 3},     {32, 64, 16, 2, 2, 1, 3},     3,  80, kAnyLaterSm},
  {"tiled_mid",      false, true,  false, false, true,  true,  true,  {32, 64, 16, 2, 2, 1, 3},     {32, 64, 16, 2, 2, 1, 3},     3,  80, kAnyLaterSm},
  {"tiled_large",    false, false, true,  true,  true,  true,  false, {128, 128, 32, 2, 4, 1, 4},   {128, 128, 32, 2, 4, 1, 4},   1,  80, kAnyLaterSm},
  {"tiled_large",    true,  false, false, false, false, true,  false, {128, 128, 16, 8, 8, 1, 3},   {128, 128, 16, 8, 8, 1, 3},   1,  80, kAnyLaterSm},
  {"tiled_large",    false, true,  false, false, true,  true,  false, {64, 64, 16, 2, 2, 1, 3},     {64, 64, 16, 2, 2, 1, 3},     2,  80, kAnyLaterSm},
  {"tiled_staged",   false, false, false, true,  true,  false, true,  {32, 64, 64, 1, 2, 2, 2},     {64, 64, 32, 2, 2, 1, 2},     2,  80, kAnyLaterSm},
  {"tiled_staged",   false, false, true,  false, true,  false, true,  {32, 64, 64, 1, 2, 2, 2},     {64, 64, 32, 2, 2, 1, 2},     2,  75, kAnyLaterSm},
  {"tiled_staged",   true,  false, false, true,  false, false, true,  {16, 32, 32, 4, 4, 4, 2},     {64, 64, 16, 8, 4, 1, 2},     3,  75, 75},
  {"tiled_staged",   false, true,  false, false, false, false, true,  {16, 32, 16, 4, 4, 4, 2},     {32, 64, 16, 4, 4, 1, 2},     2,  75, 75},
};
// clang-format on
constexpr int kNumBackwardTiled = static_cast<int>(sizeof(kBackwardTiled) / sizeof(kBackwardTiled[0]));

// ---- the choice -----------------------------------------------------------------------------------------------------

struct BackwardDevice {
  int compute_capability = 90;  // 10 * major + minor
  int multiprocessors = 132;
  int64_t smem_per_block = 227 * 1024;
};

// All that the choice depends on.
struct BackwardCase {
  int64_t batch, input_size, hidden_size;
  BackwardDtype dtype;
  bool grad_input, grad_hx, grad_weight_ih, grad_weight_hh, grad_bias;
  int vector_bytes;  // what the needed ones of W, U, x and h are aligned to, with unit stride along rows; 0: less than
                     // 4
};

struct BackwardPlan {
  int kernel = -1;  // the row of kBackwardTiled
  BackwardSchedule schedule;
  int64_t blocks = 0;
  int64_t dz_stride = 0;  // where dz goes to a workspace: elements from row to row, 16-byte aligned
  int64_t workspace_bytes = 0;
  double microseconds = 0;  // what the model predicts

  int launches() const { return workspace_bytes > 0 ? 2 : 1; }
};

namespace backward_plan {

// Bytes of a mainloop's ring, of which dz has two slices where it is formed in registers, and of the sums that take its
// place. The launcher asserts that this is so.
constexpr int64_t smem_bytes(const BackwardKernel& k, const BackwardTileShape& t, BackwardDtype dtype) {
  const int64_t sum_bytes = dtype == BackwardDtype::kDouble ? 8 : 4;
  const int64_t element = k.tensor_cores ? bytes_of(dtype) : sum_bytes, padding = k.tensor_cores ? 0 : 4;
  const int64_t a = (t.bm + padding) * t.bk * element * (k.async && !k.fused ? t.stages : 2);
  const int64_t b = (t.bn + padding) * t.bk * element * (k.async ? t.stages : 2);
  const int64_t sums = sum_bytes * t.slices * t.bm * (t.bn + 8);
  return a + b > sums ? a + b : sums;
}

constexpr int64_t smem_bytes(const BackwardKernel& k, BackwardDtype dtype) {
  const int64_t data = smem_bytes(k, k.data, dtype), weight = smem_bytes(k, k.weight, dtype);
  return data > weight ? data : weight;
}

// What a multiprocessor does a clock. Peaks are the data sheets', with what others report to be within reach of
// mma.sync; no GPU has confirmed any of it, and what counts is the order in which the kernels come out.
struct Machine {
  double ghz, l2_bytes, l2_total_bytes;  // one multiprocessor's share at most, and all together
  double tensor_flops, fp32_flops, fp64_flops, fp64_tensor_flops;
};
inline Machine machine_of(int compute_capability) {
  if (compute_capability >= 90) return {1.75, 64, 3140, 2600, 220, 110, 230};
  if (compute_capability == 80) return {1.40, 64, 3300, 1800, 110, 55, 110};
  if (compute_capability > 80) return {1.80, 48, 1900, 900, 210, 3.5, 3.5};
  return {1.50, 40, 800, 850, 110, 3.5, 3.5};
}
constexpr double kRamp = 1.24;              // µs: a launch
constexpr double kTileClocks = 1100;        // first bytes, start and end of a tile, which other tiles of the SM hide
constexpr double kStagedSliceClocks = 700;  // a slice that goes through registers is one round trip to L2

// The clocks that one tile keeps a multiprocessor busy, and the ones it takes by itself.
struct TileTime {
  double busy, alone;
};
inline TileTime tile_time(const BackwardKernel& k, const BackwardTileShape& t, const BackwardCase& c, const Machine& m,
                          int64_t rows, int64_t columns, int64_t depth, int multiprocessors) {
  const double size = bytes_of(c.dtype), sum_size = size < 8 ? 4 : 8;
  const double rate = c.dtype == BackwardDtype::kDouble ? (k.tensor_cores ? m.fp64_tensor_flops : m.fp64_flops)
                                                        : (k.tensor_cores ? m.tensor_flops : m.fp32_flops);
  // A tile's rows and columns beyond the edge are multiplied, but not read.
  const double read_rows = static_cast<double>(std::min<int64_t>(t.bm, rows)) * (k.fused ? 2 : 1);
  const double read_columns = static_cast<double>(std::min<int64_t>(t.bn, columns));
  const double flops = 2.0 * t.bm * t.bn * t.bk / rate, bytes = (read_rows + read_columns) * t.bk * size;
  const double l2_share = std::min(m.l2_bytes, m.l2_total_bytes / multiprocessors);  // while all are at it
  const double slices = static_cast<double>(ceil_div(depth, t.bk));
  const double epilogue = t.bm * t.bn * (2 * sum_size * t.slices / 128 + size / l2_share);
  const double staged = k.fused || !k.async ? kStagedSliceClocks : 0;
  return {slices * std::max(flops, bytes / l2_share) + epilogue,
          kTileClocks + slices * std::max({flops, bytes / m.l2_bytes, staged}) + epilogue};
}

inline BackwardPlan plan(int kernel, const BackwardCase& c, const BackwardDevice& device) {
  const BackwardKernel& k = kBackwardTiled[kernel];
  const Machine m = machine_of(device.compute_capability);
  BackwardPlan plan;
  plan.kernel = kernel;

  BackwardSchedule& s = plan.schedule;
  const auto columns = [](int64_t size, int bn, bool wanted) { return wanted ? ceil_div(size, bn) : 0; };
  s.data = {ceil_div(c.batch, k.data.bm),
            {columns(c.input_size, k.data.bn, c.grad_input), columns(c.hidden_size, k.data.bn, c.grad_hx)}};
  s.weight = {
      ceil_div(c.hidden_size, k.weight.bm),
      {columns(c.input_size, k.weight.bn, c.grad_weight_ih), columns(c.hidden_size, k.weight.bn, c.grad_weight_hh)}};
  // The bias gradients need a column of tiles, even if they are all that is asked for.
  if (c.grad_bias && s.weight.columns[0] + s.weight.columns[1] == 0) s.weight.columns[1] = 1;

  const int64_t widest = std::max(c.input_size, c.hidden_size);
  const TileTime data = tile_time(k, k.data, c, m, c.batch, widest, c.hidden_size, device.multiprocessors);
  const TileTime weight = tile_time(k, k.weight, c, m, c.hidden_size, widest, c.batch, device.multiprocessors);
  s.data_first = data.alone >= weight.alone;

  const int64_t by_smem = (device.smem_per_block + 1024) / (smem_bytes(k, c.dtype) + 1024);
  const int64_t resident = std::max<int64_t>(1, std::min<int64_t>(k.blocks_per_sm, by_smem));
  plan.blocks = std::min(s.size(), device.multiprocessors * resident);

  // Either the multiprocessors are busy throughout, but for the end, or blocks wait for their own loads most of the
  // time.
  const double n_data = static_cast<double>(s.data.size()), n_weight = static_cast<double>(s.weight.size());
  const double sms = device.multiprocessors, last = std::min(data.busy, weight.busy);
  const double longest = std::max(n_data > 0 ? data.alone : 0, n_weight > 0 ? weight.alone : 0);
  const double busy = (n_data * data.busy + n_weight * weight.busy) / sms + last / 2;
  const double waiting = (n_data * data.alone + n_weight * weight.alone) / std::max<double>(1, plan.blocks);
  double clocks = std::max({busy, waiting, longest});
  if (!k.fused) {
    const int size = bytes_of(c.dtype);
    plan.dz_stride = ceil_div(c.hidden_size * size, 16) * 16 / size;
    plan.workspace_bytes = c.batch * plan.dz_stride * size;
    clocks += kTileClocks + 3.0 * static_cast<double>(plan.workspace_bytes) / m.l2_total_bytes;
  }
  plan.microseconds = kRamp * plan.launches() + clocks / (m.ghz * 1e3);
  return plan;
}

}  // namespace backward_plan

// Why a kernel can't take the case; null if it can.
inline const char* why_not_backward(const BackwardKernel& k, const BackwardCase& c, const BackwardDevice& d) {
  if (!k.takes(c.dtype)) return "it is not for this dtype";
  if (d.compute_capability < k.first_sm || d.compute_capability > k.last_sm) return "it is not for this architecture";
  if (k.async && bytes_of(c.dtype) == 2 && c.vector_bytes < 4) return "rows are not 4-byte aligned with unit stride";
  if (backward_plan::smem_bytes(k, c.dtype) > d.smem_per_block)
    return "it needs more shared memory than a block may have";
  return nullptr;
}

// The best kernel by the model, or among those of that name. Without a name there is always one: each dtype has a row
// without conditions for either range of architectures.
inline BackwardPlan plan_backward(const BackwardCase& c, const BackwardDevice& device, const char* name = nullptr) {
  BackwardPlan best;
  for (int i = 0; i < kNumBackwardTiled; ++i) {
    if (name != nullptr && std::strcmp(name, kBackwardTiled[i].name) != 0) continue;
    if (why_not_backward(kBackwardTiled[i], c, device) != nullptr) continue;
    const BackwardPlan plan = backward_plan::plan(i, c, device);
    if (best.kernel < 0 || plan.microseconds < best.microseconds) best = plan;
  }
  return best;
}

}  // namespace rnn_ext::cuda
