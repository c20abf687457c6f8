"""The two tables of the notebook that this project grew from, to its four decimals."""

from __future__ import annotations

import pytest
import torch

import rnn_ext

X = torch.linspace(1, 100, 40).reshape(10, 4)

LAZY = [
    [-0.9995, 0.9993, -0.6410, -0.9888, -0.9710],
    [-1, 1, -0.9770, -1, -0.9900],
    [-1, 1, -0.9988, -1, -0.9966],
    [-1, 1, -0.9999, -1, -0.9988],
    [-1, 1, -1, -1, -0.9996],
    [-1, 1, -1, -1, -0.9999],
    *[[-1, 1, -1, -1, -1]] * 4,
]
CELL = [
    [-0.9997, -0.6290, 0.2617, 0.5288, 1],
    [-1, -0.9558, 0.9989, 1, 1],
    [-1, -0.9955, 1, 1, 1],
    [-1, -0.9996, 1, 1, 1],
    *[[-1, -1, 1, 1, 1]] * 6,
]
CELL_WEIGHT_IH_ROW = [-0.2633, 0.0833, -0.3467, -0.3100]
CELL_BIAS_HH = [-0.0080, -0.3368, -0.3450, -0.0246, 0.0671]


def assert_prints_as(result: torch.Tensor, table: list) -> None:
    """Equal to four decimals: within half a unit of the last one, and float32's rounding of the table."""
    torch.testing.assert_close(result, torch.tensor(table), rtol=0, atol=0.5e-4 + 1e-7)


@pytest.fixture
def cells() -> tuple[rnn_ext.RNNCell, rnn_ext.RNNCell]:
    """The lazy cell draws its parameters at its first call, so the call comes before the second cell is made."""
    torch.manual_seed(0)
    lazy = rnn_ext.LazyRNNCell(5)
    lazy(X)
    return lazy, rnn_ext.RNNCell(4, 5)


def test_the_lazy_cells_table(cells):
    assert_prints_as(cells[0](X), LAZY)


def test_the_second_cells_table(cells):
    assert_prints_as(cells[1](X), CELL)


def test_the_second_cells_parameters_come_next_from_the_generator(cells):
    assert_prints_as(cells[1].weight_ih[0], CELL_WEIGHT_IH_ROW)
    assert_prints_as(cells[1].bias_hh, CELL_BIAS_HH)
