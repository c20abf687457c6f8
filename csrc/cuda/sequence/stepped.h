// The family that takes every recurrence: a launch a step.
#pragma once
#include "cuda/sequence/launch.h"

namespace rnn_ext::cuda {

template <typename T>
Matrix<T> transposed(const Matrix<T>& m) {
  return {m.data, m.col_stride, m.row_stride};
}

// Instantiated in instances/, a file a dtype, by the macro below.
template <typename T>
cudaError_t launch_stepped_forward(const RecurrenceForwardParams<T>& p, const Steps& host, const SequencePlan& plan,
                                   void* workspace, cudaStream_t stream);
template <typename T>
cudaError_t launch_stepped_backward(const RecurrenceBackwardParams<T>& p, const Steps& host, const SequencePlan& plan,
                                    void* workspace, cudaStream_t stream);

}  // namespace rnn_ext::cuda

#define RNN_EXT_INSTANTIATE_STEPPED(T)                                                                          \
  template cudaError_t rnn_ext::cuda::launch_stepped_forward(const RecurrenceForwardParams<T>&, const Steps&,   \
                                                             const SequencePlan&, void*, cudaStream_t);         \
  template cudaError_t rnn_ext::cuda::launch_stepped_backward(const RecurrenceBackwardParams<T>&, const Steps&, \
                                                              const SequencePlan&, void*, cudaStream_t);
