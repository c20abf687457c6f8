// The family for U that fits one block: one launch a pass, and no block waits for another.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/plan/resident.h"
#include "cuda/sequence/params.h"

namespace rnn_ext::cuda {

// `kernel`: a row of kResident that takes T and fits; `block_rows`: as its block_rows() says, or fewer. Instantiated in
// instances/, a file a dtype, by the macros below.
template <typename T>
cudaError_t launch_resident_forward(const RecurrenceForwardParams<T>& p, int kernel, int block_rows,
                                    cudaStream_t stream);
template <typename T>
cudaError_t launch_resident_backward(const RecurrenceBackwardParams<T>& p, int kernel, int block_rows,
                                     cudaStream_t stream);

}  // namespace rnn_ext::cuda

#define RNN_EXT_INSTANTIATE_RESIDENT_FORWARD(T)                                                            \
  template cudaError_t rnn_ext::cuda::launch_resident_forward(const RecurrenceForwardParams<T>&, int, int, \
                                                              cudaStream_t);
#define RNN_EXT_INSTANTIATE_RESIDENT_BACKWARD(T)                                                             \
  template cudaError_t rnn_ext::cuda::launch_resident_backward(const RecurrenceBackwardParams<T>&, int, int, \
                                                               cudaStream_t);
