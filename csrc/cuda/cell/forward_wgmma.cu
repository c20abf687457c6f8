#include "cuda/cell/forward_wgmma.h"

#include <utility>

#include "cuda/cell/forward_wgmma.cuh"

namespace rnn_ext::cuda {

template <typename T>
bool forward_wgmma_takes(const ForwardParams<T>& p) {
  if constexpr (sizeof(T) == 8) return false;
  const int64_t B = p.batch, I = p.weights.input_size, H = p.weights.hidden_size;
  return has_tensor_map(p.input, B, I) && has_tensor_map(p.weights.weight_ih, H, I) &&
         has_tensor_map(p.output, B, H, H) &&
         (p.hx.data == nullptr || (has_tensor_map(p.hx, B, H) && has_tensor_map(p.weights.weight_hh, H, H)));
}

namespace {

template <typename T, int kRow, int kParts>
cudaError_t launch_row(const ForwardParams<T>& p, int64_t blocks, cudaStream_t stream) {
  constexpr ForwardWgmmaKernel k = kForwardWgmma[kRow];
  using Shape = WgmmaShape<T, k.math, k.bn, k.cluster, kParts>;
  static_assert(Shape::BM == k.bm, "the table's idea of it");
  const bool has_hx = p.hx.data != nullptr;
  const int64_t B = p.batch, I = p.weights.input_size, H = p.weights.hidden_size;
  ForwardWgmmaArguments<T> arguments = {};
  // The tensor cores would cut operands off after tf32's 11 bits, so TMA rounds them first.
  const auto type =
      Shape::kTf32 && !RNN_EXT_PLANTED(tf32_not_rounded) ? CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 : kTensorMapType<T>;
  const auto encode = [&](CUtensorMap& map, const Matrix<T>& m, int64_t rows, int64_t columns, int box_rows) {
    encode_tensor_map(map, m.data, rows, columns, m.row_stride, box_rows, type);
  };
  constexpr int kRowsOfB = Shape::BN / Shape::kCluster;
  encode(arguments.input, p.input, B, I, Shape::BM);
  encode(arguments.weight_ih, p.weights.weight_ih, H, I, kRowsOfB);
  if (has_hx) encode(arguments.hx, p.hx, B, H, Shape::BM);
  if (has_hx) encode(arguments.weight_hh, p.weights.weight_hh, H, H, kRowsOfB);
  encode_tensor_map(arguments.output, p.output, B, H, H, ForwardWgmmaSmem<Shape>::kStoreRows);

  const auto tiles = [](int64_t size, int tile) { return static_cast<int>(ceil_div(size, tile)); };
  arguments.params = p;
  arguments.tiles_m = tiles(B, Shape::BM * Shape::kCluster);
  arguments.tiles_n = tiles(H, Shape::BN);
  arguments.k_tiles_input = tiles(I, Shape::BK);
  arguments.k_tiles_hx = has_hx ? tiles(H, Shape::BK) : 0;
  return RNN_EXT_LAUNCH_CLUSTER((forward_wgmma<Shape>), dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads),
                                dim3(Shape::kBlocks), sizeof(ForwardWgmmaSmem<Shape>), stream, arguments);
}

template <typename T, int... kRows>
cudaError_t launch_rows(std::integer_sequence<int, kRows...>, const ForwardParams<T>& p, const ForwardPlan& plan,
                        cudaStream_t stream) {
  cudaError_t e = cudaErrorInvalidValue;
  const auto try_row = [&](auto row) {
    if constexpr (kForwardWgmma[row()].takes(kDtype<T>)) {
      constexpr ForwardWgmmaKernel k = kForwardWgmma[row()];
      if (plan.kernel != row()) return;
      if (plan.splits == 1) e = launch_row<T, row(), 1>(p, plan.blocks, stream);
      if constexpr (k.most_splits >= 2) {
        if (plan.splits == 2) e = launch_row<T, row(), 2>(p, plan.blocks, stream);
      }
      if constexpr (k.most_splits >= 4) {
        if (plan.splits == 4) e = launch_row<T, row(), 4>(p, plan.blocks, stream);
      }
    }
  };
  (try_row(std::integral_constant<int, kRows>()), ...);
  return e;
}

}  // namespace

template <typename T>
cudaError_t launch_forward_wgmma(const ForwardParams<T>& p, const ForwardPlan& plan, cudaStream_t stream) {
  return launch_rows(std::make_integer_sequence<int, kNumForwardWgmma>(), p, plan, stream);
}

#define RNN_EXT_INSTANTIATE(T)                                \
  template bool forward_wgmma_takes(const ForwardParams<T>&); \
  template cudaError_t launch_forward_wgmma(const ForwardParams<T>&, const ForwardPlan&, cudaStream_t);
RNN_EXT_FOR_EACH_DTYPE(RNN_EXT_INSTANTIATE)
#undef RNN_EXT_INSTANTIATE

}  // namespace rnn_ext::cuda
