// What every block builds on: the vector that a type is computed in, and the thread's memory.
#pragma once

template <typename T>
struct VecOf {
  using type = VecF32;
};
template <>
struct VecOf<double> {
  using type = VecF64;
};

// A kernel's blocks in the thread's memory. Of one kernel at a time: they don't nest.
template <typename Buffers>
INLINE Buffers& scratch() {
  static_assert(sizeof(Buffers) <= kScratchBytes);
  return *static_cast<Buffers*>(scratch_memory());
}

// Whether all of a row's last vector is there.
enum class Edge { kWhole, kPartial };

constexpr int kMaxChunk = 256;  // columns of z that are computed before they are activated

constexpr int smaller_int(int a, int b) { return a < b ? a : b; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
