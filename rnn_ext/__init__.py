"""Fused Elman RNNs for PyTorch: drop-ins for torch.nn.RNNCell, one kernel launch a step, and for torch.nn.RNN.

See :class:`RNNCell`, :class:`RNN` and :func:`convert`; ``python -m rnn_ext`` tells what was built.
"""

from pathlib import Path as _Path

import torch as _torch  # its libraries must be loaded before _C

from ._build import check_build as _check_build

_check_build(_Path(__file__).parent, _torch.__version__, _torch.version.cuda)

from . import _C, _integrations, ops  # noqa: F401
from ._version import __version__
from .autograd import RNNCellFunction
from .conversion import convert
from .functional import rnn_cell, rnn_layer
from .modules import LazyRNNCell, RNNCell
from .rnn import RNN, ElmanNetwork

__all__ = [
    "RNN",
    "ElmanNetwork",
    "LazyRNNCell",
    "RNNCell",
    "RNNCellFunction",
    "__version__",
    "convert",
    "is_cuda_built",
    "ops",
    "rnn_cell",
    "rnn_layer",
]


def is_cuda_built() -> bool:
    """Whether the CUDA kernels were compiled in (whatever GPU is there)."""
    return bool(_C.cuda_built)
