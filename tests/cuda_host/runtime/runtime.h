// The host runtime: runs a CUDA grid on one operating-system thread, a fiber per CUDA thread. Tests only.
//
// A CUDA thread runs until it blocks: barriers, warp collectives and waits are the only points at which another one
// takes over, and a seeded policy picks which. What a kernel may rely on is exactly what CUDA promises:
//   - shared memory starts out as NaN, and ends where the launch said (AddressSanitizer guards it);
//   - under ThreadSanitizer only real CUDA synchronisation orders two threads' accesses, so a missing barrier is a race
//     report even when the schedule happened to be kind;
//   - misuse that would hang or be undefined on a GPU ends the launch with an Error that names thread, file and line.
//
// This header is what cuda_host.h and the host bodies of csrc/cuda/ptx/ptx*.cuh call.
#pragma once
#include <vector_functions.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace emu {

// A launch that failed. what() names the kernel, the launch, and the thread, file and line where it went wrong.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The caller's file and line, when used as a default argument.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

enum class Policy {
  kAscending,    // the ready thread with the lowest index
  kRandom,       // any
  kDescending,   // the highest index; blocks in descending order too
  kRandomWarps,  // warps have priorities, reshuffled now and then: some run far ahead of others
};

struct Options {
  uint64_t seed = 0;  // every choice follows from it
  Policy policy = Policy::kAscending;
  int resident_blocks = 1;         // blocks that run at the same time; 0: the whole grid, as in a cooperative launch
  bool late_engines = false;       // asynchronous copies and wgmma happen as late as they may
  size_t smem_limit = 227 * 1024;  // bytes a block, as on sm_90
  int compute_capability = 90;     // what launchers that ask are told
  int multiprocessors = 132;
};
inline Options options;
inline thread_local bool has_context = false;  // the driver's: bound by launches and by cudaSetDevice

// Varies policy, residency and the engines' haste with the seed, so that a range of seeds covers their combinations.
void set_options_from_seed(uint64_t seed);

// ---- the running thread ---------------------------------------------------------------------------------------------

struct ThreadView {
  uint3 thread_index, block_index;
  dim3 block_dim, grid_dim;
};
inline const ThreadView* current = nullptr;  // kernels read it through threadIdx and its like

// Ends the launch with an Error.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(Where where, const char* format, ...);

// ---- launches -------------------------------------------------------------------------------------------------------

enum class LaunchKind {
  kPlain,
  kEarly,        // it may start before the launch before it has ended
  kCooperative,  // all blocks are resident at once
};

struct Launch {
  const char* kernel;
  Where where;
  dim3 grid, block;
  dim3 cluster;
  size_t smem_bytes;
  LaunchKind kind;
};

// False, without having run, if the device has no room for all blocks of a cooperative launch.
bool run_grid(const Launch& launch, void (*body)(void*), void* closure, size_t closure_bytes);

// How many blocks of so many threads and bytes of dynamic shared memory a multiprocessor holds, as far as that does not
// depend on their registers, which nobody here knows.
int blocks_per_multiprocessor(int threads, size_t smem_bytes);

// The block's dynamic shared memory, of which the kernel uses `bytes`.
void* shared_memory(size_t bytes, Where where);

// A pointer into shared memory as the 32-bit address that PTX uses, and the check that every wrapper makes of one. The
// block's rank in its cluster is in the high bits, so that an address means the same to every block.
constexpr uint32_t kSmemBase = 1024;  // the window's first bytes are the system's, as on sm_90
constexpr int kRankShift = 24;
uint32_t shared_address(const void* p, Where where);
void check_shared(const void* p, size_t bytes, size_t alignment, const char* what, Where where);

// ---- blocks, warps, clusters ----------------------------------------------------------------------------------------

// Barrier `id` (0..15) of `threads` threads, or of the whole block if 0.
void barrier_sync(int id, int threads, const char* what, Where where);
void barrier_arrive(int id, int threads, const char* what, Where where);

// __syncthreads_count: how many threads of the block passed true.
int barrier_count(bool predicate, const char* what, Where where);

// The last lane of the mask to arrive runs `work` over all lanes' arguments. Lanes outside the mask have null.
// `orders_memory`: as __syncwarp, unlike the shuffles, whose only promise is the exchange.
void warp_collective(uint32_t mask, const char* what, Where where, void* argument,
                     void (*work)(void* const* arguments, uint32_t mask), bool orders_memory = false);

// Replaces `value` by that of lane `source`; lanes that name one outside the mask get garbage, as on the device.
void shuffle(void* value, size_t bytes, int source, uint32_t mask, const char* what, Where where);
uint32_t ballot(bool predicate, uint32_t mask, const char* what, Where where);
int lane_index();

// In a launch that is not early, there is nothing to wait for.
void wait_for_previous_launch();

void cluster_arrive(Where where);
void cluster_arrive_relaxed(Where where);
void cluster_wait(Where where);
uint32_t cluster_rank();
uint32_t cluster_size();

// The address of the same place in that block's shared memory, and what `bytes` bytes there are for an aligned access.
uint32_t cluster_address(const void* shared, uint32_t rank, Where where);
void* cluster_memory(uint32_t address, size_t bytes, const char* what, Where where);

// In every polling loop. Fails when the polling does not end.
void spin(Where where);

// ---- cp.async -------------------------------------------------------------------------------------------------------

void cp_async(void* shared, const void* global, int bytes, int valid_bytes, Where where);
void cp_async_commit();
void cp_async_wait(int groups_in_flight);

}  // namespace emu
