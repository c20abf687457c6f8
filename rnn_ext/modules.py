"""The modules: torch.nn.RNNCell's parameters and behaviour over the fused cell."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from . import _C
from .functional import rnn_cell

_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class RNNCell(nn.RNNCell):
    r"""An Elman RNN cell, :math:`h' = f(x W^\top + b_{ih} + h U^\top + b_{hh})`, fused: a drop-in for nn.RNNCell.

    Args:
        input_size: I, the number of features of x.
        hidden_size: H, the number of features of h.
        bias: whether the cell has ``bias_ih`` and ``bias_hh``.
        nonlinearity: ``"tanh"``, ``"relu"`` or, beyond nn.RNNCell, ``"sigmoid"``.
        device: where the parameters are created.
        dtype: the parameters' dtype.

    Attributes:
        weight_ih: W, of shape (H, I), drawn from U(-1/√H, 1/√H) like the others.
        weight_hh: U, of shape (H, H).
        bias_ih: of shape (H), or None.
        bias_hh: of shape (H), or None.

    Shape:
        input (B, I) or (I); hx (B, H) or (H), zeros if not given; output like hx.

    Raises:
        ValueError, RuntimeError: on a call, those of nn.RNNCell.

    Example:
        >>> cell = rnn_ext.RNNCell(10, 20)
        >>> h = cell(torch.randn(3, 10))
        >>> h = cell(torch.randn(3, 10), h)
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next hidden state."""
        if torch.compiler.is_compiling() or torch.jit.is_scripting():  # type: ignore[attr-defined]
            return rnn_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.nonlinearity)
        return rnn_cell(input, hx, *_C.get_parameters(self, _PARAMETERS), self.nonlinearity)


class LazyRNNCell(LazyModuleMixin, RNNCell):
    """An :class:`RNNCell` that takes its input_size from the first input, and then becomes an RNNCell.

    Its parameters are uninitialized until then (see torch.nn.modules.lazy.LazyModuleMixin); they are drawn at the
    first call, in nn.RNNCell's order. Arguments as for :class:`RNNCell`, without input_size.
    """

    cls_to_become = RNNCell

    def __init__(
        self,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(0, 0, bias, nonlinearity, device, dtype)
        self.hidden_size = hidden_size
        uninitialized = cast(Any, UninitializedParameter)  # typed as if it took nothing
        for name in dict(self.named_parameters()):
            setattr(self, name, uninitialized(device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draws the parameters anew once they have shapes."""
        if self._parameters and not self.has_uninitialized_params():
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor, hx: Tensor | None = None) -> None:
        """Gives the parameters the shapes that the first input implies, and their values."""
        if input.dim() not in (1, 2):
            raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if self.has_uninitialized_params():
            shapes = {
                "weight_ih": (self.hidden_size, input.size(-1)),
                "weight_hh": (self.hidden_size, self.hidden_size),
            }
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    cast(Any, parameter).materialize(shapes.get(name, (self.hidden_size,)))
                self.reset_parameters()
        self.input_size = self.weight_ih.size(1)  # known already where a state_dict was loaded first
