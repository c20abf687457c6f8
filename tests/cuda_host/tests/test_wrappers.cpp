// The host runtime and every wrapper of ptx*.cuh, one test each, against plain arithmetic.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <thread>

#include "check.h"
#include "cuda/ptx/ptx_sm90.cuh"
#include "cuda/ptx/tensor_map.cuh"

namespace {

using namespace rnn_ext::cuda;
using check::contains;
using check::error_of;
using check::for_each_seed;

constexpr unsigned kAll = 0xffffffffu;

template <typename T, size_t n>
struct Array {
  T v[n];
};

// ---- threads, barriers ----------------------------------------------------------------------------------------------

__global__ void write_indices(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * static_cast<int>(blockDim.x * blockDim.y * blockDim.z) + thread] = block * 1000 + thread;
}

TEST(every_thread_runs_once) {
  for_each_seed([](int) {
    std::vector<int> out(2 * 3 * 2 * 40, -1);
    RNN_EXT_LAUNCH(write_indices, dim3(2, 3, 2), dim3(5, 4, 2), 0, nullptr, out.data());
    for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == static_cast<int>(i / 40 * 1000 + i % 40));
  });
}

__global__ void reverse(const int* in, int* out) {
  using Smem = Array<int, 96>;
  RNN_EXT_SMEM(Smem, s);
  for (int round = 0; round < 3; ++round) {
    s.v[threadIdx.x] = in[threadIdx.x] + round;
    __syncthreads();
    out[round * 96 + threadIdx.x] = s.v[95 - threadIdx.x];
    __syncthreads();
  }
}

TEST(syncthreads_orders_shared_memory) {
  std::vector<int> in(96);
  std::iota(in.begin(), in.end(), 0);
  for_each_seed([&](int) {
    std::vector<int> out(3 * 96);
    RNN_EXT_LAUNCH(reverse, dim3(1), dim3(96), sizeof(int) * 96, nullptr, in.data(), out.data());
    for (int i = 0; i < 3 * 96; ++i) CHECK(out[i] == 95 - i % 96 + i / 96);
  });
}

__global__ void count_votes(int* out) {
  for (int i = 0; i < 3; ++i) {
    out[threadIdx.x] += __syncthreads_count(static_cast<int>(threadIdx.x) < 10 * i);
    out[threadIdx.x] += 1000 * __syncthreads_or(threadIdx.x == 63 && i == 1);
    out[threadIdx.x] += 10000 * __syncthreads_and(threadIdx.x != 5 || i == 2);
  }
}

TEST(syncthreads_votes) {
  for_each_seed([](int) {
    std::vector<int> out(64);
    RNN_EXT_LAUNCH(count_votes, dim3(1), dim3(64), 0, nullptr, out.data());
    for (int v : out) CHECK(v == 0 + 10 + 20 + 1000 + 10000);
  });
}

// Warps 0 and 1 produce, warps 2 and 3 consume; only consumers wait.
__global__ void produce_consume(int* out) {
  using Smem = Array<int, 64>;
  RNN_EXT_SMEM(Smem, s);
  if (threadIdx.x < 64) {
    s.v[threadIdx.x] = static_cast<int>(threadIdx.x);
    ptx::named_barrier_arrive(3, 128);
  } else {
    ptx::named_barrier_sync(3, 128);
    out[threadIdx.x - 64] = s.v[127 - threadIdx.x];
  }
}

TEST(named_barrier) {
  for_each_seed([](int) {
    std::vector<int> out(64);
    RNN_EXT_LAUNCH(produce_consume, dim3(1), dim3(128), 256, nullptr, out.data());
    for (int i = 0; i < 64; ++i) CHECK(out[i] == 63 - i);
  });
}

// ---- warps ----------------------------------------------------------------------------------------------------------

__global__ void shuffles(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int* const mine = out + lane * 7;
  mine[0] = __shfl_sync(kAll, lane, 5);
  mine[1] = __shfl_sync(kAll, lane, lane + 9, 8);
  mine[2] = __shfl_xor_sync(kAll, lane, 6);
  mine[3] = __shfl_up_sync(kAll, lane, 3);
  mine[4] = __shfl_down_sync(kAll, lane, 3);
  mine[5] = __shfl_down_sync(kAll, lane, 3, 16);
  mine[6] = static_cast<int>(__shfl_xor_sync(kAll, lane * 0.5, 1) * 2);
}

TEST(shuffles_move_values) {
  for_each_seed([](int) {
    std::vector<int> out(32 * 7);
    RNN_EXT_LAUNCH(shuffles, dim3(1), dim3(32), 0, nullptr, out.data());
    for (int l = 0; l < 32; ++l) {
      const int* mine = &out[l * 7];
      CHECK(mine[0] == 5);
      CHECK(mine[1] == l / 8 * 8 + (l + 9) % 8);
      CHECK(mine[2] == (l ^ 6));
      CHECK(mine[3] == (l < 3 ? l : l - 3));
      CHECK(mine[4] == (l + 3 < 32 ? l + 3 : l));
      CHECK(mine[5] == (l % 16 + 3 < 16 ? l + 3 : l));
      CHECK(mine[6] == (l ^ 1));
    }
  });
}

__global__ void votes(unsigned* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane * 3] = __ballot_sync(kAll, lane % 3 == 0);
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  out[lane * 3 + 1] = __any_sync(half, lane == 20);
  out[lane * 3 + 2] = __all_sync(half, lane < 16);
}

TEST(votes_respect_the_mask) {
  for_each_seed([](int) {
    std::vector<unsigned> out(32 * 3);
    RNN_EXT_LAUNCH(votes, dim3(1), dim3(32), 0, nullptr, out.data());
    for (unsigned l = 0; l < 32; ++l) {
      CHECK(out[l * 3] == 0x49249249u);
      CHECK(out[l * 3 + 1] == (l >= 16));
      CHECK(out[l * 3 + 2] == (l < 16));
    }
  });
}

__global__ void stage_in_warp(int* out) {
  using Smem = Array<int, 32>;
  RNN_EXT_SMEM(Smem, s);
  s.v[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = s.v[31 - threadIdx.x];
}

TEST(syncwarp_orders_shared_memory) {
  for_each_seed([](int) {
    std::vector<int> out(32);
    RNN_EXT_LAUNCH(stage_in_warp, dim3(1), dim3(32), 128, nullptr, out.data());
    for (int i = 0; i < 32; ++i) CHECK(out[i] == 31 - i);
  });
}

__global__ void partial_warp(int* out) {
  int v = static_cast<int>(threadIdx.x);
  for (int d = 16; d > 0; d /= 2) v = max(v, __shfl_xor_sync(kAll, v, d));
  out[threadIdx.x] = v;
}

TEST(lanes_a_block_does_not_have_do_not_block_a_warp) {
  std::vector<int> out(40);
  RNN_EXT_LAUNCH(partial_warp, dim3(1), dim3(40), 0, nullptr, out.data());
  CHECK(out[0] == 31);
}

// ---- atomics and order between blocks -------------------------------------------------------------------------------

__global__ void add_atomically(int* sum, float* fsum, unsigned* highest) {
  atomicAdd(sum, 2);
  atomicAdd(fsum, 0.5f);
  atomicMax(highest, blockIdx.x * blockDim.x + threadIdx.x);
}

TEST(atomics) {
  for_each_seed([](int) {
    int sum = 0;
    float fsum = 0;
    unsigned highest = 0;
    RNN_EXT_LAUNCH(add_atomically, dim3(3), dim3(64), 0, nullptr, &sum, &fsum, &highest);
    CHECK(sum == 2 * 192);
    CHECK(fsum == 96.f);
    CHECK(highest == 191);
  });
}

// Every block writes its partial sums; the last one to count adds them up.
__global__ void last_block_reduces(uint32_t* counter, int* partial, int* out) {
  using Smem = Array<bool, 1>;
  RNN_EXT_SMEM(Smem, is_last);
  partial[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<int>(blockIdx.x + threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) is_last.v[0] = ptx::atomic_inc_acq_rel(counter, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!is_last.v[0]) return;
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b * blockDim.x + threadIdx.x];
  out[threadIdx.x] = sum;
}

TEST(last_block_sees_what_the_others_wrote) {
  for_each_seed([](int) {
    uint32_t counter = 0;
    std::vector<int> partial(5 * 64), out(64);
    RNN_EXT_LAUNCH(last_block_reduces, dim3(5), dim3(64), 1, nullptr, &counter, partial.data(), out.data());
    CHECK(counter == 0);
    for (int i = 0; i < 64; ++i) CHECK(out[i] == 5 * i + 10);
  });
}

// A barrier of the whole grid out of the release/acquire wrappers.
__global__ void pass_along(uint32_t* counter, uint32_t* flag, int* data, int* out) {
  data[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<int>(blockIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (blockIdx.x % 2 == 0) {
      ptx::red_add_release(counter, 1);
    } else {
      ptx::atomic_add_acq_rel(counter, 1);
    }
    ptx::wait_at_least(counter, gridDim.x);
    if (blockIdx.x == 0) ptx::st_release(flag, 7);
    ptx::wait_at_least(flag, 7);
  }
  __syncthreads();
  const unsigned next = (blockIdx.x + 1) % gridDim.x;
  out[blockIdx.x * blockDim.x + threadIdx.x] = data[next * blockDim.x + threadIdx.x];
}

TEST(resident_blocks_wait_for_each_other) {
  for_each_seed([](int) {
    emu::options.resident_blocks = 0;
    uint32_t counter = 0, flag = 0;
    std::vector<int> data(4 * 32), out(4 * 32);
    RNN_EXT_LAUNCH(pass_along, dim3(4), dim3(32), 0, nullptr, &counter, &flag, data.data(), out.data());
    for (int i = 0; i < 4 * 32; ++i) CHECK(out[i] == (i / 32 + 1) % 4);
  });
}

TEST(cooperative_blocks_wait_for_each_other) {
  for_each_seed([](int) {
    uint32_t counter = 0, flag = 0;
    std::vector<int> data(12 * 32), out(12 * 32);
    if (RNN_EXT_PLANTED(not_cooperative)) {
      RNN_EXT_LAUNCH(pass_along, dim3(12), dim3(32), 0, nullptr, &counter, &flag, data.data(), out.data());
    } else {
      CHECK(RNN_EXT_LAUNCH_COOPERATIVE(pass_along, dim3(12), dim3(32), 0, nullptr, &counter, &flag, data.data(),
                                       out.data()) == cudaSuccess);
    }
    for (int i = 0; i < 12 * 32; ++i) CHECK(out[i] == (i / 32 + 1) % 12);
  });
}

__global__ void count_threads(int* count) { atomicAdd(count, 1); }

TEST(cooperative_launches_have_room_or_say_so) {
  emu::options.multiprocessors = 2;
  const auto fits = [](unsigned blocks, unsigned threads, size_t smem) {
    int count = 0;
    const cudaError_t e = RNN_EXT_LAUNCH_COOPERATIVE(count_threads, dim3(blocks), dim3(threads), smem, nullptr, &count);
    CHECK(e == cudaSuccess || e == cudaErrorCooperativeLaunchTooLarge);
    CHECK(count == (e == cudaSuccess ? static_cast<int>(blocks * threads) : 0));
    CHECK(cudaGetLastError() == cudaSuccess);
    return e == cudaSuccess;
  };
  CHECK(fits(2, 32, 227 * 1024) && !fits(3, 32, 227 * 1024));
  CHECK(fits(4, 32, 113 * 1024) && !fits(5, 32, 113 * 1024));  // each has 1 KiB more than it asks for
  CHECK(fits(2, 32, 113 * 1024 + 1) && !fits(3, 32, 113 * 1024 + 1));
  CHECK(fits(4, 1024, 0) && !fits(5, 1024, 0));
  CHECK(fits(4, 673, 0) && !fits(5, 673, 0));  // in whole warps
  CHECK(fits(64, 1, 0) && !fits(65, 1, 0));
  const auto error = [&](unsigned blocks, unsigned threads, size_t smem) {
    return error_of([&] { fits(blocks, threads, smem); });
  };
  CHECK(contains(error(0, 32, 0), "the grid is empty"));
  CHECK(contains(error(1, 32, 228 * 1024), "more shared memory than the limit"));
  emu::options.multiprocessors = 132;
  CHECK(contains(error(132, 256, 0), "too many threads to be resident all at once"));
}

// ---- cp.async -------------------------------------------------------------------------------------------------------

template <int kBytes>
__global__ void copy_async(const char* in, char* out, int size) {
  using Smem = Array<char, 64 * kBytes>;
  RNN_EXT_SMEM(Smem, s);
  const int at = static_cast<int>(threadIdx.x) * kBytes;
  const int valid = max(0, min(kBytes, size - at));
  ptx::cp_async<kBytes>(&s.v[at], valid > 0 ? in + at : in, valid);
  ptx::cp_async_commit();
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  for (int i = 0; i < kBytes; ++i) out[threadIdx.x * kBytes + i] = s.v[63 * kBytes - at + i];
}

template <int kBytes>
void test_copy_async(int size) {
  // 16-byte aligned, and of exact size: AddressSanitizer would see a read past `size`.
  std::vector<char> in(size), out(64 * kBytes);
  for (int i = 0; i < size; ++i) in[i] = static_cast<char>(i % 100 + 1);
  RNN_EXT_LAUNCH(copy_async<kBytes>, dim3(1), dim3(64), 64 * kBytes, nullptr, in.data(), out.data(), size);
  for (int i = 0; i < 64 * kBytes; ++i) {
    const int from = (63 - i / kBytes) * kBytes + i % kBytes;
    CHECK(out[i] == (from < size ? in[from] : 0));
  }
}

TEST(cp_async_copies_and_fills_with_zero) {
  for_each_seed([](int) {
    for (int size : {64 * 16, 333, 2}) test_copy_async<16>(size);
    test_copy_async<8>(300);
    test_copy_async<4>(101);
  });
}

__global__ void read_too_early(const float* in, float* out, bool wait) {
  using Smem = Array<float, 128>;
  RNN_EXT_SMEM(Smem, s);
  ptx::cp_async<16>(&s.v[threadIdx.x * 4], in + threadIdx.x * 4, 16);
  ptx::cp_async_commit();
  if (wait) ptx::cp_async_wait<0>();
  out[threadIdx.x] = s.v[threadIdx.x * 4];
  ptx::cp_async_wait<0>();
}

TEST(cp_async_has_not_arrived_before_the_wait) {
  std::vector<float> in(128, 1.f), out(32);
  emu::options.late_engines = true;
  RNN_EXT_LAUNCH(read_too_early, dim3(1), dim3(32), 512, nullptr, in.data(), out.data(), true);
  for (float v : out) CHECK(v == 1.f);
  RNN_EXT_LAUNCH(read_too_early, dim3(1), dim3(32), 512, nullptr, in.data(), out.data(), false);
  for (float v : out) CHECK(std::isnan(v));
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

template <bool kTransposed>
__global__ void load_matrices(const uint16_t* in, uint32_t* x4, uint32_t* x2) {
  using Smem = Array<uint16_t, 32 * 8>;
  RNN_EXT_SMEM(Smem, s);
  for (int i = 0; i < 8; ++i) s.v[threadIdx.x * 8 + i] = in[threadIdx.x * 8 + i];
  __syncwarp();
  uint32_t four[4], two[2];
  ptx::ldmatrix_x4<kTransposed>(four, &s.v[threadIdx.x * 8]);
  ptx::ldmatrix_x2<kTransposed>(two, &s.v[threadIdx.x % 16 * 8]);
  for (int i = 0; i < 4; ++i) x4[threadIdx.x * 4 + i] = four[i];
  for (int i = 0; i < 2; ++i) x2[threadIdx.x * 2 + i] = two[i];
}

template <bool kTransposed>
void test_load_matrices() {
  std::vector<uint16_t> in(256);
  std::iota(in.begin(), in.end(), uint16_t{100});
  std::vector<uint32_t> x4(128), x2(64);
  RNN_EXT_LAUNCH(load_matrices<kTransposed>, dim3(1), dim3(32), 512, nullptr, in.data(), x4.data(), x2.data());
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) {
      const auto at = [&](int r, int c) { return uint32_t{in[i * 64 + (kTransposed ? c * 8 + r : r * 8 + c)]}; };
      const uint32_t expected = at(l / 4, l % 4 * 2) | at(l / 4, l % 4 * 2 + 1) << 16;
      CHECK(x4[l * 4 + i] == expected);
      if (i < 2) CHECK(x2[l * 2 + i] == expected);
    }
  }
}

TEST(ldmatrix) {
  for_each_seed([](int) {
    test_load_matrices<false>();
    test_load_matrices<true>();
  });
}

// One warp multiplies A (16 x K, row-major) and B (K x 8, column-major), both as float, gathered with plain index
// arithmetic; `pack(x, y)` is what one register holds.
struct PackTf32 {
  static constexpr int K = 8;
  static __device__ uint32_t pack(float x, float) { return ptx::to_tf32(x); }
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k8_tf32(c, a, b);
  }
};
template <typename T>
struct PackHalves {
  static constexpr int K = 16;
  static __device__ uint32_t pack(float x, float y) {
    const T halves[2] = {T(x), T(y)};
    uint32_t r;
    std::memcpy(&r, halves, 4);
    return r;
  }
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16<T>(c, a, b);
  }
};

template <typename P>
__global__ void multiply(const float* A, const float* B, float* C) {
  constexpr int K = P::K;
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, k = lane % 4 * (K / 8);
  const auto from_a = [&](int r, int c) { return P::pack(A[r * K + c], c + 1 < K ? A[r * K + c + 1] : 0.f); };
  const auto from_b = [&](int r, int c) { return P::pack(B[c * K + r], r + 1 < K ? B[c * K + r + 1] : 0.f); };
  const uint32_t a[4] = {from_a(g, k), from_a(g + 8, k), from_a(g, k + K / 2), from_a(g + 8, k + K / 2)};
  const uint32_t b[2] = {from_b(k, g), from_b(k + K / 2, g)};
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = C[(g + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
  P::mma(c, a, b);
  for (int i = 0; i < 4; ++i) C[(g + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

template <typename P>
void test_multiply() {
  constexpr int K = P::K;
  // Small integers: exact in every format, so the result has to be exact too.
  check::Random random(1);
  std::vector<float> A(16 * K), B(8 * K), C(16 * 8), expected;
  for (auto* m : {&A, &B, &C}) std::generate(m->begin(), m->end(), [&] { return float(random.bits() % 17) - 8.f; });
  expected = C;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < K; ++k) expected[i * 8 + j] += A[i * K + k] * B[j * K + k];
    }
  }
  RNN_EXT_LAUNCH(multiply<P>, dim3(1), dim3(32), 0, nullptr, A.data(), B.data(), C.data());
  CHECK(C == expected);
}

TEST(mma_tf32) { test_multiply<PackTf32>(); }
TEST(mma_f16) { test_multiply<PackHalves<__half>>(); }
TEST(mma_bf16) { test_multiply<PackHalves<__nv_bfloat16>>(); }

__global__ void multiply_f64(const double* A, const double* B, double* C) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  double c[2] = {C[g * 8 + t * 2], C[g * 8 + t * 2 + 1]};
  ptx::mma_m8n8k4_f64(c, A[g * 4 + t], B[g * 4 + t]);
  C[g * 8 + t * 2] = c[0];
  C[g * 8 + t * 2 + 1] = c[1];
}

TEST(mma_f64) {
  check::Random random(2);
  std::vector<double> A(32), B(32), C(64), expected;
  for (auto* m : {&A, &B, &C}) std::generate(m->begin(), m->end(), [&] { return double(random.bits() % 1001); });
  expected = C;
  for (int i = 0; i < 64; ++i) {
    for (int k = 0; k < 4; ++k) expected[i] += A[i / 8 * 4 + k] * B[i % 8 * 4 + k];
  }
  RNN_EXT_LAUNCH(multiply_f64, dim3(1), dim3(32), 0, nullptr, A.data(), B.data(), C.data());
  CHECK(C == expected);
}

TEST(to_tf32_rounds_to_nearest) {
  CHECK(ptx::to_tf32(1.0f) == 0x3f800000u);
  CHECK(ptx::to_tf32(__uint_as_float(0x3f801000u)) == 0x3f802000u);  // a tie goes away from zero
  CHECK(ptx::to_tf32(__uint_as_float(0xbf801000u)) == 0xbf802000u);
  CHECK(ptx::to_tf32(__uint_as_float(0x3f800fffu)) == 0x3f800000u);
  CHECK(ptx::to_tf32(INFINITY) == 0x7f800000u);
  CHECK(std::isnan(__uint_as_float(ptx::to_tf32(NAN))));
}

TEST(tanh_approx_stays_within_its_error) {
  for (float x = -9.f; x < 9.f; x += 0.0371f) {
    CHECK(std::fabs(ptx::tanh_approx(x) - std::tanh(double{x})) <= 0x1p-10 * std::fabs(std::tanh(double{x})));
  }
  CHECK(ptx::tanh_approx(INFINITY) == 1.f);
  CHECK(ptx::tanh_approx(-INFINITY) == -1.f);
  CHECK(std::isnan(ptx::tanh_approx(NAN)));
}

// ---- clusters -------------------------------------------------------------------------------------------------------

// Every thread reads what its mirror image in the next block of the cluster wrote, as one T.
template <typename T>
__global__ void read_next_block(uint32_t* ranks, T* out) {
  using Smem = Array<T, 64>;
  RNN_EXT_SMEM(Smem, s);
  const uint32_t rank = ptx::cluster_rank(), size = ptx::cluster_size();
  uint32_t words[sizeof(T) / 4];
  for (uint32_t i = 0; i < sizeof(T) / 4; ++i) words[i] = blockIdx.x * 1000 + threadIdx.x * 4 + i;
  std::memcpy(&s.v[threadIdx.x], words, sizeof(T));
  if (RNN_EXT_PLANTED(relaxed_arrival)) {
    ptx::cluster_arrive_relaxed();
  } else {
    ptx::cluster_arrive();
  }
  if (!RNN_EXT_PLANTED(no_cluster_wait)) ptx::cluster_wait();
  const uint32_t address = ptx::cluster_address(&s.v[63 - threadIdx.x], (rank + 1) % size);
  out[blockIdx.x * 64 + threadIdx.x] = ptx::ld_cluster<T>(address);
  if (RNN_EXT_PLANTED(no_cluster_wait)) ptx::cluster_wait();
  if (!RNN_EXT_PLANTED(early_block_exit)) ptx::cluster_sync();
  if (threadIdx.x == 0) ranks[blockIdx.x] = rank * 10 + size;
}

template <typename T>
void test_read_next_block(unsigned cluster) {
  std::vector<uint32_t> ranks(8);
  std::vector<Array<uint32_t, sizeof(T) / 4>> out(8 * 64);
  RNN_EXT_LAUNCH_CLUSTER(read_next_block<T>, dim3(8), dim3(64), dim3(cluster), sizeof(T) * 64, nullptr, ranks.data(),
                         reinterpret_cast<T*>(out.data()));
  for (uint32_t b = 0; b < 8; ++b) {
    const uint32_t first = b / cluster * cluster, next = first + (b - first + 1) % cluster;
    CHECK(ranks[b] == (b - first) * 10 + cluster);
    for (uint32_t t = 0; t < 64; ++t) {
      for (uint32_t i = 0; i < sizeof(T) / 4; ++i) CHECK(out[b * 64 + t].v[i] == next * 1000 + (63 - t) * 4 + i);
    }
  }
}

TEST(cluster_blocks_read_each_other) {
  for_each_seed([](int) {
    test_read_next_block<float>(8);
    test_read_next_block<double>(2);
    test_read_next_block<float4>(4);
    test_read_next_block<uint32_t>(1);
  });
}

// Every thread of block r writes to its place in block 0, which adds up. Split-K, in short.
template <typename T>
__global__ void write_first_block(T* out) {
  using Smem = Array<T, 4 * 32>;
  RNN_EXT_SMEM(Smem, s);
  const uint32_t rank = ptx::cluster_rank();
  ptx::cluster_sync();
  T mine;
  uint32_t words[sizeof(T) / 4];
  for (uint32_t i = 0; i < sizeof(T) / 4; ++i) words[i] = rank * 1000 + threadIdx.x * 4 + i;
  std::memcpy(&mine, words, sizeof(T));
  ptx::st_cluster(ptx::cluster_address(&s.v[rank * 32 + threadIdx.x], 0), mine);
  ptx::cluster_sync();
  if (rank != 0) return;
  for (int r = 0; r < 4; ++r) out[r * 32 + threadIdx.x] = s.v[r * 32 + threadIdx.x];
}

template <typename T>
void test_write_first_block() {
  std::vector<Array<uint32_t, sizeof(T) / 4>> out(4 * 32);
  RNN_EXT_LAUNCH_CLUSTER(write_first_block<T>, dim3(4), dim3(32), dim3(4), sizeof(T) * 128, nullptr,
                         reinterpret_cast<T*>(out.data()));
  for (uint32_t at = 0; at < 4 * 32; ++at) {
    for (uint32_t i = 0; i < sizeof(T) / 4; ++i) CHECK(out[at].v[i] == at / 32 * 1000 + at % 32 * 4 + i);
  }
}

TEST(cluster_blocks_write_to_each_other) {
  for_each_seed([](int) {
    test_write_first_block<float>();
    test_write_first_block<double>();
    test_write_first_block<uint4>();
  });
}

__global__ void read_rank(uint32_t rank, int offset) {
  using Smem = Array<float, 4>;
  RNN_EXT_SMEM(Smem, s);
  s.v[threadIdx.x] = 0;
  ptx::cluster_sync();
  ptx::ld_cluster<float4>(ptx::cluster_address(s.v, rank) + offset);
  ptx::cluster_sync();
}

TEST(cluster_addresses_are_checked) {
  const auto launch = [](uint32_t rank, int offset) {
    return error_of(
        [&] { RNN_EXT_LAUNCH_CLUSTER(read_rank, dim3(2), dim3(4), dim3(2), sizeof(float4), nullptr, rank, offset); });
  };
  CHECK(contains(launch(2, 0), "mapa: rank 2 in a cluster of 2"));
  CHECK(contains(launch(1, 4), "outside the block's 16 bytes"));
  CHECK(contains(launch(0, -1024), "outside the block's 16 bytes"));
  CHECK(contains(launch(1, 1 << 24), "in no block's shared memory"));
}

TEST(cluster_launch_limits) {
  const auto launch = [](unsigned grid, unsigned cluster) {
    return error_of(
        [&] { RNN_EXT_LAUNCH_CLUSTER(read_rank, dim3(grid), dim3(4), dim3(cluster), sizeof(float4), nullptr, 0u, 0); });
  };
  CHECK(contains(launch(32, 32), "a cluster has 1 to 16 blocks"));
  CHECK(contains(launch(6, 4), "the grid is not a multiple of the cluster"));
}

__global__ void count_launches(int* count, bool waits) {
  ptx::let_next_launch_start();
  ptx::prefetch_to_l2(count);
  if (!waits) return;
  ptx::wait_for_previous_launch();
  if (threadIdx.x == 0) ++*count;
}

TEST(early_launches_wait_for_the_one_before) {
  for_each_seed([](int) {
    int count = 0;
    for (int i = 0; i < 3; ++i) RNN_EXT_LAUNCH_EARLY(count_launches, dim3(1), dim3(64), 0, nullptr, true, &count, true);
    CHECK(count == 3);
    CHECK(contains(
        error_of([&] { RNN_EXT_LAUNCH_EARLY(count_launches, dim3(1), dim3(64), 0, nullptr, true, &count, false); }),
        "returned without a wait for the previous launch"));
  });
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------

// Warp 0 fills a ring of two slots, warp 1 reads it: both wait for the other's phases.
__global__ void pass_through_ring(const int* in, int* out, int rounds) {
  struct Smem {
    int slot[2][32];
    uint64_t full[2], empty[2];
  };
  RNN_EXT_SMEM(Smem, s);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(&s.full[i], 32);
      ptx::mbarrier_init(&s.empty[i], 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int r = 0; r < rounds; ++r) {
    const int slot = r % 2;
    const uint32_t parity = r / 2 % 2;
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(&s.empty[slot], parity ^ 1);
      s.slot[slot][lane] = in[r * 32 + lane];
      ptx::mbarrier_arrive(&s.full[slot]);
    } else {
      ptx::mbarrier_wait(&s.full[slot], parity);
      out[r * 32 + lane] = s.slot[slot][31 - lane];
      ptx::mbarrier_arrive(&s.empty[slot]);
    }
  }
}

TEST(mbarrier_phases) {
  constexpr int kRounds = 7;
  std::vector<int> in(kRounds * 32);
  std::iota(in.begin(), in.end(), 5);
  for_each_seed([&](int) {
    std::vector<int> out(in.size());
    RNN_EXT_LAUNCH(pass_through_ring, dim3(1), dim3(64), 2 * 128 + 32, nullptr, in.data(), out.data(), kRounds);
    for (int i = 0; i < kRounds * 32; ++i) CHECK(out[i] == in[i / 32 * 32 + 31 - i % 32]);
  });
}

// Every block tells the others of the cluster that its data are there.
__global__ void arrive_at_all_blocks(int* out) {
  struct Smem {
    int data[32];
    uint64_t ready;
  };
  RNN_EXT_SMEM(Smem, s);
  const uint32_t rank = ptx::cluster_rank(), size = ptx::cluster_size();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.ready, 32 * size);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  s.data[threadIdx.x] = static_cast<int>(rank * 100 + threadIdx.x);
  for (uint32_t r = 0; r < size; ++r) {
    const uint32_t ready = ptx::cluster_address(&s.ready, r);
    if (RNN_EXT_PLANTED(arrival_without_release)) {
      ptx::mbarrier_arrive_cluster(ready);
    } else {
      ptx::mbarrier_arrive_release_cluster(ready);
    }
  }
  if (RNN_EXT_PLANTED(wait_without_acquire)) {
    ptx::mbarrier_wait(&s.ready, 0);
  } else {
    ptx::mbarrier_wait_acquire_cluster(&s.ready, 0);
  }
  out[rank * 32 + threadIdx.x] = ptx::ld_cluster<int>(ptx::cluster_address(&s.data[threadIdx.x], (rank + 1) % size));
  ptx::cluster_sync();
}

TEST(mbarrier_of_another_block) {
  for_each_seed([](int) {
    std::vector<int> out(3 * 32);
    RNN_EXT_LAUNCH_CLUSTER(arrive_at_all_blocks, dim3(3), dim3(32), dim3(3), 128 + 8, nullptr, out.data());
    for (int i = 0; i < 3 * 32; ++i) CHECK(out[i] == (i / 32 + 1) % 3 * 100 + i % 32);
  });
}

enum class Misuse { kNone, kNoInit, kMissingArrival, kTooManyArrivals, kTooManyBytes };

__global__ void misuse_mbarrier(Misuse misuse) {
  using Smem = Array<uint64_t, 2>;
  RNN_EXT_SMEM(Smem, s);
  uint64_t* const barrier = s.v;
  if (misuse != Misuse::kNoInit) ptx::mbarrier_init(barrier, misuse == Misuse::kMissingArrival ? 2 : 1);
  ptx::mbarrier_arrive_expect_tx(barrier, misuse == Misuse::kTooManyBytes ? 16 : 0);
  if (misuse == Misuse::kTooManyArrivals) {
    ptx::mbarrier_arrive_expect_tx(barrier, 16);
    ptx::mbarrier_arrive(barrier);
  }
  ptx::mbarrier_wait(barrier, 0);
}

TEST(mbarrier_misuse) {
  const auto launch = [](Misuse misuse) { RNN_EXT_LAUNCH(misuse_mbarrier, dim3(1), dim3(1), 16, nullptr, misuse); };
  launch(Misuse::kNone);
  const auto error = [&](Misuse misuse) { return error_of([&] { launch(misuse); }); };
  CHECK(contains(error(Misuse::kNoInit), "no mbarrier.init yet"));
  CHECK(contains(error(Misuse::kMissingArrival), "wait in mbarrier wait at test_wrappers.cpp:"));
  CHECK(contains(error(Misuse::kTooManyArrivals), "more arrivals than its count of 1"));
  CHECK(contains(error(Misuse::kTooManyBytes), "wait in mbarrier wait at test_wrappers.cpp:"));
}

// ---- st.async -------------------------------------------------------------------------------------------------------

// A recurrence over a cluster, in short: in every step each thread sends a T to all blocks and makes its next one of
// what has come from all of them. Of two buffers, one is read while the other is filled: whoever has got all of a step
// knows that everyone has read the step before.
constexpr uint32_t kExchangeThreads = 64;
constexpr int kExchangeSteps = 5;

template <typename T>
struct ExchangeSmem {
  T received[2][4][kExchangeThreads];
  uint64_t full[2];
};

template <typename T>
__global__ void exchange(uint32_t* out) {
  using Smem = ExchangeSmem<T>;
  RNN_EXT_SMEM(Smem, s);
  constexpr uint32_t kWords = sizeof(T) / 4;
  const uint32_t rank = ptx::cluster_rank(), size = ptx::cluster_size(), me = threadIdx.x;
  if (me == 0) {
    for (uint64_t& full : s.full) ptx::mbarrier_init(&full, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  uint32_t words[kWords];
  for (uint32_t i = 0; i < kWords; ++i) words[i] = rank * 1000 + me * 4 + i;
  for (int step = 0; step < kExchangeSteps; ++step) {
    uint64_t* const full = &s.full[step % 2];
    const uint32_t parity = step / 2 % 2;
    const int buffer = RNN_EXT_PLANTED(async_store_into_memory_in_use) ? 0 : step % 2;
    const uint32_t bytes = size * kExchangeThreads * sizeof(T);
    if (me == 0) {
      ptx::mbarrier_arrive_expect_tx(full, RNN_EXT_PLANTED(async_store_wrong_byte_count) ? bytes + 4 : bytes);
    }
    T value;
    std::memcpy(&value, words, sizeof value);
    for (uint32_t r = 0; r < size; ++r) {
      ptx::st_async(ptx::cluster_address(&s.received[buffer][rank][me], r), value, ptx::cluster_address(full, r));
    }
    if (RNN_EXT_PLANTED(async_store_wait_without_acquire)) {
      ptx::mbarrier_wait(full, parity);
    } else if (step == kExchangeSteps - 1) {
      ptx::mbarrier_wait_acquire_cluster(full, parity);
    } else if (!RNN_EXT_PLANTED(async_store_not_awaited)) {
      ptx::mbarrier_wait_acquire_shared(full, parity);
    }
    for (uint32_t& word : words) word = static_cast<uint32_t>(step);
    for (uint32_t r = 0; r < size; ++r) {
      uint32_t received[kWords];
      std::memcpy(received, &s.received[buffer][r][kExchangeThreads - 1 - me], sizeof(T));
      for (uint32_t i = 0; i < kWords; ++i) words[i] += (r + 1) * received[i];
    }
  }
  for (uint32_t i = 0; i < kWords; ++i) out[(blockIdx.x * kExchangeThreads + me) * kWords + i] = words[i];
}

template <typename T>
void test_exchange(uint32_t cluster) {
  constexpr uint32_t kWords = sizeof(T) / 4;
  const uint32_t count = cluster * kExchangeThreads * kWords;
  std::vector<uint32_t> expected(count), out(2 * count);
  for (uint32_t i = 0; i < count; ++i) {
    expected[i] = i / kWords / kExchangeThreads * 1000 + i / kWords % kExchangeThreads * 4 + i % kWords;
  }
  for (int step = 0; step < kExchangeSteps; ++step) {
    const std::vector<uint32_t> before = expected;
    for (uint32_t i = 0; i < count; ++i) {
      expected[i] = static_cast<uint32_t>(step);
      const uint32_t from = kExchangeThreads - 1 - i / kWords % kExchangeThreads;
      for (uint32_t r = 0; r < cluster; ++r) {
        expected[i] += (r + 1) * before[(r * kExchangeThreads + from) * kWords + i % kWords];
      }
    }
  }
  RNN_EXT_LAUNCH_CLUSTER(exchange<T>, dim3(2 * cluster), dim3(kExchangeThreads), dim3(cluster), sizeof(ExchangeSmem<T>),
                         nullptr, out.data());
  for (uint32_t i = 0; i < 2 * count; ++i) CHECK(out[i] == expected[i % count]);
}

TEST(async_stores_exchange_steps) {
  for_each_seed([](int) {
    test_exchange<uint32_t>(4);
    test_exchange<float2>(2);
    test_exchange<uint4>(3);
  });
}

// The second block sends to the first, which expects the bytes only after another barrier has told it of some of them.
__global__ void expect_late(uint32_t* out) {
  struct Smem {
    uint32_t received[32], told;
    uint64_t full, tell;
  };
  RNN_EXT_SMEM(Smem, s);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::mbarrier_init(&s.tell, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&s.tell, 4);
  }
  ptx::cluster_sync();
  if (ptx::cluster_rank() == 1) {
    ptx::st_async(ptx::cluster_address(&s.received[threadIdx.x], 0), threadIdx.x, ptx::cluster_address(&s.full, 0));
    __syncwarp();
    if (threadIdx.x == 0) ptx::st_async(ptx::cluster_address(&s.told, 0), 7u, ptx::cluster_address(&s.tell, 0));
    return;
  }
  ptx::mbarrier_wait_acquire_shared(&s.tell, 0);
  if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(&s.full, sizeof s.received);
  ptx::mbarrier_wait_acquire_shared(&s.full, 0);
  out[threadIdx.x] = s.received[threadIdx.x] + s.told;
}

TEST(async_stores_may_land_before_they_are_expected) {
  for_each_seed([](int) {
    std::vector<uint32_t> out(32);
    RNN_EXT_LAUNCH_CLUSTER(expect_late, dim3(2), dim3(32), dim3(2), 33 * 4 + 4 + 16, nullptr, out.data());
    for (uint32_t i = 0; i < 32; ++i) CHECK(out[i] == i + 7);
  });
}

// A thread alone stores more often than the runtime keeps operations in flight.
constexpr uint32_t kStores = 8192, kStoringThreads = 8;
struct ManyStoresSmem {
  uint4 received[kStores];
  uint64_t full;
};
__global__ void store_very_often(uint32_t* sums) {
  RNN_EXT_SMEM(ManyStoresSmem, s);
  const uint32_t peer = 1 - ptx::cluster_rank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&s.full, sizeof s.received);
  }
  ptx::cluster_sync();
  for (uint32_t i = threadIdx.x; i < kStores; i += kStoringThreads) {
    ptx::st_async(ptx::cluster_address(&s.received[i], peer), uint4{i, i, i, i}, ptx::cluster_address(&s.full, peer));
  }
  ptx::mbarrier_wait_acquire_shared(&s.full, 0);
  uint32_t sum = 0;
  for (uint32_t i = threadIdx.x; i < kStores; i += kStoringThreads) sum += s.received[i].x ^ s.received[i].w ^ i ^ 1;
  atomicAdd(sums, sum);
}

TEST(async_stores_by_the_thousand) {
  for (const bool late : {false, true}) {
    emu::options.late_engines = late;
    uint32_t sum = 0;
    RNN_EXT_LAUNCH_CLUSTER(store_very_often, dim3(2), dim3(kStoringThreads), dim3(2), sizeof(ManyStoresSmem), nullptr,
                           &sum);
    uint32_t expected = 0;
    for (uint32_t i = 0; i < kStores; ++i) expected += 2 * (i ^ 1);
    CHECK(sum == expected);
  }
}

__global__ void store_to_first_block(float* out) {
  struct Smem {
    float received[32];
    uint64_t full;
  };
  RNN_EXT_SMEM(Smem, s);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&s.full, sizeof s.received);
  }
  ptx::cluster_sync();
  if (ptx::cluster_rank() == 1) {
    ptx::st_async(ptx::cluster_address(&s.received[threadIdx.x], 0), 1.5f, ptx::cluster_address(&s.full, 0));
  } else if (!RNN_EXT_PLANTED(exit_before_async_store)) {
    ptx::mbarrier_wait_acquire_shared(&s.full, 0);
    out[threadIdx.x] = s.received[threadIdx.x];
  }
}

TEST(a_block_waits_for_async_stores_to_it) {
  for_each_seed([](int) {
    std::vector<float> out(32);
    RNN_EXT_LAUNCH_CLUSTER(store_to_first_block, dim3(2), dim3(32), dim3(2), 128 + 8, nullptr, out.data());
    for (const float v : out) CHECK(v == 1.5f);
  });
}

enum class AsyncStoreMisuse { kNone, kOffset, kBarrierOffset, kOtherBlock, kNoBlock, kNoInit };

__global__ void misuse_async_store(AsyncStoreMisuse misuse, uint32_t offset) {
  struct Smem {
    uint4 received[2];
    uint64_t full[2];
  };
  RNN_EXT_SMEM(Smem, s);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.full[0], 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&s.full[0], ptx::cluster_size() * sizeof(uint4));
  }
  ptx::cluster_sync();
  uint32_t address = ptx::cluster_address(&s.received[ptx::cluster_rank()], 0);
  uint32_t barrier = ptx::cluster_address(&s.full[misuse == AsyncStoreMisuse::kNoInit ? 1 : 0],
                                          misuse == AsyncStoreMisuse::kOtherBlock ? 1 : 0);
  if (misuse == AsyncStoreMisuse::kOffset) address += offset;
  if (misuse == AsyncStoreMisuse::kBarrierOffset) barrier += offset;
  if (misuse == AsyncStoreMisuse::kNoBlock) address += 2 << 24, barrier += 2 << 24;
  if (threadIdx.x == 0) ptx::st_async(address, uint4{}, barrier);
  if (ptx::cluster_rank() == 0) ptx::mbarrier_wait_acquire_shared(&s.full[0], 0);
}

TEST(async_stores_are_checked) {
  const auto launch = [](AsyncStoreMisuse misuse, unsigned cluster, uint32_t offset) {
    RNN_EXT_LAUNCH_CLUSTER(misuse_async_store, dim3(cluster), dim3(2), dim3(cluster), 48, nullptr, misuse, offset);
  };
  launch(AsyncStoreMisuse::kNone, 2, 0);
  const auto error = [&](AsyncStoreMisuse misuse, unsigned cluster = 2, uint32_t offset = 0) {
    const std::string message = error_of([&] { launch(misuse, cluster, offset); });
    CHECK(contains(message, "test_wrappers.cpp:"));
    return message;
  };
  CHECK(contains(error(AsyncStoreMisuse::kNone, 1), "st.async: in a cluster of one block"));
  CHECK(contains(error(AsyncStoreMisuse::kOffset, 2, 4), "st.async: misaligned, shared offset"));
  CHECK(contains(error(AsyncStoreMisuse::kOffset, 2, 48), "outside the block's 48 bytes"));
  CHECK(contains(error(AsyncStoreMisuse::kBarrierOffset, 2, 4), "st.async's mbarrier: misaligned"));
  CHECK(contains(error(AsyncStoreMisuse::kBarrierOffset, 2, 16), "outside the block's 48 bytes"));
  CHECK(contains(error(AsyncStoreMisuse::kOtherBlock), "st.async: to block 0, with a barrier of block 1"));
  CHECK(contains(error(AsyncStoreMisuse::kNoBlock), "in no block's shared memory"));
  CHECK(contains(error(AsyncStoreMisuse::kNoInit), "st.async: no mbarrier.init yet"));
}

// ---- TMA ------------------------------------------------------------------------------------------------------------

// A matrix in an allocation that ends with its last element, as AddressSanitizer likes it, and 16-byte aligned.
template <typename T>
struct TensorMatrix {
  TensorMatrix(int rows, int columns, int stride) : rows(rows), columns(columns), stride(stride) {
    v.resize((rows - 1) * stride + columns);
    for (size_t i = 0; i < v.size(); ++i) v[i] = T(static_cast<float>(static_cast<int>(i * 7 % 31) - 15));
  }
  float at(int r, int c) const {
    return r >= 0 && r < rows && c >= 0 && c < columns ? static_cast<float>(v[r * stride + c]) : 0.f;
  }
  CUtensorMap map(int box_rows) const {
    CUtensorMap m;
    encode_tensor_map(m, v.data(), rows, columns, stride, box_rows);
    return m;
  }
  int rows, columns, stride;
  std::vector<T> v;
};

template <typename T>
struct TileSmem {  // which starts at a multiple of 1024
  T tile[16 * 128 / sizeof(T)];
  uint64_t full;
};

// Where element (r, c) of a tile lies: written out from the documentation, apart from the runtime's own.
template <typename T>
__device__ int tile_index(int r, int c) {
  constexpr int kPiece = 16 / sizeof(T);
  return r * 8 * kPiece + ((c / kPiece) ^ (r % 8)) * kPiece + c % kPiece;
}

template <typename T>
__global__ void load_tile(const __grid_constant__ CUtensorMap map, int x, int y, T* out) {
  using Smem = TileSmem<T>;
  RNN_EXT_SMEM(Smem, s);
  constexpr int kColumns = 128 / sizeof(T);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map);
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&s.full, 16 * 128);
    ptx::tma_load(s.tile, &map, x, y, &s.full);
  }
  __syncthreads();
  ptx::mbarrier_wait(&s.full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 16 * kColumns; i += 32) {
    out[i] = s.tile[tile_index<T>(i / kColumns, i % kColumns)];
  }
}

template <typename T>
void test_load_tile(int rows, int columns, int stride, int x, int y) {
  const TensorMatrix<T> m(rows, columns, stride);
  constexpr int kColumns = 128 / sizeof(T);
  std::vector<T> out(16 * kColumns);
  RNN_EXT_LAUNCH(load_tile<T>, dim3(1), dim3(32), sizeof(TileSmem<T>), nullptr, m.map(16), x, y, out.data());
  for (int i = 0; i < 16 * kColumns; ++i) {
    CHECK(static_cast<float>(out[i]) == m.at(y + i / kColumns, x + i % kColumns));
  }
}

TEST(tma_load_swizzles_and_fills_with_zero) {
  for_each_seed([](int) {
    test_load_tile<__half>(40, 100, 104, 0, 0);
    test_load_tile<__half>(40, 100, 104, 64, 32);  // beyond both edges
    test_load_tile<__nv_bfloat16>(5, 3, 8, 0, 0);
    test_load_tile<float>(20, 33, 36, 32, 8);
    test_load_tile<float>(20, 33, 36, -2, -3);
    test_load_tile<float>(20, 33, 36, 64, 64);  // all of it beyond
  });
}

TEST(tma_load_rounds_to_tf32) {
  const auto bits = [](uint32_t v) { return __uint_as_float(v); };
  const uint32_t pairs[][2] = {{0x3f800000, 0x3f800000},   // 1
                               {0x3f800fff, 0x3f800000},   // below a tie
                               {0x3f801000, 0x3f800000},   // a tie
                               {0xbf803000, 0xbf804000},   // a tie
                               {0xbf801001, 0xbf802000},   // above a tie
                               {0x3fffffff, 0x40000000},   // to the next power of two
                               {0x00000fff, 0x00000000},   // subnormal
                               {0x7f7fffff, 0x7f800000},   // too large
                               {0xff800000, 0xff800000}};  // infinite
  constexpr int kCount = std::size(pairs);
  TensorMatrix<float> m(1, kCount + 1, 12);
  for (int i = 0; i < kCount; ++i) m.v[i] = bits(pairs[i][0]);
  m.v[kCount] = bits(0x7fc00001);
  const auto load = [&](CUtensorMapDataType type) {
    CUtensorMap map;
    encode_tensor_map(map, m.v.data(), 1, kCount + 1, 12, 16, type);
    std::vector<float> out(16 * 32);
    RNN_EXT_LAUNCH(load_tile<float>, dim3(1), dim3(32), sizeof(TileSmem<float>), nullptr, map, 0, 0, out.data());
    CHECK(std::isnan(out[kCount]));
    return out;
  };
  const std::vector<float> rounded = load(CU_TENSOR_MAP_DATA_TYPE_TFLOAT32);
  const std::vector<float> as_is = load(CU_TENSOR_MAP_DATA_TYPE_FLOAT32);
  for (int i = 0; i < kCount; ++i) CHECK(rounded[i] == bits(pairs[i][1]) && as_is[i] == bits(pairs[i][0]));
}

TEST(tensor_maps_that_the_driver_refuses) {
  alignas(16) static float data[64];
  CHECK(has_tensor_map(data, 4, 8, 8));
  CHECK(!has_tensor_map(data + 1, 4, 8, 8));  // base
  CHECK(!has_tensor_map(data, 4, 7, 7));      // stride
  CHECK(!has_tensor_map(data, 4, 12, 8));     // rows that overlap
  CHECK(!has_tensor_map(data, 4, 0, 8));      // empty
  CHECK(!has_tensor_map<float>(nullptr, 4, 8, 8));
  CUtensorMap map;
  encode_tensor_map(map, data, 4, 8, 8, 64);
  const auto error = [&](const float* from, int columns, int box_rows) {
    return error_of([&] { encode_tensor_map(map, from, 4, columns, columns, box_rows); });
  };
  CHECK(contains(error(data + 1, 8, 64), "cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE, of 4 rows of 8 elements"));
  CHECK(contains(error(data, 7, 64), "7 elements, 7 apart, in boxes of 64 rows"));
  CHECK(contains(error(data, 8, 257), "in boxes of 257 rows"));
}

// Such as autograd's, if nothing there has called CUDA before.
TEST(tensor_maps_in_a_thread_without_a_context) {
  std::string error;
  std::thread([&] {
    alignas(16) static float data[32];
    CUtensorMap map;
    try {
      encode_tensor_map(map, data, 4, 8, 8, 64);
    } catch (const std::runtime_error& refused) {
      error = refused.what();
    }
  }).join();
  if (!error.empty()) check::report("%s", error.c_str());
}

// Each block of the cluster loads its half of a tile of 16 rows into both.
__global__ void load_tile_multicast(const __grid_constant__ CUtensorMap map, float* out) {
  using Smem = TileSmem<float>;
  RNN_EXT_SMEM(Smem, s);
  const uint32_t rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&s.full, 16 * 128);
    ptx::tma_load_multicast(s.tile + rank * 8 * 32, &map, 0, static_cast<int>(rank) * 8, &s.full, 3);
  }
  ptx::mbarrier_wait(&s.full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 16 * 32; i += 32) {
    out[rank * 16 * 32 + i] = s.tile[tile_index<float>(i / 32, i % 32)];
  }
  ptx::cluster_sync();
}

TEST(tma_load_multicast_reaches_both_blocks) {
  for_each_seed([](int) {
    const TensorMatrix<float> m(15, 30, 32);
    std::vector<float> out(2 * 16 * 32);
    RNN_EXT_LAUNCH_CLUSTER(load_tile_multicast, dim3(2), dim3(32), dim3(2), sizeof(TileSmem<float>), nullptr, m.map(8),
                           out.data());
    for (int i = 0; i < 2 * 16 * 32; ++i) CHECK(out[i] == m.at(i / 32 % 16, i % 32));
  });
}

// Two tiles through one buffer.
__global__ void store_tiles(const __grid_constant__ CUtensorMap map, int x, int y) {
  using Smem = TileSmem<float>;
  RNN_EXT_SMEM(Smem, s);
  for (int round = 0; round < 2; ++round) {
    for (int i = static_cast<int>(threadIdx.x); i < 16 * 32; i += 32) {
      s.tile[tile_index<float>(i / 32, i % 32)] = static_cast<float>(1000 + round * 512 + i);
    }
    if (!RNN_EXT_PLANTED(no_fence_before_store)) ptx::fence_proxy_async();
    __syncwarp();
    if (ptx::elect_one()) {
      ptx::tma_store(&map, s.tile, x, y + round * 16);
      ptx::tma_store_commit();
      ptx::tma_store_wait_read<0>();
    }
    __syncwarp();
  }
}

TEST(tma_store_writes_what_is_inside) {
  for_each_seed([](int) {
    TensorMatrix<float> m(28, 40, 44);
    const TensorMatrix<float> before = m;
    RNN_EXT_LAUNCH(store_tiles, dim3(1), dim3(32), sizeof(TileSmem<float>), nullptr, m.map(16), 16, 4);
    for (int r = 0; r < 28; ++r) {
      for (int c = 0; c < 40; ++c) {
        CHECK(m.at(r, c) == (r >= 4 && c >= 16 ? static_cast<float>(1000 + (r - 4) * 32 + c - 16) : before.at(r, c)));
      }
    }
  });
}

__global__ void leave_store_behind(const __grid_constant__ CUtensorMap map) {
  using Smem = TileSmem<float>;
  RNN_EXT_SMEM(Smem, s);
  ptx::tma_store(&map, s.tile, 0, 0);
  ptx::tma_store_commit();
  ptx::tma_store_wait_read<1>();
}

TEST(stores_must_have_read_before_the_block_exits) {
  TensorMatrix<float> m(16, 32, 32);
  emu::options.late_engines = true;
  CHECK(contains(error_of([&] {
                   RNN_EXT_LAUNCH(leave_store_behind, dim3(1), dim3(1), sizeof(TileSmem<float>), nullptr, m.map(16));
                 }),
                 "returned before its bulk stores had read"));
}

TEST(tma_store_of_tf32_is_refused) {
  TensorMatrix<float> m(16, 32, 32);
  CUtensorMap map;
  encode_tensor_map(map, m.v.data(), 16, 32, 32, 16, CU_TENSOR_MAP_DATA_TYPE_TFLOAT32);
  CHECK(contains(
      error_of([&] { RNN_EXT_LAUNCH(leave_store_behind, dim3(1), dim3(1), sizeof(TileSmem<float>), nullptr, map); }),
      "TMA store: nothing says"));
}

__global__ void store_matrices(uint16_t* out) {
  using Smem = Array<uint16_t, 4 * 64>;
  RNN_EXT_SMEM(Smem, s);
  const uint32_t lane = threadIdx.x;
  uint32_t fragment[4];
  for (uint32_t i = 0; i < 4; ++i) fragment[i] = (i * 64 + lane * 2) | (i * 64 + lane * 2 + 1) << 16;
  ptx::stmatrix_x4(&s.v[lane * 8], fragment);
  __syncwarp();
  for (int i = 0; i < 8; ++i) out[lane * 8 + i] = s.v[lane * 8 + i];
}

TEST(stmatrix) {
  for_each_seed([](int) {
    std::vector<uint16_t> out(256);
    RNN_EXT_LAUNCH(store_matrices, dim3(1), dim3(32), 512, nullptr, out.data());
    for (int i = 0; i < 256; ++i) CHECK(out[i] == i);
  });
}

__global__ void count_elected(uint32_t* out) { atomicAdd(out, ptx::elect_one() ? 1u : 0u); }

TEST(one_lane_of_each_warp_is_elected) {
  for_each_seed([](int) {
    uint32_t out = 0;
    RNN_EXT_LAUNCH(count_elected, dim3(1), dim3(96), 0, nullptr, &out);
    CHECK(out == 3);
  });
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

template <typename T, int N>
struct ForwardWgmmaSmem {
  T a[64 * 128 / sizeof(T)], b[N * 128 / sizeof(T)];
  uint64_t full;
};

// out (64 x N) = a b + 1 over one tile of k, 128 bytes deep, in two commits.
template <typename T, int N, bool kTransposedA, bool kTransposedB>
__global__ void multiply_tiles(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                               float* out) {
  using Smem = ForwardWgmmaSmem<T, N>;
  RNN_EXT_SMEM(Smem, s);
  constexpr int kK = 128 / sizeof(T);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&s.full, (64 + N) * 128);
    ptx::tma_load(s.a, &a, 0, 0, &s.full);
    for (int n = 0; n < (kTransposedB ? N : 1); n += 64) ptx::tma_load(s.b + n * kK, &b, n, 0, &s.full);
  }
  __syncthreads();
  ptx::mbarrier_wait(&s.full, 0);
  float d[N / 2];
  for (float& v : d) v = 1;
  uint64_t desc_a = kTransposedA ? ptx::wgmma_mn_major(s.a, 0) : ptx::wgmma_k_major(s.a);
  uint64_t desc_b = kTransposedB ? ptx::wgmma_mn_major(s.b, 64 * 128) : ptx::wgmma_k_major(s.b);
  ptx::wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    ptx::wgmma<T, N, kTransposedA, kTransposedB>(d, desc_a, desc_b, 1);
    if (k % 2 != 0) ptx::wgmma_commit();
    desc_a = ptx::wgmma_advance(desc_a, kTransposedA ? 2048 : 32);
    desc_b = ptx::wgmma_advance(desc_b, kTransposedB ? 2048 : 32);
  }
  ptx::wgmma_wait<1>();
  ptx::wgmma_wait_all(d);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int i = 0; i < N / 2; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    out[row * N + column] = d[i];
  }
}

template <typename T, int N, bool kTransposedA, bool kTransposedB>
void test_multiply_tiles(int m, int n, int k) {
  const auto stride = [](int columns) { return (columns + 7) / 8 * 8; };
  const TensorMatrix<T> a(kTransposedA ? k : m, kTransposedA ? m : k, stride(kTransposedA ? m : k));
  const TensorMatrix<T> b(kTransposedB ? k : n, kTransposedB ? n : k, stride(kTransposedB ? n : k));
  std::vector<float> out(64 * N);
  RNN_EXT_LAUNCH((multiply_tiles<T, N, kTransposedA, kTransposedB>), dim3(1), dim3(128), sizeof(ForwardWgmmaSmem<T, N>),
                 nullptr, a.map(64), b.map(kTransposedB ? 64 : N), out.data());
  for (int i = 0; i < 64 * N; ++i) {
    const int row = i / N, column = i % N;
    float expected = 1;  // small integers: exact
    for (int j = 0; j < k; ++j) {
      expected += (kTransposedA ? a.at(j, row) : a.at(row, j)) * (kTransposedB ? b.at(j, column) : b.at(column, j));
    }
    CHECK(out[i] == expected);
  }
}

TEST(wgmma) {
  for_each_seed([](int) {
    test_multiply_tiles<__nv_bfloat16, 64, false, false>(64, 64, 64);
    test_multiply_tiles<__half, 128, false, false>(50, 100, 33);
    test_multiply_tiles<__nv_bfloat16, 256, false, false>(64, 250, 64);
    test_multiply_tiles<float, 64, false, false>(64, 64, 32);
    test_multiply_tiles<float, 128, false, false>(10, 120, 27);
  });
}
TEST(wgmma_mn_major) {
  for_each_seed([](int) {
    test_multiply_tiles<__half, 64, true, false>(60, 64, 50);
    test_multiply_tiles<__nv_bfloat16, 128, false, true>(64, 120, 64);
    test_multiply_tiles<__half, 256, false, true>(64, 250, 33);
    test_multiply_tiles<__half, 256, true, true>(64, 256, 47);
  });
}

enum class WgmmaMisuse { kNone, kNoFence, kThreeWarps, kWarpsDisagree, kOutside, kOutOfPhase, kNoWait };

__global__ void misuse_wgmma(WgmmaMisuse misuse) {
  using Smem = ForwardWgmmaSmem<__half, 64>;
  RNN_EXT_SMEM(Smem, s);
  if (misuse == WgmmaMisuse::kThreeWarps && threadIdx.x >= 96) return;
  uint64_t descriptor = ptx::wgmma_k_major(s.a);
  if (misuse == WgmmaMisuse::kOutside) descriptor = ptx::wgmma_advance(descriptor, 16 * 1024);
  if (misuse == WgmmaMisuse::kOutOfPhase) descriptor = ptx::wgmma_advance(descriptor, 128);
  if (misuse == WgmmaMisuse::kWarpsDisagree && threadIdx.x >= 96) descriptor = ptx::wgmma_advance(descriptor, 32);
  float d[32] = {};
  if (misuse != WgmmaMisuse::kNoFence) ptx::wgmma_fence();
  ptx::wgmma<__half, 64>(d, descriptor, descriptor, 0);
  ptx::wgmma_commit();
  if (misuse == WgmmaMisuse::kNoWait) {
    ptx::wgmma_wait<1>();
  } else {
    ptx::wgmma_wait_all(d);
  }
}

TEST(wgmma_misuse) {
  emu::options.late_engines = true;
  const auto launch = [](WgmmaMisuse misuse) {
    RNN_EXT_LAUNCH(misuse_wgmma, dim3(1), dim3(128), sizeof(ForwardWgmmaSmem<__half, 64>), nullptr, misuse);
  };
  launch(WgmmaMisuse::kNone);
  const auto error = [&](WgmmaMisuse misuse) { return error_of([&] { launch(misuse); }); };
  CHECK(contains(error(WgmmaMisuse::kNoFence), "no wgmma_fence"));
  CHECK(contains(error(WgmmaMisuse::kThreeWarps), "96 threads, the first 0, wait in wgmma.wait_group"));
  CHECK(contains(error(WgmmaMisuse::kWarpsDisagree), "the warps of a warpgroup disagree"));
  CHECK(contains(error(WgmmaMisuse::kOutside), "reaches outside shared memory"));
  CHECK(contains(error(WgmmaMisuse::kOutOfPhase), "the swizzle is not in phase"));
  CHECK(contains(error(WgmmaMisuse::kNoWait), "wgmma still in flight"));
}

// ---- order between blocks, done wrong and right
// ----------------------------------------------------------------------

// A split-K sum whose order is the same in every run: block by block, or in the order in which they happen to come.
__global__ void add_up_blocks(uint32_t* turn, const float* in, float* sum) {
  if (threadIdx.x != 0) return;
  if (RNN_EXT_PLANTED(unordered_sum)) {
    atomicAdd(sum, in[blockIdx.x]);
    return;
  }
  if (!RNN_EXT_PLANTED(sum_without_its_turn)) ptx::wait_at_least(turn, blockIdx.x);
  *sum += in[blockIdx.x];
  ptx::st_release(turn, blockIdx.x + 1);
}

TEST(blocks_add_up_in_order) {
  const std::vector<float> in = {1.f, 0x1p24f, 1.f, -0x1p24f};
  for_each_seed([&](int) {
    emu::options.resident_blocks = 0;
    uint32_t turn = 0;
    float sum = 0;
    RNN_EXT_LAUNCH(add_up_blocks, dim3(4), dim3(32), 0, nullptr, &turn, in.data(), &sum);
    CHECK(sum == ((1.f + 0x1p24f) + 1.f) - 0x1p24f);
  });
}

// 128-bit loads where the row starts at such an address, and 32-bit loads elsewhere.
__global__ void load_vectors(const float* in, int stride, float* out) {
  const float* const row = in + blockIdx.x * stride;
  const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  float v[4];
  if (aligned || RNN_EXT_PLANTED(misaligned_vector_load)) {
    const float4 all = *reinterpret_cast<const float4*>(row + threadIdx.x * 4);
    v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
  } else {
    for (int i = 0; i < 4; ++i) v[i] = row[threadIdx.x * 4 + i];
  }
  for (int i = 0; i < 4; ++i) out[(blockIdx.x * blockDim.x + threadIdx.x) * 4 + i] = v[i];
}

TEST(vector_loads_are_aligned) {
  std::vector<float> in(3 * 33), out(3 * 32);
  std::iota(in.begin(), in.end(), 0.f);
  RNN_EXT_LAUNCH(load_vectors, dim3(3), dim3(8), 0, nullptr, in.data(), 33, out.data());
  for (int i = 0; i < 96; ++i) CHECK(out[i] == in[i / 32 * 33 + i % 32]);
}

// ---- what must not pass ---------------------------------------------------------------------------------------------

__global__ void diverge_at_barrier(int waiting) {
  if (static_cast<int>(threadIdx.x) < waiting) __syncthreads();
}

TEST(a_deadlock_names_thread_and_line) {
  const std::string report = error_of([] { RNN_EXT_LAUNCH(diverge_at_barrier, dim3(1), dim3(64), 0, nullptr, 63); });
  CHECK(contains(report, "diverge_at_barrier"));
  CHECK(contains(report, "63 threads, the first 0, wait in __syncthreads at test_wrappers.cpp:"));
  CHECK(contains(report, "1 threads, the first 63, have returned"));
}

__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

TEST(syncthreads_in_two_places_is_refused) {
  CHECK(contains(error_of([] { RNN_EXT_LAUNCH(two_barriers, dim3(1), dim3(64), 0, nullptr); }), "while other threads"));
}

__global__ void wrong_mask() {
  if (threadIdx.x < 16) __shfl_sync(0xffff0000u, 1, 0);
}

TEST(a_lane_outside_its_own_mask_is_refused) {
  CHECK(contains(error_of([] { RNN_EXT_LAUNCH(wrong_mask, dim3(1), dim3(32), 0, nullptr); }), "not in its own mask"));
}

__global__ void use_shared_memory() {
  using Smem = Array<float, 64>;
  RNN_EXT_SMEM(Smem, s);
  s.v[threadIdx.x] = 0;
}

TEST(launch_limits) {
  const auto launch = [](dim3 grid, dim3 block, size_t smem) {
    return error_of([&] { RNN_EXT_LAUNCH(use_shared_memory, grid, block, smem, nullptr); });
  };
  CHECK(contains(launch(dim3(0), dim3(32), 256), "the grid is empty"));
  CHECK(contains(launch(dim3(1, 65536), dim3(32), 256), "the grid is larger"));
  CHECK(contains(launch(dim3(1), dim3(1025), 256), "the block is larger"));
  CHECK(contains(launch(dim3(1), dim3(1, 1, 65), 256), "the block is larger"));
  CHECK(contains(launch(dim3(1), dim3(32), 228 * 1024), "shared memory"));
  CHECK(contains(launch(dim3(1), dim3(32), 252), "uses 256 bytes of shared memory"));
}

__global__ void copy_misaligned(const float* in, int global_offset, int shared_offset) {
  using Smem = Array<float, 8>;
  RNN_EXT_SMEM(Smem, s);
  ptx::cp_async<16>(&s.v[shared_offset], in + global_offset, 16);
  ptx::cp_async_wait<0>();
}

TEST(cp_async_checks_its_addresses) {
  const std::vector<float> in(8);
  const auto launch = [&](int global_offset, int shared_offset) {
    return error_of([&] {
      RNN_EXT_LAUNCH(copy_misaligned, dim3(1), dim3(1), 32, nullptr, in.data(), global_offset, shared_offset);
    });
  };
  CHECK(contains(launch(1, 0), "misaligned, the global address is 4 bytes past"));
  CHECK(contains(launch(0, 1), "misaligned, shared offset 4"));
  CHECK(contains(launch(0, 8), "outside the block's 32 bytes"));
}

__global__ void leave_copies_behind(const float* in) {
  using Smem = Array<float, 4>;
  RNN_EXT_SMEM(Smem, s);
  ptx::cp_async<16>(s.v, in, 16);
}

TEST(unfinished_copies_are_reported) {
  const std::vector<float> in(4);
  emu::options.late_engines = true;
  CHECK(contains(error_of([&] { RNN_EXT_LAUNCH(leave_copies_behind, dim3(1), dim3(1), 16, nullptr, in.data()); }),
                 "still in flight"));
}

__global__ void read_unwritten(float* out) {
  using Smem = Array<float, 1>;
  RNN_EXT_SMEM(Smem, s);
  out[0] = s.v[0];
}

TEST(shared_memory_starts_as_nan) {
  float out = 0;
  RNN_EXT_LAUNCH(read_unwritten, dim3(1), dim3(1), 4, nullptr, &out);
  CHECK(std::isnan(out));
}

__global__ void poll_forever(const uint32_t* flag) { ptx::wait_at_least(flag, 1); }

TEST(endless_polling_is_reported) {
  const uint32_t flag = 0;
  CHECK(contains(error_of([&] { RNN_EXT_LAUNCH(poll_forever, dim3(1), dim3(1), 0, nullptr, &flag); }),
                 "polls without end"));
}

}  // namespace

int main(int argc, char** argv) { return check::run_all(argc, argv); }
