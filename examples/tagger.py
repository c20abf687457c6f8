"""A bidirectional tagger of sentences of any lengths, unsorted, trained by nn.RNN and by rnn_ext side by side.

    python examples/tagger.py [--steps N] [--seconds N] [--device cpu|cuda] [--output tagger.png]

The sentences are made up as they are needed. Among words that mean nothing stand brackets of KINDS kinds, and the tag
of a word tells which kind of bracket comes last before it and which comes next: each direction knows half of that.
nn.RNN packs and pads each batch; rnn_ext.ElmanNetwork is told the lengths. It wants matplotlib and tqdm.
"""

from __future__ import annotations

from functools import partial

import side_by_side
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LENGTHS, BATCH, WORDS, KINDS, EMBEDDING, HIDDEN = (10, 80), 32, 50, 4, 32, 96
IGNORED = -100  # the tag of what lies beyond a sentence's end, which cross_entropy leaves out


def last_bracket(words: Tensor) -> Tensor:
    """Of words (T, B), the kind of the last bracket up to each; 0, the first kind, where there is none yet."""
    steps = torch.arange(len(words)).unsqueeze(1).expand_as(words)
    at = torch.where(words < KINDS, steps, -1).cummax(0).values
    return torch.where(at < 0, 0, words.gather(0, at.clamp(min=0)))


def make_batch(device: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Words and tags (T, BATCH), the tags of what is no word IGNORED, and the lengths (BATCH)."""
    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (BATCH,), generator=generator)
    words = torch.randint(WORDS, (int(lengths.max()), BATCH), generator=generator)
    ended = torch.arange(len(words)).unsqueeze(1) >= lengths
    words = words.masked_fill(ended, WORDS - 1)  # a word that is no bracket
    tags = KINDS * last_bracket(words) + last_bracket(words.flip(0)).flip(0)
    return words.to(device), tags.masked_fill(ended, IGNORED).to(device), lengths


class Tagger(nn.Module):
    def __init__(self, network: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, EMBEDDING)
        self.network = side_by_side.NETWORKS[network](EMBEDDING, HIDDEN, KINDS**2, bidirectional=True)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Scores (T, B, KINDS²) of words (T, B)."""
        return self.network(self.embedding(words), lengths=lengths)[0]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    words, tags, lengths = batch
    return F.cross_entropy(model(words, lengths).flatten(0, 1), tags.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def share_right(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> float:
    words, tags, lengths = batch
    counted = tags != IGNORED
    return (model(words, lengths).argmax(2)[counted] == tags[counted]).float().mean().item()


def main() -> None:
    args = side_by_side.parse_arguments(__doc__, 400, "tagger.png")
    models = {name: partial(Tagger, name) for name in side_by_side.NETWORKS}
    trainers = side_by_side.train(models, loss_of, partial(make_batch, args.device), args, lr=2e-3)
    unseen = make_batch(args.device, torch.Generator().manual_seed(1))
    for name, trainer in trainers.items():
        print(f"{name}: {share_right(trainer.model, unseen):.1%} of an unseen batch's tags are right")
    side_by_side.draw(trainers, "cross entropy, nats a tag", args.output)


if __name__ == "__main__":
    main()
