"""The plain ATen composition: what the fused kernels don't take, and every derivative beyond the first."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import _VF, Tensor
from torch.autograd import forward_ad
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

    _check(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)
    if nonlinearity == "sigmoid" or torch._C._are_functorch_transforms_active():
        # In parts: the whole has no sigmoid, and no rule for vmap, which would run it row by row.
        if not torch.compiler.is_compiling():
            _C.check_sizes(input, hx, weight_ih, weight_hh)
        output = rnn_cell_in_parts(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)
    else:
        whole = torch.rnn_tanh_cell if nonlinearity == "tanh" else torch.rnn_relu_cell
        output = whole(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    return output.squeeze(0) if unbatched else output


def _check(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    nonlinearity: str,
) -> None:
    """What ATen's composition would take without an error."""
    if nonlinearity not in tuple(_ACTIVATIONS):
        raise RuntimeError(f"Unknown nonlinearity: {nonlinearity}")
    named = {"hx": hx, "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
    for name, t in named.items():
        if t is not None and t.is_meta != input.is_meta:  # it would give uninitialized numbers
            _C.check_sizes(input, hx, weight_ih, weight_hh)
            raise RuntimeError(f"expected input and {name} on the same device, but got {input.device} and {t.device}")


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
    grad_z = _through_activation(grad_output, output, nonlinearity)

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


def _through_activation(grad_output: Tensor, output: Tensor, nonlinearity: str) -> Tensor:
    """The gradient of z, by the derivative of f in terms of its output."""
    if nonlinearity == "tanh":
        return grad_output * (1 - output * output)
    if nonlinearity == "relu":
        grad_z: Tensor = torch.ops.aten.threshold_backward(grad_output, output, 0)
        return grad_z
    return grad_output * (output * (1 - output))


# Sequences


class _Rows(NamedTuple):
    """A sequence as packed data: a row for each row of each step, in the order in which the steps are computed.

    A step's rows are the first of the step before, so that rows whose sequence has ended take no part. Padding, the
    order of the steps in memory and the order of the batch are all in the indices; None stands for the identity.
    """

    shape: tuple[int, ...]  # of the data, without the features
    sizes: list[int]  # rows a step
    order: Tensor | None  # of each packed row, the place in the data
    places: Tensor | None  # of each row of the data, the packed row; for padding a row of zeros that follows the last
    batch: Tensor | None  # of each row of the first step, the row of hx; after those, rows of no step
    transposed: bool = False  # without indices: the batch is the first dimension of the data
    flipped: bool = False  # and the steps run backwards

    def pack(self, data: Tensor) -> Tensor:
        if self.transposed:
            data = data.transpose(0, 1)
        if self.flipped:
            data = data.flip(0)
        if len(self.shape) == 2:
            data = data.flatten(0, 1)
        return data if self.order is None else data.index_select(0, self.order)

    def unpack(self, packed: Tensor) -> Tensor:
        if self.places is not None:
            padded = torch.cat([packed, packed.new_zeros(1, packed.size(-1))])
            return torch.unflatten(padded.index_select(0, self.places), 0, self.shape)
        if len(self.shape) == 1:
            return packed
        data = torch.unflatten(packed, 0, self.shape[::-1] if self.transposed else self.shape)
        if self.flipped:
            data = data.flip(0)
        return data.transpose(0, 1).contiguous() if self.transposed else data

    def sort(self, states: Tensor) -> Tensor:
        return states if self.batch is None else states.index_select(0, self.batch)

    def unsort(self, states: Tensor) -> Tensor:
        return states if self.batch is None else states.index_select(0, self.batch.argsort())


def _rows(
    data: Tensor, reverse: bool, batch_first: bool, lengths: Tensor | None, batch_sizes: Tensor | None
) -> tuple[_Rows, int]:
    """The rows of the data, which is input or output, and how many hx has."""
    device = data.device
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        if not sizes or sum(sizes) != data.size(0):
            raise RuntimeError(f"batch_sizes add up to {sum(sizes)} rows, but the packed data has {data.size(0)}")
        order = None
        if reverse:
            row, step = torch.arange(sizes[0]), torch.arange(len(sizes)).unsqueeze(1)
            there = row < batch_sizes.unsqueeze(1)
            starts = batch_sizes.cumsum(0) - batch_sizes
            order = (starts[(there.sum(0) - 1 - step).clamp(min=0)] + row)[there].to(device)
        return _Rows((data.size(0),), sizes, order, order, None), sizes[0]  # run backwards twice is forwards

    steps, batch = (data.size(1), data.size(0)) if batch_first else (data.size(0), data.size(1))
    if lengths is None:
        shape = (data.size(0), data.size(1))
        return _Rows(shape, [batch] * steps, None, None, None, batch_first, reverse), batch
    descending, rows = lengths.sort(descending=True, stable=True)
    step = torch.arange(steps).unsqueeze(1)
    there = step < descending
    step_of = descending - 1 - step if reverse else step
    order = (rows * steps + step_of if batch_first else step_of * batch + rows)[there]
    places = torch.full((steps * batch,), order.numel()).index_copy_(0, order, torch.arange(order.numel()))
    sizes = [size for size in there.sum(1).tolist() if size]
    return _Rows(tuple(data.shape[:2]), sizes, order.to(device), places.to(device), rows.to(device)), batch


def rnn_layer(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A layer of one direction out of ATen's operators, and its errors; see :func:`rnn_ext.rnn_layer`.

    Packed data is (rows, I), with `batch_sizes` as in a PackedSequence; `lengths` is an int64 tensor on the CPU.
    """
    if input.dim() != (3 if batch_sizes is None else 2):
        raise RuntimeError(f"input must have {3 if batch_sizes is None else 2} dimensions, got {input.dim()}")
    if (input.size(1 if batch_first else 0) if batch_sizes is None else batch_sizes.numel()) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    rows, batch = _rows(input, reverse, batch_first, lengths, batch_sizes)
    if batch_sizes is None:
        first = input.select(1 if batch_first else 0, 0)
    else:
        first = input[:batch]
    if not torch.compiler.is_compiling():
        _C.check_sizes(first, hx, weight_ih, weight_hh)
    _check(first, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)
    if hx is None:  # zeros that are multiplied, so that the gradient of weight_hh is zeros and not None
        hx = torch.zeros(batch, weight_hh.size(1), dtype=input.dtype, device=input.device)

    packed, states = rows.pack(input), rows.sort(hx)
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    if _whole_takes(bias_ih, bias_hh, nonlinearity) and rows.sizes:
        output, h_n = _in_whole(packed, rows, states, *weights, nonlinearity)
    else:
        output, h_n = _in_parts(packed, rows.sizes, states, *weights, nonlinearity)
    return rows.unpack(output), rows.unsort(h_n)


def _whole_takes(bias_ih: Tensor | None, bias_hh: Tensor | None, nonlinearity: str) -> bool:
    """Whether ATen's own layer, which cuDNN may run, computes this."""
    return nonlinearity in ("tanh", "relu") and (bias_ih is None) == (bias_hh is None) and not transforms_active()


def transforms_active() -> bool:
    """functorch's, for which ATen's layers have no rule; or forward-mode AD, for which cuDNN has none."""
    return torch._C._are_functorch_transforms_active() or getattr(forward_ad, "_current_level", 0) >= 0


def _in_whole(
    input: Tensor,
    rows: _Rows,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    whole: Any = _VF.rnn_tanh if nonlinearity == "tanh" else _VF.rnn_relu
    weights = [t for t in (weight_ih, weight_hh, bias_ih, bias_hh) if t is not None]
    active = rows.sizes[0]
    # cuDNN has no backward for layers that were not in training. There is no dropout in one layer.
    options = (weights, bias_ih is not None, 1, 0.0, torch.is_grad_enabled(), False)
    if rows.order is None and len(rows.shape) == 2:
        output, h_n = whole(torch.unflatten(input, 0, (len(rows.sizes), active)), hx.unsqueeze(0), *options, False)
        return output.flatten(0, 1), h_n.squeeze(0)
    output, h_n = whole(input, torch.tensor(rows.sizes), hx[:active].unsqueeze(0), *options)
    return output, torch.cat([h_n.squeeze(0), hx[active:]])


def _in_parts(
    input: Tensor,
    sizes: list[int],
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    """Out of functional operators, on packed rows; one product for all rows of the input."""
    z = F.linear(input, weight_ih, bias_ih)
    h = hx
    outputs = []
    ended = []
    for z_t in torch.split(z, sizes) if sizes else ():
        if z_t.size(0) < h.size(0):
            ended.append(h[z_t.size(0) :])
            h = h[: z_t.size(0)]
        h = _ACTIVATIONS[nonlinearity](z_t + F.linear(h, weight_hh, bias_hh))
        outputs.append(h)
    return torch.cat(outputs) if outputs else z, torch.cat([h, *reversed(ended)])


def rnn_layer_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    input: Tensor | None,
    hx: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor | None,
    nonlinearity: str,
    output_mask: Sequence[bool],
    reverse: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> list[Tensor]:
    """The asked gradients (of input, hx, weights, biases, in order) by differentiable formulas.

    As for the cell, operands that no asked gradient needs may be None, and everything is a function of the arguments.
    An absent gradient stands for zeros.
    """
    want_input, want_hx, want_weight_ih, want_weight_hh, *want_biases = output_mask
    rows, batch = _rows(output, reverse, batch_first, lengths, batch_sizes)
    packed_output = rows.pack(output)
    outputs: Sequence[Tensor] = torch.split(packed_output, rows.sizes) if rows.sizes else ()
    grads: Sequence[Tensor | None] = [None] * len(outputs)
    if grad_output is not None and rows.sizes:
        grads = torch.split(rows.pack(grad_output), rows.sizes)
    # of the rows that end before the step at hand
    grad_ends = output.new_zeros(batch, output.size(-1)) if grad_h_n is None else rows.sort(grad_h_n)

    grad_h = grad_ends[:0]
    grads_z: list[Tensor] = []
    for grad_t, h_t in zip(reversed(grads), reversed(outputs), strict=True):
        if grads_z:
            assert weight_hh is not None
            grad_h = grads_z[-1] @ weight_hh
        if grad_h.size(0) < h_t.size(0):
            grad_h = torch.cat([grad_h, grad_ends[grad_h.size(0) : h_t.size(0)]])
        grads_z.append(_through_activation(grad_h if grad_t is None else grad_t + grad_h, h_t, nonlinearity))
    grad_z = torch.cat(grads_z[::-1]) if grads_z else packed_output

    gradients = []
    if want_input:
        assert weight_ih is not None
        gradients.append(rows.unpack(grad_z @ weight_ih))
    if want_hx:
        assert weight_hh is not None
        grad_h = grads_z[-1] @ weight_hh if grads_z else grad_h
        gradients.append(rows.unsort(torch.cat([grad_h, grad_ends[grad_h.size(0) :]])))
    if want_weight_ih:
        assert input is not None
        gradients.append(grad_z.t() @ rows.pack(input))
    if want_weight_hh:
        states = torch.zeros_like(grad_ends) if hx is None else rows.sort(hx)
        before = [h[:size] for h, size in zip((states, *outputs), rows.sizes, strict=False)]
        gradients.append(grad_z.t() @ (torch.cat(before) if before else states[:0]))
    gradients.extend(grad_z.sum(0) for want in want_biases if want)
    return gradients
