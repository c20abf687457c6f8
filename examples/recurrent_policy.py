"""A recurrent policy in a loop with its environment, trained by REINFORCE (Williams 1992) to remember.

    python examples/recurrent_policy.py [--steps N] [--device cpu|cuda]

An episode shows one of CUES signals, then only noise; at its end the policy is rewarded if it names the signal. What it
sees next depends on the environment, so that no layer over a whole sequence can take the cell's place.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rnn_ext

EPISODES, CUES, DELAY, HIDDEN = 64, 4, 6, 32


class Environment:
    """EPISODES episodes at a time, of DELAY + 1 steps each."""

    def reset(self, device: str) -> Tensor:
        """What is seen first (EPISODES, CUES): the cue."""
        self.cue = torch.randint(CUES, (EPISODES,), device=device)
        self.left = DELAY
        return F.one_hot(self.cue, CUES).float()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, bool]:
        """What is seen next (EPISODES, CUES), the reward (EPISODES), and whether the episodes are over."""
        done = self.left == 0
        self.left -= 1
        reward = (action == self.cue).float() if done else torch.zeros(EPISODES, device=action.device)
        return 0.1 * torch.randn(EPISODES, CUES, device=action.device), reward, done


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = rnn_ext.RNNCell(CUES, HIDDEN)
        self.head = nn.Linear(HIDDEN, CUES)

    def forward(self, seen: Tensor, h: Tensor | None) -> tuple[torch.distributions.Categorical, Tensor]:
        """The distribution of actions, and h (EPISODES, HIDDEN) for the next step."""
        h = self.cell(seen, h)
        return torch.distributions.Categorical(logits=self.head(h)), h


def play(policy: Policy, environment: Environment, device: str) -> tuple[Tensor, Tensor]:
    """One round of episodes: the log-probability of the last action and its reward, (EPISODES) each.

    Only the last action earns anything or changes what follows, so the others have no part in the gradient.
    """
    seen, h, done = environment.reset(device), None, False
    while not done:
        actions, h = policy(seen, h)
        action = actions.sample()
        seen, reward, done = environment.step(action)
    return actions.log_prob(action), reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="updates (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    torch.manual_seed(0)
    policy, environment = Policy().to(args.device), Environment()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    mean = 1 / CUES  # of the rewards so far: what a guess earns, to begin with
    for step in range(1, args.steps + 1):
        log_probability, reward = play(policy, environment, args.device)
        loss = -(log_probability * (reward - mean)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        mean += 0.05 * (reward.mean().item() - mean)
        if step == args.steps or step % 50 == 0:
            print(f"step {step}: mean reward {mean:.2f} (a guess: {1 / CUES:.2f}, the best: 1.00)")


if __name__ == "__main__":
    main()
