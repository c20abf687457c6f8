#include "forward_wgmma.h"

#include <algorithm>

#include "forward_wgmma.cuh"

namespace rnn_ext::cuda {

template <typename T>
bool forward_wgmma_takes(const ForwardParams<T>& p) {
  if constexpr (sizeof(T) == 8) return false;
  const auto fits = [](const Matrix<T>& m, int64_t rows, int64_t columns) {
    return m.col_stride == 1 && has_tensor_map(m.data, rows, columns, m.row_stride);
  };
  const int64_t B = p.batch, I = p.input_size, H = p.hidden_size;
  return fits(p.input, B, I) && fits(p.weight_ih, H, I) && fits({p.output, H}, B, H) &&
         (p.hx.data == nullptr || (fits(p.hx, B, H) && fits(p.weight_hh, H, H)));
}

namespace {

template <typename T, int BN>
cudaError_t launch(const ForwardParams<T>& p, cudaStream_t stream) {
  // Two blocks share the weights where these are most of what a stage loads.
  using Shape = WgmmaShape<T, BN, BN == 256 ? 2 : 1>;
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
  int device = 0, multiprocessors = 0;
  if (e == cudaSuccess) e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (e != cudaSuccess) return e;

  const auto ceil_div = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  arguments.params = p;
  arguments.tiles_m = ceil_div(B, Shape::BM * Shape::kCluster);
  arguments.tiles_n = ceil_div(H, BN);
  arguments.k_tiles_input = ceil_div(I, Shape::BK);
  arguments.k_tiles_hx = has_hx ? ceil_div(H, Shape::BK) : 0;
  const int64_t tiles = int64_t{arguments.tiles_m} * arguments.tiles_n;
  if (tiles > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
  const unsigned clusters = static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors / Shape::kCluster));
  return RNN_EXT_LAUNCH_CLUSTER((forward_wgmma<Shape>), dim3(clusters * Shape::kCluster), dim3(Shape::kThreads),
                                dim3(Shape::kCluster), sizeof(WgmmaSmem<Shape>), stream, arguments);
}

}  // namespace

template <typename T, int BN>
cudaError_t launch_forward_wgmma(const ForwardParams<T>& p, cudaStream_t stream) {
  if constexpr (kForwardWgmmaComputes<T, BN>) return launch<T, BN>(p, stream);
  return cudaErrorNotSupported;
}

#define RNN_EXT_INSTANTIATE(T)                                                              \
  template bool forward_wgmma_takes(const ForwardParams<T>&);                               \
  template cudaError_t launch_forward_wgmma<T, 256>(const ForwardParams<T>&, cudaStream_t); \
  template cudaError_t launch_forward_wgmma<T, 128>(const ForwardParams<T>&, cudaStream_t); \
  template cudaError_t launch_forward_wgmma<T, 64>(const ForwardParams<T>&, cudaStream_t);
RNN_EXT_INSTANTIATE(__half)
RNN_EXT_INSTANTIATE(__nv_bfloat16)
RNN_EXT_INSTANTIATE(float)
RNN_EXT_INSTANTIATE(double)
#undef RNN_EXT_INSTANTIATE

}  // namespace rnn_ext::cuda
