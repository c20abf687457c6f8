// The backward launcher: which kernel runs when.
#include "backward.cuh"
#include "backward_gemv.cuh"
#include "rnn_cell_cuda.h"

namespace rnn_ext::cuda {

template <typename T>
cudaError_t rnn_cell_backward(const BackwardParams<T>& p, cudaStream_t stream) {
  if (p.batch <= kMaxGemvBatch) return launch_backward_gemv(p, stream);
  const BackwardPlan large = plan_backward<T, LargeTile>(p);
  return large.data.size() + large.weight.size() < kTilesToFillGpu ? launch_backward_tiled<T, SmallTile>(p, stream)
                                                                   : launch_backward_tiled<T, LargeTile>(p, stream);
}

template cudaError_t rnn_cell_backward(const BackwardParams<float>&, cudaStream_t);
template cudaError_t rnn_cell_backward(const BackwardParams<double>&, cudaStream_t);
template cudaError_t rnn_cell_backward(const BackwardParams<__half>&, cudaStream_t);
template cudaError_t rnn_cell_backward(const BackwardParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace rnn_ext::cuda
