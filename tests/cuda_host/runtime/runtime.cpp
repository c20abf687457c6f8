#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "scheduler.h"
#include "traffic.h"

namespace emu {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kPage = 4096;
constexpr size_t kSmemBytes = size_t{1} << 30;  // for all resident blocks together
constexpr size_t kSmemMargin = 128;  // forbidden bytes before and after; also keeps blocks from a lucky 1024-alignment
constexpr int kMaxEngineWork = 512;
constexpr int kCrowdedEngines = kMaxEngineWork / 2;  // who can wait leaves the rest to who cannot
constexpr uint64_t kTsanWaveThreads = 512;           // the cost of every edge grows with the number of threads
constexpr int kMaxPolls = 20000;

struct EngineWork {
  const void* queue;
  uint64_t number;  // they are numbered as they were issued
  void (*run)(void*);
  Where where;
  void** lasting;
  size_t bytes;
  alignas(16) char work[kEngineWorkBytes];
};

// The grid that runs. There is one at a time; run_grid holds a lock.
struct Grid {
  const Launch* launch;
  void (*body)(void*);
  void* closure;
  alignas(64) char arguments[4096];
  Fiber scheduler;
  Thread** ready;
  int ready_count;
  uint64_t random_state;
  EngineWork engine[kMaxEngineWork];  // in no order
  int engine_count;
  uint64_t engine_issued;
  Edge operation_edges[4096];
  int operations;
  Edge start, end;  // of a wave: launches in one stream are ordered
  bool failed;
  char message[2048];
};
Grid grid;
std::mutex one_grid;

// Zeroed pages for the most that can ever be needed; the system provides those that are touched.
template <typename T>
T* reserve(size_t count) {
  void* p =
      mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(p);
}

// What CUDA threads run on. Thread slot t always has stack t and, under ThreadSanitizer, fiber t, for whose creation
// there would be no time in every launch. So one slot's threads of successive waves are ordered, as if every wave were
// a launch of its own: races between blocks are found among the blocks of one wave.
struct Slots {
  Thread* const threads = reserve<Thread>(kMaxFibers);
  Thread** const ready = reserve<Thread*>(kMaxFibers);
  Block* const blocks = reserve<Block>(kMaxFibers);
  Cluster* const clusters = reserve<Cluster>(kMaxFibers);
  char* const stacks = reserve<char>(kMaxFibers * kStackBytes);
  char* const smem = reserve<char>(kSmemBytes);
  size_t used = 0;  // slots whose stack has its guard page

  char* stack(size_t slot) const { return stacks + slot * kStackBytes; }
};
Slots& slots() {
  static Slots all;
  return all;
}

const char* file_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash != nullptr ? slash + 1 : path;
}

bool same_place(Where a, Where b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// ---- the scheduler --------------------------------------------------------------------------------------------------

void thread_main() {
  entered(grid.scheduler);
  Thread& me = self();
  me.has_waited_for_previous_launch = false;
  if (grid.launch->kind != LaunchKind::kEarly) wait_for_previous_launch();
  try {
    grid.body(grid.closure);
    if (!me.has_waited_for_previous_launch) fail(me.where, "returned without a wait for the previous launch");
    if (me.copy_count > 0) fail(me.where, "returned with %d cp.async still in flight", me.copy_count);
    const WgmmaQueue& queue = me.block->wgmma[me.warp() / 4];
    if (queue.done < queue.issued[me.warp() % 4]) fail(me.where, "returned with wgmma still in flight");
    if (me.stores_done < me.stores_issued) fail(me.where, "returned before its bulk stores had read shared memory");
  } catch (const Error& error) {
    grid.failed = true;
    std::snprintf(grid.message, sizeof grid.message, "%s", error.what());
  }
  Block& block = *me.block;
  block.exited.release();
  me.state = State::kDone;
  if (--block.live == 0 && block.cluster->size > 1 && !grid.failed) {
    // Other blocks must not read this one's shared memory any more; whoever does shall see NaN, or be seen racing.
    block.exited.acquire();
    traffic::scribble(block.smem, block.smem_bytes);
  }
  grid.end.release();
  switch_fiber(me.fiber, grid.scheduler, /*from_ends=*/true);
}

bool goes_first(const Thread& a, const Thread& b) {
  if (a.polling || b.polling) return (a.polling ? a.polls : -1) < (b.polling ? b.polls : -1);  // pollers come last
  switch (options.policy) {
    case Policy::kRandomWarps:
      if (a.priority != b.priority) return a.priority > b.priority;
      return a.rank < b.rank;
    case Policy::kDescending:
      return a.rank > b.rank;
    default:
      return a.rank < b.rank;
  }
}

Thread& take_next() {
  int next = 0;
  if (options.policy == Policy::kRandom) {
    next = static_cast<int>(random_bits() % grid.ready_count);
  } else {
    for (int i = 1; i < grid.ready_count; ++i) {
      if (goes_first(*grid.ready[i], *grid.ready[next])) next = i;
    }
  }
  Thread& thread = *grid.ready[next];
  grid.ready[next] = grid.ready[--grid.ready_count];
  if (options.policy == Policy::kRandomWarps && random_bits() % 64 == 0) thread.priority = random_bits();
  return thread;
}

void run_thread(Thread& thread) {
  current = &thread;
  switch_fiber(grid.scheduler, thread.fiber);
  current = nullptr;
}

void copy_work(EngineWork& to, const EngineWork& from) {
  copy_bytes(&to, &from, offsetof(EngineWork, work) + from.bytes);
}

// Takes one piece of work, the oldest of its queue, and runs it.
void run_engine() {
  EngineWork* const all = grid.engine;
  int i = static_cast<int>(random_bits() % grid.engine_count);
  if (all[i].queue != nullptr) {
    for (int j = 0; j < grid.engine_count; ++j) {
      if (all[j].queue == all[i].queue && all[j].number < all[i].number) i = j;
    }
  }
  EngineWork work;
  copy_work(work, all[i]);
  if (i != --grid.engine_count) copy_work(all[i], all[grid.engine_count]);
  char name[128];
  std::snprintf(name, sizeof name, "asynchronous operation of %s:%d", file_name(work.where.file), work.where.line);
  const AnotherThread engine(grid.scheduler.tsan_fiber, name, work.lasting);
  try {
    work.run(work.work);
  } catch (const Error& error) {
    grid.failed = true;
    std::snprintf(grid.message, sizeof grid.message, "%s", error.what());
  }
  grid.end.release();
}

// Says which threads wait where, alike ones together.
std::string deadlock_report(const Block* blocks, int block_count) {
  std::string report = "deadlock:";
  int shown = 0;
  for (int b = 0; b < block_count; ++b) {
    const Block& block = blocks[b];
    if (block.live == 0) continue;
    const auto alike = [&](const Thread& x, const Thread& y) {
      return x.state == y.state &&
             (x.state == State::kDone || (x.waits_for == y.waits_for && same_place(x.where, y.where)));
    };
    for (int t = 0; t < block.size; ++t) {
      const Thread& thread = block.threads[t];
      const auto is_like = [&](const Thread& other) { return alike(thread, other); };
      if (std::any_of(block.threads, block.threads + t, is_like)) continue;
      if (++shown > 8) return report + " ...";
      const auto count = std::count_if(block.threads + t, block.threads + block.size, is_like);
      char line[256];
      std::snprintf(line, sizeof line, "%s block (%u,%u,%u): %d threads, the first %d, ", shown > 1 ? ";" : "",
                    block.index.x, block.index.y, block.index.z, static_cast<int>(count), t);
      report += line;
      if (thread.state == State::kDone) {
        report += "have returned";
      } else {
        std::snprintf(line, sizeof line, "wait in %s at %s:%d", thread.waits_in, file_name(thread.where.file),
                      thread.where.line);
        report += line;
      }
    }
  }
  return report;
}

void create_thread(Thread& thread, Block& block, int rank) {
  const dim3 dim = grid.launch->block;
  thread.thread_index = uint3{rank % dim.x, rank / dim.x % dim.y, rank / dim.x / dim.y};
  thread.block_index = block.index;
  thread.block_dim = dim;
  thread.grid_dim = grid.launch->grid;
  thread.block = &block;
  thread.rank = rank;
  thread.waits_for = nullptr;
  thread.waits_in = "";
  thread.where = grid.launch->where;
  thread.priority = rank % kWarp == 0 ? random_bits() : block.threads[rank - 1].priority;
  thread.polling = thread.cluster_arrived = thread.wgmma_fenced = false;
  thread.polls = thread.copy_count = thread.copy_group = thread.wgmma_group_count = 0;
  thread.stores_issued = thread.stores_done = thread.store_group_count = 0;
  thread.cluster_phase = 0;
  char name[64];
  std::snprintf(name, sizeof name, "block (%u,%u,%u) thread (%u,%u,%u)", block.index.x, block.index.y, block.index.z,
                thread.thread_index.x, thread.thread_index.y, thread.thread_index.z);
  create_fiber(thread.fiber, slots().stack(&thread - slots().threads), kStackBytes, thread_main, name);
  make_ready(thread);
}

// Block `rank` of cluster number `number`.
uint3 block_index(uint64_t number, uint32_t rank) {
  const dim3 c = grid.launch->cluster, g = grid.launch->grid;
  const uint64_t across = g.x / c.x, down = g.y / c.y;
  return {static_cast<uint32_t>(number % across) * c.x + rank % c.x,
          static_cast<uint32_t>(number / across % down) * c.y + rank / c.x % c.y,
          static_cast<uint32_t>(number / across / down) * c.z + rank / c.x / c.y};
}

// Gives a slot that was never used the page that traps an overflowing stack before it reaches its neighbour's.
void prepare_slots(size_t count) {
  Slots& all = slots();
  for (; all.used < count; ++all.used) mprotect(all.stack(all.used), kPage, PROT_NONE);
}

// The threads of a failed launch stopped in the middle: their stacks' marks and their fibers are of no use any more.
void clean_slots(size_t count) {
  Slots& all = slots();
  for (size_t t = 0; t < count; ++t) {
    allow_access(all.stack(t) + kPage, kStackBytes - kPage);
    destroy_fiber(all.threads[t].fiber);
  }
}

size_t smem_slot_bytes(const Launch& launch) { return (launch.smem_bytes + 2 * kSmemMargin + 1023) / 1024 * 1024; }

// Runs clusters [first, first + count) together, to their end.
void run_wave(uint64_t first, int count) {
  const Launch& launch = *grid.launch;
  const int cluster_size = static_cast<int>(launch.cluster.x * launch.cluster.y * launch.cluster.z);
  const int block_size = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  const int block_count = count * cluster_size;
  const size_t thread_count = static_cast<size_t>(block_count) * block_size;
  const size_t smem_slot = smem_slot_bytes(launch);
  prepare_slots(thread_count);
  grid.ready = slots().ready;
  grid.ready_count = 0;
  grid.engine_count = 0;

  Block* const blocks = slots().blocks;
  for (int b = 0; b < block_count; ++b) {
    Block& block = blocks[b];
    char* const smem = slots().smem + b * smem_slot;
    std::memset(static_cast<void*>(&block), 0, sizeof block);
    block.index = block_index(first + b / cluster_size, b % cluster_size);
    block.cluster = &slots().clusters[b / cluster_size];
    if (b % cluster_size == 0) *block.cluster = Cluster{&block, cluster_size, {}, {}};
    block.threads = &slots().threads[static_cast<size_t>(b) * block_size];
    block.size = block.live = block_size;
    block.smem = smem + kSmemMargin;
    block.smem_bytes = launch.smem_bytes;
    forbid_access(smem, smem_slot);
    allow_access(block.smem, block.smem_bytes);
    std::memset(block.smem, 0xff, block.smem_bytes);  // NaN in every floating-point format
    for (int t = 0; t < block_size; ++t) create_thread(block.threads[t], block, t);
  }

  grid.start.release();
  while (!grid.failed) {
    if (grid.engine_count >= kCrowdedEngines) {
      while (!grid.failed && grid.engine_count > kCrowdedEngines / 2) run_engine();
    }
    const bool engine_turn = grid.engine_count > 0 && !options.late_engines && random_bits() % 8 == 0;
    if (grid.ready_count > 0 && !engine_turn) {
      run_thread(take_next());
    } else if (grid.engine_count > 0) {
      run_engine();
    } else {
      break;
    }
  }
  grid.end.acquire();
  const bool stuck = std::any_of(blocks, blocks + block_count, [](const Block& b) { return b.live > 0; });
  if (!grid.failed && stuck) {
    grid.failed = true;
    std::snprintf(grid.message, sizeof grid.message, "%s", deadlock_report(blocks, block_count).c_str());
  }
  if (grid.failed) clean_slots(thread_count);
}

std::string launch_name(const Launch& launch) {
  return std::string("kernel ") + launch.kernel + ", launched at " + file_name(launch.where.file) + ":" +
         std::to_string(launch.where.line) + " with seed " + std::to_string(options.seed);
}

void check_launch(const Launch& launch) {
  const auto require = [&](bool holds, const char* what) {
    if (!holds) throw Error(launch_name(launch) + ": " + what);
  };
  const dim3 g = launch.grid, b = launch.block, c = launch.cluster;
  require(g.x > 0 && g.y > 0 && g.z > 0, "the grid is empty");
  require(g.x <= 2147483647u && g.y <= 65535 && g.z <= 65535, "the grid is larger than CUDA allows");
  require(b.x > 0 && b.y > 0 && b.z > 0, "the block is empty");
  require(b.x <= 1024 && b.y <= 1024 && b.z <= 64 && uint64_t{b.x} * b.y * b.z <= kMaxBlockThreads,
          "the block is larger than CUDA allows");
  require(launch.smem_bytes <= options.smem_limit, "more shared memory than the limit");
  require(c.x > 0 && c.y > 0 && c.z > 0 && uint64_t{c.x} * c.y * c.z <= 16, "a cluster has 1 to 16 blocks");
  require(g.x % c.x == 0 && g.y % c.y == 0 && g.z % c.z == 0, "the grid is not a multiple of the cluster");
}

}  // namespace

void set_options_from_seed(uint64_t seed) {
  options.seed = seed;
  options.policy = static_cast<Policy>(seed % 4);
  options.late_engines = ((seed ^ seed / 2 ^ seed / 4) & 1) != 0;  // twice in the first four seeds
  options.resident_blocks = seed / 8 % 2 != 0 ? 4 : 1;
}

int blocks_per_multiprocessor(int threads, size_t smem_bytes) {
  constexpr int kMostThreads = 2048, kMostBlocks = 32;  // of sm_90
  constexpr size_t kReserved = 1024;                    // of shared memory, a block; so one alone may have all but that
  const int by_threads = kMostThreads / ((threads + kWarp - 1) / kWarp * kWarp);
  const auto by_smem = static_cast<int>((options.smem_limit + kReserved) / (smem_bytes + kReserved));
  return std::min({by_threads, by_smem, kMostBlocks});
}

bool run_grid(const Launch& launch, void (*body)(void*), void* closure, size_t closure_bytes) {
  const std::lock_guard<std::mutex> lock(one_grid);
  check_launch(launch);
  grid.launch = &launch;
  grid.body = body;
  grid.closure = closure;
  if (launch.kind == LaunchKind::kEarly) {
    // Its threads may read the arguments, though nothing orders them with who wrote them.
    if (closure_bytes > sizeof grid.arguments) throw Error(launch_name(launch) + ": too many arguments");
    copy_bytes(grid.arguments, closure, closure_bytes);
    grid.closure = grid.arguments;
  }
  grid.random_state = options.seed * 0x9E3779B97F4A7C15u + 1;
  grid.failed = false;
  adopt_thread(grid.scheduler);

  const uint64_t cluster_size = launch.cluster.x * launch.cluster.y * launch.cluster.z;
  const uint64_t clusters = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z / cluster_size;
  const bool cooperative = launch.kind == LaunchKind::kCooperative;
  const auto block_size = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  const int have_room = options.multiprocessors * blocks_per_multiprocessor(block_size, launch.smem_bytes);
  if (cooperative && clusters > static_cast<uint64_t>(have_room)) return false;
  if (cluster_size > 8 && cluster_size > static_cast<uint64_t>(options.multiprocessors)) return false;
  const uint64_t cluster_threads = cluster_size * launch.block.x * launch.block.y * launch.block.z;
  const uint64_t at_most = std::max<uint64_t>(
      1, std::min(kMaxFibers / cluster_threads, kSmemBytes / smem_slot_bytes(launch) / cluster_size));
  uint64_t resident = std::max<uint64_t>(1, options.resident_blocks / cluster_size);
  if (cooperative || options.resident_blocks == 0) {
    if (clusters > at_most) throw Error(launch_name(launch) + ": too many threads to be resident all at once");
    resident = clusters;
  } else if (kTsan) {
    resident = std::max<uint64_t>(resident, kTsanWaveThreads / cluster_threads);
  }
  resident = std::min({resident, at_most, clusters});
  for (uint64_t done = 0; done < clusters && !grid.failed; done += resident) {
    const uint64_t count = std::min(resident, clusters - done);
    run_wave(options.policy == Policy::kDescending ? clusters - done - count : done, static_cast<int>(count));
  }
  if (grid.failed) throw Error(launch_name(launch) + ": " + grid.message);
  return true;
}

void fail(Where where, const char* format, ...) {
  char text[1024];
  int used = 0;
  if (current != nullptr) {
    const uint3 b = current->block_index, t = current->thread_index;
    used = std::snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u) at %s:%d: ", b.x, b.y, b.z, t.x, t.y,
                         t.z, file_name(where.file), where.line);
  } else {
    used =
        std::snprintf(text, sizeof text, "asynchronous operation issued at %s:%d: ", file_name(where.file), where.line);
  }
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text + used, sizeof text - used, format, arguments);
  va_end(arguments);
  throw Error(text);
}

Thread& self() { return *static_cast<Thread*>(const_cast<ThreadView*>(current)); }

uint32_t random_bits() {
  grid.random_state = grid.random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(grid.random_state >> 33);
}

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  grid.ready[grid.ready_count++] = &thread;
}

void* scheduler_fiber() { return grid.scheduler.tsan_fiber; }

void yield() {
  Thread& me = self();
  make_ready(me);
  switch_fiber(me.fiber, grid.scheduler);
}

void block_on(const void* object, const char* what, Where where) {
  Thread& me = self();
  me.waits_for = object;
  me.waits_in = what;
  me.where = where;
  me.state = State::kBlocked;
  switch_fiber(me.fiber, grid.scheduler);
}

void wake_all(Block& block, const void* object) {
  for (int t = 0; t < block.size; ++t) {
    Thread& thread = block.threads[t];
    if (thread.state == State::kBlocked && thread.waits_for == object) make_ready(thread);
  }
}

void engine_push(const void* queue, const void* work, size_t bytes, void (*run)(void*), Where where, void** lasting) {
  if (grid.engine_count == kMaxEngineWork)
    fail(where, "more than %d asynchronous operations in flight", kMaxEngineWork);
  EngineWork& slot = grid.engine[grid.engine_count++];
  slot.queue = queue;
  slot.number = grid.engine_issued++;
  slot.run = run;
  slot.where = where;
  slot.lasting = lasting;
  slot.bytes = bytes;
  copy_bytes(slot.work, work, bytes);
}

void engine_wait_for_room() {
  while (grid.engine_count >= kCrowdedEngines) yield();
}

Edge& next_operation_edge() { return grid.operation_edges[grid.operations++ % 4096]; }

void spin(Where where) {
  Thread& me = self();
  if (++me.polls > kMaxPolls) fail(where, "polls without end");
  me.polling = true;
  me.where = where;
  yield();
  me.polling = false;
}

// ---- shared memory --------------------------------------------------------------------------------------------------

void* shared_memory(size_t bytes, Where where) {
  const Block& block = *self().block;
  if (bytes > block.smem_bytes) {
    fail(where, "the kernel uses %zu bytes of shared memory and was launched with %zu", bytes, block.smem_bytes);
  }
  return block.smem;
}

static void check_offset(const Block& block, long offset, size_t bytes, size_t alignment, const char* what,
                         Where where) {
  if (offset < 0 || offset + bytes > block.smem_bytes) {
    fail(where, "%s: %zu bytes at shared offset %ld lie outside the block's %zu bytes", what, bytes, offset,
         block.smem_bytes);
  }
  if (offset % static_cast<long>(alignment) != 0) {
    fail(where, "%s: misaligned, shared offset %ld is not a multiple of %zu", what, offset, alignment);
  }
}

void check_shared(const void* p, size_t bytes, size_t alignment, const char* what, Where where) {
  const Block& block = *self().block;
  check_offset(block, static_cast<const char*>(p) - block.smem, bytes, alignment, what, where);
}

uint32_t shared_address(const void* p, Where where) {
  check_shared(p, 0, 1, "shared address", where);
  return cluster_rank() << kRankShift |
         (kSmemBase + static_cast<uint32_t>(static_cast<const char*>(p) - self().block->smem));
}

// ---- barriers -------------------------------------------------------------------------------------------------------

// Returns the phase that this arrival belongs to; when the barrier's phase has moved on, it was the last one.
static uint32_t arrive(Barrier& barrier, int expected, const char* what, Where where, bool releases = true) {
  if (barrier.arrived > 0 && barrier.expected != expected) {
    fail(where, "%s: for %d threads here and %d at %s:%d", what, expected, barrier.expected,
         file_name(barrier.where.file), barrier.where.line);
  }
  const uint32_t phase = barrier.phase;
  if (releases) barrier.edges[phase & 1].release();
  barrier.expected = expected;
  barrier.what = what;
  barrier.where = where;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.phase;
  }
  return phase;
}

static Barrier& block_barrier(int id, int& threads, const char* what, Where where) {
  Block& block = *self().block;
  if (id < 0 || id > 15) fail(where, "%s: there is no barrier %d", what, id);
  if (threads < 0 || threads > block.size) fail(where, "%s: %d threads in a block of %d", what, threads, block.size);
  if (threads % kWarp != 0) fail(where, "%s: %d threads are not whole warps", what, threads);
  Barrier& barrier = block.barriers[id];
  if (threads == 0) {
    threads = block.size;
    // Stricter than the hardware, which counts arrivals; but the language asks for the same call in every thread.
    if (barrier.arrived > 0 && !same_place(barrier.where, where)) {
      fail(where, "%s while other threads of the block wait in %s at %s:%d", what, barrier.what,
           file_name(barrier.where.file), barrier.where.line);
    }
  }
  return barrier;
}

void barrier_sync(int id, int threads, const char* what, Where where) {
  Barrier& barrier = block_barrier(id, threads, what, where);
  const uint32_t phase = arrive(barrier, threads, what, where);
  if (barrier.phase == phase) {
    block_on(&barrier, what, where);
  } else {
    wake_all(*self().block, &barrier);
    yield();
  }
  barrier.edges[phase & 1].acquire();
}

void barrier_arrive(int id, int threads, const char* what, Where where) {
  Barrier& barrier = block_barrier(id, threads, what, where);
  const uint32_t phase = arrive(barrier, threads, what, where);
  if (barrier.phase != phase) wake_all(*self().block, &barrier);
}

int barrier_count(bool predicate, const char* what, Where where) {
  Barrier& barrier = self().block->barriers[0];
  int& votes = barrier.votes[barrier.phase & 1];
  if (barrier.arrived == 0) votes = 0;
  votes += predicate ? 1 : 0;
  barrier_sync(0, 0, what, where);
  return votes;
}

void wait_for_previous_launch() {
  grid.start.acquire();
  self().has_waited_for_previous_launch = true;
}

// ---- clusters -------------------------------------------------------------------------------------------------------

static void cluster_arrive(bool releases, Where where) {
  Thread& me = self();
  Cluster& cluster = *me.block->cluster;
  if (me.cluster_arrived) fail(where, "barrier.cluster.arrive twice without a wait");
  me.cluster_arrived = true;
  me.cluster_phase = arrive(cluster.barrier, cluster.size * me.block->size, "barrier.cluster", where, releases);
  if (cluster.barrier.phase != me.cluster_phase) {
    for (int b = 0; b < cluster.size; ++b) wake_all(cluster.blocks[b], &cluster.barrier);
  }
}

void cluster_arrive(Where where) { cluster_arrive(/*releases=*/true, where); }
void cluster_arrive_relaxed(Where where) { cluster_arrive(/*releases=*/false, where); }

void cluster_wait(Where where) {
  Thread& me = self();
  Barrier& barrier = me.block->cluster->barrier;
  if (!me.cluster_arrived) fail(where, "barrier.cluster.wait without an arrive");
  me.cluster_arrived = false;
  if (barrier.phase == me.cluster_phase) block_on(&barrier, "barrier.cluster.wait", where);
  barrier.edges[me.cluster_phase & 1].acquire();
  me.block->cluster->inits.acquire();
}

uint32_t cluster_rank() { return static_cast<uint32_t>(self().block - self().block->cluster->blocks); }

uint32_t cluster_size() { return static_cast<uint32_t>(self().block->cluster->size); }

uint32_t cluster_address(const void* shared, uint32_t rank, Where where) {
  if (rank >= cluster_size()) fail(where, "mapa: rank %u in a cluster of %u", rank, cluster_size());
  return (shared_address(shared, where) & ((1u << kRankShift) - 1)) | rank << kRankShift;
}

void* cluster_memory(uint32_t address, size_t bytes, const char* what, Where where) {
  const uint32_t rank = address >> kRankShift, offset = (address & ((1u << kRankShift) - 1)) - kSmemBase;
  if (rank >= cluster_size()) fail(where, "%s: address %08x is in no block's shared memory", what, address);
  const Block& block = self().block->cluster->blocks[rank];
  if (block.live == 0) fail(where, "%s: block %u of the cluster has returned, its shared memory is gone", what, rank);
  check_offset(block, offset, bytes, bytes, what, where);
  return block.smem + offset;
}

// ---- warps ----------------------------------------------------------------------------------------------------------

int lane_index() { return self().lane(); }

void warp_collective(uint32_t mask, const char* what, Where where, void* argument,
                     void (*work)(void* const* arguments, uint32_t mask), bool orders_memory) {
  Thread& me = self();
  Block& block = *me.block;
  const uint32_t lane = 1u << me.lane();
  const int first = me.rank - me.lane();
  if (block.size - first < kWarp) mask &= (1u << (block.size - first)) - 1;  // absent lanes count as having returned
  if ((mask & lane) == 0) fail(where, "%s: lane %d is not in its own mask %08x", what, me.lane(), mask);

  Collective* mine = nullptr;
  Collective* unused = nullptr;
  for (Collective& c : block.collectives[me.warp()]) {
    if (c.arrived == 0) {
      if (unused == nullptr) unused = &c;
    } else if ((c.mask & mask) != 0) {
      // Stricter than the hardware about the place: the same call in both arms of a branch is not accepted.
      if (c.mask != mask || !same_place(c.where, where) || std::strcmp(c.what, what) != 0) {
        fail(where, "%s with mask %08x while other lanes of it wait in %s with mask %08x at %s:%d", what, mask, c.what,
             c.mask, file_name(c.where.file), c.where.line);
      }
      mine = &c;
    }
  }
  if (mine == nullptr) {
    if (unused == nullptr) fail(where, "%s: too many masks of one warp under way", what);
    mine = unused;
    for (void*& a : mine->arguments) a = nullptr;
    mine->mask = mask;
    mine->what = what;
    mine->where = where;
  }
  mine->arguments[me.lane()] = argument;
  mine->arrived |= lane;
  Edge& edge = mine->edges[mine->phase & 1];
  if (orders_memory) edge.release();
  if (mine->arrived == mask) {
    if (work != nullptr) work(mine->arguments, mask);
    mine->arrived = 0;
    ++mine->phase;
    for (int l = 0; l < kWarp; ++l) {
      if ((mask >> l & 1) != 0 && l != me.lane()) make_ready(block.threads[first + l]);
    }
    if (mask != lane) yield();
  } else {
    block_on(mine, what, where);
  }
  if (orders_memory) edge.acquire();
}

namespace {
struct ShuffleSlot {
  const void* value;
  size_t bytes;
  int source;
  char result[16];
};
struct BallotSlot {
  bool predicate;
  uint32_t result;
};
}  // namespace

void shuffle(void* value, size_t bytes, int source, uint32_t mask, const char* what, Where where) {
  ShuffleSlot slot{value, bytes, source, {}};
  if (bytes > sizeof slot.result) fail(where, "%s: a value of %zu bytes", what, bytes);
  warp_collective(mask, what, where, &slot, [](void* const* slots, uint32_t) {
    for (int l = 0; l < kWarp; ++l) {
      auto* to = static_cast<ShuffleSlot*>(slots[l]);
      if (to == nullptr) continue;
      const auto* from = static_cast<const ShuffleSlot*>(slots[to->source]);
      if (from != nullptr) {
        copy_bytes(to->result, from->value, to->bytes);
      } else {
        for (char& c : to->result) c = '\xff';
      }
    }
  });
  copy_bytes(value, slot.result, bytes);
}

uint32_t ballot(bool predicate, uint32_t mask, const char* what, Where where) {
  BallotSlot slot{predicate, 0};
  warp_collective(mask, what, where, &slot, [](void* const* slots, uint32_t) {
    uint32_t votes = 0;
    for (int l = 0; l < kWarp; ++l) {
      if (slots[l] != nullptr && static_cast<BallotSlot*>(slots[l])->predicate) votes |= 1u << l;
    }
    for (int l = 0; l < kWarp; ++l) {
      if (slots[l] != nullptr) static_cast<BallotSlot*>(slots[l])->result = votes;
    }
  });
  return slot.result;
}

// ---- cp.async -------------------------------------------------------------------------------------------------------

static void land(const Copy& copy) {
  traffic::copy_with_zero_fill(copy.shared, copy.global, copy.bytes, copy.valid_bytes);
}

void cp_async(void* shared, const void* global, int bytes, int valid_bytes, Where where) {
  Thread& me = self();
  check_shared(shared, bytes, bytes, "cp.async", where);
  if (valid_bytes < 0 || valid_bytes > bytes) fail(where, "cp.async: %d of %d bytes are valid", valid_bytes, bytes);
  const auto misaligned = reinterpret_cast<uintptr_t>(global) % bytes;
  if (misaligned != 0) {
    fail(where, "cp.async: misaligned, the global address is %d bytes past a multiple of %d", int(misaligned), bytes);
  }
  if (me.copy_count == kMaxCopies) fail(where, "cp.async: more than %d in flight in one thread", kMaxCopies);
  const Copy copy{static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid_bytes, me.copy_group};
  // The bytes may arrive at any moment between issue and wait. ThreadSanitizer always gets a write at both ends.
  if (!kTsan && !options.late_engines && random_bits() % 2 == 0) {
    land(copy);
  } else {
    traffic::scribble(copy.shared, bytes);
    me.copies[me.copy_count++] = copy;
  }
  me.where = where;
}

void cp_async_commit() { ++self().copy_group; }

void cp_async_wait(int groups_in_flight) {
  Thread& me = self();
  int kept = 0;
  for (int i = 0; i < me.copy_count; ++i) {
    if (me.copies[i].group < me.copy_group - groups_in_flight) {
      land(me.copies[i]);
    } else {
      me.copies[kept++] = me.copies[i];
    }
  }
  me.copy_count = kept;
}

}  // namespace emu
