// dz_t = (dy_t + dz_{t+1} U) · f'(h_t), from the last step to the first, block by block of steps; then what follows
// from a block of dz, while it is in the cache: dX = dZ W, and its terms of dW = dZᵀ X, dU = dZᵀ H_{t-1}, db = Σ dZ.
//
// A block's rows of dz follow one another without gaps, step by step: those of all groups, since the terms of a sum
// must not depend on the division.
//
// Where the weights are large and the steps few, that would take much more memory than the gradients themselves: U and
// W packed, and the sums of dW and dU. There dz is kept for all steps, in the data's type, and the gradients are formed
// after the last step: U is packed no more when memory for dW and dU is taken, which are written once, and W is packed
// a panel at a time.
#pragma once

template <typename T, typename Terms>
struct BackwardMemory {
  using S = acc_t<T>;
  static constexpr int kStrip = PanelsOf<S>::kRows;  // rows of dW that a tile computes
  static constexpr int64_t kRowsOfInputs = 48;       // of dX for which a panel of W is packed

  int64_t stride, dz_stride, x_stride, strips, strips_at_once;
  S* u;
  S* grad_h_n;  // (B)
  S* dh;        // (B): a step's, where dz is kept as pairs; null where it is in dz's place
  S* dz[2];     // of this block and the one behind it, or of this step and the one behind it
  S* strip;     // dz in strips of kStrip columns; null where it is multiplied in its place
  S *dw, *du;   // (H, I) and (H, H), padded
  S* db;
  S* panel;  // a thread's: a panel of X or H
  S* w;      // all panels of W, or a thread's: one
  S* rows;   // a thread's chunk of rows
  S* chunk;  // the same, of dz where that is kept for all steps
  int64_t chunk_stride;

  BackwardMemory(const LayerBackward<T>& job, int thread, Memory<S>& memory) {
    const LayerBackwardParams<T>& p = job.p;
    constexpr int kWidth = PanelsOf<S>::kWidth;
    const int64_t I = p.weights.input_size, H = p.weights.hidden_size, B = p.steps.batch;
    const int64_t rows_of_block = B * job.division.steps_per_block, words_of_block = Terms::words(rows_of_block);
    const bool all = job.part == BackwardPart::kAll, blocks = p.steps.steps > job.division.steps_per_block;
    const bool steps = all || job.part == BackwardPart::kSteps, inputs = all || job.part == BackwardPart::kInputs;
    const bool weights = wants_weights(p) && (all || job.part == BackwardPart::kWeights);
    const int64_t threads = job.division.threads();
    const auto of_thread = [&](int64_t size) { return memory.take(size * threads) + size * thread; };
    stride = padded_stride<S>(H);
    dz_stride = Terms::words_stride(H);
    x_stride = padded_stride<S>(I > H ? I : H);
    strips = (H + kStrip - 1) / kStrip;
    // Strips that are there at a time: all, but where they would take more than dz itself does.
    strips_at_once = all ? strips : (strips + kExpansion<T, Terms> - 1) / kExpansion<T, Terms>;
    const auto of_copy = [&](int64_t size) {
      return memory.take(size * job.division.copies()) + size * (thread / job.division.packers());
    };
    u = of_copy(steps ? panels_size<S>(H, Terms::words(H)) : 0);
    grad_h_n = memory.take(steps ? B * stride : 0);
    constexpr bool kPairs = Terms::kTerms > 1;
    dh = steps && kPairs ? memory.take(B * stride) : nullptr;
    // A block's is read in whole vectors, whatever their place.
    const int64_t dz_size = all ? rows_of_block * dz_stride + kWidth : steps ? B * dz_stride : 0;
    dz[0] = memory.take(dz_size);
    dz[1] = memory.take(all && !blocks ? 0 : dz_size);
    strip = weights && (kPairs || !all) ? memory.take(strips_at_once * kStrip * words_of_block + kWidth) : nullptr;
    const bool sums = all && blocks && sizeof(T) != sizeof(S);
    dw = memory.take(p.grad_weight_ih && sums ? H * padded<S>(I) : 0);
    du = memory.take(p.grad_weight_hh && sums ? H * padded<S>(H) : 0);
    db = memory.take(p.grad_bias ? panel_count<S>(H) * kWidth : 0);
    panel = of_thread(weights ? words_of_block * kWidth : 0);
    w = inputs && p.grad_input.data
            ? all ? of_copy(panels_size<S>(I, Terms::words(H))) : of_thread(kWidth * Terms::words(H))
            : nullptr;
    if (job.part == BackwardPart::kWeights) {
      chunk_stride = kWidth;
      chunk = of_thread(kChunkRows * chunk_stride);
      return;
    }
    const int64_t most_rows = steps ? kChunkRows : smaller(kRowsOfInputs, (rows_of_block + threads - 1) / threads);
    rows = of_thread(most_rows * x_stride);
    chunk_stride = dz_stride;
    chunk = steps ? nullptr : of_thread(most_rows * chunk_stride);
  }

  static bool wants_weights(const LayerBackwardParams<T>& p) { return p.grad_weight_ih || p.grad_weight_hh; }
};

// dz = (dy + dh) · f'(h), perhaps in place of dh, for a step's rows of a group. What the next step reads of dy and h
// comes from afar, and is on its way while dh is computed.
template <Nonlinearity kind, typename Terms, typename T>
void grad_z_step(const LayerBackwardParams<T>& p, const Walk& walk, int64_t s, int64_t begin, int64_t end,
                 const acc_t<T>* dh, int64_t dh_stride, acc_t<T>* dz, int64_t dz_stride) {
  using Vec = typename VecOf<T>::type;
  const int64_t H = p.weights.hidden_size, rows = walk.count(s), t = walk.time(s), next = walk.time(s > 0 ? s - 1 : s);
  for (int64_t b = 0; b < rows; ++b) {
    const auto at = [&](const Rows<const T>& all, int64_t time) {
      return all.data ? all.at(p.steps, time, walk.first_row + b) : nullptr;
    };
    const T *const output = at(p.output, t), *const next_output = at(p.output, next);
    const T *const grad_output = at(p.grad_output, t), *const next_grad_output = at(p.grad_output, next);
    const acc_t<T>* const row = dh + b * dh_stride;
    auto* const kept = Terms::elements(dz + b * dz_stride);
    for (int64_t j = begin; j < end; j += Vec::kLanes) {
      const int64_t n = H - j;
      typename Vec::V grad = Vec::load(row + j);
      __builtin_prefetch(next_output + j);
      if (grad_output) {
        __builtin_prefetch(next_grad_output + j * p.grad_output.col_stride);
        grad += load_strided<Vec>(grad_output + j * p.grad_output.col_stride, p.grad_output.col_stride, n);
      }
      const typename Vec::V h = n >= Vec::kLanes ? Vec::load(output + j) : Vec::load(output + j, n);
      Terms::keep(kept + j, activation_grad<kind, Vec>(grad, h), n);
    }
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

// Rows of an operand of the weights' gradients: packed, or in their place.
template <typename S>
struct WeightsOperand {
  const S* data;
  int64_t stride;

  WeightsOperand from(int64_t row) const { return {data + row * stride, stride}; }
};

// The tile of Σ_r strip[r, i] · panel[r, :].
template <typename Terms, int NV, typename T, typename S>
__attribute__((noinline)) void weights_tile(const WeightsOperand<S>& strips, const WeightsOperand<S>& panels,
                                            int64_t words, const WeightsTile<T>& to) {
  using Vec = typename PanelsOf<S>::Vec;
  using V = typename Vec::V;
  constexpr int kStrip = PanelsOf<S>::kRows, kLanes = PanelsOf<S>::kLanes;
  const S *strip = strips.data, *panel = panels.data;
  const int64_t strip_stride = strips.stride, panel_stride = panels.stride;
  V acc[kStrip][NV];
  UNROLL for (int i = 0; i < kStrip; ++i) { UNROLL for (int j = 0; j < NV; ++j) acc[i][j] = Vec::zero(); }
  for (int64_t r = 0; r < words; ++r, strip += strip_stride, panel += panel_stride) {
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
  static constexpr int64_t kWeightsRun = 256;  // terms of dW that are summed in registers

 public:
  LayerBackwardPass(const LayerBackward<T>& job, const Worker& worker, Memory<S>& memory)
      : p_(job.p),
        division_(job.division),
        part_(job.part),
        kept_dz_(job.dz),
        worker_(worker),
        member_(worker.thread % division_.members),
        m_(job, worker.thread, memory),
        whole_{p_.steps, p_.reverse, 0, p_.steps.batch},
        walk_{
            p_.steps, p_.reverse, division_.rows[worker.thread / division_.members],
            division_.rows[worker.thread / division_.members + 1] - division_.rows[worker.thread / division_.members]},
        own_(H_, member_, division_.members) {}

  void run() {
    if (part_ == BackwardPart::kWeights) return grad_all_weights();
    if (part_ == BackwardPart::kInputs) return grad_all_inputs();
    prepare();
    worker_.wait_for_weights(division_);
    if (part_ == BackwardPart::kSteps) {
      walk_back(0, p_.steps.steps);
      return;
    }
    // What follows from a block's dz is not waited for: another thread may be at it while this one walks on, and a
    // block's dz therefore stays until all have walked through the next.
    for (int64_t end = p_.steps.steps; end > 0; end -= division_.steps_per_block) {
      const int64_t first = end > division_.steps_per_block ? end - division_.steps_per_block : 0;
      const int64_t rows = walk_back(first, end);
      worker_.all->wait(worker_.thread);
      pack_strips(rows);
      grad_inputs(first, end);
      grad_bias(first, end, rows);
      if (m_.strip) worker_.all->wait(worker_.thread);
      grad_weights(first, end, rows, {0, m_.strips});
    }
  }

 private:
  void grad_all_weights() {
    const int64_t steps = p_.steps.steps, rows = rows_of(0, steps);
    grad_bias_of_kept(rows);
    for (int64_t begin = 0, end; m_.wants_weights(p_) && begin < m_.strips; begin = end) {
      end = smaller(begin + m_.strips_at_once, m_.strips);
      const Share share = share_of(end - begin, worker_.thread, threads_);
      for (int64_t i = share.begin; i < share.end; ++i) {
        S* const strip = m_.strip + i * kStrip * Terms::words(rows);
        load_dz(0, rows, (begin + i) * kStrip, kStrip, kChunkRows, [&](int64_t row, int64_t n, int64_t, int64_t) {
          Terms::pack_strip(m_.chunk, m_.chunk_stride, n, strip + Terms::words(row) * kStrip);
        });
      }
      worker_.all->wait(worker_.thread);
      grad_weights(0, steps, rows, {begin, end});
      worker_.all->wait(worker_.thread);
    }
  }

  // dX, perhaps in place of dz.
  void grad_all_inputs() {
    const Matrix<T>& W = p_.weights.weight_ih;
    const Share share = share_of(rows_of(0, p_.steps.steps), worker_.thread, threads_);
    load_dz(share.begin, share.end, 0, H_, m_.kRowsOfInputs, [&](int64_t, int64_t n, int64_t s, int64_t b) {
      for (int64_t col = 0; col < I_; col += kWidth) {
        Terms::pack(W.data + col * W.col_stride, W.row_stride, W.col_stride, H_, I_ - col, 0, 1, m_.w);
        panel_product<Terms, S>({m_.chunk, m_.chunk_stride, m_.w, Terms::words(H_), nullptr, 0, m_.rows + col,
                                 m_.x_stride, padded<S>(I_ - col)},
                                n, 0, 1, Parts::kOne);
      }
      store_grad_inputs(n, s, b);
    });
  }

  int64_t rows_of(int64_t first, int64_t end) const {
    int64_t rows = 0;
    for (int64_t s = first; s < end; ++s) rows += whole_.count(s);
    return rows;
  }

  // The columns from `col` on, of which `cols` are wanted, of these of all rows of dz, a chunk at a time:
  // f(the first row, how many, its step and row of the batch).
  template <typename F>
  void load_dz(int64_t begin, int64_t end, int64_t col, int64_t cols, int64_t most_rows, const F& f) {
    const int64_t size = H_ - col, padded_size = padded<S>(smaller(size, cols));
    int64_t s = 0, b = begin;
    while (s < p_.steps.steps && b >= whole_.count(s)) b -= whole_.count(s++);
    for (int64_t row = begin, n; row < end; row += n) {
      n = smaller(most_rows, end - row);
      const int64_t first_step = s, first_row = b;
      for (int64_t i = 0; i < n; ++i) {
        while (b == whole_.count(s)) ++s, b = 0;
        const T* const from = kept_dz_.at(p_.steps, whole_.time(s), b++) + col;
        load_row(from, 1, size, 0, padded_size, Terms::elements(m_.chunk + i * m_.chunk_stride));
      }
      f(row, n, first_step, first_row);
    }
  }

  // This worker's part of the packed weights, and grad_h_n.
  void prepare() {
    const Matrix<T>& W = p_.weights.weight_ih;
    const Matrix<T>& U = p_.weights.weight_hh;
    const int packers = division_.packers(), packer = worker_.thread % packers;
    const Columns<S> hidden(H_, packer, packers), input(I_, packer, packers);
    Terms::pack(U.data, U.row_stride, U.col_stride, H_, H_, hidden.first_panel, hidden.last_panel, m_.u);
    if (m_.w) {
      Terms::pack(W.data, W.row_stride, W.col_stride, H_, I_, input.first_panel, input.last_panel, m_.w);
    }
    load_matrix<Singles<T>>(p_.grad_h_n, p_.steps, walk_.first_row, walk_.rows, H_, own_.begin, own_.end,
                            m_.grad_h_n + walk_.first_row * m_.stride, m_.stride);
  }

  // dz of the steps from `end` back to `first`. Returns how many rows they have in all.
  int64_t walk_back(int64_t first, int64_t end) {
    const bool keep = part_ == BackwardPart::kSteps;
    const int64_t rows_of_block = rows_of(first, end);
    dz_ = dz_ == m_.dz[0] ? m_.dz[1] : m_.dz[0];
    S* dz = dz_ + rows_of_block * m_.dz_stride;
    for (int64_t s = end - 1; s >= first; --s) {
      if (keep) {
        dz = m_.dz[s % 2];
      } else {
        dz -= whole_.count(s) * m_.dz_stride;
      }
      S* const own_rows = dz + walk_.first_row * m_.dz_stride;
      S* const dh = m_.dh ? m_.dh + walk_.first_row * m_.stride : own_rows;
      const int64_t rows = walk_.count(s), going_on = walk_.going_on(s + 1);
      const S* const grad_h_n = m_.grad_h_n + walk_.first_row * m_.stride;
      multiply_by_u(behind_, going_on, dh, m_.stride);
      for (int64_t b = going_on; b < rows; ++b) {
        copy_row(grad_h_n + b * m_.stride, own_.begin, own_.end, dh + b * m_.stride);
      }
      with_kind(p_.weights.nonlinearity, [&](auto kind) {
        grad_z_step<kind.value, Terms>(p_, walk_, s, own_.begin, own_.end, dh, m_.stride, own_rows, m_.dz_stride);
      });
      for (int64_t b = 0; keep && b < rows; ++b) {
        store_row(Terms::elements(own_rows + b * m_.dz_stride), H_, own_.begin, own_.end,
                  kept_dz_.at(p_.steps, whole_.time(s), walk_.first_row + b));
      }
      worker_.group->wait(member_);
      grad_of_first_states(s, own_rows);
      behind_ = own_rows;
    }
    return rows_of_block;
  }

  // c = dz U, in this worker's columns.
  void multiply_by_u(const S* dz, int64_t rows, S* c, int64_t c_stride) const {
    panel_product<Terms, S>({dz, m_.dz_stride, m_.u, Terms::words(H_), nullptr, 0, c, c_stride, padded<S>(H_)}, rows,
                            own_.first_panel, own_.last_panel, parts_);
  }

  // dhx = dz U for the rows that began at step s.
  void grad_of_first_states(int64_t s, const S* dz) {
    if (!p_.grad_hx) return;
    for (int64_t b = walk_.going_on(s), n; b < walk_.count(s); b += n) {
      n = smaller(kChunkRows, walk_.count(s) - b);
      multiply_by_u(dz + b * m_.dz_stride, n, m_.rows, m_.x_stride);
      for (int64_t i = 0; i < n; ++i) {
        store_row(m_.rows + i * m_.x_stride, H_, own_.begin, own_.end,
                  p_.grad_hx + p_.steps.place(walk_.first_row + b + i) * H_);
      }
    }
  }

  void pack_strips(int64_t rows) {
    if (m_.strip == nullptr) return;
    const Share share = share_of(m_.strips, worker_.thread, threads_);
    for (int64_t i = share.begin; i < share.end; ++i) {
      Terms::pack_strip(dz_ + i * kStrip / Terms::kTerms, m_.dz_stride, rows,
                        m_.strip + i * kStrip * Terms::words(rows));
    }
  }

  // dX: a thread's part of the block's rows.
  void grad_inputs(int64_t first, int64_t end) {
    if (!p_.grad_input.data) return;
    const Share share = share_of(rows_of(first, end), worker_.thread, threads_);
    int64_t s = first, b = share.begin;
    while (s < end && b >= whole_.count(s)) b -= whole_.count(s++);
    for (int64_t row = share.begin, n; row < share.end; row += n) {
      n = smaller(kChunkRows, share.end - row);
      panel_product<Terms, S>({dz_ + row * m_.dz_stride, m_.dz_stride, m_.w, Terms::words(H_), nullptr, 0, m_.rows,
                               m_.x_stride, padded<S>(I_)},
                              n, 0, panel_count<S>(I_), Parts::kOne);
      store_grad_inputs(n, s, b);
    }
  }

  // m_.rows, which are the n from (s, b) on; moves (s, b) behind them.
  void store_grad_inputs(int64_t n, int64_t& s, int64_t& b) const {
    for (int64_t i = 0; i < n; ++i) {
      while (b == whole_.count(s)) ++s, b = 0;
      store_row(m_.rows + i * m_.x_stride, I_, 0, padded<S>(I_), p_.grad_input.at(p_.steps, whole_.time(s), b++));
    }
  }

  void grad_bias(int64_t first, int64_t end, int64_t rows) {
    if (!p_.grad_bias) return;
    const Share share = share_of(padded<S>(H_) / kLanes, worker_.thread, threads_);
    for (int64_t v = share.begin; v < share.end; ++v) {
      add_up(dz_ + v * kLanes / Terms::kTerms, m_.dz_stride, rows, end == p_.steps.steps, m_.db + v * kLanes);
      if (first == 0) store_row(m_.db, H_, v * kLanes, (v + 1) * kLanes, p_.grad_bias);
    }
  }

  void grad_bias_of_kept(int64_t rows) {
    if (!p_.grad_bias) return;
    const Share share = share_of(padded<S>(H_) / kLanes, worker_.thread, threads_);
    for (int64_t v = share.begin; v < share.end; ++v) {
      load_dz(0, rows, v * kLanes, kLanes, kChunkRows, [&](int64_t row, int64_t n, int64_t, int64_t) {
        add_up(m_.chunk, m_.chunk_stride, n, row == 0, m_.db + v * kLanes);
      });
      store_row(m_.db, H_, v * kLanes, (v + 1) * kLanes, p_.grad_bias);
    }
  }

  // One vector's sums over so many rows.
  static void add_up(const S* dz, int64_t stride, int64_t rows, bool first, S* db) {
    typename Vec::V sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      UNROLL for (int i = 0; i < 4; ++i) sums[i] += Vec::load(Terms::elements(dz + (r + i) * stride));
    }
    for (; r < rows; ++r) sums[0] += Vec::load(Terms::elements(dz + r * stride));
    const typename Vec::V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    Vec::store(db, first ? sum : Vec::load(db) + sum);
  }

  // The block's rows of X, or of H one step before, from a column on of which there are n: in a panel.
  template <typename RowOf>
  WeightsOperand<S> packed_panel(int64_t first, int64_t end, int64_t n, int vectors, int64_t col_stride,
                                 const RowOf& row_of) {
    typename Terms::PanelWriter writer(m_.panel, n, vectors, col_stride);
    for (int64_t s = first; s < end; ++s) {
      for (int64_t b = 0; b < whole_.count(s); ++b) writer.add(row_of(s, b));
    }
    writer.finish();
    return {m_.panel, vectors * kLanes};
  }

  // The same where it lies, if its rows from step s on are one distance apart, all of its vectors are there, and it is
  // of the type that is multiplied; else null. Of a block of steps alone: rows of all steps would leave the caches.
  WeightsOperand<S> panel_in_place(const Rows<const T>& from, int64_t s, int64_t col, int64_t n, int vectors) const {
    if constexpr (sizeof(T) == sizeof(S)) {
      const int64_t distance = part_ == BackwardPart::kAll && s >= 0 ? distance_of_rows(from, whole_) : 0;
      if (distance > 0 && n >= vectors * kLanes) return {from.at(p_.steps, s, 0) + col, distance};
    }
    return {nullptr, 0};
  }

  // The terms of dW and dU from these strips: a thread's part of their tiles, which are strips of panels of one or two
  // vectors.
  void grad_weights(int64_t first, int64_t end, int64_t rows, const Share& of_dz) {
    const int64_t count = of_dz.end - of_dz.begin;
    const int64_t of_input = p_.grad_weight_ih ? panel_count<S>(I_) : 0;
    const int64_t panels = of_input + (p_.grad_weight_hh ? panel_count<S>(H_) : 0);
    const auto vectors_of = [&](int64_t i) {
      return i < of_input ? panel_vectors<S>(I_, i) : panel_vectors<S>(H_, i - of_input);
    };
    int64_t vectors_of_all = 0;
    for (int64_t i = 0; i < panels; ++i) vectors_of_all += vectors_of(i);
    const Share share = share_of(vectors_of_all * count, worker_.thread, threads_);
    int64_t before = 0;
    for (int64_t i = 0; i < panels; ++i) {
      const int vectors = vectors_of(i);
      const auto strip_at = [&](int64_t place) {
        return place <= before ? 0 : smaller((place - before + vectors - 1) / vectors, count);
      };
      const Share strips = {strip_at(share.begin), strip_at(share.end)};
      before += vectors * count;
      if (strips.begin == strips.end) continue;
      if (i < of_input) {
        const int64_t col = i * kWidth;
        WeightsOperand<S> panel = panel_in_place(p_.input, first, col, I_ - col, vectors);
        if (panel.data == nullptr) {
          panel = packed_panel(first, end, I_ - col, vectors, p_.input.col_stride, [&](int64_t s, int64_t b) {
            return p_.input.at(p_.steps, whole_.time(s), b) + col * p_.input.col_stride;
          });
        }
        weights_panel(panel, m_.dw, p_.grad_weight_ih, I_, col, vectors, of_dz.begin, strips, first, end, rows);
      } else {
        const int64_t col = (i - of_input) * kWidth;
        WeightsOperand<S> panel = {nullptr, 0};
        if (!p_.steps.counts) panel = panel_in_place(p_.output, first - 1, col, H_ - col, vectors);
        if (panel.data == nullptr) {
          panel = packed_panel(first, end, H_ - col, vectors, 1, [&](int64_t s, int64_t b) -> const T* {
            if (b < whole_.going_on(s)) return p_.output.at(p_.steps, whole_.time(s - 1), b) + col;
            return p_.hx.data ? p_.hx.data + p_.steps.place(b) * p_.hx.row_stride + col : nullptr;
          });
        }
        weights_panel(panel, m_.du, p_.grad_weight_hh, H_, col, vectors, of_dz.begin, strips, first, end, rows);
      }
    }
  }

  // Sums are formed run by run, each in registers.
  void weights_panel(const WeightsOperand<S>& panel, S* sums, T* gradient, int64_t size, int64_t col, int vectors,
                     int64_t first_strip, const Share& strips, int64_t first, int64_t end, int64_t rows) {
    const int64_t words = Terms::words(rows);
    for (int64_t i = strips.begin; i < strips.end; ++i) {
      const int64_t row = (first_strip + i) * kStrip;
      const WeightsOperand<S> strip = m_.strip ? WeightsOperand<S>{m_.strip + i * kStrip * words, kStrip}
                                               : WeightsOperand<S>{dz_ + row, m_.dz_stride};
      WeightsTile<T> to = {.sums = sums + row * padded<S>(size) + col,
                           .sums_stride = padded<S>(size),
                           .gradient = gradient + row * size + col,
                           .stride = size,
                           .rows = H_ - row,
                           .cols = size - col};
      if constexpr (sizeof(T) == sizeof(S)) {
        to.sums = to.gradient;
        to.sums_stride = size;
      }
      alignas(64) S tile[kStrip * kWidth];
      if (part_ == BackwardPart::kWeights) {
        to.sums = tile;
        to.sums_stride = kWidth;
      }
      for (int64_t begin = 0, n; begin < words; begin += n) {
        n = smaller(kWeightsRun, words - begin);
        to.first = begin == 0 && end == p_.steps.steps;
        to.last = begin + n == words && first == 0;
        vectors == 2 ? weights_tile<Terms, 2>(strip.from(begin), panel.from(begin), n, to)
                     : weights_tile<Terms, 1>(strip.from(begin), panel.from(begin), n, to);
      }
    }
  }

  const LayerBackwardParams<T>& p_;
  const Division& division_;
  const BackwardPart part_;
  const Rows<T> kept_dz_;
  const Worker& worker_;
  const int64_t I_ = p_.weights.input_size, H_ = p_.weights.hidden_size;
  const int threads_ = division_.threads();
  const int member_;
  const BackwardMemory<T, Terms> m_;
  S* dz_ = m_.dz[1];           // the block's
  const S* behind_ = nullptr;  // the group's rows of dz, of the step behind
  const Walk whole_, walk_;    // of the whole batch, and of the group's rows
  const Columns<S> own_;
  const Parts parts_ = parts_for(p_.steps.batch);
};

template <typename T, typename Terms>
void layer_backward(const LayerBackward<T>& job, const Worker& worker) {
  Memory<acc_t<T>> memory(job.memory);
  LayerBackwardPass<T, Terms>(job, worker, memory).run();
}

template <typename T, typename Terms>
LayerKernels<T> layer_kernels(int64_t /*hidden_size*/) {
  return {&memory_of<ForwardMemory<T, Terms>, LayerForward<T>>, &layer_forward<T, Terms>,
          &memory_of<BackwardMemory<T, Terms>, LayerBackward<T>>, &layer_backward<T, Terms>};
}
