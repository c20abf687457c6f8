#include "cuda/plan/cell_forward.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda/plan/machine.h"
#include "cuda/plan/tiles.h"

namespace rnn_ext::cuda {
namespace {

// ---- the model ------------------------------------------------------------------------------------------------------
//
// A launch costs the ramp, and then as long as its busiest multiprocessor takes: for the blocks that it gets, one after
// the other, the larger of what they compute, what they read from shared memory and what they read from L2, plus a
// latency for every round of blocks that it holds at the same time.

constexpr double kSpecialFunctions = 16;  // a clock: one tanh.approx or ex2 an element of the output

// tcgen05 on sm_100, which no kernel here has: of the 2250 TFLOP/s in a B200's data sheet cuBLAS is reported to reach
// 70 %; a clock and multiprocessor.
constexpr double kCublasFlops = 0.7 * 8690, kCublasTf32Flops = kCublasFlops / 2;

constexpr double kWorkspaceSync = 1.6;  // µs: write, count, read back
constexpr double kClusterBytes = 32;    // a clock: another block's shared memory

// Bytes of shared memory that the engines read for one slice of the tile.
double smem_traffic(const ForwardTiledKernel& k, Dtype dtype) {
  if (k.math != Math::kSimt) {
    return double(k.parts_m * k.parts_n) * (k.bm / k.parts_m + k.bn / k.parts_n) * k.bk * bytes_of(dtype);
  }
  // A warp has 4 by 8 threads' parts; the lanes that want the same word share one read.
  const double warps = double(k.bm) * k.bn / (32 * k.parts_m * k.parts_n);
  return warps * (4 * k.parts_m + 8 * k.parts_n) * k.bk * sum_bytes_of(dtype);
}

// Tiles of as many rows as a cluster has blocks for.
int64_t wgmma_tiles(const ForwardWgmmaKernel& k, const ForwardCase& c) {
  return ceil_div(c.batch, k.bm * k.cluster) * ceil_div(c.hidden_size, k.bn);
}

// How many run at the same time. (Of clusters of 8, an H100 should hold 16: its multiprocessors come in groups of 16
// and more that a cluster does not leave.)
int64_t wgmma_clusters(const ForwardWgmmaKernel& k, const ForwardCase& c, const Device& d, int splits) {
  return std::max<int64_t>(1, std::min<int64_t>(wgmma_tiles(k, c), d.multiprocessors / (k.cluster * splits)));
}

int64_t wgmma_k_tiles(const ForwardCase& c) {
  const int64_t bk = 128 / bytes_of(c.dtype);
  return ceil_div(c.input_size, bk) + (c.hx ? ceil_div(c.hidden_size, bk) : 0);
}

double wgmma_microseconds(const ForwardWgmmaKernel& k, const ForwardCase& c, const Device& d, int splits) {
  const Machine m = machine_of(d.compute_capability);
  const double size = bytes_of(c.dtype), bk = 128 / size;
  const int64_t tiles = wgmma_tiles(k, c);
  const double rounds = double(ceil_div(tiles, wgmma_clusters(k, c, d, splits)));
  const double k_tiles = double(ceil_div(wgmma_k_tiles(c), splits));
  const double rows = double(std::min<int64_t>(k.bm, c.batch)),
               columns = double(std::min<int64_t>(k.bn, c.hidden_size)) / k.cluster;
  const double bytes = (rows + columns) * bk * size;
  double clocks = rounds * k_tiles * std::max(wgmma_clocks(k.bn, k.math), bytes / m.l2_bytes);
  clocks = std::max(clocks, double(tiles * k.cluster * splits) * k_tiles * bytes / m.l2_total_bytes);
  // Through shared memory once each way, while the tensor cores wait.
  clocks += rounds * k.bm * k.bn / splits * (1 / kSpecialFunctions + 2 * size / kSmemBytes);
  double us = kRamp + kTensorMapFill + kLatency + kRound + (k.cluster > 1 ? kClusterSync : 0);
  if (splits > 1) {
    us += 2 * kClusterSync;
    clocks += rounds * k.bm * k.bn * 4 * (1 / kSmemBytes + (splits - 1.0) / splits / kClusterBytes);
  }
  return us + clocks / (m.ghz * 1e3);
}

// In tiles of 128 x 256: small ones may be less of a loss than that, but it is large shapes that the choice is about.
double cublas_microseconds(const ForwardCase& c, const Device& d) {
  const Machine m = machine_of(d.compute_capability);
  const double depth = double(c.input_size) + (c.hx ? double(c.hidden_size) : 0), size = bytes_of(c.dtype);
  const double outputs = double(c.batch) * double(c.hidden_size), products = c.hx ? 2 : 1;
  const double rounds = double(ceil_div(ceil_div(c.batch, 128) * ceil_div(c.hidden_size, 256), d.multiprocessors));
  const double flops = rounds * 2 * 128 * 256 * depth / (size == 2 ? kCublasFlops : kCublasTf32Flops);
  const double bytes = outputs * (2 * products * 4 + size);  // written, and read again
  return (products + 1) * (kRamp + kLatency + kRound) + (flops + bytes / m.l2_total_bytes) / (m.ghz * 1e3);
}

double gemv_microseconds(const ForwardCase& c, const Device& d, int64_t blocks) {
  const Machine m = machine_of(d.compute_capability);
  const int batch = forward_gemv_batch(c.batch, c.dtype, c.vector_bytes >= 16),
            rows = forward_gemv_rows(batch, c.dtype);
  const double depth = double(c.input_size) + (c.hx ? double(c.hidden_size) : 0), size = bytes_of(c.dtype);
  const double weights = depth * double(c.hidden_size);
  const double per_sm = weights * double(ceil_div(blocks, d.multiprocessors)) / double(blocks);
  const double flops = 2.0 * per_sm * batch / (0.7 * (c.dtype == Dtype::kDouble ? m.fp64_flops : m.fp32_flops)) +
                       (size == 2 ? per_sm * (rows + batch) / rows / 64 : 0);  // conversions to fp32
  const double l1 = per_sm * batch / rows * size / kSmemBytes;                 // x and h
  double clocks = std::max({flops, l1, per_sm * size / m.l2_bytes, weights * size / m.l2_total_bytes});
  if (c.vector_bytes < 16) clocks = std::max(clocks, per_sm * (1 + double(batch) / rows) / 16);  // a load an element
  return kRamp + kLatency + kRound + clocks / (m.ghz * 1e3);
}

// ---- the candidates -------------------------------------------------------------------------------------------------

// Why a kernel can't take the case; empty if it can.
std::string why_not_gemv(const ForwardCase& c) {
  const int most = forward_gemv_max_batch(c.dtype);
  return c.batch <= most ? ""
                         : "it takes batches of up to " + std::to_string(most) + ", not " + std::to_string(c.batch);
}

std::string why_not_wgmma(const ForwardWgmmaKernel& k, const ForwardCase& c, const Device& d) {
  if (!k.takes(c.dtype)) return "it is not compiled for this dtype";
  if (const std::string why = why_no_wgmma(d, c.tensor_maps); !why.empty()) return why;
  if (k.math == Math::kTf32 && !c.tf32) return kNoTf32;
  if (k.math == Math::kSplitTf32 && !c.split_tf32) return "RNN_EXT_3XTF32=0 forbids it";
  if (wgmma_tiles(k, c) > INT32_MAX / 16) return "there are more tiles than it counts";
  return "";
}

std::string why_not_split(const ForwardWgmmaKernel& k, const ForwardCase& c, int splits) {
  if (splits == 1) return "";
  if (splits > k.most_splits || (splits & (splits - 1)) != 0) {
    return k.most_splits == 1 ? std::string(k.name) + " does not split K over blocks"
                              : std::string(k.name) + " splits K in 2 or 4, not " + std::to_string(splits);
  }
  if (wgmma_k_tiles(c) < splits) {
    return "K can't be split in " + std::to_string(splits) + ": it has " + std::to_string(wgmma_k_tiles(c)) + " slices";
  }
  return "";
}

// Why it is left to RNN_EXT_KERNEL to ask for a kernel that can take the case.
std::string why_only_forced(const ForwardWgmmaKernel& k, const ForwardCase& c) {
  if (k.math == Math::kSplitTf32 && c.input_size + (c.hx ? c.hidden_size : 0) < kMin3xTf32Depth) {
    return "sums of fewer than " + std::to_string(kMin3xTf32Depth) + " products are more accurate in fp32";
  }
  return "";
}

// It can take everything. But where its GEMMs are made of the instructions that ours have, two of them and a third
// launch are no gain that could be told without measuring: it is chosen where tensor cores have another, faster
// instruction. Its sums pass from launch to launch in fp32; in 16 bits they would be rounded twice.
std::string why_only_forced_cublas(const ForwardCase& c, const Device& d) {
  const bool tensor_cores = bytes_of(c.dtype) == 2 || (c.dtype == Dtype::kFloat && c.tf32);
  const bool has_tcgen05 = d.compute_capability >= 100 && d.compute_capability < 110;
  return tensor_cores && has_tcgen05 ? "" : "it has no instructions for this that the kernels here lack";
}

ForwardPlan plan_cublas(const ForwardCase& c, const Device& d) {
  ForwardPlan plan;
  plan.family = ForwardPlan::Family::kCublas;
  plan.workspace_bytes = (c.hx ? 2 : 1) * c.batch * c.hidden_size * sum_bytes_of(c.dtype);
  plan.microseconds = cublas_microseconds(c, d);
  return plan;
}

ForwardPlan plan_gemv(const ForwardCase& c, const Device& d) {
  const bool vectors = c.vector_bytes >= 16;
  const int rows = forward_gemv_rows(forward_gemv_batch(c.batch, c.dtype, vectors), c.dtype);
  const int64_t depth = c.input_size + (c.hx ? c.hidden_size : 0), row_groups = ceil_div(c.hidden_size, rows);
  const int64_t loads = vectors ? depth * bytes_of(c.dtype) / 16 : depth;
  ForwardPlan plan;
  // More warps on a row until every multiprocessor has a block, as long as each lane still has a load.
  while (plan.warps_per_row < kForwardGemvWarps &&
         row_groups * plan.warps_per_row < int64_t{kForwardGemvWarps} * d.multiprocessors &&
         loads > 32 * plan.warps_per_row) {
    plan.warps_per_row *= 2;
  }
  plan.blocks = ceil_div(row_groups, kForwardGemvWarps / plan.warps_per_row);
  // Only where it is sure that the kernel was compiled with the wait: code for an older architecture has none.
  plan.early = d.compute_capability == 90 && has_wgmma_code();
  plan.microseconds = gemv_microseconds(c, d, plan.blocks);
  return plan;
}

ForwardPlan plan_tiled(int index, const ForwardCase& c, const Device& d, int splits, bool workspace) {
  const ForwardTiledKernel& k = kForwardTiled[index];
  const int64_t tiles = ceil_div(c.batch, k.bm) * ceil_div(c.hidden_size, k.bn);
  ForwardPlan plan;
  plan.family = ForwardPlan::Family::kTiled;
  plan.kernel = index;
  plan.splits = splits;
  plan.blocks = tiles * splits;
  if (splits > 1) plan.reduction = workspace ? Reduction::kWorkspace : Reduction::kCluster;
  if (plan.reduction == Reduction::kWorkspace) {
    plan.workspace_bytes = plan.blocks * k.bm * k.bn * sum_bytes_of(c.dtype);
  }
  plan.microseconds = tiled_microseconds(k, c, d, splits, plan.reduction);
  return plan;
}

ForwardPlan plan_wgmma(int index, const ForwardCase& c, const Device& d, int splits) {
  const ForwardWgmmaKernel& k = kForwardWgmma[index];
  ForwardPlan plan;
  plan.family = ForwardPlan::Family::kWgmma;
  plan.kernel = index;
  plan.splits = splits;
  // A cluster that splits K has one tile alone.
  plan.blocks = (splits > 1 ? wgmma_tiles(k, c) : wgmma_clusters(k, c, d, 1)) * k.cluster * splits;
  if (splits > 1) plan.reduction = Reduction::kCluster;
  plan.microseconds = wgmma_microseconds(k, c, d, splits);
  return plan;
}

constexpr int kMaxSplits = 8;  // what a cluster may have on every GPU with clusters

std::string why_not_split(const ForwardPlan& plan, const ForwardCase& c, const Device& d) {
  const ForwardTiledKernel& k = kForwardTiled[plan.kernel];
  const int64_t slices = ceil_div(c.input_size, k.bk) + (c.hx ? ceil_div(c.hidden_size, k.bk) : 0);
  if (plan.blocks > INT32_MAX) return "it would need more blocks than a grid has";
  if (plan.splits == 1) return "";
  if (plan.splits > std::min<int64_t>(kMaxSplits, slices)) {
    return "K can't be split in " + std::to_string(plan.splits) + ": it has " + std::to_string(slices) +
           " slices, and at most " + std::to_string(kMaxSplits) + " blocks share a tile";
  }
  if (plan.reduction == Reduction::kCluster) return d.compute_capability >= 90 ? "" : "this GPU has no clusters";
  if (plan.blocks / plan.splits > kMaxCounters) return "there are more tiles than counters";
  return "";
}

// How many blocks may share K, and whether they must do it through global memory.
struct Splits {
  std::vector<int> ways = {1, 2, 4, kMaxSplits};
  bool workspace = false;
};

// All kernels with what they can't do. Of the ways to split K, after the first only those that may run.
std::vector<Candidate<ForwardPlan>> candidates(const ForwardCase& c, const Device& d, const Splits& asked) {
  std::vector<Candidate<ForwardPlan>> all;
  const auto add = [&](const ForwardPlan& plan, int splits, const std::string& why_not,
                       const std::string& why_only_forced) {
    const bool may_run = why_not.empty() && why_only_forced.empty();
    if (may_run || splits == asked.ways.front()) all.push_back({plan, why_not, why_only_forced});
  };
  const auto or_else = [](const std::string& why, const std::string& other) { return why.empty() ? other : why; };
  const auto no_split = [](const char* name, int splits) {
    return splits > 1 ? std::string(name) + " does not split K over blocks" : "";
  };
  for (const int splits : asked.ways) {
    add(plan_gemv(c, d), splits, or_else(no_split("gemv", splits), why_not_gemv(c)), "");
  }
  for (int i = 0; i < kNumForwardTiled; ++i) {
    for (const int splits : asked.ways) {
      // Through global memory only where there are no clusters, which are faster.
      const ForwardPlan plan = plan_tiled(i, c, d, splits, asked.workspace || d.compute_capability < 90);
      add(plan, splits, or_else(why_not_tiled(kForwardTiled[i], c, d), why_not_split(plan, c, d)), "");
    }
  }
  for (int i = 0; i < kNumForwardWgmma; ++i) {
    const ForwardWgmmaKernel& k = kForwardWgmma[i];
    const std::string no_workspace =
        asked.workspace ? std::string(k.name) + " splits K over the blocks of a cluster alone" : "";
    for (const int splits : asked.ways) {
      const ForwardPlan plan = plan_wgmma(i, c, d, splits);
      const std::string why_not = or_else(no_workspace, or_else(why_not_split(k, c, splits), why_not_wgmma(k, c, d)));
      const bool fills = splits > 1 && plan.blocks > d.multiprocessors;
      add(plan, splits, why_not, fills ? "without it there are tiles for all multiprocessors" : why_only_forced(k, c));
    }
  }
  for (const int splits : asked.ways) {
    add(plan_cublas(c, d), splits, no_split("cublas", splits), why_only_forced_cublas(c, d));
  }
  return all;
}

ForwardPlan plan_forced(const ForwardCase& c, const Device& d, const std::string& text) {
  const std::string name = text.substr(0, text.find(':')), what = "RNN_EXT_KERNEL=" + text;
  Splits asked = {{1}};
  if (name.size() < text.size()) {
    char* end = nullptr;
    const long splits = std::strtol(text.c_str() + name.size() + 1, &end, 10);
    asked.workspace = std::strcmp(end, ":workspace") == 0;
    if (splits < 1 || splits > INT16_MAX || (*end != '\0' && !asked.workspace)) {
      throw std::invalid_argument(what + ": expected NAME, NAME:SPLITS or NAME:SPLITS:workspace");
    }
    asked.ways = {static_cast<int>(splits)};
  }
  return forced_of(candidates(c, d, asked), name, what, c.dtype, d);
}

const char* name_of(Reduction r) {
  return r == Reduction::kCluster ? " as a cluster" : r == Reduction::kWorkspace ? " through global memory" : "";
}

std::string describe(const ForwardPlan& plan, const ForwardCase& c) {
  char text[200];
  if (plan.family == ForwardPlan::Family::kCublas) {
    std::snprintf(text, sizeof text, "%d launches", c.hx ? 3 : 2);
  } else if (plan.family == ForwardPlan::Family::kWgmma) {
    const ForwardWgmmaKernel& k = kForwardWgmma[plan.kernel];
    std::snprintf(text, sizeof text, "%6lld blocks of 384 threads in clusters of %d, %lld tiles, K split in %d",
                  static_cast<long long>(plan.blocks), k.cluster * plan.splits,
                  static_cast<long long>(ceil_div(c.batch, k.bm) * ceil_div(c.hidden_size, k.bn)), plan.splits);
  } else if (plan.family == ForwardPlan::Family::kGemv) {
    std::snprintf(text, sizeof text, "%6lld blocks, %d rows of the weights a warp group of %d",
                  static_cast<long long>(plan.blocks),
                  forward_gemv_rows(forward_gemv_batch(c.batch, c.dtype, c.vector_bytes >= 16), c.dtype),
                  plan.warps_per_row);
  } else {
    const ForwardTiledKernel& k = kForwardTiled[plan.kernel];
    std::snprintf(text, sizeof text, "%6lld blocks of %d threads, K split in %d%s", static_cast<long long>(plan.blocks),
                  k.threads(), plan.splits, name_of(plan.reduction));
  }
  return text;
}

}  // namespace

double tiled_microseconds(const ForwardTiledKernel& k, const ForwardCase& c, const Device& d, int splits,
                          Reduction reduction) {
  const Machine m = machine_of(d.compute_capability);
  const int64_t tiles = ceil_div(c.batch, k.bm) * ceil_div(c.hidden_size, k.bn);
  const int64_t slices = ceil_div(c.input_size, k.bk) + (c.hx ? ceil_div(c.hidden_size, k.bk) : 0);
  const double block_slices = double(ceil_div(slices, splits));
  const double size = bytes_of(c.dtype);
  // A tile's rows beyond the batch are multiplied, but not read.
  const double rows = double(std::min<int64_t>(k.bm, c.batch)),
               columns = double(std::min<int64_t>(k.bn, c.hidden_size));
  const double narrow = c.vector_bytes >= 16 ? 1 : c.vector_bytes == 8 ? 1.2 : 1.5;
  const double flops = 2.0 * k.bm * k.bn * k.bk / compute_flops(m, k.math, c.dtype) *
                       (k.math == Math::kSimt && size <= 4 ? simt_instructions(k.bm, k.bn, k.parts_m, k.parts_n) : 1);
  const double smem = smem_traffic(k, c.dtype) / kSmemBytes;
  const double l2 = (rows + columns) * k.bk * size * narrow / m.l2_bytes;
  const int64_t blocks = tiles * splits, per_sm = ceil_div(blocks, d.multiprocessors);
  const int resident = std::max(1, std::min(k.blocks_per_sm, int(d.smem_per_block / k.smem_bytes(c.dtype))));
  const double rounds = double(ceil_div(per_sm, resident));
  // Through registers, a slice is one round trip to L2, which only other blocks of the multiprocessor hide.
  const double trip = k.fill == Fill::kStaged ? kTripClocks / double(std::min<int64_t>(per_sm, resident)) : 0;
  double clocks = per_sm * block_slices * std::max({flops, smem, l2, trip});
  clocks = std::max(clocks, blocks * block_slices * (rows + columns) * k.bk * size / m.l2_total_bytes);
  const double epilogue = 2.0 * k.bm * k.bn * sum_bytes_of(c.dtype) * k.groups / kSmemBytes;  // written and read back
  clocks += per_sm * epilogue;
  double us = kRamp + rounds * (kLatency + kRound);
  const double partial = rows * columns * sum_bytes_of(c.dtype);
  if (reduction == Reduction::kCluster) {
    us += kClusterSync;
    clocks += per_sm * partial / kClusterBytes;
  } else if (reduction == Reduction::kWorkspace) {
    us += kWorkspaceSync;
    clocks += per_sm * partial / m.l2_bytes + partial * splits / m.l2_bytes;
  }
  return us + clocks / (m.ghz * 1e3);
}

std::string why_not_tiled(const ForwardTiledKernel& k, const ForwardCase& c, const Device& d) {
  if (!k.takes(c.dtype)) return "it is not compiled for this dtype";
  if (d.compute_capability < k.first_sm || d.compute_capability > k.last_sm ||
      (c.dtype == Dtype::kBFloat16 && k.math == Math::kTensorCore && d.compute_capability < 80)) {
    return not_for(d.compute_capability);
  }
  if (k.math == Math::kTf32 && !c.tf32) return kNoTf32;
  if (k.fill == Fill::kAsync && bytes_of(c.dtype) == 2 && c.vector_bytes < 4) {
    return "its copies need 16-bit operands with unit stride along K and 4-byte aligned rows";
  }
  if (k.smem_bytes(c.dtype) > d.smem_per_block) return "it needs more shared memory than this GPU has";
  return "";
}

bool allows_split_tf32(const char* variable) {
  const std::string text = variable != nullptr ? variable : "";
  if (text.empty() || text == "1") return true;
  if (text == "0") return false;
  throw std::invalid_argument("RNN_EXT_3XTF32 must be 0, 1 or unset, got " + text);
}

ForwardPlan plan_forward(const ForwardCase& c, const Device& device, const char* forced) {
  if (forced != nullptr && *forced != '\0') return plan_forced(c, device, forced);
  const std::vector<Candidate<ForwardPlan>> all = candidates(c, device, {});
  const ForwardPlan* const best = best_of(all);
  if (best == nullptr)
    throw std::invalid_argument("rnn_cell: the batch or hidden size needs more blocks than a grid has");
  return *best;
}

std::string explain_forward(const ForwardCase& c, const Device& device, const char* forced) {
  const double depth = double(c.input_size) + (c.hx ? double(c.hidden_size) : 0);
  const double flops = 2.0 * double(c.batch) * double(c.hidden_size) * depth;
  const double bytes = bytes_of(c.dtype) * (depth * double(c.hidden_size + c.batch) + double(c.batch * c.hidden_size));
  return report("forward", flops, bytes, device, plan_forward(c, device, forced), forced != nullptr && *forced != '\0',
                of_dtype(candidates(c, device, {}), c.dtype),
                [&](const ForwardPlan& plan) { return describe(plan, c); });
}

}  // namespace rnn_ext::cuda
