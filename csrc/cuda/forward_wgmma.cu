#include "forward_wgmma.h"

#include "dispatch.h"
#include "forward_wgmma.cuh"

namespace rnn_ext::cuda {

template <typename T>
bool forward_wgmma_takes(const ForwardParams<T>& p) {
  if constexpr (sizeof(T) == 8) return false;
  const int64_t B = p.batch, I = p.input_size, H = p.hidden_size;
  return has_tensor_map(p.input, B, I) && has_tensor_map(p.weight_ih, H, I) && has_tensor_map(p.output, B, H, H) &&
         (p.hx.data == nullptr || (has_tensor_map(p.hx, B, H) && has_tensor_map(p.weight_hh, H, H)));
}

namespace {

template <typename T, int BN>
constexpr WgmmaKernel row_of() {
  for (const WgmmaKernel& k : kWgmmaKernels) {
    if (k.bn == BN && k.split == (sizeof(T) == 4)) return k;
  }
  return {};
}

template <typename T, int BN>
cudaError_t launch(const ForwardParams<T>& p, int64_t blocks, cudaStream_t stream) {
  constexpr WgmmaKernel k = row_of<T, BN>();
  using Shape = WgmmaShape<T, BN, k.cluster>;
  static_assert(Shape::BM == k.bm && Shape::kSplit == k.split, "the table's idea of it");
  const bool has_hx = p.hx.data != nullptr;
  const int64_t B = p.batch, I = p.input_size, H = p.hidden_size;
  WgmmaArguments<T> arguments = {};
  const auto encode = [&](CUtensorMap& map, const Matrix<T>& m, int64_t rows, int64_t columns, int box_rows) {
    return encode_tensor_map(map, m.data, rows, columns, m.row_stride, box_rows);
  };
  constexpr int kRowsOfB = BN / Shape::kCluster;
  cudaError_t e = encode(arguments.input, p.input, B, I, Shape::BM);
  if (e == cudaSuccess) e = encode(arguments.weight_ih, p.weight_ih, H, I, kRowsOfB);
  if (e == cudaSuccess && has_hx) e = encode(arguments.hx, p.hx, B, H, Shape::BM);
  if (e == cudaSuccess && has_hx) e = encode(arguments.weight_hh, p.weight_hh, H, H, kRowsOfB);
  if (e == cudaSuccess) e = encode(arguments.output, {p.output, H}, B, H, WgmmaSmem<Shape>::kStoreRows);
  if (e != cudaSuccess) return e;

  const auto tiles = [](int64_t size, int tile) { return static_cast<int>(ceil_div(size, tile)); };
  arguments.params = p;
  arguments.tiles_m = tiles(B, Shape::BM * Shape::kCluster);
  arguments.tiles_n = tiles(H, BN);
  arguments.k_tiles_input = tiles(I, Shape::BK);
  arguments.k_tiles_hx = has_hx ? tiles(H, Shape::BK) : 0;
  return RNN_EXT_LAUNCH_CLUSTER((forward_wgmma<Shape>), dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads),
                                dim3(Shape::kCluster), sizeof(WgmmaSmem<Shape>), stream, arguments);
}

}  // namespace

template <typename T, int BN>
cudaError_t launch_forward_wgmma(const ForwardParams<T>& p, int64_t blocks, cudaStream_t stream) {
  if constexpr (kForwardWgmmaComputes<T, BN>) return launch<T, BN>(p, blocks, stream);
  return cudaErrorNotSupported;
}

#define RNN_EXT_INSTANTIATE(T)                                                                       \
  template bool forward_wgmma_takes(const ForwardParams<T>&);                                        \
  template cudaError_t launch_forward_wgmma<T, 256>(const ForwardParams<T>&, int64_t, cudaStream_t); \
  template cudaError_t launch_forward_wgmma<T, 128>(const ForwardParams<T>&, int64_t, cudaStream_t); \
  template cudaError_t launch_forward_wgmma<T, 64>(const ForwardParams<T>&, int64_t, cudaStream_t);
RNN_EXT_INSTANTIATE(__half)
RNN_EXT_INSTANTIATE(__nv_bfloat16)
RNN_EXT_INSTANTIATE(float)
RNN_EXT_INSTANTIATE(double)
#undef RNN_EXT_INSTANTIATE

}  // namespace rnn_ext::cuda
