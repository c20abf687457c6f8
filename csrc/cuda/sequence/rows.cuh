// Small launches around a recurrence, which all families share: rows of the batch on their way to and from the
// order of the steps, U as the steps read it.
#pragma once
#include "cuda/blocks/operand.cuh"
#include "cuda/sequence/params.h"

namespace rnn_ext::cuda {

constexpr int kRowThreads = 256;
constexpr int64_t kMostGridRows = 65535;

// ---- rows -----------------------------------------------------------------------------------------------------------

// Rows [begin, end) of the batch, in the order of the steps, out of a matrix in the data's order (null: zeros): to both
// states, whose rows are state_stride apart, and to a contiguous result in the data's order, each unless it is null.
template <typename T>
struct SpreadRows {
  Matrix<T> from;
  const int64_t* order;
  T* states[2];
  int64_t state_stride;
  T* result;
  int64_t begin, end, hidden_size;
};

template <typename T>
__global__ void __launch_bounds__(kRowThreads) spread_rows(SpreadRows<T> p) {
  const int64_t column = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (column >= p.hidden_size && !RNN_EXT_PLANTED(spread_no_column_bound)) return;
  for (int64_t row = p.begin + blockIdx.y; row < p.end; row += gridDim.y) {
    const int64_t place = p.order != nullptr ? p.order[row] : row;
    const T value =
        p.from.data != nullptr ? p.from.data[place * p.from.row_stride + column * p.from.col_stride] : narrow<T>(0);
#pragma unroll
    for (T* const state : p.states) {
      if (state != nullptr) state[row * p.state_stride + column] = value;
    }
    if (p.result != nullptr) p.result[place * p.hidden_size + column] = value;
  }
}

template <typename T>
cudaError_t launch_spread_rows(const SpreadRows<T>& p, cudaStream_t stream) {
  if (p.begin >= p.end) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.hidden_size, kRowThreads)),
                  static_cast<unsigned>(std::min(p.end - p.begin, kMostGridRows)));
  return RNN_EXT_LAUNCH((spread_rows<T>), grid, dim3(kRowThreads), 0, stream, p);
}

template <typename T>
struct PreviousStates {
  Steps steps;
  bool reverse;
  int64_t hidden_size;
  Rows<const T> output;
  Matrix<T> hx;
  Rows<T> previous;
};

template <typename T>
__global__ void __launch_bounds__(kRowThreads) copy_previous_states(PreviousStates<T> p) {
  const int64_t chunks = ceil_div(p.hidden_size, kRowThreads);
  const int64_t t = blockIdx.x / chunks, column = blockIdx.x % chunks * kRowThreads + threadIdx.x;
  if (column >= p.hidden_size) return;
  const int64_t before = p.reverse ? t + 1 : t - 1;
  const int64_t with_one = before < 0 || before >= p.steps.steps ? 0 : p.steps.count(before);
  for (int64_t b = blockIdx.y; b < p.steps.count(t); b += gridDim.y) {
    T value = narrow<T>(0);
    if (b < with_one || RNN_EXT_PLANTED(previous_of_no_step)) {
      value = p.output.at(p.steps, before, b)[column * p.output.col_stride];
    } else if (p.hx.data != nullptr) {
      value = p.hx.data[p.steps.place(b) * p.hx.row_stride + column * p.hx.col_stride];
    }
    p.previous.at(p.steps, t, b)[column * p.previous.col_stride] = value;
  }
}

// ---- U --------------------------------------------------------------------------------------------------------------

constexpr int kPackTile = 32, kPackRows = 8;

template <typename T>
struct PackSmem {
  T tile[kPackTile][kPackTile + 1];
};

// A square matrix to rows `stride` elements apart, whatever its strides: a tile a block, read along the index whose
// neighbours lie next to each other and written along rows.
template <typename T>
__global__ void __launch_bounds__(kPackTile* kPackRows)
    pack_weight(Matrix<T> from, int64_t size, T* to, int64_t stride) {
  using Smem = PackSmem<T>;
  static_assert(sizeof(Smem) <= 48 * 1024, "what a block has without asking");
  RNN_EXT_SMEM(Smem, smem);
  const int x = static_cast<int>(threadIdx.x) % kPackTile, y = static_cast<int>(threadIdx.x) / kPackTile;
  const int64_t row = int64_t{blockIdx.y} * kPackTile, column = int64_t{blockIdx.x} * kPackTile;
  const bool along_rows = from.col_stride > from.row_stride;
#pragma unroll
  for (int i = y; i < kPackTile; i += kPackRows) {
    const int r = along_rows ? x : i, c = along_rows ? i : x;
    if ((row + r < size && column + c < size) || RNN_EXT_PLANTED(pack_no_bound)) {
      smem.tile[r][c] = from.data[(row + r) * from.row_stride + (column + c) * from.col_stride];
    }
  }
  if (!RNN_EXT_PLANTED(pack_no_barrier)) __syncthreads();
#pragma unroll
  for (int i = y; i < kPackTile; i += kPackRows) {
    if (row + i < size && column + x < size) to[(row + i) * stride + column + x] = smem.tile[i][x];
  }
}

template <typename T>
cudaError_t launch_pack_weight(const Matrix<T>& from, int64_t size, T* to, int64_t stride, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>(ceil_div(size, kPackTile));
  return RNN_EXT_LAUNCH((pack_weight<T>), dim3(tiles, tiles), dim3(kPackTile * kPackRows), sizeof(PackSmem<T>), stream,
                        from, size, to, stride);
}

}  // namespace rnn_ext::cuda
