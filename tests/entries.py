"""Every way to call the cell, with the signature of rnn_ext.rnn_cell, and the operators that a call runs."""

from __future__ import annotations

import pytest
import torch
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


ENTRIES = {"function": rnn_cell, "module": through_module, "operator": through_operator}
every_entry = pytest.mark.parametrize("cell", ENTRIES.values(), ids=ENTRIES.keys())


def operators_run(f) -> list[str]:
    """The names that the profiler records while f runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        f()
    return [event.name for event in profile.events()]
