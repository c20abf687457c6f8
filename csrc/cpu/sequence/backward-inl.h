// dz_t = (dy_t + dz_{t+1} U) · f'(h_t), from the last step to the first, block by block of steps; then what follows
// from a block of dz, while it is in the cache: dX = dZ W, and its terms of dW = dZᵀ X, dU = dZᵀ H_{t-1}, db = Σ dZ.
//
// A block's rows of dz follow one another without gaps, step by step: those of all groups, since the terms of a sum
// must not depend on the division.
#pragma once

template <typename T, typename Terms>
struct BackwardMemory {
  using S = acc_t<T>;
  static constexpr int kStrip = PanelsOf<S>::kRows;  // rows of dW that a tile computes

  int64_t stride, x_stride, strips;
  S *w, *u;
  S* grad_h_n;  // (B)
  S* last;      // (B): dz of the step behind the block
  S* dz;        // a block's
  S* strip;     // dz in strips of kStrip columns
  S *dw, *du;   // (H, I) and (H, H), padded
  S* db;
  S* panel;  // a thread's: a panel of X or H
  S* rows;   // a thread's chunk of rows
  S* words;  // a thread's: rows of dz, as they are multiplied

  BackwardMemory(const LayerBackwardParams<T>& p, const Division& division, int thread, Memory<S>& memory) {
    constexpr int kWidth = PanelsOf<S>::kWidth;
    const int64_t I = p.weights.input_size, H = p.weights.hidden_size, B = p.steps.batch;
    const int64_t rows_of_block = B * division.steps_per_block;
    stride = padded_stride<S>(H);
    x_stride = padded_stride<S>(I > H ? I : H);
    strips = (H + kStrip - 1) / kStrip;
    w = memory.take(p.grad_input.data ? panels_size<S>(I, Terms::words(H)) : 0);
    u = memory.take(panels_size<S>(H, Terms::words(H)));
    grad_h_n = memory.take(B * stride);
    last = memory.take(B * stride);
    dz = memory.take(rows_of_block * stride + kWidth);  // read in whole vectors, whatever their place
    strip = memory.take(wants_weights(p) ? strips * kStrip * Terms::words(rows_of_block) + kWidth : 0);
    const bool sums = sizeof(T) != sizeof(S) && p.steps.steps > division.steps_per_block;
    dw = memory.take(p.grad_weight_ih && sums ? H * padded<S>(I) : 0);
    du = memory.take(p.grad_weight_hh && sums ? H * padded<S>(H) : 0);
    db = memory.take(p.grad_bias ? panel_count<S>(H) * kWidth : 0);
    panel = memory.take(division.threads() * Terms::words(rows_of_block) * kWidth) +
            thread * Terms::words(rows_of_block) * kWidth;
    rows = memory.take(division.threads() * kChunkRows * x_stride) + thread * kChunkRows * x_stride;
    const int64_t most_words = Terms::operand_size(kChunkRows > B ? kChunkRows : B, H);
    words = memory.take(most_words * division.threads()) + most_words * thread;
  }

  static bool wants_weights(const LayerBackwardParams<T>& p) { return p.grad_weight_ih || p.grad_weight_hh; }
};

// dz = (dy + dh) · f'(h) in place of dh, for a step's rows of a group.
template <Nonlinearity kind, typename T>
void grad_z_step(const LayerBackwardParams<T>& p, const Walk& walk, int64_t s, int64_t begin, int64_t end, acc_t<T>* dz,
                 int64_t stride) {
  using Vec = typename VecOf<T>::type;
  const int64_t H = p.weights.hidden_size, rows = walk.count(s), t = walk.time(s);
  for (int64_t b = 0; b < rows; ++b) {
    const T* const output = p.output.at(p.steps, t, walk.first_row + b);
    const T* const grad_output = p.grad_output.data ? p.grad_output.at(p.steps, t, walk.first_row + b) : nullptr;
    acc_t<T>* const row = dz + b * stride;
    for (int64_t j = begin; j < end; j += Vec::kLanes) {
      const int64_t n = H - j;
      typename Vec::V grad = Vec::load(row + j);
      if (grad_output) {
        grad += load_strided<Vec>(grad_output + j * p.grad_output.col_stride, p.grad_output.col_stride, n);
      }
      const typename Vec::V h = n >= Vec::kLanes ? Vec::load(output + j) : Vec::load(output + j, n);
      Vec::store(row + j, activation_grad<kind, Vec>(grad, h));
    }
  }
}

template <typename T>
void grad_z_step(const LayerBackwardParams<T>& p, const Walk& walk, int64_t s, int64_t begin, int64_t end, acc_t<T>* dz,
                 int64_t stride) {
  switch (p.weights.nonlinearity) {
    case Nonlinearity::kTanh:
      return grad_z_step<Nonlinearity::kTanh>(p, walk, s, begin, end, dz, stride);
    case Nonlinearity::kRelu:
      return grad_z_step<Nonlinearity::kRelu>(p, walk, s, begin, end, dz, stride);
    case Nonlinearity::kSigmoid:
      return grad_z_step<Nonlinearity::kSigmoid>(p, walk, s, begin, end, dz, stride);
  }
}

// Where a tile of the weights' gradients goes: sums of a block of steps, of which there may be many. What the blocks
// before have summed is in the accumulation type; where the gradient is of that type, too, in its place.
template <typename T>
struct WeightsTile {
  acc_t<T>* sums;
  int64_t sums_stride;
  bool first, last;  // there are no sums yet; there are no blocks to come
  T* gradient;
  int64_t stride;
  int64_t rows, cols;  // of the gradient, that a tile at its edge may not have all of
};

// The tile of Σ_r strip[r, i] · panel[r, :].
template <typename Terms, int NV, typename T, typename S>
__attribute__((noinline)) void weights_tile(const S* strip, const S* panel, int64_t words, const WeightsTile<T>& to) {
  using Vec = typename PanelsOf<S>::Vec;
  using V = typename Vec::V;
  constexpr int kStrip = PanelsOf<S>::kRows, kLanes = PanelsOf<S>::kLanes;
  V acc[kStrip][NV];
  UNROLL for (int i = 0; i < kStrip; ++i) { UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = Vec::zero(); }
  for (int64_t r = 0; r < words; ++r, strip += kStrip, panel += NV * kLanes) {
    V b[NV];
    UNROLL for (int j = 0; j < NV; ++j) b[j] = Vec::load(panel + j * kLanes);
    UNROLL for (int i = 0; i < kStrip; ++i) {
      const V x = Vec::set(strip[i]);
      UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = Terms::add(x, b[j], acc[i][j]);
    }
  }
  UNROLL for (int i = 0; i < kStrip; ++i) {
    if (i < to.rows) {
      UNROLL for (int j = 0; j < NV; ++j) {
        const int64_t n = to.cols - j * kLanes;
        S* const sums = to.sums + i * to.sums_stride + j * kLanes;
        T* const gradient = to.gradient + i * to.stride + j * kLanes;
        if (n >= kLanes) {
          if (!to.first) acc[i][j] += Vec::load(sums);
          to.last ? Vec::store(gradient, acc[i][j]) : Vec::store(sums, acc[i][j]);
        } else {
          if (!to.first) acc[i][j] += Vec::load(sums, n);
          to.last ? Vec::store(gradient, acc[i][j], n) : Vec::store(sums, acc[i][j], n);
        }
      }
    }
  }
}

// One worker's backward pass. Groups and their rows are as in the forward pass.
template <typename T, typename Terms>
class LayerBackwardPass {
  using S = acc_t<T>;
  using Vec = typename PanelsOf<S>::Vec;
  static constexpr int kLanes = PanelsOf<S>::kLanes, kWidth = PanelsOf<S>::kWidth, kStrip = PanelsOf<S>::kRows;

 public:
  LayerBackwardPass(const LayerBackward<T>& job, const Worker& worker, Memory<S>& memory)
      : p_(job.p),
        division_(job.division),
        worker_(worker),
        member_(worker.thread % division_.members),
        m_(p_, division_, worker.thread, memory),
        whole_{p_.steps, p_.reverse, 0, p_.steps.batch},
        walk_{
            p_.steps, p_.reverse, division_.rows[worker.thread / division_.members],
            division_.rows[worker.thread / division_.members + 1] - division_.rows[worker.thread / division_.members]},
        own_(H_, member_, division_.members) {}

  void run() {
    prepare();
    worker_.all->wait(worker_.thread);
    for (int64_t end = p_.steps.steps; end > 0; end -= division_.steps_per_block) {
      const int64_t first = end > division_.steps_per_block ? end - division_.steps_per_block : 0;
      const int64_t rows = walk_back(first, end);
      worker_.all->wait(worker_.thread);
      pack_strips(rows);
      grad_inputs(first, end);
      grad_bias(first, end, rows);
      worker_.all->wait(worker_.thread);
      grad_weights(first, end, rows);
      worker_.all->wait(worker_.thread);
    }
  }

 private:
  // This worker's part of the packed weights, and grad_h_n.
  void prepare() {
    const Matrix<T>& W = p_.weights.weight_ih;
    const Matrix<T>& U = p_.weights.weight_hh;
    const Columns<S> hidden(H_, worker_.thread, threads_), input(I_, worker_.thread, threads_);
    Terms::pack(U.data, U.row_stride, U.col_stride, H_, H_, hidden.first_panel, hidden.last_panel, m_.u);
    if (m_.w && p_.grad_input.data) {
      Terms::pack(W.data, W.row_stride, W.col_stride, H_, I_, input.first_panel, input.last_panel, m_.w);
    }
    load_matrix(p_.grad_h_n, p_.steps, walk_.first_row, walk_.rows, H_, own_.begin, own_.end,
                m_.grad_h_n + walk_.first_row * m_.stride, m_.stride);
  }

  // dz of the steps from `end` back to `first`. Returns how many rows they have in all.
  int64_t walk_back(int64_t first, int64_t end) {
    int64_t rows_of_block = 0;
    for (int64_t s = first; s < end; ++s) rows_of_block += whole_.count(s);
    const S* behind = m_.last + walk_.first_row * m_.stride;
    S* dz = m_.dz + rows_of_block * m_.stride;
    for (int64_t s = end - 1; s >= first; --s) {
      dz -= whole_.count(s) * m_.stride;
      S* const own_rows = dz + walk_.first_row * m_.stride;
      const int64_t rows = walk_.count(s), going_on = walk_.going_on(s + 1);
      const S* const grad_h_n = m_.grad_h_n + walk_.first_row * m_.stride;
      multiply_by_u(behind, going_on, own_rows, m_.stride);
      for (int64_t b = going_on; b < rows; ++b) {
        copy_row(grad_h_n + b * m_.stride, own_.begin, own_.end, own_rows + b * m_.stride);
      }
      grad_z_step(p_, walk_, s, own_.begin, own_.end, own_rows, m_.stride);
      worker_.group->wait(member_);
      grad_of_first_states(s, own_rows);
      behind = own_rows;
    }
    if (first > 0) {
      for (int64_t b = 0; b < walk_.count(first); ++b) {
        copy_row(behind + b * m_.stride, own_.begin, own_.end, m_.last + (walk_.first_row + b) * m_.stride);
      }
    }
    return rows_of_block;
  }

  // c = dz U, in this worker's columns.
  void multiply_by_u(const S* dz, int64_t rows, S* c, int64_t c_stride) const {
    int64_t words_stride;
    const S* words = Terms::operand(dz, m_.stride, rows, H_, m_.words, &words_stride);
    panel_product<Terms, S>({words, words_stride, m_.u, Terms::words(H_), nullptr, 0, c, c_stride, padded<S>(H_)}, rows,
                            own_.first_panel, own_.last_panel, parts_);
  }

  // dhx = dz U for the rows that began at step s.
  void grad_of_first_states(int64_t s, const S* dz) {
    if (!p_.grad_hx) return;
    for (int64_t b = walk_.going_on(s), n; b < walk_.count(s); b += n) {
      n = smaller(kChunkRows, walk_.count(s) - b);
      multiply_by_u(dz + b * m_.stride, n, m_.rows, m_.x_stride);
      for (int64_t i = 0; i < n; ++i) {
        store_row(m_.rows + i * m_.x_stride, H_, own_.begin, own_.end,
                  p_.grad_hx + p_.steps.place(walk_.first_row + b + i) * H_);
      }
    }
  }

  void pack_strips(int64_t rows) {
    if (!m_.wants_weights(p_)) return;
    const Share share = share_of(m_.strips, worker_.thread, threads_);
    for (int64_t i = share.begin; i < share.end; ++i) {
      Terms::pack_strip(m_.dz + i * kStrip, m_.stride, rows, m_.strip + i * kStrip * Terms::words(rows));
    }
  }

  // dX: a thread's part of the block's rows.
  void grad_inputs(int64_t first, int64_t end) {
    if (!p_.grad_input.data) return;
    int64_t rows = 0;
    for (int64_t s = first; s < end; ++s) rows += whole_.count(s);
    const Share share = share_of(rows, worker_.thread, threads_);
    int64_t s = first, b = share.begin;
    while (s < end && b >= whole_.count(s)) b -= whole_.count(s++);
    for (int64_t row = share.begin, n; row < share.end; row += n) {
      n = smaller(kChunkRows, share.end - row);
      int64_t words_stride;
      const S* words = Terms::operand(m_.dz + row * m_.stride, m_.stride, n, H_, m_.words, &words_stride);
      panel_product<Terms, S>(
          {words, words_stride, m_.w, Terms::words(H_), nullptr, 0, m_.rows, m_.x_stride, padded<S>(I_)}, n, 0,
          panel_count<S>(I_), Parts::kOne);
      for (int64_t i = 0; i < n; ++i) {
        while (b == whole_.count(s)) ++s, b = 0;
        store_row(m_.rows + i * m_.x_stride, I_, 0, padded<S>(I_), p_.grad_input.at(p_.steps, whole_.time(s), b++));
      }
    }
  }

  void grad_bias(int64_t first, int64_t end, int64_t rows) {
    if (!p_.grad_bias) return;
    const Share share = share_of(padded<S>(H_) / kLanes, worker_.thread, threads_);
    for (int64_t v = share.begin; v < share.end; ++v) {
      const S* dz = m_.dz + v * kLanes;
      typename Vec::V sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) {
        UNROLL for (int i = 0; i < 4; ++i) sums[i] += Vec::load(dz + (r + i) * m_.stride);
      }
      for (; r < rows; ++r) sums[0] += Vec::load(dz + r * m_.stride);
      S* const db = m_.db + v * kLanes;
      typename Vec::V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      if (end < p_.steps.steps) sum += Vec::load(db);
      Vec::store(db, sum);
      if (first == 0) store_row(m_.db, H_, v * kLanes, (v + 1) * kLanes, p_.grad_bias);
    }
  }

  // The block's rows of X, or of H one step before, from a column on of which there are n: in a panel.
  template <typename RowOf>
  void load_panel(int64_t first, int64_t end, int64_t n, int vectors, int64_t col_stride, const RowOf& row_of) {
    typename Terms::PanelWriter writer(m_.panel, n, vectors, col_stride);
    for (int64_t s = first; s < end; ++s) {
      for (int64_t b = 0; b < whole_.count(s); ++b) writer.add(row_of(s, b));
    }
    writer.finish();
  }

  // The terms of dW and dU: a thread's part of their tiles, which are strips of panels of one or two vectors.
  void grad_weights(int64_t first, int64_t end, int64_t rows) {
    const int64_t of_input = p_.grad_weight_ih ? panel_count<S>(I_) : 0;
    const int64_t panels = of_input + (p_.grad_weight_hh ? panel_count<S>(H_) : 0);
    const auto vectors_of = [&](int64_t i) {
      return i < of_input ? panel_vectors<S>(I_, i) : panel_vectors<S>(H_, i - of_input);
    };
    int64_t vectors_of_all = 0;
    for (int64_t i = 0; i < panels; ++i) vectors_of_all += vectors_of(i);
    const Share share = share_of(vectors_of_all * m_.strips, worker_.thread, threads_);
    int64_t before = 0;
    for (int64_t i = 0; i < panels; ++i) {
      const int vectors = vectors_of(i);
      const auto strip_at = [&](int64_t place) {
        return place <= before ? 0 : smaller((place - before + vectors - 1) / vectors, m_.strips);
      };
      const Share strips = {strip_at(share.begin), strip_at(share.end)};
      before += vectors * m_.strips;
      if (strips.begin == strips.end) continue;
      if (i < of_input) {
        const int64_t col = i * kWidth;
        load_panel(first, end, I_ - col, vectors, p_.input.col_stride, [&](int64_t s, int64_t b) {
          return p_.input.at(p_.steps, whole_.time(s), b) + col * p_.input.col_stride;
        });
        weights_panel(m_.dw, p_.grad_weight_ih, I_, col, vectors, strips, first, end, rows);
      } else {
        const int64_t col = (i - of_input) * kWidth;
        load_panel(first, end, H_ - col, vectors, 1, [&](int64_t s, int64_t b) -> const T* {
          if (b < whole_.going_on(s)) return p_.output.at(p_.steps, whole_.time(s - 1), b) + col;
          return p_.hx.data ? p_.hx.data + p_.steps.place(b) * p_.hx.row_stride + col : nullptr;
        });
        weights_panel(m_.du, p_.grad_weight_hh, H_, col, vectors, strips, first, end, rows);
      }
    }
  }

  void weights_panel(S* sums, T* gradient, int64_t size, int64_t col, int vectors, const Share& strips, int64_t first,
                     int64_t end, int64_t rows) {
    const int64_t words = Terms::words(rows);
    for (int64_t i = strips.begin; i < strips.end; ++i) {
      const int64_t row = i * kStrip;
      const S* strip = m_.strip + row * words;
      WeightsTile<T> to = {.sums = sums + row * padded<S>(size) + col,
                           .sums_stride = padded<S>(size),
                           .first = end == p_.steps.steps,
                           .last = first == 0,
                           .gradient = gradient + row * size + col,
                           .stride = size,
                           .rows = H_ - row,
                           .cols = size - col};
      if constexpr (sizeof(T) == sizeof(S)) {
        to.sums = to.gradient;
        to.sums_stride = size;
      }
      vectors == 2 ? weights_tile<Terms, 2>(strip, m_.panel, words, to)
                   : weights_tile<Terms, 1>(strip, m_.panel, words, to);
    }
  }

  const LayerBackwardParams<T>& p_;
  const Division& division_;
  const Worker& worker_;
  const int64_t I_ = p_.weights.input_size, H_ = p_.weights.hidden_size;
  const int threads_ = division_.threads();
  const int member_;
  const BackwardMemory<T, Terms> m_;
  const Walk whole_, walk_;  // of the whole batch, and of the group's rows
  const Columns<S> own_;
  const Parts parts_ = parts_for(p_.steps.batch);
};

template <typename T, typename Terms>
void layer_backward(const LayerBackward<T>& job, const Worker& worker) {
  Memory<acc_t<T>> memory(job.memory);
  LayerBackwardPass<T, Terms>(job, worker, memory).run();
}

template <typename T, typename Terms>
constexpr LayerKernels<T> layer_kernels() {
  return {&memory_of<ForwardMemory<T, Terms>, LayerForwardParams<T>>, &layer_forward<T, Terms>,
          &memory_of<BackwardMemory<T, Terms>, LayerBackwardParams<T>>, &layer_backward<T, Terms>};
}
