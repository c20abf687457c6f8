// The recurrence forward, h_t = f(z_t + h_{t-1} Uᵀ) for all t in one launch, with U on the chip. Rows of the batch
// never meet, so they are divided into slices.
//
// Where U fits one block, every block has all of it and a slice. No block waits for another, and a step costs what one
// multiprocessor takes for it: a pass over U for each 8 rows (or 1, 2, 4: fp32), the nonlinearity, and one barrier.
// Else the blocks of a cluster have U and a slice together, or those of the grid, or of a part of it. They wait for
// each other at every step, and a step takes the longer, but what multiplies is many times as much.
//
// What limits a pass is how fast U and h come to what multiplies them. Half of U or more stays in registers, where it
// costs nothing to come by; the rest, and h, are read from shared memory, 16 bytes a thread at a time. h has two
// buffers: all threads read one while each writes its columns to the other. z_t is read into registers a whole pass
// ahead, and brought to the L2 cache some steps before.
#pragma once
#include "cuda/sequence/resident.cuh"

namespace rnn_ext::cuda {

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <typename T, int kKernel>
__global__ void __launch_bounds__(kResident[kKernel].max_threads)
    forward_resident(RecurrenceForwardParams<T> p, ResidentTask<T> task,
                     ResidentRows<const float, ResidentProduct<T, kKernel>::kRun> z,
                     ResidentRows<T, ResidentProduct<T, kKernel>::kRun> output) {
  using Block = ResidentBlock<T, kKernel>;
  using Smem = ResidentSmem;
  static_assert(sizeof(Smem) == kResidentTables);
  constexpr int kRun = Block::kRun;
  if constexpr (kResident[kKernel].sharing == Sharing::kCluster && !ptx::kHasClusters) return;
  RNN_EXT_SMEM(Smem, smem);
  Block block(smem, task);
  const int H = block.hidden_size(), column = block.column(), inside = block.inside();

  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < block.rows(); row += warps) {
    const int64_t place = block.place(row);
    for (int n = lane; n < H; n += 32) {
      T h = narrow<T>(0);
      if (p.hx.data != nullptr) {
        h = p.hx.data[place * p.hx.row_stride + n * p.hx.col_stride];
        block.start_with(row, n, h);
      }
      if (block.length(row) == 0 && block.is_first_part()) p.h_n[place * H + n] = h;
    }
  }

  struct Inputs {
    Run<float, kRun> z;
  };
  block.template run<Inputs>(
      [&](int row, int64_t begin) { ptx::prefetch_to_l2(z.at(begin, block.first(row), column)); },
      [&](Inputs& inputs, int row, int64_t begin) { z.load(inputs.z, z.at(begin, block.first(row), column), inside); },
      [&](const float(&sums)[kRun], const Inputs& inputs, int row, int t, T(&h)[kRun]) {
        if (!block.has(row, t)) return false;
        // h = 0 is left out rather than multiplied with: U may have infinities.
        const bool alone =
            p.hx.data == nullptr && t == block.first_step(row) && !RNN_EXT_PLANTED(resident_zeros_multiplied);
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          h[j] = activate<T>(alone ? inputs.z[j] : inputs.z[j] + sums[j], p.nonlinearity);
        }
        return true;
      },
      [&](int row, int t, int64_t begin, const T(&h)[kRun]) {
        output.store(output.at(begin, block.first(row), column), h, inside);
        if (t == block.last_step(row)) {
#pragma unroll
          for (int j = 0; j < kRun; ++j) {
            if (j < inside) p.h_n[block.place(row) * H + column + j] = h[j];
          }
        }
      });
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <typename T>
cudaError_t launch_resident_forward(const RecurrenceForwardParams<T>& p, int kernel, const ResidentLaunch& l,
                                    void* workspace, cudaStream_t stream) {
  return with_resident_kernel<T>(kernel, [&](auto index) {
    constexpr ResidentKernel k = kResident[decltype(index)::value];
    const auto task = resident_task<T>(p, k, l, workspace, /*backward=*/false, 0);
    return launch_resident<k.sharing, T>(forward_resident<T, decltype(index)::value>, k, task, l, stream, p, task,
                                         (ResidentRows<const float, k.run()>(p.z, p.hidden_size)),
                                         (ResidentRows<T, k.run()>(p.output, p.hidden_size)));
  });
}

}  // namespace rnn_ext::cuda
