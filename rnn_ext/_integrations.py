"""What other parts of PyTorch must be told about the operators.

Some of those parts take long to import (DTensor as long as half of torch; the FLOP counter imports Triton), and most
programs never use them; nor has torch a place where they would look for registrations. So each is told when it is
imported, by whomever, and right away if it already is.
"""

import importlib.abc
import logging
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch._decomp import register_decomposition

from . import _aten, functional

# The operators by ATen's.
_FORMULAS: dict[str, Callable[..., Any]] = {
    "rnn_cell": _aten.rnn_cell_in_parts,
    "rnn_cell_backward": _aten.rnn_cell_backward,
    "rnn_layer": _aten.rnn_layer,
    "rnn_layer_backward": _aten.rnn_layer_backward,
}

_log = logging.getLogger(__name__)
_registrations: dict[str, Callable[[], None]] = {}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds no module itself: it wraps the loaders of those that want a registration, which later finders find.

    It keeps no record of what was asked: most questions come from an import, but not all.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in _registrations:
            for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader)
                    return spec
        return None


class _Loader(importlib.abc.Loader):
    """The module's own loader, which takes this one's place in the module, and then the registration."""

    _loader: Any = None  # of a copy that is still being made

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module.__name__)


def _register(name: str) -> None:
    """Never raises: it would take the module from whoever imports it, for operators that they may not even use."""
    try:
        _registrations[name]()
    except Exception:
        _log.warning("%s can't be told about rnn_ext's operators", name, exc_info=True)


def _once_imported(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def decorate(registration: Callable[[], None]) -> Callable[[], None]:
        _registrations[name] = registration
        if name in sys.modules:
            _register(name)
        return registration

    return decorate


@_once_imported("torch.utils.flop_counter")
def _register_flops() -> None:
    """Two FLOPs for each multiplication and addition of the products that the kernels form, as for aten.mm."""
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(torch.ops.rnn_ext.rnn_cell)
    def forward(input: Any, hx: Any, weight_ih: Any, weight_hh: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        columns: int = weight_ih[1] + (0 if hx is None else weight_hh[1])
        rows_by_hidden_size: int = out_shape.numel()
        return 2 * rows_by_hidden_size * columns

    @register_flop_formula(torch.ops.rnn_ext.rnn_cell_backward)
    def backward(
        grad_output: Any, output: Any, input: Any, hx: Any, weight_ih: Any, weight_hh: Any, _: Any, mask: Any, **__: Any
    ) -> int:
        rows_by_hidden_size: int = output.numel()
        input_size = (weight_ih or input or (0,))[-1]
        hidden_size = output[-1]
        products = (mask[0], input_size), (mask[1], hidden_size), (mask[2], input_size), (mask[3] and hx, hidden_size)
        return sum(2 * rows_by_hidden_size * columns for asked, columns in products if asked)

    @register_flop_formula(torch.ops.rnn_ext.rnn_layer)
    def layer_forward(input: Any, hx: Any, weight_ih: Any, weight_hh: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        rows_by_hidden_size: int = out_shape[0].numel()
        of_states: int = rows_by_hidden_size - (0 if hx else out_shape[1].numel())
        return int(2 * (rows_by_hidden_size * weight_ih[1] + of_states * weight_hh[1]))

    @register_flop_formula(torch.ops.rnn_ext.rnn_layer_backward)
    def layer_backward(
        grad_output: Any, grad_h_n: Any, output: Any, input: Any, hx: Any, weight_ih: Any, weight_hh: Any,
        nonlinearity: Any, mask: Any, *_: Any, **__: Any,
    ) -> int:  # fmt: skip
        rows_by_hidden_size: int = output.numel()
        input_size: int = (weight_ih or input or (0,))[-1]
        columns: int = (mask[0] + mask[2]) * input_size + (1 + mask[3]) * output[-1]  # dz U runs through the steps
        return 2 * rows_by_hidden_size * columns


@_once_imported("torch.distributed.tensor")
def _register_sharding() -> None:
    """The batch may be sharded (weight gradients are then partial sums), everything else is replicated."""
    try:
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
        from torch.distributed.tensor._op_schema import OpSchema, OpStrategy, RuntimeSchemaInfo
        from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

        register = DTensor._op_dispatcher.sharding_propagator.register_op_strategy
    except (ImportError, AttributeError):  # private names, which move: DTensors then go through ATen's operators
        return

    def strategy(op_schema: OpSchema, batch: dict[int, int], outputs: Sequence[Any]) -> OpStrategy:
        """`batch`: which dimension of which argument is the batch; none, where there is nothing to shard."""
        tensors = [i for i, t in enumerate(op_schema.args_schema) if isinstance(t, OpStrategy)]
        allowed: list[list[Any]] = [[Replicate()] * (len(outputs) + len(tensors))]
        if batch:
            allowed.append([*outputs, *(Shard(batch[i]) if i in batch else Replicate() for i in tensors)])
        mesh = op_schema.get_mesh_from_args()
        return expand_to_full_mesh_op_strategy(mesh, op_schema, allowed, input_index=len(outputs))

    def gradients(op_schema: OpSchema, batch: dict[int, int], mask: Any, dim: int = 0) -> Any:
        every = [Shard(dim), Shard(0), *[Partial()] * 4]
        outputs = [placement for placement, asked in zip(every, mask, strict=True) if asked]
        expanded: Any = strategy(op_schema, batch, outputs)
        for spec in expanded.strategies:
            if len(outputs) == 1:  # still a list
                spec.output_specs = (spec.output_specs,)
        return expanded

    def cell(op_schema: OpSchema) -> OpStrategy:
        input: Any = op_schema.args_schema[0]
        return strategy(op_schema, {0: 0, 1: 0} if input.ndim == 2 else {}, [Shard(0)])

    def cell_backward(op_schema: OpSchema) -> Any:
        output: Any = op_schema.args_schema[1]
        batch = dict.fromkeys(range(4), 0) if output.ndim == 2 else {}
        return gradients(op_schema, batch, op_schema.args_schema[7])

    def layer(op_schema: OpSchema) -> OpStrategy:
        input: Any = op_schema.args_schema[0]
        dim = 0 if op_schema.args_schema[8:9] == (True,) else 1  # batch_first, which is left out where it is False
        return strategy(op_schema, {0: dim, 1: 0} if input.ndim == 3 else {}, [Shard(dim), Shard(0)])

    def layer_backward(op_schema: OpSchema) -> Any:
        output: Any = op_schema.args_schema[2]
        dim = 0 if op_schema.args_schema[10] else 1
        batch = {0: dim, 1: 0, 2: dim, 3: dim, 4: 0} if output.ndim == 3 else {}
        return gradients(op_schema, batch, op_schema.args_schema[8], dim)

    ours = torch.ops.rnn_ext
    everything = RuntimeSchemaInfo(0)  # counts in the key of DTensor's cache: which arguments are None does
    register(ours.rnn_cell.default, cell, everything)
    register(ours.rnn_cell_backward.default, cell_backward, everything)
    register(ours.rnn_layer.default, layer, everything)
    register(ours.rnn_layer_backward.default, layer_backward, everything)
    functional.SUBCLASSES.append(DTensor)


@_once_imported("torch.onnx._internal.exporter._torchlib.ops")
def _register_onnx() -> None:
    """A layer becomes ONNX's RNN, which takes any T. ATen's operators would be some for each step."""
    from onnxscript import INT32, INT64, onnx_opset
    from torch.onnx._internal.exporter._torchlib._tensor_typing import TFloat
    from torch.onnx._internal.exporter._torchlib._torchlib_registry import onnx_impl

    onnx: Any = onnx_opset.opset18

    @onnx_impl(torch.ops.rnn_ext.rnn_layer.default, trace_only=True)
    def layer(
        input: TFloat,
        hx: TFloat | None,
        weight_ih: TFloat,
        weight_hh: TFloat,
        bias_ih: TFloat | None = None,
        bias_hh: TFloat | None = None,
        nonlinearity: str = "tanh",
        reverse: bool = False,
        batch_first: bool = False,
        lengths: INT64 | None = None,
        batch_sizes: INT64 | None = None,
    ) -> tuple[TFloat, TFloat]:
        input_shape: Any = input.shape
        weight_shape: Any = weight_hh.shape
        if batch_sizes is not None or len(input_shape) != 3:
            raise NotImplementedError("ONNX's RNN takes padded input, with lengths or without, but this is flat")
        biases = [bias for bias in (bias_ih, bias_hh) if bias is not None]
        if len(biases) == 1:
            biases.append(onnx.Mul(biases[0], onnx.CastLike(0.0, biases[0])))
        swapped = {"perm": [1, 0, 2]}
        output, h_n = onnx.RNN(
            onnx.Transpose(input, **swapped) if batch_first else input,
            onnx.Unsqueeze(weight_ih, [0]),
            onnx.Unsqueeze(weight_hh, [0]),
            onnx.Unsqueeze(onnx.Concat(*biases, axis=0), [0]) if biases else None,
            None if lengths is None else onnx.Cast(lengths, to=INT32.dtype),
            None if hx is None else onnx.Unsqueeze(hx, [0]),
            activations=[nonlinearity.capitalize()],
            direction="reverse" if reverse else "forward",
            hidden_size=weight_shape[0],
        )
        output = onnx.Squeeze(output, [1])  # of directions
        return onnx.Transpose(output, **swapped) if batch_first else output, onnx.Squeeze(h_n, [0])


@_once_imported("torch._inductor.lowering")
def _register_fallbacks() -> None:
    """Inductor calls the operators as they are. Where CI is set, it must be told: they have decompositions, too."""
    from torch._inductor.lowering import FALLBACK_ALLOW_LIST

    FALLBACK_ALLOW_LIST.update(f"rnn_ext::{name}" for name in _FORMULAS)


@_once_imported("torch._dynamo")
def _register_rnn() -> None:
    """Dynamo breaks the graph at any nn.RNN, since it would unroll it. Ours is a call of an operator for each layer.

    The setting that says so is for all models: it is set for as long as Dynamo looks at an RNN of ours.
    """
    from torch._dynamo import config
    from torch._dynamo.variables.builder import VariableBuilder

    from . import rnn

    wrap_module: Any = VariableBuilder.wrap_module

    @wraps(wrap_module)
    def wrap_ours_too(self: Any, value: Any) -> Any:
        if not isinstance(value, rnn.RNN):
            return wrap_module(self, value)
        with config.patch(allow_rnn=True):
            return wrap_module(self, value)

    VariableBuilder.wrap_module = wrap_ours_too  # type: ignore[method-assign]


def _register_decompositions() -> None:
    """For what knows ATen alone, as the exporter to ONNX does. Inductor asks for the operators that it decomposes."""
    for name, formula in _FORMULAS.items():
        op = getattr(torch.ops.rnn_ext, name)
        register_decomposition(op)(formula)
        # Else fake tensors of symbolic sizes would run the formula in place of the Meta kernels, which know our errors.
        register_decomposition(op, type="meta")(formula)


def _register_builtin() -> None:
    """TorchScript compiles a call of rnn_cell, whose body it can't read, to the operator."""
    try:
        from torch.jit._builtins import _register_builtin
    except ImportError:  # a private name: torch.jit.script then says what it can't read
        return
    _register_builtin(functional.rnn_cell, "rnn_ext::rnn_cell")


_register_decompositions()
_register_builtin()
sys.meta_path.insert(0, _Finder())
