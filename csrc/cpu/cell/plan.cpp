#include "cpu/cell/plan.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <sstream>

#include "cpu/aten_gemm.h"
#include "cpu/cell/families.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace rnn_ext::cpu {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// Of one element, in multiply-adds: of a pass over memory, and of an activation.
constexpr int64_t kElementWork = 16, kActivationWork = 64;

// Multiply-adds, B · K · H, of a forward and of a backward product pair from which ATen's GEMMs take over. In backward
// also from a number of weights, K · H: the kernels read W in panels of columns, which is slow beyond the L2 cache
// unless there are enough rows of dz to pay for it.
//
// Where one overtakes the other depends on the CPU, and slowly on the size: with AVX2, float crosses in forward at
// about 2^27 on a Xeon, double with AVX-512 at 2^24. On the wrong side of these compromises either loses a sixth at
// most, while nn.RNNCell, which also passes over z three more times, loses more. On an EPYC with AVX-512 ATen's GEMM is
// ahead with double in forward alone, from 2^28. Vectors of 16 bytes without FMA are no match for it beyond small
// sizes.
struct GemmThreshold {
  int64_t forward, backward, backward_weights;
};
template <typename T>
GemmThreshold find_gemm_threshold() {
  if (!kHasAtenGemm<T>) return {kNever, kNever, kNever};
  if (isa() == Isa::kDefault) return {1 << 18, 1 << 18, 1 << 18};
  if (isa() >= Isa::kAvx512 && is_amd()) return {sizeof(T) == 4 ? kNever : 1 << 28, kNever, kNever};
  if (sizeof(T) == 4) return {1 << 27, 1 << 27, 1 << 20};
  return {1 << 26, 1 << 26, 1 << 19};
}

template <typename T>
const GemmThreshold& gemm_threshold() {
  static const GemmThreshold threshold = find_gemm_threshold<T>();
  return threshold;
}

// The elements of dz that there is memory for at a time: nn.RNNCell's backward takes as many of type T as dz has, and
// this one no more, but for a constant, or if that were less than a row or a column. In 16 bits, dz in the accumulation
// type can be twice that.
constexpr int64_t kSpareBytes = 1 << 19;
template <typename T>
int64_t most_dz(int64_t rows, int64_t cols) {
  const int64_t within = (rows * cols * sizeof(T) + kSpareBytes) / sizeof(acc_t<T>);
  return std::max({within, rows, dz_row_stride<acc_t<T>>(cols)});
}

// The length of n equal parts of size, in whole vectors.
int64_t length_of_part(int64_t size, int64_t n) { return ((size + n - 1) / n + 15) / 16 * 16; }

// The columns of a block of dz: few blocks, of whole vectors where they fit.
template <typename S>
int64_t columns_within(int64_t rows, int64_t cols, int64_t most) {
  const auto fits = [&](int64_t n) { return rows * dz_row_stride<S>(n) <= most; };
  const int64_t fitting = std::max<int64_t>(most / rows, 1);
  for (int64_t n = (cols + fitting - 1) / fitting; n <= cols / 16; ++n) {
    if (fits(length_of_part(cols, n))) return length_of_part(cols, n);
  }
  return fitting;
}

// The rows of a block of dz, the same way; one, if none is fitting.
int64_t rows_within(int64_t rows, int64_t fitting) {
  fitting = std::max<int64_t>(fitting, 1);
  return std::min(fitting, length_of_part(rows, (rows + fitting - 1) / fitting));
}

}  // namespace

template <typename T>
ForwardPlan plan_forward(const CellSizes& s) {
  const int64_t B = s.batch, H = s.hidden_size, K = s.terms();
  if (B * H * K >= gemm_threshold<T>().forward) return {Products::kAtenGemm, false, {B, 1, kActivationWork * H}};
  if (B * H * (K + 1) <= serial_work()) return {Products::kFused, true, {}};
  const OutputTiles<T> tiles(B, H);
  return {Products::kFused, false, {tiles.rows * tiles.cols, 1, kTileRows<T> * kTileCols * (K + 1)}};
}

Schedule dz_schedule(int64_t rows, int64_t cols) { return {cols, 64, kElementWork * rows}; }

Schedule strip_schedule(int64_t strips, int64_t dz_rows, int64_t dz_cols) {
  return {strips, 1, dz_rows * dz_cols * kStripCols};
}

template <typename T>
Products products_of_backward(const CellSizes& s) {
  const GemmThreshold& threshold = gemm_threshold<T>();
  const int64_t weights = s.weights();
  const bool large = s.batch * weights >= threshold.backward || weights >= threshold.backward_weights;
  return s.batch > 0 && large ? Products::kAtenGemm : Products::kFused;
}

template <typename T>
BackwardPlan plan_backward(const CellSizes& s) {
  using S = acc_t<T>;
  const int64_t B = s.batch, H = s.hidden_size;
  BackwardPlan plan{};
  plan.products = products_of_backward<T>(s);
  plan.row_stride = plan.products == Products::kAtenGemm ? H : dz_row_stride<S>(H);
  const int64_t most = most_dz<T>(B, H);
  plan.whole = B * plan.row_stride <= most;
  plan.dz_size = plan.whole ? B * plan.row_stride : most;
  if (!plan.whole) {
    // Blocks of rows stay in the L2 cache; those of columns are as wide as there is memory for, since x and h are
    // packed for each.
    constexpr int64_t kCached = (1 << 20) / sizeof(S);
    plan.block_cols = columns_within<S>(B, H, most);
    plan.block_rows = rows_within(B, std::min(most, kCached) / plan.row_stride);
  }
  return plan;
}

// ----------------------------------------------------------------------------------------------------- the explanation

namespace {

// A line about a kernel: why it runs, or, after a dash, why not.
std::string line(bool runs, const char* name, const std::string& why) {
  std::ostringstream out;
  out << (runs ? "       " : "    -  ") << name << std::string(16 - std::string(name).size(), ' ') << why << "\n";
  return out.str();
}

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

std::string threads(int64_t n) { return n == 1 ? "1 thread" : text(n, " threads"); }

template <typename T>
bool has_pairs() {
  return std::is_same_v<T, c10::BFloat16> && isa() == Isa::kAvx512Bf16;
}

template <typename T>
const char* why_not_pairs() {
  return std::is_same_v<T, c10::BFloat16> ? "in the avx512_bf16 kernels alone" : "in bfloat16 alone";
}

template <typename T>
std::string why_not_aten_gemm(int64_t threshold, const std::string& from) {
  if (!kHasAtenGemm<T>) return "in 16 bits it would round one product before the other is added";
  return threshold == kNever ? "not ahead on this CPU" : from;
}

template <typename T>
std::string explain_forward(const CellSizes& s) {
  const int64_t B = s.batch, H = s.hidden_size, threshold = gemm_threshold<T>().forward;
  const ForwardPlan plan = plan_forward<T>(s);
  const std::string from = text("from ", threshold, " multiply-adds"), on = threads(plan.schedule.threads());
  std::string report = text("forward: ", B * H * s.terms(), " multiply-adds\n");
  if (plan.products == Products::kAtenGemm) {
    return report + text("forward runs: aten_gemm; biases and f on ", on, "\n") + line(true, "aten_gemm", from);
  }
  const PanelShape panel = has_pairs<T>() ? kPairPanelShape : outer_panel_shape(vector_bytes() / sizeof(acc_t<T>));
  const char* const by_panels = has_pairs<T>() ? "pairs" : "outer_products";
  const int64_t in_panels = rows_in_panels(B, H, panel), rest = B - in_panels;
  report += "forward runs: ";
  if (in_panels > 0) report += text(by_panels, " for ", in_panels, " rows, ");
  if (rest > 0) report += text("dot_products for ", rest, " rows, ");
  report += text("on ", on, "\n");
  report += line(in_panels > 0, by_panels,
                 text("in panels of ", panel.rows, " rows, the last one of ", panel.fewest(), " or more; from ",
                      kFewestPanelCols, " units"));
  report += has_pairs<T>() ? line(false, "outer_products", "pairs take two terms at a time")
                           : line(false, "pairs", why_not_pairs<T>());
  report += line(rest > 0, "dot_products", "for the rows that fill no panel");
  return report + line(false, "aten_gemm", why_not_aten_gemm<T>(threshold, from));
}

template <typename T>
std::string explain_backward(const CellSizes& s) {
  const int64_t B = s.batch, I = s.input_size, H = s.hidden_size;
  const GemmThreshold& threshold = gemm_threshold<T>();
  const BackwardPlan plan = plan_backward<T>(s);
  const bool aten_gemm = plan.products == Products::kAtenGemm;
  const bool pairs = has_pairs<T>() && pairs_pay(B, H);
  const int64_t weights = s.weights(), strips = 2 * (strips_of(I) + strips_of(H));
  const std::string from =
      text("from ", threshold.backward, " multiply-adds, or ", threshold.backward_weights, " weights");

  std::string report = text("backward: twice ", B * weights, " multiply-adds, with ", weights, " weights\n");
  report += text("backward runs: ", aten_gemm ? "aten_gemm" : pairs ? "pairs" : "outer_products");
  if (plan.whole) {
    if (!aten_gemm) report += text(" on ", threads(strip_schedule(strips, B, H).threads()));
    report += text("; dz on ", threads(dz_schedule(B, H).threads()), "\n");
  } else {
    report +=
        text(" on ", threads(strip_schedule(strips / 2, B, plan.block_cols).threads()), "; dz twice, in blocks of ",
             plan.block_cols, " columns and of ", plan.block_rows, " rows, for memory no more than nn.RNNCell's\n");
  }
  if (aten_gemm) return report + line(true, "aten_gemm", from);
  report += line(!pairs, "outer_products", has_pairs<T>() ? "for fewer" : "for all sizes");
  report += has_pairs<T>() ? line(pairs, "pairs", text("from ", kFewestForPairs, " rows and units"))
                           : line(false, "pairs", why_not_pairs<T>());
  return report + line(false, "aten_gemm", why_not_aten_gemm<T>(threshold.backward, from));
}

template <typename T>
std::string explain(const CellSizes& s) {
  return explain_forward<T>(s) + "\n" + explain_backward<T>(s);
}

}  // namespace

std::string explain(int64_t batch, int64_t input_size, int64_t hidden_size, c10::ScalarType dtype) {
  const CellSizes sizes = {batch, input_size, hidden_size, /*hx=*/true};
  const std::string head = text("the ", cpu_capability(), " kernels, ", threads(at::get_num_threads()), " at most, ",
                                serial_work(), " multiply-adds or fewer on 1\n\n");
  switch (dtype) {
    case c10::ScalarType::Float:
      return head + explain<float>(sizes);
    case c10::ScalarType::Double:
      return head + explain<double>(sizes);
    case c10::ScalarType::BFloat16:
      return head + explain<c10::BFloat16>(sizes);
    case c10::ScalarType::Half:
      return head + explain<c10::Half>(sizes);
    default:
      TORCH_CHECK_VALUE(false, "no kernel computes in ", dtype);
  }
}

template ForwardPlan plan_forward<float>(const CellSizes&);
template ForwardPlan plan_forward<double>(const CellSizes&);
template ForwardPlan plan_forward<c10::BFloat16>(const CellSizes&);
template ForwardPlan plan_forward<c10::Half>(const CellSizes&);
template BackwardPlan plan_backward<float>(const CellSizes&);
template BackwardPlan plan_backward<double>(const CellSizes&);
template BackwardPlan plan_backward<c10::BFloat16>(const CellSizes&);
template BackwardPlan plan_backward<c10::Half>(const CellSizes&);
template Products products_of_backward<float>(const CellSizes&);
template Products products_of_backward<double>(const CellSizes&);
template Products products_of_backward<c10::BFloat16>(const CellSizes&);
template Products products_of_backward<c10::Half>(const CellSizes&);

}  // namespace rnn_ext::cpu
