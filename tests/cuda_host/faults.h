// The faults that kernels carry for the tests of the tests: `if (!RNN_EXT_PLANTED(no_barrier_after_fill))
// __syncthreads();`. None of them exists on the device. tests/test_cuda_host.py says which build catches which; to see
// one by hand, run the tests with RNN_EXT_FAULT set to its name.
#pragma once
#include <cstring>

namespace emu {

// clang-format off: a line a fault, so that adding one touches no other
#define EMU_FAULTS(fault) \
  /* forward_gemv.cuh */ \
  fault(no_gemv_row_bound) \
  fault(no_gemv_k_bound) \
  fault(no_gemv_barrier) \
  fault(no_wait_for_previous_launch) \
  /* epilogue.cuh */ \
  fault(no_output_column_bound) \
  fault(misaligned_vector_store) \
  /* forward_tiled.cuh */ \
  fault(shared_memory_too_small) \
  fault(hx_forgotten) \
  fault(no_output_row_bound) \
  fault(no_cluster_sync) \
  fault(no_cluster_exit_sync) \
  fault(counter_not_reset) \
  fault(every_block_adds_up) \
  /* forward_cublas.cuh */ \
  fault(cublas_no_column_bound) \
  /* grad_z.cuh */ \
  fault(grad_z_no_bound) \
  fault(grad_z_no_barrier) \
  /* backward_wgmma.cuh */ \
  fault(backward_matrix_not_switched) \
  fault(backward_kind_not_switched) \
  fault(backward_same_box_twice) \
  fault(backward_zeros_left) \
  fault(backward_bias_row_left_out) \
  /* backward_tiled.cuh */ \
  fault(backward_no_barrier_between_tiles) \
  fault(backward_no_store_row_bound) \
  fault(backward_no_store_column_bound) \
  fault(backward_misaligned_store) \
  fault(backward_every_column_writes_bias) \
  /* backward_gemv.cuh */ \
  fault(gemv_no_row_bound) \
  fault(gemv_no_column_bound) \
  fault(gemv_no_barrier_after_fill) \
  fault(gemv_no_barrier_before_refill) \
  fault(gemv_no_barrier_before_reduction) \
  fault(gemv_every_block_writes_bias) \
  /* operand.cuh, engine.cuh, mainloop.cuh */ \
  fault(no_row_bound) \
  fault(no_k_bound) \
  fault(ragged_tail_not_cleared) \
  fault(misaligned_vector_copy) \
  fault(misaligned_staged_load) \
  fault(wrong_fragment) \
  fault(missed_cp_async_wait) \
  fault(no_stage_barrier) \
  fault(wrong_stage) \
  fault(no_barrier_before_epilogue) \
  fault(backward_zeros_not_exact) \
  /* wgmma.cuh, forward_wgmma.cuh */ \
  fault(no_wait_for_tile) \
  fault(wrong_phase) \
  fault(wrong_byte_count) \
  fault(early_release) \
  fault(no_wait_for_wgmma) \
  fault(wgmma_adds_to_garbage) \
  fault(weights_not_switched) \
  fault(no_proxy_fence) \
  fault(no_wait_for_stores) \
  fault(no_wait_for_bias) \
  fault(bias_overwritten) \
  fault(no_fence_of_inits) \
  fault(peer_not_asked) \
  fault(peer_exits_early) \
  fault(same_part_of_k) \
  fault(sums_over_stages) \
  fault(sums_not_released) \
  fault(no_wait_for_sums) \
  fault(sums_not_kept) \
  fault(tf32_not_rounded) \
  fault(split_no_proxy_fence) \
  fault(split_no_barrier) \
  fault(low_parts_by_tile) \
  fault(split_no_cross_term) \
  fault(split_long_sums) \
  fault(split_nan_left) \
  /* test_wrappers.cpp */ \
  fault(no_cluster_wait) \
  fault(early_block_exit) \
  fault(relaxed_arrival) \
  fault(arrival_without_release) \
  fault(wait_without_acquire) \
  fault(no_fence_before_store) \
  fault(unordered_sum) \
  fault(sum_without_its_turn) \
  fault(misaligned_vector_load) \
  /* end */
// clang-format on

enum class Fault {
  kNone,
#define EMU_FAULT_ENUMERATOR(name) name,
  EMU_FAULTS(EMU_FAULT_ENUMERATOR)
#undef EMU_FAULT_ENUMERATOR
};
inline Fault planted_fault = Fault::kNone;

// False if there is no fault of that name.
inline bool plant_fault(const char* name) {
#define EMU_FAULT_BY_NAME(fault) \
  if (std::strcmp(name, #fault) == 0) planted_fault = Fault::fault;
  EMU_FAULTS(EMU_FAULT_BY_NAME)
#undef EMU_FAULT_BY_NAME
  return planted_fault != Fault::kNone;
}

}  // namespace emu

#define RNN_EXT_PLANTED(fault) (::emu::planted_fault == ::emu::Fault::fault)
