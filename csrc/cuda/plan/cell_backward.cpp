#include "cuda/plan/cell_backward.h"

#include "cuda/plan/machine.h"

namespace rnn_ext::cuda {
namespace {

// ---- the model ------------------------------------------------------------------------------------------------------

constexpr double kTileClocks = 1100;  // first bytes, start and end of a tile, which other tiles of the SM hide

// The clocks that one tile keeps a multiprocessor busy, and the ones it takes by itself.
struct TileTime {
  double busy, alone;
};
TileTime tile_time(const BackwardTiledKernel& k, const BackwardTileShape& t, const BackwardCase& c, const Machine& m,
                   int64_t rows, int64_t columns, int64_t depth, int multiprocessors) {
  const double size = bytes_of(c.dtype), sum_size = sum_bytes_of(c.dtype);
  const double rate = compute_flops(m, k.tensor_cores ? Math::kTensorCore : Math::kSimt, c.dtype) /
                      (k.tensor_cores || size > 4 ? 1 : simt_instructions(t.bm, t.bn, t.parts_m, t.parts_n));
  // A tile's rows and columns beyond the edge are multiplied, but not read.
  const double read_rows = double(std::min<int64_t>(t.bm, rows)) * (k.fused ? 2 : 1);
  const double read_columns = double(std::min<int64_t>(t.bn, columns));
  const double flops = 2.0 * t.bm * t.bn * t.bk / rate, bytes = (read_rows + read_columns) * t.bk * size;
  const double l2_share = std::min(m.l2_bytes, m.l2_total_bytes / multiprocessors);  // while all are at it
  const double slices = double(ceil_div(depth, t.bk));
  const double epilogue = t.bm * t.bn * (2 * sum_size * t.groups / kSmemBytes + size / l2_share);
  const double staged = k.fused || !k.async ? kTripClocks : 0;
  return {slices * std::max(flops, bytes / l2_share) + epilogue,
          kTileClocks + slices * std::max({flops, bytes / m.l2_bytes, staged}) + epilogue};
}

BackwardPlan plan_tiled(int kernel, const BackwardCase& c, const Device& device) {
  const BackwardTiledKernel& k = kBackwardTiled[kernel];
  const Machine m = machine_of(device.compute_capability);
  BackwardPlan plan;
  plan.family = BackwardPlan::Family::kTiled;
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

  const int64_t by_smem = int64_t((device.smem_per_block + 1024) / (k.smem_bytes(c.dtype) + 1024));
  const int64_t resident = std::max<int64_t>(1, std::min<int64_t>(k.blocks_per_sm, by_smem));
  plan.blocks = std::min(s.size(), device.multiprocessors * resident);

  // Either the multiprocessors are busy throughout, but for the end, or blocks wait for their own loads most of the
  // time.
  const double n_data = double(s.data.size()), n_weight = double(s.weight.size());
  const double sms = device.multiprocessors, last = std::min(data.busy, weight.busy);
  const double longest = std::max(n_data > 0 ? data.alone : 0, n_weight > 0 ? weight.alone : 0);
  const double busy = (n_data * data.busy + n_weight * weight.busy) / sms + last / 2;
  const double waiting = (n_data * data.alone + n_weight * weight.alone) / std::max<double>(1, double(plan.blocks));
  double clocks = std::max({busy, waiting, longest});
  if (!k.fused) {
    const int size = bytes_of(c.dtype);
    plan.dz_stride = ceil_div(c.hidden_size * size, 16) * 16 / size;
    plan.workspace_bytes = c.batch * plan.dz_stride * size;
    clocks += kTileClocks + 3.0 * double(plan.workspace_bytes) / m.l2_total_bytes;
  }
  plan.microseconds = kRamp * plan.launches() + clocks / (m.ghz * 1e3);
  return plan;
}

// The tiles of both kinds in terms of clusters.
struct WgmmaTiles {
  int64_t data, weight;
  WgmmaTiles(const BackwardWgmmaKernel& k, const BackwardCase& c) {
    const auto columns = [&](bool ih, bool hh) {
      return (ih ? ceil_div(c.input_size, k.bn) : 0) + (hh ? ceil_div(c.hidden_size, k.bn) : 0);
    };
    data = ceil_div(c.batch, k.bm * k.cluster) * columns(c.grad_input, c.grad_hx);
    weight = ceil_div(c.hidden_size, k.bm * k.cluster) * columns(c.grad_weight_ih, c.grad_weight_hh);
  }
};

BackwardPlan plan_wgmma(int kernel, const BackwardCase& c, const Device& device) {
  const BackwardWgmmaKernel& k = kBackwardWgmma[kernel];
  const Machine m = machine_of(device.compute_capability);
  const WgmmaTiles tiles(k, c);
  const BackwardWgmmaWorkspace layout(c.batch, c.hidden_size, c.grad_bias);
  BackwardPlan plan;
  plan.family = BackwardPlan::Family::kWgmma;
  plan.kernel = kernel;
  plan.dz_stride = layout.dz_stride;
  plan.workspace_bytes = layout.bytes;
  const int64_t all = tiles.data + tiles.weight;
  const int64_t clusters = std::max<int64_t>(1, std::min<int64_t>(all, device.multiprocessors / k.cluster));
  plan.blocks = all > 0 || c.grad_bias ? clusters * k.cluster : 0;

  const double bytes = (k.bm + double(k.bn) / k.cluster) * 128;  // of a k-tile, which is 64 elements deep
  const double k_tile = std::max(wgmma_clocks(k.bn, Math::kTensorCore), bytes / m.l2_bytes);
  const double epilogue = 2.0 * k.bm * k.bn * 2 / kSmemBytes;
  const double data_tiles = double(ceil_div(c.hidden_size, 64)), weight_tiles = double(ceil_div(c.batch, 64));
  const double data = data_tiles * k_tile + epilogue, weight = weight_tiles * k_tile + epilogue;
  const double n_data = double(tiles.data), n_weight = double(tiles.weight);
  // The first cluster has the most tiles, and of these the most long ones.
  const int64_t front = ceil_div(data >= weight ? tiles.data : tiles.weight, clusters);
  double clocks =
      double(front) * std::max(data, weight) + double(ceil_div(all, clusters) - front) * std::min(data, weight);
  clocks = std::max(clocks, (n_data * data_tiles + n_weight * weight_tiles) * k.cluster * bytes / m.l2_total_bytes);
  clocks += kTileClocks + 3.0 * double(plan.workspace_bytes) / m.l2_total_bytes;  // of the first launch
  plan.microseconds = kRamp * plan.launches() + kTensorMapFill + kLatency + kRound +
                      (k.cluster > 1 ? kClusterSync : 0) + clocks / (m.ghz * 1e3);
  return plan;
}

// Every element of the weights is read once, serves all rows, and its gradient is written once.
BackwardPlan plan_gemv(const BackwardCase& c, const Device& device) {
  const Machine m = machine_of(device.compute_capability);
  const int64_t size = bytes_of(c.dtype);
  const int64_t ih = c.grad_input || c.grad_weight_ih ? c.input_size * size : 0;
  const int64_t hh = c.grad_hx || c.grad_weight_hh ? c.hidden_size * size : 0;
  BackwardPlan plan;
  // The widest of three strips that still gives every multiprocessor one.
  plan.strip_bytes = 128;
  while (plan.strip_bytes > 32 && ceil_div(ih + hh, plan.strip_bytes) < device.multiprocessors) plan.strip_bytes /= 2;
  plan.blocks = ceil_div(ih, plan.strip_bytes) + ceil_div(hh, plan.strip_bytes);
  if (plan.blocks == 0 && c.grad_bias) plan.blocks = 1;

  const double columns = double(plan.strip_bytes) / double(size), H = double(c.hidden_size);
  const double products = (c.grad_input || c.grad_hx ? 1 : 0) + (c.grad_weight_ih || c.grad_weight_hh ? 1 : 0);
  const double per_sm = double(ceil_div(plan.blocks, device.multiprocessors));
  const double rate = 0.7 * (size == 8 ? m.fp64_flops : m.fp32_flops);
  const double bytes = products * columns * H * double(size);  // of one strip
  const double flops = 2 * products * columns * H * double(c.batch) / rate;
  const double dz = 2 * H * double(c.batch * size) / m.l2_bytes;  // formed by every block
  const double clocks =
      std::max(per_sm * (std::max(flops, bytes / m.l2_bytes) + dz), double(plan.blocks) * bytes / m.l2_total_bytes);
  plan.microseconds = kRamp + kLatency + kRound + clocks / (m.ghz * 1e3);
  return plan;
}

// ---- the candidates -------------------------------------------------------------------------------------------------

std::string why_not_gemv(const BackwardCase& c) {
  return c.batch <= kBackwardGemvMaxBatch ? ""
                                          : "it takes batches of up to " + std::to_string(kBackwardGemvMaxBatch) +
                                                ", not " + std::to_string(c.batch);
}

std::string why_not_tiled(const BackwardTiledKernel& k, const BackwardCase& c, const Device& d) {
  if (!k.takes(c.dtype)) return "it is not compiled for this dtype";
  if (d.compute_capability < k.first_sm || d.compute_capability > k.last_sm) return not_for(d.compute_capability);
  if (k.async && bytes_of(c.dtype) == 2 && c.vector_bytes < 4) {
    return "its copies need 16-bit operands with unit stride along rows and 4-byte aligned rows";
  }
  if (k.smem_bytes(c.dtype) > d.smem_per_block) return "it needs more shared memory than this GPU has";
  return "";
}

std::string why_not_wgmma(const BackwardWgmmaKernel& k, const BackwardCase& c, const Device& d) {
  if (!k.takes(c.dtype)) return "it is not compiled for this dtype";
  if (const std::string why = why_no_wgmma(d, c.tensor_maps); !why.empty()) return why;
  const WgmmaTiles tiles(k, c);
  return tiles.data + tiles.weight <= INT32_MAX / 2 ? "" : "there are more tiles than it counts";
}

// All that could run, or, with why_not filled in, could not.
std::vector<Candidate<BackwardPlan>> candidates(const BackwardCase& c, const Device& d) {
  std::vector<Candidate<BackwardPlan>> all = {{plan_gemv(c, d), why_not_gemv(c), ""}};
  for (int i = 0; i < kNumBackwardTiled; ++i) {
    all.push_back({plan_tiled(i, c, d), why_not_tiled(kBackwardTiled[i], c, d), ""});
  }
  for (int i = 0; i < kNumBackwardWgmma; ++i) {
    all.push_back({plan_wgmma(i, c, d), why_not_wgmma(kBackwardWgmma[i], c, d), ""});
  }
  return all;
}

std::string describe(const BackwardPlan& plan) {
  char text[200];
  const auto blocks = static_cast<long long>(plan.blocks);
  if (plan.family == BackwardPlan::Family::kGemv) {
    std::snprintf(text, sizeof text, "%6lld blocks, %d bytes of each row of the weights", blocks, plan.strip_bytes);
  } else if (plan.family == BackwardPlan::Family::kWgmma) {
    std::snprintf(text, sizeof text, "%6lld blocks of 384 threads in clusters of %d, 2 launches", blocks,
                  kBackwardWgmma[plan.kernel].cluster);
  } else {
    const BackwardTileShape &data = kBackwardTiled[plan.kernel].data, &weight = kBackwardTiled[plan.kernel].weight;
    std::snprintf(text, sizeof text, "%6lld blocks, %lld tiles of %dx%d and %lld of %dx%d, %d launch%s", blocks,
                  static_cast<long long>(plan.schedule.data.size()), data.bm, data.bn,
                  static_cast<long long>(plan.schedule.weight.size()), weight.bm, weight.bn, plan.launches(),
                  plan.launches() > 1 ? "es" : "");
  }
  return text;
}

}  // namespace

BackwardPlan plan_backward(const BackwardCase& c, const Device& device, const char* forced) {
  const std::vector<Candidate<BackwardPlan>> all = candidates(c, device);
  if (forced == nullptr || *forced == '\0') return *best_of(all);
  return forced_of(all, forced, std::string("RNN_EXT_BACKWARD_KERNEL=") + forced, c.dtype, device);
}

std::string explain_backward(const BackwardCase& c, const Device& device, const char* forced) {
  const double batch = double(c.batch), H = double(c.hidden_size), I = double(c.input_size);
  const double data = (c.grad_input ? I : 0) + (c.grad_hx ? H : 0);
  const double weight = (c.grad_weight_ih ? I : 0) + (c.grad_weight_hh ? H : 0);
  const double flops = 2 * batch * H * (data + weight);
  // The operands and results of both products; dh' and h'.
  const double bytes = bytes_of(c.dtype) * ((H + batch) * (data + weight) + 2 * batch * H);
  return report("backward", flops, bytes, device, plan_backward(c, device, forced),
                forced != nullptr && *forced != '\0', of_dtype(candidates(c, device), c.dtype), describe);
}

}  // namespace rnn_ext::cuda
