"""Threads and processes: the kernels keep no state between calls."""

from __future__ import annotations

import torch
from torch import Tensor

import rnn_ext


def test_a_shared_cell_gives_the_same_gradients_from_many_threads():
    """Backward runs on autograd's threads and forward on the caller's; the kernels keep no state between calls."""
    from concurrent.futures import ThreadPoolExecutor

    cell = rnn_ext.RNNCell(30, 40)
    x = torch.randn(16, 30)

    def gradients(_) -> list[Tensor]:
        return list(torch.autograd.grad(cell(x).sum(), list(cell.parameters())))

    expected = gradients(None)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(gradients, range(40)):
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
