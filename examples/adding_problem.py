"""The adding problem (Hochreiter and Schmidhuber 1997) over LENGTH steps, learnt by nn.RNN and by rnn_ext side by side.

    python examples/adding_problem.py [--steps N] [--seconds N] [--device cpu|cuda] [--output adding_problem.png]

Each step shows a number and whether it counts; two of all do, one in either half, and their sum is wanted at the end.
To answer 1 whatever was shown costs 1/6. Units are relu and the recurrent weights begin as the identity (Le, Jaitly and
Hinton 2015), without which what the first half showed would have faded by the end. It wants matplotlib and tqdm.
"""

from __future__ import annotations

from functools import partial

import side_by_side
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH, BATCH, HIDDEN = 200, 32, 64


def make_batch(device: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers and marks (LENGTH, BATCH, 2), and the sums (BATCH)."""
    numbers = torch.rand(LENGTH, BATCH, generator=generator)
    half = LENGTH // 2
    places = torch.randint(half, (2, BATCH), generator=generator) + torch.tensor([[0], [half]])
    marks = torch.zeros(LENGTH, BATCH).scatter_(0, places, 1)
    return torch.stack((numbers, marks), 2).to(device), (numbers * marks).sum(0).to(device)


def make_model(network: str) -> nn.Module:
    model = side_by_side.NETWORKS[network](2, HIDDEN, 1, nonlinearity="relu")
    with torch.no_grad():
        nn.init.eye_(model.rnn.weight_hh_l0)
        nn.init.normal_(model.rnn.weight_ih_l0, std=0.01)
        for bias in (model.rnn.bias_ih_l0, model.rnn.bias_hh_l0):
            nn.init.zeros_(bias)
    return model


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean square of the error at the end."""
    x, sums = batch
    y, _ = model(x)
    return F.mse_loss(y[-1, :, 0], sums)


def main() -> None:
    args = side_by_side.parse_arguments(__doc__, 2000, "adding_problem.png")
    models = {name: partial(make_model, name) for name in side_by_side.NETWORKS}
    trainers = side_by_side.train(models, loss_of, partial(make_batch, args.device), args, lr=3e-4)
    side_by_side.draw(trainers, "mean square error (1/6: the sums' variance)", args.output)


if __name__ == "__main__":
    main()
