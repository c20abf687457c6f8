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
        *operands, keyset = args
        ctx.save_for_backward(*operands[:6])
        ctx.set_materialize_grads(False)
        ctx.options = operands[6:]
        return tuple(_below_autograd(torch.ops.rnn_ext.rnn_cell_backward.default, keyset, *operands))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiates the ATen formulas."""
        needs = ctx.needs_input_grad
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases, so that the output's own dependence on the weights is left to the graph that the engine walks.
            saved: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            outputs = _aten.rnn_cell_backward(*saved, *ctx.options)
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

    def has_tangent(t: Tensor) -> bool:
        return cast(Any, forward_ad).unpack_dual(t).tangent is not None

    def autograd(keyset: Any, *args: Any) -> Any:
        args = (*args, *defaults[len(args) :])  # the dispatcher leaves them out
        # The private name spares most calls the look at their tensors.
        if getattr(forward_ad, "_current_level", 0) >= 0 and any(has_tangent(t) for t in args if isinstance(t, Tensor)):
            return formula(*args)
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
            output = node.apply(*args, keyset)
            return list(output) if isinstance(output, tuple) else output
        return _below_autograd(op, keyset, *args)

    def decomposed(*args: Any) -> Any:
        return formula(*args, *defaults[len(args) :])

    _library.impl(op, autograd, "Autograd", with_keyset=True)
    for key in ("FuncTorchDynamicLayerFrontMode", "Batched"):  # torch.func's transforms; autograd's is_grads_batched
        _library.impl(op, decomposed, key)


_library = cast(Any, torch.library).Library("rnn_ext", "IMPL")
_register(torch.ops.rnn_ext.rnn_cell.default, _RNNCell, _aten.rnn_cell)
_register(torch.ops.rnn_ext.rnn_cell_backward.default, _RNNCellBackward, _aten.rnn_cell_backward)
