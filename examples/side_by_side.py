"""Several networks trained side by side, for the programs next to this file and benchmarks/demo.py.

All start from one seed and see the same batches, step by step in turns, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from tqdm import tqdm

import rnn_ext

Batch = Any
MEAN = 10  # steps over which a loss is taken to be reached


class WithReadout(nn.Module):
    """What rnn_ext.ElmanNetwork is, around another recurrent part: one that `lengths` are given to by packing."""

    def __init__(
        self, recurrent: Callable[..., nn.Module], input_size: int, hidden_size: int, output_size: int, **options: Any
    ) -> None:
        super().__init__()
        self.rnn = recurrent(input_size, hidden_size, **options)
        features = hidden_size * (2 if options.get("bidirectional") else 1)
        self.readout = nn.Linear(features, output_size, bias=False)

    def forward(self, input: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y (T, B, output_size) of input (T, B, I), zero beyond a row's length, and h_n."""
        if lengths is None:
            states, h_n = self.rnn(input) if hx is None else self.rnn(input, hx)
        else:
            packed, h_n = self.rnn(pack_padded_sequence(input, lengths, enforce_sorted=False), hx)
            states, _ = pad_packed_sequence(packed, total_length=len(input))
        return self.readout(states), h_n


def of_nn_rnn(*sizes: int, **options: Any) -> nn.Module:
    return WithReadout(nn.RNN, *sizes, **options)


# Both draw the same parameters under one seed.
NETWORKS: dict[str, Callable[..., nn.Module]] = {"nn.RNN": of_nn_rnn, "rnn_ext": rnn_ext.ElmanNetwork}


class Trainer:
    """A model with its loss curve and the seconds of each step."""

    def __init__(self, model: nn.Module, lr: float, loss_of: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.model, self.loss_of = model, loss_of
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: Batch) -> None:
        """One update."""
        start = time.perf_counter()
        loss = self.loss_of(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - start)

    @property
    def means(self) -> list[float]:
        """The mean loss of the last MEAN steps, from the MEANth step on."""
        return [statistics.fmean(self.losses[i : i + MEAN]) for i in range(len(self.losses) - MEAN + 1)]

    def seconds_to(self, loss: float) -> float:
        """In training, until the mean loss is at most this."""
        reached = next(i for i, mean in enumerate(self.means) if mean <= loss)
        return sum(self.seconds[: reached + MEAN])


def train(
    models: dict[str, Callable[[], nn.Module]],
    loss_of: Callable[[nn.Module, Batch], Tensor],
    batch: Callable[[torch.Generator], Batch],
    args: argparse.Namespace,
    lr: float,
) -> dict[str, Trainer]:
    """args.steps updates of each model, or what args.seconds are enough for; then what came of them, in words."""
    trainers = {}
    for name, make in models.items():
        torch.manual_seed(0)
        trainers[name] = Trainer(make().to(args.device), lr, loss_of)
    generator = torch.Generator().manual_seed(0)
    order, start = list(trainers.values()), time.perf_counter()
    bar = tqdm(range(args.steps), unit="step", dynamic_ncols=True, mininterval=0.5)
    for i in bar:
        if i and time.perf_counter() - start > args.seconds:
            bar.close()
            print(f"stopped after {i} of {args.steps} steps, {args.seconds:g} s being over")
            break
        found = batch(generator)
        for trainer in order if i % 2 == 0 else reversed(order):
            trainer.step(found)
        bar.set_postfix_str(", ".join(f"{trainer.losses[-1]:.4f}" for trainer in order), refresh=False)
    report(trainers)
    return trainers


def report(trainers: dict[str, Trainer]) -> None:
    """Losses and times of each, how far the curves lie apart, and the times to one loss."""
    for name, trainer in trainers.items():
        low, middle, high = quartiles(trainer.seconds)
        print(
            f"{name:23} loss {trainer.losses[0]:.4f} to {trainer.losses[-1]:.4f}, "
            f"{sum(trainer.seconds):.1f} s, a step {middle * 1e3:.2f} ms (IQR {(high - low) * 1e3:.2f})"
        )
    names = list(trainers)
    for name in names[1:]:
        compare_losses(name, trainers[name], names[0], trainers[names[0]])
    for theirs, ours in itertools.pairwise(names):
        if "rnn_ext" in ours and "rnn_ext" not in theirs:
            compare_times(theirs, trainers[theirs], ours, trainers[ours])


def compare_losses(name: str, trainer: Trainer, other_name: str, other: Trainer) -> None:
    differences = [abs(a - b) for a, b in zip(trainer.losses, other.losses, strict=True)]
    apart = next((i for i, difference in enumerate(differences) if difference > 1e-5), None)
    print(f"largest difference of the loss curves, {name} next to {other_name}: {max(differences):.1e}", end="; ")
    if apart is None:
        print("they lie on each other throughout")
    else:
        print(f"by more than 1e-05 from step {apart + 1} on: they round differently, and training amplifies that")


def compare_times(theirs: str, other: Trainer, ours: str, trainer: Trainer) -> None:
    low, ratio, high = quartiles([a / b for a, b in zip(other.seconds, trainer.seconds, strict=True)])
    print(f"a training step, {ours} next to {theirs}: {ratio:.2f} times as fast (quartiles {low:.2f}, {high:.2f})")
    if len(trainer.losses) >= MEAN:
        loss = max(min(other.means), min(trainer.means))  # the least that both reached
        before, after = other.seconds_to(loss), trainer.seconds_to(loss)
        print(f"to a mean loss of {loss:.4f}: {theirs} {before:.1f} s, {ours} {after:.1f} s")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def draw(trainers: dict[str, Trainer], label: str, path: Path, more: Callable[[Any], None] | None = None) -> None:
    """The loss, called `label`, over steps and over seconds in training; `more` draws on axes of its own."""
    import matplotlib

    matplotlib.use("Agg")  # a figure goes to a file; there may be no display
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3 if more else 2, figsize=(16 if more else 11, 4), layout="constrained")
    for (name, trainer), style in zip(trainers.items(), ("-", "--", "-.", ":"), strict=False):
        axes[0].plot(range(1, len(trainer.losses) + 1), trainer.losses, style, label=name, linewidth=1.5)
        axes[1].plot(torch.tensor(trainer.seconds).cumsum(0), trainer.losses, style, label=name, linewidth=1.5)
    axes[0].set(xlabel="step", ylabel=label, title="the same steps")
    axes[1].set(xlabel="seconds in training", ylabel=label, title="the same time")
    highest = 2 * max(trainer.losses[0] for trainer in trainers.values())  # what shoots up beyond that is cut off
    for panel in axes[:2]:
        panel.set_yscale("log")
        panel.set_ylim(top=highest)
        panel.grid(alpha=0.3)
        panel.legend()
    if more:
        more(axes[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"written: {path}")


def parse_arguments(description: str | None, steps: int, output: str) -> argparse.Namespace:
    """The options that all these programs have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="updates of each network (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=90, help="end training then at the latest (default 90)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=Path(output), help="the figure (default %(default)s)")
    return parser.parse_args()
