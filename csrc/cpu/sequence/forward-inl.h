// h_t = f(z_t), z_t = x_t Wᵀ + b + h_{t-1} Uᵀ: the first two terms for a block of steps at once, by one product, the
// last one step by step. h_t takes the place of z_t, in the accumulation type but rounded to the data's; from there the
// next step reads it, however the output's rows lie. Where pairs are multiplied, h_t leaves z for a state of its own.
//
// So do rows shorter than a vector (narrow ones), which lie next to each other there: then f, most of such a step's
// work, is computed for several rows at once. They have no pairs.
#pragma once

template <typename S>
constexpr bool is_narrow(int64_t hidden_size) {
  return hidden_size < PanelsOf<S>::kLanes;
}

template <typename T, typename Terms>
struct ForwardMemory {
  using S = acc_t<T>;
  int64_t stride, x_stride, h_stride;
  bool narrow, in_place;  // in_place: h_t takes the place of z_t
  bool in_turn;           // W and U are packed anew for each block, into the same memory
  S *w, *u, *bias;        // of a copy
  S* begin;               // (B): hx
  S* state[2];  // a group's rows: the last step of the block before; or, not in place, of the step before and this
  S* z;         // a group's rows of a block
  S* x;         // a thread's chunk of rows

  // Of one group and thread, whose rows and chunk come after those of the others.
  ForwardMemory(const LayerForward<T>& job, int thread, Memory<S>& memory) {
    const LayerForwardParams<T>& p = job.p;
    const Division& division = job.division;
    const int64_t I = p.weights.input_size, H = p.weights.hidden_size, B = p.steps.batch;
    stride = padded_stride<S>(H);
    x_stride = Terms::words_stride(I);
    narrow = is_narrow<S>(H);
    in_place = Terms::kTerms == 1 && !narrow;
    h_stride = narrow ? H : Terms::words_stride(H);
    const int64_t first_row = division.rows[thread / division.members];
    // In 16 bits nn.RNN takes little memory. To pack pairs anew takes too long beside their products.
    const bool once = division.steps_per_block >= p.steps.steps;
    in_turn = sizeof(T) < sizeof(S) && (kExpansion<T, Terms> > 1 || once) && weights_are_large<T>(I, H);
    const auto of_copy = [&](int64_t size) {
      return memory.take(size * division.copies()) + size * (thread / division.packers());
    };
    w = of_copy(panels_size<S>(H, Terms::words(in_turn && H > I ? H : I)));
    u = in_turn ? w : of_copy(panels_size<S>(H, Terms::words(H)));
    bias = of_copy(panel_count<S>(H) * PanelsOf<S>::kWidth);
    const int64_t state_size = B * (narrow ? stride : h_stride);
    begin = memory.take(state_size) + first_row * h_stride;
    for (S*& rows : state) rows = memory.take(state_size) + first_row * h_stride;
    z = memory.take(B * division.steps_per_block * stride) + first_row * division.steps_per_block * stride;
    x = memory.take(kChunkRows * division.threads() * x_stride) + kChunkRows * thread * x_stride;
  }
};

// h = f(z) for the rows of a step, from column `begin` to `end`.
template <Nonlinearity kind, typename Terms, typename T>
void finish_step(const LayerForwardParams<T>& p, const Walk& walk, int64_t s, int64_t begin, int64_t end,
                 const acc_t<T>* z, int64_t z_stride, acc_t<T>* h, int64_t h_stride) {
  using Vec = typename VecOf<T>::type;
  const int64_t H = p.weights.hidden_size, rows = walk.count(s), t = walk.time(s);
  T* const base = p.output.data + p.steps.begin(t) * p.output.step_stride;
  for (int64_t b = 0; b < rows; ++b) {
    T* const output = base + p.steps.first(walk.first_row + b) * p.output.row_stride;
    const acc_t<T>* const row = z + b * z_stride;
    auto* const state = Terms::elements(h + b * h_stride);
    for (int64_t j = begin; j < end; j += Vec::kLanes) {
      const typename Vec::V v = activate<kind, Vec>(Vec::load(row + j));
      Terms::keep(state + j, store_rounded<Vec>(output + j, v, H - j), H - j);
    }
  }
}

// The same for narrow rows, H elements apart.
template <Nonlinearity kind, typename T>
void finish_narrow_step(const LayerForwardParams<T>& p, const Walk& walk, int64_t s, acc_t<T>* h) {
  using Vec = typename VecOf<T>::type;
  const int64_t H = p.weights.hidden_size, size = walk.count(s) * H, t = walk.time(s);
  const bool in_a_run = p.output.row_stride == H && p.steps.order == nullptr;
  T* const run = p.output.data + p.steps.begin(t) * p.output.step_stride + walk.first_row * H;
  for (int64_t j = 0; j < size; j += Vec::kLanes) {
    alignas(64) T elsewhere[Vec::kLanes];
    const typename Vec::V v = activate<kind, Vec>(Vec::load(h + j));
    Vec::store(h + j, store_rounded<Vec>(in_a_run ? run + j : elsewhere, v, size - j));
  }
  if (in_a_run) return;
  for (int64_t b = 0; b < walk.count(s); ++b) {
    Vec::store(p.output.at(p.steps, t, walk.first_row + b), Vec::load(h + b * H), H);
  }
}

// x of the rows from (s, b) on, as many as fit; moves (s, b) behind them.
template <typename Terms, typename T>
int64_t load_inputs(const LayerForwardParams<T>& p, const Walk& walk, int64_t last_step, int64_t& s, int64_t& b,
                    acc_t<T>* x, int64_t stride) {
  const int64_t I = p.weights.input_size, end = padded<acc_t<T>>(I);
  int64_t rows = 0;
  while (s < last_step && rows < kChunkRows) {
    if (b == walk.count(s)) {
      ++s, b = 0;
      continue;
    }
    const T* from = p.input.at(p.steps, walk.time(s), walk.first_row + b++);
    load_row(from, p.input.col_stride, I, 0, end, Terms::elements(x + rows++ * stride));
  }
  return rows;
}

template <typename T, typename Terms>
void layer_forward(const LayerForward<T>& job, const Worker& worker) {
  using S = acc_t<T>;
  const LayerForwardParams<T>& p = job.p;
  const Division& division = job.division;
  const int64_t I = p.weights.input_size, H = p.weights.hidden_size, T_ = p.steps.steps;
  const int group = worker.thread / division.members, member = worker.thread % division.members;
  Memory<S> memory(job.memory);
  const ForwardMemory<T, Terms> m(job, worker.thread, memory);

  const Columns<S> packed(H, worker.thread % division.packers(), division.packers());
  const Matrix<T>& W = p.weights.weight_ih;
  const Matrix<T>& U = p.weights.weight_hh;
  const auto pack_w = [&] {
    Terms::pack(W.data, W.col_stride, W.row_stride, I, H, packed.first_panel, packed.last_panel, m.w);
  };
  const auto pack_u = [&] {
    Terms::pack(U.data, U.col_stride, U.row_stride, H, H, packed.first_panel, packed.last_panel, m.u);
  };
  pack_w();
  if (!m.in_turn) pack_u();
  for (int64_t j = packed.begin; j < packed.end; ++j) {
    m.bias[j] = p.weights.bias_ih && j < H ? static_cast<S>(p.weights.bias_ih[j]) : 0;
    if (p.weights.bias_hh && j < H) m.bias[j] += static_cast<S>(p.weights.bias_hh[j]);
  }
  const Walk walk = {p.steps, p.reverse, division.rows[group], division.rows[group + 1] - division.rows[group]};
  const Columns<S> own(H, member, division.members);
  load_matrix<Terms>(p.hx, p.steps, walk.first_row, walk.rows, H, own.begin, own.end, m.begin, m.h_stride);
  worker.wait_for_weights(division);

  const Nonlinearity f = p.weights.nonlinearity;
  const Parts parts = parts_for(p.steps.batch);
  const int64_t sums_stride = m.narrow ? m.h_stride : m.stride;
  const auto multiply = [&](const S* before, const S* z, S* sums, int64_t rows) {
    panel_product<Terms, S>({before, m.h_stride, m.u, Terms::words(H), z, m.stride, sums, sums_stride, padded<S>(H)},
                            rows, own.first_panel, own.last_panel, parts);
  };
  const int64_t distance = distance_of_rows(p.input, walk);
  const S* before = m.state[0];
  for (int64_t first = 0; first < T_; first += division.steps_per_block) {
    const int64_t end = smaller(first + division.steps_per_block, T_);
    if (m.in_turn && first > 0) {
      worker.all->wait(worker.thread);
      pack_w();
      worker.all->wait(worker.thread);
    }
    S* z = m.z;
    const auto add_inputs = [&](const S* x, int64_t stride, int64_t rows) {
      panel_product<Terms, S>({x, stride, m.w, Terms::words(I), m.bias, 0, z, m.stride, padded<S>(H)}, rows,
                              own.first_panel, own.last_panel, Parts::kOne);
      z += rows * m.stride;
    };
    const S* x = distance > 0 ? words_in_place<Terms>(p.input.at(p.steps, first, 0), I, distance) : nullptr;
    if (x) {
      int64_t rows = 0;
      for (int64_t s = first; s < end; ++s) rows += walk.count(s);
      for (int64_t n; rows > 0; rows -= n, x += n * distance / Terms::kTerms) {
        n = smaller(kChunkRows, rows);
        add_inputs(x, distance / Terms::kTerms, n);
      }
    } else {
      for (int64_t s = first, b = 0; s < end;) {
        const int64_t rows = load_inputs<Terms>(p, walk, end, s, b, m.x, m.x_stride);
        add_inputs(m.x, m.x_stride, rows);
      }
    }
    if (m.in_turn) {
      worker.all->wait(worker.thread);
      pack_u();
      worker.all->wait(worker.thread);
    } else if (first > 0) {
      worker.group->wait(member);
    }
    z = m.z;
    for (int64_t s = first; s < end; ++s) {
      const int64_t rows = walk.count(s), going_on = walk.going_on(s), next = walk.count(s + 1);
      S* const h = m.in_place ? z : m.state[s % 2];
      S* const sums = m.narrow ? h : z;
      multiply(before, z, sums, going_on);
      multiply(m.begin + going_on * m.h_stride, z + going_on * m.stride, sums + going_on * sums_stride,
               rows - going_on);
      with_kind(f, [&](auto kind) {
        m.narrow ? finish_narrow_step<kind.value>(p, walk, s, h)
                 : finish_step<kind.value, Terms>(p, walk, s, own.begin, own.end, z, m.stride, h, m.h_stride);
      });
      for (int64_t b = next; b < rows; ++b) {
        const T* const last = p.output.at(p.steps, walk.time(s), walk.first_row + b);
        T* const h_n = p.h_n + p.steps.place(walk.first_row + b) * H;
        if (own.begin < H) {
          __builtin_memcpy(h_n + own.begin, last + own.begin, (smaller(own.end, H) - own.begin) * sizeof(T));
        }
      }
      worker.group->wait(member);
      before = h;
      z += rows * m.stride;
    }
    if (end < T_ && m.in_place) {  // z is about to be another block's
      for (int64_t b = 0; b < walk.count(end - 1); ++b) {
        copy_row(before + b * m.stride, own.begin, own.end, m.state[0] + b * m.stride);
      }
      before = m.state[0];
    }
  }
}
