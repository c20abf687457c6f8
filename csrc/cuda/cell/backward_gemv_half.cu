#include "cuda/cell/backward_gemv.cuh"

template cudaError_t rnn_ext::cuda::launch_backward_gemv(const BackwardParams<__half>&, const BackwardPlan&,
                                                         cudaStream_t);
