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
  return step;
}

constexpr double kStepLatency = 0.35;      // µs: sums, f, h to shared memory, a barrier
constexpr double kPassLatency = 0.15;      // the same but for the barrier
constexpr double kClusterExchange = 0.55;  // the same to and from the peers
constexpr double kGridExchange = 1.1;      // through L2, with flags
constexpr double kFfmaOfPeak = 0.7;        // what a chain of steps leaves of it

// A step with U in shared memory: the largest of what the multiprocessor multiplies, of U read from there once, and,
// of a grid, of h read by all from L2; and how long h takes to where it is needed.
double shared_microseconds(const SharedFamily& f, const SequenceCase& c, const Device& d) {
  const Machine m = machine_of(d.compute_capability);
  const double H = double(c.hidden_size), size = bytes_of(c.dtype), blocks = double(f.blocks(d));
  const int64_t slices = std::max<int64_t>(1, d.multiprocessors / f.blocks(d));
  const double rows = double(ceil_div(c.batch, slices));
  const bool tensor_cores = size != 4;
  const double multiplied = tensor_cores ? double(ceil_div(int64_t(rows), 16) * 16) : rows;
  const double flops = 2 * multiplied * H * H / blocks /
                       (compute_flops(m, tensor_cores ? Math::kTensorCore : Math::kSimt, c.dtype) * kFfmaOfPeak);
  const double smem = H * H * size / blocks / kSmemBytes * double(ceil_div(int64_t(rows), 16));
  const double l2 = f.sharing == 0 ? rows * H * size * blocks / m.l2_total_bytes : 0;
  const double exchange = f.sharing == 0 ? kGridExchange : kClusterExchange;
  return kStepLatency + exchange + std::max({flops, smem, l2}) / (m.ghz * 1e3);
}

std::string beyond(int64_t most, const SequenceCase& c) {
  return "U fits up to H = " + std::to_string(most) + ", not " + std::to_string(c.hidden_size);
}

std::string why_not_shared(const SharedFamily& f, const SequenceCase& c, const Device& d) {
  if (d.compute_capability < f.first_sm) return not_for(d.compute_capability);
  if (f.holds(c.hidden_size, c.dtype, d)) return "";
  int64_t most = c.hidden_size;
  while (most > 0 && !f.holds(most, c.dtype, d)) --most;
  return beyond(most, c);
}

// A step of a `resident` kernel: each pass over U is bounded by what multiplies or by what comes from shared memory,
// all of the state and the part of U that registers don't hold. What a block reads of U before its first step counts as
// a part of each.
double resident_microseconds(const ResidentKernel& k, int block_rows, const SequenceCase& c, const Device& d) {
  const Machine m = machine_of(d.compute_capability);
  const int chunks = k.chunks(c.hidden_size, c.dtype), threads = k.threads(c.hidden_size);
  const double in_chunk = double(kResidentChunk) / bytes_of(c.dtype), columns = double(threads) / 32 * k.warp_columns();
  const double flops =
      2 * double(k.rows) * columns * chunks * in_chunk / (compute_flops(m, k.math, c.dtype) * kFfmaOfPeak);
  const double of_state = double(threads) * chunks * (k.math == Math::kSimt ? 16 * k.rows : 32);
  const double of_weights = double(threads) * std::max(0, chunks - k.register_chunks) * k.units() * 16;
  const double pass = std::max(flops, (of_state + of_weights) / kSmemBytes);
  const auto blocks = double(ceil_div(ceil_div(c.batch, block_rows), d.multiprocessors));  // of a multiprocessor
  const double together = std::max(
      1., std::min(std::floor(double(d.smem_per_block) / double(k.smem_bytes(c.hidden_size, c.dtype, block_rows))),
                   std::floor(double(k.max_threads) / threads)));
  const double fill = double(c.hidden_size) * double(c.hidden_size) * bytes_of(c.dtype) / m.l2_bytes / double(c.steps);
  return std::ceil(blocks / together) * (kStepLatency + (k.passes(block_rows) - 1) * kPassLatency) +
         blocks * (k.passes(block_rows) * pass + fill) / (m.ghz * 1e3);
}

std::string why_not_resident(const ResidentKernel& k, const SequenceCase& c, const Device& d) {
  if (!k.takes(c.dtype)) return "it is not compiled for this dtype";
  if (d.compute_capability < kResidentFirstSm) return not_for(d.compute_capability);
  if (k.math == Math::kTf32 && !c.tf32) return kNoTf32;
  if (k.fits(c.hidden_size, c.dtype, 1, d)) return "";
  int64_t most = c.hidden_size;
  while (most > 0 && !k.fits(most, c.dtype, 1, d)) --most;
  return beyond(most, c);
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
    const std::string why = why_not_resident(kResident[i], c, d);
    if (why.empty()) {
      plan.block_rows = kResident[i].block_rows(c.batch, c.hidden_size, c.dtype, d);
      plan.microseconds = resident_microseconds(kResident[i], plan.block_rows, c, d);
    }
    all.push_back({plan, why, ""});
  }
  for (int i = 0; i < kNumShared; ++i) {
    const SharedFamily& f = kShared[i];
    SequencePlan plan;
    plan.family = SequencePlan::Family::kShared;
    plan.kernel = i;
    plan.microseconds = shared_microseconds(f, c, d);
    std::string why = why_not_shared(f, c, d);
    if (why.empty() && !f.is_there) {
      char text[100];
      std::snprintf(text, sizeof text, "it is not written yet; it would take %.2f", plan.microseconds);
      why = text;
    }
    all.push_back({plan, why, ""});
  }
  return all;
}

std::string describe(const SequencePlan& plan, const SequenceCase& c) {
  char text[200];
  if (plan.family == SequencePlan::Family::kResident) {
    const ResidentKernel& k = kResident[plan.kernel];
    std::snprintf(text, sizeof text, "1 launch of %lld blocks of %d threads, %d rows each",
                  static_cast<long long>(ceil_div(c.batch, plan.block_rows)), k.threads(c.hidden_size),
                  plan.block_rows);
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
