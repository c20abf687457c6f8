#include "cuda/cell/forward_cublas.cuh"

#define RNN_EXT_INSTANTIATE(T) \
  template cudaError_t rnn_ext::cuda::launch_forward_cublas(const ForwardParams<T>&, const void*, cudaStream_t);
RNN_EXT_FOR_EACH_DTYPE(RNN_EXT_INSTANTIATE)
#undef RNN_EXT_INSTANTIATE
