// CUDA's names for a host compiler: what csrc/cuda/ptx/launch.cuh includes when RNN_EXT_CUDA_HOST is defined, so that a
// kernel's source compiles unchanged under g++ and runs on the runtime in this folder. Tests only.
//
// A kernel must keep to the discipline of csrc/README.md: shared memory and launches through the macros of launch.cuh,
// inline PTX and polling loops only inside ptx*.cuh, order between blocks only through its release/acquire wrappers.
#pragma once
#ifdef __CUDACC__
#error "cuda_host.h is for a host compiler; nvcc sees the real thing"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "faults.h"
#include "runtime.h"

// Without nvcc these expand to nothing or to attributes that g++ does not know. A bare __shared__ must not compile: the
// runtime could neither poison nor guard it.
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __cluster_dims__
#define __cluster_dims__ use_RNN_EXT_LAUNCH_CLUSTER_instead_of_cluster_dims
#undef __grid_constant__
#define __grid_constant__
#undef __shared__
#define __shared__ use_RNN_EXT_SMEM_instead_of_shared

#define threadIdx (::emu::current->thread_index)
#define blockIdx (::emu::current->block_index)
#define blockDim (::emu::current->block_dim)
#define gridDim (::emu::current->grid_dim)
#define warpSize 32

// ---- the two macros of launch.cuh -----------------------------------------------------------------------------------

namespace emu {

// Runs the grid to its end, if a cooperative one has room. Throws Error on a bad launch or a fault in the kernel, so
// that no test can overlook it.
template <typename... P, typename... A>
cudaError_t launch(const Launch& config, cudaStream_t, void (*kernel)(P...), A&&... a) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  };
  has_context = true;
  Call call{kernel, std::tuple<P...>(std::forward<A>(a)...)};
  const bool has_run = run_grid(
      config, [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->arguments); }, &call,
      sizeof call);
  return has_run ? cudaSuccess : cudaErrorCooperativeLaunchTooLarge;
}

template <typename T>
T& block_memory(Where where) {
  return *static_cast<T*>(shared_memory(sizeof(T), where));
}

}  // namespace emu

#define RNN_EXT_SMEM(T, s) T& s = ::emu::block_memory<T>(::emu::Where::here())

#define EMU_LAUNCH(kernel, grid, block, cluster, smem_bytes, stream, kind, ...)                                       \
  ::emu::launch(::emu::Launch{#kernel, ::emu::Where::here(), grid, block, cluster, smem_bytes, kind}, stream, kernel, \
                ##__VA_ARGS__)

#define RNN_EXT_LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  EMU_LAUNCH(kernel, grid, block, dim3(1), smem_bytes, stream, ::emu::LaunchKind::kPlain, ##__VA_ARGS__)

#define RNN_EXT_LAUNCH_CLUSTER(kernel, grid, block, cluster, smem_bytes, stream, ...) \
  EMU_LAUNCH(kernel, grid, block, cluster, smem_bytes, stream, ::emu::LaunchKind::kPlain, ##__VA_ARGS__)

#define RNN_EXT_LAUNCH_EARLY(kernel, grid, block, smem_bytes, stream, early, ...) \
  EMU_LAUNCH(kernel, grid, block, dim3(1), smem_bytes, stream,                    \
             (early) ? ::emu::LaunchKind::kEarly : ::emu::LaunchKind::kPlain, ##__VA_ARGS__)

#define RNN_EXT_LAUNCH_COOPERATIVE(kernel, grid, block, smem_bytes, stream, ...) \
  EMU_LAUNCH(kernel, grid, block, dim3(1), smem_bytes, stream, ::emu::LaunchKind::kCooperative, ##__VA_ARGS__)

// ---- blocks and warps -----------------------------------------------------------------------------------------------

inline void __syncthreads(emu::Where where = emu::Where::here()) { emu::barrier_sync(0, 0, "__syncthreads", where); }
inline int __syncthreads_count(int predicate, emu::Where where = emu::Where::here()) {
  return emu::barrier_count(predicate != 0, "__syncthreads_count", where);
}
inline int __syncthreads_or(int predicate, emu::Where where = emu::Where::here()) {
  return emu::barrier_count(predicate != 0, "__syncthreads_or", where) != 0;
}
inline int __syncthreads_and(int predicate, emu::Where where = emu::Where::here()) {
  return emu::barrier_count(predicate == 0, "__syncthreads_and", where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, emu::Where where = emu::Where::here()) {
  emu::warp_collective(mask, "__syncwarp", where, nullptr, nullptr, /*orders_memory=*/true);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emu::Where where = emu::Where::here()) {
  const int lane = emu::lane_index();
  emu::shuffle(&value, sizeof value, (lane & -width) | (source & (width - 1)), mask, "__shfl_sync", where);
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, emu::Where where = emu::Where::here()) {
  const int lane = emu::lane_index(), source = lane ^ flip;
  emu::shuffle(&value, sizeof value, source / width > lane / width ? lane : source, mask, "__shfl_xor_sync", where);
  return value;
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, emu::Where where = emu::Where::here()) {
  const int lane = emu::lane_index();
  const int source = lane % width + delta < width ? lane + delta : lane;
  emu::shuffle(&value, sizeof value, source, mask, "__shfl_down_sync", where);
  return value;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, emu::Where where = emu::Where::here()) {
  const int lane = emu::lane_index();
  emu::shuffle(&value, sizeof value, lane % width >= delta ? lane - delta : lane, mask, "__shfl_up_sync", where);
  return value;
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emu::Where where = emu::Where::here()) {
  return emu::ballot(predicate != 0, mask, "__ballot_sync", where);
}
inline int __any_sync(unsigned mask, int predicate, emu::Where where = emu::Where::here()) {
  return emu::ballot(predicate != 0, mask, "__any_sync", where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emu::Where where = emu::Where::here()) {
  return emu::ballot(predicate == 0, mask, "__all_sync", where) == 0;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

// Fences order one thread's own accesses. They carry no happens-before edge here: between blocks this project uses the
// release/acquire wrappers, and a kernel that relies on a fence alone shows up as a race.
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
void __stwb(T* p, T value) {
  struct [[gnu::may_alias]] Any {  // kernels store vectors of integers where others read numbers
    T value;
  };
  reinterpret_cast<Any*>(p)->value = value;
}

// Atomics are relaxed, as CUDA's are.
template <typename T, typename F>
T atomic_update(T* p, F next) {
  T old, wanted;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    wanted = next(old);
  } while (!__atomic_compare_exchange(p, &old, &wanted, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <typename T>
T atomicAdd(T* p, std::common_type_t<T> value) {
  return atomic_update(p, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicSub(T* p, std::common_type_t<T> value) {
  return atomic_update(p, [=](T old) { return static_cast<T>(old - value); });
}
template <typename T>
T atomicMax(T* p, std::common_type_t<T> value) {
  return atomic_update(p, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* p, std::common_type_t<T> value) {
  return atomic_update(p, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicOr(T* p, std::common_type_t<T> value) {
  return atomic_update(p, [=](T old) { return static_cast<T>(old | value); });
}
template <typename T>
T atomicExch(T* p, std::common_type_t<T> value) {
  return atomic_update(p, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* p, std::common_type_t<T> compare, std::common_type_t<T> value) {
  return atomic_update(p, [=](T old) { return old == compare ? value : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return atomic_update(p, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

template <typename To, typename From>
To emu_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}
inline unsigned __float_as_uint(float x) { return emu_bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return emu_bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return emu_bit_cast<float>(x); }
inline float __int_as_float(int x) { return emu_bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return emu_bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return emu_bit_cast<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// CUDA has min and max for mixed integer types in the global namespace.
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

[[noreturn]] inline void __trap(emu::Where where = emu::Where::here()) { emu::fail(where, "__trap"); }
