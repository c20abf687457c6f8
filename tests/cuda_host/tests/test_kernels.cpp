// Every CUDA kernel of the project against a float64 loop, on the host runtime: ragged, strided and misaligned shapes
// in buffers of exact size, with NaN in every gap between their rows, so that a read outside the matrix shows up.
#include <algorithm>
#include <cmath>
#include <limits>
#include <cstring>
#include <memory>
#include <string>

#include "check.h"
#include "kernels.h"
#include "operands.h"

namespace {

using namespace rnn_ext;
using namespace rnn_ext::cuda;
using check::accumulator_unit;
using check::activate_backward_reference;
using check::activate_reference;
using check::Dtype;
using check::Expected;
using check::is_16_bit;
using check::is_bfloat16;
using check::kLayouts;
using check::Layout;
using check::Operand;
using check::Result;

struct Case {
  int64_t batch, input_size, hidden_size;
  Layout layout;
  Nonlinearity nonlinearity;
  bool hx, bias;

  std::string name() const {
    char text[160];
    std::snprintf(text, sizeof text, "B=%d I=%d H=%d layout %d f %d%s%s", int(batch), int(input_size), int(hidden_size),
                  int(layout), int(nonlinearity), hx ? "" : " no hx", bias ? "" : " no bias");
    return text;
  }
};

template <typename T>
void compare(const char* kernel, const char* what, const Case& c, int seed, const Result<T>& got,
             const std::vector<Expected>& expected, bool rounded = false) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::fabs(got[i] - expected[i].value);
    if (!(error <= expected[i].tolerance<T>(rounded))) {
      check::report("%s<%s>, %s, seed %d: %s[%zu] is %.9g, expected %.9g", kernel, Dtype<T>::name, c.name().c_str(),
                    seed, what, i, got[i], expected[i].value);
      return;
    }
  }
}

// launch(params) runs the kernel. `product_unit` is the relative error of a product beyond rounding: of operands that
// the kernel rounds.
template <typename T, typename Launch>
void test_forward(const char* name, const Case& c, Launch launch, double product_unit = 0) {
  check::Random random(static_cast<uint32_t>(c.batch * 7 + c.input_size * 3 + c.hidden_size));
  const int64_t B = c.batch, I = c.input_size, H = c.hidden_size;
  const Operand<T> x(B, I, c.layout, random), h(B, H, c.layout, random), W(H, I, c.layout, random),
      U(H, H, c.layout, random), b_ih(1, H, Layout::kContiguous, random), b_hh(1, H, Layout::kContiguous, random);
  Result<T> output(B * H);

  std::vector<Expected> expected(B * H);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t n = 0; n < H; ++n) {
      Expected& z = expected[b * H + n];
      for (int64_t k = 0; k < I; ++k) z.add(x(b, k) * W(n, k));
      for (int64_t k = 0; c.hx && k < H; ++k) z.add(h(b, k) * U(n, k));
      if (c.bias) {
        z.add(b_ih(0, n));
        z.add(b_hh(0, n));
      }
      const double rounded_operands = z.rounded_operands<T>(product_unit);
      // No f is steeper than 1, so the error of z bounds that of f(z), but for f's own: a few units in the last place,
      // and 2^-10.98 where a 16-bit output lets the kernel use tanh.approx.
      z.value = activate_reference(z.value, c.nonlinearity);
      z.magnitude += is_16_bit<T> ? std::fabs(z.value) * 0x1p-10 / accumulator_unit<T> / (z.terms + 4) : 1;
      z.magnitude += rounded_operands;
    }
  }

  ForwardParams<T> p{};
  p.input = x.matrix();
  if (c.hx) p.hx = h.matrix();
  p.weights.weight_ih = W.matrix();
  p.weights.weight_hh = U.matrix();
  p.weights.bias_ih = c.bias ? b_ih.matrix().data : nullptr;
  p.weights.bias_hh = c.bias ? b_hh.matrix().data : nullptr;
  p.output = output.data();
  p.batch = B, p.weights.input_size = I, p.weights.hidden_size = H;
  p.weights.nonlinearity = c.nonlinearity;
  std::vector<T> first;
  check::for_each_seed([&](int seed) {
    output.clear();
    CHECK(launch(p) == cudaSuccess);
    compare(name, "output", c, seed, output, expected);
    if (seed == 0) first.assign(output.data(), output.data() + output.size());
    for (int64_t i = 0; i < output.size(); ++i) {
      if (std::memcmp(&first[i], output.data() + i, sizeof(T)) == 0) continue;
      check::report("%s<%s>, %s, seed %d: output[%d] is %.9g, expected %.9g as under seed 0", name, Dtype<T>::name,
                    c.name().c_str(), seed, int(i), output[i], Dtype<T>::to(first[i]));
      break;
    }
  });
}

// `wanted` is a bit set of the five gradients, in the order of BackwardParams.
template <typename T>
void test_backward(const BackwardLauncher<T>& kernel, const Case& c, int wanted) {
  check::Random random(static_cast<uint32_t>(c.batch * 5 + c.input_size * 11 + c.hidden_size));
  const int64_t B = c.batch, I = c.input_size, H = c.hidden_size;
  const Operand<T> grad(B, H, c.layout, random), output(B, H, c.layout, random), x(B, I, c.layout, random),
      h(B, H, c.layout, random), W(H, I, c.layout, random), U(H, H, c.layout, random);

  const auto is_wanted = [&](int bit) { return (wanted >> bit & 1) != 0; };
  std::vector<double> dz(B * H);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t n = 0; n < H; ++n)
      dz[b * H + n] = activate_backward_reference(grad(b, n), output(b, n), c.nonlinearity);
  }
  std::vector<Expected> grad_input(B * I), grad_hx(B * H), grad_W(H * I), grad_U(H * H), grad_bias(H);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t n = 0; n < H; ++n) {
      const double d = dz[b * H + n];
      for (int64_t i = 0; is_wanted(0) && i < I; ++i) grad_input[b * I + i].add(d * W(n, i));
      for (int64_t i = 0; is_wanted(1) && i < H; ++i) grad_hx[b * H + i].add(d * U(n, i));
      for (int64_t i = 0; is_wanted(2) && i < I; ++i) grad_W[n * I + i].add(d * x(b, i));
      for (int64_t i = 0; is_wanted(3) && c.hx && i < H; ++i) grad_U[n * H + i].add(d * h(b, i));
      grad_bias[n].add(d);
    }
  }

  Result<T> got_input(B * I), got_hx(B * H), got_W(H * I), got_U(H * H), got_bias(H), got_bias_copy(H);
  const auto asked = [&](int bit, Result<T>& r) { return is_wanted(bit) ? r.data() : nullptr; };
  BackwardParams<T> p{};
  p.grad_output = grad.matrix();
  p.output = output.matrix();
  p.input = x.matrix();
  if (c.hx) p.hx = h.matrix();
  p.weights.weight_ih = W.matrix();
  p.weights.weight_hh = U.matrix();
  p.grad_input = asked(0, got_input);
  p.grad_hx = c.hx ? asked(1, got_hx) : nullptr;
  p.grad_weight_ih = asked(2, got_W);
  p.grad_weight_hh = asked(3, got_U);
  p.grad_bias = asked(4, got_bias);
  p.grad_bias_copy = c.bias ? asked(4, got_bias_copy) : nullptr;
  p.batch = B, p.weights.input_size = I, p.weights.hidden_size = H;
  p.weights.nonlinearity = c.nonlinearity;
  const bool rounded = kernel.rounds_dz;
  check::for_each_seed([&](int seed) {
    for (Result<T>* r : {&got_input, &got_hx, &got_W, &got_U, &got_bias, &got_bias_copy}) r->clear();
    if (kernel.takes != nullptr) {
      CHECK(kernel.takes(p));
      emu::options.multiprocessors = 2 + emu::options.seed % 2;  // several tiles a block
    }
    CHECK(kernel.launch(p, nullptr) == cudaSuccess);
    if (p.grad_input != nullptr) compare(kernel.name, "grad_input", c, seed, got_input, grad_input, rounded);
    if (p.grad_hx != nullptr) compare(kernel.name, "grad_hx", c, seed, got_hx, grad_hx, rounded);
    if (p.grad_weight_ih != nullptr) compare(kernel.name, "grad_weight_ih", c, seed, got_W, grad_W, rounded);
    if (p.grad_weight_hh != nullptr) compare(kernel.name, "grad_weight_hh", c, seed, got_U, grad_U, rounded);
    if (p.grad_bias != nullptr) compare(kernel.name, "grad_bias", c, seed, got_bias, grad_bias, rounded);
    if (p.grad_bias_copy != nullptr) compare(kernel.name, "grad_bias_copy", c, seed, got_bias_copy, grad_bias, rounded);
  });
}

// Without hx the gradient of weight_hh is zero whatever dz is, also in the tiles that sum up dz for the bias.
TEST(backward_without_hx_is_exactly_zero) {
  constexpr int64_t B = 12, I = 8, H = 24;
  for (const BackwardLauncher<__half>& kernel : kBackwardKernels<__half>) {
    if (B > kernel.max_batch) continue;
    const std::vector<__half> infinite(B * H, __float2half(std::numeric_limits<float>::infinity()));
    const std::vector<__half> half_of_all(B * H, __float2half(0.5f));
    Result<__half> grad_U(H * H), grad_bias(H);
    BackwardParams<__half> p{};
    p.grad_output = {infinite.data(), H};
    p.output = {half_of_all.data(), H};
    p.grad_weight_hh = grad_U.data();
    p.grad_bias = grad_bias.data();
    p.batch = B, p.weights.input_size = I, p.weights.hidden_size = H;
    CHECK(kernel.launch(p, nullptr) == cudaSuccess);
    for (int64_t i = 0; i < H * H; ++i) {
      if (!(grad_U[i] == 0)) {
        check::report("%s: grad_weight_hh[%d] is %g, expected 0", kernel.name, int(i), grad_U[i]);
        break;
      }
    }
    for (int64_t i = 0; i < H; ++i) CHECK(std::isinf(grad_bias[i]));
  }
}

// Only what is asked for has to lie as TMA needs it.
TEST(backward_wgmma_takes_aligned_rows) {
  constexpr int64_t B = 4, I = 16, H = 24;
  check::Random random(0);
  const Operand<__half> wide(H, H + 8, Layout::kContiguous, random);
  Result<__half> gradient(H * H);
  const Matrix<__half> m = {wide.matrix().data, H + 8};
  const auto takes = [&](const auto& change) {
    BackwardParams<__half> p{};
    p.grad_output = p.output = p.input = p.hx = p.weights.weight_ih = p.weights.weight_hh = m;
    p.grad_input = p.grad_hx = p.grad_weight_ih = p.grad_weight_hh = p.grad_bias = gradient.data();
    p.batch = B, p.weights.input_size = I, p.weights.hidden_size = H;
    change(p);
    return backward_wgmma_takes(p);
  };
  using P = BackwardParams<__half>;
  CHECK(takes([](P&) {}));
  CHECK(takes([](P& p) { p.hx.data = nullptr; }));
  CHECK(takes([](P& p) { p.grad_output.col_stride = p.output.row_stride = 3; }));  // those, the first launch reads
  CHECK(!takes([](P& p) { p.batch = 0; }));
  CHECK(!takes([](P& p) { p.weights.input_size = 20; }));
  CHECK(takes([](P& p) { p.weights.input_size = 20, p.grad_input = p.grad_weight_ih = nullptr; }));
  CHECK(!takes([](P& p) { p.weights.weight_ih.row_stride = 20; }));
  CHECK(takes([](P& p) { p.weights.weight_ih.row_stride = 20, p.grad_input = nullptr; }));
  CHECK(!takes([](P& p) { ++p.weights.weight_hh.data; }));
  CHECK(!takes([](P& p) { p.input.col_stride = 2; }));
  CHECK(!takes([](P& p) { ++p.hx.data; }));
  CHECK(!takes([](P& p) { ++p.grad_weight_hh; }));
  BackwardParams<float> in_float{};
  CHECK(!backward_wgmma_takes(in_float));
}

// ---- the cases ------------------------------------------------------------------------------------------------------

// Shapes around the tiles' and strips' edges, with I != H; every other property changes from one to the next, so that
// all of their values occur with all kinds of shapes without multiplying up.
std::vector<Case> cases() {
  constexpr int64_t kShapes[][3] = {{0, 5, 4},    {1, 1, 1},    {1, 10, 5},  {3, 5, 7},    {5, 0, 6},   {16, 32, 31},
                                    {17, 33, 35}, {2, 100, 40}, {40, 3, 70}, {65, 20, 66}, {4, 31, 64}, {33, 64, 17}};
  std::vector<Case> all;
  int i = 0;
  for (const auto& s : kShapes) {
    for (int repeat = 0; repeat < 2; ++repeat, ++i) {
      all.push_back({s[0], s[1], s[2], kLayouts[(i + repeat * 2) % 5], static_cast<Nonlinearity>((i + repeat) % 3),
                     i % 4 != 3, i % 5 != 4});
    }
  }
  return all;
}

// For the kernels of small batches: aligned rows, which they access in vectors, and more rows than they hold dz of.
struct BackwardCase {
  Case c;
  int wanted;
};
const BackwardCase kSmallBatchBackward[] = {
    {{1, 256, 8, Layout::kContiguous, Nonlinearity::kTanh, true, true}, 31},
    {{2, 40, 48, Layout::kContiguous, Nonlinearity::kRelu, true, true}, 31},
    {{4, 64, 32, Layout::kContiguous, Nonlinearity::kSigmoid, true, false}, 31},
    {{7, 24, 16, Layout::kContiguous, Nonlinearity::kTanh, false, true}, 31},
    {{6, 20, 64, Layout::kContiguous, Nonlinearity::kTanh, true, true}, 10},
    {{8, 16, 1100, Layout::kContiguous, Nonlinearity::kTanh, true, true}, 21},
};

// For the kernels that ask for aligned rows: around tiles of 128 x 64, 128 and 256, k-tiles of 64 elements, and rings
// of 4 to 8 stages.
std::vector<Case> aligned_cases() {
  constexpr Layout kPadded = Layout::kAlignedRows;
  return {{1, 8, 8, Layout::kContiguous, Nonlinearity::kTanh, true, true},
          {130, 70, 72, kPadded, Nonlinearity::kSigmoid, true, true},
          {260, 67, 264, kPadded, Nonlinearity::kRelu, false, true},
          {129, 300, 136, kPadded, Nonlinearity::kTanh, true, false}};
}

// Around tiles of 128 x 128 and 256 and clusters of two, k-tiles of 64 elements, and rings of 4 and 6 stages; either
// kind of tiles longer than the other.
const BackwardCase kAlignedBackward[] = {
    {{130, 72, 136, Layout::kAlignedRows, Nonlinearity::kSigmoid, true, true}, 31},
    {{1, 8, 8, Layout::kContiguous, Nonlinearity::kTanh, true, true}, 5},
    {{261, 264, 72, Layout::kAlignedRows, Nonlinearity::kTanh, false, true}, 31},
    {{70, 40, 264, Layout::kContiguous, Nonlinearity::kRelu, true, false}, 26},
    {{40, 16, 400, Layout::kContiguous, Nonlinearity::kTanh, true, true}, 16},
};

// Runs the kernel that `forced` names, with or without PyTorch's leave to use tf32.
auto forced_launch(const std::string& forced, bool tf32, const Device& device = {}) {
  return [forced, tf32, device](const auto& p) {
    return launch_plan(p, plan_forward(forward_case(p, tf32, true), device, forced.c_str()));
  };
}

template <typename T>
void test_aligned_forward(size_t index) {
  const ForwardKernel<T>& kernel = kForwardKernels<T>[index];
  if (kernel.takes == nullptr || !kernel.computes) return;
  const auto launch = [&](const ForwardParams<T>& p) {
    CHECK(kernel.takes(p));
    emu::options.multiprocessors = 2 + emu::options.seed % 2;  // several tiles a block
    return kernel.launch(p, nullptr);
  };
  for (const Case& c : aligned_cases()) test_forward<T>(kernel.name, c, launch);
}

// The largest error of x Wᵀ that a kernel makes with B = H = 64, as a part of Σ |x| |w|.
template <typename Launch, typename Scale>
double error_of_product(Launch launch, int depth, Scale scale) {
  constexpr int kSize = 64;
  check::Random random(static_cast<uint32_t>(depth));
  std::vector<float> x(kSize * depth), W(kSize * depth), output(kSize * kSize);
  for (int r = 0; r < kSize; ++r) {
    for (int k = 0; k < depth; ++k) {
      x[r * depth + k] = static_cast<float>(scale(random.uniform(), k, false));
      W[r * depth + k] = static_cast<float>(scale(random.uniform(), k, true));
    }
  }
  ForwardParams<float> p{};
  p.input = {x.data(), depth};
  p.weights.weight_ih = {W.data(), depth};
  p.output = output.data();
  p.batch = p.weights.hidden_size = kSize, p.weights.input_size = depth;
  p.weights.nonlinearity = Nonlinearity::kRelu;  // leaves half of the sums as they are
  CHECK(launch(p) == cudaSuccess);
  double largest = 0;
  for (int i = 0; i < kSize * kSize; ++i) {
    double sum = 0, magnitude = 0;
    for (int k = 0; k < depth; ++k) {
      const double product = double(x[i / kSize * depth + k]) * W[i % kSize * depth + k];
      sum += product, magnitude += std::fabs(product);
    }
    largest = std::max(largest, std::fabs(output[i] - std::max(sum, 0.0)) / magnitude);
  }
  return largest;
}

// Three tf32 products stand in for fp32 where their error is at most twice that of sums in fp32, one after the other.
// The tensor cores' own rounding is modelled as truncation of each sum of eight products.
[[maybe_unused]] void test_split_products() {
  const auto in_fp32 = forced_launch("tiled_128x128", false), split = forced_launch("3xtf32_128x128", false);
  const auto expect_error = [&](const char* data, int depth, double factor, const auto& scale) {
    const double fp32 = error_of_product(in_fp32, depth, scale), error = error_of_product(split, depth, scale);
    if (!(error <= factor * fp32)) {
      check::report("K=%d, %s numbers: an error of %g, expected at most %g times fp32's %g", depth, data, error, factor,
                    fp32);
    }
  };
  for (const int depth : {512, 4096}) {
    expect_error("random", depth, 2, [](double v, int, bool) { return v; });
    expect_error("badly scaled", depth, 2,
                 [](double v, int k, bool is_weight) { return std::ldexp(v, (is_weight ? -3 : 3) * (k % 9)); });
    expect_error("cancelling", depth, 2, [&](double v, int k, bool is_weight) {  // a large sum, and then its opposite
      return is_weight || k < depth / 2 ? std::fabs(v) : -std::fabs(v);
    });
    // Sums that never grow hardly round in fp32, while a split product is off by up to 2^-22, most of all next to a
    // power of two. It is still far below what fp32 makes of any sum that does grow.
    expect_error("alternating", depth, 4, [](double v, int k, bool is_weight) {
      return (is_weight || k % 2 == 0 ? 1 : -1) * (1 + 0x1p-10 * v);
    });
  }
  // Errors of one sign, which add up.
  expect_error("positive", 16384, 2, [](double v, int, bool) { return std::fabs(v); });
}

// Rows with an infinity, NaN or the largest number, which comes out as `largest`, times 2^-20; or, if that is a NaN, as
// whatever lies from the largest number of tf32 on.
template <typename Launch>
void test_infinities(const std::string& name, Launch launch, float largest) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity(), kMax = std::numeric_limits<float>::max();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr int kRows = 5, kSize = 8;
  std::vector<float> x(kRows * kSize, 1.f), W(kSize * kSize, 0x1p-20f), output(kRows * kSize);
  const float special[kRows] = {kInfinity, -kInfinity, kMax, kNan, 1.f};
  for (int r = 0; r < kRows; ++r) x[r * kSize + 3] = special[r];
  ForwardParams<float> p{};
  p.input = {x.data(), kSize};
  p.weights.weight_ih = {W.data(), kSize};
  p.output = output.data();
  p.batch = kRows, p.weights.input_size = p.weights.hidden_size = kSize;
  p.weights.nonlinearity = Nonlinearity::kRelu;
  CHECK(launch(p) == cudaSuccess);
  const float expected[kRows] = {kInfinity, 0, largest * 0x1p-20f, kNan, 8 * 0x1p-20f};
  for (int i = 0; i < kRows * kSize; ++i) {
    const float want = expected[i / kSize];
    const bool is_right = !std::isnan(want) ? output[i] == want
                          : i / kSize == 2  ? output[i] >= 0x1.ffcp127f * 0x1p-20f
                                            : std::isnan(output[i]);
    if (!is_right) {
      check::report("%s: with %g, output is %g, expected %g", name.c_str(), special[i / kSize], output[i], want);
    }
  }
}

// What has no high and low part comes out as in fp32.
void test_split_infinities() {
  for (const char* name : {"3xtf32_128x128", "3xtf32_128x64"}) {
    test_infinities(name, forced_launch(name, false), std::numeric_limits<float>::max());
  }
}

template <typename T>
void test_all_backward(size_t index) {
  constexpr int kAll = 31;
  constexpr int kWanted[] = {kAll, kAll, 16, kAll, 3, 12, kAll, 20, 9};
  int i = 0;
  const BackwardLauncher<T>& kernel = kBackwardKernels<T>[index];
  if (!kernel.computes) return;
  if (kernel.takes != nullptr) {
    for (const BackwardCase& b : kAlignedBackward) {
      test_backward(kernel, b.c, b.wanted);
      if (is_bfloat16<T>) break;  // which differs in the types of instructions alone
    }
    return;
  }
  for (const Case& c : cases()) {
    if (c.batch <= kernel.max_batch) test_backward(kernel, c, kWanted[i++ % 9]);
  }
  if (kernel.max_batch < INT64_MAX) {
    for (const BackwardCase& b : kSmallBatchBackward) test_backward(kernel, b.c, b.wanted);
  }
}

// ---- each kernel of cell_forward.h by its name ----------------------------------------------------------------------

template <typename T>
void test_forced(const Case& c, const std::string& forced, int compute_capability, bool tf32 = false) {
  test_forward<T>(forced.c_str(), c, forced_launch(forced, tf32, {compute_capability}), tf32 ? kTf32ProductUnit : 0);
}

// The choice is for this kernel, and a launch of it computes what it should.
template <typename T>
void test_launched(const std::string& family, const Device& device, const Case& c, bool tf32 = false) {
  const auto launch = [&](const ForwardParams<T>& p) {
    const ForwardPlan plan = plan_forward(forward_case(p, tf32, true), device, nullptr);
    if (std::string(plan.name()).rfind(family, 0) != 0) {
      check::report("%s runs on sm_%d, expected %s", plan.name(), device.compute_capability, family.c_str());
    }
    return launch_plan(p, plan);
  };
  test_forward<T>(family.c_str(), c, launch, tf32 ? kTf32ProductUnit : 0);
}

// Each family, and each architecture that has other kernels; all layouts and shapes are the kernels' own tests' matter.
TEST(forward_as_launched) {
  constexpr Nonlinearity kTanh = Nonlinearity::kTanh, kRelu = Nonlinearity::kRelu;
  const Case empty = {0, 5, 4, Layout::kContiguous, kTanh, true, true},
             row = {1, 10, 5, Layout::kMisaligned, kTanh, true, true},
             odd = {17, 33, 35, Layout::kContiguous, kRelu, true, true},
             even = {40, 32, 66, Layout::kContiguous, kTanh, true, false},
             large = {260, 264, 136, Layout::kAlignedRows, kTanh, true, true},
             deep = {129, kMin3xTf32Depth, 72, Layout::kAlignedRows, kRelu, false, true};
  const Device t4 = {75, 40, 64 * 1024}, a100 = {80, 108, 163 * 1024}, h100 = {}, two_of_h100 = {90, 2};
  test_launched<float>("", h100, empty);
  test_launched<float>("gemv", h100, row);
  test_launched<double>("gemv", a100, row);
  test_launched<__half>("gemv", t4, row);
  test_launched<float>("tiled", h100, odd);
  test_launched<double>("tiled", a100, odd);
  test_launched<__half>("tiled", h100, even);
  test_launched<__half>("staged", h100, odd);
  test_launched<float>("staged", t4, odd);
  test_launched<double>("staged", t4, odd);
  test_launched<__half>("staged", t4, even);
  test_launched<__half>("wgmma", two_of_h100, large);
  test_launched<float>("3xtf32", two_of_h100, deep);
  test_launched<float>("wgmma_tf32", two_of_h100, deep, /*tf32=*/true);
  if constexpr (check::is_built<__nv_bfloat16>) {
    test_launched<__nv_bfloat16>("tiled", a100, even);
    test_launched<__nv_bfloat16>("staged", a100, odd);
    test_launched<__nv_bfloat16>("staged", t4, odd);
    test_launched<__nv_bfloat16>("wgmma", two_of_h100, large);
  }
}

// Batches up to each size that is compiled, K around whole rounds of loads and vectors, aligned and not, and few enough
// rows that all warps of a block share one, or enough that each has its own.
template <typename T>
void test_gemv() {
  constexpr Nonlinearity kTanh = Nonlinearity::kTanh, kRelu = Nonlinearity::kRelu;
  const Case all[] = {
      {1, 1, 1, Layout::kContiguous, kTanh, true, true},      {1, 2100, 8, Layout::kContiguous, kRelu, true, true},
      {1, 300, 40, Layout::kMisaligned, kTanh, true, false},  {2, 520, 48, Layout::kContiguous, kTanh, true, true},
      {3, 72, 24, Layout::kContiguous, kRelu, false, true},   {4, 1048, 16, Layout::kContiguous, kTanh, true, true},
      {4, 33, 35, Layout::kTransposed, kRelu, true, true},    {7, 64, 88, Layout::kContiguous, kTanh, true, false},
      {8, 600, 24, Layout::kContiguous, kTanh, true, true},   {8, 50, 21, Layout::kEverySecond, kTanh, true, true},
      {13, 264, 16, Layout::kContiguous, kRelu, true, true},  {16, 41, 37, Layout::kPaddedRows, kTanh, true, true},
      {2, 7, 1100, Layout::kContiguous, kTanh, false, false}, {5, 0, 24, Layout::kContiguous, kTanh, true, true},
  };
  for (const Case& c : all) {
    if (c.batch <= forward_gemv_max_batch(kDtype<T>)) test_forced<T>(c, "gemv", 90);
  }
}

// More rows than a block has in flight, and columns on both sides of its threads.
template <typename T>
void test_cublas() {
  constexpr Nonlinearity kTanh = Nonlinearity::kTanh, kRelu = Nonlinearity::kRelu, kSigmoid = Nonlinearity::kSigmoid;
  test_forced<T>({1, 1, 1, Layout::kContiguous, kTanh, true, true}, "cublas", 90);
  test_forced<T>({19, 5, 257, Layout::kMisaligned, kRelu, true, true}, "cublas", 90);
  test_forced<T>({8, 4, 300, Layout::kTransposed, kSigmoid, false, true}, "cublas", 90);
  test_forced<T>({3, 7, 40, Layout::kPaddedRows, kTanh, true, false}, "cublas", 90);
}

// Around the row's own tile and slice, with every way to split K. What goes by cp.async in 16 bits must be 4-byte
// aligned; the others take any layout.
template <typename T>
void test_tiled(const ForwardTiledKernel& k) {
  if (!k.takes(kDtype<T>)) return;
  const bool only_aligned = k.fill == Fill::kAsync && is_16_bit<T>, tf32 = k.math == Math::kTf32;
  const auto layout = [&](Layout any) { return only_aligned ? Layout::kContiguous : any; };
  const Case rough = {k.bm - 3, k.bk + 6, k.bn + 4, layout(Layout::kMisaligned), Nonlinearity::kTanh, true, true},
             smooth = {k.bm + 2, 2 * k.bk + 8, k.bn - 8, Layout::kContiguous, Nonlinearity::kRelu, true, false},
             small = {5, 2 * k.bk + 4, 12, layout(Layout::kTransposed), Nonlinearity::kSigmoid, true, true},
             deep = {9, 8 * k.bk, 16, layout(Layout::kPaddedRows), Nonlinearity::kTanh, false, true},
             tiny = {1, 2, 2, layout(Layout::kEverySecond), Nonlinearity::kRelu, true, true};
  const std::string name = k.name;
  // bfloat16 has no tensor cores on sm_75, where another row of the same name serves it.
  const bool turing = k.first_sm <= 75 && !(is_bfloat16<T> && k.math == Math::kTensorCore);
  const int before_clusters = turing ? 75 : 80;
  test_forced<T>(rough, name, before_clusters, tf32);
  test_forced<T>(small, name + ":3", before_clusters, tf32);
  test_forced<T>(smooth, name + ":2", before_clusters, tf32);
  test_forced<T>(tiny, name, before_clusters, tf32);
  if (k.last_sm < 90) return;
  test_forced<T>(smooth, name + ":4", 90, tf32);
  test_forced<T>(small, name + ":3", 90, tf32);
  test_forced<T>(deep, name + ":8", 90, tf32);
}

// What tf32 makes of numbers that it does not have. The largest one becomes an infinity; where TMA rounds, of which no
// GPU has said yet how, it may stay what it was.
TEST(forward_tf32_infinities) {
  using Limits = std::numeric_limits<float>;
  test_infinities("tf32_64x64", forced_launch("tf32_64x64", true), Limits::infinity());
  for (const char* name : {"wgmma_tf32_128x64", "wgmma_tf32_128x256"}) {
    test_infinities(name, forced_launch(name, true), Limits::quiet_NaN());
  }
}

// Every operand is rounded before the tensor cores cut it off.
void test_wgmma_rounds(const std::string& name) {
  constexpr int kSize = 8;
  const std::vector<float> v(kSize * kSize, 1 + 0x1.8p-11f);  // nearest in tf32: 1 + 2^-10
  std::vector<float> output(kSize * kSize);
  ForwardParams<float> p{};
  p.input = p.hx = p.weights.weight_ih = p.weights.weight_hh = {v.data(), kSize};
  p.output = output.data();
  p.batch = p.weights.input_size = p.weights.hidden_size = kSize;
  p.weights.nonlinearity = Nonlinearity::kRelu;
  CHECK(forced_launch(name, true)(p) == cudaSuccess);
  const float expected = 2 * kSize * (1 + 0x1p-10f) * (1 + 0x1p-10f);
  for (const float got : output) {
    if (got == expected) continue;
    check::report("%s: output is %.9g, expected %.9g", name.c_str(), got, expected);
    break;
  }
}

// What kernels.h has no row for: fp32 where tf32 is allowed.
void test_wgmma_tf32(const std::string& name, int most_splits) {
  test_wgmma_rounds(name);
  for (const Case& c : aligned_cases()) {
    const auto launch = [&](const ForwardParams<float>& p) {
      return forced_launch(name, true, {90, 2 + static_cast<int>(emu::options.seed % 2)})(p);  // several tiles a block
    };
    test_forward<float>(name.c_str(), c, launch, kTf32ProductUnit);
  }
  const Case deep = {130, 100, 72, Layout::kAlignedRows, Nonlinearity::kTanh, true, true};
  for (int splits = 2; splits <= most_splits; splits *= 2) {
    test_forced<float>(deep, name + ":" + std::to_string(splits), 90, /*tf32=*/true);
  }
}

const bool registered_by_name = [] {
  check::tests().push_back(
      {"forward_gemv", [] { check::for_each_dtype([](auto zero) { test_gemv<decltype(zero)>(); }); }});
  check::tests().push_back(
      {"forward_cublas", [] { check::for_each_dtype([](auto zero) { test_cublas<decltype(zero)>(); }); }});
  static std::vector<std::string> names;  // for check::Test, which keeps a pointer
  for (const ForwardTiledKernel& k : kForwardTiled) {
    const std::string name = std::string("forward_") + k.name;
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  for (const ForwardWgmmaKernel& k : kForwardWgmma) {
    if (k.math == Math::kTf32) names.push_back(std::string("forward_") + k.name);
  }
  for (const std::string& name : names) {
    check::tests().push_back({name.c_str(), [&name] {
                                for (const ForwardTiledKernel& k : kForwardTiled) {
                                  if (std::string("forward_") + k.name != name) continue;
                                  check::for_each_dtype([&k](auto zero) { test_tiled<decltype(zero)>(k); });
                                }
                                for (const ForwardWgmmaKernel& k : kForwardWgmma) {
                                  if (std::string("forward_") + k.name == name) test_wgmma_tf32(k.name, k.most_splits);
                                }
                              }});
  }
  return true;
}();

// One test a kernel of kernels.h, over all dtypes.
const bool registered = [] {
#if !defined(EMU_ASAN) && !defined(EMU_TSAN)  // numbers are the same there, and long in coming
  check::tests().push_back({"forward_split_products", &test_split_products});
#endif
  check::tests().push_back({"forward_split_infinities", &test_split_infinities});
  for (size_t i = 0; i < std::size(kForwardKernels<float>); ++i) {
    if (kForwardKernels<float>[i].takes == nullptr) continue;
    check::tests().push_back({kForwardKernels<float>[i].name, [i] {
                                check::for_each_dtype([i](auto zero) { test_aligned_forward<decltype(zero)>(i); });
                              }});
  }
  for (size_t i = 0; i < std::size(kBackwardKernels<float>); ++i) {
    check::tests().push_back({kBackwardKernels<float>[i].name, [i] {
                                check::for_each_dtype([i](auto zero) { test_all_backward<decltype(zero)>(i); });
                              }});
  }
  return true;
}();

}  // namespace

int main(int argc, char** argv) { return check::run_all(argc, argv); }
