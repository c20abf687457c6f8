// Runs PTX wrappers on fixed inputs and writes what comes out, one line a wrapper. On a GPU the file becomes
// tests/cuda_host/golden/<gpu>.txt, with which the tests compare the same program on the host runtime: that is how the
// wrappers' host bodies are known to mean what their PTX does. golden.sh compiles and runs it.
//
// The arguments are the wrappers to run; without any it lists those that the device has. A wrapper that fails may hang,
// or break all that its process does after it: on a GPU each gets a process of its own.
//
// A line is: name, how to compare it (exact, or as floats with that relative error), and the words in hexadecimal.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/ptx/ptx.cuh"
#include "cuda/ptx/ptx_sm90.cuh"
#include "cuda/ptx/tensor_map.cuh"

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

__global__ void __launch_bounds__(32) run_shared_address(const uint32_t* in, uint32_t* out) {
  RNN_EXT_SMEM(Smem, smem);
  out[threadIdx.x] = ptx::shared_address(&smem.words[in[threadIdx.x] % 1024]) - ptx::shared_address(&smem);
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

// Blocks that wait for all others: out[0] counts them, then each has 32 words, then what the next block had.
__global__ void __launch_bounds__(32) run_cooperative(const uint32_t* in, uint32_t* out) {
  uint32_t *const words = out + 1, *const next = words + gridDim.x * 32;
  const uint32_t me = blockIdx.x * 32 + threadIdx.x;
  words[me] = in[me];
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::red_add_release(out, 1);
    ptx::wait_at_least(out, gridDim.x);
  }
  __syncthreads();
  next[me] = words[(me + 32) % (gridDim.x * 32)];
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

// ---- sm_90 ----------------------------------------------------------------------------------------------------------

// The second of two launches takes up what the first one left, though it may start earlier.
__global__ void __launch_bounds__(128) run_early_launch(const uint32_t* in, uint32_t* out) {
  ptx::let_next_launch_start();
  ptx::prefetch_to_l2(&in[threadIdx.x]);
  ptx::wait_for_previous_launch();
  out[threadIdx.x] = out[threadIdx.x] * 3 + in[threadIdx.x];
}

// Two blocks exchange words, double words and quadruple words, once by loads and once by stores.
__global__ void __launch_bounds__(32) run_cluster(const uint32_t* in, uint32_t* out) {
  RNN_EXT_SMEM(Smem, smem);
  const uint32_t rank = ptx::cluster_rank(), peer = (rank + 1) % ptx::cluster_size();
  uint32_t* const own = &smem.words[threadIdx.x * 8];
  uint32_t* const received = own + 32 * 8;
  for (int i = 0; i < 8; ++i) own[i] = in[rank * 32 * 8 + threadIdx.x * 8 + i];
  ptx::cluster_arrive();
  ptx::cluster_wait();
  const auto one = ptx::ld_cluster<uint32_t>(ptx::cluster_address(own, peer));
  const auto two = ptx::ld_cluster<uint2>(ptx::cluster_address(own + 2, peer));
  const auto four = ptx::ld_cluster<uint4>(ptx::cluster_address(own + 4, peer));
  ptx::st_cluster(ptx::cluster_address(received, peer), one ^ rank);
  ptx::st_cluster(ptx::cluster_address(received + 2, peer), uint2{two.x, two.y ^ rank});
  ptx::st_cluster(ptx::cluster_address(received + 4, peer), uint4{four.x, four.y, four.z, four.w ^ rank});
  ptx::cluster_sync();
  const uint32_t loaded[8] = {one, rank, two.x, two.y, four.x, four.y, four.z, four.w};
  for (int i = 0; i < 8; ++i) {
    out[(rank * 32 + threadIdx.x) * 16 + i] = loaded[i];
    out[(rank * 32 + threadIdx.x) * 16 + 8 + i] = i == 1 ? peer : received[i];
  }
}

// Two blocks: three phases of a barrier of one block's threads, then one of all.
__global__ void __launch_bounds__(32) run_mbarrier(const uint32_t* in, uint32_t* out) {
  struct Barriers {
    uint32_t words[32];
    uint64_t local, both;
  };
  static_assert(sizeof(Barriers) <= sizeof(Smem));
  RNN_EXT_SMEM(Barriers, smem);
  const uint32_t rank = ptx::cluster_rank(), peer = 1 - rank;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.local, 32);
    ptx::mbarrier_init(&smem.both, 64);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  for (uint32_t phase = 0; phase < 3; ++phase) {
    smem.words[threadIdx.x] = in[(rank * 3 + phase) * 32 + threadIdx.x];
    ptx::mbarrier_arrive(&smem.local);
    ptx::mbarrier_wait(&smem.local, phase % 2);
    out[(rank * 4 + phase) * 32 + threadIdx.x] = smem.words[31 - threadIdx.x];
    __syncthreads();
  }
  ptx::mbarrier_arrive_release_cluster(ptx::cluster_address(&smem.both, peer));
  ptx::mbarrier_arrive_cluster(ptx::cluster_address(&smem.both, rank));
  ptx::mbarrier_wait_acquire_cluster(&smem.both, 0);
  const uint32_t address = ptx::cluster_address(&smem.words[threadIdx.x], peer);
  out[(rank * 4 + 3) * 32 + threadIdx.x] = ptx::ld_cluster<uint32_t>(address);
  ptx::cluster_sync();
}

// Two blocks send each other words, double words and quadruple words; the second of two times the bytes are expected
// only after some may have come.
__global__ void __launch_bounds__(32) run_st_async(const uint32_t* in, uint32_t* out) {
  struct Received {
    uint4 four[2][32];
    uint2 two[2][32];
    uint32_t one[2][32];
    uint64_t full[2];
  };
  static_assert(sizeof(Received) <= sizeof(Smem));
  RNN_EXT_SMEM(Received, smem);
  constexpr uint32_t kBytes = 32 * (4 + 8 + 16);
  const uint32_t rank = ptx::cluster_rank(), peer = 1 - rank, me = threadIdx.x;
  if (me == 0) {
    for (uint64_t& full : smem.full) ptx::mbarrier_init(&full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&smem.full[0], kBytes);
  }
  ptx::cluster_sync();
  const uint32_t* const words = in + (rank * 32 + me) * 7;
  for (uint32_t time = 0; time < 2; ++time) {
    const uint32_t full = ptx::cluster_address(&smem.full[time], peer);
    ptx::st_async(ptx::cluster_address(&smem.one[time][me], peer), words[0] + time, full);
    ptx::st_async(ptx::cluster_address(&smem.two[time][me], peer), uint2{words[1], words[2] + time}, full);
    ptx::st_async(ptx::cluster_address(&smem.four[time][me], peer),
                  uint4{words[3], words[4], words[5], words[6] + time}, full);
  }
  ptx::mbarrier_wait_acquire_shared(&smem.full[0], 0);
  if (me == 0) ptx::mbarrier_arrive_expect_tx(&smem.full[1], kBytes);
  ptx::mbarrier_wait_acquire_cluster(&smem.full[1], 0);
  for (uint32_t time = 0; time < 2; ++time) {
    const uint2 two = smem.two[time][31 - me];
    const uint4 four = smem.four[time][31 - me];
    const uint32_t received[7] = {smem.one[time][31 - me], two.x, two.y, four.x, four.y, four.z, four.w};
    for (int i = 0; i < 7; ++i) out[((time * 2 + rank) * 32 + me) * 7 + i] = received[i];
  }
}

struct TileSmem {
  uint32_t tile[16 * kTileRowBytes / 4];  // swizzled
  uint64_t full;
};

// The tile from (row 8, column 16) on, which leaves its matrix on both sides.
__global__ void __launch_bounds__(32) run_tma_load(const __grid_constant__ CUtensorMap map, uint32_t* out) {
  static_assert(sizeof(TileSmem) <= sizeof(Smem));
  RNN_EXT_SMEM(TileSmem, smem);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map);
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&smem.full, sizeof smem.tile);
    ptx::tma_load(smem.tile, &map, 16, 8, &smem.full);
  }
  __syncthreads();
  ptx::mbarrier_wait(&smem.full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 16 * 32; i += 32) out[i] = smem.tile[i];
}

// From swizzled places into the matrix from (row 2, column 4) on, again over its edges.
__global__ void __launch_bounds__(32) run_tma_store(const __grid_constant__ CUtensorMap map, const uint32_t* in) {
  static_assert(sizeof(TileSmem) <= sizeof(Smem));
  RNN_EXT_SMEM(TileSmem, smem);
  for (int i = static_cast<int>(threadIdx.x); i < 16 * 32; i += 32) smem.tile[i] = in[i];
  ptx::fence_proxy_async();
  __syncwarp();
  if (ptx::elect_one()) {
    ptx::tma_store(&map, smem.tile, 4, 2);
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
  }
}

__global__ void __launch_bounds__(32) run_stmatrix(const uint32_t* in, uint32_t* out) {
  RNN_EXT_SMEM(Smem, smem);
  const uint32_t* const mine = in + threadIdx.x * 4;
  const uint32_t fragment[4] = {mine[0], mine[1], mine[2], mine[3]};
  ptx::stmatrix_x4(&smem.words[threadIdx.x * 4], fragment);
  __syncwarp();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = smem.words[threadIdx.x * 4 + i];
}

// Whether there is one; which lane it is, nothing says.
__global__ void __launch_bounds__(64) run_elect_one(const uint32_t* in, uint32_t* out) {
  const uint32_t elected = __ballot_sync(0xffffffffu, ptx::elect_one());
  out[threadIdx.x] = in[threadIdx.x] ^ (elected != 0 && (elected & (elected - 1)) == 0 ? 1u : 0u);
}

// ---- sm_90a ---------------------------------------------------------------------------------------------------------

// Two blocks load half a tile each, into both.
__global__ void __launch_bounds__(32) run_tma_load_multicast(const __grid_constant__ CUtensorMap map, uint32_t* out) {
  static_assert(sizeof(TileSmem) <= sizeof(Smem));
  RNN_EXT_SMEM(TileSmem, smem);
  const int rank = static_cast<int>(ptx::cluster_rank());
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, sizeof smem.tile);
    ptx::tma_load_multicast(smem.tile + rank * 8 * 32, &map, 0, 9 + rank * 8, &smem.full, 3);
  }
  ptx::mbarrier_wait(&smem.full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 16 * 32; i += 32) out[rank * 16 * 32 + i] = smem.tile[i];
  ptx::cluster_sync();
}

// Registers go from the first warpgroup to the others, and values stay.
__global__ void __launch_bounds__(384, 1) run_registers(const uint32_t* in, uint32_t* out) {
  const uint32_t value = in[threadIdx.x];
  if (threadIdx.x < 128) {
    ptx::release_registers<40>();
  } else {
    ptx::claim_registers<232>();
  }
  out[threadIdx.x] = value;
}

template <typename T, int N>
struct ForwardWgmmaSmem {
  T a[64 * kTileRowBytes / sizeof(T)], b[N * kTileRowBytes / sizeof(T)];
  uint64_t full;
};

// a b over 128 bytes of k, in two groups; of each thread's sums the first four and, if they are exact, all in one
// number.
template <typename T, int N, bool kTransposedA, bool kTransposedB, bool kExact>
__global__ void __launch_bounds__(128)
    run_wgmma(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, uint32_t* out) {
  using Wgmma = ForwardWgmmaSmem<T, N>;
  static_assert(sizeof(Wgmma) <= 48 * 1024, "what a block has without asking");
  RNN_EXT_SMEM(Wgmma, smem);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&smem.full, (64 + N) * kTileRowBytes);
    ptx::tma_load(smem.a, &a, 0, 0, &smem.full);
    for (int n = 0; n < (kTransposedB ? N : 1); n += 64) {
      ptx::tma_load(smem.b + n * kTileRowBytes / static_cast<int>(sizeof(T)), &b, n, 0, &smem.full);
    }
  }
  __syncthreads();
  ptx::mbarrier_wait(&smem.full, 0);
  float d[N / 2];
  const uint64_t desc_a = kTransposedA ? ptx::wgmma_mn_major(smem.a, 0) : ptx::wgmma_k_major(smem.a);
  const uint64_t desc_b = kTransposedB ? ptx::wgmma_mn_major(smem.b, 64 * kTileRowBytes) : ptx::wgmma_k_major(smem.b);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    ptx::wgmma<T, N, kTransposedA, kTransposedB>(d, ptx::wgmma_advance(desc_a, k * (kTransposedA ? 2048 : 32)),
                                                 ptx::wgmma_advance(desc_b, k * (kTransposedB ? 2048 : 32)), k > 0);
    if (k % 2 != 0) ptx::wgmma_commit();
  }
  ptx::wgmma_wait<1>();
  ptx::wgmma_wait_all(d);
  uint32_t all = 0;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) all = (all ^ all >> 15 ^ bits(d[i])) * 0x01000193u;
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 5 + i] = bits(d[i]);
  out[threadIdx.x * 5 + 4] = kExact ? all : 0;
}

// ---- the program ----------------------------------------------------------------------------------------------------

std::vector<std::string> wanted;  // from the command line; empty: the names are asked for
size_t recorded = 0;

void check(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", name, cudaGetErrorString(error));
  std::exit(1);
}

// Words on the host, and their place on the device: an allocation of its own, which managed memory would not be.
struct Buffer {
  explicit Buffer(size_t count) : words(count), data(words.data()) {
#ifndef RNN_EXT_CUDA_HOST
    check("cudaMalloc", cudaMalloc(&data, count * sizeof(uint32_t)));
#endif
    to_device();
  }
  void to_device() const {
#ifndef RNN_EXT_CUDA_HOST
    check("to the device", cudaMemcpy(data, words.data(), words.size() * sizeof(uint32_t), cudaMemcpyHostToDevice));
#endif
  }
  // Waits for the kernel, whose errors come out here.
  void from_device(const char* name) {
#ifdef RNN_EXT_CUDA_HOST
    static_cast<void>(name);
#else
    check(name, cudaMemcpy(words.data(), data, words.size() * sizeof(uint32_t), cudaMemcpyDeviceToHost));
#endif
  }

  std::vector<uint32_t> words;
  uint32_t* data;
};

// What `launch(in, out)` leaves in `count` words: `in.words` are on the device too. Nothing, if it is not wanted.
template <typename Launch>
void record(const char* name, const char* compare, size_t count, const Launch& launch) {
  if (wanted.empty()) std::printf("%s\n", name);
  if (std::find(wanted.begin(), wanted.end(), name) == wanted.end()) return;
  Buffer in(kInputs), out(count);
  uint32_t state = 1;
  for (uint32_t& word : in.words) word = state = state * 1664525u + 1013904223u;
  in.to_device();
  check(name, launch(in, out.data));
  out.from_device(name);
  std::printf("%s %s", name, compare);
  for (const uint32_t word : out.words) std::printf(" %08x", word);
  std::printf("\n");
  std::fflush(stdout);
  ++recorded;
}

using Kernel = void (*)(const uint32_t*, uint32_t*);

void record(const char* name, const char* compare, Kernel kernel, unsigned threads, size_t words,
            unsigned cluster = 1) {
  record(name, compare, words, [&](const Buffer& in, uint32_t* out) {
    const uint32_t* const data = in.data;
    return RNN_EXT_LAUNCH_CLUSTER(kernel, dim3(cluster), dim3(threads), dim3(cluster), sizeof(Smem), nullptr, data,
                                  out);
  });
}

CUtensorMap tensor_map(const char*, const uint32_t* data, int rows, int columns, int row_stride, int box_rows,
                       CUtensorMapDataType type = kTensorMapType<float>) {
  CUtensorMap map = {};
  encode_tensor_map(map, reinterpret_cast<const float*>(data), rows, columns, row_stride, box_rows, type);
  return map;
}

// Of all blocks at once; a grid that no device has room for is refused, and leaves no error behind.
void record_cooperative() {
  record("cooperative", "exact", 1 + 2 * 8 * 32, [](const Buffer& in, uint32_t* out) {
    const uint32_t* const words = in.data;
    const cudaError_t refused =
        RNN_EXT_LAUNCH_COOPERATIVE(run_cooperative, dim3(1 << 20), dim3(32), 0, nullptr, words, out);
    if (refused != cudaErrorCooperativeLaunchTooLarge || cudaGetLastError() != cudaSuccess) return cudaErrorUnknown;
    return RNN_EXT_LAUNCH_COOPERATIVE(run_cooperative, dim3(8), dim3(32), 0, nullptr, words, out);
  });
}

void record_tma() {
  record("tma_load", "exact", 16 * 32, [](const Buffer& in, uint32_t* out) {
    return RNN_EXT_LAUNCH(run_tma_load, dim3(1), dim3(32), sizeof(Smem), nullptr,
                          tensor_map("tma_load", in.data, 20, 33, 36, 16), out);
  });
  record("tma_load_tf32", "exact", 16 * 32, [](const Buffer& in, uint32_t* out) {
    // Whatever bits these are but infinities and NaN; in every eighth the low ones make a tie.
    static Buffer floats(20 * 36);
    for (int i = 0; i < 20 * 36; ++i) {
      const uint32_t word = in.words[i], tie = i % 8 == 0 ? (word & ~0x1fffu) | 0x1000u : word;
      floats.words[i] = (tie & 0x7f800000u) == 0x7f800000u ? tie ^ 0x40000000u : tie;
    }
    floats.to_device();
    return RNN_EXT_LAUNCH(run_tma_load, dim3(1), dim3(32), sizeof(Smem), nullptr,
                          tensor_map("tma_load_tf32", floats.data, 20, 33, 36, 16, CU_TENSOR_MAP_DATA_TYPE_TFLOAT32),
                          out);
  });
  record("tma_store", "exact", 12 * 28, [](const Buffer& in, uint32_t* out) {
    return RNN_EXT_LAUNCH(run_tma_store, dim3(1), dim3(32), sizeof(Smem), nullptr,
                          tensor_map("tma_store", out, 12, 24, 28, 16), in.data);
  });
}

void record_tma_multicast() {
  record("tma_load_multicast", "exact", 2 * 16 * 32, [](const Buffer& in, uint32_t* out) {
    return RNN_EXT_LAUNCH_CLUSTER(run_tma_load_multicast, dim3(2), dim3(32), dim3(2), sizeof(Smem), nullptr,
                                  tensor_map("tma_load_multicast", in.data, 20, 33, 36, 8), out);
  });
}

// Of small integers, whose sums are exact; or, for tf32, of positive numbers with bits that the unit ignores.
template <typename T, int N, bool kTransposedA = false, bool kTransposedB = false, bool kExact = true>
void record_wgmma(const char* name, const char* compare) {
  constexpr int kK = kTileRowBytes / sizeof(T);
  record(name, compare, 128 * 5, [&](const Buffer& in, uint32_t* out) {
    static Buffer a(64 * kTileRowBytes / 4), b(N * kTileRowBytes / 4);
    const auto fill = [&](Buffer& buffer, int elements, int seed) {
      for (int i = 0; i < elements; ++i) {
        const uint32_t v = in.words[(i * 7 + seed) % kInputs];
        reinterpret_cast<T*>(buffer.words.data())[i] =
            T(kExact ? static_cast<float>(static_cast<int>(v >> 8) % 17 - 8) : static_cast<float>(v) * 0x1p-30f);
      }
      buffer.to_device();
      return reinterpret_cast<const T*>(buffer.data);
    };
    CUtensorMap map_a = {}, map_b = {};
    const T *const data_a = fill(a, 64 * kK, 1), *const data_b = fill(b, N * kK, 2);
    // 16-bit: kK = 64, so that A is square. A transposed B has rows of N, taken 64 at a time.
    encode_tensor_map(map_a, data_a, 64, kK, kK, 64);
    encode_tensor_map(map_b, data_b, kTransposedB ? kK : N, kTransposedB ? N : kK, kTransposedB ? N : kK,
                      kTransposedB ? kK : N);
    return RNN_EXT_LAUNCH((run_wgmma<T, N, kTransposedA, kTransposedB, kExact>), dim3(1), dim3(128),
                          sizeof(ForwardWgmmaSmem<T, N>), nullptr, map_a, map_b, out);
  });
}

void record_all_wgmma() {
  record_wgmma<__half, 64>("wgmma_f16_64", "exact");
  record_wgmma<__half, 128>("wgmma_f16_128", "exact");
  record_wgmma<__half, 256>("wgmma_f16_256", "exact");
  record_wgmma<__nv_bfloat16, 64>("wgmma_bf16_64", "exact");
  record_wgmma<__nv_bfloat16, 128>("wgmma_bf16_128", "exact");
  record_wgmma<__nv_bfloat16, 256>("wgmma_bf16_256", "exact");
  record_wgmma<float, 64>("wgmma_tf32_64", "exact");
  record_wgmma<float, 64, false, false, false>("wgmma_tf32_64_low_bits", "0.00001");
  record_wgmma<float, 128>("wgmma_tf32_128", "exact");
  record_wgmma<float, 256>("wgmma_tf32_256", "exact");
  record_wgmma<__half, 64, true, false>("wgmma_f16_64_mn_major_a", "exact");
  record_wgmma<__half, 128, false, true>("wgmma_f16_128_mn_major_b", "exact");
  record_wgmma<__nv_bfloat16, 256, false, true>("wgmma_bf16_256_mn_major_b", "exact");
  record_wgmma<__nv_bfloat16, 256, true, true>("wgmma_bf16_256_mn_major", "exact");
}

}  // namespace

int main(int argc, char** argv) {
  wanted.assign(argv + 1, argv + argc);
  int major = 0;
#ifndef RNN_EXT_CUDA_HOST
  check("device", cudaFree(nullptr));  // makes the context
#endif
  check("device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  record("ldmatrix", "exact", run_ldmatrix<false>, 32, 32 * 6);
  record("ldmatrix_trans", "exact", run_ldmatrix<true>, 32, 32 * 6);
  record("shared_address", "exact", run_shared_address, 32, 32);
  record("tanh_approx", "0.001", run_tanh_approx, 128, 128);
  record("counters", "exact", run_counters, 128, 7);
  record_cooperative();
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
  if (major >= 9) {
    record("early_launch", "exact", 128, [](const Buffer& in, uint32_t* out) {
      const uint32_t* const words = in.data;
      const cudaError_t first = RNN_EXT_LAUNCH(run_early_launch, dim3(1), dim3(128), 0, nullptr, words, out);
      if (first != cudaSuccess) return first;
      return RNN_EXT_LAUNCH_EARLY(run_early_launch, dim3(1), dim3(128), 0, nullptr, true, words, out);
    });
    record("cluster", "exact", run_cluster, 32, 64 * 16, 2);
    record("mbarrier", "exact", run_mbarrier, 32, 2 * 4 * 32, 2);
    record("st_async", "exact", run_st_async, 32, 2 * 2 * 32 * 7, 2);
    record("stmatrix", "exact", run_stmatrix, 32, 32 * 4);
    record("elect_one", "exact", run_elect_one, 64, 64);
    record_tma();
  }
  if (major == 9) {
    record("registers", "exact", run_registers, 384, 384);
    record_tma_multicast();
    record_all_wgmma();
  }
  if (recorded == wanted.size()) return 0;
  std::fprintf(stderr, "this device has no such wrapper\n");
  return 1;
}
