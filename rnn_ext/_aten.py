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
    """A sequence as rows of packed data, the rows of each step together, in the order in which steps are computed.

    A step has the first so many rows of the batch. The others, and those that `there` leaves out, keep their state.
    """

    shape: tuple[int, ...]  # of the data, without the features
    sizes: list[int]  # rows a step
    batch: int
    order: Tensor | None = None  # where each row lies in data that is packed or jagged
    back: Tensor | None = None  # and where the data's own rows are among these; packed data's: backwards twice
    there: Tensor | None = None  # (T B, 1): which rows lengths leave
    transposed: bool = False  # data that is not packed has the batch first
    flipped: bool = False  # and is computed backwards

    def pack(self, data: Tensor) -> Tensor:
        """Zeros in padding, which is read nowhere else."""
        if len(self.shape) == 1:
            if self.there is not None:
                data = F.pad(data, (0, 0, 0, 1))  # the row that stands for padding
            return data if self.order is None else data.index_select(0, self.order)
        if self.transposed:
            data = data.transpose(0, 1)
        if self.flipped:
            data = data.flip(0)
        data = data.reshape(data.size(0) * data.size(1), data.size(-1))
        return data if self.there is None else data.masked_fill(~self.there, 0)

    def unpack(self, rows: Tensor) -> Tensor:
        if len(self.shape) == 1:
            return rows if self.back is None else rows.index_select(0, self.back)
        data = rows.reshape(*(self.shape[::-1] if self.transposed else self.shape), rows.size(-1))
        if self.flipped:
            data = data.flip(0)
        return data.transpose(0, 1).contiguous() if self.transposed else data

    def steps(self, rows: Tensor) -> Sequence[Tensor]:
        return torch.split(rows, self.sizes)

    def masks(self) -> Sequence[Tensor | None]:
        return [None] * len(self.sizes) if self.there is None else self.steps(self.there)


def _rows(data: Tensor, reverse: bool, batch_first: bool, lengths: Tensor | None, batch_sizes: Tensor | None) -> _Rows:
    """The rows of the data, which is input or output."""
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        if not sizes or sum(sizes) != data.size(0):
            raise RuntimeError(f"batch_sizes add up to {sum(sizes)} rows, but the packed data has {data.size(0)}")
        order = None
        if reverse:
            row, step = torch.arange(sizes[0]), torch.arange(len(sizes)).unsqueeze(1)
            there = row < batch_sizes.unsqueeze(1)
            starts = batch_sizes.cumsum(0) - batch_sizes
            order = (starts[(there.sum(0) - 1 - step).clamp(min=0)] + row)[there].to(data.device)
        return _Rows((data.size(0),), sizes, sizes[0], order, order)
    if lengths is not None and data.dim() == 2:
        return _jagged_rows(data, reverse, lengths)
    steps, batch = (data.size(1), data.size(0)) if batch_first else (data.size(0), data.size(1))
    mask = None
    if lengths is not None:
        mask = torch.arange(steps).unsqueeze(1) < lengths
        mask = (mask.flip(0) if reverse else mask).reshape(steps * batch, 1).to(data.device)
    return _Rows((data.size(0), data.size(1)), [batch] * steps, batch, None, None, mask, batch_first, reverse)


def _jagged_rows(data: Tensor, reverse: bool, lengths: Tensor) -> _Rows:
    """As padded ones, at least one step of them."""
    total, batch, expected = data.size(0), lengths.size(0), int(lengths.sum())
    if expected != total:
        raise ValueError(f"lengths say that there are {expected} steps in all, but the jagged data has {total}")
    steps = max(1, int(lengths.max())) if batch else 1
    step = torch.arange(steps).unsqueeze(1)
    step = step.flip(0) if reverse else step
    there = step < lengths
    order = torch.where(there, lengths.cumsum(0) - lengths + step, total).flatten()
    back = order.argsort()[:total]
    mask = there.reshape(steps * batch, 1)
    return _Rows((total,), [batch] * steps, batch, order.to(data.device), back.to(data.device), mask.to(data.device))


def _updated(states: Tensor, of_step: Tensor, mask: Tensor | None) -> Tensor:
    """The states of all rows, with the new ones of the rows of a step."""
    size = of_step.size(0)
    if mask is not None:
        of_step = torch.where(mask, of_step, states[:size])
    return of_step if size == states.size(0) else torch.cat([of_step, states[size:]])


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

    Packed data is (rows, I), with `batch_sizes` as in a PackedSequence; `lengths` is an int64 tensor on the CPU, and
    where the data is (rows, I), it is jagged: the steps of each row of the batch together.
    """
    flat = batch_sizes is not None or (lengths is not None and input.dim() == 2)
    if input.dim() != (2 if flat else 3):
        raise RuntimeError(f"input must have {2 if flat else 3} dimensions, got {input.dim()}")
    if (batch_sizes.numel() if batch_sizes is not None else flat or input.size(1 if batch_first else 0)) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    rows = _rows(input, reverse, batch_first, lengths, batch_sizes)
    first = input.new_empty(rows.batch, input.size(-1)) if flat else input.select(1 if batch_first else 0, 0)
    if not torch.compiler.is_compiling():
        _C.check_sizes(first, hx, weight_ih, weight_hh)
    _check(first, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)
    if hx is None:  # zeros that are multiplied, so that the gradient of weight_hh is zeros and not None
        hx = torch.zeros(rows.batch, weight_hh.size(1), dtype=input.dtype, device=input.device)

    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    whole = nonlinearity != "sigmoid" and lengths is None and (bias_ih is None) == (bias_hh is None)
    compute = _in_whole if whole and not transforms_active() else _in_parts
    output, h_n = compute(rows.pack(input), rows, hx, *weights, nonlinearity)
    return rows.unpack(output), h_n


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
    """ATen's own layer, which may be cuDNN's."""
    layer: Any = _VF.rnn_tanh if nonlinearity == "tanh" else _VF.rnn_relu
    weights = [t for t in (weight_ih, weight_hh, bias_ih, bias_hh) if t is not None]
    # cuDNN has no backward for layers that were not in training. There is no dropout in one layer.
    options = (weights, bias_ih is not None, 1, 0.0, True, False)
    if len(rows.shape) == 1:
        output, h_n = layer(input, torch.tensor(rows.sizes), hx.unsqueeze(0), *options)
        return output, h_n.squeeze(0)
    steps = input.reshape(len(rows.sizes), rows.batch, input.size(-1))
    output, h_n = layer(steps, hx.unsqueeze(0), *options, False)
    return output.reshape(input.size(0), hx.size(-1)), h_n.squeeze(0)


def _in_parts(
    input: Tensor,
    rows: _Rows,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    """Functional operators, which know every transform; one product for all rows of the input."""
    z = F.linear(input, weight_ih, bias_ih)
    h = hx
    outputs = []
    for z_t, mask in zip(rows.steps(z), rows.masks(), strict=True):
        before = h[: z_t.size(0)]
        if mask is not None:  # zeros where the product is dropped: no NaN that gradients of 0 would be multiplied with
            before = before.masked_fill(~mask, 0)
        h_t = _ACTIVATIONS[nonlinearity](z_t + F.linear(before, weight_hh, bias_hh))
        outputs.append(h_t if mask is None else h_t.masked_fill(~mask, 0))
        h = _updated(h, h_t, mask)
    return torch.cat(outputs), h


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
    rows = _rows(output, reverse, batch_first, lengths, batch_sizes)
    masks = rows.masks()
    outputs = rows.steps(rows.pack(output))
    grads = [None] * len(outputs) if grad_output is None else rows.steps(rows.pack(grad_output))
    zeros = output.new_zeros(rows.batch, output.size(-1))

    grad_h = zeros if grad_h_n is None else grad_h_n
    grads_z = []
    for t in reversed(range(len(outputs))):
        grad_t, mask = grads[t], masks[t]
        before = grad_h[: rows.sizes[t]]
        grad_z = _through_activation(before if grad_t is None else grad_t + before, outputs[t], nonlinearity)
        if mask is not None:
            grad_z = grad_z.masked_fill(~mask, 0)
        grads_z.append(grad_z)
        if t > 0 or want_hx:
            assert weight_hh is not None
            grad_h = _updated(grad_h, grad_z @ weight_hh, mask)
    grad_z = torch.cat(grads_z[::-1])

    gradients = []
    if want_input:
        assert weight_ih is not None
        gradients.append(rows.unpack(grad_z @ weight_ih))
    if want_hx:
        gradients.append(grad_h)
    if want_weight_ih:
        assert input is not None
        gradients.append(grad_z.t() @ rows.pack(input))
    if want_weight_hh:
        h = zeros if hx is None else hx
        states = []
        for h_t, mask in zip(outputs, masks, strict=True):
            before = h[: h_t.size(0)]
            states.append(before if mask is None else before.masked_fill(~mask, 0))
            h = _updated(h, h_t, mask)
        gradients.append(grad_z.t() @ torch.cat(states))
    gradients.extend(grad_z.sum(0) for want in want_biases if want)
    return gradients
