"""What computes one step, next to rnn_ext.RNNCell, on the rows of a case's x (1, B, I) and h (1, B, H)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from cases import Build, Case, Peer, Step, Tensors, inputs, make_step
from sequence_peers import rnn
from torch import Tensor, nn

import rnn_ext

PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def cell_inputs(case: Case, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """x (B, I) and h (B, H) as leaves."""
    return tuple(t.detach()[0].requires_grad_(t.requires_grad) for t in inputs(case, tensors))


def module_step(cell_type: type[nn.RNNCell], case: Case, tensors: Tensors) -> Step:
    x, h = cell_inputs(case, tensors)
    cell = cell_type(case.I, case.H, nonlinearity=case.nonlinearity, device=x.device, dtype=x.dtype)
    cell.load_state_dict({name: tensors[f"{name}_l0"] for name in PARAMETERS})
    return make_step(case, lambda: cell(x, h), [x, h, *cell.parameters()], tensors["grad_output"][0])


def addmm_step(case: Case, tensors: Tensors) -> Step:
    """f(addmm(b, cat(x, h), cat(W, U)ᵀ)), with the weights kept concatenated: the best a user can write by hand."""
    x, h = cell_inputs(case, tensors)
    weight = nn.Parameter(torch.cat((tensors["weight_ih_l0"], tensors["weight_hh_l0"]), 1))
    bias = nn.Parameter(tensors["bias_ih_l0"] + tensors["bias_hh_l0"])
    f = getattr(torch, case.nonlinearity)

    def unpack(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if len(result) == 1:
            return result
        output, dx, dh, dweight, dbias = result
        return output, dx, dh, *dweight.split((case.I, case.H), 1), dbias, dbias

    return make_step(
        case,
        lambda: f(torch.addmm(bias, torch.cat((x, h), 1), weight.t())),
        [x, h, weight, bias],
        tensors["grad_output"][0],
        unpack,
    )


@cache
def compiled_cell(mode: str, nonlinearity: str, fused: bool) -> Callable[..., Tensor]:
    """One compiled function for all copies of a case."""
    cell = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}[nonlinearity]

    def composition(*tensors: Tensor) -> Tensor:
        return rnn_ext.rnn_cell(*tensors, nonlinearity=nonlinearity) if fused else cell(*tensors)

    return torch.compile(composition, mode=mode, dynamic=False)


def compile_step(mode: str, case: Case, tensors: Tensors, fused: bool = False) -> Step:
    leaves = [*cell_inputs(case, tensors), *(nn.Parameter(tensors[f"{name}_l0"]) for name in PARAMETERS)]
    cell = compiled_cell(mode, case.nonlinearity, fused)

    def forward() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last step's outputs may be overwritten
        return cell(*leaves)

    return make_step(case, forward, leaves, tensors["grad_output"][0])


def graph_step(build: Build, case: Case, tensors: Tensors) -> Step:
    """A step captured in a CUDA graph, replayed on inputs that are already in place (the best case for a graph)."""
    from timing import capture

    step = build(case, tensors)
    graph, result = capture([step.run])

    def run() -> tuple[Tensor, ...]:
        graph.replay()
        return result

    return Step(run, step.unpack)


def ours(case: Case, tensors: Tensors) -> Step:
    return module_step(rnn_ext.RNNCell, case, tensors)


def rnn_cell(case: Case, tensors: Tensors) -> Step:
    return module_step(nn.RNNCell, case, tensors)


def compile_peer(mode: str, device_mode: str | None) -> Peer:
    return Peer(
        label="torch.compile" if mode == "default" else f"torch.compile {mode}",
        build=lambda case, tensors: compile_step(mode, case, tensors),
        build_device=device_mode and (lambda case, tensors: compile_step(device_mode, case, tensors)),
        compiles=True,
        cuda_only=mode != "default",
    )


PEERS = {
    "rnn_ext": Peer("rnn_ext", ours, ours),
    "rnn_ext-graph": Peer("rnn_ext, CUDA graph", lambda c, t: graph_step(ours, c, t), None, cuda_only=True),
    "rnn_ext-compile": Peer(
        "rnn_ext, torch.compile", lambda c, t: compile_step("default", c, t, True), None, compiles=True
    ),
    "rnn_cell": Peer("nn.RNNCell", rnn_cell, rnn_cell),
    "graph": Peer("nn.RNNCell, CUDA graph", lambda c, t: graph_step(rnn_cell, c, t), None, cuda_only=True),
    "addmm": Peer("addmm of cat", addmm_step, addmm_step),
    "rnn": Peer("nn.RNN, one step", rnn, rnn),
    "compile": compile_peer("default", "default"),
    "reduce-overhead": compile_peer("reduce-overhead", None),
    "max-autotune": compile_peer("max-autotune", "max-autotune-no-cudagraphs"),
}
