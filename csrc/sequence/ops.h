// What the operators of a layer over a sequence share on every device: argument checks, outputs, and the tables that
// say where each step's rows are.
#pragma once
#include <tuple>
#include <vector>

#include "operators/gradients.h"
#include "operators/operands.h"
#include "sequence/params.h"

namespace rnn_ext {

// How a layer goes through its data.
struct LayerOptions {
  std::string_view nonlinearity;
  bool reverse;
  bool batch_first;
  const OptTensor& lengths;      // (B), int64, on the CPU: padded data's, or jagged data's
  const OptTensor& batch_sizes;  // (T), int64, on the CPU: packed data's

  // Packed or jagged data of so many dimensions: steps and rows are one of them, step by step or row by row.
  bool is_flat(int64_t dim) const { return batch_sizes.has_value() || (lengths.has_value() && dim == 2); }
};

// The arguments of rnn_layer and of rnn_layer_backward: references, good for the length of a call.
struct LayerArguments {
  const Tensor& input;  // (T, B, I); (B, T, I) with batch_first; (rows, I) packed or jagged
  const OptTensor& hx;  // (B, H)
  const Tensor& weight_ih;
  const Tensor& weight_hh;
  const OptTensor& bias_ih;
  const OptTensor& bias_hh;
  LayerOptions options;
};

// Operands may be absent where no asked gradient needs them; an absent hx stands for zeros, as do absent gradients.
struct LayerBackwardArguments {
  const OptTensor& grad_output;
  const OptTensor& grad_h_n;
  const Tensor& output;
  const OptTensor& input;
  const OptTensor& hx;
  const OptTensor& weight_ih;
  const OptTensor& weight_hh;
  LayerOptions options;
  OutputMask output_mask;
};

// All that a kernel relies on, but for the numbers in lengths and batch_sizes (StepTables). Returns the nonlinearity.
Nonlinearity check_layer_forward(const LayerArguments& arguments);
Nonlinearity check_layer_backward(const LayerBackwardArguments& arguments);

std::tuple<Tensor, Tensor> empty_layer_outputs(const LayerArguments& arguments);
Gradients empty_layer_gradients(const LayerBackwardArguments& arguments);

// Steps, and the tables that they point to, for data of such a layer on the CPU.
class StepTables {
 public:
  // `data`: the input, or anything of its layout. Checks the numbers.
  StepTables(const Tensor& data, const LayerOptions& options);
  StepTables(const StepTables&) = delete;
  StepTables& operator=(const StepTables&) = delete;

  const Steps& steps() const { return steps_; }

 private:
  Steps steps_{};
  Tensor batch_sizes_;
  std::vector<int64_t> counts_, begins_, order_, firsts_;
};

// Of packed data, only its batch_sizes say how many rows there are.
void check_batch(const Steps& steps, const OptTensor& state, const char* name);

// The kernels leave padding alone: there is none in packed or jagged data, nor where every row has every step.
inline void clear_padding(const Tensor& t, const LayerOptions& options) {
  if (options.lengths.has_value() && !options.is_flat(t.dim())) t.zero_();
}

// The rows of a tensor in the layer's layout; null for an absent one.
template <typename T>
Rows<T> as_rows(const Tensor& t, const LayerOptions& options) {
  if (!t.defined()) return {};
  auto* const data = static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
  if (options.is_flat(t.dim())) return {data, t.stride(0), t.stride(0), t.stride(1)};
  return {data, t.stride(options.batch_first ? 1 : 0), t.stride(options.batch_first ? 0 : 1), t.stride(2)};
}

}  // namespace rnn_ext
