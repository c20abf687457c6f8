"""What a backward pass on the CPU takes while it runs, by PyTorch's own profiler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import rnn_ext

CONSTANT = 1 << 20  # bytes that don't grow with the sizes


def peak_of(work: Callable[[], object]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    assert peak > 0
    return peak


def peak_of_backward(module: type[torch.nn.RNNCell], batch: int, size: int, dtype: torch.dtype, expanded: bool) -> int:
    cell = module(size, size, dtype=dtype)
    x, h = (torch.randn(batch, size, dtype=dtype, requires_grad=True) for _ in range(2))
    output = cell(x, h)
    gradient = torch.ones((), dtype=dtype).expand_as(output) if expanded else torch.ones_like(output)
    return peak_of(lambda: output.backward(gradient))


@pytest.mark.parametrize("expanded", [False, True], ids=["contiguous", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "size"), [(40000, 64), (32768, 256), (200000, 10)])
def test_a_backward_takes_no_more_memory_than_eager(batch, size, dtype, expanded):
    eager, ours = (peak_of_backward(m, batch, size, dtype, expanded) for m in (torch.nn.RNNCell, rnn_ext.RNNCell))
    assert ours <= eager + CONSTANT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (784, 32, 1, 128),
        (500, 8, 32, 64),
        (512, 16, 128, 256),
        (16, 4, 900, 1000),
        pytest.param((50, 16, 1760, 1760), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_training_step_takes_less_memory_than_nn_rnns(shape, dtype):
    """Also of a few steps with large weights. In between, the packed weights and a block of rows in the accumulation
    type can be more than what is saved elsewhere."""
    steps, batch, input_size, hidden_size = shape

    def peak(module: type[torch.nn.RNN]) -> int:
        rnn = module(input_size, hidden_size, dtype=dtype)
        x = torch.randn(steps, batch, input_size, dtype=dtype, requires_grad=True)
        return peak_of(lambda: rnn(x)[0].sum().backward())

    assert peak(rnn_ext.RNN) < peak(torch.nn.RNN)
