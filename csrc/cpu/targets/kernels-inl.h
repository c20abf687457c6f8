// The kernels, written once over a vector type and compiled once for each instruction set: the files of this folder
// include this inside a namespace of their own, all of it with internal linkage, after vec_<isa>-inl.h. Nothing from
// std:: is used in a file named -inl.h: an inline function of the standard library compiled for AVX-512 could be the
// copy that the linker keeps for everyone.
#pragma once

#include "cpu/blocks/common-inl.h"
#include "cpu/blocks/activation-inl.h"
#include "cpu/blocks/epilogue-inl.h"
#include "cpu/blocks/dot-inl.h"
#include "cpu/blocks/outer-inl.h"
#include "cpu/blocks/product-inl.h"
#include "cpu/blocks/panels-inl.h"
#include "cpu/cell/forward-inl.h"
#include "cpu/cell/backward-inl.h"
#include "cpu/sequence/rows-inl.h"
#include "cpu/sequence/forward-inl.h"
#include "cpu/sequence/backward-inl.h"

template <typename T>
constexpr Kernels<T> kernels() {
  return {&forward<T>, &epilogue<T>, &grad_z<T>, &product<T>, &layer_kernels<T, Singles<T>>};
}
