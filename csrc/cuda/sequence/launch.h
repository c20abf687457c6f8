// The CUDA launchers of a recurrence, for float, double, __half and __nv_bfloat16. They launch on the stream and check
// the launches. They neither allocate nor synchronise, nothing of theirs is copied from the host's memory, and they
// know nothing of torch: a CUDA graph can hold all of it.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/plan/sequence.h"
#include "cuda/sequence/params.h"

namespace rnn_ext::cuda {

// What plan_sequence chooses a kernel for.
template <typename T>
SequenceCase recurrence_case(const RecurrenceForwardParams<T>& p);
template <typename T>
SequenceCase recurrence_case(const RecurrenceBackwardParams<T>& p);

// Runs a plan for this very case. `host`: p.steps, with its tables in the host's memory. `workspace`:
// plan.workspace_bytes, 16-byte aligned, uninitialised, and this call's alone until its kernels have run.
template <typename T>
cudaError_t recurrence_forward(const RecurrenceForwardParams<T>& p, const Steps& host, const SequencePlan& plan,
                               void* workspace, cudaStream_t stream);
template <typename T>
cudaError_t recurrence_backward(const RecurrenceBackwardParams<T>& p, const Steps& host, const SequencePlan& plan,
                                void* workspace, cudaStream_t stream);

// Writes `size` numbers of the host's memory to the device's. They travel as the arguments of launches, so that a CUDA
// graph keeps them, and no copy from pageable memory makes the host wait.
cudaError_t write_table(const int64_t* numbers, int64_t size, int64_t* table, cudaStream_t stream);

// The state before each step, to `previous`: h_{t-1}, which is hx's row, or zeros, where the row has no step before.
// Rows that a step does not have stay as they are. Steps' tables are on the device.
template <typename T>
cudaError_t previous_states(const Steps& steps, bool reverse, int64_t hidden_size, const Rows<const T>& output,
                            const Matrix<T>& hx, const Rows<T>& previous, cudaStream_t stream);

}  // namespace rnn_ext::cuda
