#include "cuda/cell/backward_wgmma.h"

#include "cuda/cell/backward_wgmma.cuh"

namespace rnn_ext::cuda {

namespace {

// One kind of tiles: of the gradients asked for, [gradient[0] | gradient[1]] = A [operand[0] | operand[1]] with M rows,
// summed up over K. An operand without data stands for zeros.
template <typename Shape, typename T = typename Shape::T>
void make_kind(BackwardWgmmaKind& kind, bool is_data, int64_t M, int64_t K, const Matrix<T> (&operand)[2],
               T* const (&gradient)[2], const int64_t (&columns)[2]) {
  kind.is_data = is_data;
  kind.tiles_m = static_cast<int>(ceil_div(M, Shape::BM * Shape::kCluster));
  for (int i = 0; i < 2; ++i) {
    if (gradient[i] == nullptr) continue;
    kind.tiles_n[i] = static_cast<int>(ceil_div(columns[i], Shape::BN));
    encode_tensor_map(kind.gradient[i], gradient[i], M, columns[i], columns[i], WgmmaRing<Shape>::kStoreRows);
    if (operand[i].data == nullptr) continue;
    kind.k_tiles[i] = static_cast<int>(ceil_div(K, Shape::BK));
    encode_tensor_map(kind.operand[i], operand[i].data, K, columns[i], operand[i].row_stride, Shape::BK);
  }
}

template <typename T, int BN>
cudaError_t launch(const BackwardParams<T>& p, int64_t blocks, void* workspace, cudaStream_t stream) {
  constexpr BackwardWgmmaKernel k = kBackwardWgmma[BN == 256 ? 0 : 1];
  using Shape = WgmmaShape<T, Math::kTensorCore, BN, k.cluster>;
  static_assert(Shape::BM == k.bm && Shape::BN == k.bn, "the table's idea of it");
  static_assert(kDzRows == 32, "BackwardWgmmaWorkspace's idea of it");
  const int64_t B = p.batch, I = p.weights.input_size, H = p.weights.hidden_size;
  const BackwardWgmmaWorkspace layout(B, H, p.grad_bias != nullptr);
  T* const dz = static_cast<T*>(workspace);
  float* const sums =
      p.grad_bias != nullptr ? reinterpret_cast<float*>(static_cast<char*>(workspace) + layout.sums) : nullptr;
  // First, so that the GPU is busy while the tensor maps are encoded.
  const cudaError_t e = launch_grad_z(dz_sources(p), dz, layout.dz_stride, sums, stream);
  if (e != cudaSuccess) return e;

  BackwardWgmmaArguments<T> q = {};
  BackwardWgmmaKind &data = q.kinds[H >= B ? 0 : 1], &weight = q.kinds[H >= B ? 1 : 0];
  encode_tensor_map(q.dz, dz, B, H, layout.dz_stride, /*box_rows=*/64);
  make_kind<Shape>(data, true, B, H, {p.weights.weight_ih, p.weights.weight_hh}, {p.grad_input, p.grad_hx}, {I, H});
  make_kind<Shape>(weight, false, H, B, {p.input, p.hx}, {p.grad_weight_ih, p.grad_weight_hh}, {I, H});
  q.sums = sums;
  q.sums_rows = ceil_div(B, kDzRows);
  q.grad_bias = p.grad_bias;
  q.grad_bias_copy = p.grad_bias_copy;
  q.hidden_size = H;
  return RNN_EXT_LAUNCH_CLUSTER((backward_wgmma<Shape>), dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads),
                                dim3(Shape::kCluster), sizeof(WgmmaRing<Shape>), stream, q);
}

}  // namespace

template <typename T>
bool backward_wgmma_takes(const BackwardParams<T>& p) {
  if (!kBackwardWgmmaComputes<T> || p.batch == 0 || p.weights.hidden_size == 0) return false;
  const int64_t B = p.batch, I = p.weights.input_size, H = p.weights.hidden_size;
  const auto takes = [](const T* gradient, int64_t M, int64_t K, const Matrix<T>& operand, int64_t columns) {
    return gradient == nullptr || (has_tensor_map(gradient, M, columns, columns) &&
                                   (operand.data == nullptr || has_tensor_map(operand, K, columns)));
  };
  return takes(p.grad_input, B, H, p.weights.weight_ih, I) && takes(p.grad_hx, B, H, p.weights.weight_hh, H) &&
         takes(p.grad_weight_ih, H, B, p.input, I) && takes(p.grad_weight_hh, H, B, p.hx, H);
}

template <typename T, int BN>
cudaError_t launch_backward_wgmma(const BackwardParams<T>& p, int64_t blocks, void* workspace, cudaStream_t stream) {
  if constexpr (kBackwardWgmmaComputes<T>) return launch<T, BN>(p, blocks, workspace, stream);
  return cudaErrorNotSupported;
}

#define RNN_EXT_INSTANTIATE(T)                                                                                \
  template bool backward_wgmma_takes(const BackwardParams<T>&);                                               \
  template cudaError_t launch_backward_wgmma<T, 256>(const BackwardParams<T>&, int64_t, void*, cudaStream_t); \
  template cudaError_t launch_backward_wgmma<T, 128>(const BackwardParams<T>&, int64_t, void*, cudaStream_t);
RNN_EXT_FOR_EACH_DTYPE(RNN_EXT_INSTANTIATE)
#undef RNN_EXT_INSTANTIATE

}  // namespace rnn_ext::cuda
