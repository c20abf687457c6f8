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
from functools import partial

import bench
import results
import torch
from device import gpu_state, probe
from torch import Tensor, nn

import rnn_ext

sys.path.append(str(results.REPOSITORY / "examples"))

from character_model import BATCH, LEARNING_RATE, LENGTH, CharacterModel, Corpus, loss_of
from decode import write_texts
from side_by_side import Trainer, WithReadout, draw, of_nn_rnn, parse_arguments, train


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


# All four draw the same parameters under one seed.
NETWORKS = {
    "loop of nn.RNNCell": partial(WithReadout, partial(Loop, nn.RNNCell)),
    "loop of rnn_ext.RNNCell": partial(WithReadout, partial(Loop, rnn_ext.RNNCell)),
    "nn.RNN": of_nn_rnn,
    "rnn_ext.ElmanNetwork": rnn_ext.ElmanNetwork,
}


def train_character_models(args: argparse.Namespace) -> dict[str, Trainer]:
    """(b) All models on the same batches."""
    corpus = Corpus()
    models = {name: partial(CharacterModel, len(corpus.alphabet), network) for name, network in NETWORKS.items()}
    parameters = sum(p.numel() for p in models["nn.RNN"]().parameters())
    print(
        f"\n(b) a character model ({parameters} parameters, sequences of {LENGTH}, batch {BATCH}) on Python's "
        f"help texts ({len(corpus.tokens)} characters, {len(corpus.alphabet)} different), on {args.device}"
    )
    trainers = train(models, loss_of, lambda generator: corpus.batch(generator).to(args.device), args, LEARNING_RATE)
    print("a sample of the rnn_ext.ElmanNetwork model:")
    (text,) = write_texts(trainers["rnn_ext.ElmanNetwork"].model, corpus.alphabet, "The ", 400)
    for line in text.splitlines():
        print(f"    {line}")
    return trainers


def microbenchmark(device: torch.device) -> None:
    """(c) bench.py's table on a few shapes."""
    print(f"\n(c) microbenchmark on {device.type} (python benchmarks/bench.py --help for more)")
    args = bench.parse_arguments(["--quick", "--device", device.type, "--peers", "rnn_cell", "addmm"])
    document = results.new_document(device, probe(device, args.dtypes), gpu_state)
    bench.run(args, document)
    bench.print_tables(document["rows"], bench.console())


def main() -> None:
    args = parse_arguments(__doc__, 200, "demo.png")
    device = torch.device(args.device)
    if device.type == "cuda" and not rnn_ext.is_cuda_built():
        print("rnn_ext was built without CUDA kernels: its CUDA times are those of PyTorch's own operators")
    if warning := results.busy():
        print(warning)
    print_tables()
    draw(train_character_models(args), "cross entropy, nats a character", args.output)
    microbenchmark(device)


if __name__ == "__main__":
    main()
