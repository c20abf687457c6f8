// Where the lines of a matrix start in memory.
#pragma once
#include <cstdint>

namespace rnn_ext {

// Whether all lines, `stride` elements apart, start at multiples of `bytes`, a power of two.
template <typename T>
bool lines_are_aligned(const T* data, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride * int64_t{sizeof(T)} % bytes == 0;
}

}  // namespace rnn_ext
