"""rnn_layer equals a loop of cells, in values and gradients, whatever the layout; so do its formulas in ATen."""

from __future__ import annotations

import pytest
import torch
from references import Arguments
from sequences import ENTRIES, every_flat_layout, jagged, layer_arguments, loop_of_cells
from torch import Tensor

import rnn_ext
from rnn_ext import _aten

every_entry = pytest.mark.parametrize("layer", ENTRIES.values(), ids=ENTRIES.keys())
both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
VARIANTS = {"all": {}, "no_hx": {"hx": False}, "no_bias": {"bias": "none"}, "bias_ih_only": {"bias": "ih"}}
# The absent arguments are all the same to the nonlinearities.
CASES = [("tanh", variant) for variant in VARIANTS] + [("relu", "all"), ("sigmoid", "all")]
every_case = pytest.mark.parametrize(
    "nonlinearity, variant", [(f, VARIANTS[v]) for f, v in CASES], ids=["-".join(case) for case in CASES]
)
LAYOUTS = {
    "time_first": {},
    "batch_first": {"batch_first": True},
    "lengths": {"lengths": [2, 5, 0, 3]},
    "lengths_batch_first": {"lengths": [5, 0, 1, 5], "batch_first": True},
    "lengths_of_zero": {"lengths": [0, 0, 0, 0]},
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def arguments(variant: dict, layout: dict, **kwargs) -> Arguments:
    args = layer_arguments(**variant, **kwargs)
    if layout.get("batch_first"):
        args = args._replace(input=args.input.transpose(0, 1).contiguous())
    return args.leaves()


def gradients(results: tuple[Tensor, Tensor], args: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Zeros where nothing depends on an argument."""
    pairs = [(t, g) for t, g in zip(results, grads, strict=True) if t.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in args]
    outputs, seeds = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, args, seeds, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(args, found, strict=True)]


@every_layout
@both_directions
@every_case
@every_entry
def test_a_layer_equals_a_loop_of_cells(layer, nonlinearity, variant, reverse, layout):
    args = arguments(variant, layout)
    options = {"nonlinearity": nonlinearity, "reverse": reverse, **layout}
    ours, expected = layer(*args, **options), loop_of_cells(*args, **options)
    torch.testing.assert_close(ours, expected)
    assert ours[0].is_contiguous() and ours[1].is_contiguous()
    assert ours[0].untyped_storage().data_ptr() != ours[1].untyped_storage().data_ptr()
    grads = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(gradients(ours, args.present(), grads), gradients(expected, args.present(), grads))


@every_flat_layout
@both_directions
@every_case
def test_a_flat_layer_equals_a_loop_of_cells(nonlinearity, variant, reverse, flatten, lengths, place):
    args = arguments(variant, {})
    output, h_n = loop_of_cells(*args, nonlinearity=nonlinearity, reverse=reverse, lengths=lengths)
    expected = flatten(output, lengths)[0], h_n
    data, numbers = flatten(args.input, lengths)
    grads = [torch.randn_like(t) for t in expected]
    for layer in (rnn_ext.functional.run_layer, torch.ops.rnn_ext.rnn_layer, _aten.rnn_layer):
        ours = layer(data, *args[1:], nonlinearity, reverse, False, *place(numbers))
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(gradients(ours, args.present(), grads), gradients(expected, args.present(), grads))


@both_directions
def test_a_nested_layer_is_a_jagged_one(reverse):
    args = arguments({}, {})
    rows, lengths = jagged(args.input.detach(), [2, 5, 0, 3])
    x = torch.nested.nested_tensor_from_jagged(rows, lengths=lengths)
    output, h_n = rnn_ext.rnn_layer(x, *args[1:], reverse=reverse)
    expected = torch.ops.rnn_ext.rnn_layer(rows, *args[1:], "tanh", reverse, False, lengths)
    torch.testing.assert_close((output.values(), h_n), expected)
    assert output.offsets() is x.offsets()


@every_layout
@both_directions
@every_case
def test_the_backward_formulas_equal_the_derivative_of_the_layer(nonlinearity, variant, reverse, layout):
    args = arguments(variant, layout)
    lengths = torch.tensor(layout["lengths"]) if "lengths" in layout else None
    options = (reverse, bool(layout.get("batch_first")), lengths, None)
    results = _aten.rnn_layer(*args, nonlinearity, *options)
    mask = [t is not None for t in args]
    for given in ([True, True], [True, False], [False, True]):
        grads = [torch.randn_like(t) for t in results]
        expected = gradients(results, args.present(), [g * asked for g, asked in zip(grads, given, strict=True)])
        some = [g if asked else None for g, asked in zip(grads, given, strict=True)]
        ours = _aten.rnn_layer_backward(*some, results[0], *args[:4], nonlinearity, mask, *options)
        torch.testing.assert_close(ours, expected)


def test_an_unbatched_layer_equals_a_batch_of_one():
    args = arguments({"batch": 1}, {})
    for options in ({}, {"batch_first": True}, {"reverse": True}):
        output, h_n = rnn_ext.rnn_layer(args.input[:, 0], args.hx[0], *args[2:], **options)
        expected = loop_of_cells(*args, reverse=bool(options.get("reverse")))
        torch.testing.assert_close((output, h_n), (expected[0][:, 0], expected[1][0]))


@both_directions
@every_entry
def test_padding_may_be_nan(layer, reverse):
    """It is neither read nor computed, and takes no gradient; nor does it give one."""
    lengths = [4, 5, 0, 1]
    padding = torch.arange(5).unsqueeze(1) >= torch.tensor(lengths)
    args = arguments({}, {})
    results = []
    for value in (0.0, torch.nan):
        leaves = args._replace(input=args.input.detach().masked_fill(padding.unsqueeze(-1), value)).leaves()
        output, h_n = layer(*leaves, reverse=reverse, lengths=lengths)
        grad_output = torch.ones_like(output).masked_fill(padding.unsqueeze(-1), value)
        found = torch.autograd.grad([output, h_n], leaves, [grad_output, torch.ones_like(h_n)], create_graph=True)
        again = torch.autograd.grad(sum(g.pow(2).sum() for g in found), leaves.present())
        results.append([output, h_n, *found, *again])
    torch.testing.assert_close(*results)


@both_directions
@every_entry
def test_an_infinite_last_state_spoils_no_gradient_of_its_row(layer, reverse):
    """Steps after it, which are not computed, would multiply it by a gradient of zero."""
    args, lengths = layer_arguments(bias="none", hx=False), [2, 4, 1, 3]
    args = args._replace(weight_ih=args.weight_ih.abs())
    for row, n in enumerate(lengths):
        args.input[0 if reverse else n - 1, row] = torch.inf
    options = {"nonlinearity": "relu", "reverse": reverse, "lengths": lengths}
    found = []
    for f in (layer, loop_of_cells):
        leaves = args.leaves()
        output, h_n = f(*leaves, **options)
        assert h_n.isinf().all()
        found += torch.autograd.grad(output.sum() + h_n.sum(), leaves.weight_hh)
    assert found[0].isfinite().all()
    torch.testing.assert_close(*found)
