#include "cuda/cell/forward_cublas.cuh"

#define RNN_EXT_INSTANTIATE(T) \
  template cudaError_t rnn_ext::cuda::launch_forward_cublas(const ForwardParams<T>&, const void*, cudaStream_t);
RNN_EXT_INSTANTIATE(float)
RNN_EXT_INSTANTIATE(double)
RNN_EXT_INSTANTIATE(__half)
RNN_EXT_INSTANTIATE(__nv_bfloat16)
#undef RNN_EXT_INSTANTIATE
