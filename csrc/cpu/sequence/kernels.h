// The sequence's kernels as an instruction set offers them, and how their work is divided. The launcher (launch.cpp)
// decides on the division; each thread then calls the kernel once, for all that it does.
#pragma once
#include "cpu/acc_type.h"
#include "cpu/sequence/team.h"
#include "sequence/params.h"

namespace rnn_ext::cpu {

// Threads in groups. A group has rows of the batch of its own, and waits for no other while it walks through the steps.
// Its members share the columns of the hidden state, and wait for one another at each step. No sum is divided, so that
// the results are the same for every division.
struct Division {
  int groups, members;
  const int64_t* rows;      // (groups + 1): where each group's begin
  int64_t steps_per_block;  // whose products with X, W and dZᵀ are formed together: not by the number of threads

  int threads() const { return groups * members; }
};

struct Worker {
  int thread;
  Team* all;
  Team* group;
};

template <typename T>
struct LayerForward {
  LayerForwardParams<T> p;
  Division division;
  acc_t<T>* memory;  // of as many elements as forward_memory says
};

template <typename T>
struct LayerBackward {
  LayerBackwardParams<T> p;
  Division division;
  acc_t<T>* memory;
};

template <typename T>
struct LayerKernels {
  int64_t (*forward_memory)(const LayerForwardParams<T>& p, const Division& division);
  void (*forward)(const LayerForward<T>& job, const Worker& worker);
  int64_t (*backward_memory)(const LayerBackwardParams<T>& p, const Division& division);
  void (*backward)(const LayerBackward<T>& job, const Worker& worker);
};

}  // namespace rnn_ext::cpu
