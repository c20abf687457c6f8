"""Derivatives: every order, every mode of differentiation, and exactly those that are asked for."""

from __future__ import annotations

import itertools

import pytest
import torch
from references import ARGUMENTS, NONLINEARITIES, Arguments, eager_cell, random_arguments
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import rnn_ext
from rnn_ext import rnn_cell


def through_module(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, nonlinearity="tanh"):
    cell = rnn_ext.RNNCell(*weight_ih.shape[::-1], bias_ih is not None, nonlinearity, "meta")
    parameters = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
    return functional_call(cell, {k: v for k, v in parameters.items() if v is not None}, (input, hx))


def through_operator(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, nonlinearity="tanh"):
    return torch.ops.rnn_ext.rnn_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)


ENTRIES = {"function": rnn_cell, "module": through_module, "operator": through_operator}
every_entry = pytest.mark.parametrize("cell", ENTRIES.values(), ids=ENTRIES.keys())
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


def small_arguments(device: str = "cpu", **changes) -> Arguments:
    return random_arguments(**({"batch": 2, "input_size": 3, "hidden_size": 2, "device": device} | changes)).leaves()


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
def test_a_graph_can_be_walked_twice_only_if_retained(cell, device):
    args = small_arguments(device)
    loss = cell(*args).sum()
    first = torch.autograd.grad(loss, args, retain_graph=True)
    second = torch.autograd.grad(loss, args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, args)


@every_entry
def test_gradients_accumulate_over_calls(cell, device):
    """A cell used over several steps adds up the gradients of its weights."""
    args = small_arguments(device)
    for _ in range(2):
        cell(*args).sum().backward()
    once = torch.autograd.grad(cell(*args).sum(), args)
    torch.testing.assert_close([t.grad for t in args], [2 * g for g in once])


@every_entry
@pytest.mark.parametrize("changed", ["input", "hx", "weight_ih", "weight_hh", "output"])
def test_in_place_change_of_a_saved_tensor_is_caught(cell, changed, device):
    def change_and_differentiate(f) -> None:
        args = small_arguments(device)
        output = f(*args)
        with torch.no_grad():
            (output if changed == "output" else getattr(args, changed)).add_(1)
        output.sum().backward()

    for f in (eager_cell, cell):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            change_and_differentiate(f)


@pytest.mark.parametrize("cell", [rnn_cell, through_module], ids=["function", "module"])
@pytest.mark.parametrize("saves_for", ["input", "hx", "weight_ih", "weight_hh"])
def test_a_tensor_that_no_asked_gradient_needs_may_be_changed(cell, saves_for, device):
    """An optimizer may step the weights of a first layer before its backward: its input needs no gradient."""
    other = {"input": "weight_ih", "hx": "weight_hh", "weight_ih": "input", "weight_hh": "hx"}[saves_for]

    def gradients(f, change: bool) -> list[Tensor]:
        torch.manual_seed(0)
        args = small_arguments(device)
        getattr(args, saves_for).requires_grad_(False)
        output = f(*args)
        if change:
            with torch.no_grad():
                getattr(args, other).add_(1)
        return torch.autograd.grad(output.sum(), [t for t in args if t.requires_grad])

    gradients(eager_cell, change=True)
    torch.testing.assert_close(gradients(cell, change=True), gradients(cell, change=False))


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


def test_saved_tensor_hooks_see_the_saved_tensors(device):
    """Activation offloading and quantisation hook in here; so does memory accounting."""
    args = small_arguments(device)
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = rnn_cell(*args)
    assert {tuple(t.shape) for t in packed} >= {(2, 3), (2, 2)}
    gradients = torch.autograd.grad(output.sum(), args)
    torch.testing.assert_close(gradients, torch.autograd.grad(eager_cell(*args).sum(), args))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant, device):
    args = small_arguments(device)
    output = torch.utils.checkpoint.checkpoint(rnn_cell, *args, use_reentrant=use_reentrant)
    output.sum().backward()
    expected = torch.autograd.grad(eager_cell(*args).sum(), args)
    torch.testing.assert_close([t.grad for t in args], list(expected))


def test_forward_mode_tangents_equal_eager(device):
    args, tangents = small_arguments(device), small_arguments(device)
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(t.detach(), v.detach()) for t, v in zip(args, tangents, strict=True)
        ]
        ours, expected = (torch.autograd.forward_ad.unpack_dual(f(*duals)).tangent for f in (rnn_cell, eager_cell))
    torch.testing.assert_close(ours, expected)


def scalar(cell):
    return lambda *args: cell(*args).pow(2).sum()


def per_example_gradients(cell, args):
    def loss(weight_ih, x, h):
        return scalar(cell)(x, h, weight_ih, *args[3:])

    return vmap(grad(loss), in_dims=(None, 0, 0))(args.weight_ih, args.input, args.hx)


# name: (cell, arguments) -> tensors
TRANSFORMS = {
    "grad": lambda cell, a: grad(scalar(cell), argnums=(0, 1, 2, 3, 4, 5))(*a),
    "grad_of_grad": lambda cell, a: grad(lambda x: grad(scalar(cell))(x, *a[1:]).pow(2).sum())(a.input),
    "vjp": lambda cell, a: vjp(cell, *a)[1](torch.ones_like(a.hx)),
    "jvp": lambda cell, a: jvp(cell, tuple(a), tuple(t.cos() for t in a)),
    "jvp_of_grad": lambda cell, a: jvp(grad(scalar(cell)), tuple(a), tuple(t.cos() for t in a)),
    "jacrev": lambda cell, a: jacrev(cell, argnums=(0, 1, 2, 3))(*a),
    "jacfwd": lambda cell, a: jacfwd(cell, argnums=(0, 1, 2, 3))(*a),
    "hessian": lambda cell, a: hessian(scalar(cell), argnums=(0, 2))(*a),
    "vmap_rows": lambda cell, a: vmap(cell, in_dims=(0, 0) + (None,) * 4)(*a),
    "vmap_rows_without_hx": lambda cell, a: vmap(lambda x: cell(x, None, *a[2:]))(a.input),
    "vmap_batches": lambda cell, a: vmap(lambda x: cell(x, *a[1:]))(torch.stack([a.input, -a.input])),
    "vmap_ensemble": lambda cell, a: vmap(cell, in_dims=(None, None, 0, 0, 0, 0))(
        *a[:2], *(torch.stack([t, -t, 2 * t]) for t in a[2:])
    ),
    "vmap_of_grad": per_example_gradients,
    "vmap_of_backward": lambda cell, a: torch.autograd.grad(
        cell(*a), a, torch.stack([torch.ones_like(a.hx), a.hx.detach()]), is_grads_batched=True
    ),
    "autograd_functional_hessian": lambda cell, a: torch.autograd.functional.hessian(
        lambda x: scalar(cell)(x, *a[1:]), a.input
    ),
    "autograd_functional_jvp": lambda cell, a: torch.autograd.functional.jvp(
        lambda x: cell(x, *a[1:]), a.input, torch.ones_like(a.input)
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap over torch.rnn_tanh_cell
@pytest.mark.parametrize("detached", [True, False], ids=["plain_inputs", "inputs_require_grad"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_function_transforms_equal_eager(transform, detached, device):
    args = small_arguments(device)
    if detached and transform is not TRANSFORMS["vmap_of_backward"]:
        args = args.map(Tensor.detach)
    torch.testing.assert_close(transform(rnn_cell, args), transform(eager_cell, args))


def test_transforms_of_the_module_equal_nn_rnncell(device):
    """Per-example gradients of a whole module, the usual recipe: vmap of grad of functional_call."""
    theirs = torch.nn.RNNCell(3, 4, device=device, dtype=torch.float64)
    ours = rnn_ext.RNNCell(3, 4, device=device, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x, h = (torch.randn(5, n, dtype=torch.float64).to(device) for n in (3, 4))

    def gradients(cell):
        def loss(parameters, *row):
            return functional_call(cell, parameters, row).pow(2).sum()

        return vmap(grad(loss), in_dims=(None, 0, 0))(dict(cell.named_parameters()), x, h)

    torch.testing.assert_close(gradients(ours), gradients(theirs))
