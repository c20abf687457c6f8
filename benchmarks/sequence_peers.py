"""What bench_sequence.py measures (cases) and what it compares (peers); peers.py has the same of the cell.

A peer's step computes a whole sequence, and its result reads in nn.RNN's order, (output, dx, dh, the parameters'
gradients), with output and dx padded. JAX, onnxruntime and OpenVINO take part where they are installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from peers import TOLERANCE, Step, make_step
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnn_ext

PASSES = ("forward", "forward_backward")
LAYOUTS = {
    "padded": "every row of T steps",
    "packed": "rows of T/4 to T steps in a PackedSequence",
    "lengths": "the same rows, padded and in no order: `lengths=` here, pack, run and pad with nn.RNN",
}

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One thing to measure: x (T, B, I) and h (layers * directions, B, H) of `dtype`, in the pass `pass_name`."""

    T: int
    B: int
    I: int  # noqa: E741  (the name the sizes have everywhere in the project)
    H: int
    dtype: str = "float32"
    pass_name: str = "forward"
    nonlinearity: str = "tanh"
    layers: int = 1
    directions: int = 1
    layout: str = "padded"
    limit: bool = False

    def __str__(self) -> str:
        return f"{self.T},{self.B},{self.I},{self.H} {self.dtype} {self.pass_name}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def lengths(self) -> Tensor:
        """Of each row (B): from T down to a quarter of it where rows differ; sorted if they are packed."""
        if self.layout == "padded":
            return torch.full((self.B,), self.T)
        lengths = torch.linspace(self.T, max(1, self.T / 4), self.B).long()
        if self.layout == "packed":
            return lengths
        return lengths[torch.randperm(self.B, generator=torch.Generator().manual_seed(0))]

    @property
    def flop(self) -> int:
        """Multiplications and additions of the GEMMs; the backward has twice the forward's."""
        inputs = self.I + (self.layers - 1) * self.directions * self.H
        forward = 2 * int(self.lengths.sum()) * (inputs + self.layers * self.H) * self.H * self.directions
        return 3 * forward if self.pass_name == "forward_backward" else forward

    def module(self, cls: type[nn.RNN], tensors: Tensors | None = None, dtype: torch.dtype | None = None) -> nn.RNN:
        """An RNN of this case's sizes, with the parameters in `tensors` if there are any."""
        bidirectional = self.directions == 2
        options = {"nonlinearity": self.nonlinearity, "bidirectional": bidirectional}
        rnn = cls(self.I, self.H, self.layers, dtype=dtype or self.torch_dtype, **options)
        if tensors is not None:
            rnn.load_state_dict({name: tensors[name] for name, _ in rnn.named_parameters()})
        return rnn


def name_of(row: dict[str, Any]) -> str:
    """A row's case in the pages and figures."""
    words = [f"{row['T']}, {row['B']}, {row['I']}, {row['H']}"]
    if row["layers"] > 1:
        words.append(f"{row['layers']} layers")
    if row["directions"] > 1:
        words.append("bidirectional")
    if row["layout"] != "padded":
        words.append(row["layout"])
    return " ".join(words)


def make_tensors(case: Case) -> Tensors:
    """Random data as a layer sees it: parameters as nn.RNN draws them, h in (-1, 1); no gradient beyond a row's end."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(case.torch_dtype)

    ended = torch.arange(case.T).unsqueeze(1) >= case.lengths
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parameters = case.module(nn.RNN, dtype=torch.float32).state_dict()
    return {
        "x": normal(case.T, case.B, case.I),
        "h": normal(case.layers * case.directions, case.B, case.H).tanh(),
        "grad_output": normal(case.T, case.B, case.directions * case.H).masked_fill(ended.unsqueeze(2), 0),
        **{name: tensor.to(case.torch_dtype) for name, tensor in parameters.items()},
    }


def inputs(case: Case, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """x and h as leaves."""
    wanted = case.pass_name != "forward"
    return tuple(tensors[name].detach().clone().requires_grad_(wanted) for name in ("x", "h"))


def whole_step(cls: type[nn.RNN], case: Case, tensors: Tensors) -> Step:
    """Every step of every row, also those beyond its length, whose output is then cleared."""
    rnn = case.module(cls, tensors)
    x, h = inputs(case, tensors)
    ended = (torch.arange(case.T).unsqueeze(1) >= case.lengths).unsqueeze(2)

    def unpack(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (result[0].masked_fill(ended, 0), *result[1:])

    return make_step(case, lambda: rnn(x, h)[0], [x, h, *rnn.parameters()], tensors["grad_output"], unpack)


def packed_step(cls: type[nn.RNN], case: Case, tensors: Tensors) -> Step:
    rnn = case.module(cls, tensors)
    x, h = inputs(case, tensors)
    batch_sizes = pack_padded_sequence(x.detach(), case.lengths).batch_sizes

    def pack(t: Tensor) -> Tensor:
        return pack_padded_sequence(t.detach(), case.lengths).data

    def pad(data: Tensor) -> Tensor:
        return pad_packed_sequence(PackedSequence(data, batch_sizes), total_length=case.T)[0]

    data = pack(x).requires_grad_(x.requires_grad)

    def unpack(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*(pad(t.detach()) for t in result[:1] + result[1:2]), *result[2:])

    packed = PackedSequence(data, batch_sizes)
    leaves = [data, h, *rnn.parameters()]
    return make_step(case, lambda: rnn(packed, h)[0].data, leaves, pack(tensors["grad_output"]), unpack)


def lengths_step(case: Case, tensors: Tensors) -> Step:
    rnn = case.module(rnn_ext.RNN, tensors)
    x, h = inputs(case, tensors)
    lengths = case.lengths
    leaves = [x, h, *rnn.parameters()]
    return make_step(case, lambda: rnn(x, h, lengths=lengths)[0], leaves, tensors["grad_output"])


def pack_and_pad_step(case: Case, tensors: Tensors) -> Step:
    """What a user of nn.RNN writes for rows of different lengths."""
    rnn = case.module(nn.RNN, tensors)
    x, h = inputs(case, tensors)
    lengths = case.lengths

    def forward() -> Tensor:
        output, _ = rnn(pack_padded_sequence(x, lengths, enforce_sorted=False), h)
        return pad_packed_sequence(output, total_length=case.T)[0]

    return make_step(case, forward, [x, h, *rnn.parameters()], tensors["grad_output"])


def ours(case: Case, tensors: Tensors) -> Step:
    if case.layout == "lengths":
        return lengths_step(case, tensors)
    return (packed_step if case.layout == "packed" else whole_step)(rnn_ext.RNN, case, tensors)


def rnn(case: Case, tensors: Tensors) -> Step:
    if case.layout == "lengths":
        return pack_and_pad_step(case, tensors)
    return (packed_step if case.layout == "packed" else whole_step)(nn.RNN, case, tensors)


def cells_step(case: Case, tensors: Tensors) -> Step:
    """A Python loop of rnn_ext.RNNCell."""
    cell = rnn_ext.RNNCell(case.I, case.H, nonlinearity=case.nonlinearity, dtype=case.torch_dtype)
    cell.load_state_dict({name: tensors[f"{name}_l0"] for name, _ in cell.named_parameters()})
    x, h = inputs(case, tensors)

    def forward() -> Tensor:
        state, outputs = h[0], []
        for step in x.unbind(0):
            state = cell(step, state)
            outputs.append(state)
        return torch.stack(outputs)

    return make_step(case, forward, [x, h, *cell.parameters()], tensors["grad_output"])


def jax_step(case: Case, tensors: Tensors) -> Step:
    """jit of lax.scan, after one product x Wᵀ for all steps; the gradients by jax.vjp in the same jit."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp

    f = {"tanh": jnp.tanh, "relu": jax.nn.relu}[case.nonlinearity]
    dtype = getattr(jnp, case.dtype)
    names = ("x", "h", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    jax.config.update("jax_enable_x64", case.dtype == "float64")

    def given(name: str) -> Any:
        return jnp.asarray(tensors[name].to(torch.float64).numpy()).astype(dtype)

    def layer(x: Any, h: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any) -> Any:
        def step(state: Any, z: Any) -> tuple[Any, Any]:
            state = f(z + state @ weight_hh.T)
            return state, state

        return jax.lax.scan(step, h[0], x @ weight_ih.T + (bias_ih + bias_hh))[1]

    def layer_and_gradients(grad_output: Any, *arguments: Any) -> tuple[Any, ...]:
        output, backward = jax.vjp(layer, *arguments)
        return output, *backward(grad_output)

    arguments = [given(name) for name in names]
    if case.pass_name == "forward":
        compiled = jax.jit(lambda *arguments: (layer(*arguments),))
    else:
        compiled = jax.jit(layer_and_gradients)
        arguments.insert(0, given("grad_output"))
    arguments = jax.block_until_ready(arguments)

    def unpack(result: tuple[Any, ...]) -> tuple[Tensor, ...]:
        wide = jnp.float64 if case.dtype == "float64" else jnp.float32
        return tuple(torch.tensor(jax.device_get(t.astype(wide))) for t in result)

    return Step(lambda: jax.block_until_ready(compiled(*arguments)), unpack)


def onnx_model(case: Case, tensors: Tensors) -> bytes:
    """ONNX's RNN operator on float32, as a model of X and H."""
    from onnx import TensorProto, helper, numpy_helper

    constants = {
        "W": tensors["weight_ih_l0"].unsqueeze(0),
        "R": tensors["weight_hh_l0"].unsqueeze(0),
        "B": torch.cat((tensors["bias_ih_l0"], tensors["bias_hh_l0"])).unsqueeze(0),
    }
    activation = {"tanh": "Tanh", "relu": "Relu"}[case.nonlinearity]
    names = ["X", "W", "R", "B", "", "H"]
    node = helper.make_node("RNN", names, ["Y", "Y_h"], hidden_size=case.H, activations=[activation])
    shapes = {"X": (case.T, case.B, case.I), "H": (1, case.B, case.H), "Y": (case.T, 1, case.B, case.H)}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    initializers = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()]
    graph = helper.make_graph([node], "rnn", [values["X"], values["H"]], [values["Y"]], initializers)
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def onnxruntime_step(case: Case, tensors: Tensors) -> Step:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads must not disturb the next peer
    session = onnxruntime.InferenceSession(onnx_model(case, tensors), options, providers=["CPUExecutionProvider"])
    feeds = {"X": tensors["x"].numpy(), "H": tensors["h"].numpy()}
    return Step(lambda: session.run(["Y"], feeds), lambda result: (torch.from_numpy(result[0]).squeeze(1),))


def openvino_step(case: Case, tensors: Tensors) -> Step:
    import openvino

    core = openvino.Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(onnx_model(case, tensors)), "CPU", options)
    request = compiled.create_infer_request()
    feeds = {"X": tensors["x"].numpy(), "H": tensors["h"].numpy()}

    def run() -> tuple[Any, ...]:
        return (request.infer(feeds, share_inputs=True, share_outputs=True)[0],)

    return Step(run, lambda result: (torch.tensor(result[0]).squeeze(1),))


@dataclass(frozen=True)
class Peer:
    """`takes` says which cases are the peer's; `modules` are what it needs installed."""

    label: str
    build: Callable[[Case, Tensors], Step]
    takes: Callable[[Case], bool] = lambda case: True
    modules: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        return all(find_spec(name) for name in self.modules)

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in self.modules}


def one_padded_layer(case: Case) -> bool:
    return case.layers == case.directions == 1 and case.layout == "padded"


def padded_float32_inference(case: Case) -> bool:
    return one_padded_layer(case) and case.dtype == "float32" and case.pass_name == "forward"


def of_different_lengths(case: Case) -> bool:
    return case.layout != "padded" and case.layers == case.directions == 1


PEERS = {
    "rnn_ext": Peer("rnn_ext.RNN", ours),
    "rnn": Peer("nn.RNN", rnn),
    "cells": Peer("loop of RNNCell", cells_step, one_padded_layer),
    "jax": Peer("JAX", jax_step, one_padded_layer, ("jax",)),
    "onnxruntime": Peer("onnxruntime", onnxruntime_step, padded_float32_inference, ("onnxruntime", "onnx")),
    "openvino": Peer("OpenVINO", openvino_step, padded_float32_inference, ("openvino", "onnx")),
    "rnn_ext-padded": Peer(
        "rnn_ext, every step", lambda case, tensors: whole_step(rnn_ext.RNN, case, tensors), of_different_lengths
    ),
    "rnn-padded": Peer(
        "nn.RNN, every step", lambda case, tensors: whole_step(nn.RNN, case, tensors), of_different_lengths
    ),
}


def reference(case: Case, tensors: Tensors) -> tuple[Tensor, ...]:
    """The results in float64, by nn.RNN."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    module = case.module(nn.RNN, wide, torch.float64)
    with torch.enable_grad():
        x, h = (wide[name].requires_grad_() for name in ("x", "h"))
        packed, _ = module(pack_padded_sequence(x, case.lengths, enforce_sorted=False), h)
        output, _ = pad_packed_sequence(packed, total_length=case.T)
        if case.pass_name == "forward":
            return (output.detach(),)
        return output.detach(), *torch.autograd.grad(output, [x, h, *module.parameters()], wide["grad_output"])


def tolerance(case: Case) -> float:
    """Of error_of. nn.RNN, JAX and a loop of cells round a weight's gradient at each step; it adds up like a walk."""
    return TOLERANCE[case.dtype] * max(1, case.T / 16) ** 0.5


def error_of(wanted: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> float:
    """The largest ‖got − want‖ / ‖want‖ of the results against float64; NaN counts as infinite."""
    errors = []
    for got, want in zip(result, wanted, strict=True):
        errors.append(float((got.detach().double() - want).norm() / want.norm().clamp(min=1e-30)))
    return max(errors) if all(error == error for error in errors) else float("inf")
