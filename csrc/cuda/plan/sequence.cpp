#include "cuda/plan/sequence.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "cuda/plan/machine.h"
#include "cuda/plan/tiles.h"

namespace rnn_ext::cuda {
namespace {

// A step as one product of the cell's kind: h (B, H) times U.
ForwardCase step_of(const SequenceCase& c) {
  ForwardCase step{};
  step.batch = c.batch;
  step.input_size = step.hidden_size = c.hidden_size;
  step.dtype = c.dtype;
  step.vector_bytes = 16;
  step.tf32 = c.tf32;
  return step;
}

constexpr double kStepLatency = 0.35;      // µs: sums, f, h to shared memory, a barrier
constexpr double kPassLatency = 0.15;      // the same but for the barrier
constexpr double kSumLatency = 0.08;       // parts of k, through shared memory and a barrier
constexpr double kClusterExchange = 0.55;  // h to and from the peers
constexpr double kGridExchange = 1.1;      // through L2, with a counter
constexpr double kFfmaOfPeak = 0.7;        // what a chain of steps leaves of it
constexpr double kChunkClocks = 66;        // two products of tensor cores of which one waits for the other
constexpr double kSimtChunkClocks = 16;    // four FFMA
constexpr double kSmemClocks = 30;         // what a chunk that comes from shared memory is waited for

// A step of a kernel that keeps U on the chip: each pass over U is bounded by what multiplies, by what comes from
// shared memory, all of the state and the part of U that registers don't hold, or by the chain of a thread's products.
// Less than a warp for each quarter of the multiprocessor leaves some idle.
// What a block reads of U before its first step counts as a part of each.
double resident_microseconds(const ResidentKernel& k, const ResidentLaunch& l, const SequenceCase& c, const Device& d) {
  const Machine m = machine_of(d.compute_capability);
  const double H = double(c.hidden_size), size = bytes_of(c.dtype);
  const int threads = k.threads(c.hidden_size, l), chunks = k.thread_chunks(c.hidden_size, c.dtype, l.splits);
  const double flops = 2 * double(k.rows) * k.columns(c.hidden_size, l.parts) * l.splits * chunks * kResidentChunk /
                       size / (compute_flops(m, k.math, c.dtype) * kFfmaOfPeak * std::min(1., threads / 128.));
  const double of_state = double(threads) * chunks * (k.math == Math::kSimt ? 16 * k.rows : 32);
  const double of_weights = double(threads) * std::max(0, chunks - k.register_chunks) * k.units() * 16;
  const double chain = chunks * (k.math == Math::kSimt ? kSimtChunkClocks : kChunkClocks) +
                       std::max(0, chunks - k.register_chunks) * kSmemClocks;
  const double pass = std::max({flops, (of_state + of_weights) / kSmemBytes, chain});
  const double sums = l.splits > 1 ? kSumLatency : 0;
  // Of a multiprocessor.
  const auto blocks = double(ceil_div(l.slices(c.batch), k.slices_at_once(l.parts, d)));
  const double together =
      k.sharing == Sharing::kGrid
          ? 1
          : std::max(1.,
                     std::min(std::floor(double(d.smem_per_block) / double(k.smem_bytes(c.hidden_size, c.dtype, l))),
                              std::floor(double(k.max_threads) / threads)));
  double latency = kStepLatency + sums + (k.passes(l.block_rows) - 1) * (kPassLatency + sums);
  if (k.sharing == Sharing::kCluster) latency += kClusterExchange;
  if (k.sharing == Sharing::kGrid) {
    const double rows = double(l.block_rows) * double(l.slices(c.batch)) * l.parts;  // that blocks read of a state
    latency += kGridExchange + rows * H * size / m.l2_total_bytes / (m.ghz * 1e3);
  }
  const double fill = H * H * size / l.parts / m.l2_bytes / double(c.steps);
  return std::ceil(blocks / together) * latency + blocks * (k.passes(l.block_rows) * pass + fill) / (m.ghz * 1e3);
}

// The fastest launch of the kernel. It has no rows if there is none.
ResidentLaunch best_resident_launch(const ResidentKernel& k, const SequenceCase& c, const Device& d) {
  ResidentLaunch best;
  double least = 0;
  // Clusters of more than 8 blocks only where fewer don't do.
  const auto is_large = [&](const ResidentLaunch& l) {
    return k.sharing == Sharing::kCluster && l.parts > kPortableClusterBlocks;
  };
  const auto consider = [&](const ResidentLaunch& of) {
    ResidentLaunch l = of;
    l.block_rows = k.block_rows(c.batch, c.hidden_size, c.dtype, l, d);
    if (l.block_rows == 0) return;
    const double microseconds = resident_microseconds(k, l, c, d);
    const bool is_better = is_large(l) != is_large(best) ? is_large(best) : microseconds < least;
    if (best.block_rows == 0 || is_better) best = l, least = microseconds;
  };
  if (k.sharing == Sharing::kNone) {
    consider({});
    return best;
  }
  const int chunks = k.chunks(c.hidden_size, c.dtype);
  const int most_parts = k.sharing == Sharing::kCluster && !c.whole_gpu ? kPortableClusterBlocks : k.most_parts(d);
  for (int warps = 1; warps * 32 <= k.max_threads; ++warps) {  // that have different columns
    ResidentLaunch l;
    const int64_t parts = ceil_div(c.hidden_size, int64_t{warps} * k.warp_columns);
    if (parts < 2) break;
    if (parts > most_parts) continue;
    l.parts = static_cast<int>(parts);
    for (; l.splits <= chunks && l.splits * warps * 32 <= k.max_threads; ++l.splits) consider(l);
  }
  return best;
}

std::string why_not_resident(const ResidentKernel& k, const SequenceCase& c, const Device& d) {
  if (!k.takes(c.dtype)) return "it is not compiled for this dtype";
  if (k.sharing == Sharing::kCluster) {
    const std::string why = why_no_wgmma(d, true);
    if (!why.empty()) return why;
  }
  if (d.compute_capability < kResidentFirstSm) return not_for(d.compute_capability);
  if (k.math == Math::kTf32 && !c.tf32) return kNoTf32;
  if (k.sharing == Sharing::kGrid && !c.whole_gpu) return "the GPU has no room for all of its blocks at once";
  return "";
}

// Why a kernel that could run has no launch.
std::string why_no_resident_launch(const ResidentKernel& k, const SequenceCase& c, const Device& d) {
  SequenceCase one = c;
  one.batch = 1;
  const auto fits = [&](int64_t hidden_size) {
    one.hidden_size = hidden_size;
    return best_resident_launch(k, one, d).block_rows > 0;
  };
  if (fits(c.hidden_size)) return "not all blocks that a batch of " + std::to_string(c.batch) + " takes run at once";
  if (k.sharing != Sharing::kNone && c.hidden_size <= k.warp_columns) return "there is nothing to share";
  int64_t most = 0;
  for (int64_t beyond = c.hidden_size; beyond - most > 1;) {
    const int64_t middle = most + (beyond - most) / 2;
    (fits(middle) || middle <= k.warp_columns ? most : beyond) = middle;
  }
  return "U fits up to H = " + std::to_string(most) + ", not " + std::to_string(c.hidden_size);
}

std::vector<Candidate<SequencePlan>> candidates(const SequenceCase& c, const Device& d) {
  std::vector<Candidate<SequencePlan>> all;
  for (int i = 0; i < kNumStepped; ++i) {
    SequencePlan plan;
    plan.kernel = i;
    // As for gemv: only where it is sure that the kernel was compiled with the wait.
    plan.early = d.compute_capability == 90 && has_wgmma_code();
    plan.workspace_bytes = SteppedWorkspace(c).bytes;
    plan.microseconds = tiled_microseconds(kStepped[i], step_of(c), d, 1, Reduction::kNone);
    all.push_back({plan, why_not_tiled(kStepped[i], step_of(c), d), ""});
  }
  for (int i = 0; i < kNumResident; ++i) {
    SequencePlan plan;
    plan.family = SequencePlan::Family::kResident;
    plan.kernel = i;
    std::string why = why_not_resident(kResident[i], c, d);
    if (why.empty()) plan.launch = best_resident_launch(kResident[i], c, d);
    if (why.empty() && plan.launch.block_rows == 0) why = why_no_resident_launch(kResident[i], c, d);
    if (why.empty()) {
      plan.microseconds = resident_microseconds(kResident[i], plan.launch, c, d);
      if (kResident[i].sharing == Sharing::kGrid) {
        plan.workspace_bytes = GridWorkspace(kResident[i], c.batch, c.hidden_size, c.dtype, plan.launch).bytes();
      }
    }
    all.push_back({plan, why, ""});
  }
  return all;
}

std::string describe(const SequencePlan& plan, const SequenceCase& c) {
  char text[200];
  if (plan.family == SequencePlan::Family::kResident) {
    const ResidentKernel& k = kResident[plan.kernel];
    const ResidentLaunch& l = plan.launch;
    char sharing[80] = "";
    if (k.sharing != Sharing::kNone) {
      std::snprintf(sharing, sizeof sharing, ", %d of them share U, k in %d", l.parts, l.splits);
    }
    std::snprintf(text, sizeof text, "1 launch of %lld blocks of %d threads, %d rows each%s",
                  static_cast<long long>(l.slices(c.batch) * l.parts), k.threads(c.hidden_size, l), l.block_rows,
                  sharing);
    return text;
  }
  const SteppedKernel& k = kStepped[plan.kernel];
  std::snprintf(text, sizeof text, "%6lld launches of %lld blocks of %d threads", static_cast<long long>(c.steps),
                static_cast<long long>(ceil_div(c.batch, k.bm) * ceil_div(c.hidden_size, k.bn)), k.threads());
  return text;
}

}  // namespace

SequencePlan plan_sequence(const SequenceCase& c, const Device& device, const char* forced) {
  const std::vector<Candidate<SequencePlan>> all = candidates(c, device);
  if (forced != nullptr && *forced != '\0') {
    return forced_of(all, forced, std::string("RNN_EXT_SEQUENCE_KERNEL=") + forced, c.dtype, device);
  }
  const SequencePlan* const best = best_of(all);
  if (best == nullptr) throw std::invalid_argument("rnn_layer: no kernel computes on this GPU");
  return *best;
}

std::string explain_sequence(const SequenceCase& c, const Device& device, const char* forced) {
  const double weights = double(c.hidden_size) * double(c.hidden_size);
  const double flops = 2.0 * double(c.batch) * weights;
  const double bytes = bytes_of(c.dtype) * (weights + 3.0 * double(c.batch) * double(c.hidden_size));
  return report(c.backward ? "backward, a step" : "forward, a step", flops, bytes, device,
                plan_sequence(c, device, forced), forced != nullptr && *forced != '\0',
                of_dtype(candidates(c, device), c.dtype), [&](const SequencePlan& plan) { return describe(plan, c); });
}

}  // namespace rnn_ext::cuda
