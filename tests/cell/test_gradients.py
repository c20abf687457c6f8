"""Derivatives: every order, every mode of differentiation, and exactly those that are asked for."""

from __future__ import annotations

import itertools

import pytest
import torch
from entries import ENTRIES
from references import ARGUMENTS, NONLINEARITIES, Arguments, eager_cell, random_arguments, small_arguments
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from rnn_ext import RNNCellFunction, rnn_cell


def through_autograd_function(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, nonlinearity="tanh"):
    return RNNCellFunction.apply(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)


# Every implementation of the node: rnn_cell's in C++, the operator's, and the public one.
NODES = {**ENTRIES, "autograd_function": through_autograd_function}
every_entry = pytest.mark.parametrize("cell", NODES.values(), ids=NODES.keys())
every_nonlinearity = pytest.mark.parametrize("nonlinearity", NONLINEARITIES)

# batched, unbatched, and with the optional arguments left out
VARIANTS = {
    "all": {},
    "no_hx": {"hx": False},
    "no_bias": {"bias": "none"},
    "bias_ih_only": {"bias": "ih"},
    "empty_batch": {"batch": 0},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def of_present(cell, args: Arguments, nonlinearity: str):
    """`cell` as a function of the arguments that are not None, which is what gradcheck wants."""

    def f(*present: Tensor) -> Tensor:
        given = iter(present)
        return cell(*args.map(lambda _: next(given)), nonlinearity)

    return f, args.present()


def unbatched(args: Arguments) -> Arguments:
    return args._replace(input=args.input[0], hx=args.hx[0]).leaves()


@every_variant
@every_nonlinearity
def test_first_derivatives_match_finite_differences(nonlinearity, variant, device):
    f, inputs = of_present(rnn_cell, small_arguments(device, **variant), nonlinearity)
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@every_variant
@every_nonlinearity
def test_second_derivatives_match_finite_differences(nonlinearity, variant, device):
    f, inputs = of_present(rnn_cell, small_arguments(device, **variant), nonlinearity)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@every_entry
@every_nonlinearity
def test_every_entry_point_is_twice_differentiable(cell, nonlinearity, device):
    """create_graph must differentiate the backward too: a backward without its own derivative is silently wrong."""
    f, inputs = of_present(cell, small_arguments(device), nonlinearity)
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@every_nonlinearity
def test_unbatched_derivatives_match_finite_differences(nonlinearity, device):
    f, inputs = of_present(rnn_cell, unbatched(small_arguments(device)), nonlinearity)
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True)


def third_derivatives(cell, args: Arguments, nonlinearity: str, directions: list[list[Tensor]]) -> list[Tensor]:
    leaves = args.leaves().present()
    f, _ = of_present(cell, args, nonlinearity)
    value = f(*leaves).pow(2).sum()
    for direction in directions:
        slopes = torch.autograd.grad(value, leaves, create_graph=True)
        value = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))
    return list(torch.autograd.grad(value, leaves))


@every_entry
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
@every_nonlinearity
def test_third_derivatives_equal_eager(cell, hx, nonlinearity, device):
    args = small_arguments(device, hx=hx)
    directions = [[torch.randn(t.shape, dtype=t.dtype).to(device) for t in args.present()] for _ in range(2)]
    ours = third_derivatives(cell, args, nonlinearity, directions)
    torch.testing.assert_close(ours, third_derivatives(eager_cell, args, nonlinearity, directions))


MASKS = list(itertools.product([False, True], repeat=6))


@every_entry
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "".join("01"[m] for m in mask))
def test_exactly_the_asked_gradients_are_given(cell, mask, device):
    values = random_arguments(device=device)
    grad_output = torch.randn(3, 5, dtype=torch.float64).to(device)

    def gradients(f) -> list[Tensor | None]:
        leaves = [t.clone().requires_grad_(m) for t, m in zip(values, mask, strict=True)]
        output = f(*leaves)
        assert output.requires_grad == any(mask)
        if any(mask):
            output.backward(grad_output)
        return [leaf.grad for leaf in leaves]

    ours = gradients(cell)
    assert tuple(g is not None for g in ours) == mask
    for name, g, expected in zip(ARGUMENTS, ours, gradients(eager_cell), strict=True):
        torch.testing.assert_close(g, expected, msg=lambda m, name=name: f"{name}: {m}")


@every_entry
def test_the_two_bias_gradients_are_not_one_tensor(cell, device):
    """They have equal values, but code that scales gradients in place (clipping) must not scale one twice."""
    args = small_arguments(device)
    of_ih, of_hh = torch.autograd.grad(cell(*args).sum(), [args.bias_ih, args.bias_hh])
    of_ih.mul_(2)
    torch.testing.assert_close(of_ih, 2 * of_hh)


@every_entry
def test_without_hx_the_gradient_of_weight_hh_is_zeros(cell, device):
    args = small_arguments(device, hx=False)
    cell(*args).sum().backward()
    assert torch.equal(args.weight_hh.grad, torch.zeros_like(args.weight_hh))


@every_entry
def test_gradients_accumulate_over_calls(cell, device):
    """A cell used over several steps adds up the gradients of its weights."""
    args = small_arguments(device)
    for _ in range(2):
        cell(*args).sum().backward()
    once = torch.autograd.grad(cell(*args).sum(), args)
    torch.testing.assert_close([t.grad for t in args], [2 * g for g in once])


def test_an_absent_gradient_of_the_output_gives_no_gradients(device):
    """As in ATen's operators: a None from the next function stays None instead of becoming zeros."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t: Tensor) -> Tensor:
            return t.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> None:
            return None

    for f in (eager_cell, rnn_cell):
        args = small_arguments(device)
        Stop.apply(f(*args)).sum().backward()
        assert all(t.grad is None for t in args)


def test_no_graph_is_recorded_when_gradients_are_off(device):
    args = small_arguments(device)
    with torch.no_grad():
        assert rnn_cell(*args).grad_fn is None
    with torch.inference_mode():
        assert rnn_cell(*args).is_inference()
    assert rnn_cell(*args.map(Tensor.detach)).grad_fn is None
