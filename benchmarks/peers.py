"""What is measured (cases) and what is compared (peers).

A case is a shape, a dtype, a nonlinearity and a pass. A peer builds from the case's tensors a *step*: a callable
without arguments that does one cell call on exactly those values, and whose result can be brought into one order for
every peer, (h', dx, dh, dW, dU, db_ih, db_hh), so that it is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

import rnn_ext

# A pass is what one step does. The two forward passes differ in host work alone (recording the graph).
PASSES = ("forward", "forward_grad", "forward_backward")

# Largest ‖got − want‖ / ‖want‖ against float64 of a right result: a few roundings of the dtype (the composition of
# ATen operators rounds z three times), far under what a wrong index or a missing term does.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Case:
    """One thing to measure: x (B, I) and h (B, H) of `dtype`, in the pass `pass_name`."""

    B: int
    I: int  # noqa: E741  (the name the sizes have everywhere in the project)
    H: int
    dtype: str
    nonlinearity: str
    pass_name: str

    def __str__(self) -> str:
        return f"B={self.B} I={self.I} H={self.H} {self.dtype} {self.nonlinearity} {self.pass_name}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def flop(self) -> int:
        """Multiplications and additions of the GEMMs; the backward has twice the forward's."""
        forward = 2 * self.B * (self.I + self.H) * self.H
        return 3 * forward if self.pass_name == "forward_backward" else forward

    @property
    def bytes(self) -> int:
        """Least traffic in bytes: every operand of a pass read once, every result written once."""
        data = self.B * (self.I + self.H)  # x and h, or dx and dh
        weights = self.H * (self.I + self.H) + 2 * self.H  # W, U and the biases, or their gradients
        output = self.B * self.H  # h', or dh'
        elements = data + weights + output
        if self.pass_name == "forward_backward":
            elements += 2 * output + data + weights + data + weights  # read h', dh', x, h, W, U; write the gradients
        return elements * self.torch_dtype.itemsize

    @property
    def launches(self) -> int:
        """The fewest launches: the backward needs the forward's result, so it cannot share its launch."""
        return 2 if self.pass_name == "forward_backward" else 1


@dataclass
class Step:
    """What is timed (`run`), how its result reads in the common order (`unpack`), what gets a gradient (`leaves`)."""

    run: Callable[[], tuple[Tensor, ...]]
    unpack: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple
    leaves: Sequence[Tensor] = ()


def make_tensors(case: Case, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Random data as a cell sees it: parameters as nn.RNNCell draws them, h in (-1, 1)."""
    generator = torch.Generator(device).manual_seed(seed)
    B, I, H = case.B, case.I, case.H  # noqa: E741

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator).to(case.torch_dtype)

    def uniform(*size: int) -> Tensor:
        return ((2 * torch.rand(size, device=device, generator=generator) - 1) / H**0.5).to(case.torch_dtype)

    return {
        "x": normal(B, I),
        "h": normal(B, H).tanh(),
        "weight_ih": uniform(H, I),
        "weight_hh": uniform(H, H),
        "bias_ih": uniform(H),
        "bias_hh": uniform(H),
        "grad_output": normal(B, H),
    }


def make_step(
    case: Case,
    forward: Callable[[], Tensor],
    leaves: list[Tensor],
    grad_output: Tensor,
    unpack: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple,
) -> Step:
    if case.pass_name != "forward_backward":
        return Step(lambda: (forward(),), unpack, leaves)

    def run() -> tuple[Tensor, ...]:
        output = forward()
        return (output, *torch.autograd.grad(output, leaves, grad_output))

    return Step(run, unpack, leaves)


def inputs(case: Case, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """x and h as leaves; in a recurrent net both need a gradient."""
    wanted = case.pass_name != "forward"
    return tuple(tensors[name].detach().clone().requires_grad_(wanted) for name in ("x", "h"))


def module_step(cell_type: type[nn.RNNCell], case: Case, tensors: dict[str, Tensor]) -> Step:
    x, h = inputs(case, tensors)
    cell = cell_type(case.I, case.H, nonlinearity=case.nonlinearity, device=x.device, dtype=x.dtype)
    cell.load_state_dict({name: tensors[name] for name, _ in cell.named_parameters()})
    return make_step(case, lambda: cell(x, h), [x, h, *cell.parameters()], tensors["grad_output"])


def addmm_step(case: Case, tensors: dict[str, Tensor]) -> Step:
    """f(addmm(b, cat(x, h), cat(W, U)ᵀ)), with the weights kept concatenated: the best a user can write by hand."""
    x, h = inputs(case, tensors)
    weight = nn.Parameter(torch.cat((tensors["weight_ih"], tensors["weight_hh"]), 1))
    bias = nn.Parameter(tensors["bias_ih"] + tensors["bias_hh"])
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
        tensors["grad_output"],
        unpack,
    )


def rnn_step(case: Case, tensors: dict[str, Tensor]) -> Step:
    """nn.RNN over a sequence of length one (cuDNN on a GPU)."""
    x, h = (t.detach().unsqueeze(0).requires_grad_(t.requires_grad) for t in inputs(case, tensors))
    rnn = nn.RNN(case.I, case.H, nonlinearity=case.nonlinearity, device=x.device, dtype=x.dtype)
    rnn.load_state_dict({f"{name}_l0": tensors[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")})

    def unpack(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*(t.squeeze(0) for t in result[:3]), *result[3:])

    grad_output = tensors["grad_output"].unsqueeze(0)
    return make_step(case, lambda: rnn(x, h)[0], [x, h, *rnn.parameters()], grad_output, unpack)


@cache
def compiled_cell(mode: str, nonlinearity: str, fused: bool) -> Callable[..., Tensor]:
    """One compiled function for all copies of a case; forget_compiled() between cases."""
    cell = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}[nonlinearity]

    def composition(*tensors: Tensor) -> Tensor:
        return rnn_ext.rnn_cell(*tensors, nonlinearity=nonlinearity) if fused else cell(*tensors)

    return torch.compile(composition, mode=mode, dynamic=False)


def forget_compiled() -> None:
    """Dynamo keeps at most eight versions of a function, then silently runs it uncompiled."""
    compiled_cell.cache_clear()
    torch._dynamo.reset()


def compile_step(mode: str, case: Case, tensors: dict[str, Tensor], fused: bool = False) -> Step:
    x, h = inputs(case, tensors)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    leaves = [x, h, *(nn.Parameter(tensors[name]) for name in names)]
    cell = compiled_cell(mode, case.nonlinearity, fused)

    def forward() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last step's outputs may be overwritten
        return cell(*leaves)

    return make_step(case, forward, leaves, tensors["grad_output"])


def graph_step(build: Callable[[Case, dict[str, Tensor]], Step], case: Case, tensors: dict[str, Tensor]) -> Step:
    """A step captured in a CUDA graph, replayed on inputs that are already in place (the best case for a graph)."""
    from timing import capture

    step = build(case, tensors)
    graph, result = capture([step.run])

    def run() -> tuple[Tensor, ...]:
        graph.replay()
        return result

    return Step(run, step.unpack)


def ours(case: Case, tensors: dict[str, Tensor]) -> Step:
    return module_step(rnn_ext.RNNCell, case, tensors)


def rnn_cell(case: Case, tensors: dict[str, Tensor]) -> Step:
    return module_step(nn.RNNCell, case, tensors)


@dataclass(frozen=True)
class Peer:
    """`build` for host-inclusive time; `build_device` for device time (None: the same kernels as another peer)."""

    label: str
    build: Callable[[Case, dict[str, Tensor]], Step]
    build_device: Callable[[Case, dict[str, Tensor]], Step] | None
    compiles: bool = False
    cuda_only: bool = False


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
    "rnn": Peer("nn.RNN, one step", rnn_step, rnn_step),
    "compile": compile_peer("default", "default"),
    "reduce-overhead": compile_peer("reduce-overhead", None),
    "max-autotune": compile_peer("max-autotune", "max-autotune-no-cudagraphs"),
}


def error_of(case: Case, tensors: dict[str, Tensor], result: tuple[Tensor, ...]) -> float:
    """The largest ‖got − want‖ / ‖want‖ of the results against float64; NaN counts as infinite.

    The gradients are compared with those at the result's own h': every implementation differentiates from the h' it
    stored, and beside the kink of relu a rounding of h' may rightly change them.
    """
    # Under compute-sanitizer cases are small and only this project's kernels should run; large ones need the device.
    device = "cpu" if case.flop < 1e9 else result[0].device
    t = {name: tensor.detach().to(device, torch.float64) for name, tensor in tensors.items()}
    z = t["x"] @ t["weight_ih"].t() + t["bias_ih"] + t["h"] @ t["weight_hh"].t() + t["bias_hh"]
    wanted = [getattr(torch, case.nonlinearity)(z)]
    if case.pass_name == "forward_backward":
        output = result[0].detach().to(device, torch.float64)
        derivative = 1 - output * output if case.nonlinearity == "tanh" else (output > 0).double()
        dz = t["grad_output"] * derivative
        dweights = [dz.t() @ t["x"], dz.t() @ t["h"]]
        wanted += [dz @ t["weight_ih"], dz @ t["weight_hh"], *dweights, dz.sum(0), dz.sum(0)]
    errors = []
    for got, want in zip(result, wanted, strict=True):
        scale = want.norm().clamp(min=1e-30)
        errors.append(float((got.detach().to(device, torch.float64) - want).norm() / scale))
    return max(errors) if all(error == error for error in errors) else float("inf")
