"""What python -m rnn_ext --explain ... --cpu says is what runs, with the kernels of every instruction set.

No profiler sees a choice between kernels, but each adds up in an order of its own, which its bits tell.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from test_cpu_capabilities import CAPABILITIES, run, skip_unless_usable

from rnn_ext.__main__ import explain_cpu

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def runs(direction: str, batch: int, input_size: int, hidden_size: int, dtype: torch.dtype) -> str:
    """What --explain says of a direction."""
    text = explain_cpu([str(batch), str(input_size), str(hidden_size), str(dtype).removeprefix("torch.")])
    (said,) = re.findall(rf"^{direction} runs: (.*)$", text, re.MULTILINE)
    return said


def only_rounding_errors(batch: int, input_size: int, hidden_size: int, dtype: torch.dtype):
    """x and W whose products cancel, so that another order of the terms leaves something else, in any precision."""
    order = torch.randperm(input_size)
    x, weight = (torch.randn(rows, input_size // 2).pow(3).to(dtype) for rows in (batch, hidden_size))
    return torch.cat([x, -x], 1)[:, order], torch.cat([weight, weight], 1)[:, order]


def check_the_rows_of_each_kernel() -> None:
    """Rows in panels differ from rows one by one, and the rows by dot products don't."""
    for dtype in DTYPES:
        for units in (47, 48):
            for batch in (1, 5, 12, 13, 16, 20, 29, 31, 32, 33, 44, 45):
                x, weight = only_rounding_errors(batch, 64, units, dtype)
                h, u = torch.zeros(batch, units, dtype=dtype), torch.zeros(units, units, dtype=dtype)
                output = torch.ops.rnn_ext.rnn_cell(x, h, weight, u, None, None, "tanh")
                for_one = torch.ops.rnn_ext.rnn_cell
                rows = [for_one(x[i : i + 1], h[:1], weight, u, None, None, "tanh")[0] for i in range(batch)]
                alike = [bool(torch.equal(output[i], rows[i])) for i in range(batch)]
                said = runs("forward", batch, 64, units, dtype)
                dots = int((re.findall(r"dot_products for (\d+) rows", said) or [0])[0])
                in_panels = int((re.findall(r"(?:outer_products|pairs) for (\d+) rows", said) or [0])[0])
                assert dots + in_panels == batch, said
                assert alike == [False] * in_panels + [True] * dots, (dtype, units, batch, said)


def composed(x, h, g, weight, u, b):
    """The same by ATen's GEMMs: with relu nothing else rounds, but for the biases' sum."""
    z = torch.addmm(torch.mm(x, weight.t()), h, u.t())
    y = (z + (b + b)).relu()
    dz = g * (y > 0)
    return y, [dz @ weight, dz @ u, dz.t() @ x, dz.t() @ h]


def check_where_atens_gemm_takes_over() -> None:
    """At every threshold of any CPU, and just below it; with sums so long that two kernels' are never the same."""
    sizes = [(1, 573, 300), (1, 574, 300), (8, 511, 512), (8, 512, 512), (8, 1535, 512), (8, 1536, 512)]
    sizes += [(204, 704, 320), (205, 704, 320), (409, 704, 320), (410, 704, 320), (819, 704, 320), (820, 704, 320)]
    for dtype in (torch.float32, torch.float64):
        for batch, inputs, units in sizes:
            x, h, g = torch.randn(batch, inputs), torch.randn(batch, units), torch.randn(batch, units)
            tensors = [t.to(dtype) for t in (x, h, g, torch.randn(units, inputs), torch.randn(units, units))]
            x, h, g, weight, u = tensors
            b = torch.randn(units, dtype=dtype)
            y, gradients = composed(x, h, g, weight, u, b)
            output = torch.ops.rnn_ext.rnn_cell(x, h, weight, u, b, b, "relu")
            case = (batch, inputs, units, dtype)
            if torch.equal(output, y) != ("aten_gemm" in runs("forward", *case)):
                raise AssertionError(f"forward of {case}: {runs('forward', *case)}")
            ours = torch.ops.rnn_ext.rnn_cell_backward(g, y, x, h, weight, u, "relu", [True] * 6)
            equal = all(map(torch.equal, ours[:4], gradients))
            if equal != ("aten_gemm" in runs("backward", *case)):
                raise AssertionError(f"backward of {case}: {runs('backward', *case)}")


def check_threads(*sizes: int) -> None:
    """In a process that has started none before."""
    batch, inputs, units = sizes
    torch.set_num_threads(2)
    x, h = torch.zeros(batch, inputs), torch.zeros(batch, units)
    weight, u = torch.zeros(units, inputs), torch.zeros(units, units)

    def started() -> int:
        return len(os.listdir("/proc/self/task"))

    before = started()
    y = torch.ops.rnn_ext.rnn_cell(x, h, weight, u, None, None, "tanh")
    after_forward = started()
    said = runs("forward", *sizes, torch.float32)
    assert re.search(rf"on {1 + after_forward - before} thread", said), said
    torch.ops.rnn_ext.rnn_cell_backward(y, y, x, h, weight, u, "tanh", [True] * 6)
    said = runs("backward", *sizes, torch.float32)
    assert re.search(rf"on {1 + started() - before} thread", said), said


def check_where_the_backward_takes_pairs() -> None:
    """Pairs round dz to bfloat16, other kernels don't: neighbours in dz are subtracted, which shows it."""
    for batch, units in ((7, 64), (8, 64), (64, 7), (64, 8), (300, 300)):
        inputs = units - 1
        x, h, g, y = (torch.rand(batch, size).bfloat16() for size in (inputs, units, units, units))
        weight = (torch.eye(units, inputs) - torch.eye(units + 1, inputs)[1:]).bfloat16()
        ours = torch.ops.rnn_ext.rnn_cell_backward(
            g, y, x, h, weight, torch.zeros(units, units).bfloat16(), "tanh", [True] * 6
        )
        dz = g.float() * ((1 - y.float()) * (1 + y.float()))
        as_pairs, as_it_is = ((t @ weight.float()).bfloat16() for t in (dz.bfloat16().float(), dz))
        assert not torch.equal(as_pairs, as_it_is)
        said = runs("backward", batch, inputs, units, torch.bfloat16)
        assert torch.equal(ours[0], as_pairs if said.startswith("pairs") else as_it_is), (batch, units, said)


def check(capability: str, call: str) -> None:
    skip_unless_usable(capability)
    here = str(Path(__file__).parent)
    code = f"import sys, torch; sys.path.insert(0, {here!r}); torch.manual_seed(0); import test_cpu_plan as t; t.{call}"
    result = run(capability, "-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_row_goes_through_the_kernel_that_is_named(capability):
    check(capability, "check_the_rows_of_each_kernel()")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_atens_gemm_runs_where_it_is_named(capability):
    check(capability, "check_where_atens_gemm_takes_over()")


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
@pytest.mark.parametrize("sizes", [(10, 4, 5), (64, 128, 128)])
def test_as_many_threads_start_as_are_named(sizes):
    check("avx2", f"check_threads{sizes}")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_backward_takes_pairs_where_they_are_named(capability):
    check(capability, "check_where_the_backward_takes_pairs()")
