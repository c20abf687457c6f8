#include "cuda/cell/forward_gemv.cuh"

template cudaError_t rnn_ext::cuda::launch_forward_gemv(const ForwardParams<__half>&, const ForwardPlan&, cudaStream_t);
