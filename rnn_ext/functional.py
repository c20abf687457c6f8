"""The functional forms of the cell and of a layer, and the choice between the fused kernels and ATen."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _C, _aten

_FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FUSED_DEVICES = ("cpu", "cuda") if _C.cuda_built else ("cpu",)
# The tensor subclasses for which the operators have rules; DTensor joins them when it is imported.
SUBCLASSES: list[type] = [FakeTensor]


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    r"""One step of the Elman RNN, :math:`h' = f(x W^\top + b_{ih} + h U^\top + b_{hh})`, in one kernel launch.

    Args:
        input: x, of shape (B, I), or (I) unbatched.
        hx: h, of shape (B, H), or (H) unbatched; None stands for zeros and costs nothing.
        weight_ih: W, of shape (H, I).
        weight_hh: U, of shape (H, H).
        bias_ih: of shape (H), or None.
        bias_hh: of shape (H), or None.
        nonlinearity: f: ``"tanh"``, ``"relu"`` or ``"sigmoid"`` (the logistic function).

    Returns:
        h', of shape (B, H), or (H) unbatched, in the input's dtype and on its device.

    The fused kernels take float32, float64, bfloat16 and float16 (which accumulate in float32) on the CPU and on
    CUDA. Everything else that :class:`torch.nn.RNNCell` takes (complex numbers, other devices, tensor subclasses,
    functorch transforms, forward-mode AD) goes through the same formula in ATen's operators.

    Raises:
        ValueError: an input or hx that is neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices that don't fit together, or an unknown nonlinearity.

    Source: J. L. Elman, Finding Structure in Time, Cognitive Science 14 (1990).
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:  # Dynamo can't trace pybind11 functions
        fused = _C.rnn_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)
        if fused is not None:
            return fused
    arguments = (input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    if not compiling and has_torch_function(arguments):  # a mode, a subclass that overrides functions, an fx.Proxy
        output: Tensor = handle_torch_function(rnn_cell, arguments, *arguments, nonlinearity)
        return output
    if (compiling or any(isinstance(t, tuple(SUBCLASSES)) for t in arguments)) and _operator_takes(
        *arguments, devices=_FUSED_DEVICES, subclasses=tuple(SUBCLASSES)
    ):
        output = torch.ops.rnn_ext.rnn_cell(*arguments, nonlinearity)
        return output
    return _aten.rnn_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity)


def _operator_takes(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    devices: tuple[str, ...],
    subclasses: tuple[type, ...],
) -> bool:
    """What _C.rnn_cell and _C.rnn_layer ask of the tensors, in Python that Dynamo can trace; and `subclasses`."""
    device = input.device.type
    if device not in devices or torch._C._are_functorch_transforms_active():
        return False
    if not all(p.is_replicate() for t in (weight_ih, weight_hh) for p in getattr(t, "placements", ())):
        return False  # the operators would gather a DTensor's shards, where ATen's work on them
    autocast = torch.is_autocast_enabled(device)
    for t in (input, hx, weight_ih, weight_hh, bias_ih, bias_hh):
        if t is None:
            continue
        if t.dtype not in _FUSED_DTYPES or (t.dtype != input.dtype and not autocast) or t.device != input.device:
            return False
        if t.layout != torch.strided:
            return False
        if is_traceable_wrapper_subclass(t) and not isinstance(t, subclasses):
            return False
    return all(
        bias is None or (bias.dim() == 1 and weight_hh.dim() == 2 and bias.size(0) == weight_hh.size(1))
        for bias in (bias_ih, bias_hh)
    )


def rnn_layer(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
    *,
    reverse: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""A layer of the Elman RNN in one direction over a whole sequence.

    .. math:: h_t = f(x_t W^\top + b_{ih} + h_{t-1} U^\top + b_{hh}), \quad t = 1 \dots T

    Args:
        input: x, of shape (T, B, I), (B, T, I) with batch_first, or (T, I) unbatched, of any strides; or nested.
        hx: h_0, of shape (B, H), or (H) unbatched; None stands for zeros and costs nothing.
        weight_ih: W, of shape (H, I).
        weight_hh: U, of shape (H, H).
        bias_ih: of shape (H), or None.
        bias_hh: of shape (H), or None.
        nonlinearity: f: ``"tanh"``, ``"relu"`` or ``"sigmoid"`` (the logistic function).
        reverse: start at the last step and go backwards.
        lengths: B whole numbers from 0 to T, in any order; a 1-D tensor on any device, or a list.
        batch_first: the batch is the first dimension of a batched input, and of output.

    Returns:
        output, of shape (T, B, H), (B, T, H) or (T, H), and h_n, of shape (B, H) or (H): the state after each step,
        and after the last. In the input's dtype and on its device; they share no memory.

    Steps of a row from its length on are not computed: output is zero there and takes no gradient, h_n is the state
    after the row's own last step (hx where the length is 0), and ``reverse`` starts at that step. A nested input, of
    the jagged layout (B, j, I) and without gaps, has lengths of its own; output is nested then, with the same offsets.

    The fused kernels take float32, float64, bfloat16 and float16 (which accumulate in float32 and round h at each
    step) on the CPU and on CUDA. Everything else that :class:`torch.nn.RNN` takes goes through the same formula in
    ATen's operators.

    Raises:
        ValueError: an input of other dimensions or layout, or lengths of another shape, dtype or range.
        RuntimeError: T = 0, an unknown nonlinearity, or sizes, dtypes or devices that don't fit together.

    Source: J. L. Elman, Finding Structure in Time, Cognitive Science 14 (1990).
    """
    if input.is_nested:
        if lengths is not None:
            raise ValueError("lengths are for padded input, but the input is nested, with lengths of its own")
        rows, lengths = nested_rows(input)
        output, h_n = run_layer(rows, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity, reverse, False, lengths)
        return nested_like(input, output), h_n
    if input.dim() not in (2, 3):
        raise ValueError(f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
    unbatched = input.dim() == 2
    if hx is not None and hx.dim() != input.dim() - 1:
        kind = "unbatched 2-D" if unbatched else "batched 3-D"
        raise RuntimeError(f"For {kind} input, hx should be {input.dim() - 1}-D but got {hx.dim()}-D tensor")
    if lengths is not None:
        lengths = checked_lengths(input, lengths, batch_first)
    if unbatched:
        input, hx, batch_first = input.unsqueeze(1), None if hx is None else hx.unsqueeze(0), False
    output, h_n = run_layer(
        input, hx, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity, reverse, batch_first, lengths
    )
    return (output.squeeze(1), h_n.squeeze(0)) if unbatched else (output, h_n)


def nested_rows(input: Any) -> tuple[Tensor, Tensor]:
    """All steps of a nested tensor, row after row, and each row's length, on the CPU."""
    if input.layout != torch.jagged or input.dim() != 3 or input._ragged_idx != 1 or input.lengths() is not None:
        kind = "strided" if input.layout != torch.jagged else f"{input.dim()}-D jagged"
        raise ValueError(
            f"a nested input must have the jagged layout, of shape (B, j, I) and without gaps, but got a {kind} one of "
            f"{input.size(0)} rows"
        )
    return input.values(), input.offsets().diff().to("cpu", torch.int64)


def nested_like(input: Any, rows: Tensor) -> Tensor:
    """The rows as a nested tensor with the offsets of the input."""
    return torch.nested.nested_tensor_from_jagged(rows, input.offsets())


def checked_lengths(input: Tensor, lengths: Tensor | Sequence[int], batch_first: bool) -> Tensor:
    """The lengths as an int64 tensor on the CPU, which shares no memory with the caller's."""
    if input.dim() != 3:
        raise ValueError(f"lengths are for the rows of a batched 3-D input, but the input is {input.dim()}-D")
    batch, steps = (input.size(0), input.size(1)) if batch_first else (input.size(1), input.size(0))
    try:
        given = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"lengths must be a 1-D tensor or a list of integers: {error}") from None
    if given.dim() != 1 or given.size(0) != batch:
        raise ValueError(f"lengths must be {batch} numbers, one for each row, but got shape {list(given.shape)}")
    if (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool) and given.numel():
        raise ValueError(f"lengths must be integers, but got {given.dtype}")
    numbers = given.to("cpu", torch.int64, copy=True)
    if not torch.compiler.is_compiling():  # there the operator looks at them
        for number in numbers.tolist():
            if not 0 <= number <= steps:
                raise ValueError(f"lengths must lie between 0 and {steps}, but got {number}")
    return numbers


def run_layer(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    nonlinearity: str,
    reverse: bool,
    batch_first: bool,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator's arguments, on whichever path takes them."""
    arguments = (input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    options = (nonlinearity, reverse, batch_first, lengths, batch_sizes)
    compiling = torch.compiler.is_compiling()
    result: tuple[Tensor, Tensor] | None
    if not compiling:
        result = _C.rnn_layer(*arguments, *options, False)
        if result is not None:
            return result
        if has_torch_function(arguments):
            result = handle_torch_function(run_layer, arguments, *arguments, *options)
            return result
    if (compiling or any(isinstance(t, tuple(SUBCLASSES)) for t in arguments)) and _operator_takes(
        *arguments, devices=_FUSED_DEVICES, subclasses=tuple(SUBCLASSES)
    ):
        result = torch.ops.rnn_ext.rnn_layer(*arguments, *options)
        return result
    return _aten.rnn_layer(*arguments, *options)
