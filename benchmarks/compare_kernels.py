"""Every CUDA kernel that could run a case, forced in turn: what the dispatch's model predicted, and what a GPU says.

    python benchmarks/compare_kernels.py [--shapes [T,]B,I,H ...] [--dtypes ...] [--kernels N] [--dry-run]

Device time, in microseconds a call of the cell, or a step of a sequence (T,B,I,H, with :packed or :lengths after it),
of a CUDA graph of many calls with operands in L2 where they fit; medians over alternating rounds. Of a sequence the
model's time is that of the steps alone, without the products of all steps before and after. `*` marks the kernel that
the dispatch chooses. --dry-run names the kernels and measures nothing, for an H100 where there is no GPU.
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
from torch.nn.utils.rnn import pack_padded_sequence

from rnn_ext.__main__ import explain, explain_sequence

VARIABLES = {
    "cell": {"forward": "RNN_EXT_KERNEL", "backward": "RNN_EXT_BACKWARD_KERNEL"},
    "sequence": {"forward": "RNN_EXT_SEQUENCE_KERNEL", "backward": "RNN_EXT_SEQUENCE_KERNEL"},
}
SHAPES = ["1,1024,1024", "8,1024,1024", *(f"{B},{H},{H}" for H in (256, 1024, 4096) for B in (16, 64, 256, 1024, 4096))]
NODES = 20  # calls of the cell in a graph


@dataclass(frozen=True)
class Candidate:
    """A kernel as its variable forces it, and the model's microseconds."""

    direction: str
    kernel: str
    microseconds: float


def is_cell(case: Case) -> bool:
    return case.layer == "cell"


def candidates(case: Case, most: int) -> list[Candidate]:
    """Of each direction the `most` fastest by the model, the dispatch's own choice first."""
    found: list[Candidate] = []
    direction = "forward"
    sizes = [str(size) for size in (case.B, case.I, case.H)]
    explained = explain([*sizes, case.dtype]) if is_cell(case) else explain_sequence([str(case.T), *sizes, case.dtype])
    for line in explained.splitlines():
        if match := re.match(r"(forward|backward)(?:, a step)?: ", line):
            direction = match[1]
        if match := re.match(r" *([\d.]+)  (\S+) ", line):
            splits = re.search(r"K split in (\d+)", line)
            kernel = match[2] + (f":{splits[1]}" if splits else "")
            # Of two rows of one name the variable means the first that takes the case.
            if all((c.direction, c.kernel) != (direction, kernel) for c in found):
                found.append(Candidate(direction, kernel, float(match[1])))
    return [c for d in VARIABLES[case.layer] for c in [c for c in found if c.direction == d][:most]]


def call_of(case: Case, direction: str) -> Callable[[], object]:
    """One launch path, past autograd."""
    t = make_tensors(case, torch.device("cuda"))
    weights, biases = (t["weight_ih_l0"], t["weight_hh_l0"]), (t["bias_ih_l0"], t["bias_hh_l0"])
    every = [True] * 6
    if not is_cell(case):
        x, grad_output, layout = t["x"], t["grad_output"], (False, False, None, None)
        if case.layout == "lengths":
            layout = (False, False, case.lengths, None)
        elif case.layout == "packed":
            packed = pack_padded_sequence(x, case.lengths)
            x, grad_output = packed.data, pack_padded_sequence(grad_output, case.lengths).data
            layout = (False, False, None, packed.batch_sizes)
        operands = [x, t["h"][0], *weights]
        forward = lambda: torch.ops.rnn_ext.rnn_layer(*operands, *biases, case.nonlinearity, *layout)  # noqa: E731
        if direction == "forward":
            return forward
        given = [grad_output, None, forward()[0], *operands]
        return lambda: torch.ops.rnn_ext.rnn_layer_backward(*given, case.nonlinearity, every, *layout)
    operands = [t["x"][0], t["h"][0], *weights]
    if direction == "forward":
        return lambda: torch.ops.rnn_ext.rnn_cell(*operands, *biases, case.nonlinearity)
    output = torch.ops.rnn_ext.rnn_cell(*operands, *biases, case.nonlinearity)
    return lambda: torch.ops.rnn_ext.rnn_cell_backward(t["grad_output"][0], output, *operands, case.nonlinearity, every)


def measure(case: Case, found: list[Candidate], rounds: int, seconds: float) -> dict[Candidate, float | str]:
    """Microseconds, or why there are none."""
    samplers, results = {}, dict[Candidate, float | str]()
    variables = VARIABLES[case.layer]
    calls = {direction: call_of(case, direction) for direction in variables}
    for c in found:
        os.environ[variables[c.direction]] = c.kernel  # read when the graph is captured
        try:
            samplers[c] = device_sampler([calls[c.direction]] * (NODES if is_cell(case) else 1), seconds)
        except Exception as error:  # a kernel that fails stands in the table with its reason
            results[c] = brief(error)
        finally:
            del os.environ[variables[c.direction]]
    for c, samples in sample_in_turns(samplers, rounds).items():
        results[c] = statistics.median(samples) * 1e6 / case.T
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="[T,]B,I,H", default=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kernels", type=int, default=6, help="of a direction, the fastest by the model (default 6)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample-ms", type=float, default=1.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    for text in args.shapes:
        for dtype in args.dtypes:
            layer = "cell" if text.count(",") == 2 else "sequence"
            case = replace(parse_case(text, layer), dtype=dtype)
            found = candidates(case, args.kernels)
            results = {} if args.dry_run else measure(case, found, args.rounds, args.sample_ms / 1e3)
            steps = "" if is_cell(case) else f"T={case.T} "
            layout = "" if case.layout == "padded" else f"{case.layout} "
            print(f"{steps}B={case.B} I={case.I} H={case.H} {layout}{dtype}: model, measured", flush=True)
            for i, c in enumerate(found):
                chosen = "*" if i == 0 or found[i - 1].direction != c.direction else " "
                result = results.get(c, "-")
                measured = f"{result:9.2f}" if isinstance(result, float) else f"{result:>9}"
                print(f"{chosen} {c.direction:8} {c.kernel:18} {c.microseconds:9.2f} {measured}", flush=True)
            if not args.dry_run:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
