"""What is measured (cases), and what every peer has to give: a step that was checked before it is timed.

A case is a shape, a dtype, a nonlinearity and a pass, of a cell (one step) or of whole sequences. A peer builds from
the case's tensors a *step*: a callable without arguments that does one call on exactly those values, and whose result
can be brought into one order for every peer, (output, dx, dh, the parameters' gradients), with output and dx padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

# A pass is what one step does. The two forward passes differ in host work alone (recording the graph).
PASSES = ("forward", "forward_grad", "forward_backward")
LAYOUTS = {
    "padded": "every row of T steps",
    "packed": "rows of T/4 to T steps in a PackedSequence",
    "lengths": "the same rows, padded and in no order: `lengths=` here, pack, run and pad with nn.RNN",
}
GROUPS = {
    "shapes": "of all kinds; the README's means are over them",
    "models": "word_language_model, sequential MNIST and PyTorch's fastrnns",
    "deepbench": "the vanilla RNNs of DeepBench",
    "limits": "few steps, a batch of one, two directions, rows of different lengths",
    "growth": "one size varies at a time",
}

# Largest ‖got − want‖ / ‖want‖ against float64 of a right result: a few roundings of the dtype (the composition of
# ATen operators rounds z three times), far under what a wrong index or a missing term does.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}

# Forward FLOP. From the first on, recording the graph is nothing beside the work and is no pass of its own; from the
# second on, only rnn_ext and what it replaces are measured, and no memory, so that a run ends.
NO_RECORDING, FEW_PEERS = 2e9, 1.5e10

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One thing to measure, x (T, B, I) and h (layers * directions, B, H) of `dtype`; of a cell T is 1."""

    T: int
    B: int
    I: int  # noqa: E741  (the name the sizes have everywhere in the project)
    H: int
    dtype: str = "float32"
    nonlinearity: str = "tanh"
    pass_name: str = "forward"
    layer: str = "sequence"
    layers: int = 1
    directions: int = 1
    layout: str = "padded"
    group: str = "shapes"

    def __str__(self) -> str:
        return f"{name_of(self.fields())} {self.dtype} {self.nonlinearity} {self.pass_name}"

    def fields(self) -> dict[str, Any]:
        """As they stand in a row of a result file."""
        found = dict(vars(self))
        return {("pass" if name == "pass_name" else name): value for name, value in found.items()}

    @staticmethod
    def of(row: dict[str, Any]) -> Case:
        names = [name for name in Case.__dataclass_fields__ if name != "pass_name"]
        return Case(pass_name=row["pass"], **{name: row[name] for name in names})

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
    def rows(self) -> int:
        """Steps of all rows together."""
        return self.T * self.B if self.layout == "padded" else int(self.lengths.sum())

    @property
    def backward(self) -> bool:
        return self.pass_name == "forward_backward"

    @property
    def input_sizes(self) -> list[int]:
        """Features of each layer's input."""
        return [self.I] + [self.directions * self.H] * (self.layers - 1)

    @property
    def forward_flop(self) -> int:
        """Multiplications and additions of the forward's GEMMs."""
        return sum(2 * self.rows * (size + self.H) * self.H * self.directions for size in self.input_sizes)

    @property
    def flop(self) -> int:
        """Those of the pass; the backward has twice the forward's."""
        return self.forward_flop * (3 if self.backward else 1)

    @property
    def records(self) -> bool:
        """Whether recording the graph is worth a pass of its own."""
        return self.forward_flop < NO_RECORDING and self.group != "growth"

    @property
    def few(self) -> bool:
        """Whether it is not so large that only few peers take part."""
        return self.forward_flop < FEW_PEERS

    @property
    def bytes(self) -> int:
        """Least traffic in bytes: every operand of a layer and direction read once, every result written once."""
        elements = 0
        for size in self.input_sizes:
            data = self.rows * size + self.B * self.H  # x and h, or dx and dh
            weights = self.H * (size + self.H) + 2 * self.H  # W, U and the biases, or their gradients
            output = self.rows * self.H  # h', or dh'
            elements += data + weights + output
            if self.backward:  # read h', dh', x, h, W, U; write the gradients
                elements += 2 * output + data + weights + data + weights
        return elements * self.directions * self.torch_dtype.itemsize

    @property
    def recurrent_bytes(self) -> int:
        """U in bytes."""
        return self.H * self.H * self.torch_dtype.itemsize

    @property
    def recurrent_reads(self) -> int:
        """How often U is read besides the once in `bytes`: at each later step, on the way back as well."""
        return (self.T - 1) * self.layers * self.directions * (2 if self.backward else 1)

    @property
    def launches(self) -> int:
        """The fewest launches: the backward needs the forward's result, so it cannot share its launch."""
        return 2 if self.backward else 1

    def module(self, cls: type[nn.RNN], tensors: Tensors, dtype: torch.dtype | None = None) -> nn.RNN:
        """An RNN of this case's sizes, with the parameters in `tensors`."""
        options = {"nonlinearity": self.nonlinearity, "bidirectional": self.directions == 2}
        device = tensors["x"].device
        rnn = cls(self.I, self.H, self.layers, device=device, dtype=dtype or self.torch_dtype, **options)
        rnn.load_state_dict({name: tensors[name] for name, _ in rnn.named_parameters()})
        return rnn


def name_of(row: dict[str, Any]) -> str:
    """A row's case in the pages and figures."""
    words = [", ".join(str(row[size]) for size in ("BIH" if row["layer"] == "cell" else "TBIH"))]
    if row["layers"] > 1:
        words.append(f"{row['layers']} layers")
    if row["directions"] > 1:
        words.append("bidirectional")
    if row["layout"] != "padded":
        words.append(row["layout"])
    return " ".join(words)


def cells(*shapes: tuple[int, int, int]) -> list[Case]:
    return [Case(1, *shape, layer="cell") for shape in shapes]


BASE = Case(64, 32, 128, 128, group="growth")
GROWTH = [
    *(replace(BASE, T=T) for T in (1, 4, 16, 64, 256, 1024)),
    *(replace(BASE, B=B) for B in (1, 4, 16, 64, 256)),
    *(replace(BASE, I=H, H=H) for H in (16, 32, 64, 256, 512)),
]
SEQUENCES = [
    Case(64, 1, 16, 32),
    Case(100, 10, 4, 5),
    Case(64, 32, 64, 128),
    Case(512, 16, 128, 256),
    Case(35, 20, 200, 200),
    Case(64, 64, 512, 512),
    Case(50, 16, 1760, 1760),
    Case(784, 32, 1, 128),
    Case(35, 20, 200, 200, layers=2, group="models"),
    Case(784, 128, 1, 128, group="models"),
    Case(100, 64, 512, 512, group="models"),
    Case(1, 1, 1024, 1024, group="limits"),
    Case(4, 1, 1024, 1024, group="limits"),
    Case(1000, 1, 64, 64, group="limits"),
    Case(64, 32, 64, 128, layers=2, group="limits"),
    Case(64, 32, 64, 128, directions=2, group="limits"),
    Case(64, 32, 64, 128, layers=2, directions=2, group="limits"),
    *(Case(*sizes, layout=layout, group="limits") for sizes in ((64, 32, 64, 128), (500, 16, 128, 256))
      for layout in ("packed", "lengths")),
    *GROWTH,
    *(Case(50, B, H, H, group="deepbench") for B in (16, 32, 64, 128) for H in (1760, 2048, 2560)),
]  # fmt: skip
CASES = {
    ("cell", "cpu"): cells(
        (1, 8, 16), (10, 4, 5), (1, 64, 64), (4, 100, 100), (33, 77, 130), (32, 128, 128),
        (1, 256, 256), (8, 256, 256), (64, 256, 256), (256, 256, 256), (64, 512, 512), (256, 1024, 1024),
    ),
    ("cell", "cuda"): cells(
        (10, 4, 5), (33, 77, 130),
        *((B, H, H) for H in (256, 1024, 4096) for B in (1, 16, 64, 256, 1024, 4096)),
    ),
    ("sequence", "cpu"): SEQUENCES,
    ("sequence", "cuda"): SEQUENCES,
}  # fmt: skip
QUICK_SEQUENCES = [SEQUENCES[i] for i in (0, 1, 2, 4, 13, 17, 18)]
QUICK = {
    ("cell", "cpu"): cells((10, 4, 5), (1, 64, 64), (64, 64, 64), (1, 256, 256), (64, 256, 256)),
    ("cell", "cuda"): cells((10, 4, 5), (1, 256, 256), (64, 256, 256), (64, 1024, 1024), (1024, 1024, 1024)),
    ("sequence", "cpu"): QUICK_SEQUENCES,
    ("sequence", "cuda"): QUICK_SEQUENCES,
}
DTYPES = {
    ("cell", "cpu"): ["float32", "float64", "bfloat16"],
    ("cell", "cuda"): ["float32", "bfloat16"],
    ("sequence", "cpu"): ["float32", "bfloat16"],
    ("sequence", "cuda"): ["float32", "bfloat16"],
}
# Compiling takes up to a minute a case, and the longer, the more steps a loop has.
COMPILED = {
    ("cell", "cpu"): [],
    ("cell", "cuda"): [replace(case, dtype=dtype) for case in cells((64, 1024, 1024)) for dtype in TOLERANCE],
    ("sequence", "cpu"): [case for case in GROWTH if case.T == 16],
    ("sequence", "cuda"): [case for case in GROWTH if case.T == 16],
}
KINDS: dict[str, dict[str, Any]] = {
    "packed": {"layout": "packed"},
    "lengths": {"layout": "lengths"},
    "bidirectional": {"directions": 2},
    "two-layers": {"layers": 2},
}


def parse_case(text: str, layer: str) -> Case:
    """T,B,I,H or, of a cell, B,I,H; of sequences with any of KINDS after colons."""
    sizes, *kinds = text.split(":")
    numbers = [int(size) for size in sizes.split(",")]
    if layer == "cell":
        (found,) = cells(tuple(numbers))
    else:
        found = Case(*numbers)
        for kind in kinds:
            found = replace(found, **KINDS[kind], group="limits")
    if len(numbers) != (3 if layer == "cell" else 4) or min(numbers) < 1 or (layer == "cell" and kinds):
        raise ValueError
    return found


@dataclass
class Step:
    """What is timed (`run`), how its result reads in the common order (`unpack`), what gets a gradient (`leaves`)."""

    run: Callable[[], tuple[Any, ...]]
    unpack: Callable[[tuple[Any, ...]], tuple[Tensor, ...]] = tuple
    leaves: Sequence[Tensor] = ()


Build = Callable[[Case, Tensors], Step]


@dataclass(frozen=True)
class Peer:
    """`build` for host-inclusive time, `build_device` for device time (None: the same kernels as another peer).

    `takes` says which cases are the peer's, `modules` what it needs installed.
    """

    label: str
    build: Build
    build_device: Build | None = None
    takes: Callable[[Case], bool] = lambda case: True
    compiles: bool = False
    cpu_only: bool = False
    cuda_only: bool = False
    modules: tuple[str, ...] = ()

    def runs_on(self, device: str) -> bool:
        return not (self.cuda_only if device == "cpu" else self.cpu_only)

    @property
    def missing(self) -> list[str]:
        """Modules that are not installed."""
        return [name for name in self.modules if not find_spec(name)]

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in self.modules}


def make_tensors(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Random data as a layer sees it: parameters as nn.RNN draws them, h in (-1, 1); no gradient beyond a row's end."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator).to(case.torch_dtype)

    def uniform(size: torch.Size) -> Tensor:
        return ((2 * torch.rand(size, device=device, generator=generator) - 1) / case.H**0.5).to(case.torch_dtype)

    ended = torch.arange(case.T).unsqueeze(1) >= case.lengths
    layout = nn.RNN(case.I, case.H, case.layers, bidirectional=case.directions == 2, device="meta")
    return {
        "x": normal(case.T, case.B, case.I),
        "h": normal(case.layers * case.directions, case.B, case.H).tanh(),
        **{name: uniform(parameter.shape) for name, parameter in layout.named_parameters()},
        "grad_output": normal(case.T, case.B, case.directions * case.H)
        .masked_fill(ended.to(device).unsqueeze(2), 0),
    }  # fmt: skip


def inputs(case: Case, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """x and h as leaves; in a recurrent net both need a gradient."""
    wanted = case.pass_name != "forward"
    return tuple(tensors[name].detach().clone().requires_grad_(wanted) for name in ("x", "h"))


def make_step(
    case: Case,
    forward: Callable[[], Tensor],
    leaves: list[Tensor],
    grad_output: Tensor,
    unpack: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple,
) -> Step:
    if not case.backward:
        return Step(lambda: (forward(),), unpack, leaves)

    def run() -> tuple[Tensor, ...]:
        output = forward()
        return (output, *torch.autograd.grad(output, leaves, grad_output))

    return Step(run, unpack, leaves)


def wide(case: Case, tensors: Tensors) -> Tensors:
    """The tensors in float64, on the CPU or, where there is much to compute, on their device."""
    # Under compute-sanitizer cases are small and only this project's kernels should run; large ones need the device.
    device = "cpu" if case.flop < 1e9 else tensors["x"].device
    return {name: tensor.detach().to(device, torch.float64) for name, tensor in tensors.items()}


def reference(case: Case, tensors: Tensors) -> tuple[Tensor, ...]:
    """The results in float64, by nn.RNN."""
    t = wide(case, tensors)
    module = case.module(nn.RNN, t, torch.float64)
    with torch.set_grad_enabled(case.backward):
        x, h = (t[name].requires_grad_(case.backward) for name in ("x", "h"))
        if case.layout == "padded":
            output, _ = module(x, h)
        else:
            packed, _ = module(pack_padded_sequence(x, case.lengths, enforce_sorted=False), h)
            output, _ = pad_packed_sequence(packed, total_length=case.T)
        if not case.backward:
            return (output,)
        return output.detach(), *torch.autograd.grad(output, [x, h, *module.parameters()], t["grad_output"])


def gradients_at(case: Case, tensors: Tensors, output: Tensor) -> tuple[Tensor, ...]:
    """The gradients in float64 of one layer of relu at the h_t that a peer found.

    Every implementation differentiates from the h_t it stored, and beside relu's kink a rounding of h_t may rightly
    change them.
    """
    t = wide(case, tensors)
    states = output.detach().to(t["x"].device, torch.float64).reshape(case.T, case.B, case.H)
    before = torch.cat((t["h"], states[:-1]))
    dz = torch.zeros_like(states)
    dh = torch.zeros_like(states[0])
    for step in reversed(range(case.T)):
        dz[step] = (t["grad_output"][step] + dh) * (states[step] > 0)
        dh = dz[step] @ t["weight_hh_l0"]
    rows = dz.flatten(0, 1)
    dweights = (rows.t() @ t["x"].flatten(0, 1), rows.t() @ before.flatten(0, 1))
    return dz @ t["weight_ih_l0"], dh.unsqueeze(0), *dweights, rows.sum(0), rows.sum(0)


def tolerance(case: Case) -> float:
    """Of error_of. nn.RNN, JAX and a loop of cells round a weight's gradient at each step; it adds up like a walk."""
    return TOLERANCE[case.dtype] * max(1, case.T / 16) ** 0.5


def error_of(case: Case, tensors: Tensors, wanted: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> float:
    """The largest ‖got − want‖ / ‖want‖ of the results against `reference`; NaN counts as infinite."""
    if case.backward and case.nonlinearity == "relu" and case.layers * case.directions == 1:
        wanted = (wanted[0], *gradients_at(case, tensors, result[0]))
    errors = []
    for got, want in zip(result, wanted, strict=True):
        difference = got.detach().to(want.device, torch.float64).reshape(want.shape) - want
        errors.append(float(difference.norm() / want.norm().clamp(min=1e-30)))
    return max(errors) if all(error == error for error in errors) else float("inf")
