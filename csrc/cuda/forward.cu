// The forward launcher: which kernel runs when.
#include "forward.cuh"
#include "rnn_cell_cuda.h"

namespace rnn_ext::cuda {

template <typename T>
cudaError_t rnn_cell_forward(const ForwardParams<T>& p, cudaStream_t stream) {
  if (p.batch == 0 || p.hidden_size == 0) return cudaSuccess;
  const int64_t large_tiles = ceil_div(p.batch, LargeTile::BM) * ceil_div(p.hidden_size, LargeTile::BN);
  return large_tiles < kTilesToFillGpu ? launch_forward_tiled<T, SmallTile>(p, stream)
                                       : launch_forward_tiled<T, LargeTile>(p, stream);
}

template cudaError_t rnn_cell_forward(const ForwardParams<float>&, cudaStream_t);
template cudaError_t rnn_cell_forward(const ForwardParams<double>&, cudaStream_t);
template cudaError_t rnn_cell_forward(const ForwardParams<__half>&, cudaStream_t);
template cudaError_t rnn_cell_forward(const ForwardParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace rnn_ext::cuda
