from collections.abc import Sequence
from enum import IntEnum

from torch import Tensor

class Path(IntEnum):
    ATEN = 0
    KERNEL = 1
    AUTOGRAD = 2
    OPERATOR = 3

cuda_built: bool
cuda_archs: str

def choose_path(
    input: object, hx: object, weight_ih: object, weight_hh: object, bias_ih: object, bias_hh: object
) -> int: ...
def is_fused_backward(*tensors: Tensor | None) -> bool: ...
def check_sizes(input: Tensor, hx: Tensor | None, weight_ih: Tensor, weight_hh: Tensor) -> None: ...
def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    nonlinearity: str,
) -> Tensor: ...
def rnn_cell_backward(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor | None,
    hx: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor | None,
    nonlinearity: str,
    output_mask: Sequence[bool],
) -> list[Tensor]: ...
def cpu_capability() -> str: ...
