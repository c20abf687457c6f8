"""Every CUDA kernel that could run a case, forced in turn: what the dispatch's model predicted, and what a GPU says.

    python benchmarks/compare_kernels.py [--shapes B,I,H ...] [--dtypes ...] [--kernels N] [--dry-run]

Device time, in microseconds a call, of a CUDA graph of many calls with operands in L2 where they fit; medians over
alternating rounds. `*` marks the kernel that the dispatch chooses. --dry-run names the kernels and measures nothing,
for an H100 where there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from bench import brief
from cases import Case, make_tensors, parse_case
from timing import device_sampler, sample_in_turns

from rnn_ext.__main__ import explain

VARIABLES = {"forward": "RNN_EXT_KERNEL", "backward": "RNN_EXT_BACKWARD_KERNEL"}
SHAPES = ["1,1024,1024", "8,1024,1024", *(f"{B},{H},{H}" for H in (256, 1024, 4096) for B in (16, 64, 256, 1024, 4096))]
NODES = 20  # calls in a graph


@dataclass(frozen=True)
class Candidate:
    """A kernel as its variable forces it, and the model's microseconds."""

    direction: str
    kernel: str
    microseconds: float


def candidates(case: Case, most: int) -> list[Candidate]:
    """Of each direction the `most` fastest by the model, the dispatch's own choice first."""
    found: list[Candidate] = []
    direction = "forward"
    for line in explain([str(case.B), str(case.I), str(case.H), case.dtype]).splitlines():
        if match := re.match(r"(forward|backward): ", line):
            direction = match[1]
        if match := re.match(r" *([\d.]+)  (\S+) ", line):
            splits = re.search(r"K split in (\d+)", line)
            kernel = match[2] + (f":{splits[1]}" if splits else "")
            # Of two rows of one name the variable means the first that takes the case.
            if all((c.direction, c.kernel) != (direction, kernel) for c in found):
                found.append(Candidate(direction, kernel, float(match[1])))
    return [c for d in VARIABLES for c in [c for c in found if c.direction == d][:most]]


def call_of(case: Case, direction: str) -> Callable[[], object]:
    """One launch path, past autograd."""
    t = make_tensors(case, torch.device("cuda"))
    operands = [t["x"][0], t["h"][0], t["weight_ih_l0"], t["weight_hh_l0"]]
    biases = (t["bias_ih_l0"], t["bias_hh_l0"])
    if direction == "forward":
        return lambda: torch.ops.rnn_ext.rnn_cell(*operands, *biases, case.nonlinearity)
    output = torch.ops.rnn_ext.rnn_cell(*operands, *biases, case.nonlinearity)
    every = [True] * 6
    return lambda: torch.ops.rnn_ext.rnn_cell_backward(t["grad_output"][0], output, *operands, case.nonlinearity, every)


def measure(case: Case, found: list[Candidate], rounds: int, seconds: float) -> dict[Candidate, float | str]:
    """Microseconds, or why there are none."""
    samplers, results = {}, dict[Candidate, float | str]()
    calls = {direction: call_of(case, direction) for direction in VARIABLES}
    for c in found:
        os.environ[VARIABLES[c.direction]] = c.kernel  # read when the graph is captured
        try:
            samplers[c] = device_sampler([calls[c.direction]] * NODES, seconds)
        except Exception as error:  # a kernel that fails stands in the table with its reason
            results[c] = brief(error)
        finally:
            del os.environ[VARIABLES[c.direction]]
    for c, samples in sample_in_turns(samplers, rounds).items():
        results[c] = statistics.median(samples) * 1e6
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="B,I,H", default=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kernels", type=int, default=6, help="of a direction, the fastest by the model (default 6)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample-ms", type=float, default=1.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    for text in args.shapes:
        for dtype in args.dtypes:
            case = replace(parse_case(text, "cell"), dtype=dtype)
            found = candidates(case, args.kernels)
            results = {} if args.dry_run else measure(case, found, args.rounds, args.sample_ms / 1e3)
            print(f"B={case.B} I={case.I} H={case.H} {dtype}: model, measured", flush=True)
            for i, c in enumerate(found):
                chosen = "*" if i == 0 or found[i - 1].direction != c.direction else " "
                result = results.get(c, "-")
                measured = f"{result:9.2f}" if isinstance(result, float) else f"{result:>9}"
                print(f"{chosen} {c.direction:8} {c.kernel:18} {c.microseconds:9.2f} {measured}", flush=True)
            if not args.dry_run:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
