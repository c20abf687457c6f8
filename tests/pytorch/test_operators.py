"""The operators under the cell: their registrations, what the compiler makes of them, and that eager calls use them."""

from __future__ import annotations

import contextlib
import itertools
import re

import pytest
import torch
from entries import every_module, operators_run, values_and_gradients
from references import (
    ARGUMENTS,
    NONLINEARITIES,
    Arguments,
    float64_reference,
    random_arguments,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

import rnn_ext

rnn_cell_op = torch.ops.rnn_ext.rnn_cell
rnn_cell_backward_op = torch.ops.rnn_ext.rnn_cell_backward

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VARIANTS = {"all": {}, "no_hx": {"hx": False}, "no_bias": {"bias": "none"}, "bias_hh_only": {"bias": "hh"}}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def backward_arguments(args: Arguments, nonlinearity: str, mask: list[bool]) -> tuple:
    output = rnn_cell_op(*args, nonlinearity)
    return (torch.randn_like(output), output, *args[:4], nonlinearity, mask)


# Registrations


@every_variant
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_the_forward_operator_is_registered_soundly(dtype, requires_grad, variant, device):
    args = random_arguments(dtype=dtype, device=device, **variant).map(lambda t: t.requires_grad_(requires_grad))
    for nonlinearity in NONLINEARITIES if dtype == torch.float32 else ("tanh",):
        opcheck(rnn_cell_op, (*args, nonlinearity))


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_the_backward_operator_is_registered_soundly(dtype, requires_grad, hx, device):
    args = random_arguments(dtype=dtype, device=device, hx=hx)
    for mask in ([True, hx, True, True, True, True], [False, False, True, False, False, True]):
        grad_output, output, *rest = backward_arguments(args, "tanh", mask)
        tensors = (grad_output, output, *rest[:4])
        leaves = (None if t is None else t.detach().requires_grad_(requires_grad) for t in tensors)
        opcheck(rnn_cell_backward_op, (*leaves, *rest[4:]))


# The shape of a layer's data of six rows, and what says so: lengths and batch_sizes.
LAYOUTS = {
    "padded": ((3, 3), None, None),
    "lengths": ((3, 3), [3, 0, 2], None),
    "packed": ((6,), None, [3, 2, 1]),
    "jagged": ((6,), [1, 3, 2], None),
}
every_layout = pytest.mark.parametrize("rows, lengths, batch_sizes", LAYOUTS.values(), ids=LAYOUTS.keys())


def layer_arguments(rows, lengths, batch_sizes, hx: bool = True) -> tuple[list, list]:
    """The layer's tensors and its options, after the nonlinearity."""
    tensors = [torch.randn(size, requires_grad=True) for size in ((*rows, 4), (3, 5), (5, 4), (5, 5), (5,), (5,))]
    tensors[1] = tensors[1] if hx else None
    numbers = [None if n is None else torch.tensor(n) for n in (lengths, batch_sizes)]
    return tensors, [False, False, *numbers]


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
@every_layout
def test_the_layers_operator_is_registered_soundly(rows, lengths, batch_sizes, hx):
    if batch_sizes is not None and not hx:
        pytest.skip("only the numbers in batch_sizes say how many rows h_n has, and fake tensors have no numbers")
    tensors, options = layer_arguments(rows, lengths, batch_sizes, hx)
    opcheck(torch.ops.rnn_ext.rnn_layer, (*tensors, "tanh", *options))


@every_layout
def test_the_layers_backward_operator_is_registered_soundly(rows, lengths, batch_sizes):
    """Of flat data, a graph whose sizes are symbols has no second derivative: its formula must know the numbers."""
    tensors, options = layer_arguments(rows, lengths, batch_sizes)
    output, h_n = torch.ops.rnn_ext.rnn_layer(*tensors, "tanh", *options)
    saved = [torch.randn_like(output), torch.randn_like(h_n), output, *tensors[:4]]
    saved = [t.detach().requires_grad_(len(rows) == 2) for t in saved]
    for mask in ([True] * 6, [False, True, True, False, False, True]):
        opcheck(torch.ops.rnn_ext.rnn_layer_backward, (*saved, "tanh", mask, *options))


@every_layout
def test_the_layer_on_fake_tensors_predicts_shapes_and_strides(rows, lengths, batch_sizes):
    tensors, options = layer_arguments(rows, lengths, batch_sizes)
    real = torch.ops.rnn_ext.rnn_layer(*tensors, "tanh", *options)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in (*tensors, "tanh", *options)]
    with mode:
        for call in (torch.ops.rnn_ext.rnn_layer, rnn_ext.functional.run_layer):
            fake = call(*fakes)
            assert [(t.shape, t.stride(), t.dtype) for t in fake] == [(t.shape, t.stride(), t.dtype) for t in real]


@pytest.mark.parametrize("batch", [(), (1,), (3,)], ids=["unbatched", "one_row", "three_rows"])
def test_the_operator_on_fake_tensors_predicts_shape_dtype_and_strides(batch, device):
    args = random_arguments(3, dtype=torch.bfloat16, device=device)
    rows = {(): 0, (1,): slice(1), (3,): slice(3)}[batch]
    args = args._replace(input=args.input[rows], hx=args.hx[rows])
    real = rnn_cell_op(*args, "relu")
    with FakeTensorMode() as mode:
        fake = rnn_cell_op(*args.map(mode.from_tensor), "relu")
    assert (fake.shape, fake.dtype, fake.stride(), fake.device) == (real.shape, real.dtype, real.stride(), real.device)


# The argument that is wrong: its shape.
WRONG = {"input": (3, 4, 7), "hx": (4, 5), "weight_ih": (5, 6), "weight_hh": (6, 5), "bias_ih": (4,), "bias_hh": (5, 1)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("op", [rnn_cell_op, rnn_cell_backward_op], ids=["forward", "backward"])
@pytest.mark.parametrize("sizes", ["static", "symbolic"])
def test_the_operators_on_fake_tensors_refuse_what_they_do_on_real_ones(sizes, op, wrong, device):
    """With the same words: a graph with a mistake fails while it is traced, not when it runs."""
    args = random_arguments(device=device)._asdict()
    output = rnn_cell_op(*args.values())
    call = list((args | {wrong: torch.zeros(WRONG[wrong], dtype=output.dtype, device=device)}).values())
    if op is rnn_cell_backward_op:
        if wrong.startswith("bias"):
            pytest.skip("the backward operator takes no biases")
        call = [torch.zeros_like(output), output, *call[:4], "tanh", [True] * 6]
    fake = FakeTensorMode(shape_env=ShapeEnv() if sizes == "symbolic" else None)
    messages = []
    for convert, mode in ((lambda t: t, contextlib.nullcontext()), (fake.from_tensor, fake)):
        with mode, pytest.raises((RuntimeError, ValueError)) as error:
            op(*(convert(t) if isinstance(t, Tensor) else t for t in call))
        messages.append(re.sub(r"\bs?\d+\b", "N", str(error.value)) if sizes == "symbolic" else str(error.value))
    assert messages[0] == messages[1]
    assert any(word in messages[0] for word in ("got", "match", "must"))


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
def test_the_backward_operator_returns_the_asked_gradients_in_order(hx, nonlinearity, device):
    args = random_arguments(6, 9, 7, hx=hx, device=device)
    every = backward_arguments(args, nonlinearity, [True, hx, True, True, True, True])
    reference = float64_reference(args, nonlinearity, every[0])
    for mask in itertools.product([False, True], repeat=6):
        if mask[1] and not hx:
            continue
        gradients = rnn_cell_backward_op(*every[:-1], list(mask))
        expected = [reference[name] for name, asked in zip(ARGUMENTS, mask, strict=True) if asked]
        torch.testing.assert_close(list(gradients), expected)


def test_outputs_of_the_operators_own_their_memory(device):
    """A view of a saved buffer, or one gradient inside another, would break in-place updates."""
    args = random_arguments(device=device)
    tensors = [*args, *rnn_cell_backward_op(*backward_arguments(args, "tanh", [True] * 6))]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 12


# Eager calls


PLAIN_ATEN = {"aten::linear", "aten::addmm", "aten::mm", "aten::matmul", "aten::add_", "aten::tanh", "aten::sum"}
COPIES = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::zeros", "aten::cat"}


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_eager_calls_run_the_fused_operators_and_no_other(dtype, nonlinearity, device):
    """The ATen composition gives the right answer too: without this test nobody would notice it taking over."""
    cell = rnn_ext.RNNCell(7, 5, nonlinearity=nonlinearity, device=device, dtype=dtype)
    x, hx = (torch.randn(3, n).to(device, dtype).requires_grad_() for n in (7, 5))
    grad_output = torch.randn(3, 5).to(device, dtype)
    for h in (hx, None):
        forward = operators_run(lambda h=h: cell(x, h))
        assert forward.count("rnn_ext::rnn_cell") == 1
        assert not (PLAIN_ATEN | COPIES) & set(forward)
        output = cell(x, h)
        backward = operators_run(
            lambda output=output: torch.autograd.grad(output, [x, *cell.parameters()], grad_output)
        )
        assert backward.count("rnn_ext::rnn_cell_backward") == 1
        assert not PLAIN_ATEN & set(backward)
    with torch.no_grad():
        assert "rnn_ext::rnn_cell" in operators_run(lambda: cell(x[0], hx[0]))


@every_module
def test_deterministic_mode_changes_nothing(cls, shape, device):
    module, x = cls(7, 5, device=device), torch.randn(shape, device=device)
    expected = values_and_gradients(module, module, x)
    torch.use_deterministic_algorithms(True)
    try:
        results = [values_and_gradients(module, module, x) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for result in results:
        assert all(map(torch.equal, result, expected))


def test_strided_rows_are_read_in_place(device):
    """A slice of features and one step of a (B, T, I) sequence: no copy on the way in."""
    cell = rnn_ext.RNNCell(7, 5, device=device)
    sequence, hidden = torch.randn(3, 4, 7, device=device), torch.randn(3, 15, device=device)
    assert not COPIES & set(operators_run(lambda: cell(sequence[:, 1], hidden[:, 5:10])))
