// Runs every PTX wrapper once on fixed inputs and writes what comes out, one line a wrapper. On a GPU the file becomes
// tests/cuda_host/golden/<gpu>.txt, with which the tests compare the same program on the host runtime: that is how the
// wrappers' host bodies are known to mean what their PTX does.
//
//   nvcc -std=c++17 -arch=native -I csrc/cuda tests/cuda_host/golden.cu -o golden && ./golden > <gpu>.txt
//
// A line is: name, how to compare it (exact, or as floats with that relative error), and the words in hexadecimal.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "ptx.cuh"

namespace {

using namespace rnn_ext::cuda;

constexpr int kInputs = 4096;

struct Smem {
  uint32_t words[1024];
};
static_assert(sizeof(Smem) == 4096, "room for what one wrapper needs");

// Small integers as floats: their sums and products are exact in every format.
__device__ float small(uint32_t v) { return static_cast<float>(static_cast<int>(v % 17) - 8); }
// Any float in [-4, 4).
__device__ float real(uint32_t v) { return static_cast<float>(static_cast<int>(v)) * 0x1p-29f; }
__device__ uint32_t bits(float v) {
  uint32_t r;
  memcpy(&r, &v, 4);
  return r;
}

// ---- sm_75 ----------------------------------------------------------------------------------------------------------

template <bool kTransposed>
__global__ void __launch_bounds__(32) run_ldmatrix(const uint32_t* in, uint32_t* out) {
  RNN_EXT_SMEM(Smem, smem);
  for (int i = 0; i < 4; ++i) smem.words[threadIdx.x * 4 + i] = in[threadIdx.x * 4 + i];
  __syncwarp();
  uint32_t four[4], two[2];
  ptx::ldmatrix_x4<kTransposed>(four, &smem.words[threadIdx.x * 4]);
  ptx::ldmatrix_x2<kTransposed>(two, &smem.words[(threadIdx.x % 16 + 8) * 4]);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 6 + i] = four[i];
  for (int i = 0; i < 2; ++i) out[threadIdx.x * 6 + 4 + i] = two[i];
}

__global__ void __launch_bounds__(128) run_tanh_approx(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = bits(ptx::tanh_approx(real(in[threadIdx.x])));
}

__global__ void __launch_bounds__(128) run_counters(const uint32_t* in, uint32_t* out) {
  if (threadIdx.x != 0) return;
  out[0] = in[0];
  out[1] = ptx::atomic_add_acq_rel(&out[0], 5);
  out[2] = 2;
  out[3] = ptx::atomic_inc_acq_rel(&out[2], 3);
  out[4] = ptx::atomic_inc_acq_rel(&out[2], 3);
  ptx::red_add_release(&out[0], 7);
  ptx::st_release(&out[5], 9);
  ptx::wait_at_least(&out[5], 9);
  out[6] = ptx::ld_acquire(&out[0]);
}

__global__ void __launch_bounds__(128) run_named_barrier(const uint32_t* in, uint32_t* out) {
  RNN_EXT_SMEM(Smem, smem);
  if (threadIdx.x < 64) {
    smem.words[threadIdx.x] = in[threadIdx.x];
    ptx::named_barrier_arrive(2, 128);
  } else {
    ptx::named_barrier_sync(2, 128);
    out[threadIdx.x - 64] = smem.words[127 - threadIdx.x];
  }
}

// ---- sm_80 ----------------------------------------------------------------------------------------------------------

template <int kBytes>
__global__ void __launch_bounds__(64) run_cp_async(const uint32_t* in, uint32_t* out) {
  RNN_EXT_SMEM(Smem, smem);
  constexpr int kWords = kBytes / 4;
  const int at = static_cast<int>(threadIdx.x) * kWords;
  ptx::cp_async<kBytes>(&smem.words[at], in + at, static_cast<int>(threadIdx.x) % (kBytes + 1));
  ptx::cp_async_commit();
  ptx::cp_async<kBytes>(&smem.words[64 * kWords + at], in + at + 64 * kWords, kBytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 2 * kWords; ++i) out[threadIdx.x * 2 * kWords + i] = smem.words[threadIdx.x * 2 * kWords + i];
}

__global__ void __launch_bounds__(128) run_to_tf32(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = ptx::to_tf32(real(in[threadIdx.x]));
  out[128 + threadIdx.x] = ptx::to_tf32(small(in[threadIdx.x]) + threadIdx.x * 0x1p-11f);  // ties among them
}

// kExact: small integers. Otherwise the low bits matter, which the tensor core ignores, and the sum rounds.
template <bool kExact>
__global__ void __launch_bounds__(32) run_mma_tf32(const uint32_t* in, uint32_t* out) {
  const auto value = [&](int i) {
    return bits(kExact ? small(in[threadIdx.x * 10 + i]) : real(in[threadIdx.x * 10 + i]));
  };
  const uint32_t a[4] = {value(0), value(1), value(2), value(3)}, b[2] = {value(4), value(5)};
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = small(in[threadIdx.x * 10 + 6 + i]);
  ptx::mma_m16n8k8_tf32(c, a, b);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = bits(c[i]);
}

template <typename T>
__global__ void __launch_bounds__(32) run_mma_16bit(const uint32_t* in, uint32_t* out) {
  const auto pair = [&](int i) {
    const uint32_t v = in[threadIdx.x * 10 + i];
    const T halves[2] = {T(small(v)), T(small(v >> 16))};
    uint32_t r;
    memcpy(&r, halves, 4);
    return r;
  };
  const uint32_t a[4] = {pair(0), pair(1), pair(2), pair(3)}, b[2] = {pair(4), pair(5)};
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = small(in[threadIdx.x * 10 + 6 + i]);
  ptx::mma_m16n8k16<T>(c, a, b);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = bits(c[i]);
}

__global__ void __launch_bounds__(32) run_mma_f64(const uint32_t* in, uint32_t* out) {
  double c[2] = {small(in[threadIdx.x]), small(in[threadIdx.x + 32])};
  ptx::mma_m8n8k4_f64(c, small(in[threadIdx.x + 64]), small(in[threadIdx.x + 96]));
  for (int i = 0; i < 2; ++i) out[threadIdx.x * 2 + i] = bits(static_cast<float>(c[i]));
}

// ---- the program ----------------------------------------------------------------------------------------------------

struct Buffer {
  explicit Buffer(size_t words) {
#ifdef RNN_EXT_CUDA_HOST
    storage.resize(words + 4);  // 16-byte aligned, as the copies need it
    data = storage.data();
#else
    if (cudaMallocManaged(&data, words * sizeof(uint32_t)) != cudaSuccess) std::exit(1);
#endif
    for (size_t i = 0; i < words; ++i) data[i] = 0;
  }
  std::vector<uint32_t> storage;
  uint32_t* data = nullptr;
};

int failures = 0;

void check(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", name, cudaGetErrorString(error));
  ++failures;
}

using Kernel = void (*)(const uint32_t*, uint32_t*);

void record(const char* name, const char* compare, Kernel kernel, unsigned threads, size_t words) {
  static Buffer in(kInputs);
  uint32_t state = 1;
  for (int i = 0; i < kInputs; ++i) in.data[i] = state = state * 1664525u + 1013904223u;
  Buffer out(words);
  check(name, RNN_EXT_LAUNCH(kernel, dim3(1), dim3(threads), sizeof(Smem), nullptr, in.data, out.data));
#ifndef RNN_EXT_CUDA_HOST
  check(name, cudaDeviceSynchronize());
#endif
  std::printf("%s %s", name, compare);
  for (size_t i = 0; i < words; ++i) std::printf(" %08x", out.data[i]);
  std::printf("\n");
}

}  // namespace

int main() {
  int major = 0;
  check("device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  record("ldmatrix", "exact", run_ldmatrix<false>, 32, 32 * 6);
  record("ldmatrix_trans", "exact", run_ldmatrix<true>, 32, 32 * 6);
  record("tanh_approx", "0.001", run_tanh_approx, 128, 128);
  record("counters", "exact", run_counters, 128, 7);
  record("named_barrier", "exact", run_named_barrier, 128, 64);
  record("mma_f16", "exact", run_mma_16bit<__half>, 32, 32 * 4);
  if (major >= 8) {
    record("cp_async_4", "exact", run_cp_async<4>, 64, 64 * 2);
    record("cp_async_8", "exact", run_cp_async<8>, 64, 64 * 4);
    record("cp_async_16", "exact", run_cp_async<16>, 64, 64 * 8);
    record("to_tf32", "exact", run_to_tf32, 128, 256);
    record("mma_tf32", "exact", run_mma_tf32<true>, 32, 32 * 4);
    record("mma_tf32_low_bits", "0.00001", run_mma_tf32<false>, 32, 32 * 4);
    record("mma_bf16", "exact", run_mma_16bit<__nv_bfloat16>, 32, 32 * 4);
    record("mma_f64", "exact", run_mma_f64, 32, 32 * 2);
  }
  return failures == 0 ? 0 : 1;
}
