"""A next-character model, trained on whole sequences of Python's own help texts: an embedding and Elman's network.

    python examples/character_model.py [--steps N] [--device cpu|cuda] [--output character_model.pt]

examples/decode.py writes text with the saved model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rnn_ext

BATCH, LENGTH, EMBEDDING, HIDDEN, LEARNING_RATE = 32, 64, 64, 256, 2e-3


class CharacterModel(nn.Module):
    """Next-character scores: an embedding, and Elman's network h_t = tanh(W x_t + U h_{t-1} + b), y_t = V h_t."""

    def __init__(self, characters: int, network: Callable[[int, int, int], nn.Module] = rnn_ext.ElmanNetwork) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.network = network(EMBEDDING, HIDDEN, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores (T, B, characters) of tokens (T, B): all steps in one call."""
        scores, _ = self.network(self.embedding(tokens))
        return scores


class Corpus:
    """A text as numbers: `alphabet` holds its characters, `tokens` their places in it, one a character of the text."""

    def __init__(self) -> None:
        text = "\n".join(topics[name] for name in sorted(topics))
        self.alphabet = "".join(sorted(set(text)))
        index = {character: i for i, character in enumerate(self.alphabet)}
        self.tokens = torch.tensor([index[character] for character in text])

    def batch(self, generator: torch.Generator) -> Tensor:
        """BATCH pieces of the text from random places, (LENGTH + 1, BATCH)."""
        starts = torch.randint(len(self.tokens) - LENGTH, (BATCH,), generator=generator)
        return self.tokens[starts + torch.arange(LENGTH + 1)[:, None]]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """In nats a character, of tokens (T + 1, B)."""
    return F.cross_entropy(model(tokens[:-1]).flatten(0, 1), tokens[1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="updates (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=Path("character_model.pt"), help="file (default %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    corpus, generator = Corpus(), torch.Generator().manual_seed(0)
    model = CharacterModel(len(corpus.alphabet)).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for step in range(1, args.steps + 1):
        loss = loss_of(model, corpus.batch(generator).to(args.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == 1 or step == args.steps or step % 20 == 0:
            print(f"step {step}: {loss.item():.3f} nats a character")
    torch.save({"alphabet": corpus.alphabet, "model": model.state_dict()}, args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
