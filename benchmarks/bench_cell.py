"""rnn_ext.RNNCell against what else computes the cell, on the CPU or a CUDA GPU.

    python benchmarks/bench_cell.py --quick
    python benchmarks/bench_cell.py --shapes 64,256,256 --dtypes bfloat16 --peers rnn_ext rnn_cell compile

Every peer runs on the same random data, in alternating rounds, and only after its result was checked against float64.
Writes bench.json (schema: results.py) and PNGs (plots.py) to --output; ctrl-C keeps what was measured. On a GPU there
are three clocks, host-inclusive, device with warm L2 and device with cold L2 (results.py says what they are).

TF32 is off for every peer, as it is by default for nn.RNNCell (cuDNN's RNN would use it). On the CPU freed memory stays
with the process (timing.keep_freed_memory).
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import plots
import results
import torch
from device import default_device, floor_us, gpu_state, peak_tflop_s, probe
from peers import PASSES, PEERS, TOLERANCE, Case, Peer, Step, error_of, forget_compiled, make_tensors
from timing import device_sampler, host_sampler, keep_freed_memory, kernels_per_call, quartiles, sample_in_turns
from torch import Tensor

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Item = TypeVar("Item")

SHAPES = {  # (B, I, H)
    "cpu": [
        (1, 8, 16), (10, 4, 5), (1, 64, 64), (4, 100, 100), (33, 77, 130), (32, 128, 128),
        (1, 256, 256), (8, 256, 256), (64, 256, 256), (256, 256, 256), (64, 512, 512), (256, 1024, 1024),
    ],
    "cuda": [
        (10, 4, 5), (33, 77, 130),
        *((B, H, H) for H in (256, 1024, 4096) for B in (1, 16, 64, 256, 1024, 4096)),
    ],
}  # fmt: skip
QUICK_SHAPES = {
    "cpu": [(10, 4, 5), (1, 64, 64), (64, 64, 64), (1, 256, 256), (64, 256, 256)],
    "cuda": [(10, 4, 5), (1, 256, 256), (64, 256, 256), (64, 1024, 1024), (1024, 1024, 1024)],
}
DTYPES = {"cpu": ["float32", "float64", "bfloat16"], "cuda": ["float32", "bfloat16"]}
COMPILE_SHAPES = {"cpu": [], "cuda": [(64, 1024, 1024)]}  # compiling takes up to a minute a case
NODES = 40  # calls, at most, in a graph whose replay is timed: its own start becomes a small part of a call
FLUSH_BYTES = 2**30  # read before a cold replay, at least: the host queues the replay in the meantime
COLD_BYTES = 2 * 2**30  # operands of a cold graph's calls together, at most; far more than any L2


def shape(text: str) -> tuple[int, int, int]:
    try:
        B, I, H = (int(size) for size in text.split(","))  # noqa: E741
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,I,H") from None
    return B, I, H


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--quick", action="store_true", help="few shapes, float32 and tanh, under a minute")
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="B,I,H")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--nonlinearities", nargs="+", choices=("tanh", "relu"))
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="rnn_ext is always among them")
    parser.add_argument(
        "--compile-shapes", type=shape, nargs="*", metavar="B,I,H", help="where torch.compile takes part as well"
    )
    parser.add_argument("--rounds", type=int, default=11, help="alternating samples of each peer (default 11)")
    parser.add_argument("--sample-ms", type=float, default=3.0, help="length of a sample (default 3)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="folder (default build/bench)")
    parser.add_argument("--check-only", action="store_true", help="check each peer's results, time nothing")
    args = parser.parse_args(arguments)
    device = args.device
    if args.quick:
        args.rounds = min(args.rounds, 7)
    args.shapes = args.shapes or (QUICK_SHAPES if args.quick else SHAPES)[device]
    args.dtypes = args.dtypes or (["float32"] if args.quick else DTYPES[device])
    args.nonlinearities = args.nonlinearities or (["tanh"] if args.quick or device == "cuda" else ["tanh", "relu"])
    if args.compile_shapes is None:  # peers that were asked for by name run everywhere
        args.compile_shapes = args.shapes if args.peers else [] if args.quick else COMPILE_SHAPES[device]
    args.peers = list(dict.fromkeys(["rnn_ext", *(args.peers or PEERS)]))
    args.peers = [name for name in args.peers if device == "cuda" or not PEERS[name].cuda_only]
    return args


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def make_sampler(
    case: Case, peer: Peer, clock: str, tensors: dict[str, Tensor], step: Step, floor: float, seconds: float
) -> Callable[[], float]:
    """Takes samples, of about `seconds` each, of one peer on one clock."""
    if clock == "host":
        return host_sampler(step.run, seconds)
    nodes = min(NODES, max(2, round(seconds * 1e6 / floor)))  # a long call needs no company
    if clock == "warm":
        return device_sampler([peer.build_device(case, tensors).run] * nodes, seconds)
    device = tensors["x"].device
    copies = max(2, min(nodes, COLD_BYTES // max(case.bytes, 1)))
    runs = [peer.build_device(case, make_tensors(case, device, seed)).run for seed in range(copies)]
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.ones(max(2 * l2, FLUSH_BYTES) // 4, device=device)
    return device_sampler([runs[i % copies] for i in range(nodes)], seconds, flush)


def measure_case(
    case: Case, names: list[str], device: torch.device, facts: dict[str, Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one case: every peer checked, then timed in turns on every clock."""
    tensors = make_tensors(case, device)
    notes, steps, errors, kernels = {}, {}, {}, {}
    for name in names:
        try:
            step = PEERS[name].build(case, tensors)
            errors[name] = error_of(case, tensors, step.unpack(step.run()))
            if not errors[name] <= TOLERANCE[case.dtype]:
                notes[name] = f"wrong result: error {errors[name]:.1e}"
                errors[name] = errors[name] if errors[name] < float("inf") else None  # JSON has no infinity
                continue
            if device.type == "cuda" and PEERS[name].compiles and not args.check_only:  # the others': count_kernels
                (kernels[name],) = kernels_per_call([lambda run=step.run: run])
            steps[name] = step
        except Exception as error:  # a peer that cannot take the case stands in the results with its reason
            notes[name] = brief(error)

    clocks = ["host"]
    if device.type == "cuda" and case.pass_name != "forward_grad":  # the device does there what it does in forward
        clocks += ["warm", "cold"]
    if args.check_only:
        clocks = clocks[:1]
        notes |= dict.fromkeys(steps, "checked only")
        steps = {}

    rows = []
    for clock in clocks:
        taking_part = [name for name in names if clock == "host" or PEERS[name].build_device]
        samplers, clock_notes = {}, dict(notes)
        floor = floor_us(case, clock, facts) if facts else 0.0
        for name in taking_part:
            if name in steps:
                try:
                    samplers[name] = make_sampler(
                        case, PEERS[name], clock, tensors, steps[name], floor, args.sample_ms / 1e3
                    )
                except Exception as error:
                    clock_notes[name] = brief(error)
        samples = sample_in_turns(samplers, args.rounds)
        for name in taking_part:
            row = {
                "B": case.B,
                "I": case.I,
                "H": case.H,
                "dtype": case.dtype,
                "nonlinearity": case.nonlinearity,
                "pass": case.pass_name,
                "peer": name,
                "clock": clock,
                "rounds": len(samples.get(name, [])),
                "kernels": kernels.get(name),
                "floor_us": floor,
                "error": errors.get(name),
                "note": clock_notes.get(name, ""),
            }
            row |= times(samples.get(name), samples.get("rnn_ext"))
            row["floor_ratio"] = row["median_us"] and row["median_us"] / floor
            rows.append(row | rates(case, row["median_us"], facts))
    return rows


def times(samples: list[float] | None, ours: list[float] | None) -> dict[str, float | None]:
    """A row's times and speed-ups from the rounds' samples."""
    names = ("q25_us", "median_us", "q75_us", "speedup_q25", "speedup", "speedup_q75")
    if not samples:
        return dict.fromkeys(names)
    found: list[float | None] = [value * 1e6 for value in quartiles(samples)]
    found += quartiles(a / b for a, b in zip(samples, ours, strict=True)) if ours else (None, None, None)
    return dict(zip(names, found, strict=True))


def rates(case: Case, median_us: float | None, facts: dict[str, Any]) -> dict[str, float | None]:
    """A row's FLOP a second, and their share of the measured peak."""
    if not median_us:
        return {"gflop_s": None, "peak_share": None}
    gflop_s = case.flop / median_us / 1e3
    return {"gflop_s": gflop_s, "peak_share": gflop_s / (peak_tflop_s(case.dtype, facts) * 1e3)}


def count_kernels(rows: list[dict[str, Any]], device: torch.device) -> None:
    """Fills in what was launched a call, in one session of the profiler a peer and pass."""
    fields = ("B", "I", "H", "dtype", "nonlinearity", "pass")
    measured = [row for row in rows if row["median_us"] is not None and not PEERS[row["peer"]].compiles]
    for peer, pass_name in dict.fromkeys((row["peer"], row["pass"]) for row in measured):
        chosen = results.select(measured, peer=peer, pass_=pass_name)
        cases = list(dict.fromkeys(Case(*(row[name] for name in fields)) for row in chosen))

        def run_of(case: Case, build: Callable[..., Step] = PEERS[peer].build) -> Callable[[], object]:
            return build(case, make_tensors(case, device)).run

        try:
            with torch.set_grad_enabled(pass_name != "forward"):
                counts = dict(zip(cases, kernels_per_call([partial(run_of, case) for case in cases]), strict=True))
        except Exception as error:  # the profiler's own; the times stand without the counts
            print(f"kernels of {peer}, {pass_name}, were not counted: {brief(error)}")
            continue
        for row in chosen:
            row["kernels"] = counts[Case(*(row[name] for name in fields))]


def progress(items: Sequence[Item], unit: str = "case", doing: Callable[[Item], str] = str) -> Iterator[Item]:
    """The items, with a bar on a terminal, a line every ten seconds in a log; `doing` says what is at hand."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    bar = tqdm and tqdm(items, unit=unit, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10)
    for item in bar or items:
        if bar:
            bar.set_postfix_str(doing(item), refresh=False)
        yield item


def run(args: argparse.Namespace, document: dict[str, Any]) -> None:
    """Adds the rows of all cases to the document, and saves it after each; an interrupt ends it early."""
    device = torch.device(args.device)
    choices = itertools.product(args.shapes, args.dtypes, args.nonlinearities, args.passes)
    cases = [Case(*sizes, dtype, f, pass_name) for sizes, dtype, f, pass_name in choices]
    try:
        for case in progress(cases):
            compiling = (case.B, case.I, case.H) in args.compile_shapes
            names = [name for name in args.peers if compiling or not PEERS[name].compiles]
            with torch.set_grad_enabled(case.pass_name != "forward"):
                document["rows"] += measure_case(case, names, device, document["facts"], args)
            if compiling:
                forget_compiled()
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the graphs' memory
            if not args.check_only:
                results.write(document, args.output / results.CELLS)
        document["complete"] = True
        if device.type == "cuda" and not args.check_only:
            results.write(document, args.output / results.CELLS)
            count_kernels(document["rows"], device)
    except KeyboardInterrupt:
        print("interrupted: this is what was measured")


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """Ours in microseconds, and how many times as long each peer takes."""
    from rich.table import Table

    peers = [name for name in results.values(rows, "peer") if name != "rnn_ext"]
    result = Table(title=title, title_justify="left", caption_justify="left")
    result.caption = "times as long as rnn_ext; ~: noise (under 6 %, or quartiles on either side of 1); -: not measured"
    for column in (
        "B, I, H",
        "pass",
        "rnn_ext µs",
        "IQR",
        "kernels",
        "/ floor",
        "GFLOP/s",
        "peak",
        *(PEERS[p].label for p in peers),
    ):
        result.add_column(column, justify="left" if column in ("B, I, H", "pass") else "right")
    for ours in [row for row in rows if row["peer"] == "rnn_ext"]:
        key = {name: ours[name] for name in ("B", "I", "H")}
        found = {row["peer"]: row for row in results.select(rows, **key, pass_=ours["pass"])}
        cells = [f"{ours['B']}, {ours['I']}, {ours['H']}", ours["pass"]]
        if ours["median_us"] is None:
            result.add_row(*cells, ours["note"])
            continue
        cells += [f"{ours['median_us']:.1f}", f"{ours['q75_us'] - ours['q25_us']:.1f}"]
        cells += ["-" if ours["kernels"] is None else f"{ours['kernels']:g}", f"{ours['floor_ratio']:.1f}"]
        cells += [f"{ours['gflop_s']:.3g}", f"{ours['peak_share']:.0%}"]
        result.add_row(*cells, *(results.formatted(found[p]) if p in found else "-" for p in peers))
    for name in results.values(rows, "pass"):
        means = [results.mean_speedup(results.select(rows, peer=peer, pass_=name)) for peer in peers]
        result.add_row("geometric mean", name, *[""] * 6, *means, style="bold")
    return result


def print_tables(rows: list[dict[str, Any]], console: Console) -> None:
    keys = [(r["dtype"], r["nonlinearity"], r["clock"]) for r in rows]
    for dtype, nonlinearity, clock in dict.fromkeys(keys):
        chosen = [row for row, key in zip(rows, keys, strict=True) if key == (dtype, nonlinearity, clock)]
        console.print(table(chosen, f"{dtype}, {nonlinearity}, {clock} time"))
    for peer, note in dict.fromkeys((row["peer"], row["note"]) for row in rows if row["note"]):
        console.print(f"not measured: {peer}: {note}", highlight=False)


def console() -> Console:
    """As wide as the terminal, and wide enough for the tables where there is none."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=170)


def main() -> int:
    args = parse_arguments()
    # timeout(1) ends a run like ctrl-C does, also where a parent process had the signals ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    else:
        keep_freed_memory()
    if warning := results.busy():
        print(warning)
    facts = {} if args.check_only else probe(device, args.dtypes)
    document = results.new_document(device, facts, gpu_state)
    run(args, document)
    if args.check_only:
        failed = [row for row in document["rows"] if row["note"] != "checked only"]
        for row in failed:
            print(row)
        print(f"{len(document['rows']) - len(failed)} of {len(document['rows'])} checks passed")
        return 1 if failed or not document["complete"] else 0
    if device.type == "cuda":
        document["gpu_state"]["after"] = gpu_state()
    results.write(document, args.output / results.CELLS)
    try:
        print_tables(document["rows"], console())
    except ModuleNotFoundError as error:
        print(f"no tables: {error}; benchmarks/report.py --summary prints means")
    figures = plots.draw_all(document, args.output)
    print("written:", *(str(path) for path in (args.output / results.CELLS, *figures)))
    wrong = [row for row in document["rows"] if row["note"].startswith("wrong") and row["peer"] == "rnn_ext"]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
