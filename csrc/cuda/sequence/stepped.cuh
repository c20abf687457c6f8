// A recurrence as a launch a step: a product of (B, H) and (H, H), a tile to a block, and what becomes of its sums.
//
//   forward    h_t = f(z_t + h_{t-1} Uᵀ)
//   backward   dz_t = (dh_t + dz_{t+1} U) f'(h_t), and in the end dh_0 = dz_1 U
//
// The steps hand h (dz) on in two states that they read and write by turns: rows of the batch in the order of the
// steps, of which a step has the first so many, aligned whatever the data's strides are. In them the rows that a step
// has more than the one before it (a reverse direction's, or the backward's) find hx, or zeros. U is read along K:
// where its rows don't lie so, as for the backward, it is packed once.
//
// On sm_90 a step is launched while the one before it still runs; in that time what it reads apart from the state is
// fetched to L2.
#pragma once
#include <algorithm>
#include <utility>

#include "cuda/blocks/grad_z.cuh"
#include "cuda/blocks/mainloop.cuh"
#include "cuda/ptx/ptx_sm90.cuh"
#include "cuda/sequence/rows.cuh"
#include "cuda/sequence/stepped.h"

namespace rnn_ext::cuda {

// ---- kernel ---------------------------------------------------------------------------------------------------------

// What becomes of the sums: h_t, dz_t, or dh_0, which they are.
enum class StepKind { kForward, kBackward, kGradHx };

// Rows "by place" are in the data's order, and so, of all steps, those of the data, which jagged data has elsewhere;
// the others are in that of the steps.
template <typename T>
struct StepParams {
  using Acc = Accumulator<T>;

  Segment<Operand<T>, Operand<T>> product;  // the state and U, or Uᵀ; a depth of 0 where the state is zero
  StepKind kind;
  Nonlinearity nonlinearity;   // forward
  Derivative<Acc> derivative;  // backward
  int64_t rows, hidden_size;
  const int64_t* order;   // of rows: their place; null: the same
  const int64_t* firsts;  // of rows: where they are in the data; null: at their place
  bool vectors;           // all rows but the state's, too, are of whole vectors, at multiples of 16 bytes
  T* result;              // h_t, dz_t, dh_0: by place
  int64_t result_stride;
  T* state;  // the same for the next step; null: there is none
  int64_t state_stride;
  T* last;  // the same of the rows that have no next step, from `ending` on; null: nobody asks
  int64_t last_stride;
  bool last_by_place;
  int64_t ending;
  const Acc* z;  // forward: by place
  int64_t z_stride;
  Matrix<T> output, grad_output;  // backward: by place; a null grad_output stands for zeros
  Matrix<T> grad_h_n;             // by place, of the rows from `entering` on; null: zeros
  int64_t entering;
};

// kCount neighbouring elements, of which the first `columns` are there.
template <int kCount, typename From, typename Acc>
__device__ __forceinline__ void load_columns(Acc (&to)[kCount], const From* from, int64_t stride, int columns,
                                             bool vectors) {
  if (vectors) {
    using Piece = Vector<From, 16>;
    static_assert(kCount % Piece::kSize == 0);
#pragma unroll
    for (int i = 0; i < kCount; i += Piece::kSize) {
      const Piece piece = *reinterpret_cast<const Piece*>(from + i);
#pragma unroll
      for (int j = 0; j < Piece::kSize; ++j) to[i + j] = widen(piece.v[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = i < columns ? widen(from[i * stride]) : Acc(0);
  }
}

template <typename T>
__device__ __forceinline__ const T* element(const Matrix<T>& m, int64_t row, int64_t column) {
  return m.data + row * m.row_stride + column * m.col_stride;
}

// From the sums of neighbouring columns of a row, the first `columns` of which are inside, to what is stored.
template <typename T, int kColumns>
__device__ __forceinline__ void finish_step(const StepParams<T>& p, int64_t row, int64_t column, int columns,
                                            Accumulator<T> (&sums)[kColumns]) {
  using Acc = Accumulator<T>;
  const int64_t place = p.order != nullptr ? p.order[row] : row;
  const int64_t in_data = p.firsts != nullptr ? p.firsts[row] : place;
  Vector<T, 16> v;
  if (p.kind == StepKind::kForward) {
    Acc z[kColumns];
    load_columns(z, p.z + in_data * p.z_stride + column, 1, columns, p.vectors);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) v.v[i] = activate<T>(z[i] + sums[i], p.nonlinearity);
  } else {
    Acc term[kColumns];
    const auto add = [&](const Matrix<T>& m, int64_t at) {
      load_columns(term, element(m, at, column), m.col_stride, columns, p.vectors);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sums[i] += term[i];
    };
    if (p.grad_output.data != nullptr) add(p.grad_output, in_data);
    if (p.grad_h_n.data != nullptr && (row >= p.entering || RNN_EXT_PLANTED(step_gradient_of_every_row))) {
      add(p.grad_h_n, place);
    }
    if (p.kind == StepKind::kBackward) {
      load_columns(term, element(p.output, in_data, column), p.output.col_stride, columns, p.vectors);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sums[i] = p.derivative.dz(sums[i], term[i]);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) v.v[i] = narrow<T>(sums[i]);
  }
  const auto store = [&](T* to) {
    if (p.vectors) {
      store_vector(to + column, v);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (i < columns || RNN_EXT_PLANTED(step_no_column_bound)) to[column + i] = v.v[i];
      }
    }
  };
  store(p.result + in_data * p.result_stride);
  if (p.state != nullptr) store(p.state + row * p.state_stride);
  if (p.last != nullptr && row >= p.ending) store(p.last + (p.last_by_place ? place : row) * p.last_stride);
}

template <typename T, class Loop>
__global__ void __launch_bounds__(Loop::Shape::kThreads, Loop::Shape::kBlocksPerSm) recurrence_step(StepParams<T> p) {
  using Shape = typename Loop::Shape;
  using Smem = typename Loop::Smem;
  using Acc = typename Loop::Acc;
  static_assert(sizeof(Smem) <= 99 * 1024, "fits sm_86, which has the least of sm_80 and later");
  RNN_EXT_SMEM(Smem, smem);
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));

  const auto tiles_m = static_cast<unsigned>(ceil_div(p.rows, Shape::BM));
  const TileBounds tile = {int64_t{blockIdx.x % tiles_m} * Shape::BM, p.rows, int64_t{blockIdx.x / tiles_m} * Shape::BN,
                           p.hidden_size};
  // The thread's columns in the tile, and how many of them are inside; use(row) for its rows. Formed again after the
  // product, which needs the registers.
  const auto with_my_rows = [&](auto use) {
    const int64_t rows_left = RNN_EXT_PLANTED(step_no_row_bound) ? Shape::BM : p.rows - tile.m;
    const int column = Loop::template vector_column<kVector>();
    const int columns = static_cast<int>(min(p.hidden_size - tile.n - column, int64_t{kVector}));
    if (columns <= 0) return;
    Loop::template for_each_row<kVector>(0, static_cast<int>(min(rows_left, int64_t{Shape::BM})),
                                         [&](int row) { use(row, column, columns); });
  };

  ptx::let_next_launch_start();
  if (p.order == nullptr) {
    with_my_rows([&](int r, int c, int) {
      const int64_t row = tile.m + r, column = tile.n + c;
      if (p.z != nullptr) ptx::prefetch_to_l2(p.z + row * p.z_stride + column);
      if (p.grad_output.data != nullptr) ptx::prefetch_to_l2(element(p.grad_output, row, column));
      if (p.output.data != nullptr) ptx::prefetch_to_l2(element(p.output, row, column));
    });
  }
  if (!RNN_EXT_PLANTED(step_no_wait_for_previous_launch)) ptx::wait_for_previous_launch();

  typename Loop::Engine engine;
  Loop::run(smem, engine, p.product, tile, 0, Loop::slices(p.product.depth));
  Loop::put_sums(smem, engine);
  with_my_rows([&](int row, int column, int columns) {
    Acc sums[kVector] = {};
    Loop::add_sums(smem.sums, row, column, sums);
    finish_step(p, tile.m + row, tile.n + column, columns, sums);
  });
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <typename T, int kRow>
cudaError_t launch_step_row(const StepParams<T>& p, bool early, cudaStream_t stream) {
  constexpr SteppedKernel k = kStepped[kRow];
  using Shape =
      std::conditional_t<k.math == Math::kSimt,
                         ThreadShape<k.bm, k.bn, k.bk, k.parts_m, k.parts_n, k.groups, k.stages, k.blocks_per_sm>,
                         WarpShape<k.bm, k.bn, k.bk, k.parts_m, k.parts_n, k.groups, k.stages, k.blocks_per_sm>>;
  using Loop = Mainloop<Engine<T, k.math, Shape, Major::kK, Major::kK>, Operand<T>, Operand<T>, k.fill>;
  static_assert(k.threads() == Shape::kThreads && k.smem_bytes(kDtype<T>) == sizeof(typename Loop::Smem));
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, k.bm) * ceil_div(p.hidden_size, k.bn)));
  return RNN_EXT_LAUNCH_EARLY((recurrence_step<T, Loop>), grid, dim3(Shape::kThreads), sizeof(typename Loop::Smem),
                              stream, early, p);
}

// Of the table's rows only those for T are compiled.
template <typename T, int... kRows>
cudaError_t launch_step(std::integer_sequence<int, kRows...>, const StepParams<T>& p, const SequencePlan& plan,
                        bool early, cudaStream_t stream) {
  cudaError_t e = cudaErrorInvalidValue;
  const auto try_row = [&](auto row) {
    if constexpr (kStepped[row()].takes(kDtype<T>)) {
      if (plan.kernel == row()) e = launch_step_row<T, row()>(p, early, stream);
    }
  };
  (try_row(std::integral_constant<int, kRows>()), ...);
  return e;
}

// The walk through the steps, which both directions of both passes share. At each step, prepare(t, q) says what is that
// step's own.
template <typename T>
class SteppedWalk {
 public:
  SteppedWalk(const SequenceCase& c, const Steps& host, const Steps& on_device, bool from_the_end,
              const SequencePlan& plan, void* workspace, cudaStream_t stream)
      : layout_(c),
        host_(host),
        from_the_end_(from_the_end),
        plan_(plan),
        bytes_(static_cast<char*>(workspace)),
        stream_(stream) {
    q_.order = on_device.order;
    q_.firsts = on_device.firsts;
    q_.hidden_size = c.hidden_size;
    q_.state_stride = layout_.stride;
  }

  StepParams<T>& params() { return q_; }
  T* state(int i) const { return at(i * layout_.state_bytes); }
  T* last() const { return at(layout_.last); }
  int64_t stride() const { return layout_.stride; }

  // U, or Uᵀ, by rows of K.
  cudaError_t read_weight(Matrix<T> weight, bool packs) {
    const int64_t H = q_.hidden_size;
    cudaError_t e = cudaSuccess;
    if (packs) {
      T* const packed = at(layout_.weight);
      e = launch_pack_weight(weight, H, packed, layout_.stride, stream_);
      weight = {packed, layout_.stride, 1};
    }
    q_.product.b = operand_by_rows(weight, H, H, Major::kK);
    return e;
  }

  // `starts_at_zero`: what the states hold before the first step.
  template <typename Prepare>
  cudaError_t run(bool starts_at_zero, Prepare prepare) {
    int read = 0;
    for (int64_t i = 0; i < host_.steps; ++i) {
      const int64_t t = from_the_end_ ? host_.steps - 1 - i : i, next = from_the_end_ ? t - 1 : t + 1;
      const int64_t before = i == 0 ? 0 : host_.count(from_the_end_ ? t + 1 : t - 1);
      q_.rows = host_.count(t);
      if (q_.rows == 0) continue;
      q_.ending = i + 1 == host_.steps ? 0 : host_.count(next);
      q_.entering = before;
      q_.product.depth = before == 0 && starts_at_zero ? 0 : q_.hidden_size;
      q_.product.a = operand_by_rows(Matrix<T>{state(read), layout_.stride, 1}, q_.rows, q_.hidden_size, Major::kK);
      q_.state = state(RNN_EXT_PLANTED(step_one_state) ? read : 1 - read);
      prepare(t, q_);
      const cudaError_t e = launch(i > 0);
      if (e != cudaSuccess) return e;
      read = 1 - read;
    }
    return cudaSuccess;
  }

  // One more product, with what params() say.
  cudaError_t launch(bool follows_a_step) const {
    return launch_step(std::make_integer_sequence<int, kNumStepped>(), q_, plan_, plan_.early && follows_a_step,
                       stream_);
  }

 private:
  const SteppedWorkspace layout_;
  const Steps& host_;
  const bool from_the_end_;
  const SequencePlan& plan_;
  char* const bytes_;
  const cudaStream_t stream_;
  StepParams<T> q_{};

  T* at(int64_t byte) const { return reinterpret_cast<T*>(bytes_ + byte); }
};

// A step's rows of the data, as a matrix by place.
template <typename T, typename M = Matrix<std::remove_const_t<T>>>
M step_matrix(const Rows<T>& rows, const Steps& host, int64_t t) {
  return rows.data == nullptr ? M{} : M{rows.data + host.begin(t) * rows.step_stride, rows.row_stride, rows.col_stride};
}

// Whether what lies by place can be accessed in vectors: rows of whole ones, one after the other.
template <typename T>
class Vectors {
 public:
  explicit Vectors(int64_t hidden_size) : fit_(hidden_size * static_cast<int64_t>(sizeof(T)) % 16 == 0) {}

  template <typename E>
  Vectors& add(const E* data, int64_t stride, int64_t col_stride = 1) {
    fit_ = fit_ && (data == nullptr || (col_stride == 1 && lines_are_aligned(data, stride, 16)));
    return *this;
  }
  template <typename E>
  Vectors& add(const Rows<E>& rows) {
    return add(rows.data, rows.step_stride, rows.col_stride).add(rows.data, rows.row_stride);
  }
  explicit operator bool() const { return fit_; }

 private:
  bool fit_;
};

template <typename T>
cudaError_t launch_stepped_forward(const RecurrenceForwardParams<T>& p, const Steps& host, const SequencePlan& plan,
                                   void* workspace, cudaStream_t stream) {
  const SequenceCase c = recurrence_case(p);
  const int64_t B = c.batch, H = c.hidden_size;
  SteppedWalk<T> walk(c, host, p.steps, p.reverse, plan, workspace, stream);
  cudaError_t e = walk.read_weight(p.weight_hh, c.packs_weight);
  if (e != cudaSuccess) return e;
  // A row that comes in at a later step must find hx in whichever state that step reads.
  e = launch_spread_rows(
      SpreadRows<T>{p.hx, p.steps.order, {walk.state(0), walk.state(1)}, walk.stride(), p.h_n, 0, B, H}, stream);
  if (e != cudaSuccess) return e;
  StepParams<T>& q = walk.params();
  q.kind = StepKind::kForward;
  q.nonlinearity = p.nonlinearity;
  q.vectors = bool(Vectors<T>(H).add(p.z).add(p.output).add(p.h_n, H));
  q.result_stride = p.output.row_stride;
  q.z_stride = p.z.row_stride;
  q.last = p.h_n;
  q.last_stride = H;
  q.last_by_place = true;
  return walk.run(p.hx.data == nullptr, [&](int64_t t, StepParams<T>& step) {
    step.z = p.z.data + host.begin(RNN_EXT_PLANTED(step_z_of_another) ? 0 : t) * p.z.step_stride;
    step.result = p.output.data + host.begin(t) * p.output.step_stride;
  });
}

template <typename T>
cudaError_t launch_stepped_backward(const RecurrenceBackwardParams<T>& p, const Steps& host, const SequencePlan& plan,
                                    void* workspace, cudaStream_t stream) {
  const SequenceCase c = recurrence_case(p);
  const int64_t B = c.batch, H = c.hidden_size, B_first = host.steps > 0 ? host.count(0) : 0;
  SteppedWalk<T> walk(c, host, p.steps, !p.reverse, plan, workspace, stream);
  cudaError_t e = walk.read_weight(transposed(p.weight_hh), c.packs_weight);
  if (e != cudaSuccess) return e;
  e = launch_spread_rows(SpreadRows<T>{{}, nullptr, {walk.state(0), walk.state(1)}, walk.stride(), nullptr, 0, B, H},
                         stream);
  if (e != cudaSuccess) return e;
  StepParams<T>& q = walk.params();
  q.kind = StepKind::kBackward;
  q.derivative = Derivative<Accumulator<T>>(p.nonlinearity);
  q.vectors = bool(Vectors<T>(H)
                       .add(p.grad_output)
                       .add(p.output)
                       .add(p.grad_z)
                       .add(p.grad_h_n.data, p.grad_h_n.row_stride, p.grad_h_n.col_stride)
                       .add(p.grad_hx, H));
  q.result_stride = p.grad_z.row_stride;
  q.grad_h_n = p.grad_h_n;
  q.last = p.grad_hx != nullptr ? walk.last() : nullptr;
  q.last_stride = walk.stride();
  e = walk.run(true, [&](int64_t t, StepParams<T>& step) {
    step.grad_output = step_matrix(p.grad_output, host, t);
    step.output = step_matrix(p.output, host, t);
    step.result = p.grad_z.data + host.begin(t) * p.grad_z.step_stride;
  });
  if (e != cudaSuccess || p.grad_hx == nullptr) return e;
  // What h_n's gradient is to rows that have no step, it is to hx.
  e = launch_spread_rows(SpreadRows<T>{p.grad_h_n, p.steps.order, {}, 0, p.grad_hx, B_first, B, H}, stream);
  if (e != cudaSuccess || B_first == 0) return e;
  q.kind = StepKind::kGradHx;
  q.product.a = operand_by_rows(Matrix<T>{walk.last(), walk.stride(), 1}, B_first, H, Major::kK);
  q.product.depth = H;
  q.rows = B_first;
  q.result = p.grad_hx;
  q.result_stride = H;
  q.state = q.last = nullptr;
  q.firsts = nullptr;
  q.grad_output = q.grad_h_n = q.output = {};
  return walk.launch(false);
}

}  // namespace rnn_ext::cuda
