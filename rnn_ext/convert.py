"""Swapping the RNN cells of an existing model."""

from typing import TypeVar

from torch import nn

from .modules import RNNCell

_Model = TypeVar("_Model", bound=nn.Module)


def convert_rnn_cells(model: _Model, inverse: bool = False) -> _Model:
    """Makes every nn.RNNCell in the model the fused one, in place, and returns the model.

    The class of the module object changes and nothing else: its Parameters (and the optimizers that hold them),
    hooks, buffers, training flag and every reference to it, shared cells included, stay what they were. Subclasses of
    nn.RNNCell, parametrized cells among them, may override anything, and are left alone.

    Args:
        model: any module; a bare nn.RNNCell too.
        inverse: turn rnn_ext.RNNCell back into nn.RNNCell, for tools that look for that very class.
    """
    old, new = (RNNCell, nn.RNNCell) if inverse else (nn.RNNCell, RNNCell)
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new
    return model
