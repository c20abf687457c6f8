// The kernels of a recurrence that keep U on the chip: their table, and what a launch of theirs takes. Plain C++; the
// kernels are compiled from these numbers.
//
// A thread keeps its part of U in chunks: 128 bytes along k, of the rows of U that are its. Those that fit stay in
// registers, the others in shared memory.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/plan/types.h"

namespace rnn_ext::cuda {

constexpr int kResidentChunk = 128;  // bytes
constexpr int kResidentMaxRows = 16;
// Bytes: where the rows lie, their lengths, and two mbarriers.
constexpr size_t kResidentTables = 20 * kResidentMaxRows + 16;

// Which blocks have U together. All of them have the same rows of the batch, and a part of the columns of h each.
enum class Sharing {
  kNone,     // a block has all of U
  kCluster,  // those of a cluster, which write h into each other's shared memory
  kGrid,     // all of the grid, or a part of it for each slice of the batch: h goes through the L2 cache
};

// Every device with clusters takes 8 blocks in one; an H100 takes 16.
constexpr int kPortableClusterBlocks = 8, kMostClusterBlocks = 16;

// A launch of such a kernel.
struct ResidentLaunch {
  int block_rows = 0;  // of the batch, to the blocks that share U
  int parts = 1;       // how many blocks those are, each with at least a column
  int splits = 1;      // how many warps have a part of k each, for the same columns

  int64_t slices(int64_t batch) const { return ceil_div(batch, block_rows); }
};

struct ResidentKernel {
  const char* name;
  Sharing sharing;
  Math math;
  bool fp32, fp64, fp16, bf16;
  int rows;             // of the batch, that a pass over U multiplies with; a block with more makes several passes
  int warp_columns;     // elements of h that a warp computes
  int register_chunks;  // at most so many
  int max_threads;

  constexpr bool takes(Dtype dtype) const { return is_marked(dtype, fp32, fp64, fp16, bf16); }
  constexpr int units() const { return math == Math::kSimt ? 4 : warp_columns / 4; }  // of 16 bytes, in a chunk
  // What a thread has of a pass, and how many of that are neighbours; two threads may have the same sum.
  constexpr int sums() const { return std::max(1, rows * warp_columns / 32); }
  constexpr int run() const { return math == Math::kSimt ? sums() : sums() / 2; }
  constexpr int states() const { return sharing == Sharing::kGrid ? 1 : 2; }  // of all rows, in shared memory
  constexpr int most_parts(const Device& device) const {
    return sharing == Sharing::kNone ? 1 : sharing == Sharing::kCluster ? kMostClusterBlocks : device.multiprocessors;
  }

  // Of a block.
  constexpr int columns(int64_t hidden_size, int parts) const {
    return static_cast<int>(ceil_div(ceil_div(hidden_size, parts), warp_columns) * warp_columns);
  }
  constexpr int column_threads(int64_t hidden_size, int parts) const {
    return columns(hidden_size, parts) / warp_columns * 32;
  }
  constexpr int threads(int64_t hidden_size, const ResidentLaunch& l) const {
    return column_threads(hidden_size, l.parts) * l.splits;
  }
  static constexpr int chunks(int64_t hidden_size, Dtype dtype) {
    return static_cast<int>(ceil_div(hidden_size * bytes_of(dtype), kResidentChunk));
  }
  constexpr int thread_chunks(int64_t hidden_size, Dtype dtype, int splits) const {
    return static_cast<int>(ceil_div(chunks(hidden_size, dtype), splits));
  }
  constexpr int passes(int block_rows) const { return static_cast<int>(ceil_div(block_rows, rows)); }
  // Of a row of h or dz. 16 bytes more take eight rows to different banks.
  static constexpr int state_stride(int64_t hidden_size, Dtype dtype) {
    return chunks(hidden_size, dtype) * kResidentChunk + 16;
  }
  constexpr size_t state_bytes(int64_t hidden_size, Dtype dtype, int block_rows) const {
    return size_t{1} * states() * passes(block_rows) * rows * state_stride(hidden_size, dtype);
  }
  // The sums of all parts of k but the first, twice: a pass leaves them where the pass before did not.
  constexpr size_t sum_bytes(int64_t hidden_size, const ResidentLaunch& l) const {
    return size_t{2} * (l.splits - 1) * column_threads(hidden_size, l.parts) * sums() * sizeof(float);
  }
  constexpr size_t smem_bytes(int64_t hidden_size, Dtype dtype, const ResidentLaunch& l) const {
    const int more = thread_chunks(hidden_size, dtype, l.splits) - register_chunks;
    return kResidentTables + state_bytes(hidden_size, dtype, l.block_rows) + sum_bytes(hidden_size, l) +
           (more > 0 ? size_t{16} * more * units() * threads(hidden_size, l) : 0);
  }
  constexpr bool fits(int64_t hidden_size, Dtype dtype, const ResidentLaunch& l, const Device& device) const {
    return threads(hidden_size, l) <= max_threads && smem_bytes(hidden_size, dtype, l) <= device.smem_per_block;
  }
  // How many rows of the batch a block has, so that blocks occupy all multiprocessors, and all in as many waves; 0 if
  // not even one fits, or those of a grid don't fit at once.
  constexpr int block_rows(int64_t batch, int64_t hidden_size, Dtype dtype, ResidentLaunch l,
                           const Device& device) const {
    for (l.block_rows = kResidentMaxRows; l.block_rows > 0 && !fits(hidden_size, dtype, l, device);) --l.block_rows;
    if (l.block_rows == 0 || batch == 0) return l.block_rows;
    const int64_t at_once = slices_at_once(l.parts, device), waves = ceil_div(batch, l.block_rows * at_once);
    if (sharing == Sharing::kGrid && waves > 1) return 0;
    return static_cast<int>(ceil_div(batch, waves * at_once));
  }
  // How many slices of the batch, each with blocks of its own, run side by side.
  constexpr int64_t slices_at_once(int parts, const Device& device) const {
    if (sharing != Sharing::kCluster) return device.multiprocessors / parts;
    // A cluster's multiprocessors are neighbours, in groups that have 16 or a few more.
    return std::max(1, device.multiprocessors / 16 * (16 / parts));
  }
};

constexpr int kResidentFirstSm = 80;

// A SIMT kernel is for one number of rows a pass: the more sums, the less of U stays in registers. On tensor cores any
// number up to 8 costs the same.
// clang-format off
constexpr ResidentKernel kResident[] = {
    // name           who has U          math               fp32   fp64   fp16   bf16   rows cols chunks threads
    {"resident_1",    Sharing::kNone,    Math::kSimt,       true,  false, false, false, 1,   16,  5,     512},
    {"resident_2",    Sharing::kNone,    Math::kSimt,       true,  false, false, false, 2,   16,  4,     512},
    {"resident_4",    Sharing::kNone,    Math::kSimt,       true,  false, false, false, 4,   16,  3,     512},
    {"resident_8",    Sharing::kNone,    Math::kSimt,       true,  false, false, false, 8,   16,  2,     512},
    {"resident_256",  Sharing::kNone,    Math::kTensorCore, false, false, true,  true,  8,   32,  4,     256},  // H <= 256
    {"resident_384",  Sharing::kNone,    Math::kTensorCore, false, false, true,  true,  8,   32,  2,     384},
    {"resident_tf32", Sharing::kNone,    Math::kTf32,       true,  false, false, false, 8,   32,  5,     256},
    {"cluster_1",     Sharing::kCluster, Math::kSimt,       true,  false, false, false, 1,   16,  4,     512},
    {"cluster_4",     Sharing::kCluster, Math::kSimt,       true,  false, false, false, 4,   16,  3,     512},
    {"cluster_8",     Sharing::kCluster, Math::kSimt,       true,  false, false, false, 8,   16,  3,     384},
    {"cluster_16bit", Sharing::kCluster, Math::kTensorCore, false, false, true,  true,  8,   32,  4,     256},
    {"cluster_tf32",  Sharing::kCluster, Math::kTf32,       true,  false, false, false, 8,   32,  4,     256},
    {"grid_1",        Sharing::kGrid,    Math::kSimt,       true,  false, false, false, 1,   16,  4,     512},
    {"grid_8",        Sharing::kGrid,    Math::kSimt,       true,  false, false, false, 8,   16,  3,     384},
    {"grid_16bit",    Sharing::kGrid,    Math::kTensorCore, false, false, true,  true,  8,   16,  5,     384},
    {"grid_tf32",     Sharing::kGrid,    Math::kTf32,       true,  false, false, false, 8,   16,  5,     384},
};
// clang-format on
constexpr int kNumResident = static_cast<int>(sizeof(kResident) / sizeof(kResident[0]));

// What the blocks of a `grid` kernel hand on, at which byte of the workspace.
struct GridWorkspace {
  GridWorkspace(const ResidentKernel& k, int64_t batch, int64_t hidden_size, Dtype dtype, const ResidentLaunch& l)
      : states(l.slices(batch) * kCounterBytes), state_bytes(batch * k.state_stride(hidden_size, dtype)) {}

  static constexpr int kCounterBytes = 32;  // a counter for each slice, at 0, to be zero before the launch
  int64_t states;                           // two of them, a row for each row of the batch
  int64_t state_bytes;

  int64_t bytes() const { return states + 2 * state_bytes; }
};

}  // namespace rnn_ext::cuda
