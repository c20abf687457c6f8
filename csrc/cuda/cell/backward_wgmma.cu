#include "cuda/cell/backward_wgmma.h"

#include "cuda/cell/backward_wgmma.cuh"

namespace rnn_ext::cuda {

namespace {

// Adds a side to one kind of tiles: gradient = A operand, with M rows, summed up over K. An operand without data stands
// for zeros.
template <typename Shape, typename T = typename Shape::T>
void add_side(BackwardWgmmaKind& kind, int i, int64_t M, int64_t K, const Matrix<T>& operand, T* gradient,
              int64_t columns) {
  kind.tiles_m = static_cast<int>(ceil_div(M, Shape::BM * Shape::kCluster));
  if (gradient == nullptr) return;
  kind.tiles_n[i] = static_cast<int>(ceil_div(columns, Shape::BN));
  encode_tensor_map(kind.gradient[i], gradient, M, columns, columns, WgmmaRing<Shape>::kStoreRows);
  if (operand.data == nullptr) return;
  kind.k_tiles[i] = static_cast<int>(ceil_div(K, Shape::BK));
  encode_tensor_map(kind.operand[i], operand.data, K, columns, operand.row_stride, Shape::BK);
}

template <typename T, int BN>
cudaError_t launch(const BackwardParams<T>& p, int64_t blocks, void* workspace, cudaStream_t stream) {
  constexpr BackwardWgmmaKernel k = kBackwardWgmma[BN == 256 ? 0 : 1];
  using Shape = WgmmaShape<T, Math::kTensorCore, BN, k.cluster>;
  static_assert(Shape::BM == k.bm && Shape::BN == k.bn, "the table's idea of it");
  static_assert(kDzRows == 32, "BackwardWgmmaWorkspace's idea of it");
  const int64_t B = p.batch, H = p.weights.hidden_size;
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
  data.is_data = true;
  const BackwardSide<T> sides[2] = {input_side(p), hidden_side(p)};
  for (int i = 0; i < 2; ++i) {
    const BackwardSide<T>& s = sides[i];
    add_side<Shape>(data, i, B, H, s.weight, s.grad_operand, s.columns);
    add_side<Shape>(weight, i, H, B, s.operand, s.grad_weight, s.columns);
  }
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
  const int64_t B = p.batch, H = p.weights.hidden_size;
  const auto takes = [](const T* gradient, int64_t M, int64_t K, const Matrix<T>& operand, int64_t columns) {
    return gradient == nullptr || (has_tensor_map(gradient, M, columns, columns) &&
                                   (operand.data == nullptr || has_tensor_map(operand, K, columns)));
  };
  const auto takes_side = [&](const BackwardSide<T>& s) {
    return takes(s.grad_operand, B, H, s.weight, s.columns) && takes(s.grad_weight, H, B, s.operand, s.columns);
  };
  return takes_side(input_side(p)) && takes_side(hidden_side(p));
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
