"""Autograd for ``torch.ops.rnn_ext``: the operators' schemas and kernels are registered in ``csrc/ops*.cpp``.

Eager calls of :func:`rnn_ext.rnn_cell` don't come here: :class:`rnn_ext.RNNCellFunction` costs a quarter of what
``register_autograd`` does. Compiled graphs, autocast and direct calls do.
"""

from typing import Any

import torch
from torch import Tensor

from . import _aten
from .autograd import save_for_backward, spread_gradients


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, hx, weight_ih, weight_hh, _, _, ctx.nonlinearity = inputs
    save_for_backward(ctx, output, input, hx, weight_ih, weight_hh)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad)  # shorter than the schema where trailing arguments have their defaults
    mask = (needs + [False] * 6)[:6]
    gradients = torch.ops.rnn_ext.rnn_cell_backward(grad_output, *ctx.saved_tensors, ctx.nonlinearity, mask)
    return spread_gradients(gradients, needs)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _double_backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Differentiates the ATen formulas: without this the operator's second derivative would be silently wrong."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that the output's own dependence on the weights is left to the graph that the engine is walking.
        saved: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
        outputs = _aten.rnn_cell_backward(*saved, *ctx.options)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad and g is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [t for t, need in zip(saved, ctx.needs_input_grad, strict=False) if need],
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    return spread_gradients(list(found), ctx.needs_input_grad)


torch.library.register_autograd("rnn_ext::rnn_cell", _backward, setup_context=_save_forward)
torch.library.register_autograd("rnn_ext::rnn_cell_backward", _double_backward, setup_context=_save_backward)
