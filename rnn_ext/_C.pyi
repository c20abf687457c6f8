from collections.abc import Sequence
from typing import Any

from torch import Tensor, dtype
from torch.nn import Module

cuda_built: bool
cuda_archs: str

def rnn_cell(
    input: object,
    hx: object,
    weight_ih: object,
    weight_hh: object,
    bias_ih: object,
    bias_hh: object,
    nonlinearity: object,
) -> Tensor | None: ...
def rnn_layer(
    input: object,
    hx: object,
    weight_ih: object,
    weight_hh: object,
    bias_ih: object,
    bias_hh: object,
    nonlinearity: object,
    reverse: object,
    batch_first: object,
    lengths: object,
    batch_sizes: object,
    with_layers: object,
) -> tuple[Tensor, Tensor] | None: ...
def get_parameters(module: Module, names: tuple[str, ...]) -> tuple[Any, Any, Any, Any]: ...
def rnn_cell_below_autograd(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    nonlinearity: str,
) -> Tensor: ...
def rnn_cell_gradients(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor | None,
    hx: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor | None,
    nonlinearity: str,
    output_mask: Sequence[bool],
) -> list[Tensor]: ...
def check_sizes(input: Tensor, hx: Tensor | None, weight_ih: Tensor, weight_hh: Tensor) -> None: ...
def explain(
    batch: int,
    input_size: int,
    hidden_size: int,
    dtype: dtype,
    compute_capability: int,
    multiprocessors: int,
    smem_per_block: int,
    tf32: bool,
    split_tf32: str,
    forced: str,
    forced_backward: str,
) -> str: ...
def explain_sequence(
    steps: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    dtype: dtype,
    compute_capability: int,
    multiprocessors: int,
    smem_per_block: int,
    forced: str,
) -> str: ...
def explain_cpu(batch: int, input_size: int, hidden_size: int, dtype: dtype) -> str: ...
def cpu_capability() -> str: ...
