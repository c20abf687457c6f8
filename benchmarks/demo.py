"""The main job on real input: `make demo`.

(a) two tables of numbers from cells of four inputs and five units, next to nn.RNNCell's;
(b) a character model trained on Python's own help texts, by loops of nn.RNNCell and of rnn_ext.RNNCell and over whole
    sequences by nn.RNN and by rnn_ext.ElmanNetwork, compared;
(c) a short microbenchmark on the device at hand.

    python benchmarks/demo.py [--device cpu|cuda] [--steps N] [--seconds N] [--output demo.png]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bench
import results
import torch
from device import default_device, gpu_state, probe
from plots import plt
from timing import quartiles, synchronize
from torch import Tensor, nn

import rnn_ext

sys.path.append(str(results.REPOSITORY / "examples"))

from character_model import BATCH, LENGTH, CharacterModel, Corpus, make_optimizer, train_step
from decode import write_texts

Recurrent = Callable[[int, int], nn.Module]


def print_tables() -> None:
    """(a) The cell on ten rows of four numbers, each row an independent sequence of one step (hx=None is h = 0)."""
    X = torch.linspace(1, 100, 40).reshape(10, 4)
    # The lazy cell draws its parameters at its first call, so the order of the lines is part of the example.
    torch.manual_seed(0)
    ours = [rnn_ext.LazyRNNCell(5)(X), rnn_ext.RNNCell(4, 5)(X)]
    torch.manual_seed(0)
    theirs = [nn.RNNCell(4, 5)(X), nn.RNNCell(4, 5)(X)]
    print("(a) h' = tanh(x Wᵀ + b_ih + h Uᵀ + b_hh) of torch.linspace(1, 100, 40).reshape(10, 4), seed 0")
    for name, our, their in zip(("LazyRNNCell(5)", "RNNCell(4, 5)"), ours, theirs, strict=True):
        print(f"\n{'rnn_ext.' + name:44}  nn.RNNCell(4, 5)")
        for row, expected in zip(our.tolist(), their.tolist(), strict=True):
            left, right = ("  ".join(f"{value:7.4f}" for value in values) for values in (row, expected))
            print(f"{left:44}  {right}")
        print(f"largest difference {(our - their).abs().max().item():.1e}")


class Loop(nn.Module):
    """A cell, called step by step: x (T, B, I) to all h (T, B, H)."""

    def __init__(self, cell: type[nn.RNNCell], input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.cell = cell(input_size, hidden_size)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        h, states = None, []
        for x in input:
            h = self.cell(x, h)
            states.append(h)
        return torch.stack(states), h


class WithReadout(nn.Module):
    """What rnn_ext.ElmanNetwork is, around another recurrent part."""

    def __init__(self, recurrent: Recurrent, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.rnn = recurrent(input_size, hidden_size)
        self.readout = nn.Linear(hidden_size, output_size, bias=False)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        states, h = self.rnn(input)
        return self.readout(states), h


# All four draw the same parameters under one seed.
NETWORKS = {
    "loop of nn.RNNCell": partial(WithReadout, partial(Loop, nn.RNNCell)),
    "loop of rnn_ext.RNNCell": partial(WithReadout, partial(Loop, rnn_ext.RNNCell)),
    "nn.RNN": partial(WithReadout, nn.RNN),
    "rnn_ext.ElmanNetwork": rnn_ext.ElmanNetwork,
}


class Trainer:
    """One model with its optimizer, its loss curve and the seconds of each step."""

    def __init__(self, network: Callable[[int, int, int], nn.Module], characters: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = CharacterModel(characters, network).to(device)
        self.optimizer = make_optimizer(self.model)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, tokens: Tensor) -> None:
        """One update on tokens (LENGTH + 1, BATCH)."""
        synchronize()
        start = time.perf_counter()
        self.losses.append(train_step(self.model, self.optimizer, tokens))  # waits for the device
        self.seconds.append(time.perf_counter() - start)


def train(device: torch.device, steps: int, seconds: float) -> dict[str, Trainer]:
    """(b) All models on the same batches, step by step in turns, so that a busy machine slows all alike."""
    corpus = Corpus()
    trainers = {name: Trainer(network, len(corpus.alphabet), device) for name, network in NETWORKS.items()}
    parameters = sum(p.numel() for p in trainers["nn.RNN"].model.parameters())
    print(
        f"\n(b) a character model ({parameters} parameters, sequences of {LENGTH}, batch {BATCH}) on Python's "
        f"help texts ({len(corpus.tokens)} characters, {len(corpus.alphabet)} different), on {device.type}"
    )
    generator = torch.Generator().manual_seed(0)
    order = list(trainers.values())

    def losses(_: int) -> str:
        return ", ".join(f"{trainer.losses[-1]:.3f}" for trainer in order if trainer.losses)

    start = time.perf_counter()
    for i in bench.progress(range(steps), "step", losses):
        if i and time.perf_counter() - start > seconds:
            print(f"\nstopped after {i} of {steps} steps, {seconds:g} s being over")
            break
        tokens = corpus.batch(generator).to(device)
        for trainer in order if i % 2 == 0 else reversed(order):
            trainer.step(tokens)
    report(trainers)
    print("a sample of the rnn_ext.ElmanNetwork model:")
    (text,) = write_texts(trainers["rnn_ext.ElmanNetwork"].model, corpus.alphabet, "The ", 400)
    for line in text.splitlines():
        print(f"    {line}")
    return trainers


def report(trainers: dict[str, Trainer]) -> None:
    """Losses and times of each, the two pairs' curves next to each other, and the ratios of their times."""
    for name, trainer in trainers.items():
        low, middle, high = quartiles(trainer.seconds)
        print(
            f"{name:23} loss {trainer.losses[0]:.4f} to {trainer.losses[-1]:.4f}, "
            f"{sum(trainer.seconds):.1f} s, a step {middle * 1e3:.2f} ms (IQR {(high - low) * 1e3:.2f})"
        )
    names = list(trainers)
    for name in names[1:]:
        compare_losses(name, trainers[name], names[0], trainers[names[0]])
    for theirs, ours in ((names[0], names[1]), (names[2], names[3])):
        low, ratio, high = quartiles(
            a / b for a, b in zip(trainers[theirs].seconds, trainers[ours].seconds, strict=True)
        )
        verdict = "noise" if results.is_noise(ratio, low, high) else "faster" if ratio > 1 else "slower"
        print(
            f"a whole training step, {ours} next to {theirs}: {ratio:.2f} times as fast "
            f"(quartiles {low:.2f}, {high:.2f}): {verdict}"
        )


def compare_losses(name: str, trainer: Trainer, other_name: str, other: Trainer) -> None:
    differences = [abs(a - b) for a, b in zip(trainer.losses, other.losses, strict=True)]
    largest = max(differences)
    print(
        f"the loss curves of {name} and {other_name} differ by {largest:.1e} at most, "
        f"at step {differences.index(largest) + 1}",
        end="; ",
    )
    apart = next((i for i, difference in enumerate(differences) if difference > 1e-5), None)
    if apart is None:
        print("they lie on each other throughout")
    else:
        print(f"by more than 1e-05 from step {apart + 1} on: they round differently, and training amplifies that")


def draw(trainers: dict[str, Trainer], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (name, trainer), style in zip(trainers.items(), ("-", "--", "-.", ":"), strict=True):
        left.plot(range(1, len(trainer.losses) + 1), trainer.losses, style, label=name, linewidth=1.5)
        right.plot(torch.tensor(trainer.seconds).cumsum(0), style, label=name, linewidth=1.5)
    left.set(xlabel="step", ylabel="cross entropy, nats a character", title="loss")
    right.set(xlabel="step", ylabel="seconds", title="time in training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"written: {path}")


def microbenchmark(device: torch.device) -> None:
    """(c) bench.py's table on a few shapes."""
    print(f"\n(c) microbenchmark on {device.type} (python benchmarks/bench.py --help for more)")
    args = bench.parse_arguments(["--quick", "--device", device.type, "--peers", "rnn_cell", "addmm"])
    document = results.new_document(device, probe(device, args.dtypes), gpu_state)
    bench.run(args, document)
    bench.print_tables(document["rows"], bench.console())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--steps", type=int, default=200, help="training steps of each model (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="end training after this time at most (default 60)")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the figure (default demo.png)")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not rnn_ext.is_cuda_built():
        print("rnn_ext was built without CUDA kernels: its CUDA times are those of PyTorch's own operators")
    if warning := results.busy():
        print(warning)
    print_tables()
    draw(train(device, args.steps, args.seconds), args.output)
    microbenchmark(device)


if __name__ == "__main__":
    main()
