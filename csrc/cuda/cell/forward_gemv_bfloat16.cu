#include "cuda/cell/forward_gemv.cuh"

template cudaError_t rnn_ext::cuda::launch_forward_gemv(const ForwardParams<__nv_bfloat16>&, const ForwardPlan&,
                                                        cudaStream_t);
