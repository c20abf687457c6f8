// dz = grad_output · f'(output): of one element, as an operand that is formed on the way to shared memory, and as a
// matrix in a workspace, written by a launch of its own.
#pragma once
#include "cuda/blocks/operand.cuh"

namespace rnn_ext::cuda {

// ---- of one element -------------------------------------------------------------------------------------------------

// f' in terms of the stored h' = f(z). The two smooth derivatives, 1 - h'² and h' (1 - h'), have the form a + h' (b -
// h'), so that a uniform branch replaces one an element.
template <typename Acc>
struct Derivative {
  Acc a, b;
  bool relu;

  Derivative() = default;
  explicit Derivative(Nonlinearity f)
      : a(f == Nonlinearity::kTanh ? 1 : 0), b(f == Nonlinearity::kSigmoid ? 1 : 0), relu(f == Nonlinearity::kRelu) {}

  // A NaN in h' lets relu's gradient through, as torch's threshold_backward does.
  __device__ __forceinline__ Acc dz(Acc grad, Acc output) const {
    const Acc smooth = grad * (a + output * (b - output));
    return relu ? (output <= Acc(0) ? Acc(0) : grad) : smooth;
  }
};

// ---- as an operand --------------------------------------------------------------------------------------------------

template <typename T>
struct DzOperand : CombinedOperand<T> {
  using Acc = Accumulator<T>;
  Derivative<Acc> derivative;

  DzOperand() = default;
  DzOperand(const Operand<T>& grad_output, const Operand<T>& output, Nonlinearity f)
      : CombinedOperand<T>{{grad_output, output}}, derivative(f) {}

  __device__ __forceinline__ Acc combine(Acc grad, Acc output) const { return derivative.dz(grad, output); }
};

// What dz is made of: dh' and h', both (B, H).
template <typename T>
struct DzSources {
  Matrix<T> grad_output, output;
  Nonlinearity nonlinearity;
  int64_t batch, hidden_size;

  DzOperand<T> by_rows() const {  // (B, H)
    return {operand_by_rows(grad_output, batch, hidden_size, Major::kK),
            operand_by_rows(output, batch, hidden_size, Major::kK), nonlinearity};
  }
  DzOperand<T> by_columns() const {  // (H, B)
    return {operand_by_columns(grad_output, hidden_size, batch, Major::kRows),
            operand_by_columns(output, hidden_size, batch, Major::kRows), nonlinearity};
  }
};

// ---- in a workspace -------------------------------------------------------------------------------------------------

constexpr int kDzWarps = 8, kDzRows = 32;  // a block's
template <typename T>
constexpr int kDzColumns = 32 * 16 / static_cast<int>(sizeof(T));

// Sums of a warp's rows. A word is left out after every 32, so that lanes meet in no bank, whether each writes a vector
// or one element.
template <typename T>
struct DzSmem {
  Accumulator<T> sums[kDzWarps][kDzColumns<T> * 33 / 32];
  static __device__ int place(int column) { return column + column / 32; }
};

// dz (B, H), its rows dz_stride apart. A warp takes a row's 512 bytes at a time. What lies between H and dz_stride
// stays as it is: nobody reads it.
//
// Unless `sums` is null, sums[i] (of H elements) = Σ dz over the i-th 32 rows, of which grad_bias can then be made.
template <typename T>
__global__ void __launch_bounds__(32 * kDzWarps)
    grad_z(DzOperand<T> source, T* dz, int64_t dz_stride, Accumulator<T>* sums, int64_t batch, int64_t hidden_size) {
  using Smem = DzSmem<T>;
  static_assert(sizeof(Smem) <= 48 * 1024, "what a block has without asking");
  RNN_EXT_SMEM(Smem, smem);
  using Unit = Vector<T, 16>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t column = int64_t{blockIdx.y} * kDzColumns<T> + lane * Unit::kSize;
  const int columns = static_cast<int>(min(hidden_size - column, int64_t{Unit::kSize}));
  Accumulator<T> sum[Unit::kSize] = {};
#pragma unroll 1
  for (int i = 0; i < kDzRows / kDzWarps; ++i) {
    const int64_t row = int64_t{blockIdx.x} * kDzRows + warp + i * kDzWarps;
    if (columns <= 0 || (row >= batch && !RNN_EXT_PLANTED(grad_z_no_bound))) continue;
    Unit parts[2] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Operand<T>& part = source.part(j);
      const T* const from = part.data + row * part.row_stride + column * part.k_stride;
      if (part.vector_bytes == 16 && columns == Unit::kSize) {
        parts[j] = *reinterpret_cast<const Unit*>(from);
      } else {
#pragma unroll
        for (int k = 0; k < Unit::kSize; ++k) {
          if (k < columns) parts[j].v[k] = from[k * part.k_stride];
        }
      }
    }
    Unit result;
#pragma unroll
    for (int k = 0; k < Unit::kSize; ++k) {
      result.v[k] = narrow<T>(source.combine(widen(parts[0].v[k]), widen(parts[1].v[k])));
      sum[k] += widen(result.v[k]);
    }
    store_vector(dz + row * dz_stride + column, result);
  }
  if (sums == nullptr) return;
#pragma unroll
  for (int k = 0; k < Unit::kSize; ++k) smem.sums[warp][Smem::place(lane * Unit::kSize + k)] = sum[k];
  if (!RNN_EXT_PLANTED(grad_z_no_barrier)) __syncthreads();
  const int mine = static_cast<int>(threadIdx.x);
  const int64_t n = int64_t{blockIdx.y} * kDzColumns<T> + mine;
  if (mine >= kDzColumns<T> || n >= hidden_size) return;
  Accumulator<T> total = 0;
#pragma unroll
  for (int w = 0; w < kDzWarps; ++w) total += smem.sums[w][Smem::place(mine)];
  sums[blockIdx.x * hidden_size + n] = total;
}

template <typename T>
cudaError_t launch_grad_z(const DzSources<T>& s, T* dz, int64_t dz_stride, Accumulator<T>* sums, cudaStream_t stream) {
  if (s.batch == 0 || s.hidden_size == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(s.batch, kDzRows)),
                  static_cast<unsigned>(ceil_div(s.hidden_size, kDzColumns<T>)));
  return RNN_EXT_LAUNCH((grad_z<T>), grid, dim3(32 * kDzWarps), sizeof(DzSmem<T>), stream, s.by_rows(), dz, dz_stride,
                        sums, s.batch, s.hidden_size);
}

}  // namespace rnn_ext::cuda
