"""Swapping the RNNs and RNN cells of an existing model."""

from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from .modules import RNNCell
from .rnn import RNN

_Model = TypeVar("_Model", bound=nn.Module)
_PAIRS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = ((nn.RNNCell, RNNCell), (nn.RNN, RNN))


def convert(model: _Model, inverse: bool = False) -> _Model:
    """Makes every nn.RNNCell and nn.RNN in the model the fused one, in place, and returns the model.

    The class of the module object changes and nothing else: its Parameters (and the optimizers that hold them),
    hooks, parametrizations, buffers, training flag and every reference to it, shared modules included, stay what they
    were. Subclasses may override anything, and are left alone.

    Args:
        model: any module; a bare nn.RNNCell or nn.RNN too.
        inverse: turn rnn_ext.RNNCell and rnn_ext.RNN back, for tools that look for the very classes of torch.nn.

    Those of sigmoid, which torch.nn does not have, are not turned back.
    """
    for module in model.modules():
        if inverse and getattr(module, "nonlinearity", None) == "sigmoid":
            continue
        for pair in _PAIRS:
            old, new = reversed(pair) if inverse else pair
            _change_class(module, old, new)
    return model


def _change_class(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    cls = type(module)
    if cls is old:
        module.__class__ = new
    elif parametrize.is_parametrized(module) and cls.__bases__ == (old,):
        # torch.nn.utils.parametrize gave this module (and its copies) a class of its own, with the parametrized
        # tensors as properties. They move to a subclass of the new class.
        properties = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(f"Parametrized{new.__name__}", (new,), properties)
