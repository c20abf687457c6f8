"""Swapping the RNN cells of an existing model."""

from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from .modules import RNNCell

_Model = TypeVar("_Model", bound=nn.Module)


def convert_rnn_cells(model: _Model, inverse: bool = False) -> _Model:
    """Makes every nn.RNNCell in the model the fused one, in place, and returns the model.

    The class of the module object changes and nothing else: its Parameters (and the optimizers that hold them),
    hooks, parametrizations, buffers, training flag and every reference to it, shared cells included, stay what they
    were. Subclasses of nn.RNNCell may override anything, and are left alone.

    Args:
        model: any module; a bare nn.RNNCell too.
        inverse: turn rnn_ext.RNNCell back into nn.RNNCell, for tools that look for that very class.
    """
    old, new = (RNNCell, nn.RNNCell) if inverse else (nn.RNNCell, RNNCell)
    for module in model.modules():
        cls = type(module)
        if cls is old:
            module.__class__ = new
        elif parametrize.is_parametrized(module) and cls.__bases__ == (old,):
            # torch.nn.utils.parametrize gave this module (and its copies) a class of its own, with the parametrized
            # tensors as properties. They move to a subclass of the new class.
            properties = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(f"Parametrized{new.__name__}", (new,), properties)
    return model
