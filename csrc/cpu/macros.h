// Compiler differences that the kernels' translation units share.
#pragma once

// Vector types as arguments are safe where everything is inlined, which GCC can't know when it warns; and it takes the
// undefined operands in its own AVX-512 intrinsics for mistakes (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define INLINE inline __attribute__((always_inline))

// Loops over a tile must disappear, or its accumulators would live in memory.
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// Functions between BEGIN and END are compiled for the instruction sets named.
#define RNN_EXT_PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define RNN_EXT_TARGET_BEGIN(isa) \
  RNN_EXT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define RNN_EXT_TARGET_END _Pragma("clang attribute pop")
#else
#define RNN_EXT_TARGET_BEGIN(isa) _Pragma("GCC push_options") RNN_EXT_PRAGMA(GCC target(isa))
#define RNN_EXT_TARGET_END _Pragma("GCC pop_options")
#endif
