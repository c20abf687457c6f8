// Inline PTX and polling loops, sm_75 to sm_80: with ptx_sm90.cuh the only place for either. Every wrapper has a body
// for the device and one for the host runtime of tests/cuda_host, and a unit test in test_wrappers.cpp.
//
// A wrapper that the architecture being compiled for does not have traps: the launcher must not get there. So a variant
// is chosen by the caller or by a template argument, never by __CUDA_ARCH__ inside a kernel, and all of them run on the
// host.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx/launch.cuh"
#ifdef RNN_EXT_CUDA_HOST
#include "tensor_core.h"
#endif

// RNN_EXT_PTX_SMxx(device, host): one of the two, or a trap below that architecture.
#ifdef RNN_EXT_CUDA_HOST
#define RNN_EXT_PTX_SM75(device, host) host
#define RNN_EXT_PTX_SM80(device, host) host
#else
#define RNN_EXT_PTX_SM75(device, host) device
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define RNN_EXT_PTX_SM80(device, host) device
#else
#define RNN_EXT_PTX_SM80(device, host) __trap()
#endif
#endif

#define RNN_EXT_PTX_INLINE __device__ __forceinline__

namespace rnn_ext::cuda::ptx {

// The caller's place in the source, which the host runtime's reports name. Nothing on the device.
#ifdef RNN_EXT_CUDA_HOST
using emu::Where;
#else
struct Where {
  static __device__ constexpr Where here() { return {}; }
};
#endif

// ---- asynchronous copies --------------------------------------------------------------------------------------------

// A pointer into shared memory as PTX addresses it.
RNN_EXT_PTX_INLINE uint32_t shared_address(const void* p, [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM75(return static_cast<uint32_t>(__cvta_generic_to_shared(p)), return emu::shared_address(p, where));
}

// Copies `kBytes` from global to shared memory: the first `valid_bytes` are read, the rest becomes zero. With
// valid_bytes = 0 the source is not read, but it must still be an aligned address. 16-byte copies bypass L1, which
// weights and activations of one tile would only pass through.
template <int kBytes>
RNN_EXT_PTX_INLINE void cp_async(void* shared, const void* global, int valid_bytes,
                                 [[maybe_unused]] Where where = Where::here()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "sizes that cp.async has");
  if constexpr (kBytes == 16) {
    RNN_EXT_PTX_SM80(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                                  "l"(global), "r"(valid_bytes) : "memory"),
                     emu::cp_async(shared, global, kBytes, valid_bytes, where));
  } else {
    RNN_EXT_PTX_SM80(asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                                  "l"(global), "n"(kBytes), "r"(valid_bytes) : "memory"),
                     emu::cp_async(shared, global, kBytes, valid_bytes, where));
  }
}

// Ends a group of this thread's copies; it may be empty.
RNN_EXT_PTX_INLINE void cp_async_commit() {
  RNN_EXT_PTX_SM80(asm volatile("cp.async.commit_group;" :: : "memory"), emu::cp_async_commit());
}

// Waits until at most the `kGroups` latest groups of this thread are in flight. Other threads see the bytes only after
// a barrier.
template <int kGroups>
RNN_EXT_PTX_INLINE void cp_async_wait() {
  RNN_EXT_PTX_SM80(asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory"), emu::cp_async_wait(kGroups));
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

// Four or two 8x8 matrices of 16-bit elements. Lane 8 i + r gives the 16-byte aligned address of row r of matrix i;
// lane l gets elements 2 (l % 4) and the next of row l / 4, or of column l / 4 if transposed.
template <bool kTransposed = false>
RNN_EXT_PTX_INLINE void ldmatrix_x4(uint32_t (&fragment)[4], const void* row,
                                    [[maybe_unused]] Where where = Where::here()) {
  if constexpr (kTransposed) {
    RNN_EXT_PTX_SM75(
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(fragment[0]),
                     "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3]) : "r"(shared_address(row)) : "memory"),
        (emu::ldmatrix<4, true>(fragment, row, where)));
  } else {
    RNN_EXT_PTX_SM75(
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(fragment[0]),
                     "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3]) : "r"(shared_address(row)) : "memory"),
        (emu::ldmatrix<4, false>(fragment, row, where)));
  }
}
template <bool kTransposed = false>
RNN_EXT_PTX_INLINE void ldmatrix_x2(uint32_t (&fragment)[2], const void* row,
                                    [[maybe_unused]] Where where = Where::here()) {
  if constexpr (kTransposed) {
    RNN_EXT_PTX_SM75(asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(fragment[0]),
                                  "=r"(fragment[1]) : "r"(shared_address(row)) : "memory"),
                     (emu::ldmatrix<2, true>(fragment, row, where)));
  } else {
    RNN_EXT_PTX_SM75(asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(fragment[0]),
                                  "=r"(fragment[1]) : "r"(shared_address(row)) : "memory"),
                     (emu::ldmatrix<2, false>(fragment, row, where)));
  }
}

// c (16x8) += a (16x8, row-major) b (8x8, column-major), tf32. Lane l = 4 g + t holds
//   a: (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4)     b: (t, g) (t + 4, g)
//   c: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
// The unit ignores the low 13 bits of a and b: round with to_tf32 first.
RNN_EXT_PTX_INLINE void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                         [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM80(asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                                "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]),
                                "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                                "r"(b[0]), "r"(b[1])),
                   emu::mma_m16n8k8_tf32(c, a, b, where));
}

// c (16x8) += a (16x16, row-major) b (16x8, column-major), T = __half (from sm_75) or __nv_bfloat16 (from sm_80), two
// to a register, the lower k in the low 16 bits. Lane l = 4 g + t holds
//   a: (g, 2t..) (g + 8, 2t..) (g, 2t + 8..) (g + 8, 2t + 8..)     b: (2t.., g) (2t + 8.., g)     c: as above
template <typename T>
RNN_EXT_PTX_INLINE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                     [[maybe_unused]] Where where = Where::here());
template <>
RNN_EXT_PTX_INLINE void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             [[maybe_unused]] Where where) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  // sm_75 has it for 8 of k: the first ones, then the others.
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%8}, {%0,%1,%2,%3};\n\t"
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%6,%7}, {%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  RNN_EXT_PTX_SM80(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                                "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]),
                                "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                                "r"(b[0]), "r"(b[1])),
                   emu::mma_m16n8k16_f16(c, a, b, where));
#endif
}
template <>
RNN_EXT_PTX_INLINE void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                    [[maybe_unused]] Where where) {
  RNN_EXT_PTX_SM80(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                                "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]),
                                "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                                "r"(b[0]), "r"(b[1])),
                   emu::mma_m16n8k16_bf16(c, a, b, where));
}

// c (8x8) += a (8x4, row-major) b (4x8, column-major), IEEE fp64. Lane l = 4 g + t holds a (g, t), b (t, g) and
// c (g, 2t) (g, 2t + 1).
RNN_EXT_PTX_INLINE void mma_m8n8k4_f64(double (&c)[2], double a, double b,
                                       [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM80(
      asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+d"(c[0]),
                   "+d"(c[1]) : "d"(a), "d"(b)),
      emu::mma_m8n8k4_f64(c, &a, &b, where));
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// To tf32, to nearest with ties away from zero.
RNN_EXT_PTX_INLINE uint32_t to_tf32(float x) {
  uint32_t bits = 0;
  RNN_EXT_PTX_SM80(asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x)), bits = emu::round_to_tf32(x));
  return bits;
}

// tanh with a relative error of up to 2^-10.987: only for results that are then rounded to 16 bits.
RNN_EXT_PTX_INLINE float tanh_approx(float x) {
  float y = 0.f;
  RNN_EXT_PTX_SM75(asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)), y = emu::tanh_approx(x));
  return y;
}

// ---- order between blocks -------------------------------------------------------------------------------------------
//
// For one 32-bit counter in global memory. What a block's threads wrote before a __syncthreads, and one of them then
// released, is visible to a block of which a thread acquires the counter and then passes a __syncthreads.

// Adds, and returns what was there.
RNN_EXT_PTX_INLINE uint32_t atomic_add_acq_rel(uint32_t* counter, uint32_t value) {
  uint32_t old = 0;
  RNN_EXT_PTX_SM75(
      asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory"),
      old = __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL));
  return old;
}

// Counts 0, 1, ... limit and back to 0, so that whoever gets `limit` is the last and leaves the counter as it was.
RNN_EXT_PTX_INLINE uint32_t atomic_inc_acq_rel(uint32_t* counter, uint32_t limit) {
  uint32_t old = 0;
  RNN_EXT_PTX_SM75(
      asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(limit) : "memory"),
      old = emu::atomic_inc_acq_rel(counter, limit));
  return old;
}

RNN_EXT_PTX_INLINE void red_add_release(uint32_t* counter, uint32_t value) {
  RNN_EXT_PTX_SM75(asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory"),
                   (void)__atomic_fetch_add(counter, value, __ATOMIC_RELEASE));
}

RNN_EXT_PTX_INLINE uint32_t ld_acquire(const uint32_t* counter) {
  uint32_t value = 0;
  RNN_EXT_PTX_SM75(asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory"),
                   value = __atomic_load_n(counter, __ATOMIC_ACQUIRE));
  return value;
}

RNN_EXT_PTX_INLINE void st_release(uint32_t* counter, uint32_t value) {
  RNN_EXT_PTX_SM75(asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory"),
                   __atomic_store_n(counter, value, __ATOMIC_RELEASE));
}

// Polls until the counter has reached `value`. Only among blocks that are resident together.
//
// A wait that does not end traps, and the next call of CUDA returns cudaErrorLaunchFailure ("unspecified launch
// failure"): no other wrapper does that on an architecture that has it. A message would cost every kernel that waits a
// stack frame and ten registers.
//
// What is bounded is the number of polls, each a round trip to L2 and up to 64 ns of sleep, together some seconds: a
// clock would go on while the GPU runs something else or stands in a debugger, and polls slow down as the rest does
// under a tool that watches every access.
constexpr uint32_t kMaxPolls = 1u << 24;

RNN_EXT_PTX_INLINE void wait_at_least(const uint32_t* counter, uint32_t value,
                                      [[maybe_unused]] Where where = Where::here()) {
  for (uint32_t polls = 0; ld_acquire(counter) < value; ++polls) {
    if (polls == kMaxPolls) __trap();  // on the host, spin fails before
    RNN_EXT_PTX_SM75(__nanosleep(32), emu::spin(where));
  }
}

// ---- barriers of a part of the block --------------------------------------------------------------------------------

// Barrier `id`, 1 to 15, of `threads` threads in whole warps; 0 is that of __syncthreads.
RNN_EXT_PTX_INLINE void named_barrier_sync(int id, int threads, [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM75(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"),
                   emu::barrier_sync(id, threads, "bar.sync", where));
}

// Counts at the barrier without waiting there.
RNN_EXT_PTX_INLINE void named_barrier_arrive(int id, int threads, [[maybe_unused]] Where where = Where::here()) {
  RNN_EXT_PTX_SM75(asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"),
                   emu::barrier_arrive(id, threads, "bar.arrive", where));
}

}  // namespace rnn_ext::cuda::ptx
