// The node is a C++ torch::autograd::Function: the same as rnn_ext.RNNCellFunction, without Python's cost a call.
#include "eager.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

namespace rnn_ext {
namespace {

using ForwardOp = Tensor(const Tensor&, const OptTensor&, const Tensor&, const Tensor&, const OptTensor&,
                         const OptTensor&, std::string_view);
using BackwardOp = std::vector<Tensor>(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&,
                                       const OptTensor&, const OptTensor&, std::string_view, OutputMask);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

const auto& forward_op() {
  static const auto op = find_op<ForwardOp>("rnn_ext::rnn_cell");
  return op;
}

const auto& backward_op() {
  static const auto op = find_op<BackwardOp>("rnn_ext::rnn_cell_backward");
  return op;
}

// A dense tensor on a device that has our kernels, with no wrapper around it (functorch, subclass, sparse, quantized,
// functionalized, negated: all carry a dispatch key beyond these) and without a forward-mode tangent.
bool is_plain(const Tensor& t) {
  static const uint64_t plain_keys =
      (c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::ADInplaceOrView}) |
       c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset)
          .raw_repr() |
      c10::full_backend_mask;
  const auto dtype = t.scalar_type();
  return (t.key_set().raw_repr() & ~plain_keys) == 0 && (t.is_cpu() || (kCudaBuilt && t.is_cuda())) &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf) &&
         !t._fw_grad(/*level=*/0).defined();
}

bool transforms_active() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::jit::tracer::isTracing();
}

// ------------------------------------------------------------------------------------------------------------ the node

using torch::autograd::Node;
using NodePtr = decltype(torch::autograd::Edge::function);

struct RNNCellNode : torch::autograd::Function<RNNCellNode> {
  static std::vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const std::vector<Tensor>& grad_outputs) {
    std::vector<Tensor> gradients(kNumGradients);
    if (!grad_outputs[0].defined()) return gradients;
    OutputMask needed{};
    for (size_t i = 0; i < kNumGradients; ++i) needed[i] = ctx->needs_input_grad(i);
    const auto saved = ctx->get_saved_variables();
    const auto optional = [&](size_t i) { return saved[i].defined() ? OptTensor(saved[i]) : std::nullopt; };
    const auto nonlinearity = static_cast<Nonlinearity>(ctx->saved_data["nonlinearity"].toInt());
    auto found = rnn_cell_gradients(grad_outputs[0], saved[0], optional(1), optional(2), optional(3), optional(4),
                                    name_of(nonlinearity), needed);
    auto next = found.begin();
    for (size_t i = 0; i < kNumGradients; ++i) {
      if (needed[i]) gradients[i] = std::move(*next++);
    }
    return gradients;
  }
};

// CppNode reads its name in each backward, and Node's is the type's, demangled every time: a microsecond or two.
struct CellNode : torch::autograd::CppNode<RNNCellNode> {
  std::string name() const override { return "RNNCellBackward"; }
};

// Shared until torch 2.13, intrusive since.
template <typename Pointer = NodePtr>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return std::shared_ptr<CellNode>(new CellNode, [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<CellNode>();
  }
}

// Where torch has such hooks.
template <typename Pointer>
auto fire_hooks(const Pointer& node, int /*preferred*/) -> decltype(fire_node_creation_hooks(node)) {
  return fire_node_creation_hooks(node);
}
template <typename Pointer>
void fire_hooks(const Pointer& /*node*/, long /*otherwise*/) {}

// What RNNCellNode::apply would do, in half its time: that is written for many outputs, views and in-place functions.
// The node has six edges; an operand that is absent, or needs no gradient, has an empty one.
Tensor apply(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
             const OptTensor& bias_ih, const OptTensor& bias_hh, std::string_view nonlinearity) {
  auto output = rnn_cell_below_autograd(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity);
  const auto node = make_node();
  const NodePtr base = node;
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(input, hx, weight_ih, weight_hh, bias_ih, bias_hh));
  node->is_variable_input_.assign(kNumGradients, true);
  torch::autograd::set_history(output, base);
  const auto needed_by = [](const Tensor& other, const Tensor& t) { return other.requires_grad() ? t : Tensor(); };
  node->ctx_.save_for_backward({output, needed_by(weight_ih, input), hx ? needed_by(weight_hh, *hx) : Tensor(),
                                needed_by(input, weight_ih), hx ? needed_by(*hx, weight_hh) : Tensor()});
  node->ctx_.set_materialize_grads(false);
  node->ctx_.saved_data["nonlinearity"] = static_cast<int64_t>(parse_nonlinearity(nonlinearity));
  try {
    node->save_variables_to_ctx();
  } catch (...) {  // from a pack hook: the output, still to be saved, refers to the node, which would keep it for ever
    node->ctx_.save_for_backward({});
    throw;
  }
  fire_hooks(base, 0);
  return output;
}

}  // namespace

Tensor rnn_cell_below_autograd(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih,
                               const Tensor& weight_hh, const OptTensor& bias_ih, const OptTensor& bias_hh,
                               std::string_view nonlinearity) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return forward_op().call(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity);
}

std::vector<Tensor> rnn_cell_gradients(const Tensor& grad_output, const Tensor& output, const OptTensor& input_,
                                       const OptTensor& hx_, const OptTensor& weight_ih_, const OptTensor& weight_hh_,
                                       std::string_view nonlinearity, OutputMask output_mask) {
  // RNNCellFunction saves its operands as they were before autocast; connected to the graph, as these casts are.
  const auto like_output = [&](const OptTensor& t) {
    return t.has_value() && t->scalar_type() != output.scalar_type() ? t->to(output.scalar_type()) : t;
  };
  const auto input = like_output(input_), hx = like_output(hx_);
  const auto weight_ih = like_output(weight_ih_), weight_hh = like_output(weight_hh_);
  bool fused = !transforms_active() && !at::GradMode::is_enabled() && is_plain(grad_output) && is_plain(output);
  for (const auto* t : {&input, &hx, &weight_ih, &weight_hh}) fused = fused && (!t->has_value() || is_plain(**t));
  if (fused) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return backward_op().call(grad_output, output, input, hx, weight_ih, weight_hh, nonlinearity, output_mask);
  }
  const pybind11::gil_scoped_acquire gil;
  const auto formulas = pybind11::module_::import("rnn_ext._aten").attr("rnn_cell_backward");
  return formulas(grad_output, output, input, hx, weight_ih, weight_hh, nonlinearity, output_mask)
      .cast<std::vector<Tensor>>();
}

OptTensor rnn_cell_eager(const Tensor& input, const OptTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                         const OptTensor& bias_ih, const OptTensor& bias_hh, std::string_view nonlinearity) {
  if (transforms_active() || !is_plain(input)) return std::nullopt;
  const bool autocast = at::autocast::is_autocast_enabled(input.device().type());
  bool requires_grad = input.requires_grad();
  const auto fits = [&](const Tensor& t) {
    requires_grad |= t.requires_grad();
    return is_plain(t) && t.device() == input.device() && (t.scalar_type() == input.scalar_type() || autocast);
  };
  const auto bias_fits = [&](const Tensor& bias) {  // nn.RNNCell broadcasts biases of other shapes
    return bias.dim() == 1 && weight_hh.dim() == 2 && bias.size(0) == weight_hh.size(1) && fits(bias);
  };
  if (!fits(weight_ih) || !fits(weight_hh) || (hx.has_value() && !fits(*hx)) ||
      (bias_ih.has_value() && !bias_fits(*bias_ih)) || (bias_hh.has_value() && !bias_fits(*bias_hh))) {
    return std::nullopt;
  }
  if (autocast) {  // the operator's Autocast kernel casts first
    return forward_op().call(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity);
  }
  if (!requires_grad || !at::GradMode::is_enabled()) {
    return rnn_cell_below_autograd(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity);
  }
  return apply(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity);
}

}  // namespace rnn_ext
