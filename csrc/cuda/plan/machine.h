// What the models of both directions share: the machines' numbers, and how candidates are ranked and reported.
//
// No GPU has measured any of this yet: peaks are the data sheets', efficiencies and latencies are what others report,
// and what counts is the order in which the kernels come out. Weights are taken to be in L2.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/plan/types.h"

namespace rnn_ext::cuda {

struct Machine {
  double ghz;
  double l2_bytes, l2_total_bytes;  // a clock: one multiprocessor's share at most, and all together
  double tensor_flops, tf32_flops, fp32_flops, fp64_flops, fp64_tensor_flops;  // a clock and multiprocessor
};

inline Machine machine_of(int compute_capability) {
  if (compute_capability >= 90) return {1.75, 64, 3140, 2600, 1300, 240, 110, 230};  // mma.sync: 63 % of wgmma's peak
  if (compute_capability == 80) return {1.40, 64, 3300, 1800, 900, 120, 55, 110};
  if (compute_capability > 80) return {1.80, 48, 1900, 900, 450, 230, 3.5, 3.5};
  return {1.50, 40, 800, 850, 0, 120, 3.5, 3.5};
}

inline double compute_flops(const Machine& m, Math math, Dtype dtype) {
  if (math == Math::kTf32) return m.tf32_flops;
  if (math == Math::kTensorCore) return dtype == Dtype::kDouble ? m.fp64_tensor_flops : m.tensor_flops;
  return dtype == Dtype::kDouble ? m.fp64_flops : m.fp32_flops;
}

constexpr double kRamp = 1.24, kLatency = 0.35, kRound = 0.30;  // µs: launch; first bytes; start and end of a block
constexpr double kTripClocks = 700;                             // a load from L2, under load, and its barrier
constexpr double kSmemBytes = 128;                              // a clock and multiprocessor

// Instructions for one FFMA: 16-byte reads of shared memory, and copies of single elements, with their addresses, that
// transpose the operands on their way.
constexpr double simt_instructions(int bm, int bn, int parts_m, int parts_n) {
  return 1 + (parts_m + parts_n) / (4.0 * parts_m * parts_n) + 2.0 * (bm + bn) / (double(bm) * bn);
}

// wgmma, of sm_90: the peak a clock and multiprocessor, of which hand-written kernels are reported to reach 85 % (800
// of 946 TFLOP/s at this clock).
constexpr double kWgmmaFlops = 0.85 * 4096, kWgmmaTf32Flops = 0.85 * 2048;
constexpr double kTensorMapFill = 0.40, kClusterSync = 0.55;  // µs: before first bytes come; two barriers

// What 128 bytes of K take in a tile of 128 by bn.
inline double wgmma_clocks(int bn, Math math) {
  const bool split = math == Math::kSplitTf32;
  const double products = split ? 3 : 1;
  const double flops = products * 2 * 128 * bn * (math == Math::kTensorCore ? 64 / kWgmmaFlops : 32 / kWgmmaTf32Flops);
  // Each of the two warpgroups reads its 64 rows and all columns; splitting reads all once and writes it twice.
  const double smem = products * (128 + 2 * bn) + (split ? 3 * (128 + bn) : 0);  // lines of 128 bytes, one a clock
  return std::max(flops, smem);
}

// Whether this library has code for sm_90a. A build without CUDA explains as if it had.
inline bool has_wgmma_code() {
#ifdef RNN_EXT_WITH_CUDA
  return std::strstr(RNN_EXT_CUDA_ARCHS, "9.0a") != nullptr;
#else
  return true;
#endif
}

// ---- candidates -----------------------------------------------------------------------------------------------------

constexpr const char* kNoTf32 = "PyTorch's setting for matmul does not allow tf32";

inline std::string not_for(int compute_capability) {
  return "it is not for compute capability " + std::to_string(compute_capability / 10) + "." +
         std::to_string(compute_capability % 10);
}

// Why the kernels of sm_90a can't run; empty if they can.
inline std::string why_no_wgmma(const Device& d, bool tensor_maps) {
  if (d.compute_capability != 90) return not_for(d.compute_capability);
  if (!has_wgmma_code()) return "this library was compiled without 9.0a in TORCH_CUDA_ARCH_LIST";
  if (!tensor_maps) return "TMA needs rows, also of results, at multiples of 16 bytes, and K > 0";
  return "";
}

template <typename Plan>
struct Candidate {
  Plan plan;
  std::string why_not;          // it can't run; empty if it can
  std::string why_only_forced;  // it is left to the user to ask for it; empty if it isn't

  std::string why() const { return why_not.empty() ? why_only_forced : why_not; }
};

// The fastest of those that may run; null if none may.
template <typename Plan>
const Plan* best_of(const std::vector<Candidate<Plan>>& all) {
  const Plan* best = nullptr;
  for (const Candidate<Plan>& candidate : all) {
    if (candidate.why().empty() && (best == nullptr || candidate.plan.microseconds < best->microseconds)) {
      best = &candidate.plan;
    }
  }
  return best;
}

// The first of that name that can run, or else a std::invalid_argument with the reason, of several rows with that name
// of the one that comes nearest; `what` is what the user has set.
template <typename Plan>
Plan forced_of(const std::vector<Candidate<Plan>>& all, const std::string& name, const std::string& what, Dtype dtype,
               const Device& device) {
  std::string why, names;
  int nearest = 0;
  for (const Candidate<Plan>& candidate : all) {
    const std::string its_name = candidate.plan.name();
    if (names.find(its_name) == std::string::npos) names += (names.empty() ? "" : ", ") + its_name;
    if (its_name != name) continue;
    if (candidate.why_not.empty()) return candidate.plan;
    const int near = !candidate.plan.takes(dtype) ? 1 : candidate.why_not == not_for(device.compute_capability) ? 2 : 3;
    if (near > nearest) nearest = near, why = candidate.why_not;
  }
  throw std::invalid_argument(what + ": " + (why.empty() ? "there is no such kernel; there are " + names : why));
}

// Without those that are not compiled for the dtype, which need not be told.
template <typename Plan>
std::vector<Candidate<Plan>> of_dtype(std::vector<Candidate<Plan>> all, Dtype dtype) {
  const auto other = [&](const Candidate<Plan>& candidate) { return !candidate.plan.takes(dtype); };
  all.erase(std::remove_if(all.begin(), all.end(), other), all.end());
  return all;
}

// What runs, and all candidates, the fastest first, for people. describe(plan) says more of a plan than its name.
template <typename Plan, typename Describe>
std::string report(const char* direction, double flops, double bytes, const Device& device, const Plan& chosen,
                   bool forced, std::vector<Candidate<Plan>> all, Describe describe) {
  std::stable_sort(all.begin(), all.end(), [](const Candidate<Plan>& a, const Candidate<Plan>& b) {
    return a.why().empty() != b.why().empty() ? a.why().empty() : a.plan.microseconds < b.plan.microseconds;
  });
  char line[300];
  const auto named = [](const Plan& plan, const std::string& text) {
    char padded[300];
    std::snprintf(padded, sizeof padded, "%-18s %s", plan.name(), text.c_str());
    return std::string(padded);
  };
  std::snprintf(line, sizeof line,
                "%s: %.3g MFLOP, %.3g MB; compute capability %d.%d, %d multiprocessors\n%s %s: %s\n\n"
                "The model's microseconds (weights in L2; no GPU has confirmed it):\n",
                direction, flops / 1e6, bytes / 1e6, device.compute_capability / 10, device.compute_capability % 10,
                device.multiprocessors, direction, forced ? "is forced to run" : "runs",
                named(chosen, describe(chosen)).c_str());
  std::string text = line;
  for (const Candidate<Plan>& candidate : all) {
    if (candidate.why().empty()) {
      std::snprintf(line, sizeof line, "%8.2f  %s\n", candidate.plan.microseconds,
                    named(candidate.plan, describe(candidate.plan)).c_str());
    } else {
      std::snprintf(line, sizeof line, "       -  %s\n", named(candidate.plan, candidate.why()).c_str());
    }
    text += line;
  }
  return text;
}

}  // namespace rnn_ext::cuda
