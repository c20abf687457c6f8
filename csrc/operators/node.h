// A node of the autograd graph made by hand: what torch::autograd::Function::apply would do, in half its time, since
// that is written for views and in-place functions. An operand that is absent, or needs no gradient, has an empty edge.
#pragma once
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <initializer_list>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "operators/operands.h"

namespace rnn_ext {

// `Backward` is a torch::autograd::Function whose backward is called, and has a kName. CppNode reads its name in each
// backward, and Node's is the type's, demangled every time: a microsecond or two.
template <typename Backward>
struct NamedNode : torch::autograd::CppNode<Backward> {
  std::string name() const override { return Backward::kName; }
};

using NodePtr = decltype(torch::autograd::Edge::function);

// Shared until torch 2.13, intrusive since.
template <typename Backward, typename Pointer = NodePtr>
auto make_node() {
  using Made = NamedNode<Backward>;
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<Made>(new Made, [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Made>();
  }
}

// Where torch has such hooks.
template <typename Pointer>
auto fire_hooks(const Pointer& node, int /*preferred*/) -> decltype(fire_node_creation_hooks(node)) {
  return fire_node_creation_hooks(node);
}
template <typename Pointer>
void fire_hooks(const Pointer& /*node*/, long /*otherwise*/) {}

// Makes `outputs` the results of a node with edges to the operands. What the node saves is asked for after that, since
// it may contain an output; `options` fills the context's saved_data.
template <typename Backward, typename ToSave, typename Options, typename... Operands>
void record(std::initializer_list<Tensor> outputs, const ToSave& to_save, const Options& options,
            const Operands&... operands) {
  const auto node = make_node<Backward>();
  const NodePtr base = node;
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(operands...));
  node->is_variable_input_.assign(sizeof...(operands), true);
  for (const Tensor& output : outputs) torch::autograd::set_history(output, base);
  node->ctx_.set_materialize_grads(false);
  options(node->ctx_.saved_data);
  node->ctx_.save_for_backward(to_save());
  try {
    node->save_variables_to_ctx();
  } catch (...) {  // from a pack hook: the output, still to be saved, refers to the node, which would keep it for ever
    node->ctx_.save_for_backward({});
    throw;
  }
  fire_hooks(base, 0);
}

}  // namespace rnn_ext
