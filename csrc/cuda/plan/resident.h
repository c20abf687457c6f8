// The `resident` kernels of a recurrence: their table, what a block of theirs takes, and how many rows of the batch it
// has. Plain C++; the kernels are compiled from these numbers.
//
// A thread keeps its part of U in chunks: 128 bytes along k, of the rows of U that are its. Those that fit stay in
// registers, the others in shared memory.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/plan/types.h"

namespace rnn_ext::cuda {

constexpr int kResidentChunk = 128;  // bytes
constexpr int kResidentMaxRows = 16;
constexpr size_t kResidentTables = 20 * kResidentMaxRows;  // bytes: where the rows lie, and their lengths

struct ResidentKernel {
  const char* name;
  Math math;
  bool fp32, fp64, fp16, bf16;
  int rows;             // of the batch, that a pass over U multiplies with; a block with more makes several passes
  int register_chunks;  // at most so many
  int max_threads;

  constexpr bool takes(Dtype dtype) const { return is_marked(dtype, fp32, fp64, fp16, bf16); }
  constexpr int warp_columns() const { return math == Math::kSimt ? 16 : 32; }  // elements of h that a warp computes
  constexpr int units() const { return math == Math::kSimt ? 4 : 8; }           // of 16 bytes, in a thread's chunk
  constexpr int threads(int64_t hidden_size) const {
    return static_cast<int>(32 * ceil_div(hidden_size, warp_columns()));
  }
  static constexpr int chunks(int64_t hidden_size, Dtype dtype) {
    return static_cast<int>(ceil_div(hidden_size * bytes_of(dtype), kResidentChunk));
  }
  constexpr int passes(int block_rows) const { return static_cast<int>(ceil_div(block_rows, rows)); }
  // Of a row of h or dz. 16 bytes more take eight rows to different banks.
  static constexpr int state_stride(int64_t hidden_size, Dtype dtype) {
    return chunks(hidden_size, dtype) * kResidentChunk + 16;
  }
  constexpr size_t smem_bytes(int64_t hidden_size, Dtype dtype, int block_rows) const {
    const int more = chunks(hidden_size, dtype) - register_chunks;
    return kResidentTables + size_t{2} * passes(block_rows) * rows * state_stride(hidden_size, dtype) +
           (more > 0 ? size_t{16} * more * units() * threads(hidden_size) : 0);
  }
  constexpr bool fits(int64_t hidden_size, Dtype dtype, int block_rows, const Device& device) const {
    return hidden_size <= int64_t{max_threads} / 32 * warp_columns() &&
           smem_bytes(hidden_size, dtype, block_rows) <= device.smem_per_block;
  }
  // How many rows of the batch a block has, so that blocks occupy all multiprocessors, and all in as many waves; 0 if
  // not even one fits.
  constexpr int block_rows(int64_t batch, int64_t hidden_size, Dtype dtype, const Device& device) const {
    int most = kResidentMaxRows;
    while (most > 0 && !fits(hidden_size, dtype, most, device)) --most;
    if (most == 0 || batch == 0) return most;
    const int64_t waves = ceil_div(batch, int64_t{most} * device.multiprocessors);
    return static_cast<int>(ceil_div(batch, waves * device.multiprocessors));
  }
};

constexpr int kResidentFirstSm = 80;

// A SIMT kernel is for one number of rows a pass: the more sums, the less of U stays in registers. On tensor cores any
// number up to 8 costs the same.
// clang-format off
constexpr ResidentKernel kResident[] = {
    // name           math               fp32   fp64   fp16   bf16   rows chunks threads
    {"resident_1",    Math::kSimt,       true,  false, false, false, 1,   5,     512},
    {"resident_2",    Math::kSimt,       true,  false, false, false, 2,   4,     512},
    {"resident_4",    Math::kSimt,       true,  false, false, false, 4,   3,     512},
    {"resident_8",    Math::kSimt,       true,  false, false, false, 8,   2,     512},
    {"resident_256",  Math::kTensorCore, false, false, true,  true,  8,   4,     256},  // H <= 256
    {"resident_384",  Math::kTensorCore, false, false, true,  true,  8,   2,     384},
    {"resident_tf32", Math::kTf32,       true,  false, false, false, 8,   5,     256},
};
// clang-format on
constexpr int kNumResident = static_cast<int>(sizeof(kResident) / sizeof(kResident[0]));

}  // namespace rnn_ext::cuda
