// How the state goes from step to step in the kernels of resident.cuh: within a block, within a cluster, or through
// memory between the blocks of a grid.
//
// What the threads send in step i, all blocks that share U have at the start of step i + 1:
//   start()                      after the first state is written
//   receive(i, goes_on, rows)    before step i reads its state, and sends if it goes on; rows(j): how many step j sends
//   state(i)                     what step i reads
//   has_read()                   before a warp sends, and after it has read the rows that this depends on
//   send(i, row, offset, v)      v, to the byte `offset` of the row in the state of step i + 1
//   finish()                     after what a step has sent; the last one sends nothing
// There are two states, so a step overwrites that of the step before. Nobody reads it any more: this step's state has
// come from all, and who has sent a part of it was done with the one before.
#pragma once
#include "cuda/plan/resident.h"
#include "cuda/ptx/ptx_sm90.cuh"
#include "cuda/sequence/resident_product.cuh"
#include "sequence/params.h"

namespace rnn_ext::cuda {

struct ResidentSmem {
  int64_t places[kResidentMaxRows];  // of the block's rows, in hx and its like
  int64_t firsts[kResidentMaxRows];  // in the data, which jagged data has elsewhere
  int lengths[kResidentMaxRows];     // 0 where there is no such row
  uint64_t has_state[2];             // mbarriers of a cluster
  // Then one or two states, the sums of parts of k, and what of U registers don't hold.
};
static_assert(sizeof(ResidentSmem) == kResidentTables);

// What a kernel is told besides its direction's params.
template <typename T>
struct ResidentTask {
  Steps steps;
  ResidentWeights<T> weights;
  bool up;  // from each row's first step to its last
  int block_rows, passes;
  int state_rows;      // of a state: those of all passes
  int parts, columns;  // the blocks that share U, and how many of its columns each has
  int splits, column_threads;
  int chunks, state_stride;
  int sent_bytes;            // of a row of h or dz
  int more_steps;            // after the last: 0 or 1
  unsigned char* workspace;  // GridWorkspace
  int64_t states;
};

// State 0 or 1 in shared memory: rows that are state_stride bytes apart.
template <typename T>
__device__ __forceinline__ unsigned char* state_of(ResidentSmem& smem, const ResidentTask<T>& task, int i) {
  return reinterpret_cast<unsigned char*>(&smem + 1) + i * task.state_rows * task.state_stride;
}

template <typename T, Sharing kSharing>
class Exchange;

// ---- within a block -------------------------------------------------------------------------------------------------

template <typename T>
class Exchange<T, Sharing::kNone> {
 public:
  __device__ __forceinline__ Exchange(ResidentSmem& smem, const ResidentTask<T>& task) : smem_(smem), task_(task) {}

  __device__ __forceinline__ void start() {
    if (!RNN_EXT_PLANTED(resident_no_first_barrier)) __syncthreads();
  }
  template <typename Rows>
  __device__ __forceinline__ void receive(int, bool, Rows) {}
  __device__ __forceinline__ unsigned char* state(int i) const { return state_of(smem_, task_, i % 2); }
  __device__ __forceinline__ void has_read() {}
  template <class V>
  __device__ __forceinline__ void send(int i, int row, int offset, const V& v) {
    unsigned char* const next = state(RNN_EXT_PLANTED(resident_one_state) ? i : i + 1);
    *reinterpret_cast<V*>(next + row * task_.state_stride + offset) = v;
  }
  __device__ __forceinline__ void finish() {
    if (!RNN_EXT_PLANTED(resident_no_step_barrier)) __syncthreads();
  }

 private:
  ResidentSmem& smem_;
  const ResidentTask<T>& task_;
};

// ---- within a cluster -----------------------------------------------------------------------------------------------
//
// Each thread writes what it has computed into the shared memory of all blocks, its own among them, and the bytes count
// at an mbarrier there. So a step costs one trip between multiprocessors, and no barrier of threads.

template <typename T>
class Exchange<T, Sharing::kCluster> {
 public:
  __device__ __forceinline__ Exchange(ResidentSmem& smem, const ResidentTask<T>& task) : smem_(smem), task_(task) {}

  __device__ __forceinline__ void start() {
    if (threadIdx.x == 0) {
#pragma unroll
      for (uint64_t& barrier : smem_.has_state) ptx::mbarrier_init(&barrier, 1);
      ptx::fence_mbarrier_init();
    }
    if (!RNN_EXT_PLANTED(cluster_no_first_barrier)) ptx::cluster_sync();
  }
  // Bytes may come before thread 0 says how many will: until it has, the phase does not end.
  template <typename Rows>
  __device__ __forceinline__ void receive(int i, bool goes_on, Rows rows) {
    if (goes_on && threadIdx.x / 32 == 0) {
      const int bytes = rows(i) * task_.sent_bytes + RNN_EXT_PLANTED(cluster_wrong_bytes);
      if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(barrier(i + 1), bytes);
    }
    if (i > 0 && !RNN_EXT_PLANTED(cluster_no_wait)) {
      ptx::mbarrier_wait_acquire_shared(barrier(i), (i - 1) / 2 % 2 ^ RNN_EXT_PLANTED(cluster_wrong_parity));
    }
  }
  __device__ __forceinline__ unsigned char* state(int i) const { return state_of(smem_, task_, i % 2); }
  // What one lane sends says that the whole warp is done with the state before.
  __device__ __forceinline__ void has_read() {
    if (!RNN_EXT_PLANTED(cluster_no_warp_barrier)) __syncwarp();
  }
  template <class V>
  __device__ __forceinline__ void send(int i, int row, int offset, const V& v) {
    const int buffer = RNN_EXT_PLANTED(cluster_one_state) ? i : i + 1;
    unsigned char* const next = state(buffer) + row * task_.state_stride + offset;
#pragma unroll 1
    for (int rank = 0; rank < task_.parts; ++rank) {
      ptx::st_async(ptx::cluster_address(next, rank), v, ptx::cluster_address(barrier(i + 1), rank));
    }
  }
  __device__ __forceinline__ void finish() {}

 private:
  ResidentSmem& smem_;
  const ResidentTask<T>& task_;

  __device__ __forceinline__ uint64_t* barrier(int i) const { return &smem_.has_state[i % 2]; }
};

// ---- through memory -------------------------------------------------------------------------------------------------
//
// Blocks write to a state in memory, and count when they have. Where all have, each brings the state to its own shared
// memory, in which there is one: nobody else writes there.

template <typename T>
class Exchange<T, Sharing::kGrid> {
 public:
  __device__ __forceinline__ Exchange(ResidentSmem& smem, const ResidentTask<T>& task)
      : smem_(smem),
        task_(task),
        slice_(static_cast<int>(blockIdx.x) / task.parts),
        counter_(reinterpret_cast<uint32_t*>(task.workspace + slice_ * GridWorkspace::kCounterBytes)) {}

  __device__ __forceinline__ void start() { __syncthreads(); }
  template <typename Rows>
  __device__ __forceinline__ void receive(int i, bool, Rows rows) {
    if (i == 0) return;
    // Divided out before the wait: a thread's copies are as many pieces apart as there are threads.
    constexpr int kPiece = 16;
    const int row_bytes = task_.weights.size * static_cast<int>(sizeof(T)), threads = static_cast<int>(blockDim.x);
    const int pieces = (row_bytes + kPiece - 1) / kPiece, rows_apart = threads / pieces, rest = threads % pieces;
    int row = static_cast<int>(threadIdx.x) / pieces, piece = static_cast<int>(threadIdx.x) % pieces;
    if (threadIdx.x == 0 && !RNN_EXT_PLANTED(grid_no_wait)) {
      ptx::wait_at_least(counter_, static_cast<uint32_t>(i) * task_.parts);
    }
    __syncthreads();
    for (const int end = rows(i - 1); row < end;) {
      const int offset = piece * kPiece;
      const int valid = RNN_EXT_PLANTED(grid_no_row_edge) ? kPiece : min(kPiece, row_bytes - offset);
      ptx::cp_async<kPiece>(state(i) + row * task_.state_stride + offset, sent(i, row) + offset, valid);
      row += rows_apart;
      piece += rest;
      if (piece >= pieces) piece -= pieces, ++row;
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    if (!RNN_EXT_PLANTED(grid_no_barrier_after_copy)) __syncthreads();
  }
  __device__ __forceinline__ unsigned char* state(int) const { return state_of(smem_, task_, 0); }
  __device__ __forceinline__ void has_read() {}
  template <class V>
  __device__ __forceinline__ void send(int i, int row, int offset, const V& v) {
    *reinterpret_cast<V*>(sent(RNN_EXT_PLANTED(grid_one_state) ? i : i + 1, row) + offset) = v;
  }
  // The barrier comes before the one thread that says that all is written, and before the copies of the next state
  // over the one that all have read.
  __device__ __forceinline__ void finish() {
    if (!RNN_EXT_PLANTED(grid_flag_before_data)) __syncthreads();
    if (threadIdx.x == 0) ptx::red_add_release(counter_, 1);
  }

 private:
  ResidentSmem& smem_;
  const ResidentTask<T>& task_;
  int slice_;
  uint32_t* counter_;

  __device__ __forceinline__ unsigned char* sent(int i, int row) const {
    const int64_t b = int64_t{slice_} * task_.block_rows + row;
    return task_.workspace + task_.states + (i % 2 * task_.steps.batch + b) * task_.state_stride;
  }
};

}  // namespace rnn_ext::cuda
