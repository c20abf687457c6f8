"""Autograd for ``torch.ops.rnn_ext``: the operators' schemas and kernels are registered in ``csrc/cell/ops*.cpp``.

Eager calls of :func:`rnn_ext.rnn_cell` go to csrc/cell/autograd.cpp, since kernels in Python cost several times as
much. Compiled graphs, exported programs, autocast and direct calls come here.

torch.library.register_autograd would not do: it silently drops forward-mode tangents, and refuses torch.func.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import _aten
from .autograd import save_for_backward, spread_gradients


def _below_autograd(op: Any, keyset: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


class _RNNCell(Function):
    """Called with the operator's arguments and the dispatch keys, as is _RNNCellBackward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *operands, keyset = args
        output: Tensor = _below_autograd(torch.ops.rnn_ext.rnn_cell.default, keyset, *operands)
        save_for_backward(ctx, output, *operands[:4])
        ctx.set_materialize_grads(False)
        ctx.nonlinearity = operands[6]
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grad_output is None:
            return (None,) * len(needs)
        mask = list(needs[:6])
        gradients = torch.ops.rnn_ext.rnn_cell_backward(grad_output, *ctx.saved_tensors, ctx.nonlinearity, mask)
        return spread_gradients(gradients, needs)


class _RNNCellBackward(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        return _forward_of_a_backward(ctx, torch.ops.rnn_ext.rnn_cell_backward.default, 6, args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, _aten.rnn_cell_backward, grads)


class _RNNLayer(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *operands, keyset = args
        input, hx, weight_ih, weight_hh, *_ = operands
        ctx.options = operands[6:9]
        output, h_n = _below_autograd(torch.ops.rnn_ext.rnn_layer.default, keyset, *operands)
        need_input, _, need_weight_ih, need_weight_hh = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            output,
            input if need_weight_ih else None,
            hx if need_weight_hh else None,
            weight_ih if need_input else None,
            weight_hh,  # of each step's gradient, for the one before
            *operands[9:],
        )
        ctx.set_materialize_grads(False)
        return output, h_n

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grad_output is None and grad_h_n is None:
            return (None,) * len(needs)
        nonlinearity, *directions = ctx.options
        *saved, lengths, batch_sizes = ctx.saved_tensors
        gradients = torch.ops.rnn_ext.rnn_layer_backward(
            grad_output, grad_h_n, *saved, nonlinearity, list(needs[:6]), *directions, lengths, batch_sizes
        )
        return spread_gradients(gradients, needs)


class _RNNLayerBackward(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        return _forward_of_a_backward(ctx, torch.ops.rnn_ext.rnn_layer_backward.default, 7, args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, _aten.rnn_layer_backward, grads)


def _forward_of_a_backward(ctx: Any, op: Any, differentiable: int, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """`differentiable`: how many of the arguments, the first ones, may have a gradient."""
    *operands, keyset = args
    ctx.save_for_backward(*operands[:differentiable])
    ctx.set_materialize_grads(False)
    ctx.options = operands[differentiable:]
    return tuple(_below_autograd(op, keyset, *operands))


def _differentiate(ctx: Any, formula: Callable[..., Any], grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The gradients of a backward's arguments, through the same out of ATen's operators."""
    needs = ctx.needs_input_grad
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that the output's own dependence on the weights is left to the graph that the engine walks.
        saved: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
        outputs = formula(*saved, *ctx.options)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad and g is not None]
        if not pairs:
            return (None,) * len(needs)
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [t for t, need in zip(saved, needs, strict=False) if need],
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    return spread_gradients(list(found), needs)


def _register(op: Any, node: Any, formula: Callable[..., Any]) -> None:
    """`formula`: the same out of ATen's operators, which know every transform."""
    defaults = [argument.default_value for argument in op._schema.arguments]
    gives_a_list = len(op._schema.returns) == 1 and isinstance(op._schema.returns[0].type, torch.ListType)

    def has_tangent(t: Tensor) -> bool:
        return cast(Any, forward_ad).unpack_dual(t).tangent is not None

    def autograd(keyset: Any, *args: Any) -> Any:
        args = (*args, *defaults[len(args) :])  # the dispatcher leaves them out
        # The private name spares most calls the look at their tensors.
        if getattr(forward_ad, "_current_level", 0) >= 0 and any(has_tangent(t) for t in args if isinstance(t, Tensor)):
            return formula(*args)
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
            output = node.apply(*args, keyset)
            return list(output) if gives_a_list else output
        return _below_autograd(op, keyset, *args)

    def decomposed(*args: Any) -> Any:
        return formula(*args, *defaults[len(args) :])

    _library.impl(op, autograd, "Autograd", with_keyset=True)
    for key in ("FuncTorchDynamicLayerFrontMode", "Batched"):  # torch.func's transforms; autograd's is_grads_batched
        _library.impl(op, decomposed, key)


_library = cast(Any, torch.library).Library("rnn_ext", "IMPL")
_register(torch.ops.rnn_ext.rnn_cell.default, _RNNCell, _aten.rnn_cell)
_register(torch.ops.rnn_ext.rnn_cell_backward.default, _RNNCellBackward, _aten.rnn_cell_backward)
_register(torch.ops.rnn_ext.rnn_layer.default, _RNNLayer, _aten.rnn_layer)
_register(torch.ops.rnn_ext.rnn_layer_backward.default, _RNNLayerBackward, _aten.rnn_layer_backward)
