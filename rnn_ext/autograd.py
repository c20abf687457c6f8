"""RNNCellFunction: the fused forward and its hand-written backward as a torch.autograd.Function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C
from .functional import rnn_cell


class RNNCellFunction(torch.autograd.Function):
    """h' = f(x Wᵀ + b_ih + h Uᵀ + b_hh) with the fused kernels in both directions.

    Called as ``RNNCellFunction.apply(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)``; see
    :func:`rnn_ext.rnn_cell` for shapes and dtypes, and for a call that also takes what this one doesn't. An eager
    rnn_cell records the same in C++ (csrc/cell/autograd.cpp), where it costs less.

    The forward takes ``ctx`` (a separate ``setup_context`` costs seven times the call: it runs ``inspect.signature``).
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Function's own, or :func:`rnn_ext.rnn_cell` where that refuses: under torch.func and forward-mode AD."""
        if torch._C._are_functorch_transforms_active() or getattr(forward_ad, "_current_level", 0) >= 0:
            return rnn_cell(*args)
        return super().apply(*args)

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        hx: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        nonlinearity: str,
    ) -> Tensor:
        """The fused kernel; the output is saved in place of z, which no derivative needs."""
        op = torch.ops.rnn_ext.rnn_cell if torch.compiler.is_compiling() else _C.rnn_cell_below_autograd
        output = op(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)
        save_for_backward(ctx, output, input, hx, weight_ih, weight_hh)
        ctx.set_materialize_grads(False)
        ctx.nonlinearity = nonlinearity
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients that are needed, by the fused kernel.

        Under ``create_graph``, a functorch transform or forward-mode AD they come from ATen formulas on the saved
        tensors instead: the saved output is connected to the graph, so every further derivative follows.
        """
        if grad_output is None:
            return (None,) * 7
        output, *operands = ctx.saved_tensors
        needs = ctx.needs_input_grad
        op: Any = _C.rnn_cell_gradients
        if torch.compiler.is_compiling():
            op = torch.ops.rnn_ext.rnn_cell_backward
            operands = [None if t is None else t.to(output.dtype) for t in operands]  # as they were before autocast
        gradients = op(grad_output, output, *operands, ctx.nonlinearity, needs[:6])
        return spread_gradients(gradients, needs)


def save_for_backward(
    ctx: Any, output: Tensor, input: Tensor, hx: Tensor | None, weight_ih: Tensor, weight_hh: Tensor
) -> None:
    """Saves what the needed gradients are made of; the rest may be freed, or changed in place."""
    need_input, need_hx, need_weight_ih, need_weight_hh = ctx.needs_input_grad[:4]
    ctx.save_for_backward(
        output,
        input if need_weight_ih else None,
        hx if need_weight_hh else None,
        weight_ih if need_input else None,
        weight_hh if need_hx else None,
    )


def spread_gradients(gradients: list[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The asked gradients at the places of the arguments that need them."""
    asked = iter(gradients)
    return tuple(next(asked) if need else None for need in needs)
