"""Derivatives of a layer: every order, every mode, exactly those that are asked for, and what is saved for them."""

from __future__ import annotations

import itertools

import pytest
import torch
from references import NONLINEARITIES, Arguments
from sequences import NODES, every_flat_layout, layer_arguments, loop_of_cells
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import rnn_ext

every_node = pytest.mark.parametrize("layer", NODES.values(), ids=NODES.keys())
every_nonlinearity = pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
VARIANTS = {
    "all": ({}, {}),
    "no_hx_reverse": ({"hx": False}, {"reverse": True}),
    "no_bias_batch_first": ({"bias": "none"}, {"batch_first": True}),
    "lengths": ({}, {"lengths": [1, 0, 3]}),
    "lengths_reverse": ({"hx": False, "bias": "ih"}, {"lengths": [2, 3, 1], "reverse": True}),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def small(**kwargs) -> Arguments:
    return layer_arguments(3, 3, 2, 2, **kwargs).leaves()


def of_present(layer, args: Arguments, **options):
    """`layer` as a function of the arguments that are not None, which is what gradcheck wants."""

    def f(*present: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(present)
        return layer(*args.map(lambda _: next(given)), **options)

    return f, args.present()


@every_variant
@every_nonlinearity
@every_node
def test_first_derivatives_match_finite_differences(layer, nonlinearity, variant):
    f, inputs = of_present(layer, small(**variant[0]), nonlinearity=nonlinearity, **variant[1])
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@every_variant
@every_node
def test_second_derivatives_match_finite_differences(layer, variant):
    for nonlinearity in ("tanh", "sigmoid"):
        f, inputs = of_present(layer, small(**variant[0]), nonlinearity=nonlinearity, **variant[1])
        assert gradgradcheck(f, inputs, check_fwd_over_rev=True)


@every_flat_layout
@every_node
def test_derivatives_of_a_flat_layer_match_finite_differences(layer, flatten, lengths, place):
    op = torch.ops.rnn_ext.rnn_layer if layer is NODES["operator"] else rnn_ext.functional.run_layer
    lengths = [min(n, 3) for n in lengths[1:]]
    args = layer_arguments(3, len(lengths), 2, 2)
    data, numbers = flatten(args.input, lengths)
    args = args._replace(input=data).leaves()
    for reverse in (False, True):
        f, inputs = of_present(lambda *tensors, r=reverse: op(*tensors, "tanh", r, False, *place(numbers)), args)
        assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, inputs, check_fwd_over_rev=True)


def third_derivatives(layer, args: Arguments, directions, **options) -> list[Tensor]:
    leaves = args.leaves().present()
    f, _ = of_present(layer, args, **options)
    output, h_n = f(*leaves)
    value = output.pow(2).sum() + h_n.pow(3).sum()
    for direction in directions:
        slopes = torch.autograd.grad(value, leaves, create_graph=True)
        value = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))
    return list(torch.autograd.grad(value, leaves))


@every_variant
@every_nonlinearity
@every_node
def test_third_derivatives_equal_those_of_a_loop_of_cells(layer, nonlinearity, variant):
    args, options = small(**variant[0]), {"nonlinearity": nonlinearity, **variant[1]}
    directions = [[torch.randn_like(t) for t in args.present()] for _ in range(2)]
    ours = third_derivatives(layer, args, directions, **options)
    torch.testing.assert_close(ours, third_derivatives(loop_of_cells, args, directions, **options))


MASKS = list(itertools.product([False, True], repeat=6))


@every_node
@pytest.mark.parametrize("through", ["output", "h_n", "both"])
def test_exactly_the_asked_gradients_are_given(layer, through):
    values = layer_arguments()
    grads = [torch.randn(5, 4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)]
    chosen = {"output": slice(0, 1), "h_n": slice(1, 2), "both": slice(0, 2)}[through]
    everything = values.leaves()
    expected = torch.autograd.grad(loop_of_cells(*everything)[chosen], everything, grads[chosen])
    for mask in MASKS:
        leaves = [t.clone().requires_grad_(asked) for t, asked in zip(values, mask, strict=True)]
        results = layer(*leaves)
        assert all(t.requires_grad == any(mask) for t in results)
        if any(mask):
            torch.autograd.backward(results[chosen], grads[chosen])
        for leaf, asked, gradient in zip(leaves, mask, expected, strict=True):
            assert (leaf.grad is not None) == asked
            if asked:
                torch.testing.assert_close(leaf.grad, gradient)


@every_node
def test_without_hx_the_gradient_of_weight_hh_over_one_step_is_zeros(layer):
    args = layer_arguments(steps=1, hx=False).leaves()
    layer(*args)[0].sum().backward()
    assert torch.equal(args.weight_hh.grad, torch.zeros_like(args.weight_hh))


@every_node
def test_the_two_bias_gradients_are_not_one_tensor(layer):
    args = small()
    of_ih, of_hh = torch.autograd.grad(layer(*args)[0].sum(), [args.bias_ih, args.bias_hh])
    of_ih.mul_(2)
    torch.testing.assert_close(of_ih, 2 * of_hh)


@every_node
def test_a_retained_graph_gives_the_same_gradients_again(layer):
    args = small()
    output, h_n = layer(*args)
    loss = output.sum() + h_n.sum()
    first = torch.autograd.grad(loss, args, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, args), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, args)


# What is saved

SAVED = ["input", "hx", "weight_ih", "weight_hh"]


@every_node
@pytest.mark.parametrize("changed", [*SAVED, "output"])
def test_an_in_place_change_of_what_is_saved_is_caught(layer, changed):
    args = small()
    copies = args.map(lambda t: t * 1)
    output, h_n = layer(*copies)
    with torch.no_grad():
        (output if changed == "output" else getattr(copies, changed)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (output.sum() + h_n.sum()).backward()


@every_node
def test_h_n_and_the_biases_may_be_changed_in_place(layer):
    args = small()
    copies = args.map(lambda t: t * 1)
    output, h_n = layer(*copies)
    expected = torch.autograd.grad(output.sum() + h_n.sum(), args, retain_graph=True)
    with torch.no_grad():
        for t in (h_n, copies.bias_ih, copies.bias_hh):
            t.add_(1)
    torch.testing.assert_close(torch.autograd.grad(output.sum() + h_n.sum(), args), expected)


def saved_by(f) -> list[Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        f()
    return saved


@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh"])
@every_node
def test_a_frozen_weight_saves_nothing_for_itself(layer, frozen):
    args = small()
    operand = {"weight_ih": "input", "weight_hh": "hx"}[frozen]
    pointer = getattr(args, operand).data_ptr()
    assert pointer in [t.data_ptr() for t in saved_by(lambda: layer(*args))]
    getattr(args, frozen).requires_grad_(False)
    assert pointer not in [t.data_ptr() for t in saved_by(lambda: layer(*args))]


@every_node
def test_an_input_without_a_gradient_saves_no_weight_ih(layer):
    args = small()
    assert args.weight_ih.data_ptr() in [t.data_ptr() for t in saved_by(lambda: layer(*args))]
    args.input.requires_grad_(False)
    assert args.weight_ih.data_ptr() not in [t.data_ptr() for t in saved_by(lambda: layer(*args))]


@pytest.mark.parametrize("options", [{}, {"num_layers": 3}, {"bidirectional": True}], ids=str)
def test_no_more_bytes_are_saved_than_nn_rnn_saves(options):
    x = torch.randn(32, 8, 16, requires_grad=True)
    sizes = []
    for cls in (nn.RNN, rnn_ext.RNN):
        rnn = cls(16, 24, **options)
        known = {p.data_ptr() for p in rnn.parameters()} | {x.data_ptr()}
        saved = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved_by(lambda r=rnn: r(x))}
        sizes.append(sum(size for pointer, size in saved.items() if pointer not in known))
    assert sizes[1] <= 1.1 * sizes[0]


# NaN and infinity


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nan_and_infinity_spread_as_in_nn_rnn(nonlinearity, value):
    torch.manual_seed(0)
    theirs = nn.RNN(3, 5, nonlinearity=nonlinearity, dtype=torch.float64)
    ours = rnn_ext.RNN(3, 5, nonlinearity=nonlinearity, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    inputs = torch.randn(6, 4, 3, dtype=torch.float64), torch.randn(1, 4, 5, dtype=torch.float64)
    for place in ((0, (2, 1, 0)), (1, (0, 3, 2))):
        results = []
        for rnn in (theirs, ours):
            x, hx = (t.clone() for t in inputs)
            (x, hx)[place[0]][place[1]] = value
            x.requires_grad_()
            output, h_n = rnn(x, hx.requires_grad_())
            gradients = torch.autograd.grad(output.sum() + h_n.sum(), [x, hx, *rnn.parameters()])
            results.append([output, h_n, *gradients])
        torch.testing.assert_close(*results, equal_nan=True)
