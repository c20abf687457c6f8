#include "cuda/cell/backward_tiled.cuh"

namespace rnn_ext::cuda {

template cudaError_t launch_backward_tiled(const BackwardParams<double>&, const BackwardPlan&, void*, cudaStream_t);

}  // namespace rnn_ext::cuda
