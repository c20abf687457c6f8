// The runtime's inside, shared by its source files: threads, blocks, clusters and who runs next.
//
// All of this is compiled without sanitizers. It must not call memcpy or touch the heap from a CUDA thread either:
// those are intercepted, and ThreadSanitizer would take the runtime's own bookkeeping for the kernel's memory traffic.
#pragma once
#include "fiber.h"
#include "hopper.h"
#include "runtime.h"
#include "sanitizers.h"

namespace emu {

constexpr int kWarp = 32;
constexpr int kMaxBlockThreads = 1024;
constexpr int kMaxWarps = kMaxBlockThreads / kWarp;
constexpr int kMaxFibers = 8000;  // ThreadSanitizer has no more
constexpr int kMaxCopies = 256;   // cp.async in flight in one thread
constexpr int kMaxGroups = 64;    // groups of wgmma or bulk stores that are waited for one by one
constexpr int kMaxWgmma = 64;     // in flight in one warpgroup

enum class State : uint8_t { kReady, kBlocked, kDone };

struct Barrier {
  int arrived, expected;
  uint32_t phase;
  const char* what;
  Where where;
  Edge edges[2];  // by phase: a thread of the next round must not order one that still leaves this round
  int votes[2];
};

struct Collective {
  uint32_t mask, arrived, phase;
  const char* what;
  Where where;
  void* arguments[kWarp];
  Edge edges[2];
};

struct Copy {  // one cp.async in flight
  char* shared;
  const char* global;
  int bytes, valid_bytes, group;
};

struct Wgmma {
  uint64_t a, b;  // descriptors
  WgmmaShape shape;
  Where where;
};

struct WgmmaQueue {  // of one warpgroup, executed in order
  int issued[4];     // by each of its warps
  int done;
  Wgmma operations[kMaxWgmma];
  Edge edge;
};

struct Thread;
struct Cluster;

struct Block {
  uint3 index;
  Cluster* cluster;
  Thread* threads;
  int size, live;
  char* smem;
  size_t smem_bytes;
  Barrier barriers[16];
  Collective collectives[kMaxWarps][4];  // as many masks of one warp may be under way at once
  WgmmaQueue wgmma[kMaxWarps / 4];
  Edge async_proxy;  // from writes of threads, through fence.proxy.async, and of copies, to who reads shared memory
  Edge exited;
};

struct Cluster {
  Block* blocks;
  int size;
  Barrier barrier;
  Edge inits;  // from fence_mbarrier_init, through any barrier of the cluster
};

struct Thread : ThreadView {
  Fiber fiber;
  Block* block;
  int rank;  // within the block
  State state;
  const void* waits_for;
  const char* waits_in;
  Where where;
  uint32_t priority;
  bool polling;
  int polls;
  uint32_t cluster_phase;
  bool cluster_arrived;

  Copy copies[kMaxCopies];
  int copy_count, copy_group;

  float* accumulators[kMaxWgmma];                   // of each wgmma in flight
  int wgmma_groups[kMaxGroups], wgmma_group_count;  // how much its warp had issued at each commit
  bool wgmma_fenced;
  bool has_waited_for_previous_launch;

  int stores_issued, stores_done;  // by TMA
  int store_groups[kMaxGroups], store_group_count;
  Edge stores_read;

  int lane() const { return rank % kWarp; }
  int warp() const { return rank / kWarp; }
};

Thread& self();
uint32_t random_bits();

void* scheduler_fiber();  // ThreadSanitizer's
void make_ready(Thread& thread);
void yield();
void block_on(const void* object, const char* what, Where where);
void wake_all(Block& block, const void* object);

// Work of an asynchronous engine: run by the scheduler at some later moment, by its options as late as can be. Work
// with the same non-null queue stays in order. Runs as a thread of its own, ordered with no other, or as the one that
// lasts (see AnotherThread).
constexpr size_t kEngineWorkBytes = 384;
void engine_push(const void* queue, const void* work, size_t bytes, void (*run)(void* work), Where where,
                 void** lasting);
template <typename Work>
void engine_push(const void* queue, const Work& work, void (*run)(void* work), Where where, void** lasting = nullptr) {
  static_assert(sizeof(Work) <= kEngineWorkBytes && __is_trivially_copyable(Work));
  engine_push(queue, &work, sizeof(Work), run, where, lasting);
}

// Lets other threads and the engines run as long as those have very much to do. For operations that a thread may issue
// by the thousand: beyond some hundreds in flight, one of them, whichever, happens before there is a next.
void engine_wait_for_room();

// An Edge for one engine operation, from its issue to its run.
Edge& next_operation_edge();

inline void copy_bytes(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<char*>(to)[i] = static_cast<const char*>(from)[i];
}

}  // namespace emu
