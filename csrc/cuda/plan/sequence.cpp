#include "cuda/plan/sequence.h"

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
  return all;
}

std::string describe(const SequencePlan& plan, const SequenceCase& c) {
  const SteppedKernel& k = kStepped[plan.kernel];
  char text[200];
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
