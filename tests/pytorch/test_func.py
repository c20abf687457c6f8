"""torch.func and the other function transforms, in any nesting that nn.RNNCell allows."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from entries import ENTRIES, every_module, first, through_autograd_function, through_operator
from references import NONLINEARITIES, eager_cell, small_arguments
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import rnn_ext
from rnn_ext import rnn_cell

# The module is rnn_cell over its parameters, and its transforms have tests of their own.
each_entry = pytest.mark.parametrize(
    "cell",
    [rnn_cell, through_operator, through_autograd_function],
    ids=["function", "operator", "autograd_function"],
)


@pytest.mark.parametrize("cell", [*ENTRIES.values(), through_autograd_function], ids=[*ENTRIES, "autograd_function"])
def test_forward_mode_tangents_equal_eager(cell, device):
    args, tangents = small_arguments(device), small_arguments(device)
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(t.detach(), v.detach()) for t, v in zip(args, tangents, strict=True)
        ]
        ours, expected = (torch.autograd.forward_ad.unpack_dual(f(*duals)).tangent for f in (cell, eager_cell))
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
@each_entry
def test_function_transforms_equal_eager(cell, transform, detached, device):
    args = small_arguments(device)
    if detached and transform is not TRANSFORMS["vmap_of_backward"]:
        args = args.map(Tensor.detach)
    torch.testing.assert_close(transform(cell, args), transform(eager_cell, args))


def of_a_row(layer, args):
    """The row as a batch of one, which is what an unbatched sequence is."""
    return lambda x, h: layer(x[:, None], h[None], *args[2:])[0]


# Of a layer over a sequence, whose batch is the second dimension of its input.
LAYER_TRANSFORMS = {
    "vjp": lambda layer, a: vjp(lambda *t: layer(*t)[0], *a)[1](torch.ones_like(layer(*a)[0])),
    "jvp": lambda layer, a: jvp(layer, tuple(a), tuple(t.cos() for t in a)),
    "jacrev": lambda layer, a: jacrev(layer, argnums=(0, 1, 2, 3))(*a),
    "jacfwd": lambda layer, a: jacfwd(layer, argnums=(0, 1, 2, 3))(*a),
    "hessian": lambda layer, a: hessian(lambda *t: layer(*t)[0].pow(2).sum(), argnums=(0, 3))(*a),
    "vmap_rows": lambda layer, a: vmap(of_a_row(layer, a), in_dims=(1, 0))(*a[:2]),
    "vmap_batches": lambda layer, a: vmap(lambda x: layer(x, *a[1:]))(torch.stack([a.input, -a.input])),
    "vmap_ensemble": lambda layer, a: vmap(layer, in_dims=(None, None, 0, 0, 0, 0))(
        *a[:2], *(torch.stack([t, -t, 2 * t]) for t in a[2:])
    ),
    "per_example_gradients": lambda layer, a: vmap(
        lambda x, h: grad(lambda w: of_a_row(layer, a._replace(weight_hh=w))(x, h).pow(2).sum())(a.weight_hh),
        in_dims=(1, 0),
    )(*a[:2]),
}


@pytest.mark.parametrize("transform", LAYER_TRANSFORMS.values(), ids=LAYER_TRANSFORMS.keys())
@pytest.mark.parametrize("layer", [rnn_ext.rnn_layer, torch.ops.rnn_ext.rnn_layer], ids=["function", "operator"])
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_function_transforms_of_a_layer_equal_those_of_a_loop(layer, transform):
    def loop(x, h, weight_ih, weight_hh, bias_ih, bias_hh):
        outputs = []
        for x_t in x:
            h = torch.tanh(x_t @ weight_ih.t() + bias_ih + h @ weight_hh.t() + bias_hh)
            outputs.append(h)
        return torch.stack(outputs), h

    args = small_arguments().map(Tensor.detach)
    args = args._replace(input=torch.stack([args.input, args.input.cos(), -args.input]))
    torch.testing.assert_close(transform(layer, args), transform(loop, args))


def test_transforms_of_the_module_equal_nn_rnncell(device):
    """Per-example gradients of a whole module, the usual recipe: vmap of grad of functional_call."""
    theirs = nn.RNNCell(3, 4, device=device, dtype=torch.float64)
    ours = rnn_ext.RNNCell(3, 4, device=device, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x, h = (torch.randn(5, n, dtype=torch.float64).to(device) for n in (3, 4))

    def gradients(cell):
        def loss(parameters, *row):
            return functional_call(cell, parameters, row).pow(2).sum()

        return vmap(grad(loss), in_dims=(None, 0, 0))(dict(cell.named_parameters()), x, h)

    torch.testing.assert_close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@each_entry
def test_vmap_never_takes_the_slow_path(cell, nonlinearity, device):
    """nn.RNNCell does: torch.rnn_tanh_cell has no batching rule, so that vmap warns and runs it row by row."""
    args = small_arguments(device)

    def gradients(x, h):
        return grad(lambda x, h: cell(x, h, *args[2:], nonlinearity).sum(), argnums=(0, 1))(x, h)

    def derivative(x):
        return jvp(lambda x: cell(x, None, *args[2:], nonlinearity), (x,), (x,))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")
        vmap(cell, in_dims=(0, 0, None, None, None, None, None))(*args, nonlinearity)
        vmap(lambda w: cell(args.input, args.hx, w, *args[3:], nonlinearity))(torch.stack([args.weight_ih] * 3))
        vmap(gradients)(args.input, args.hx)
        vmap(vmap(derivative))(torch.stack([args.input, -args.input]))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, g, y: vmap(f)(g, y),
        lambda f, g, y: jvp(f, (g, y), (g.cos(), y.cos())),
        lambda f, g, y: jacrev(f, argnums=(0, 1))(g, y),
        lambda f, g, y: jacfwd(f, argnums=(0, 1))(g, y),
    ],
    ids=["vmap", "jvp", "jacrev", "jacfwd"],
)
def test_transforms_of_the_backward_operator_equal_its_formula(transform, device):
    """In graphs it stands on its own."""
    args = small_arguments(device).map(Tensor.detach)
    output = rnn_cell(*args)

    def by_operator(grad_output, output):
        operands = (None, None, *args[2:4]) if grad_output.dim() == 1 else args[:4]
        mask = [True, True, *([grad_output.dim() == 2] * 2), True, False]
        return tuple(torch.ops.rnn_ext.rnn_cell_backward(grad_output, output, *operands, "tanh", mask))

    def by_formula(grad_output, output):
        dz = grad_output * (1 - output * output)
        rows = dz if dz.dim() == 2 else dz[None]
        weights = (rows.t() @ args.input, rows.t() @ args.hx) if dz.dim() == 2 else ()
        return dz @ args.weight_ih, dz @ args.weight_hh, *weights, rows.sum(0)

    grad_output = torch.randn_like(output)
    torch.testing.assert_close(transform(by_operator, grad_output, output), transform(by_formula, grad_output, output))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@every_module
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_ensemble_equals_its_members_one_by_one(cls, shape, bias, device):
    """torch.func's recipe for model ensembling, with and without the gradients of every member."""
    members = [cls(7, 5, bias=bias, device=device, dtype=torch.float64) for _ in range(3)]
    parameters, _ = stack_module_state(members)
    base = cls(7, 5, bias=bias, device="meta", dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64).to(device)
    h = torch.randn((1, 3, 5)[3 - len(shape) :], dtype=torch.float64).to(device)

    def loss(parameters, x, h):
        return first(functional_call(base, parameters, (x, h))).pow(2).sum()

    outputs = vmap(lambda p: first(functional_call(base, p, (x, h))))(parameters)
    torch.testing.assert_close(outputs, torch.stack([first(member(x, h)) for member in members]))
    gradients = vmap(grad(loss), in_dims=(0, None, None))(parameters, x, h)
    for i, member in enumerate(members):
        expected = torch.autograd.grad(first(member(x, h)).pow(2).sum(), list(member.parameters()))
        torch.testing.assert_close([g[i] for g in gradients.values()], list(expected))


# name: f -> the transformed f, both from x of shape (3) to a tensor
LAYERS = {
    "grad": lambda f: grad(lambda x: f(x).pow(2).sum()),
    "vjp": lambda f: lambda x: (lambda y, back: back(y.cos())[0])(*vjp(f, x)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1],
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "vmap": lambda f: lambda x: vmap(f)(torch.stack([x, x.cos()])),
}


@pytest.mark.parametrize("outer, middle, inner", list(itertools.product(LAYERS, repeat=3)))
def test_transforms_nest_three_deep(outer, middle, inner, device):
    """Some of these nn.RNNCell does not allow: it adds in place where vmap can't."""
    cell = rnn_ext.RNNCell(3, 2, dtype=torch.float64, device=device)

    def formula(x):
        return torch.tanh(cell.weight_ih @ x + cell.bias_ih + cell.weight_hh @ x[:2] + cell.bias_hh)

    x = torch.randn(3, dtype=torch.float64).to(device)
    ours, expected = (LAYERS[outer](LAYERS[middle](LAYERS[inner](f)))(x) for f in (lambda x: cell(x, x[:2]), formula))
    torch.testing.assert_close(ours, expected)
