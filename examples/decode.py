"""Decoding step by step: several texts at once from a model that examples/character_model.py has saved.

    python examples/decode.py character_model.pt [--prompt TEXT] [--steps N] [--texts N] [--temperature T]

The prompt is one call of the network. From there on each step's input is the last step's choice, so that no step can
begin before the one before it has ended: this is where a cell is called, here on the parameters of the network's layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from character_model import CharacterModel
from torch import Tensor
from torch.nn import functional as F

import rnn_ext


@torch.inference_mode()
def decode(model: CharacterModel, prompt: Tensor, temperature: float, generator: torch.Generator) -> Iterator[Tensor]:
    """After prompt (T, B), without end: the next tokens (B), drawn on the CPU from the model's chances."""
    rnn, readout = model.network.rnn, model.network.readout
    _, h_n = rnn(model.embedding(prompt))
    h = h_n[0]
    while True:
        chances = F.softmax(readout(h).float().cpu() / temperature, 1)
        tokens = torch.multinomial(chances, 1, generator=generator)[:, 0]
        yield tokens
        h = rnn_ext.rnn_cell(model.embedding(tokens.to(prompt.device)), h, *rnn.all_weights[0])


def write_texts(
    model: CharacterModel, alphabet: str, prompt: str, steps: int, texts: int = 1, temperature: float = 0.7
) -> list[str]:
    """`texts` continuations of the prompt, `steps` characters each."""
    device = next(model.parameters()).device
    tokens = torch.tensor([alphabet.index(character) for character in prompt], device=device)
    decoded = decode(model, tokens[:, None].expand(-1, texts), temperature, torch.Generator().manual_seed(0))
    chosen = [next(decoded).tolist() for _ in range(steps)]
    return [prompt + "".join(alphabet[step[i]] for step in chosen) for i in range(texts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="what character_model.py wrote")
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--steps", type=int, default=200, help="characters a text (default %(default)s)")
    parser.add_argument("--texts", type=int, default=3, help="texts at once (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="lower is less random (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    saved = torch.load(args.model, map_location=args.device, weights_only=True)
    if not args.prompt or set(args.prompt) - set(saved["alphabet"]):
        parser.error(f"--prompt must be made of the model's characters, one at least: {saved['alphabet']!r}")
    model = CharacterModel(len(saved["alphabet"])).to(args.device)
    model.load_state_dict(saved["model"])
    texts = write_texts(model, saved["alphabet"], args.prompt, args.steps, args.texts, args.temperature)
    print("\n----\n".join(texts))


if __name__ == "__main__":
    main()
