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
  bool own_weights;         // each group packs the weights for itself, and reads nothing that another wrote

  int threads() const { return groups * members; }
  int packers() const { return own_weights ? members : threads(); }  // of one copy of the weights
  int copies() const { return threads() / packers(); }
};

struct Worker {
  int thread;
  Team* all;
  Team* group;

  void wait_for_weights(const Division& division) const {
    division.own_weights ? group->wait(thread % division.members) : all->wait(thread);
  }
};

// Of U and W, in the type that is multiplied.
template <typename T>
int64_t weights_bytes(int64_t input_size, int64_t hidden_size) {
  return (input_size + hidden_size) * hidden_size * static_cast<int64_t>(sizeof(acc_t<T>));
}

// Whether their packed copies are large beside what a few steps need.
template <typename T>
bool weights_are_large(int64_t input_size, int64_t hidden_size) {
  return weights_bytes<T>(input_size, hidden_size) > 1 << 21;
}

template <typename T>
struct LayerForward {
  LayerForwardParams<T> p;
  Division division;
  acc_t<T>* memory;  // of as many elements as forward_memory says
};

// What a call of the backward kernel does: everything, block by block of steps; or one after another, for all steps,
// dz, the gradients of the weights and biases, and those of the inputs.
enum class BackwardPart { kAll, kSteps, kWeights, kInputs };

template <typename T>
struct LayerBackward {
  LayerBackwardParams<T> p;
  Division division;
  acc_t<T>* memory;
  BackwardPart part;
  Rows<T> dz;  // (H), unit column stride, unless the part is kAll: may be grad_input's rows
};

template <typename T>
struct LayerKernels {
  int64_t (*forward_memory)(const LayerForward<T>& job);
  void (*forward)(const LayerForward<T>& job, const Worker& worker);
  int64_t (*backward_memory)(const LayerBackward<T>& job);
  void (*backward)(const LayerBackward<T>& job, const Worker& worker);
};

}  // namespace rnn_ext::cpu
