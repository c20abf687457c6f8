// Warp-wide matrix instructions on the host: mma.sync, ldmatrix and stmatrix, with PTX's fragment layouts.
#pragma once
#include "runtime.h"
#include "traffic.h"

namespace emu {

// c += a b over one warp; a is row-major, b column-major. The product is exact and the sum rounds toward zero once an
// instruction, which is about what the units do.
void mma_m16n8k8_tf32(float* c, const uint32_t* a, const uint32_t* b, Where where);
void mma_m16n8k16_f16(float* c, const uint32_t* a, const uint32_t* b, Where where);
void mma_m16n8k16_bf16(float* c, const uint32_t* a, const uint32_t* b, Where where);
void mma_m8n8k4_f64(double* c, const double* a, const double* b, Where where);

// Fills `rows` with the row address that each lane gave.
void exchange_rows(const void* row, const void* (&rows)[32], Where where);

// Loads `count` 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i. Every lane reads
// what it will hold itself: then a missing barrier between a store and this load is a race between those two lanes.
template <int count, bool transposed>
void ldmatrix(uint32_t (&fragment)[count], const void* row, Where where) {
  const int lane = lane_index();
  if (lane < 8 * count) check_shared(row, 16, 16, "ldmatrix", where);
  const void* rows[32];
  exchange_rows(row, rows, where);
  const auto element = [&](int matrix, int r, int c) {
    return static_cast<uint32_t>(traffic::load16(static_cast<const uint16_t*>(rows[8 * matrix + r]) + c));
  };
  const int pair = lane % 4 * 2, other = lane / 4;
  for (int i = 0; i < count; ++i) {
    fragment[i] = transposed ? element(i, pair, other) | element(i, pair + 1, other) << 16
                             : element(i, other, pair) | element(i, other, pair + 1) << 16;
  }
}

// Stores four 8x8 matrices, the other way round. Every lane writes what it holds itself.
inline void stmatrix_x4(void* row, const uint32_t (&fragment)[4], Where where) {
  check_shared(row, 16, 16, "stmatrix", where);
  const void* rows[32];
  exchange_rows(row, rows, where);
  const int lane = lane_index();
  for (int i = 0; i < 4; ++i) {
    const void* to = static_cast<const uint32_t*>(rows[8 * i + lane / 4]) + lane % 4;
    traffic::store32(const_cast<void*>(to), fragment[i]);
  }
}

// float to tf32: to nearest, ties away from zero.
inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits;
}

// The same as TMA does it: to nearest, ties to even.
inline uint32_t round_to_tf32_even(uint32_t bits) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0xfffu + (bits >> 13 & 1)) & ~0x1fffu : bits;
}

// What a tensor core takes for a register of tf32: it does not look at the low 13 bits.
inline double tf32_value(uint32_t bits) { return __builtin_bit_cast(float, bits & ~0x1fffu); }

double half_value(uint16_t bits);
double bfloat16_value(uint16_t bits);

float round_toward_zero(double v);

// As wrong as the instruction may be, so that no tolerance relies on less: the result has 12 significant bits.
float tanh_approx(float x);

// atom.inc: instrumented, because the order between blocks hangs on it.
inline uint32_t atomic_inc_acq_rel(uint32_t* p, uint32_t limit) {
  uint32_t old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, old >= limit ? 0 : old + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace emu
