// The forward cell in one launch: output = f(x Wᵀ + b_ih + h Uᵀ + b_hh), one block a tile of the output. The two GEMMs
// are one over a concatenated K = I + H: the same accumulators take x and W first, then h and U, and nothing is
// concatenated in memory. Biases and nonlinearity are the epilogue, so z never leaves the registers.
#pragma once
#include "tile.cuh"

namespace rnn_ext::cuda {

// ---- kernel
// ----------------------------------------------------------------------------------------------------------

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) forward_tiled(ForwardParams<T> p) {
  using Acc = Accumulator<T>;
  using Smem = TileSmem<Acc, Shape>;
  static_assert(sizeof(Smem) <= 48 * 1024, "fits without opting in to more shared memory");
  RNN_EXT_SMEM(Smem, smem);

  const int64_t tiles_n = ceil_div(p.hidden_size, Shape::BN);
  const int64_t m0 = blockIdx.x / tiles_n * Shape::BM, n0 = blockIdx.x % tiles_n * Shape::BN;

  Tile<Acc, Shape> tile(smem);
  const auto add_product = [&](const Matrix<T>& a, const Matrix<T>& weight, int64_t k_end) {
    tile.template accumulate<true, true, false>(
        m0, p.batch, n0, p.hidden_size, k_end, [&](int64_t m, int64_t k) { return load(a, m, k); },
        [&](int64_t n, int64_t k) { return load(weight, n, k); });
  };
  add_product(p.input, p.weight_ih, p.input_size);
  if (p.hx.data && !RNN_EXT_PLANTED(half_of_k_forgotten)) add_product(p.hx, p.weight_hh, p.hidden_size);

  tile.for_each(m0, p.batch, n0, p.hidden_size, [&](int64_t m, int64_t n, Acc z) {
    if (p.bias_ih) z += widen(p.bias_ih[n]);
    if (p.bias_hh) z += widen(p.bias_hh[n]);
    p.output[m * p.hidden_size + n] = narrow<T>(activate(z, p.nonlinearity));
  });
}

// ---- launcher
// --------------------------------------------------------------------------------------------------------

template <typename T, typename Shape>
cudaError_t launch_forward_tiled(const ForwardParams<T>& p, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.batch, Shape::BM) * ceil_div(p.hidden_size, Shape::BN);
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  return RNN_EXT_LAUNCH((forward_tiled<T, Shape>), dim3(static_cast<unsigned>(tiles)), dim3(Shape::kThreads),
                        sizeof(TileSmem<Accumulator<T>, Shape>) - RNN_EXT_PLANTED(shared_memory_too_small), stream, p);
}

}  // namespace rnn_ext::cuda
