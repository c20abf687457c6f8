#include "tensor_core.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "scheduler.h"

namespace emu {

double half_value(uint16_t bits) { return __half2float(__builtin_bit_cast(__half_raw, bits)); }
double bfloat16_value(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

namespace {

struct Fragments {
  const void* a;
  const void* b;
  void* c;
};

template <typename T>
T reg(const void* fragment, int i) {
  return static_cast<const T*>(fragment)[i];
}

// d = c + a b for the whole warp, once all of A (16 x K) and B (K x 8) has been gathered from the lanes.
template <int K>
void multiply_16x8(void* const* lanes, const double (&A)[16][K], const double (&B)[K][8]) {
  for (int l = 0; l < kWarp; ++l) {
    auto* c = static_cast<float*>(static_cast<Fragments*>(lanes[l])->c);
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      double sum = c[i];
      for (int k = 0; k < K; ++k) sum += A[row][k] * B[k][column];
      c[i] = round_toward_zero(sum);
    }
  }
}

template <double (*value)(uint16_t)>
void work_16bit(void* const* lanes, uint32_t) {
  double A[16][16], B[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const auto& f = *static_cast<const Fragments*>(lanes[l]);
    const int group = l / 4, k = l % 4 * 2;
    for (int e = 0; e < 2; ++e) {  // the low half of a register is the lower k
      const auto half = [&](uint32_t r) { return value(static_cast<uint16_t>(r >> 16 * e)); };
      A[group][k + e] = half(reg<uint32_t>(f.a, 0));
      A[group + 8][k + e] = half(reg<uint32_t>(f.a, 1));
      A[group][k + 8 + e] = half(reg<uint32_t>(f.a, 2));
      A[group + 8][k + 8 + e] = half(reg<uint32_t>(f.a, 3));
      B[k + e][group] = half(reg<uint32_t>(f.b, 0));
      B[k + 8 + e][group] = half(reg<uint32_t>(f.b, 1));
    }
  }
  multiply_16x8<16>(lanes, A, B);
}

void work_tf32(void* const* lanes, uint32_t) {
  double A[16][8], B[8][8];
  for (int l = 0; l < kWarp; ++l) {
    const auto& f = *static_cast<const Fragments*>(lanes[l]);
    const int group = l / 4, k = l % 4;
    A[group][k] = tf32_value(reg<uint32_t>(f.a, 0));
    A[group + 8][k] = tf32_value(reg<uint32_t>(f.a, 1));
    A[group][k + 4] = tf32_value(reg<uint32_t>(f.a, 2));
    A[group + 8][k + 4] = tf32_value(reg<uint32_t>(f.a, 3));
    B[k][group] = tf32_value(reg<uint32_t>(f.b, 0));
    B[k + 4][group] = tf32_value(reg<uint32_t>(f.b, 1));
  }
  multiply_16x8<8>(lanes, A, B);
}

void work_f64(void* const* lanes, uint32_t) {
  double A[8][4], B[4][8];
  for (int l = 0; l < kWarp; ++l) {
    const auto& f = *static_cast<const Fragments*>(lanes[l]);
    A[l / 4][l % 4] = reg<double>(f.a, 0);
    B[l % 4][l / 4] = reg<double>(f.b, 0);
  }
  for (int l = 0; l < kWarp; ++l) {
    auto* c = static_cast<double*>(static_cast<Fragments*>(lanes[l])->c);
    for (int i = 0; i < 2; ++i) {
      for (int k = 0; k < 4; ++k) c[i] = std::fma(A[l / 4][k], B[k][l % 4 * 2 + i], c[i]);
    }
  }
}

constexpr uint32_t kAllLanes = ~0u;

void mma(const char* what, void* c, const void* a, const void* b, Where where, void (*work)(void* const*, uint32_t)) {
  Fragments fragments{a, b, c};
  const Thread& me = self();
  if (me.block->size - (me.rank - me.lane()) < kWarp) fail(where, "%s in a warp of fewer than 32 threads", what);
  warp_collective(kAllLanes, what, where, &fragments, work);
}

}  // namespace

float round_toward_zero(double v) {
  const float nearest = static_cast<float>(v);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(v) ? std::nextafter(nearest, 0.0f) : nearest;
}

float tanh_approx(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, std::tanh(x));
  return std::isnan(x) ? x : __builtin_bit_cast(float, (bits + 0x800u) & ~0xfffu);
}

void mma_m16n8k8_tf32(float* c, const uint32_t* a, const uint32_t* b, Where where) {
  mma("mma.m16n8k8.tf32", c, a, b, where, work_tf32);
}
void mma_m16n8k16_f16(float* c, const uint32_t* a, const uint32_t* b, Where where) {
  mma("mma.m16n8k16.f16", c, a, b, where, work_16bit<half_value>);
}
void mma_m16n8k16_bf16(float* c, const uint32_t* a, const uint32_t* b, Where where) {
  mma("mma.m16n8k16.bf16", c, a, b, where, work_16bit<bfloat16_value>);
}
void mma_m8n8k4_f64(double* c, const double* a, const double* b, Where where) {
  mma("mma.m8n8k4.f64", c, a, b, where, work_f64);
}

void exchange_rows(const void* row, const void* (&rows)[32], Where where) {
  struct Slot {
    const void* row;
    const void** rows;
  } slot{row, rows};
  warp_collective(kAllLanes, "ldmatrix", where, &slot, [](void* const* slots, uint32_t) {
    for (int to = 0; to < kWarp; ++to) {
      if (slots[to] == nullptr) continue;
      for (int from = 0; from < kWarp; ++from) {
        const auto* source = static_cast<const Slot*>(slots[from]);
        static_cast<Slot*>(slots[to])->rows[from] = source != nullptr ? source->row : nullptr;
      }
    }
  });
}

}  // namespace emu
