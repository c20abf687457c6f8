"""What a layer is compared with: a loop of cells, row by row; and every way to call a layer."""

from __future__ import annotations

import pytest
import torch
from references import Arguments, random_arguments
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_ext
from rnn_ext import _aten

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}


def layer_arguments(steps: int = 5, batch: int = 4, input_size: int = 3, hidden_size: int = 2, **kwargs) -> Arguments:
    """The six tensors of a layer; its input is (T, B, I)."""
    args = random_arguments(batch, input_size, hidden_size, **kwargs)
    inputs = random_arguments(steps * batch, input_size, hidden_size, **kwargs).input
    return args._replace(input=inputs.view(steps, batch, input_size))


def loop_of_cells(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
    *,
    reverse: bool = False,
    batch_first: bool = False,
    lengths: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: each row by itself, a cell a step, over the row's own steps."""
    if batch_first:
        input = input.transpose(0, 1)
    steps, batch, _ = input.shape
    zero = input.new_zeros(weight_hh.size(0))
    outputs, states = [], []
    for row in range(batch):
        h = zero if hx is None else hx[row]
        length = steps if lengths is None else lengths[row]
        of_row = [zero] * steps
        for t in reversed(range(length)) if reverse else range(length):
            h = F.linear(input[t, row], weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)
            of_row[t] = h = ACTIVATIONS[nonlinearity](h)
        outputs.append(torch.stack(of_row))
        states.append(h)
    return torch.stack(outputs, 0 if batch_first else 1), torch.stack(states)


def packed(t: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The data of (T, B, ...) with sorted lengths, and the batch sizes."""
    data, batch_sizes, *_ = pack_padded_sequence(t, torch.tensor(lengths))
    return data, batch_sizes


def jagged(t: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The steps of each row of (T, B, ...) together, and the lengths."""
    return torch.cat([t[:n, row] for row, n in enumerate(lengths)]), torch.tensor(lengths)


# How flat data is made, its lengths, and the place of its numbers: the operator's arguments lengths and batch_sizes.
FLAT = {
    "packed": (packed, [5, 4, 2, 2], lambda numbers: (None, numbers)),
    "jagged": (jagged, [2, 5, 0, 3], lambda numbers: (numbers, None)),
}
every_flat_layout = pytest.mark.parametrize("flatten, lengths, place", FLAT.values(), ids=FLAT.keys())


def through_function(*tensors, nonlinearity="tanh", reverse=False, batch_first=False, lengths=None):
    return rnn_ext.rnn_layer(*tensors, nonlinearity, reverse=reverse, lengths=lengths, batch_first=batch_first)


def through_operator(*tensors, nonlinearity="tanh", reverse=False, batch_first=False, lengths=None):
    lengths = None if lengths is None else torch.tensor(lengths)
    return torch.ops.rnn_ext.rnn_layer(*tensors, nonlinearity, reverse, batch_first, lengths)


def through_composition(*tensors, nonlinearity="tanh", reverse=False, batch_first=False, lengths=None):
    lengths = None if lengths is None else torch.tensor(lengths)
    return _aten.rnn_layer(*tensors, nonlinearity, reverse, batch_first, lengths)


def through_steps(*tensors, nonlinearity="tanh", reverse=False, batch_first=False, lengths=None):
    """The composition as transforms take it, without ATen's own layer."""
    in_whole, _aten._in_whole = _aten._in_whole, _aten._in_parts
    try:
        return through_composition(
            *tensors, nonlinearity=nonlinearity, reverse=reverse, batch_first=batch_first, lengths=lengths
        )
    finally:
        _aten._in_whole = in_whole


NODES = {"function": through_function, "operator": through_operator}  # of the graph: in C++, and in Python
ENTRIES = {**NODES, "composition": through_composition, "steps": through_steps}
