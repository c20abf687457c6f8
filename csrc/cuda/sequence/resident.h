// The families that keep U on the chip: one launch a pass. `resident`: in every block, and no block waits for another.
// `cluster`, `grid`: a part of U in each of several blocks.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/plan/resident.h"
#include "cuda/sequence/params.h"

namespace rnn_ext::cuda {

// `kernel`: a row of kResident that takes T and fits; the launch: as its block_rows() says, or with fewer rows.
// `workspace`: GridWorkspace, with counters that are zero, for those that share U over the grid. If not all of their
// blocks, or not those of a cluster of more than 8, find room at once, it is cudaErrorCooperativeLaunchTooLarge and
// nothing has run. Instantiated in instances/, a file a dtype, by the macros below.
template <typename T>
cudaError_t launch_resident_forward(const RecurrenceForwardParams<T>& p, int kernel, const ResidentLaunch& l,
                                    void* workspace, cudaStream_t stream);
template <typename T>
cudaError_t launch_resident_backward(const RecurrenceBackwardParams<T>& p, int kernel, const ResidentLaunch& l,
                                     void* workspace, cudaStream_t stream);

}  // namespace rnn_ext::cuda

#define RNN_EXT_INSTANTIATE_RESIDENT_FORWARD(T)                                                       \
  template cudaError_t rnn_ext::cuda::launch_resident_forward(const RecurrenceForwardParams<T>&, int, \
                                                              const ResidentLaunch&, void*, cudaStream_t);
#define RNN_EXT_INSTANTIATE_RESIDENT_BACKWARD(T)                                                        \
  template cudaError_t rnn_ext::cuda::launch_resident_backward(const RecurrenceBackwardParams<T>&, int, \
                                                               const ResidentLaunch&, void*, cudaStream_t);
