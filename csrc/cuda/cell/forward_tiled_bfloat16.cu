#include "cuda/cell/forward_tiled.cuh"

template cudaError_t rnn_ext::cuda::launch_forward_tiled(const ForwardParams<__nv_bfloat16>&, const ForwardPlan&, void*,
                                                         uint32_t*, cudaStream_t);
