#include "dispatch.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace rnn_ext::cuda {
namespace {

// ---- the model ------------------------------------------------------------------------------------------------------
//
// A launch costs the ramp, and then as long as its busiest multiprocessor takes: for the blocks that it gets, one after
// the other, the larger of what they compute, what they read from shared memory and what they read from L2, plus a
// latency for every round of blocks that it holds at the same time. Weights are taken to be in L2. No GPU has measured
// any of this yet: peaks are the data sheets', efficiencies and latencies are what others report, and what counts is
// the order in which the kernels come out.

struct Machine {
  double ghz;
  double l2_bytes, l2_total_bytes;  // a clock: one multiprocessor's share at most, and all together
  double tensor_flops, tf32_flops, fp32_flops, fp64_flops, fp64_tensor_flops;  // a clock and multiprocessor
};

// wgmma on sm_90: the peak a clock and multiprocessor, of which hand-written kernels are reported to reach 85 % (800 of
// 946 TFLOP/s at this clock).
constexpr double kWgmmaFlops = 0.85 * 4096, kWgmmaTf32Flops = 0.85 * 2048;
constexpr double kSpecialFunctions = 16;  // a clock: one tanh.approx or ex2 an element of the output

constexpr double kRamp = 1.24, kLatency = 0.35, kRound = 0.30;  // µs: launch; first bytes; start and end of a block
constexpr double kClusterSync = 0.55, kWorkspaceSync = 1.6;     // µs: two barriers; write, count, read back
constexpr double kTensorMapFill = 0.40;                         // µs: the tensor maps, before first bytes come
constexpr double kTripClocks = 700;                             // a load from L2, under load, and its barrier
constexpr double kSmemBytes = 128, kClusterBytes = 32;          // a clock: own shared memory, and another block's

Machine machine_of(int compute_capability) {
  if (compute_capability >= 90) return {1.75, 64, 3140, 2600, 1300, 240, 110, 230};  // mma.sync: 63 % of wgmma's peak
  if (compute_capability == 80) return {1.40, 64, 3300, 1800, 900, 120, 55, 110};
  if (compute_capability > 80) return {1.80, 48, 1900, 900, 450, 230, 3.5, 3.5};
  return {1.50, 40, 800, 850, 0, 120, 3.5, 3.5};
}

double compute_flops(const Machine& m, Math math, Dtype dtype) {
  if (math == Math::kTf32) return m.tf32_flops;
  if (math == Math::kTensorCore) return dtype == Dtype::kDouble ? m.fp64_tensor_flops : m.tensor_flops;
  return dtype == Dtype::kDouble ? m.fp64_flops : m.fp32_flops;
}

// Bytes of shared memory that the engines read for one slice of the tile.
double smem_traffic(const TiledKernel& k, Dtype dtype) {
  if (k.math != Math::kSimt) {
    return double(k.parts_m * k.parts_n) * (k.bm / k.parts_m + k.bn / k.parts_n) * k.bk * bytes_of(dtype);
  }
  // A warp has 4 by 8 threads' parts; the lanes that want the same word share one read.
  const double warps = double(k.bm) * k.bn / (32 * k.parts_m * k.parts_n);
  return warps * (4 * k.parts_m + 8 * k.parts_n) * k.bk * (dtype == Dtype::kDouble ? 8 : 4);
}

// Instructions for one FFMA: 16-byte reads of shared memory, and copies of single elements, with their addresses, that
// transpose the operands on their way.
double simt_instructions(const TiledKernel& k) {
  return 1 + (k.parts_m + k.parts_n) / (4.0 * k.parts_m * k.parts_n) + 2.0 * (k.bm + k.bn) / (double(k.bm) * k.bn);
}

double tiled_microseconds(const TiledKernel& k, const ForwardCase& c, const Device& d, int splits,
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
                       (k.math == Math::kSimt && size <= 4 ? simt_instructions(k) : 1);
  const double smem = smem_traffic(k, c.dtype) / kSmemBytes;
  const double l2 = (rows + columns) * k.bk * size * narrow / m.l2_bytes;
  const int64_t blocks = tiles * splits, per_sm = ceil_div(blocks, d.multiprocessors);
  const int resident = std::max(1, std::min(k.blocks_per_sm, int(d.smem_per_block / k.smem_bytes(c.dtype))));
  const double rounds = double(ceil_div(per_sm, resident));
  // Through registers, a slice is one round trip to L2, which only other blocks of the multiprocessor hide.
  const double trip = k.fill == Fill::kStaged ? kTripClocks / double(std::min<int64_t>(per_sm, resident)) : 0;
  double clocks = per_sm * block_slices * std::max({flops, smem, l2, trip});
  clocks = std::max(clocks, blocks * block_slices * (rows + columns) * k.bk * size / m.l2_total_bytes);
  const double epilogue = 2.0 * k.bm * k.bn * (size < 8 ? 4 : 8) * k.slices / kSmemBytes;  // written and read back
  clocks += per_sm * epilogue;
  double us = kRamp + rounds * (kLatency + kRound);
  const double partial = rows * columns * (size < 8 ? 4 : 8);
  if (reduction == Reduction::kCluster) {
    us += kClusterSync;
    clocks += per_sm * partial / kClusterBytes;
  } else if (reduction == Reduction::kWorkspace) {
    us += kWorkspaceSync;
    clocks += per_sm * partial / m.l2_bytes + partial * splits / m.l2_bytes;
  }
  return us + clocks / (m.ghz * 1e3);
}

int64_t wgmma_clusters(const WgmmaKernel& k, const ForwardCase& c, const Device& d) {
  const int64_t tiles = ceil_div(c.batch, k.bm * k.cluster) * ceil_div(c.hidden_size, k.bn);
  return std::max<int64_t>(1, std::min<int64_t>(tiles, d.multiprocessors / k.cluster));
}

double wgmma_microseconds(const WgmmaKernel& k, const ForwardCase& c, const Device& d) {
  const Machine m = machine_of(d.compute_capability);
  const double size = bytes_of(c.dtype), bk = 128 / size;
  const int64_t tiles = ceil_div(c.batch, k.bm * k.cluster) * ceil_div(c.hidden_size, k.bn);
  const double rounds = double(ceil_div(tiles, wgmma_clusters(k, c, d)));
  const double k_tiles =
      double(ceil_div(c.input_size, int64_t(bk)) + (c.hx ? ceil_div(c.hidden_size, int64_t(bk)) : 0));
  const double products = k.split ? 3 : 1;
  const double flops = products * 2 * k.bm * k.bn * bk / (k.split ? kWgmmaTf32Flops : kWgmmaFlops);
  // Each of the two warpgroups reads its 64 rows and all columns; splitting reads all once and writes it twice.
  const double smem = (products * (k.bm + 2 * k.bn) + (k.split ? 3 * (k.bm + k.bn) : 0)) * bk * size / kSmemBytes;
  const double rows = double(std::min<int64_t>(k.bm, c.batch)),
               columns = double(std::min<int64_t>(k.bn, c.hidden_size)) / k.cluster;
  const double bytes = (rows + columns) * bk * size;
  double clocks = rounds * k_tiles * std::max({flops, smem, bytes / m.l2_bytes});
  clocks = std::max(clocks, double(tiles * k.cluster) * k_tiles * bytes / m.l2_total_bytes);
  // Through shared memory once each way, while the tensor cores wait.
  clocks += rounds * k.bm * k.bn * (1 / kSpecialFunctions + 2 * size / kSmemBytes);
  return kRamp + kTensorMapFill + kLatency + kRound + (k.cluster > 1 ? kClusterSync : 0) + clocks / (m.ghz * 1e3);
}

double gemv_microseconds(const ForwardCase& c, const Device& d, int64_t blocks) {
  const Machine m = machine_of(d.compute_capability);
  const int batch = gemv_batch(c.batch, c.dtype, c.vector_bytes >= 16), rows = gemv_rows(batch, c.dtype);
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
  const int most = gemv_max_batch(c.dtype);
  return c.batch <= most ? ""
                         : "it takes batches of up to " + std::to_string(most) + ", not " + std::to_string(c.batch);
}

std::string why_not_tiled(const TiledKernel& k, const ForwardCase& c, const Device& d) {
  if (!k.takes(c.dtype)) return "it is not compiled for this dtype";
  if (d.compute_capability < k.first_sm || d.compute_capability > k.last_sm ||
      (c.dtype == Dtype::kBFloat16 && k.math == Math::kTensorCore && d.compute_capability < 80)) {
    return "it is not for compute capability " + std::to_string(d.compute_capability / 10) + "." +
           std::to_string(d.compute_capability % 10);
  }
  if (k.math == Math::kTf32 && !c.tf32) return "PyTorch's setting for matmul does not allow tf32";
  if (k.fill == Fill::kAsync && bytes_of(c.dtype) == 2 && c.vector_bytes < 4) {
    return "its copies need 16-bit operands with unit stride along K and 4-byte aligned rows";
  }
  if (k.smem_bytes(c.dtype) > d.smem_per_block) return "it needs more shared memory than this GPU has";
  return "";
}

// Whether this library has code for sm_90a. A build without CUDA explains as if it had.
bool has_wgmma_code() {
#ifdef RNN_EXT_WITH_CUDA
  return std::strstr(RNN_EXT_CUDA_ARCHS, "9.0a") != nullptr;
#else
  return true;
#endif
}

std::string why_not_wgmma(const WgmmaKernel& k, const ForwardCase& c, const Device& d) {
  if (!k.takes(c.dtype)) return "it is not compiled for this dtype";
  if (d.compute_capability != 90) return "it is for compute capability 9.0 alone";
  if (!has_wgmma_code()) return "this library was compiled without 9.0a in TORCH_CUDA_ARCH_LIST";
  if (k.split && !c.split_tf32) return "RNN_EXT_3XTF32=0 forbids it";
  if (!c.tensor_maps) return "the copy engine needs rows, also of the output, at multiples of 16 bytes, and K > 0";
  if (ceil_div(c.batch, k.bm * k.cluster) * ceil_div(c.hidden_size, k.bn) > INT32_MAX / 2) {
    return "there are more tiles than it counts";
  }
  return "";
}

// Why it is left to RNN_EXT_KERNEL to ask for a kernel that can take the case.
std::string why_only_forced(const WgmmaKernel& k, const ForwardCase& c) {
  if (k.split && c.input_size + (c.hx ? c.hidden_size : 0) < kMin3xTf32Depth) {
    return "sums of fewer than " + std::to_string(kMin3xTf32Depth) + " products are more accurate in fp32";
  }
  return "";
}

ForwardPlan plan_gemv(const ForwardCase& c, const Device& d) {
  const bool vectors = c.vector_bytes >= 16;
  const int rows = gemv_rows(gemv_batch(c.batch, c.dtype, vectors), c.dtype);
  const int64_t depth = c.input_size + (c.hx ? c.hidden_size : 0), row_groups = ceil_div(c.hidden_size, rows);
  const int64_t loads = vectors ? depth * bytes_of(c.dtype) / 16 : depth;
  ForwardPlan plan;
  // More warps on a row until every multiprocessor has a block, as long as each lane still has a load.
  while (plan.warps_per_row < kGemvWarps && row_groups * plan.warps_per_row < int64_t{kGemvWarps} * d.multiprocessors &&
         loads > 32 * plan.warps_per_row) {
    plan.warps_per_row *= 2;
  }
  plan.blocks = ceil_div(row_groups, kGemvWarps / plan.warps_per_row);
  plan.microseconds = gemv_microseconds(c, d, plan.blocks);
  return plan;
}

ForwardPlan plan_tiled(int index, const ForwardCase& c, const Device& d, int splits, bool workspace) {
  const TiledKernel& k = kTiledKernels[index];
  const int64_t tiles = ceil_div(c.batch, k.bm) * ceil_div(c.hidden_size, k.bn);
  ForwardPlan plan;
  plan.family = ForwardPlan::Family::kTiled;
  plan.kernel = index;
  plan.splits = splits;
  plan.blocks = tiles * splits;
  if (splits > 1) plan.reduction = workspace ? Reduction::kWorkspace : Reduction::kCluster;
  if (plan.reduction == Reduction::kWorkspace) {
    plan.workspace_bytes = plan.blocks * k.bm * k.bn * (c.dtype == Dtype::kDouble ? 8 : 4);
  }
  plan.microseconds = tiled_microseconds(k, c, d, splits, plan.reduction);
  return plan;
}

ForwardPlan plan_wgmma(int index, const ForwardCase& c, const Device& d) {
  const WgmmaKernel& k = kWgmmaKernels[index];
  ForwardPlan plan;
  plan.family = ForwardPlan::Family::kWgmma;
  plan.kernel = index;
  plan.blocks = wgmma_clusters(k, c, d) * k.cluster;
  plan.microseconds = wgmma_microseconds(k, c, d);
  return plan;
}

constexpr int kMaxSplits = 8;  // what a cluster may have on every GPU with clusters

std::string why_not_split(const ForwardPlan& plan, const ForwardCase& c, const Device& d) {
  const TiledKernel& k = kTiledKernels[plan.kernel];
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

struct Candidate {
  ForwardPlan plan;
  std::string why_not;
};

// All that could run, or, with why_not filled in, could not.
std::vector<Candidate> candidates(const ForwardCase& c, const Device& d) {
  std::vector<Candidate> all = {{plan_gemv(c, d), why_not_gemv(c)}};
  for (int i = 0; i < kNumTiledKernels; ++i) {
    const std::string why = why_not_tiled(kTiledKernels[i], c, d);
    for (int splits = 1; splits <= kMaxSplits; splits *= 2) {
      for (const bool workspace : {false, true}) {
        if (workspace && (splits == 1 || d.compute_capability >= 90))
          continue;  // a cluster is faster where there is one
        const ForwardPlan plan = plan_tiled(i, c, d, splits, workspace);
        all.push_back({plan, why.empty() ? why_not_split(plan, c, d) : why});
        if (!why.empty()) break;
      }
      if (!why.empty()) break;
    }
  }
  for (int i = 0; i < kNumWgmmaKernels; ++i) {
    const std::string why = why_not_wgmma(kWgmmaKernels[i], c, d);
    all.push_back({plan_wgmma(i, c, d), why.empty() ? why_only_forced(kWgmmaKernels[i], c) : why});
  }
  return all;
}

ForwardPlan plan_forced(const ForwardCase& c, const Device& d, const char* forced) {
  const std::string text = forced, name = text.substr(0, text.find(':'));
  const auto fail = [&](const std::string& why) { throw std::invalid_argument("RNN_EXT_KERNEL=" + text + ": " + why); };
  int splits = 1;
  bool workspace = false;
  if (name.size() < text.size()) {
    char* end = nullptr;
    splits = static_cast<int>(std::strtol(text.c_str() + name.size() + 1, &end, 10));
    workspace = std::strcmp(end, ":workspace") == 0;
    if (splits < 1 || (*end != '\0' && !workspace)) fail("expected NAME, NAME:SPLITS or NAME:SPLITS:workspace");
  }
  if (name == "gemv") {
    if (splits > 1) fail("gemv does not split K over blocks");
    if (const std::string why = why_not_gemv(c); !why.empty()) fail(why);
    return plan_gemv(c, d);
  }
  for (int i = 0; i < kNumWgmmaKernels; ++i) {
    if (name != kWgmmaKernels[i].name) continue;
    if (splits > 1) fail(name + " does not split K over blocks");
    if (const std::string why = why_not_wgmma(kWgmmaKernels[i], c, d); !why.empty()) fail(why);
    return plan_wgmma(i, c, d);
  }
  std::string why;
  for (int i = 0; i < kNumTiledKernels; ++i) {
    if (name != kTiledKernels[i].name) continue;
    const std::string reason = why_not_tiled(kTiledKernels[i], c, d);
    // Of the rows with this name, the reason that counts is that of the one for this dtype.
    if (why.empty() || kTiledKernels[i].takes(c.dtype)) why = reason;
    if (!reason.empty()) continue;
    const ForwardPlan plan = plan_tiled(i, c, d, splits, workspace || d.compute_capability < 90);
    if (const std::string split = why_not_split(plan, c, d); !split.empty()) fail(split);
    return plan;
  }
  if (why.empty()) {
    std::string names = "gemv";
    for (const TiledKernel& k : kTiledKernels) {
      if (names.find(k.name) == std::string::npos) names += std::string(", ") + k.name;
    }
    for (const WgmmaKernel& k : kWgmmaKernels) names += std::string(", ") + k.name;
    fail("there is no such kernel; there are " + names);
  }
  fail(why);
  return {};
}

bool has_dtype(const ForwardPlan& plan, Dtype dtype) {
  if (plan.family == ForwardPlan::Family::kTiled) return kTiledKernels[plan.kernel].takes(dtype);
  return plan.family == ForwardPlan::Family::kGemv || kWgmmaKernels[plan.kernel].takes(dtype);
}

const char* name_of(Reduction r) {
  return r == Reduction::kCluster ? " as a cluster" : r == Reduction::kWorkspace ? " through global memory" : "";
}

std::string describe(const ForwardPlan& plan, const ForwardCase& c) {
  char text[200];
  if (plan.family == ForwardPlan::Family::kWgmma) {
    const WgmmaKernel& k = kWgmmaKernels[plan.kernel];
    std::snprintf(text, sizeof text, "%-14s %6lld blocks of 384 threads in clusters of %d, %lld tiles", k.name,
                  static_cast<long long>(plan.blocks), k.cluster,
                  static_cast<long long>(ceil_div(c.batch, k.bm) * ceil_div(c.hidden_size, k.bn)));
  } else if (plan.family == ForwardPlan::Family::kGemv) {
    std::snprintf(text, sizeof text, "%-14s %6lld blocks, %d rows of the weights a warp group of %d", plan.name(),
                  static_cast<long long>(plan.blocks),
                  gemv_rows(gemv_batch(c.batch, c.dtype, c.vector_bytes >= 16), c.dtype), plan.warps_per_row);
  } else {
    const TiledKernel& k = kTiledKernels[plan.kernel];
    std::snprintf(text, sizeof text, "%-14s %6lld blocks of %d threads, K split in %d%s", k.name,
                  static_cast<long long>(plan.blocks), k.threads(), plan.splits, name_of(plan.reduction));
  }
  return text;
}

}  // namespace

bool allows_split_tf32(const char* variable) {
  const std::string text = variable != nullptr ? variable : "";
  if (text.empty() || text == "1") return true;
  if (text == "0") return false;
  throw std::invalid_argument("RNN_EXT_3XTF32 must be 0, 1 or unset, got " + text);
}

ForwardPlan plan_forward(const ForwardCase& c, const Device& device, const char* forced) {
  if (forced != nullptr && *forced != '\0') return plan_forced(c, device, forced);
  const ForwardPlan* best = nullptr;
  const std::vector<Candidate> all = candidates(c, device);
  for (const Candidate& candidate : all) {
    if (candidate.why_not.empty() && (best == nullptr || candidate.plan.microseconds < best->microseconds)) {
      best = &candidate.plan;
    }
  }
  if (best == nullptr)
    throw std::invalid_argument("rnn_cell: the batch or hidden size needs more blocks than a grid has");
  return *best;
}

std::string explain_forward(const ForwardCase& c, const Device& device, const char* forced) {
  const ForwardPlan chosen = plan_forward(c, device, forced);
  std::vector<Candidate> all = candidates(c, device);
  std::stable_sort(all.begin(), all.end(), [](const Candidate& a, const Candidate& b) {
    return a.why_not.empty() != b.why_not.empty() ? a.why_not.empty() : a.plan.microseconds < b.plan.microseconds;
  });
  const double depth = double(c.input_size) + (c.hx ? double(c.hidden_size) : 0);
  const double flops = 2.0 * double(c.batch) * double(c.hidden_size) * depth;
  const double bytes = bytes_of(c.dtype) * (depth * double(c.hidden_size + c.batch) + double(c.batch * c.hidden_size));
  char line[300];
  std::snprintf(line, sizeof line, "%.3g MFLOP, %.3g MB; compute capability %d.%d, %d multiprocessors\n", flops / 1e6,
                bytes / 1e6, device.compute_capability / 10, device.compute_capability % 10, device.multiprocessors);
  std::string text = line;
  std::snprintf(line, sizeof line, "%s: %s\n\nThe model's microseconds (weights in L2; no GPU has confirmed it):\n",
                forced != nullptr && *forced != '\0' ? "forced" : "runs", describe(chosen, c).c_str());
  text += line;
  for (const Candidate& candidate : all) {
    if (candidate.why_not.empty()) {
      std::snprintf(line, sizeof line, "%8.2f  %s\n", candidate.plan.microseconds, describe(candidate.plan, c).c_str());
    } else if (candidate.plan.splits == 1 && has_dtype(candidate.plan, c.dtype)) {
      std::snprintf(line, sizeof line, "       -  %-14s %s\n", candidate.plan.name(), candidate.why_not.c_str());
    } else {
      continue;
    }
    text += line;
  }
  return text;
}

}  // namespace rnn_ext::cuda
