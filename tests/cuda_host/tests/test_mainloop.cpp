// The mainloop by itself, on the host runtime: a product of one or two segments for every engine, with the majors that
// kernels have, both ways into shared memory, every width of a copy, and an operand combined of two matrices, against a
// float64 loop. Buffers have their exact size and end with their last element; the gaps between lines hold NaN.
#include <cmath>
#include <limits>
#include <memory>
#include <string>

#include "check.h"
#include "cuda/blocks/mainloop.cuh"

namespace {

using namespace rnn_ext;
using namespace rnn_ext::cuda;

// ---- the kernel -----------------------------------------------------------------------------------------------------

// The sum of two matrices: exact where both are small integers, whatever the dtype.
template <typename T>
struct SumOperand : CombinedOperand<T> {
  __device__ Accumulator<T> combine(Accumulator<T> first, Accumulator<T> second) const { return first + second; }
};

template <class Loop, class SourceA, class SourceB>
__global__ void __launch_bounds__(Loop::Shape::kThreads)
    multiply(Segment<SourceA, SourceB> first, Segment<SourceA, SourceB> second, int64_t rows, int64_t columns,
             double* out, double* row_sums) {
  using Smem = typename Loop::Smem;
  static_assert(sizeof(Smem) <= 227 * 1024, "fits");
  RNN_EXT_SMEM(Smem, smem);
  using Acc = typename Loop::Acc;
  using Shape = typename Loop::Shape;
  const TileBounds tile = {blockIdx.x * int64_t{Shape::BM}, rows, blockIdx.y * int64_t{Shape::BN}, columns};
  typename Loop::Engine engine;
  Acc row_sum = 0;
  const int slices = Loop::slices(first.depth) + Loop::slices(second.depth);
  Loop::template run<RowSums::kOfA>(smem, engine, first, second, tile, 0, slices, &row_sum);
  Loop::put_sums(smem, engine);
  Loop::template for_each_vector<4>(0, Shape::BM, [&](int row, int column) {
    Acc sums[4] = {};
    Loop::add_sums(smem.sums, row, column, sums);
    const int64_t m = tile.m + row, n = tile.n + column;
    for (int i = 0; i < 4; ++i) {
      if (m < rows && n + i < columns) out[m * columns + n + i] = sums[i];
    }
  });
  const int64_t m = tile.m + threadIdx.x;
  if (threadIdx.x < Shape::BM && m < rows && blockIdx.y == 0) row_sums[m] = row_sum;
}

// ---- operands -------------------------------------------------------------------------------------------------------

// How the lines along the major index lie: the first one `offset` elements into an aligned buffer, the others after a
// multiple of `multiple` elements and a gap, the elements of a line `stride` apart.
struct Layout {
  int offset, multiple, gap, stride;
};

// Small integers: every product and sum is exact in every dtype, so that results are compared for equality.
template <typename T>
class Stored {
 public:
  Stored(int64_t rows, int64_t depth, Major major, const Layout& l, check::Random& random) {
    const int64_t lines = major == Major::kK ? rows : depth, length = major == Major::kK ? depth : rows;
    const int64_t line_stride = ceil_div(length * l.stride, l.multiple) * l.multiple + l.gap;
    const int offset = l.offset, stride = l.stride;
    const int64_t size = lines > 0 && length > 0 ? offset + (lines - 1) * line_stride + (length - 1) * stride + 1 : 0;
    storage_.reset(new T[size]);
    for (int64_t i = 0; i < size; ++i) storage_[i] = narrow<T>(std::numeric_limits<float>::quiet_NaN());
    matrix_ = major == Major::kK ? Matrix<T>{storage_.get() + offset, line_stride, stride}
                                 : Matrix<T>{storage_.get() + offset, stride, line_stride};
    operand_ = operand_by_rows(matrix_, rows, depth, major);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < depth; ++k) {
        storage_[&at(r, k) - storage_.get()] = narrow<T>(static_cast<float>(static_cast<int>(random.bits() % 7) - 3));
      }
    }
  }
  const Operand<T>& operand() const { return operand_; }
  double operator()(int64_t r, int64_t k) const { return static_cast<double>(widen(at(r, k))); }

 private:
  const T& at(int64_t r, int64_t k) const { return matrix_.data[r * matrix_.row_stride + k * matrix_.col_stride]; }
  std::unique_ptr<T[]> storage_;
  Matrix<T> matrix_;
  Operand<T> operand_;
};

// ---- the tests ------------------------------------------------------------------------------------------------------

template <typename T, Math kMath, class Shape, Major kMajorA, Major kMajorB, Fill kFill, bool kCombined>
void test(const char* name, int64_t rows, int64_t columns, int64_t depth1, int64_t depth2, Layout layout) {
  using SourceA = std::conditional_t<kCombined, SumOperand<T>, Operand<T>>;
  using Loop = Mainloop<Engine<T, kMath, Shape, kMajorA, kMajorB>, SourceA, Operand<T>, kFill>;
  check::Random random(static_cast<uint32_t>(rows * 31 + columns * 7 + depth1));
  const auto stored = [&](int64_t r, int64_t k, Major major) { return Stored<T>(r, k, major, layout, random); };
  const Stored<T> a1 = stored(rows, depth1, kMajorA), b1 = stored(columns, depth1, kMajorB),
                  a2 = stored(rows, depth2, kMajorA), b2 = stored(columns, depth2, kMajorB),
                  c1 = stored(rows, depth1, kMajorA), c2 = stored(rows, depth2, kMajorA);
  const auto source_a = [](const Stored<T>& a, [[maybe_unused]] const Stored<T>& c) {
    if constexpr (kCombined) {
      return SumOperand<T>{{{a.operand(), c.operand()}}};
    } else {
      return a.operand();
    }
  };
  const Segment<SourceA, Operand<T>> first{source_a(a1, c1), b1.operand(), depth1},
      second{source_a(a2, c2), b2.operand(), depth2};
  std::vector<double> expected(rows * columns), expected_sums(rows);
  for (int64_t m = 0; m < rows; ++m) {
    const auto add = [&](const Stored<T>& a, const Stored<T>& c, const Stored<T>& b, int64_t depth) {
      for (int64_t k = 0; k < depth; ++k) {
        const double v = a(m, k) + (kCombined ? c(m, k) : 0);
        expected_sums[m] += v;
        for (int64_t n = 0; n < columns; ++n) expected[m * columns + n] += v * b(n, k);
      }
    };
    add(a1, c1, b1, depth1);
    add(a2, c2, b2, depth2);
  }
  std::vector<double> out(rows * columns), sums(rows);
  check::for_each_seed([&](int seed) {
    std::fill(out.begin(), out.end(), std::nan(""));
    std::fill(sums.begin(), sums.end(), std::nan(""));
    const dim3 grid(static_cast<unsigned>(ceil_div(rows, Shape::BM)),
                    static_cast<unsigned>(ceil_div(columns, Shape::BN)));
    CHECK(RNN_EXT_LAUNCH((multiply<Loop, SourceA, Operand<T>>), grid, dim3(Shape::kThreads),
                         sizeof(typename Loop::Smem), nullptr, first, second, rows, columns, out.data(),
                         sums.data()) == cudaSuccess);
    for (size_t i = 0; i < out.size(); ++i) {
      if (!(out[i] == expected[i])) {
        check::report("%s, %dx%d, k %d + %d, seed %d: [%zu] is %g, expected %g", name, int(rows), int(columns),
                      int(depth1), int(depth2), seed, i, out[i], expected[i]);
        break;
      }
    }
    for (size_t i = 0; i < sums.size(); ++i) {
      if (!(sums[i] == expected_sums[i])) {
        check::report("%s, seed %d: the sum of row %zu is %g, expected %g", name, seed, i, sums[i], expected_sums[i]);
        break;
      }
    }
  });
}

// 16-bit elements that are not even 4-byte aligned can't go by cp.async.
template <typename T, Math kMath, class Shape, Fill kFill, bool kCombined, Major kMajorA, Major kMajorB>
void test_majors(const char* name) {
  constexpr int k16 = 16 / sizeof(T), k8 = sizeof(T) < 8 ? 8 / sizeof(T) : 1, k4 = sizeof(T) < 4 ? 2 : 1;
  constexpr bool kOnlyVectors = kFill == Fill::kAsync && sizeof(T) == 2;
  const Layout aligned16 = {0, k16, 0, 1}, aligned8 = {k8, k8, k16, 1}, aligned4 = {k4, k4, 3 * k4, 1};
  const Layout odd = kOnlyVectors ? aligned4 : Layout{1, 1, 1, 1},
               strided = kOnlyVectors ? aligned8 : Layout{0, 1, 1, 2};
  constexpr int M = Shape::BM, N = Shape::BN, K = Shape::BK;
  const auto run = test<T, kMath, Shape, kMajorA, kMajorB, kFill, kCombined>;
  run(name, M + 3, N + 5, 2 * K + 3, K, odd);
  run(name, M - 3, N - 6, 3 * K - 2, 2, strided);
  run(name, M, N + 8, K, 3 * K + 8, aligned16);
  run(name, M + 4, N - 8, 5, 0, aligned8);
  run(name, 1, 2, 6 * K + 1, 0, aligned16);
  run(name, 2, 3, 0, 12, aligned4);
}

// As in a forward kernel, and in the two products of a backward one, of which A may be combined.
template <typename T, Math kMath, class Shape, Fill kFill>
void test_forward(const char* name) {
  test_majors<T, kMath, Shape, kFill, false, Major::kK, Major::kK>(name);
}
template <typename T, Math kMath, class Shape, Fill kFill, bool kCombined>
void test_backward(const char* name) {
  test_majors<T, kMath, Shape, kFill, kCombined, Major::kK, Major::kRows>(name);
  test_majors<T, kMath, Shape, kFill, kCombined, Major::kRows, Major::kRows>(name);
}

template <int BM, int BN, int BK, int kWarpsM, int kWarpsN, int kGroups, int kStages>
using Warps = WarpShape<BM, BN, BK, kWarpsM, kWarpsN, kGroups, kStages, 1>;
template <int BM, int BN, int BK, int TM, int TN, int kGroups, int kStages>
using Threads = ThreadShape<BM, BN, BK, TM, TN, kGroups, kStages, 1>;

TEST(mainloop_tensor_core_half) {
  using Shape = Warps<32, 32, 32, 2, 1, 1, 3>;
  test_forward<__half, Math::kTensorCore, Shape, Fill::kAsync>("half");
  test_backward<__half, Math::kTensorCore, Shape, Fill::kAsync, false>("half");
}
TEST(mainloop_tensor_core_bfloat16_sliced) {
  test_forward<__nv_bfloat16, Math::kTensorCore, Warps<16, 64, 64, 1, 1, 2, 4>, Fill::kAsync>("bfloat16");
}
TEST(mainloop_tensor_core_half_staged) {
  test_forward<__half, Math::kTensorCore, Warps<16, 32, 32, 1, 2, 1, 2>, Fill::kStaged>("half staged");
}
TEST(mainloop_tensor_core_half_combined) {
  test_backward<__half, Math::kTensorCore, Warps<32, 32, 32, 1, 2, 1, 3>, Fill::kAsync, true>("half combined");
}
TEST(mainloop_tf32) { test_forward<float, Math::kTf32, Warps<32, 32, 32, 1, 2, 1, 3>, Fill::kAsync>("tf32"); }
TEST(mainloop_tensor_core_double) {
  using Shape = Warps<32, 16, 16, 2, 1, 1, 3>;
  test_forward<double, Math::kTensorCore, Shape, Fill::kAsync>("double");
  test_backward<double, Math::kTensorCore, Shape, Fill::kAsync, false>("double");
}
TEST(mainloop_tensor_core_double_combined) {
  test_backward<double, Math::kTensorCore, Warps<16, 32, 16, 1, 1, 2, 2>, Fill::kAsync, true>("double combined");
}
TEST(mainloop_simt_float) {
  using Shape = Threads<32, 64, 16, 8, 8, 2, 3>;
  test_forward<float, Math::kSimt, Shape, Fill::kAsync>("float");
  test_backward<float, Math::kSimt, Shape, Fill::kAsync, false>("float");
}
TEST(mainloop_simt_float_combined) {
  test_backward<float, Math::kSimt, Threads<16, 32, 8, 4, 4, 1, 2>, Fill::kAsync, true>("float combined");
}
TEST(mainloop_simt_float_staged) {
  test_forward<float, Math::kSimt, Threads<16, 64, 16, 4, 4, 2, 2>, Fill::kStaged>("float staged");
}
TEST(mainloop_simt_bfloat16) {
  test_forward<__nv_bfloat16, Math::kSimt, Threads<16, 32, 16, 4, 4, 1, 2>, Fill::kStaged>("simt bfloat16");
}
TEST(mainloop_simt_double) {
  test_forward<double, Math::kSimt, Threads<16, 32, 8, 4, 4, 1, 2>, Fill::kStaged>("simt double");
}

}  // namespace
