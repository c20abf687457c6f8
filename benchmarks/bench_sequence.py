"""rnn_ext.RNN over whole sequences against what else computes them, on the CPU.

    python benchmarks/bench_sequence.py --quick
    python benchmarks/bench_sequence.py --cases 64,32,64,128 64,32,64,128:packed --dtypes bfloat16 --peers rnn cells

Every peer runs on the same random data, in alternating rounds, and only after its result was checked against float64.
JAX (jit of lax.scan), onnxruntime and OpenVINO (forward alone, float32) take part where they are installed. Writes
sequence.json (schema: results.py) and a PNG (plots.py) to --output; ctrl-C keeps what was measured.

Of each training step it also says what is kept for the backward, and the most memory that it takes at once. As for the
cell, freed memory stays with the process while times are taken (timing.keep_freed_memory).
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plots
import results
import torch
from bench_cell import brief, console, progress, rates, times
from device import probe
from peers import TOLERANCE, Step
from sequence_peers import PASSES, PEERS, Case, error_of, make_tensors, name_of, reference, tolerance
from timing import host_sampler, keep_freed_memory, sample_in_turns
from torch import Tensor

from rnn_ext import _C

if TYPE_CHECKING:
    from rich.table import Table

CASES = [
    Case(64, 1, 16, 32),
    Case(100, 10, 4, 5),
    Case(64, 32, 64, 128),
    Case(512, 16, 128, 256),
    Case(35, 20, 200, 200),
    Case(64, 64, 512, 512),
    Case(50, 16, 1760, 1760),
    Case(784, 32, 1, 128),
    Case(1, 1, 1024, 1024, limit=True),
    Case(4, 1, 1024, 1024, limit=True),
    Case(1000, 1, 64, 64, limit=True),
    Case(64, 32, 64, 128, layers=2, directions=2, limit=True),
    Case(64, 32, 64, 128, layout="packed", limit=True),
    Case(64, 32, 64, 128, layout="lengths", limit=True),
]
QUICK_CASES = [CASES[i] for i in (0, 1, 2, 4, 10, 12)]
KINDS: dict[str, dict[str, Any]] = {
    "packed": {"layout": "packed", "limit": True},
    "lengths": {"layout": "lengths", "limit": True},
    "bidirectional": {"layers": 2, "directions": 2, "limit": True},
}
REST = 2e-3  # seconds before a sample: the last peer's threads have stopped spinning


def case(text: str) -> Case:
    sizes, *kinds = text.split(":")
    try:
        T, B, I, H = (int(size) for size in sizes.split(","))  # noqa: E741
        found = Case(T, B, I, H)
        for kind in kinds:
            found = replace(found, **KINDS[kind])
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not T,B,I,H, or that with one of :{', :'.join(KINDS)}") from None
    return found


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases, float32, half a minute")
    parser.add_argument(
        "--cases",
        type=case,
        nargs="+",
        metavar="T,B,I,H",
        help=f"with :{', :'.join(KINDS)} (two layers) after it for that kind",
    )
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, help="default float32 bfloat16")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--nonlinearities", nargs="+", choices=("tanh", "relu"), default=["tanh"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="rnn_ext is always among them")
    parser.add_argument("--rounds", type=int, default=21, help="alternating samples of each peer, at most (default 21)")
    parser.add_argument("--sample-ms", type=float, default=4.0, help="length of a sample (default 4)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=3.0,
        help="for the rounds of a case, of which there are five at least (default 3)",
    )
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="folder (default build/bench)")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.seconds = min(args.rounds, 7), min(args.seconds, 0.5)
    args.cases = args.cases or (QUICK_CASES if args.quick else CASES)
    args.dtypes = args.dtypes or (["float32"] if args.quick else ["float32", "bfloat16"])
    args.peers = list(dict.fromkeys(["rnn_ext", *args.peers]))
    return args


def saved_bytes(step: Step) -> int:
    """What one call keeps for its backward, besides its own leaves, in bytes of memory."""
    own = {leaf.untyped_storage().data_ptr() for leaf in step.leaves}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step.run()
    return sum(kept.values())


def peak_bytes(step: Step) -> int | None:
    """The most memory that one call has at once, by the kernel's count of this process's pages; None without one."""
    try:
        step.run()  # what is made once stays out
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        result = step.run()
        peak = resident("VmHWM") - before
        del result
    except (AttributeError, OSError, StopIteration):
        return None
    return max(peak, 0)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def rested(sampler: Callable[[], float]) -> float:
    time.sleep(REST)
    return sampler()


def measure_case(case: Case, names: list[str], facts: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one case: every peer checked, then timed in turns."""
    tensors = make_tensors(case)
    wanted = reference(case, tensors)
    notes, errors, memory = {}, {}, {}
    samplers: dict[str, Callable[[], float]] = {}
    for name in names:
        try:
            step = PEERS[name].build(case, tensors)
            errors[name] = error_of(wanted, step.unpack(step.run()))
            if not errors[name] <= tolerance(case):
                notes[name] = f"wrong result: error {errors[name]:.1e}"
                errors[name] = errors[name] if errors[name] < float("inf") else None  # JSON has no infinity
                continue
            if step.leaves and case.pass_name == "forward_backward":
                memory[name] = saved_bytes(step), peak_bytes(step)
            sampler = host_sampler(step.run, args.sample_ms / 1e3)
            samplers[name] = lambda sampler=sampler: rested(sampler)
        except Exception as error:  # a peer that cannot take the case stands in the results with its reason
            notes[name] = brief(error)

    start = time.perf_counter()
    sample_in_turns(samplers, 1)
    rounds = int(args.seconds / (time.perf_counter() - start))
    samples = sample_in_turns(samplers, min(args.rounds, max(5, rounds)))
    rows = []
    for name in names:
        saved, peak = memory.get(name, (None, None))
        row = {
            "T": case.T,
            "B": case.B,
            "I": case.I,
            "H": case.H,
            "layers": case.layers,
            "directions": case.directions,
            "layout": case.layout,
            "limit": case.limit,
            "dtype": case.dtype,
            "nonlinearity": case.nonlinearity,
            "pass": case.pass_name,
            "peer": name,
            "rounds": len(samples.get(name, [])),
            "saved_bytes": saved,
            "peak_bytes": peak,
            "error": errors.get(name),
            "note": notes.get(name, ""),
        }
        row |= times(samples.get(name), samples.get("rnn_ext"))
        rows.append(row | rates(case, row["median_us"], facts))
    return rows


def run(args: argparse.Namespace, document: dict[str, Any]) -> None:
    """Adds the rows of all cases to the document, and saves it after each; an interrupt ends it early."""
    choices = itertools.product(args.cases, args.dtypes, args.nonlinearities, args.passes)
    cases = [replace(c, dtype=dtype, nonlinearity=f, pass_name=pass_name) for c, dtype, f, pass_name in choices]
    try:
        for case in progress(cases):
            names = [name for name in args.peers if PEERS[name].takes(case)]
            with torch.set_grad_enabled(case.pass_name != "forward"):
                document["rows"] += measure_case(case, names, document["facts"], args)
            results.write(document, args.output / results.SEQUENCES)
        document["complete"] = True
        results.write(document, args.output / results.SEQUENCES)
    except KeyboardInterrupt:
        print("interrupted: this is what was measured")


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """Ours in microseconds, and how many times as long, and as much memory, each peer takes."""
    from rich.table import Table

    peers = [name for name in results.values(rows, "peer") if name != "rnn_ext"]
    result = Table(title=title, title_justify="left", caption_justify="left")
    result.caption = (
        "times as long as rnn_ext; ~: noise (under 6 %, or quartiles on either side of 1); -: not measured\n"
        "geometric means: without the limits; saved, memory: what nn.RNN keeps for its backward, its peak, / rnn_ext's"
    )
    columns = ("rnn_ext µs", "IQR", "µs a step", "GFLOP/s", "peak", *(PEERS[p].label for p in peers))
    for i, column in enumerate(("T, B, I, H", "pass", *columns, "saved", "memory")):
        result.add_column(column, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for ours in [row for row in rows if row["peer"] == "rnn_ext"]:
        found = {row["peer"]: row for row in rows if same_case(row, ours) and row["median_us"] is not None}
        cells = [name_of(ours), ours["pass"]]
        if ours["median_us"] is None:
            result.add_row(*cells, ours["note"])
            continue
        cells += [f"{ours['median_us']:.1f}", f"{ours['q75_us'] - ours['q25_us']:.1f}"]
        cells += [f"{ours['median_us'] / ours['T']:.2f}", f"{ours['gflop_s']:.3g}", f"{ours['peak_share']:.0%}"]
        cells += [results.formatted(found[p]) if p in found else "-" for p in peers]
        theirs = found.get("rnn", {})
        cells += [ratio(theirs.get(name), ours[name]) for name in ("saved_bytes", "peak_bytes")]
        result.add_row(*cells)
    for pass_name in results.values(rows, "pass"):
        chosen = results.select(rows, pass_=pass_name, limit=False)
        means = [results.mean_speedup(results.select(chosen, peer=peer)) for peer in peers]
        result.add_row("geometric mean", pass_name, *[""] * 5, *means, style="bold")
    return result


def same_case(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row[name] == other[name] for name in ("T", "B", "I", "H", "layers", "directions", "layout", "pass"))


def ratio(theirs: int | None, ours: int | None) -> str:
    """Bytes of nn.RNN over ours."""
    return f"{theirs / ours:.2f}" if theirs and ours else "-"


def print_tables(rows: list[dict[str, Any]]) -> None:
    keys = [(r["dtype"], r["nonlinearity"]) for r in rows]
    for dtype, nonlinearity in dict.fromkeys(keys):
        chosen = [row for row, key in zip(rows, keys, strict=True) if key == (dtype, nonlinearity)]
        console().print(table(chosen, f"{dtype}, {nonlinearity}"))
    for peer, note in dict.fromkeys((row["peer"], row["note"]) for row in rows if row["note"]):
        console().print(f"not measured: {peer}: {note}", highlight=False)


def facts_of(args: argparse.Namespace) -> dict[str, Any]:
    """device.probe's, the instruction set that the kernels run in, and the versions of what isn't torch."""
    versions: dict[str, str] = {}
    for name in args.peers:
        versions |= PEERS[name].versions()
    return {
        **probe(torch.device("cpu"), args.dtypes),
        "instruction_set": _C.cpu_capability(),
        "versions": versions,
    }


def main() -> int:
    args = parse_arguments()
    # timeout(1) ends a run like ctrl-C does, also where a parent process had the signals ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep_freed_memory()
    if warning := results.busy():
        print(warning)
    for name in args.peers:
        if not PEERS[name].installed:
            print(f"{PEERS[name].label} takes no part: {', '.join(PEERS[name].modules)} must be installed")
    args.peers = [name for name in args.peers if PEERS[name].installed]
    document = results.new_document(torch.device("cpu"), facts_of(args), lambda: None)
    run(args, document)
    results.write(document, args.output / results.SEQUENCES)
    try:
        print_tables(document["rows"])
    except ModuleNotFoundError as error:
        print(f"no tables: {error}")
    figures = plots.draw_all(document, args.output, results.SEQUENCES)
    print("written:", *(str(path) for path in (args.output / results.SEQUENCES, *figures)))
    wrong = [row for row in document["rows"] if row["note"].startswith("wrong") and row["peer"] == "rnn_ext"]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
