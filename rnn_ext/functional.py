"""The functional form of the cell, and the choice between the fused kernels and ATen."""

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
    if (compiling or any(isinstance(t, tuple(SUBCLASSES)) for t in arguments)) and _operator_takes(*arguments):
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
) -> bool:
    """What _C.rnn_cell asks of the tensors, in Python that Dynamo can trace; SUBCLASSES are taken too."""
    device = input.device.type
    if device not in _FUSED_DEVICES or torch._C._are_functorch_transforms_active():
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
        if is_traceable_wrapper_subclass(t) and not isinstance(t, tuple(SUBCLASSES)):
            return False
    return all(
        bias is None or (bias.dim() == 1 and weight_hh.dim() == 2 and bias.size(0) == weight_hh.size(1))
        for bias in (bias_ih, bias_hh)
    )
