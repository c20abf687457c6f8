// Every kernel of a recurrence on the host runtime, step by step against a float64 loop that starts from what the
// kernel stored of the step before: padded, packed and ragged data, in buffers of exact size, with NaN in every gap and
// in every row that a step does not have.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "check.h"
#include "kernels.h"
#include "operands.h"

namespace {

using namespace rnn_ext;
using namespace rnn_ext::cuda;
using check::Dtype;
using check::Expected;
using check::is_16_bit;
using check::Layout;
using check::Operand;
using check::Result;

enum class Data { kTimeFirst, kBatchFirst, kPacked, kLengths, kLengthsBatchFirst, kJagged };

struct Case {
  int64_t steps, batch, hidden_size;
  Data data;
  int padding;  // elements between rows
  Layout weight;
  Nonlinearity nonlinearity;
  bool reverse, hx;
  int wanted = 7;  // backward, a bit each: grad_output, grad_h_n, grad_hx

  std::string name() const {
    char text[160];
    std::snprintf(text, sizeof text, "T=%d B=%d H=%d data %d padding %d U %d f %d%s%s wanted %d", int(steps),
                  int(batch), int(hidden_size), int(data), padding, int(weight), int(nonlinearity),
                  reverse ? " reverse" : "", hx ? " hx" : "", wanted);
    return text;
  }
};

// ---- data -----------------------------------------------------------------------------------------------------------

// The tables of a case, in buffers of exact size.
class Tables {
 public:
  explicit Tables(const Case& c) : rows_(c.steps * c.batch) {
    steps_ = {c.steps, c.batch};
    if (c.data == Data::kTimeFirst || c.data == Data::kBatchFirst) return;
    std::vector<int64_t> lengths(c.batch), order(c.batch);
    for (int64_t b = 0; b < c.batch; ++b) {
      lengths[b] = c.data == Data::kPacked ? std::max<int64_t>(1, c.steps - b) : (b * 7 + 2) % (c.steps + 1);
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    steps_.steps = c.batch > 0 ? lengths[order[0]] : 0;
    counts_.reset(new int64_t[steps_.steps]);
    begins_.reset(new int64_t[steps_.steps]);
    int64_t rows = 0;
    for (int64_t t = 0; t < steps_.steps; ++t) {
      begins_[t] = rows;
      counts_[t] = std::count_if(lengths.begin(), lengths.end(), [&](int64_t length) { return length > t; });
      rows += counts_[t];
    }
    steps_.counts = counts_.get();
    if (c.data == Data::kPacked) {
      rows_ = rows;
      steps_.begins = begins_.get();
    } else {
      order_.reset(new int64_t[c.batch]);
      std::copy(order.begin(), order.end(), order_.get());
      steps_.order = order_.get();
      if (c.data != Data::kJagged) return;
      rows_ = rows;
      firsts_.reset(new int64_t[c.batch]);
      for (int64_t b = 0; b < c.batch; ++b) {
        firsts_[b] = std::accumulate(lengths.begin(), lengths.begin() + order[b], int64_t{0});
      }
      steps_.firsts = firsts_.get();
    }
  }

  const Steps& steps() const { return steps_; }
  int64_t rows() const { return rows_; }

 private:
  Steps steps_{};
  int64_t rows_;
  std::unique_ptr<int64_t[]> counts_, begins_, order_, firsts_;
};

// Rows of a case's data: NaN, or random where a step has them.
template <typename T>
class Buffer {
 public:
  Buffer(const Case& c, const Tables& tables, int col_stride = 1) : tables_(tables), size_(c.hidden_size) {
    const int64_t row = size_ * col_stride + c.padding;
    const bool batch_first = c.data == Data::kBatchFirst || c.data == Data::kLengthsBatchFirst;
    const bool flat = c.data == Data::kPacked || c.data == Data::kJagged;
    rows_.step_stride = flat || batch_first ? row : row * c.batch;
    rows_.row_stride = batch_first ? row * c.steps : row;
    rows_.col_stride = col_stride;
    elements_ = tables.rows() > 0 ? (tables.rows() - 1) * row + (size_ - 1) * col_stride + 1 : 0;
    storage_.reset(new T[elements_]);
    rows_.data = storage_.get();
    clear();
  }

  void clear() {
    for (int64_t i = 0; i < elements_; ++i) storage_[i] = Dtype<T>::from(std::numeric_limits<double>::quiet_NaN());
  }
  void fill(check::Random& random) {
    for_each([&](int64_t t, int64_t b) {
      for (int64_t n = 0; n < size_; ++n) *at(t, b, n) = Dtype<T>::from(random.uniform());
    });
  }
  double operator()(int64_t t, int64_t b, int64_t n) const { return Dtype<T>::to(*at(t, b, n)); }
  const Rows<T>& rows() const { return rows_; }
  Rows<const T> const_rows() const { return {rows_.data, rows_.step_stride, rows_.row_stride, rows_.col_stride}; }

  // How many elements are no NaN.
  int64_t written() const {
    return std::count_if(storage_.get(), storage_.get() + elements_,
                         [](const T& v) { return !std::isnan(Dtype<T>::to(v)); });
  }
  bool same_bits(const std::vector<T>& other) const {
    return elements_ == 0 || std::memcmp(other.data(), storage_.get(), elements_ * sizeof(T)) == 0;
  }
  std::vector<T> copy() const { return {storage_.get(), storage_.get() + elements_}; }

 private:
  const Tables& tables_;
  int64_t size_, elements_;
  std::unique_ptr<T[]> storage_;
  Rows<T> rows_;

  T* at(int64_t t, int64_t b, int64_t n) const { return rows_.at(tables_.steps(), t, b) + n * rows_.col_stride; }

  template <typename F>
  void for_each(F f) const {
    for (int64_t t = 0; t < tables_.steps().steps; ++t) {
      for (int64_t b = 0; b < tables_.steps().count(t); ++b) f(t, b);
    }
  }
};

// The step before t in the order of the steps, for row b; -1 if there is none.
int64_t step_before(const Steps& s, bool reverse, int64_t t, int64_t b) {
  const int64_t before = reverse ? t + 1 : t - 1;
  return before < 0 || before >= s.steps || b >= s.count(before) ? -1 : before;
}

int64_t live_elements(const Case& c, const Steps& s) {
  int64_t rows = 0;
  for (int64_t t = 0; t < s.steps; ++t) rows += s.count(t);
  return rows * c.hidden_size;
}

template <typename T>
void expect(const char* kernel, const Case& c, int seed, const char* what, int64_t t, int64_t b, int64_t n, double got,
            const Expected& expected) {
  if (std::fabs(got - expected.value) <= expected.tolerance<T>(false)) return;
  throw std::runtime_error(std::string(kernel) + "<" + Dtype<T>::name + ">, " + c.name() + ", seed " +
                           std::to_string(seed) + ": " + what + " of step " + std::to_string(t) + ", row " +
                           std::to_string(b) + ", column " + std::to_string(n) + " is " + std::to_string(got) +
                           ", expected " + std::to_string(expected.value));
}

void expect_written(const char* kernel, const Case& c, int64_t got, int64_t expected) {
  if (got == expected) return;
  throw std::runtime_error(std::string(kernel) + ", " + c.name() + ": " + std::to_string(got) +
                           " elements are written, expected " + std::to_string(expected));
}

// ---- the two passes -------------------------------------------------------------------------------------------------

template <typename T>
void test_forward(const RecurrenceKernel<T>& kernel, const Case& c) {
  check::Random random(static_cast<uint32_t>(c.batch * 7 + c.steps * 3 + c.hidden_size));
  const int64_t H = c.hidden_size;
  const Tables tables(c), device_tables(c);
  const Steps& steps = tables.steps();
  Buffer<Accumulator<T>> z(c, tables);
  z.fill(random);
  const Operand<T> U(H, H, c.weight, random), hx(c.batch, H, c.weight, random);
  Buffer<T> output(c, tables);
  Result<T> h_n(c.batch * H);

  RecurrenceForwardParams<T> p{};
  p.steps = device_tables.steps();
  p.reverse = c.reverse;
  p.weight_hh = U.matrix();
  p.hidden_size = H;
  p.nonlinearity = c.nonlinearity;
  p.z = z.const_rows();
  if (c.hx) p.hx = hx.matrix();
  p.output = output.rows();
  p.h_n = h_n.data();
  std::vector<T> first;
  check::for_each_seed([&](int seed) {
    output.clear();
    h_n.clear();
    CHECK(kernel.forward(p, steps) == cudaSuccess);
    expect_written(kernel.name, c, output.written(), live_elements(c, steps));
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t place = steps.place(b);
      int64_t last = -1;  // its own last step
      for (int64_t t = 0; t < steps.steps; ++t) {
        if (b >= steps.count(t)) continue;
        if (last < 0 || !c.reverse) last = t;
        const int64_t before = step_before(steps, c.reverse, t, b);
        for (int64_t n = 0; n < H; ++n) {
          Expected h;
          h.add(z(t, b, n));
          for (int64_t k = 0; k < H && (before >= 0 || c.hx); ++k) {
            h.add((before >= 0 ? output(before, b, k) : hx(place, k)) * U(n, k));
          }
          const double rounded_operands = h.rounded_operands<T>(kernel.product_unit);
          h.value = check::activate_reference(h.value, c.nonlinearity);
          // f's own error, as in test_kernels.cpp.
          h.magnitude += is_16_bit<T> ? std::fabs(h.value) * 0x1p-10 / check::accumulator_unit<T> / (h.terms + 4) : 1;
          h.magnitude += rounded_operands;
          expect<T>(kernel.name, c, seed, "h", t, b, n, output(t, b, n), h);
        }
      }
      for (int64_t n = 0; n < H; ++n) {
        const double expected = last >= 0 ? output(last, b, n) : c.hx ? hx(place, n) : 0;
        if (h_n[place * H + n] == expected) continue;
        check::report("%s<%s>, %s, seed %d: h_n of row %d, column %d is %g, expected %g", kernel.name, Dtype<T>::name,
                      c.name().c_str(), seed, int(b), int(n), h_n[place * H + n], expected);
        return;
      }
    }
    if (seed == 0) first = output.copy();
    if (!output.same_bits(first)) check::report("%s, %s: expected the bits of seed 0", kernel.name, c.name().c_str());
  });
}

template <typename T>
void test_backward(const RecurrenceKernel<T>& kernel, const Case& c) {
  check::Random random(static_cast<uint32_t>(c.batch * 5 + c.steps * 11 + c.hidden_size));
  const int64_t H = c.hidden_size;
  const Tables tables(c), device_tables(c);
  const Steps& steps = tables.steps();
  Buffer<T> grad_output(c, tables, c.padding > 1 ? 2 : 1), output(c, tables), grad_z(c, tables);
  grad_output.fill(random);
  output.fill(random);
  const Operand<T> U(H, H, c.weight, random), grad_h_n(c.batch, H, c.weight, random);
  Result<T> grad_hx(c.batch * H);

  RecurrenceBackwardParams<T> p{};
  p.steps = device_tables.steps();
  p.reverse = c.reverse;
  p.weight_hh = U.matrix();
  p.hidden_size = H;
  p.nonlinearity = c.nonlinearity;
  if ((c.wanted & 1) != 0) p.grad_output = grad_output.const_rows();
  if ((c.wanted & 2) != 0) p.grad_h_n = grad_h_n.matrix();
  p.output = output.const_rows();
  p.grad_z = grad_z.rows();
  p.grad_hx = (c.wanted & 4) != 0 ? grad_hx.data() : nullptr;
  std::vector<T> first;
  check::for_each_seed([&](int seed) {
    grad_z.clear();
    grad_hx.clear();
    CHECK(kernel.backward(p, steps) == cudaSuccess);
    expect_written(kernel.name, c, grad_z.written(), live_elements(c, steps));
    const auto add_product = [&](Expected& sum, int64_t t, int64_t b, int64_t n) {
      for (int64_t k = 0; k < H; ++k) sum.add(grad_z(t, b, k) * U(k, n));
    };
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t place = steps.place(b);
      int64_t first_step = -1;
      for (int64_t t = 0; t < steps.steps; ++t) {
        if (b >= steps.count(t)) continue;
        if (step_before(steps, c.reverse, t, b) < 0) first_step = t;
        const int64_t after = step_before(steps, !c.reverse, t, b);
        for (int64_t n = 0; n < H; ++n) {
          Expected dz;
          if (p.grad_output.data != nullptr) dz.add(grad_output(t, b, n));
          if (after >= 0) add_product(dz, after, b, n);
          if (after < 0 && p.grad_h_n.data != nullptr) dz.add(grad_h_n(place, n));
          const double slope = check::activate_backward_reference(1, output(t, b, n), c.nonlinearity);
          dz.magnitude += dz.rounded_operands<T>(kernel.product_unit);
          // 1 - h² may be small, but is off by the rounding of h².
          dz.magnitude = dz.magnitude * std::fabs(slope) + std::fabs(dz.value);
          dz.value *= slope;
          expect<T>(kernel.name, c, seed, "dz", t, b, n, grad_z(t, b, n), dz);
        }
      }
      for (int64_t n = 0; n < H && p.grad_hx != nullptr; ++n) {
        Expected dh;
        if (first_step >= 0) {
          add_product(dh, first_step, b, n);
          dh.magnitude += dh.rounded_operands<T>(kernel.product_unit);
        } else if (p.grad_h_n.data != nullptr) {
          dh.add(grad_h_n(place, n));
        }
        expect<T>(kernel.name, c, seed, "grad_hx", -1, b, n, grad_hx[place * H + n], dh);
      }
    }
    if (seed == 0) first = grad_z.copy();
    if (!grad_z.same_bits(first)) check::report("%s, %s: expected the bits of seed 0", kernel.name, c.name().c_str());
  });
}

// Around tiles of 16, 32 and 64, aligned and not; every other property changes from one to the next.
const Case kCases[] = {
    {3, 2, 8, Data::kTimeFirst, 0, Layout::kContiguous, Nonlinearity::kTanh, false, true},
    {1, 1, 1, Data::kTimeFirst, 0, Layout::kContiguous, Nonlinearity::kTanh, false, false},
    {3, 5, 7, Data::kBatchFirst, 0, Layout::kMisaligned, Nonlinearity::kRelu, true, true, 5},
    {4, 17, 24, Data::kPacked, 0, Layout::kContiguous, Nonlinearity::kTanh, false, true},
    {4, 6, 40, Data::kPacked, 1, Layout::kTransposed, Nonlinearity::kSigmoid, true, true, 6},
    {5, 19, 16, Data::kLengths, 0, Layout::kPaddedRows, Nonlinearity::kTanh, false, true},
    {4, 9, 33, Data::kLengthsBatchFirst, 3, Layout::kEverySecond, Nonlinearity::kRelu, true, true, 3},
    {3, 7, 72, Data::kLengths, 0, Layout::kContiguous, Nonlinearity::kTanh, true, false, 4},
    {5, 6, 24, Data::kJagged, 0, Layout::kContiguous, Nonlinearity::kTanh, false, true},
    {4, 5, 9, Data::kJagged, 2, Layout::kTransposed, Nonlinearity::kRelu, true, true, 7},
    {2, 67, 72, Data::kTimeFirst, 0, Layout::kContiguous, Nonlinearity::kTanh, true, false, 6},
    {2, 0, 5, Data::kTimeFirst, 0, Layout::kContiguous, Nonlinearity::kTanh, false, true},
    {2, 2, 140, Data::kBatchFirst, 4, Layout::kContiguous, Nonlinearity::kTanh, false, true, 2},
    {2, 1, 140, Data::kBatchFirst, 0, Layout::kContiguous, Nonlinearity::kTanh, false, true, 2},
};

template <typename T>
void test_all(size_t index) {
  const RecurrenceKernel<T>& kernel = kRecurrenceKernels<T>[index];
  if (!kernel.computes) return;
  // The largest tiles take long, and wait as smaller ones do; what is launched by default has tests by its names.
  const int seeds = check::seeds;
  if (check::contains(kernel.name, "128x128") || check::contains(kernel.name, "as_launched")) {
    check::seeds = std::min(seeds, 2);
  }
  for (const Case& c : kCases) {
    // Blocks that share U have a few rows of more than 16 as well.
    if (c.batch > 4 * kResidentMaxRows && kernel.shares_weights) continue;
    try {
      test_forward(kernel, c);
      test_backward(kernel, c);
    } catch (const std::runtime_error& error) {
      check::report("%s", error.what());
    }
  }
  check::seeds = seeds;
}

// The largest H that each row of kResident takes without sharing, where shared memory is scarce and where it is not. Of
// one more, the launch asks for more than there is.
template <typename T>
void test_resident_limits() {
  for (const ResidentKernel& k : kResident) {
    if (!k.takes(kDtype<T>) || k.sharing != Sharing::kNone) continue;
    const auto* const kernel =
        std::find_if(std::begin(kRecurrenceKernels<T>), std::end(kRecurrenceKernels<T>),
                     [&](const auto& candidate) { return candidate.name == std::string("recurrence_") + k.name; });
    for (const size_t smem : {size_t{99 * 1024}, Device().smem_per_block}) {
      Case c = {2, 3, 1, Data::kTimeFirst, 0, Layout::kContiguous, Nonlinearity::kTanh, false, true};
      while (k.fits(c.hidden_size + 1, kDtype<T>, {1}, {90, 4, smem})) ++c.hidden_size;
      emu::options.smem_limit = smem;
      test_forward(*kernel, c);
      if (k.smem_bytes(++c.hidden_size, kDtype<T>, {1}) <= smem) continue;  // its threads are too many
      const std::string error = check::error_of([&] { test_forward(*kernel, c); });
      if (!check::contains(error, "more shared memory than the limit")) check::report("%s: %s", k.name, error.c_str());
    }
  }
}

TEST(recurrence_resident_limits) {
  const int seeds = std::exchange(check::seeds, 1);
  test_resident_limits<float>();
  test_resident_limits<__half>();
  check::seeds = seeds;
}

// Steps enough for a warp without columns to fall behind: of 16 where H = 72, of 32 where it is 140.
template <typename T>
void test_idle_warps(int64_t hidden_size) {
  for (const RecurrenceKernel<T>& kernel : kRecurrenceKernels<T>) {
    if (!kernel.shares_weights || !kernel.computes) continue;
    test_forward(kernel,
                 {48, 2, hidden_size, Data::kTimeFirst, 0, Layout::kContiguous, Nonlinearity::kTanh, false, true});
  }
}

TEST(recurrence_idle_warps) {
  test_idle_warps<float>(72);
  test_idle_warps<__half>(140);
}

// Where there is no state yet, infinities of U are no matter.
template <typename T>
void test_resident_infinities() {
  const std::vector<T> infinite(4, Dtype<T>::from(std::numeric_limits<double>::infinity()));
  const std::vector<Accumulator<T>> z = {1, -1};
  for (const RecurrenceKernel<T>& kernel : kRecurrenceKernels<T>) {
    if (!check::contains(kernel.name, "resident") || !kernel.computes) continue;
    Result<T> output(2), h_n(2), grad_z(2);
    RecurrenceForwardParams<T> p{};
    p.steps = {1, 1};
    p.weight_hh = {infinite.data(), 2};
    p.hidden_size = 2;
    p.nonlinearity = Nonlinearity::kRelu;
    p.z = {z.data(), 2, 2};
    p.output = {output.data(), 2, 2};
    p.h_n = h_n.data();
    CHECK(kernel.forward(p, p.steps) == cudaSuccess);
    RecurrenceBackwardParams<T> back{};
    back.steps = p.steps;
    back.weight_hh = p.weight_hh;
    back.hidden_size = 2;
    back.nonlinearity = Nonlinearity::kTanh;
    back.output = {output.data(), 2, 2};
    back.grad_z = {grad_z.data(), 2, 2};
    CHECK(kernel.backward(back, p.steps) == cudaSuccess);
    if (output[0] == 1 && output[1] == 0 && grad_z[0] == 0 && grad_z[1] == 0) continue;
    check::report("%s: h is %g and %g, dz %g and %g, expected 1, 0, 0, 0", kernel.name, output[0], output[1], grad_z[0],
                  grad_z[1]);
  }
}

TEST(recurrence_resident_infinities) {
  test_resident_infinities<float>();
  test_resident_infinities<__half>();
}

// A launch whose blocks don't all find room is refused, and the plan does without it.
TEST(recurrence_without_room) {
  constexpr int64_t H = 40;
  const std::vector<float> U(H * H), z(2 * H);
  Result<float> output(2 * H), h_n(H);
  RecurrenceForwardParams<float> p{};
  p.steps = {2, 1};
  p.weight_hh = {U.data(), H};
  p.hidden_size = H;
  p.z = {z.data(), H, H};
  p.output = {output.data(), H, H};
  p.h_n = h_n.data();
  const int multiprocessors = std::exchange(emu::options.multiprocessors, 0);
  for (const RecurrenceKernel<float>& kernel : kRecurrenceKernels<float>) {
    if (!check::contains(kernel.name, "grid") || !kernel.computes) continue;
    CHECK(kernel.forward(p, p.steps) == cudaErrorCooperativeLaunchTooLarge);
  }
  emu::options.multiprocessors = multiprocessors;
  for (const int64_t size : {64, 900, 1280, 2000}) {
    for (const auto dtype : {rnn_ext::cuda::Dtype::kFloat, rnn_ext::cuda::Dtype::kBFloat16}) {
      SequenceCase c{50, 16, size, dtype};
      c.whole_gpu = false;
      const SequencePlan plan = plan_sequence(c, Device(), nullptr);
      if (plan.family == SequencePlan::Family::kStepped) continue;
      CHECK(kResident[plan.kernel].sharing != Sharing::kGrid && plan.launch.parts <= kPortableClusterBlocks);
    }
  }
}

TEST(recurrence_tables) {
  for (const int64_t size : {0, 1, 480, 481, 1000}) {
    std::vector<int64_t> numbers(size);
    std::iota(numbers.begin(), numbers.end(), 7);
    const std::unique_ptr<int64_t[]> table(new int64_t[size]);
    CHECK(write_table(numbers.data(), size, table.get(), nullptr) == cudaSuccess);
    for (int64_t i = 0; i < size; ++i) {
      if (table[i] != numbers[i]) check::report("number %d is %d, expected %d", int(i), int(table[i]), int(numbers[i]));
    }
  }
}

TEST(recurrence_previous_states) {
  for (const Case& c : kCases) {
    check::Random random(3);
    const Tables tables(c);
    const Steps& steps = tables.steps();
    Buffer<float> output(c, tables), previous(c, tables);
    output.fill(random);
    const Operand<float> hx(c.batch, c.hidden_size, c.weight, random);
    CHECK(previous_states(steps, c.reverse, c.hidden_size, output.const_rows(), c.hx ? hx.matrix() : Matrix<float>{},
                          previous.rows(), nullptr) == cudaSuccess);
    CHECK(previous.written() == live_elements(c, steps));
    for (int64_t t = 0; t < steps.steps; ++t) {
      for (int64_t b = 0; b < steps.count(t); ++b) {
        const int64_t before = step_before(steps, c.reverse, t, b);
        for (int64_t n = 0; n < c.hidden_size; ++n) {
          const double expected = before >= 0 ? output(before, b, n) : c.hx ? hx(steps.place(b), n) : 0;
          if (previous(t, b, n) != expected) {
            check::report("%s: step %d, row %d, column %d is %g, expected %g", c.name().c_str(), int(t), int(b), int(n),
                          previous(t, b, n), expected);
            return;
          }
        }
      }
    }
  }
}

// One test a kernel of kernels.h, over all dtypes.
const bool registered = [] {
  for (size_t i = 0; i < std::size(kRecurrenceKernels<float>); ++i) {
    check::tests().push_back({kRecurrenceKernels<float>[i].name,
                              [i] { check::for_each_dtype([i](auto zero) { test_all<decltype(zero)>(i); }); }});
  }
  return true;
}();

}  // namespace
