#include "cuda/cell/backward_gemv.cuh"

template cudaError_t rnn_ext::cuda::launch_backward_gemv(const BackwardParams<double>&, const BackwardPlan&,
                                                         cudaStream_t);
