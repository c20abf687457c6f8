// The kernels of backward_gemv.cuh, compiled on their own.
#include "backward_gemv.cuh"

namespace rnn_ext::cuda {

template cudaError_t launch_backward_gemv(const BackwardParams<float>&, cudaStream_t);
template cudaError_t launch_backward_gemv(const BackwardParams<double>&, cudaStream_t);
template cudaError_t launch_backward_gemv(const BackwardParams<__half>&, cudaStream_t);
template cudaError_t launch_backward_gemv(const BackwardParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace rnn_ext::cuda
