// dz = grad_output · f'(output), which both of the backward's products need, and its sums over the batch.
#pragma once

// dz for NV vectors of columns, and its sums over the batch. kPartial: the last vector has n columns.
template <Nonlinearity kind, int NV, Edge edge, typename T>
void grad_z_strip(const BackwardParams<T>& p, const DzBlock<T>& dz, int64_t col, int64_t n) {
  using Vec = typename VecOf<T>::type;
  using V = typename Vec::V;
  constexpr int kLanes = Vec::kLanes;
  // A cascade: every sum is of at most 16 terms, since the rounding error of a long running sum grows with its length.
  constexpr int64_t kRunRows = 16;
  constexpr int kLevels = 4;
  // Columns of grad_output that are not next to each other are gathered; once, where the rows are all the same one.
  const Matrix<T>& grad_output = p.grad_output;
  const bool gathers = grad_output.col_stride != 1;
  const int64_t cols = (NV - 1) * kLanes + n;
  T gathered[NV * kLanes];
  V sums[kLevels][NV];
  UNROLL for (int level = 0; level < kLevels; ++level) {
    UNROLL for (int j = 0; j < NV; ++j) sums[level][j] = Vec::zero();
  }
  for (int64_t b = 0; b < dz.rows();) {
    V run[NV];
    UNROLL for (int j = 0; j < NV; ++j) run[j] = Vec::zero();
    for (const int64_t run_end = smaller(b + kRunRows, dz.rows()); b < run_end; ++b) {
      const T* grad = grad_output.data + (dz.row_begin + b) * grad_output.row_stride + col * grad_output.col_stride;
      if (gathers) {
        if (b == 0 || grad_output.row_stride != 0) {
          for (int64_t j = 0; j < cols; ++j) gathered[j] = grad[j * grad_output.col_stride];
        }
        grad = gathered;
      }
      const T* y = p.output.data + (dz.row_begin + b) * p.output.row_stride + col;
      acc_t<T>* out = dz.data + b * dz.row_stride + (col - dz.col_begin);
      UNROLL for (int j = 0; j < NV; ++j, grad += kLanes, y += kLanes, out += kLanes) {
        if (edge == Edge::kPartial && j == NV - 1) {
          const V d = activation_grad<kind, Vec>(Vec::load(grad, n), Vec::load(y, n));
          run[j] += d;
          Vec::store(out, d, n);
        } else {
          const V d = activation_grad<kind, Vec>(Vec::load(grad), Vec::load(y));
          run[j] += d;
          Vec::store(out, d);
        }
      }
    }
    UNROLL for (int j = 0; j < NV; ++j) sums[0][j] += run[j];
    int64_t runs = b / kRunRows;
    for (int level = 1; level < kLevels && runs % kRunRows == 0; ++level, runs /= kRunRows) {
      UNROLL for (int j = 0; j < NV; ++j) {
        sums[level][j] += sums[level - 1][j];
        sums[level - 1][j] = Vec::zero();
      }
    }
  }
  if (!p.grad_bias || dz.rows() < p.batch) return;
  UNROLL for (int j = 0; j < NV; ++j) {
    const V total = (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]);
    if (edge == Edge::kPartial && j == NV - 1) {
      Vec::store(p.grad_bias + col + j * kLanes, total, n);
    } else {
      Vec::store(p.grad_bias + col + j * kLanes, total);
    }
  }
}

template <Nonlinearity kind, typename T>
void grad_z_columns(const BackwardParams<T>& p, const DzBlock<T>& dz, int64_t col, int64_t col_end) {
  constexpr int kLanes = VecOf<T>::type::kLanes;
  for (; col + 4 * kLanes <= col_end; col += 4 * kLanes) grad_z_strip<kind, 4, Edge::kWhole>(p, dz, col, kLanes);
  for (; col + kLanes <= col_end; col += kLanes) grad_z_strip<kind, 1, Edge::kWhole>(p, dz, col, kLanes);
  if (col < col_end) grad_z_strip<kind, 1, Edge::kPartial>(p, dz, col, col_end - col);
}

template <typename T>
void grad_z(const BackwardParams<T>& p, const DzBlock<T>& dz, int64_t col_begin, int64_t col_end) {
  switch (p.weights.nonlinearity) {
    case Nonlinearity::kTanh:
      return grad_z_columns<Nonlinearity::kTanh>(p, dz, col_begin, col_end);
    case Nonlinearity::kRelu:
      return grad_z_columns<Nonlinearity::kRelu>(p, dz, col_begin, col_end);
    case Nonlinearity::kSigmoid:
      return grad_z_columns<Nonlinearity::kSigmoid>(p, dz, col_begin, col_end);
  }
}
