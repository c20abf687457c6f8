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
from typing import Any, cast

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

    def strategy(op_schema: OpSchema, rows: Sequence[int], outputs: Sequence[Any]) -> OpStrategy:
        """`rows`: the places of the arguments that have a row for each row of the batch."""
        tensors = [(i, t) for i, t in enumerate(op_schema.args_schema) if isinstance(t, OpStrategy)]
        allowed: list[list[Any]] = [[Replicate()] * (len(outputs) + len(tensors))]
        if tensors[0][1].ndim == 2:
            allowed.append([*outputs, *(Shard(0) if i in rows else Replicate() for i, _ in tensors)])
        mesh = op_schema.get_mesh_from_args()
        return expand_to_full_mesh_op_strategy(mesh, op_schema, allowed, input_index=len(outputs))

    def forward(op_schema: OpSchema) -> OpStrategy:
        return strategy(op_schema, rows=(0, 1), outputs=[Shard(0)])

    def backward(op_schema: OpSchema) -> Any:
        mask: Any = op_schema.args_schema[7]
        outputs = [Shard(0) if i < 2 else Partial() for i, asked in enumerate(mask) if asked]
        expanded: Any = strategy(op_schema, rows=(0, 1, 2, 3), outputs=outputs)
        for spec in expanded.strategies:
            if len(outputs) == 1:  # still a list
                spec.output_specs = (spec.output_specs,)
        return expanded

    everything = RuntimeSchemaInfo(0)  # counts in the key of DTensor's cache: which arguments are None does
    register(torch.ops.rnn_ext.rnn_cell.default, forward, everything)
    register(torch.ops.rnn_ext.rnn_cell_backward.default, backward, everything)
    functional.SUBCLASSES.append(DTensor)


@_once_imported("torch._inductor.lowering")
def _register_fallbacks() -> None:
    """Inductor calls the operators as they are. Where CI is set, it must be told: they have decompositions, too."""
    from torch._inductor.lowering import FALLBACK_ALLOW_LIST

    FALLBACK_ALLOW_LIST.update(f"rnn_ext::{name}" for name in _FORMULAS)


@_once_imported("torch._dynamo")
def _register_rnn() -> None:
    """Dynamo breaks the graph at any nn.RNN, since it would unroll it. Ours is a call of an operator for each layer.

    The setting that says so is for all models: it is set for as long as Dynamo looks at an RNN of ours. On packed
    input the graph does break, around each layer: how many rows h_n has is known to batch_sizes alone.
    """
    from torch._dynamo import config, disable
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
    rnn.run_uncompiled = cast(Any, disable)(functional.run_layer)


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
