"""rnn_ext.RNNCell, or rnn_ext.RNN over whole sequences, against what else computes them, on the CPU or a CUDA GPU.

    python benchmarks/bench.py --quick
    python benchmarks/bench.py --layer sequence --quick
    python benchmarks/bench.py --shapes 64,256,256 --dtypes bfloat16 --peers rnn_cell compile
    python benchmarks/bench.py --layer sequence --shapes 64,32,64,128 64,32,64,128:packed --peers rnn cells

Every peer runs on the same random data, in alternating rounds, and only after its result was checked against float64.
Those that are not torch take part where they are installed. Writes bench.json, of sequences sequence.json (schema:
results.py), and PNGs (plots.py) to --output; ctrl-C keeps what was measured. On a GPU there are three clocks,
host-inclusive, device with warm L2 and device with cold L2 (results.py says what they are). Of each training step it
also says what is kept for the backward, and the most memory that it takes at once.

TF32 is off for every peer, as it is by default for nn.RNNCell (cuDNN's RNN would use it). On the CPU freed memory stays
with the process (timing.keep_freed_memory), but where memory is counted.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import plots
import results
import torch
from cases import (
    CASES,
    COMPILED,
    DTYPES,
    PASSES,
    QUICK,
    TOLERANCE,
    Case,
    Peer,
    Step,
    error_of,
    make_tensors,
    name_of,
    parse_case,
    reference,
    tolerance,
)
from device import default_device, floor_us, gpu_state, peak_tflop_s, probe
from peers import LAYERS
from timing import (
    device_sampler,
    host_sampler,
    keep_freed_memory,
    kernels_per_call,
    quartiles,
    return_freed_memory,
    sample_in_turns,
)
from torch import Tensor

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Item = TypeVar("Item")

NODES = 40  # calls, at most, in a graph whose replay is timed: its own start becomes a small part of a call
FLUSH_BYTES = 2**30  # read before a cold replay, at least: the host queues the replay in the meantime
COLD_BYTES = 2 * 2**30  # operands of a cold graph's calls together, at most; far more than any L2


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = list(dict.fromkeys(name for layer in LAYERS.values() for name in layer.peers))
    shapes = {"nargs": "+", "metavar": "[T,]B,I,H"}
    kinds = "of sequences T,B,I,H, after it :packed, :lengths, :bidirectional, :two-layers for such a one"
    parser.add_argument("--layer", choices=LAYERS, default="cell")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--quick", action="store_true", help="few shapes, float32 and tanh, a minute or two")
    parser.add_argument("--shapes", **shapes, help=f"of a cell B,I,H; {kinds}")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--nonlinearities", nargs="+", choices=("tanh", "relu"))
    parser.add_argument("--peers", nargs="+", choices=peers, help="rnn_ext is always among them")
    parser.add_argument("--compile-shapes", **shapes | {"nargs": "*"}, help="where torch.compile takes part as well")
    parser.add_argument("--rounds", type=int, default=21, help="alternating samples of each peer, at most (default 21)")
    parser.add_argument("--sample-ms", type=float, default=3.0, help="length of a sample (default 3)")
    parser.add_argument("--seconds", type=float, default=1.5, help="for the rounds of a case, of which there are three "
                        "at least (default 1.5)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="folder (default build/bench)")
    parser.add_argument("--check-only", action="store_true", help="check each peer's results, time nothing")
    args = parser.parse_args(arguments)
    which, layer = (args.layer, args.device), LAYERS[args.layer]

    def cases(texts: list[str] | None, default: list[Case]) -> list[Case]:
        try:
            return default if texts is None else [parse_case(text, args.layer) for text in texts]
        except (KeyError, TypeError, ValueError):
            parser.error(f"a shape of {' '.join(texts or ())} is not {shapes['metavar']}: {kinds}")

    if args.quick:
        args.rounds, args.seconds = min(args.rounds, 7), min(args.seconds, 0.5)
    args.cases = cases(args.shapes, (QUICK if args.quick else CASES)[which])
    args.dtypes = args.dtypes or (["float32"] if args.quick else DTYPES[which])
    both = args.layer == "cell" and args.device == "cpu" and not args.quick
    args.nonlinearities = args.nonlinearities or (["tanh", "relu"] if both else ["tanh"])
    args.compiled = [] if args.quick else COMPILED[which]
    if args.compile_shapes is not None or args.peers:  # peers that were asked for by name run everywhere
        compiled = cases(args.compile_shapes, args.cases)
        args.compiled = [replace(case, dtype=dtype) for case in compiled for dtype in args.dtypes]
    unknown = [name for name in args.peers or () if name not in layer.peers]
    if unknown:
        parser.error(f"--peers: of a {args.layer} there are {', '.join(layer.peers)}, not {', '.join(unknown)}")
    args.peers = list(dict.fromkeys(["rnn_ext", *(args.peers or layer.peers)]))
    args.peers = [name for name in args.peers if layer.peers[name].runs_on(args.device)]
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


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """The most memory that one call, after the first, has at once: by the allocator's count on a GPU, elsewhere by the
    kernel's count of this process's pages; None without one.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.run()
        return torch.cuda.max_memory_allocated() - before
    try:
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


def measure_case(
    case: Case, names: list[str], device: torch.device, facts: dict[str, Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one case: every peer checked, then timed in turns on every clock."""
    layer = LAYERS[case.layer]
    tensors = make_tensors(case, device)
    wanted = reference(case, tensors)
    notes, steps, errors, kernels = {}, {}, {}, {}
    for name in names:
        peer = layer.peers[name]
        try:
            step = peer.build(case, tensors)
            errors[name] = error_of(case, tensors, wanted, step.unpack(step.run()))
            if not errors[name] <= tolerance(case):
                notes[name] = f"wrong result: error {errors[name]:.1e}"
                errors[name] = errors[name] if errors[name] < float("inf") else None  # JSON has no infinity
                continue
            if device.type == "cuda" and peer.compiles and not args.check_only:  # the others': count_kernels
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
        taking_part = [name for name in names if clock == "host" or layer.peers[name].build_device]
        samplers, clock_notes = {}, dict(notes)
        floor = floor_us(case, clock, facts) if facts else 0.0
        for name in taking_part:
            if name in steps:
                try:
                    samplers[name] = make_sampler(
                        case, layer.peers[name], clock, tensors, steps[name], floor, args.sample_ms / 1e3
                    )
                except Exception as error:
                    clock_notes[name] = brief(error)
        samples = sample_in_turns(samplers, args.rounds, args.seconds)
        for name in taking_part:
            row = case.fields() | {
                "peer": name,
                "clock": clock,
                "rounds": len(samples.get(name, [])),
                "kernels": kernels.get(name),
                "floor_us": floor,
                "saved_bytes": None,
                "peak_bytes": None,
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
    measured = [row for row in rows if row["median_us"] is not None]
    for layer, name, pass_name in dict.fromkeys((row["layer"], row["peer"], row["pass"]) for row in measured):
        peer = LAYERS[layer].peers[name]
        if peer.compiles:
            continue
        chosen = results.select(measured, layer=layer, peer=name, pass_=pass_name)
        cases = list(dict.fromkeys(Case.of(row) for row in chosen))

        def run_of(case: Case, build: Callable[..., Step] = peer.build) -> Callable[[], object]:
            return build(case, make_tensors(case, device)).run

        try:
            with torch.set_grad_enabled(pass_name != "forward"):
                counts = dict(zip(cases, kernels_per_call([partial(run_of, case) for case in cases]), strict=True))
        except Exception as error:  # the profiler's own; the times stand without the counts
            print(f"kernels of {name}, {pass_name}, were not counted: {brief(error)}")
            continue
        for row in chosen:
            row["kernels"] = counts[Case.of(row)]


def memory_of(device: torch.device, step_of: tuple[Case, str]) -> tuple[int, int | None]:
    """saved_bytes and peak_bytes of a case's step by a peer."""
    case, name = step_of
    step = LAYERS[case.layer].peers[name].build(case, make_tensors(case, device))
    step.run()
    return saved_bytes(step), peak_bytes(step, device)


def count_memory(rows: list[dict[str, Any]], device: torch.device) -> None:
    """Fills in what a training step takes, where that is compared: on the CPU in a process of its own, as what malloc
    keeps depends on all that was freed before.
    """

    def is_compared(case: Case, name: str) -> bool:
        return name in ("rnn_ext", LAYERS[case.layer].replaced) and case.backward and case.few

    measured = [((Case.of(row), row["peer"]), row) for row in rows if row["median_us"] is not None]
    chosen = [(step, row) for step, row in measured if is_compared(*step)]
    steps = list(dict.fromkeys(step for step, _ in chosen))
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, spawn, initializer=return_freed_memory) as process:
            each = process.map if device.type == "cpu" else map
            counts = dict(zip(steps, each(partial(memory_of, device), steps), strict=True))
    except Exception as error:  # the times stand without the counts
        print(f"memory was not counted: {brief(error)}")
        return
    for step, row in chosen:
        row["saved_bytes"], row["peak_bytes"] = counts[step]


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
    device, layer = torch.device(args.device), LAYERS[args.layer]
    choices = itertools.product(args.cases, args.dtypes, args.nonlinearities, args.passes)
    cases = [replace(c, dtype=dtype, nonlinearity=f, pass_name=pass_name) for c, dtype, f, pass_name in choices]
    cases = [case for case in cases if case.pass_name != "forward_grad" or case.records]
    try:
        for case in progress(cases):
            compiling = replace(case, nonlinearity="tanh", pass_name="forward") in args.compiled
            names = [name for name in args.peers if compiling or not layer.peers[name].compiles]
            names = [name for name in names if layer.peers[name].takes(case)]
            with torch.set_grad_enabled(case.pass_name != "forward"):
                document["rows"] += measure_case(case, names, device, document["facts"], args)
            if compiling:  # Dynamo keeps at most eight versions of a function, then silently runs it uncompiled
                torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the graphs' memory
            if not args.check_only:
                results.write(document, args.output / layer.file)
        document["complete"] = True
        if not args.check_only:
            count_memory(document["rows"], device)
        if device.type == "cuda" and not args.check_only:
            results.write(document, args.output / layer.file)
            count_kernels(document["rows"], device)
    except KeyboardInterrupt:
        print("interrupted: this is what was measured")


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """Ours in microseconds, how many times as long each peer takes, and as much memory what rnn_ext replaces."""
    from rich.table import Table

    layer = LAYERS[rows[0]["layer"]]
    peers = [name for name in results.values(rows, "peer") if name != "rnn_ext"]
    kernels, memory = (any(row[name] is not None for row in rows) for name in ("kernels", "saved_bytes"))
    result = Table(title=title, title_justify="left", caption_justify="left")
    result.caption = "times as long as rnn_ext; ~: noise (under 6 %, or quartiles on either side of 1); -: not measured"
    result.caption += "\ngeometric means: of the group 'shapes'"
    if memory:
        label = layer.peers[layer.replaced].label
        result.caption += f"; saved, memory: what {label} keeps for its backward, its peak, / rnn_ext's"
    numbers = ["rnn_ext µs", "IQR", *["kernels"] * kernels, "/ floor", "GFLOP/s", "peak"]
    columns = [*numbers, *(layer.peers[p].label for p in peers), *["saved", "memory"] * memory]
    for i, column in enumerate((", ".join("TBIH" if layer is LAYERS["sequence"] else "BIH"), "pass", *columns)):
        result.add_column(column, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for ours in [row for row in rows if row["peer"] == "rnn_ext"]:
        found = {row["peer"]: row for row in rows if Case.of(row) == Case.of(ours) and row["median_us"] is not None}
        cells = [name_of(ours), ours["pass"]]
        if ours["median_us"] is None:
            result.add_row(*cells, ours["note"])
            continue
        cells += [f"{ours['median_us']:.1f}", f"{ours['q75_us'] - ours['q25_us']:.1f}"]
        cells += ["-" if ours["kernels"] is None else f"{ours['kernels']:g}"] * kernels
        cells += [f"{ours['floor_ratio']:.1f}", f"{ours['gflop_s']:.3g}", f"{ours['peak_share']:.0%}"]
        cells += [results.formatted(found[p]) if p in found else "-" for p in peers]
        theirs = found.get(layer.replaced, {})
        cells += [ratio(theirs.get(name), ours[name]) for name in ("saved_bytes", "peak_bytes")] * memory
        result.add_row(*cells)
    for name in results.values(rows, "pass"):
        if chosen := results.select(rows, pass_=name, group="shapes"):
            means = [results.mean_speedup(results.select(chosen, peer=peer)) for peer in peers]
            result.add_row("geometric mean", name, *[""] * len(numbers), *means, style="bold")
    return result


def ratio(theirs: int | None, ours: int | None) -> str:
    return f"{theirs / ours:.2f}" if theirs and ours else "-"


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
    return found if found.is_terminal else Console(width=230)


def main() -> int:
    args = parse_arguments()
    layer = LAYERS[args.layer]
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
    for name in args.peers:
        if missing := layer.peers[name].missing:
            print(f"{layer.peers[name].label} takes no part: {', '.join(missing)} must be installed")
    args.peers = [name for name in args.peers if not layer.peers[name].missing]
    facts = {} if args.check_only else probe(device, args.dtypes) | {"versions": versions(layer.peers, args.peers)}
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
    results.write(document, args.output / layer.file)
    try:
        print_tables(document["rows"], console())
    except ModuleNotFoundError as error:
        print(f"no tables: {error}; benchmarks/report.py --summary prints means")
    figures = plots.draw_all(document, args.output)
    print("written:", *(str(path) for path in (args.output / layer.file, *figures)))
    wrong = [row for row in document["rows"] if row["note"].startswith("wrong") and row["peer"] == "rnn_ext"]
    return 1 if wrong else 0


def versions(peers: dict[str, Peer], names: list[str]) -> dict[str, str]:
    """Of the peers that aren't torch."""
    found: dict[str, str] = {}
    for name in names:
        found |= peers[name].versions()
    return found


if __name__ == "__main__":
    raise SystemExit(main())
