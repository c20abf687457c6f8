"""What computes whole sequences, next to rnn_ext.RNN. What isn't torch takes part where it is installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from cases import Build, Case, Peer, Step, Tensors, inputs, make_step
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnn_ext

NAMES = ("x", "h", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


def whole_step(cls: type[nn.RNN], case: Case, tensors: Tensors) -> Step:
    """Every step of every row, also those beyond its length, whose output is then cleared."""
    rnn = case.module(cls, tensors)
    x, h = inputs(case, tensors)
    ended = (torch.arange(case.T).unsqueeze(1) >= case.lengths).unsqueeze(2).to(x.device)

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


Cell = Callable[..., Tensor]


def loop(cell: Cell, x: Tensor, h: Tensor, *parameters: Tensor) -> Tensor:
    """A Python loop of cells: the output (T, B, H) of x (T, B, I) and h (1, B, H)."""
    state, outputs = h[0], []
    for step in x.unbind(0):
        state = cell(step, state, *parameters)
        outputs.append(state)
    return torch.stack(outputs)


def cells_step(cell_type: type[nn.RNNCell], case: Case, tensors: Tensors) -> Step:
    x, h = inputs(case, tensors)
    cell = cell_type(case.I, case.H, nonlinearity=case.nonlinearity, device=x.device, dtype=x.dtype)
    cell.load_state_dict({name: tensors[f"{name}_l0"] for name, _ in cell.named_parameters()})
    return make_step(case, lambda: loop(cell, x, h), [x, h, *cell.parameters()], tensors["grad_output"])


@cache
def compiled_loop(nonlinearity: str) -> Cell:
    """Of nn.RNNCell's function, unrolled."""
    cell = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}[nonlinearity]
    return torch.compile(partial(loop, cell), dynamic=False)


def compile_step(case: Case, tensors: Tensors) -> Step:
    leaves = [*inputs(case, tensors), *(nn.Parameter(tensors[name]) for name in NAMES[2:])]
    compiled = compiled_loop(case.nonlinearity)
    return make_step(case, lambda: compiled(*leaves), leaves, tensors["grad_output"])


def jitted(case: Case, tensors: Tensors, layer: Callable[..., Any]) -> Step:
    """A function of JAX arrays, named as NAMES, under jit; the gradients by jax.vjp in the same jit."""
    import jax
    import jax.numpy as jnp

    dtype = getattr(jnp, case.dtype)
    jax.config.update("jax_enable_x64", case.dtype == "float64")

    def given(name: str) -> Any:
        return jnp.asarray(tensors[name].to(torch.float64).numpy()).astype(dtype)

    def layer_and_gradients(grad_output: Any, *arguments: Any) -> tuple[Any, ...]:
        output, backward = jax.vjp(layer, *arguments)
        return output, *backward(grad_output)

    arguments = [given(name) for name in NAMES]
    if not case.backward:
        compiled = jax.jit(lambda *arguments: (layer(*arguments),))
    else:
        compiled = jax.jit(layer_and_gradients)
        arguments.insert(0, given("grad_output"))
    arguments = jax.block_until_ready(arguments)

    def unpack(result: tuple[Any, ...]) -> tuple[Tensor, ...]:
        wide = jnp.float64 if case.dtype == "float64" else jnp.float32
        return tuple(torch.tensor(jax.device_get(t.astype(wide))) for t in result)

    return Step(lambda: jax.block_until_ready(compiled(*arguments)), unpack)


def jax_step(case: Case, tensors: Tensors) -> Step:
    """jit of lax.scan, after one product x Wᵀ for all steps."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp

    f = {"tanh": jnp.tanh, "relu": jax.nn.relu}[case.nonlinearity]

    def layer(x: Any, h: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any) -> Any:
        def step(state: Any, z: Any) -> tuple[Any, Any]:
            state = f(z + state @ weight_hh.T)
            return state, state

        return jax.lax.scan(step, h[0], x @ weight_ih.T + (bias_ih + bias_hh))[1]

    return jitted(case, tensors, layer)


def keras_step(case: Case, tensors: Tensors) -> Step:
    """SimpleRNN on JAX, the backend whose steps no Python runs; rows of the batch come first, as Keras has them."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    options = {"recurrent_initializer": "zeros", "return_sequences": True}  # the default one knows no bfloat16
    rnn = keras.layers.SimpleRNN(case.H, case.nonlinearity, dtype=case.dtype, **options)
    rnn.build((case.B, case.T, case.I))
    others = [variable.value for variable in rnn.non_trainable_variables]  # of dropout, which there is none of

    def layer(x: Any, h: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any) -> Any:
        parameters = [weight_ih.T, weight_hh.T, bias_ih + bias_hh]
        output, _ = rnn.stateless_call(parameters, others, x.swapaxes(0, 1), initial_state=[h[0]])
        return output.swapaxes(0, 1)

    return jitted(case, tensors, layer)


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


def flashrnn_step(case: Case, tensors: Tensors) -> Step:
    """x Wᵀ + b_ih for all steps, then FlashRNN's Elman network of one head; it wants the batch first."""
    from flashrnn import flashrnn

    leaves = [*inputs(case, tensors), *(nn.Parameter(tensors[name]) for name in NAMES[2:])]

    def forward() -> Tensor:
        x, h, weight_ih, weight_hh, bias_ih, bias_hh = leaves
        z = nn.functional.linear(x.transpose(0, 1), weight_ih, bias_ih)
        states, _ = flashrnn(
            z[:, :, None, None],
            weight_hh[None, None],
            bias_hh[None, None],
            states=h[:, :, None, None],
            function="elman",
            backend="cuda_fused",
            dtype=case.dtype,
        )
        return states[0, :, :, 0].transpose(0, 1)

    return make_step(case, forward, leaves, tensors["grad_output"])


def one_padded_layer(case: Case) -> bool:
    return case.layers == case.directions == 1 and case.layout == "padded" and case.few


def padded_float32_inference(case: Case) -> bool:
    return one_padded_layer(case) and case.dtype == "float32" and case.pass_name == "forward"


def not_recorded(case: Case) -> bool:
    return one_padded_layer(case) and case.pass_name != "forward_grad"


def short(case: Case) -> bool:
    return not_recorded(case) and case.T <= 64


def flashrnns(case: Case) -> bool:
    return one_padded_layer(case) and case.nonlinearity == "tanh" and case.dtype in ("float32", "float16", "bfloat16")


def of_different_lengths(case: Case) -> bool:
    return case.layout != "padded" and case.layers == case.directions == 1


def peer(label: str, build: Build, **options: Any) -> Peer:
    """One whose device time is that of the same step."""
    return Peer(label, build, build, **options)


ON_CPU = {"takes": not_recorded, "cpu_only": True}
PEERS = {
    "rnn_ext": peer("rnn_ext.RNN", ours),
    "rnn": peer("nn.RNN", rnn),
    "nn_cells": peer("nn.RNNCell loop", partial(cells_step, nn.RNNCell), takes=one_padded_layer),
    "cells": peer("RNNCell loop", partial(cells_step, rnn_ext.RNNCell), takes=one_padded_layer),
    "compile": peer("nn.RNNCell loop, torch.compile", compile_step, takes=short, compiles=True),
    "jax": Peer("JAX", jax_step, modules=("jax",), **ON_CPU),
    "keras": Peer("Keras on JAX", keras_step, modules=("keras", "jax"), **ON_CPU),
    "onnxruntime": Peer(
        "onnxruntime", onnxruntime_step, takes=padded_float32_inference, modules=("onnxruntime", "onnx"), cpu_only=True
    ),
    "openvino": Peer(
        "OpenVINO", openvino_step, takes=padded_float32_inference, modules=("openvino", "onnx"), cpu_only=True
    ),
    "flashrnn": peer("FlashRNN", flashrnn_step, takes=flashrnns, modules=("flashrnn",), cuda_only=True),
    "rnn_ext-padded": peer("rnn_ext, every step", partial(whole_step, rnn_ext.RNN), takes=of_different_lengths),
    "rnn-padded": peer("nn.RNN, every step", partial(whole_step, nn.RNN), takes=of_different_lengths),
}
