"""What the cell is compared with: the formula in float64, and PyTorch's own cell in the dtype at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NONLINEARITIES = ("tanh", "relu", "sigmoid")
ARGUMENTS = ("input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}
# f' in terms of h' = f(z). relu's is written so that NaN passes the gradient on, as in ATen.
DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda y: 1 - y * y,
    "relu": lambda y: torch.where(y <= 0, 0.0, 1.0),
    "sigmoid": lambda y: y * (1 - y),
}


class Arguments(NamedTuple):
    """The six tensors of a cell, in the order in which every entry point takes them."""

    input: Tensor
    hx: Tensor | None
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    def map(self, f: Callable[[Tensor], Tensor]) -> Arguments:
        return Arguments(*(None if t is None else f(t) for t in self))

    def leaves(self) -> Arguments:
        """Leaves that require a gradient, with the same values and strides."""
        return self.map(lambda t: t.detach().requires_grad_())

    def present(self) -> list[Tensor]:
        return [t for t in self if t is not None]


def random_arguments(
    batch: int = 3,
    input_size: int = 7,
    hidden_size: int = 5,
    *,
    hx: bool = True,
    bias: str = "both",  # "both", "none", "ih" or "hh"
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    exact: bool = False,
) -> Arguments:
    """Inputs of unit size and weights that keep z of unit size.

    `exact` draws multiples of 1/4 instead: then float32 sums them without rounding, in any order, so that the sign
    of z (all that the derivative of relu sees) does not depend on who computed it.
    """

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        if exact:
            return (torch.randint(-4, 5, shape) / 4).to(device, dtype)
        return (torch.randn(shape, dtype=torch.float64) * scale).to(device, dtype)

    scale = max(input_size + hidden_size, 1) ** -0.5
    return Arguments(
        draw(batch, input_size),
        draw(batch, hidden_size) if hx else None,
        draw(hidden_size, input_size, scale=scale),
        draw(hidden_size, hidden_size, scale=scale),
        draw(hidden_size) if bias in ("both", "ih") else None,
        draw(hidden_size) if bias in ("both", "hh") else None,
    )


def small_arguments(device: str = "cpu", **changes) -> Arguments:
    """Leaves in float64, small enough for finite differences and whole Jacobians."""
    return random_arguments(**({"batch": 2, "input_size": 3, "hidden_size": 2, "device": device} | changes)).leaves()


def seeded(cls: type[nn.Module], *args, **kwargs) -> nn.Module:
    """Modules made by this with the same arguments have the same parameters."""
    torch.manual_seed(3)
    return cls(*args, **kwargs)


def eager_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """What nn.RNNCell calls; for sigmoid, which it does not have, the composition that it would be."""
    if hx is None:
        hx = input.new_zeros(*input.shape[:-1], weight_hh.shape[0])
    if nonlinearity == "sigmoid":
        return torch.sigmoid(F.linear(input, weight_ih, bias_ih) + F.linear(hx, weight_hh, bias_hh))
    cell = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}[nonlinearity]
    if input.dim() == 1:
        return cell(input[None], hx[None], weight_ih, weight_hh, bias_ih, bias_hh)[0]
    return cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


def output_and_gradients(cell: Callable[..., Tensor], args: Arguments, nonlinearity: str, grad_output: Tensor):
    """{"output": h', "input": dx, ...} by autograd, without the arguments that are None."""
    leaves = args.leaves()
    output = cell(*leaves, nonlinearity)
    gradients = torch.autograd.grad(output, leaves.present(), grad_output)
    names = [name for name, t in zip(ARGUMENTS, leaves, strict=True) if t is not None]
    return {"output": output.detach()} | dict(zip(names, gradients, strict=True))


def float64_reference(args: Arguments, nonlinearity: str, grad_output: Tensor) -> dict[str, Tensor]:
    """The same dictionary from the formulas of the cell and of its backward, in float64 and without autograd."""
    x, hx, weight_ih, weight_hh, bias_ih, bias_hh = args.map(lambda t: t.detach().double())
    z = x @ weight_ih.t()
    if hx is not None:
        z = z + hx @ weight_hh.t()
    for bias in (bias_ih, bias_hh):
        z = z if bias is None else z + bias
    y = ACTIVATIONS[nonlinearity](z)
    dz = grad_output.double() * DERIVATIVES[nonlinearity](y)
    results = {
        "output": y,
        "input": dz @ weight_ih,
        "hx": dz @ weight_hh,
        "weight_ih": dz.t() @ x,
        "weight_hh": torch.zeros_like(weight_hh) if hx is None else dz.t() @ hx,
        "bias_ih": dz.sum(0),
        "bias_hh": dz.sum(0),
    }
    absent = {name for name, t in zip(ARGUMENTS, args, strict=True) if t is None}
    return {name: t for name, t in results.items() if name not in absent}
