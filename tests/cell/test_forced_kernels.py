"""Every kernel that the dispatch has for the GPU at hand, forced, against float64. Without a GPU: the list of them."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
from references import Arguments, float64_reference, output_and_gradients, random_arguments
from torch import Tensor

from rnn_ext import _C, rnn_cell
from rnn_ext.__main__ import describe_gpu

VARIABLES = {"forward": "RNN_EXT_KERNEL", "backward": "RNN_EXT_BACKWARD_KERNEL"}

# (B, I, H): few rows; ragged tiles of which TMA takes the rows; sums longer than a ring of stages, over
# several columns of tiles; odd rows. A kernel runs on those that it takes.
SIZES = [(5, 264, 72), (130, 264, 72), (300, 520, 328), (33, 77, 130)]

# |got - want| / (|want| + the root of the mean of want²), of any element: some roundings of the inputs (tf32) or of h'
# and dz, far under what a product too many or too few does.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TF32_TOLERANCE = 1e-2


class Kernel(NamedTuple):
    direction: str
    dtype: torch.dtype
    name: str

    def __str__(self) -> str:
        return f"{self.direction}-{self.name}-{str(self.dtype).removeprefix('torch.')}"


def explain(direction: str, sizes: tuple[int, int, int], dtype: torch.dtype, tf32: bool, forced: str = "") -> str:
    variables = [forced if d == direction else "" for d in VARIABLES]
    text = _C.explain(*sizes, dtype, *describe_gpu(None), tf32, "1", *variables)
    forward, backward = text.split("\nbackward: ")
    return forward if direction == "forward" else backward


def runs(kernel: Kernel) -> list[tuple[tuple[int, int, int], str, bool]]:
    """Sizes that the kernel takes on this GPU, whole and with K split in both ways; whether tf32 must be allowed."""
    found = []
    for sizes in SIZES:
        for form in (kernel.name, f"{kernel.name}:2", f"{kernel.name}:2:workspace"):
            for tf32 in (False, True):
                try:
                    explain(kernel.direction, sizes, kernel.dtype, tf32, form)
                except ValueError:
                    continue
                found.append((sizes, form, tf32))
                break
    return found


def names(direction: str, dtype: torch.dtype) -> list[str]:
    return sorted(set(re.findall(r"^ +(?:[\d.]+|-)  (\S+) ", explain(direction, SIZES[0], dtype, True), re.MULTILINE)))


EVERY = [
    Kernel(direction, dtype, name) for direction in VARIABLES for dtype in TOLERANCE for name in names(direction, dtype)
]
KERNELS = [kernel for kernel in EVERY if runs(kernel)]


def wrong(results: dict[str, Tensor], args: Arguments, grad_output: Tensor, tolerance: float) -> list[str]:
    """The results that are not within the tolerance, with the worst of their errors; NaN never is."""
    found = []
    reference = float64_reference(args.map(Tensor.cpu), "tanh", grad_output.cpu())
    for name, got in results.items():
        want = reference[name]
        error = float(((got.cpu().double() - want).abs() / (want.abs() + want.square().mean().sqrt())).max())
        if not error <= tolerance:
            found.append(f"{name}: {error:.1e}")
    return found


def failures(kernel: Kernel, device: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is wrong with the kernel's results on everything that it takes."""
    found = []
    for sizes, form, tf32 in runs(kernel):
        print(f"{kernel}: {form} {sizes}", flush=True)  # the last line of a kernel that hangs
        monkeypatch.setenv(VARIABLES[kernel.direction], form)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        args = random_arguments(*sizes, dtype=kernel.dtype, device=device)
        grad_output = torch.randn(sizes[0], sizes[2], dtype=torch.float64).to(device, kernel.dtype)
        if kernel.direction == "forward":
            results = {"output": rnn_cell(*args)}
        else:
            results = output_and_gradients(rnn_cell, args, "tanh", grad_output)
        tolerance = TF32_TOLERANCE if tf32 else TOLERANCE[kernel.dtype]
        found += [f"{form} {sizes}: {text}" for text in wrong(results, args, grad_output, tolerance)]
    return found


@pytest.fixture
def matmul_precision():
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.cuda
@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_forced_kernel(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failures(kernel, "cuda", monkeypatch)


@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("direction", VARIABLES)
def test_what_a_gpu_would_run_passes_with_the_cpus_kernels(direction, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the variables force nothing, but all else is as on a GPU."""
    kernel = [kernel for kernel in KERNELS if (kernel.direction, kernel.dtype) == (direction, dtype)][-1]
    assert not failures(kernel, "cpu", monkeypatch)


@pytest.mark.parametrize("direction", VARIABLES)
def test_every_kernel_of_the_dispatch_is_forced_on_some_gpu(direction: str) -> None:
    with pytest.raises(ValueError, match="there is no such kernel; there are ") as error:
        explain(direction, SIZES[0], torch.float32, True, "none")
    table = set(re.findall(r"\w+", str(error.value).partition("there are ")[2].splitlines()[0]))
    assert len(table) > 4
    assert {kernel.name for kernel in EVERY if kernel.direction == direction} == table
    for kernel in set(EVERY) - set(KERNELS):  # only for want of such a GPU
        with pytest.raises(ValueError, match=r"it is not for compute capability|library was compiled without 9\.0a"):
            explain(kernel.direction, SIZES[1], kernel.dtype, True, kernel.name)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_comparison_accepts_right_results_and_sees_a_missing_slice(sizes, dtype: torch.dtype) -> None:
    args = random_arguments(*sizes, dtype=dtype)
    grad_output = torch.randn(sizes[0], sizes[2]).to(dtype)
    results = output_and_gradients(rnn_cell, args, "tanh", grad_output)
    assert not wrong(results, args, grad_output, TOLERANCE[dtype])

    less = args._replace(hx=args.hx.clone())
    less.hx[:, -8:] = 0
    found = wrong(output_and_gradients(rnn_cell, less, "tanh", grad_output), args, grad_output, TOLERANCE[dtype])
    assert {"output", "weight_hh"} <= {text.partition(":")[0] for text in found}

    results["hx"][-1, -1] = torch.nan
    assert wrong(results, args, grad_output, TOLERANCE[dtype]) == ["hx: nan"]
