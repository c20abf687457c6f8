// What both directions share: the walk through the steps, rows between the data's type and the accumulation type, and a
// thread's share of each kind of work.
#pragma once

constexpr int64_t kChunkRows = 96;  // of a product with X or dZ: they stay in the L2 cache

// How many times the data's own memory it takes as it is multiplied.
template <typename T, typename Terms>
constexpr int64_t kExpansion = sizeof(acc_t<T>) / (Terms::kTerms * sizeof(T));

// From 0 to size in equal shares.
struct Share {
  int64_t begin, end;
};
INLINE Share share_of(int64_t size, int64_t index, int64_t count) {
  return {size * index / count, size * (index + 1) / count};
}

// The steps in the order of the recurrence, as a group's rows have them: its own rows are counted from 0.
struct Walk {
  const Steps& steps;
  bool reverse;
  int64_t first_row, rows;

  int64_t time(int64_t s) const { return reverse ? steps.steps - 1 - s : s; }
  // The rows that step s has: none before the first step, nor after the last.
  int64_t count(int64_t s) const {
    if (s < 0 || s >= steps.steps) return 0;
    const int64_t n = steps.count(time(s)) - first_row;
    return n < 0 ? 0 : smaller(n, rows);
  }
  // Of these, those that the step before has, too; the others begin with hx.
  int64_t going_on(int64_t s) const { return smaller(count(s - 1), count(s)); }
};

// The distance of the walk's rows, if they lie one after another in its order; else 0.
template <typename T>
int64_t distance_of_rows(const Rows<const T>& rows, const Walk& walk) {
  const Steps& steps = walk.steps;
  if (walk.reverse || rows.col_stride != 1 || walk.rows != steps.batch) return 0;
  if (steps.begins) return rows.row_stride;
  if (steps.counts) return 0;
  if (steps.batch == 1) return rows.step_stride;
  return rows.step_stride == steps.batch * rows.row_stride ? rows.row_stride : 0;
}

// Rows of so many terms, so far apart, as words where they lie; null if they are not such.
template <typename Terms, typename T>
const acc_t<T>* words_in_place(const T* rows, int64_t terms, int64_t distance) {
  if constexpr (sizeof(T) == sizeof(typename Terms::Element)) {
    if ((terms | distance) % Terms::kTerms != 0) return nullptr;
    if (reinterpret_cast<uintptr_t>(rows) % sizeof(acc_t<T>) != 0) return nullptr;
    return reinterpret_cast<const acc_t<T>*>(rows);
  }
  return nullptr;
}

// The part of a worker's columns of a row, as panels and as elements.
template <typename S>
struct Columns {
  int64_t first_panel, last_panel;
  int64_t begin, end;  // elements, padded ones included

  Columns(int64_t cols, int64_t member, int64_t members) {
    const Share share = share_of(panel_count<S>(cols), member, members);
    first_panel = share.begin;
    last_panel = share.end;
    begin = smaller(share.begin * PanelsOf<S>::kWidth, padded<S>(cols));
    end = smaller(share.end * PanelsOf<S>::kWidth, padded<S>(cols));
  }
};

// to = the elements [begin, end) of a row of `size`, with zeros for what is padding.
template <typename T>
INLINE void load_row(const T* from, int64_t stride, int64_t size, int64_t begin, int64_t end, acc_t<T>* to) {
  using Vec = typename VecOf<T>::type;
  for (int64_t j = begin; j < end; j += Vec::kLanes) {
    Vec::store(to + j, load_strided<Vec>(from + j * stride, stride, size - j));
  }
}

template <typename T>
INLINE void store_row(const acc_t<T>* from, int64_t size, int64_t begin, int64_t end, T* to) {
  using Vec = typename VecOf<T>::type;
  for (int64_t j = begin; j < end; j += Vec::kLanes) {
    if (size - j >= Vec::kLanes) {
      Vec::store(to + j, Vec::load(from + j));
    } else {
      Vec::store(to + j, Vec::load(from + j), size - j);
    }
  }
}

template <typename S>
INLINE void copy_row(const S* from, int64_t begin, int64_t end, S* to) {
  using Vec = typename PanelsOf<S>::Vec;
  for (int64_t j = begin; j < end; j += Vec::kLanes) Vec::store(to + j, Vec::load(from + j));
}

// Stores the vector, n of its elements if it has more; returns it as it was rounded.
template <typename Vec, typename T>
INLINE typename Vec::V store_rounded(T* to, typename Vec::V v, int64_t n) {
  if (n >= Vec::kLanes) {
    Vec::store(to, v);
    if constexpr (sizeof(T) != sizeof(acc_t<T>)) v = Vec::load(to);
  } else {
    Vec::store(to, v, n);
    if constexpr (sizeof(T) != sizeof(acc_t<T>)) v = Vec::load(to, n);
  }
  return v;
}

// Rows of a (B, N) matrix in the data's order, or zeros for an absent one: as words.
template <typename Terms, typename T>
void load_matrix(const Matrix<T>& m, const Steps& steps, int64_t first_row, int64_t rows, int64_t size, int64_t begin,
                 int64_t end, acc_t<T>* to, int64_t to_stride) {
  for (int64_t b = 0; b < rows; ++b, to += to_stride) {
    auto* const row = Terms::elements(to);
    if (m.data) {
      load_row(m.data + steps.place(first_row + b) * m.row_stride, m.col_stride, size, begin, end, row);
    } else {
      for (int64_t j = begin; j < end; ++j) row[j] = 0;
    }
  }
}

// One block of memory, dealt out in lines of the cache. Without memory it counts what is needed.
template <typename S>
class Memory {
 public:
  explicit Memory(S* begin) : begin_(begin) {}
  S* take(int64_t size) {
    constexpr int64_t kLine = 64 / sizeof(S);
    S* const taken = begin_ ? begin_ + used_ : nullptr;
    used_ += (size + kLine - 1) / kLine * kLine;
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  S* begin_;
  int64_t used_ = 0;
};

// The elements that a layout of such a block takes in all.
template <typename Layout, typename Job>
int64_t memory_of(const Job& job) {
  Memory<typename Layout::S> memory(nullptr);
  const Layout counted(job, 0, memory);
  return memory.used();
}
