// The launcher for sequences: how many threads, what each of them does, and the memory for it, which belongs to the
// call.
#include "cpu/sequence/launch.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/sequence/kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace rnn_ext::cpu {
namespace {

// Multiply-adds of a step up to which its threads don't wait for one another.
constexpr int64_t kSerialStep = 1 << 14;
constexpr int64_t kMostThreads = 64;
// Rows of a block of steps: enough for the products with X and dZ to run at full speed, few enough for the L2 cache.
constexpr int64_t kForwardRows = 384, kBackwardRows = 256;
// Sums of large weights' gradients come from memory for each block, and go back there.
constexpr int64_t kBackwardRowsOfLargeWeights = 512;
// Rows of a sequence with large weights up to which its backward pass goes in parts, for the sake of memory.
constexpr int64_t kRowsInParts = 2048;
// Bytes of U from which threads had better share its columns than each read all of it.
constexpr int64_t kSharedBytes = 1 << 20;
// Rows of a group from which a tile is high enough. Where U is near, fewer do: groups don't wait for one another, and
// what a step's wait costs depends on how far apart the threads' cores are.
constexpr int64_t kGroupRows = 4, kGroupRowsNearU = 2, kNearBytes = 1 << 17;

// Bytes of U and W up to which each group packs them for itself. That is more work, but no line of the cache goes from
// one thread's core to another's, which takes a tenth of a microsecond or, where they share no cache, half of one.
constexpr int64_t kOwnWeightsBytes = 3 << 17;

struct Threads {
  int groups, members;
};

Threads choose_threads(const Steps& steps, int64_t input_size, int64_t hidden_size, size_t element_size) {
#ifdef _OPENMP
  const int64_t work = steps.steps * steps.batch * hidden_size * (input_size + hidden_size);
  const int threads =
      static_cast<int>(std::min({static_cast<int64_t>(at::get_num_threads()), kMostThreads, 1 + work / serial_work()}));
  if (threads == 1 || at::in_parallel_region()) return {1, 1};
  const int64_t bytes = hidden_size * hidden_size * static_cast<int64_t>(element_size);
  const int64_t rows = bytes <= kNearBytes ? kGroupRowsNearU : kGroupRows;
  const int groups = bytes > kSharedBytes ? 1 : static_cast<int>(std::clamp<int64_t>(steps.batch / rows, 1, threads));
  const int64_t step = steps.batch / groups * hidden_size * hidden_size;
  const int members =
      step < kSerialStep ? 1 : static_cast<int>(std::min<int64_t>(threads / groups, (hidden_size + 31) / 32));
  return {groups, members};
#else
  return {1, 1};  // threads that wait for one another must all run
#endif
}

template <typename T>
bool own_weights(const Threads& threads, const Weights<T>& weights) {
  return threads.groups > 1 && weights_bytes<T>(weights.input_size, weights.hidden_size) <= kOwnWeightsBytes;
}

// Where the rows of each group begin, so that all have about as many steps of rows.
std::vector<int64_t> divide_rows(const Steps& steps, int groups) {
  std::vector<int64_t> first(groups + 1, 0);
  first[groups] = steps.batch;
  if (groups == 1) return first;
  int64_t total = 0;
  for (int64_t t = 0; t < steps.steps; ++t) total += steps.count(t);
  int64_t length = steps.steps, sum = 0;
  for (int64_t b = 0, group = 1; b < steps.batch && group < groups; ++b) {
    while (group < groups && sum * groups >= total * group) first[group++] = b;
    while (length > 0 && steps.count(length - 1) <= b) --length;
    sum += length;
    if (b + 1 == steps.batch) {
      while (group < groups) first[group++] = steps.batch;
    }
  }
  return first;
}

// Calls kernel(job, worker) in each of the division's threads, all at the same time.
template <typename Job, typename Kernel>
void run(const Job& job, const Kernel& kernel) {
  const int threads = job.division.threads();
  Team all(threads);
  if (threads == 1) return kernel(job, {0, &all, &all});
#ifdef _OPENMP
  std::vector<Team> groups;
  groups.reserve(job.division.groups);
  for (int i = 0; i < job.division.groups; ++i) groups.emplace_back(job.division.members);
  bool enough = true;
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_num_threads() == threads) {
      const int thread = omp_get_thread_num();
      kernel(job, {thread, &all, &groups[thread / job.division.members]});
    } else if (omp_get_thread_num() == 0) {
      enough = false;
    }
  }
  if (!enough) {  // OpenMP has no more to give: one thread does the work, within the same memory
    Job serial = job;
    const int64_t rows[2] = {0, job.p.steps.batch};
    serial.division.groups = serial.division.members = 1;
    serial.division.own_weights = false;
    serial.division.rows = rows;
    Team one(1);
    kernel(serial, {0, &one, &one});
  }
#endif
}

template <typename T>
void copy_row(const Matrix<T>& from, int64_t row, int64_t size, T* to) {
  for (int64_t j = 0; j < size; ++j) {
    to[row * size + j] = from.data ? from.data[row * from.row_stride + j * from.col_stride] : T(0);
  }
}

template <typename S>
at::TensorBase allocate(int64_t elements) {  // by PyTorch, so that its profiler sees it, and its error names the size
  return at::detail::empty_cpu({elements}, c10::CppTypeToScalarType<S>::value);
}

// Runs the kernel in its memory: the calling thread's own where that is enough.
template <typename Job, typename Size, typename Kernel>
void run_within_memory(Job& job, const Size& size, const Kernel& kernel) {
  using S = std::remove_pointer_t<decltype(job.memory)>;
  const int64_t elements = size(job);
  at::TensorBase memory;
  if (elements * int64_t{sizeof(S)} <= kScratchBytes) {
    job.memory = static_cast<S*>(scratch_memory());
  } else {
    memory = allocate<S>(elements);
    job.memory = memory.template mutable_data_ptr<S>();
  }
  run(job, kernel);
}

}  // namespace

template <typename T>
void rnn_layer_forward(const LayerForwardParams<T>& p) {
  const int64_t B = p.steps.batch, H = p.weights.hidden_size;
  if (B == 0 || H == 0) return;
  for (int64_t b = p.steps.steps ? p.steps.count(0) : 0; b < B; ++b) copy_row(p.hx, p.steps.place(b), H, p.h_n);
  if (p.steps.steps == 0) return;
  const Threads threads = choose_threads(p.steps, p.weights.input_size, H, sizeof(acc_t<T>));
  const auto rows = divide_rows(p.steps, threads.groups);
  const int64_t block = std::min(p.steps.steps, std::max<int64_t>(kForwardRows / B, 1));
  const bool own = own_weights<T>(threads, p.weights);
  LayerForward<T> job = {p, {threads.groups, threads.members, rows.data(), block, own}, nullptr};
  const LayerKernels<T> layer = kernels<T>().layer(H);
  run_within_memory(job, layer.forward_memory, layer.forward);
}

template <typename T>
void rnn_layer_backward(LayerBackwardParams<T>& p, const std::function<void()>& take_weights) {
  const int64_t B = p.steps.batch, I = p.weights.input_size, H = p.weights.hidden_size;
  if (p.grad_hx) {
    for (int64_t b = p.steps.steps ? p.steps.count(0) : 0; b < B; ++b) {
      copy_row(p.grad_h_n, p.steps.place(b), H, p.grad_hx);
    }
  }
  if (B == 0 || H == 0 || p.steps.steps == 0) {
    const auto clear = [](T* to, int64_t size) {
      if (to) std::memset(static_cast<void*>(to), 0, size * sizeof(T));
    };
    take_weights();
    clear(p.grad_weight_ih, H * I);
    clear(p.grad_weight_hh, H * H);
    clear(p.grad_bias, H);
    return;
  }
  const Threads threads = choose_threads(p.steps, I, H, sizeof(acc_t<T>));
  const auto rows = divide_rows(p.steps, threads.groups);
  const bool large = weights_are_large<T>(I, H);
  const int64_t rows_of_block = large ? kBackwardRowsOfLargeWeights : kBackwardRows;
  const bool in_parts = large && p.steps.steps * B <= kRowsInParts;
  const int64_t block = in_parts ? p.steps.steps : std::min(p.steps.steps, std::max<int64_t>(rows_of_block / B, 1));
  const Division division = {threads.groups, threads.members, rows.data(), block, own_weights<T>(threads, p.weights)};
  const LayerKernels<T> layer = kernels<T>().layer(H);
  const auto run_part = [&](BackwardPart part, const Rows<T>& dz) {
    LayerBackward<T> job = {p, division, nullptr, part, dz};
    run_within_memory(job, layer.backward_memory, layer.backward);
  };
  if (!in_parts) {
    take_weights();
    run_part(BackwardPart::kAll, {});
    return;
  }
  at::TensorBase memory;
  Rows<T> dz = p.grad_input;  // dX takes dz's place in the end
  if (!dz.data || I < H) {
    memory = allocate<T>(p.steps.steps * B * H);
    const bool flat = p.steps.begins || p.steps.firsts;  // packed or jagged: the tables count single rows
    dz = {memory.template mutable_data_ptr<T>(), flat ? H : B * H, H};
  }
  run_part(BackwardPart::kSteps, dz);
  take_weights();
  run_part(BackwardPart::kWeights, dz);
  if (p.grad_input.data) run_part(BackwardPart::kInputs, dz);
}

template void rnn_layer_forward(const LayerForwardParams<float>&);
template void rnn_layer_forward(const LayerForwardParams<double>&);
template void rnn_layer_forward(const LayerForwardParams<c10::BFloat16>&);
template void rnn_layer_forward(const LayerForwardParams<c10::Half>&);
template void rnn_layer_backward(LayerBackwardParams<float>&, const std::function<void()>&);
template void rnn_layer_backward(LayerBackwardParams<double>&, const std::function<void()>&);
template void rnn_layer_backward(LayerBackwardParams<c10::BFloat16>&, const std::function<void()>&);
template void rnn_layer_backward(LayerBackwardParams<c10::Half>&, const std::function<void()>&);

}  // namespace rnn_ext::cpu
