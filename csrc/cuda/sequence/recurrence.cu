// The launchers of a recurrence: from a plan to its kernels; and the launches around it.
#include <algorithm>
#include <vector>

#include "cuda/sequence/launch.h"
#include "cuda/sequence/resident.h"
#include "cuda/sequence/rows.cuh"
#include "cuda/sequence/stepped.h"

namespace rnn_ext::cuda {
namespace {

constexpr int kTableChunk = 480;  // numbers that fit, with a pointer, the 4096 bytes of a kernel's arguments

struct TableChunk {
  int64_t numbers[kTableChunk];
  int64_t* table;
  int size;
};

__global__ void __launch_bounds__(kTableChunk) write_table_chunk(const __grid_constant__ TableChunk chunk) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < chunk.size || RNN_EXT_PLANTED(table_no_bound)) chunk.table[i] = chunk.numbers[i];
}

// `weight`: U as the pass reads it, along its rows.
template <typename T>
SequenceCase case_of(const Steps& steps, int64_t hidden_size, const Matrix<T>& weight, bool backward) {
  SequenceCase c;
  c.steps = steps.steps;
  c.batch = steps.batch;
  c.hidden_size = hidden_size;
  c.dtype = kDtype<T>;
  c.backward = backward;
  c.packs_weight = vector_bytes(weight, hidden_size, hidden_size, true) < 16;
  return c;
}

// Those of a GridWorkspace.
cudaError_t clear_counters(int64_t slices, void* workspace, cudaStream_t stream) {
  const std::vector<int64_t> zeros(slices * GridWorkspace::kCounterBytes / sizeof(int64_t));
  return write_table(zeros.data(), static_cast<int64_t>(zeros.size()), static_cast<int64_t*>(workspace), stream);
}

// Runs the plan: by stepped(), or by resident(p), which not all T have, where U stays on the chip.
template <typename T, class Params, typename Stepped, typename Resident>
cudaError_t launch_planned(const Params& p, const SequencePlan& plan, void* workspace, cudaStream_t stream,
                           Stepped stepped, Resident resident) {
  if (p.steps.batch == 0 || p.hidden_size == 0) return cudaSuccess;
  if (plan.family == SequencePlan::Family::kStepped) return stepped();
  if constexpr (sizeof(T) < 8) {
    cudaError_t e = cudaSuccess;
    if (kResident[plan.kernel].sharing == Sharing::kGrid) {
      e = clear_counters(plan.launch.slices(p.steps.batch), workspace, stream);
    }
    return e != cudaSuccess ? e : resident(p);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

template <typename T>
SequenceCase recurrence_case(const RecurrenceForwardParams<T>& p) {
  static_assert(std::is_same<typename RecurrenceForwardParams<T>::Acc, Accumulator<T>>::value);
  return case_of(p.steps, p.hidden_size, p.weight_hh, false);
}

template <typename T>
SequenceCase recurrence_case(const RecurrenceBackwardParams<T>& p) {
  return case_of(p.steps, p.hidden_size, transposed(p.weight_hh), true);
}

template <typename T>
cudaError_t recurrence_forward(const RecurrenceForwardParams<T>& p, const Steps& host, const SequencePlan& plan,
                               void* workspace, cudaStream_t stream) {
  return launch_planned<T>(
      p, plan, workspace, stream, [&] { return launch_stepped_forward(p, host, plan, workspace, stream); },
      [&](const auto& q) { return launch_resident_forward(q, plan.kernel, plan.launch, workspace, stream); });
}

template <typename T>
cudaError_t recurrence_backward(const RecurrenceBackwardParams<T>& p, const Steps& host, const SequencePlan& plan,
                                void* workspace, cudaStream_t stream) {
  return launch_planned<T>(
      p, plan, workspace, stream, [&] { return launch_stepped_backward(p, host, plan, workspace, stream); },
      [&](const auto& q) { return launch_resident_backward(q, plan.kernel, plan.launch, workspace, stream); });
}

cudaError_t write_table(const int64_t* numbers, int64_t size, int64_t* table, cudaStream_t stream) {
  for (int64_t begin = 0; begin < size; begin += kTableChunk) {
    TableChunk chunk = {};
    chunk.table = table + begin;
    chunk.size = static_cast<int>(std::min<int64_t>(kTableChunk, size - begin));
    std::copy_n(numbers + begin, chunk.size, chunk.numbers);
    const cudaError_t e = RNN_EXT_LAUNCH(write_table_chunk, dim3(1), dim3(kTableChunk), 0, stream, chunk);
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t previous_states(const Steps& steps, bool reverse, int64_t hidden_size, const Rows<const T>& output,
                            const Matrix<T>& hx, const Rows<T>& previous, cudaStream_t stream) {
  if (steps.steps == 0 || steps.batch == 0 || hidden_size == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(steps.steps * ceil_div(hidden_size, kRowThreads)),
                  static_cast<unsigned>(std::min(steps.batch, kMostGridRows)));
  return RNN_EXT_LAUNCH((copy_previous_states<T>), grid, dim3(kRowThreads), 0, stream,
                        PreviousStates<T>{steps, reverse, hidden_size, output, hx, previous});
}

#define RNN_EXT_INSTANTIATE(T)                                                                                         \
  template SequenceCase recurrence_case(const RecurrenceForwardParams<T>&);                                            \
  template SequenceCase recurrence_case(const RecurrenceBackwardParams<T>&);                                           \
  template cudaError_t recurrence_forward(const RecurrenceForwardParams<T>&, const Steps&, const SequencePlan&, void*, \
                                          cudaStream_t);                                                               \
  template cudaError_t recurrence_backward(const RecurrenceBackwardParams<T>&, const Steps&, const SequencePlan&,      \
                                           void*, cudaStream_t);                                                       \
  template cudaError_t previous_states(const Steps&, bool, int64_t, const Rows<const T>&, const Matrix<T>&,            \
                                       const Rows<T>&, cudaStream_t);
RNN_EXT_FOR_EACH_DTYPE(RNN_EXT_INSTANTIATE)
#undef RNN_EXT_INSTANTIATE

}  // namespace rnn_ext::cuda
