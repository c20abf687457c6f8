"""The plain ATen composition: what the fused kernels don't take, and every derivative beyond the first."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _C

_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    """The cell out of ATen's operators, and nn.RNNCell's own errors."""
    if input.dim() not in (1, 2):
        raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is not None and hx.dim() not in (1, 2):
        raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
    unbatched = input.dim() == 1
    if unbatched:
        input = input.unsqueeze(0)
    if hx is None:
        hidden_size = 0 if weight_hh is None else weight_hh.size(1)  # None: the TypeError comes below
        hx = torch.zeros(input.size(0), hidden_size, dtype=input.dtype, device=input.device)
    elif unbatched:
        hx = hx.unsqueeze(0)

    if nonlinearity not in tuple(_ACTIVATIONS):
        raise RuntimeError(f"Unknown nonlinearity: {nonlinearity}")
    named = {"hx": hx, "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
    for name, t in named.items():
        if t is not None and t.is_meta != input.is_meta:  # ATen's composition would give uninitialized numbers
            _C.check_sizes(input, hx, weight_ih, weight_hh)
            raise RuntimeError(f"expected input and {name} on the same device, but got {input.device} and {t.device}")
    if nonlinearity == "sigmoid" or torch._C._are_functorch_transforms_active():
        # In parts: the whole has no sigmoid, and no rule for vmap, which would run it row by row.
        if not torch.compiler.is_compiling():
            _C.check_sizes(input, hx, weight_ih, weight_hh)
        output = rnn_cell_in_parts(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)
    else:
        whole = torch.rnn_tanh_cell if nonlinearity == "tanh" else torch.rnn_relu_cell
        output = whole(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    return output.squeeze(0) if unbatched else output


def rnn_cell_in_parts(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """The cell on arguments that were checked, out of functional operators (torch.rnn_tanh_cell adds in place)."""
    z = F.linear(input, weight_ih, bias_ih)
    if hx is not None:
        z = z + F.linear(hx, weight_hh, bias_hh)
    elif bias_hh is not None:
        z = z + bias_hh
    return _ACTIVATIONS[nonlinearity](z)


def rnn_cell_backward(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor | None,
    hx: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor | None,
    nonlinearity: str,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """The asked gradients (of input, hx, weights, biases, in order) by differentiable formulas.

    Operands that no asked gradient needs may be None; an absent hx stands for zeros.
    Everything is a function of the arguments: where `output` is connected to the graph, so is each result.
    """
    if nonlinearity == "tanh":
        grad_z = grad_output * (1 - output * output)
    elif nonlinearity == "relu":
        grad_z = torch.ops.aten.threshold_backward(grad_output, output, 0)
    else:
        grad_z = grad_output * (output * (1 - output))

    def rows(t: Tensor) -> Tensor:
        return t.unsqueeze(0) if t.dim() == 1 else t

    want_input, want_hx, want_weight_ih, want_weight_hh, *want_biases = output_mask
    gradients = []
    if want_input:
        assert weight_ih is not None
        gradients.append(grad_z @ weight_ih)
    if want_hx:
        assert weight_hh is not None
        gradients.append(grad_z @ weight_hh)
    if want_weight_ih:
        assert input is not None
        gradients.append(rows(grad_z).t() @ rows(input))
    if want_weight_hh:
        h = torch.zeros_like(output) if hx is None else hx  # a product, so that it stays differentiable
        gradients.append(rows(grad_z).t() @ rows(h))
    gradients.extend(rows(grad_z).sum(0) for want in want_biases if want)
    return gradients
