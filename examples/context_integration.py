"""A network trained for a task of neuroscience, by nn.RNN and by rnn_ext side by side, and what its units then do.

    python examples/context_integration.py [--steps N] [--seconds N] [--device cpu|cuda] [--output FIGURE]

The task is that of Mante, Sussillo, Shenoy and Newsome (2013): two noisy signals, 'motion' and 'colour', and a context
that says which of them counts. At the end of a trial the output has to tell the sign of that one's mean and pass over
the other's. The third panel shows the states of HIDDEN units, averaged over trials of one context and coherence, in the
plane of their first two principal components: as a rule choices lie apart along the first, contexts along the second.
It wants matplotlib and tqdm.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import side_by_side
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH, BATCH, INPUTS, HIDDEN = 40, 64, 4, 256
COHERENCES = (-0.5, -0.25, -0.1, 0.1, 0.25, 0.5)  # a signal's mean; its noise has deviation NOISE a step
NOISE = 0.5
JUDGED = 10  # steps at the end


def make_trials(coherences: Tensor, contexts: Tensor, generator: torch.Generator) -> Tensor:
    """Input (LENGTH, B, 4): motion and colour of means `coherences` (B, 2), and `contexts` (B), 0 or 1, one-hot."""
    signals = coherences + NOISE * torch.randn(LENGTH, *coherences.shape, generator=generator)
    return torch.cat((signals, F.one_hot(contexts, 2).float().expand(LENGTH, -1, -1)), 2)


def make_batch(device: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Trials (LENGTH, BATCH, 4), and the right choices (BATCH), 1 or -1."""
    drawn = torch.randint(len(COHERENCES), (BATCH, 2), generator=generator)
    coherences = torch.tensor(COHERENCES)[drawn]
    contexts = torch.randint(2, (BATCH,), generator=generator)
    choices = coherences.gather(1, contexts.unsqueeze(1))[:, 0].sign()
    return make_trials(coherences, contexts, generator).to(device), choices.to(device)


def make_model(network: str) -> nn.Module:
    model = side_by_side.NETWORKS[network](INPUTS, HIDDEN, 1)
    # nn.RNN goes by the number of units here too, with which the few inputs would hardly be heard.
    nn.init.uniform_(model.rnn.weight_ih_l0, -(INPUTS**-0.5), INPUTS**-0.5)
    return model


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean square of the error in the last JUDGED steps."""
    x, choices = batch
    y, _ = model(x)
    return F.mse_loss(y[-JUDGED:, :, 0], choices.expand(JUDGED, -1))


@torch.no_grad()
def share_right(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    x, choices = batch
    return (model(x)[0][-1, :, 0].sign() == choices).float().mean().item()


@torch.no_grad()
def mean_states(model: nn.Module, device: str) -> Tensor:
    """Of trials in which the other signal is any, the states' mean (2, len(COHERENCES), LENGTH, HIDDEN)."""
    generator = torch.Generator().manual_seed(2)
    means = []
    for context in (0, 1):
        for coherence in COHERENCES:
            coherences = torch.tensor(COHERENCES)[torch.randint(len(COHERENCES), (BATCH, 2), generator=generator)]
            coherences[:, context] = coherence
            contexts = torch.full((BATCH,), context)
            states, _ = model.rnn(make_trials(coherences, contexts, generator).to(device))
            means.append(states.mean(1).cpu())
    return torch.stack(means).unflatten(0, (2, len(COHERENCES)))


def draw_states(model: nn.Module, device: str, axes: Any) -> None:
    states = mean_states(model, device)
    flat = states.flatten(0, 2)
    centred = flat - flat.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    shares = values.square() / values.square().sum()
    points = (centred @ directions[:2].t()).view(*states.shape[:3], 2)
    for context, style in ((0, "-"), (1, "--")):
        for i, coherence in enumerate(COHERENCES):
            x, y = points[context, i].unbind(1)
            colour = (0.5 + coherence, 0.2, 0.5 - coherence)
            label = f"{('motion', 'colour')[context]} counts, {coherence:+g}" if abs(coherence) == 0.5 else None
            axes.plot(x, y, style, color=colour, linewidth=1.2, label=label)
            axes.plot(x[-1], y[-1], "o", color=colour, markersize=4)
    axes.set(xlabel=f"first component ({shares[0]:.0%})", ylabel=f"second component ({shares[1]:.0%})")
    axes.set(title=f"{HIDDEN} units' states, a trial from its start to the dot")
    axes.legend(fontsize=7)


def main() -> None:
    args = side_by_side.parse_arguments(__doc__, 500, "context_integration.png")
    models = {name: partial(make_model, name) for name in side_by_side.NETWORKS}
    trainers = side_by_side.train(models, loss_of, partial(make_batch, args.device), args, lr=1e-3)
    unseen = make_batch(args.device, torch.Generator().manual_seed(1))
    for name, trainer in trainers.items():
        print(f"{name}: {share_right(trainer.model, unseen):.1%} of an unseen batch's choices are right")
    states = partial(draw_states, trainers["rnn_ext"].model, args.device)
    side_by_side.draw(trainers, "mean square error (1: an even guess)", args.output, states)


if __name__ == "__main__":
    main()
