"""Every way to call the cell, with the signature of rnn_ext.rnn_cell, and the operators that a call runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import rnn_ext
from rnn_ext import rnn_cell


def through_module(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, nonlinearity="tanh"):
    cell = rnn_ext.RNNCell(*weight_ih.shape[::-1], bias_ih is not None, nonlinearity, "meta")
    parameters = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
    return functional_call(cell, {k: v for k, v in parameters.items() if v is not None}, (input, hx))


def through_operator(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, nonlinearity="tanh"):
    return torch.ops.rnn_ext.rnn_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)


def through_autograd_function(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, nonlinearity="tanh"):
    return rnn_ext.RNNCellFunction.apply(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)


# A module of each kind, and the shape of an input: a step of a batch, or a sequence of steps.
MODULES = {"cell": (rnn_ext.RNNCell, (3, 7)), "sequence": (rnn_ext.RNN, (6, 3, 7))}
every_module = pytest.mark.parametrize("cls, shape", MODULES.values(), ids=MODULES.keys())


def first(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The output of a cell or of an RNN."""
    return output if isinstance(output, Tensor) else output[0]


def values_and_gradients(module: nn.Module, call, *inputs: Tensor) -> list[Tensor]:
    """Of a call of the module, or of what stands for it: all outputs, and the parameters' gradients."""
    outputs = call(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else [*outputs]
    return [*outputs, *torch.autograd.grad(sum(t.pow(2).sum() for t in outputs), list(module.parameters()))]


ENTRIES = {"function": rnn_cell, "module": through_module, "operator": through_operator}
every_entry = pytest.mark.parametrize("cell", ENTRIES.values(), ids=ENTRIES.keys())


def operators_run(f) -> list[str]:
    """The names that the profiler records while f runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        f()
    return [event.name for event in profile.events()]
