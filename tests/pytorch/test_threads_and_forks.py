"""Threads and processes: the kernels keep no state between calls."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from entries import every_module, first
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import rnn_ext

THREADS = 8


def output_and_gradients(cell: nn.Module, x: Tensor) -> list[Tensor]:
    output = first(cell(x))
    return [output.detach(), *torch.autograd.grad(output.sum(), list(cell.parameters()))]


@every_module
def test_eight_threads_at_once_each_get_their_own_results(cls, shape, device):
    """A shared module, and in every thread another batch; the backward passes share autograd's threads."""
    cell = cls(30, 40, device=device)
    inputs = [torch.randn(*shape[:-2], 8 + i, 30, device=device) for i in range(THREADS)]
    expected = [output_and_gradients(cell, x) for x in inputs]
    start = Barrier(THREADS)

    def work(x: Tensor) -> list[list[Tensor]]:
        start.wait()
        return [output_and_gradients(cell, x) for _ in range(50)]

    with ThreadPoolExecutor(THREADS) as pool:
        for results, wanted in zip(pool.map(work, inputs), expected, strict=True):
            for result in results:
                assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_cell_that_is_worth_it_uses_as_many_threads_as_torch_has():
    """Built without OpenMP, at::parallel_for runs in one thread and says nothing."""
    count = (
        "import os, torch, rnn_ext\n"
        "torch.set_num_threads(4)\n"
        "cell, x = rnn_ext.RNNCell(100, 120), torch.randn(64, 100)\n"
        "threads = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = threads()\n"
        "cell(x)\n"
        "print(threads() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 3


class Batches(Dataset):
    """What a cell makes of them, computed where an item is asked for."""

    def __init__(self, f, cls: type[nn.Module]) -> None:
        self.cell = cls(300, 400)
        self.x = torch.randn(4, *(() if cls is rnn_ext.RNNCell else (3,)), 64, 300)
        self.f = f

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.f(self.cell, self.x[i])


def output_alone(cell: nn.Module, x: Tensor) -> list[Tensor]:
    return [first(cell(x)).detach()]


def check_forked_workers(f, cls: type[nn.Module]) -> None:
    data = Batches(f, cls)
    expected = list(data)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for result, wanted in zip(loader, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.parametrize("f", [output_alone, output_and_gradients])
@every_module
def test_the_forked_workers_of_a_data_loader_work_after_use_in_the_parent(cls, shape, f):
    """Work large enough for the parent to have started its threads, none of which a child inherits.

    The parent is a new process: in this one another test may have started autograd's threads, and then autograd itself
    refuses to run in a fork.
    """
    parent = multiprocessing.get_context("spawn").Process(target=check_forked_workers, args=(f, cls))
    parent.start()
    parent.join(120)
    assert parent.exitcode == 0


TOO_LARGE = """
import resource, torch, rnn_ext
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
x, y = torch.zeros(1, 1).expand(1 << 28, 1), torch.zeros(1, 64).expand(1 << 28, 64)
try:
    torch.ops.rnn_ext.rnn_cell_backward(y, y, x, None, None, None, "tanh", [False, False, True, False, True, False])
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory")
def test_a_backward_without_the_memory_it_needs_says_how_much_it_wanted():
    """Operands of stride 0 take no memory, and the gradients little: dz alone does."""
    result = subprocess.run([sys.executable, "-c", TOO_LARGE], capture_output=True, text=True)
    assert f"you tried to allocate {4 * (64 << 28)} bytes" in result.stdout, result.stderr
