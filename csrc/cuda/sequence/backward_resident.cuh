// The recurrence backward, dz_t = (dh_t + dz_{t+1} U) · f'(h_t) for all t in one launch, the way forward_resident.cuh
// goes: all of U on the chip, read the other way round, a slice of the batch to a block, and dz, rounded to T, the
// state. dh_t and the stored h_t are what a step reads ahead.
//
// After its last step each row's U dz is grad_hx, so the walk takes one more step where that is asked for. What a row's
// first step gets is grad_h_n, and no product: of zeros it would be NaN where U has infinities.
#pragma once
#include "cuda/blocks/grad_z.cuh"
#include "cuda/sequence/resident.cuh"

namespace rnn_ext::cuda {

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <typename T, int kKernel>
__global__ void __launch_bounds__(kResident[kKernel].max_threads)
    backward_resident(RecurrenceBackwardParams<T> p, ResidentTask<T> task, Derivative<float> derivative,
                      ResidentRows<const T, ResidentProduct<T, kKernel>::kRun> grad_output,
                      ResidentRows<const T, ResidentProduct<T, kKernel>::kRun> output,
                      ResidentRows<T, ResidentProduct<T, kKernel>::kRun> grad_z) {
  using Block = ResidentBlock<T, kKernel>;
  using Smem = ResidentSmem;
  static_assert(sizeof(Smem) == kResidentTables);
  constexpr int kRun = Block::kRun;
  if constexpr (kResident[kKernel].sharing == Sharing::kCluster && !ptx::kHasClusters) return;
  RNN_EXT_SMEM(Smem, smem);
  Block block(smem, task);
  const int H = block.hidden_size(), column = block.column(), inside = block.inside();

  struct Inputs {
    Run<T, kRun> grad_output, output;
  };
  block.template run<Inputs>(
      [&](int row, int64_t begin) {
        const int64_t first = block.first(row);
        if (p.grad_output.data != nullptr) ptx::prefetch_to_l2(grad_output.at(begin, first, column));
        ptx::prefetch_to_l2(output.at(begin, first, column));
      },
      [&](Inputs& inputs, int row, int64_t begin) {
        const int64_t first = block.first(row);
        if (p.grad_output.data != nullptr) {
          grad_output.load(inputs.grad_output, grad_output.at(begin, first, column), inside);
        }
        output.load(inputs.output, output.at(begin, first, column), inside);
      },
      [&](const float(&sums)[kRun], const Inputs& inputs, int row, int t, T(&dz)[kRun]) {
        const bool is_first = t == block.first_step(row);
        float grad[kRun];  // what comes from the step before
#pragma unroll
        for (int j = 0; j < kRun; ++j)
          grad[j] = is_first && !RNN_EXT_PLANTED(resident_zeros_multiplied) ? 0.f : sums[j];
        if (is_first && p.grad_h_n.data != nullptr && row < block.rows()) {
          const T* const from =
              p.grad_h_n.data + block.place(row) * p.grad_h_n.row_stride + column * p.grad_h_n.col_stride;
#pragma unroll
          for (int j = 0; j < kRun; ++j) {
            if (j < inside) grad[j] = widen(from[j * p.grad_h_n.col_stride]);
          }
        }
        if (!block.has(row, t)) {
          if (p.grad_hx == nullptr || row >= block.rows() || t != block.step_after(row)) return false;
#pragma unroll
          for (int j = 0; j < kRun; ++j) {
            if (j < inside) p.grad_hx[block.place(row) * H + column + j] = narrow<T>(grad[j]);
          }
          return false;
        }
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          const float dh = p.grad_output.data != nullptr ? widen(inputs.grad_output[j]) + grad[j] : grad[j];
          dz[j] = narrow<T>(derivative.dz(dh, widen(inputs.output[j])));
        }
        return true;
      },
      [&](int row, int, int64_t begin, const T(&dz)[kRun]) {
        grad_z.store(grad_z.at(begin, block.first(row), column), dz, inside);
      });
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <typename T>
cudaError_t launch_resident_backward(const RecurrenceBackwardParams<T>& p, int kernel, const ResidentLaunch& l,
                                     void* workspace, cudaStream_t stream) {
  return with_resident_kernel<T>(kernel, [&](auto index) {
    constexpr ResidentKernel k = kResident[decltype(index)::value];
    const auto task = resident_task<T>(p, k, l, workspace, /*backward=*/true, p.grad_hx != nullptr ? 1 : 0);
    return launch_resident<k.sharing, T>(
        backward_resident<T, decltype(index)::value>, k, task, l, stream, p, task, Derivative<float>(p.nonlinearity),
        (ResidentRows<const T, k.run()>(p.grad_output, p.hidden_size)),
        (ResidentRows<const T, k.run()>(p.output, p.hidden_size)), (ResidentRows<T, k.run()>(p.grad_z, p.hidden_size)));
  });
}

}  // namespace rnn_ext::cuda
