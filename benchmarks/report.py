"""What is said of performance, from the result files alone.

python benchmarks/report.py            writes README.md between the markers, benchmarks/results/README.md, and the
                                       figures beside each bench.json and sequence.json
python benchmarks/report.py --check    says whether these agree with the files, and whether another page states a
                                       figure of its own; changes nothing
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import plots
import results
import sequence_peers
from peers import PEERS
from PIL import Image

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
PAGE = "benchmarks/results/README.md"
PASS_NAMES = {
    "forward": "forward, no gradient wanted",
    "forward_grad": "forward that records for backward",
    "forward_backward": "forward and backward",
}
# A time, a rate or a ratio. They stand in generated text alone: typed ones would outlive what they were measured on.
FIGURE = re.compile(r"\d[\d.]*\s*(?:[µnm]s\b|us\b|%|×|[TGM]?FLOP/s|[GM]B/s|times (?:as )?(?:fast|slow)\w*)")
SEQUENCE_PASS_NAMES = {
    "forward": "a whole sequence, `nn.RNN` against `RNN`: forward",
    "forward_backward": "a whole sequence: forward and backward",
}
CLOCKS = {"host": "host-inclusive", "warm": "device, warm L2", "cold": "device, cold L2"}


def markdown_table(header: list[str], lines: list[list[str]], left: int) -> list[str]:
    """`left` columns of text, then columns of numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)]


def summary_table(rows: list[dict[str, Any]]) -> list[str]:
    """Geometric means over shapes, against every peer."""
    peers = [name for name in PEERS if name != "rnn_ext" and results.select(rows, peer=name)]
    lines = []
    for clock in CLOCKS:
        for dtype in results.values(rows, "dtype"):
            for pass_name in results.values(rows, "pass"):
                cells = [results.select(rows, clock=clock, dtype=dtype, pass_=pass_name, peer=peer) for peer in peers]
                if any(cells):
                    lines.append([CLOCKS[clock], dtype, pass_name, *(results.mean_speedup(cell) for cell in cells)])
    return markdown_table(["time", "dtype", "pass", *(PEERS[peer].label for peer in peers)], lines, 3)


def shape_table(rows: list[dict[str, Any]], dtype: str, clock: str) -> list[str]:
    """Each shape: microseconds, the ratio to the floor, and nn.RNNCell's time beside them."""
    lines = []
    chosen = results.select(rows, dtype=dtype, clock=clock, nonlinearity="tanh")
    for ours in results.select(chosen, peer="rnn_ext"):
        if ours["pass"] == "forward_grad":
            continue
        same = {name: ours[name] for name in ("B", "I", "H")}
        theirs = results.select(chosen, **same, pass_=ours["pass"], peer="rnn_cell")
        if not theirs:
            continue
        lines.append(
            [
                f"{ours['B']}, {ours['I']}, {ours['H']}",
                ours["pass"],
                f"{ours['median_us']:.1f}",
                f"{ours['q75_us'] - ours['q25_us']:.1f}",
                f"{theirs[0]['median_us']:.1f}",
                results.formatted(theirs[0]),
                f"{ours['floor_ratio']:.1f}",
                f"{ours['gflop_s']:.3g}",
                f"{ours['peak_share']:.0%}",
            ]
        )
    return markdown_table(
        ["B, I, H", "pass", "rnn_ext µs", "IQR", "nn.RNNCell µs", "speed-up", "/ floor", "GFLOP/s", "of peak"], lines, 2
    )


def title(document: dict[str, Any]) -> str:
    return document["gpu"] or f"{document['cpu']}, {document['threads']} threads"


def sequences_beside(path: Path) -> dict[str, Any] | None:
    """What was measured of sequences on the same device."""
    return next((results.read(file) for file in measured(path)[1:]), None)


def overview(document: dict[str, Any], sequences: dict[str, Any] | None, folder: str) -> list[str]:
    """One device's part of the README: a row a pass and a figure, which lies in `folder`."""
    clock = plots.main_clock(document)
    ours = results.select(document["rows"], peer="rnn_cell", clock=clock)
    dtypes = results.values(ours, "dtype")
    lines = [
        [name, *(results.mean_speedup(results.select(ours, dtype=dtype, pass_=key)) for dtype in dtypes)]
        for key, name in PASS_NAMES.items()
    ]
    if sequences:
        rows = results.select(sequences["rows"], peer="rnn", limit=False)
        lines += [
            [name, *(results.mean_speedup(results.select(rows, dtype=dtype, pass_=key)) for dtype in dtypes)]
            for key, name in SEQUENCE_PASS_NAMES.items()
        ]
    heading = f"{title(document)}, torch {document['torch']}, {CLOCKS[clock]}"
    figures = [f"![time of nn.RNNCell / time of rnn_ext, by shape]({folder}/speedup.png)"]
    if sequences:
        figures.append(f"![time of nn.RNN / time of rnn_ext, by shape]({folder}/sequence.png)")
    return [*markdown_table([heading, *dtypes], lines, 1), "", *figures, ""]


def software(document: dict[str, Any]) -> str:
    """The versions, the date, the commit and the command of a run."""
    found = [f"torch {document['torch']}", f"Python {document['python']}"]
    if document["gpu"]:
        found += [f"CUDA {document['cuda']}", f"driver {document['driver']}"]
    found += [f"{name} {version}" for name, version in document["facts"].get("versions", {}).items()]
    return (
        f"{', '.join(found)}; {document['date'][:10]}, commit {document['commit']}, csrc/ tree "
        f"{document['csrc_tree'][:12]}, load average {document['load']:.1f} before the run: `{document['command']}`"
    )


def sequence_summary(rows: list[dict[str, Any]]) -> list[str]:
    """Geometric means over the cases that are no limits, against every peer."""
    rows = [row for row in rows if not row["limit"]]
    peers = [name for name in sequence_peers.PEERS if name != "rnn_ext" and results.select(rows, peer=name)]
    lines = []
    for dtype in results.values(rows, "dtype"):
        for pass_name in results.values(rows, "pass"):
            cells = [results.select(rows, dtype=dtype, pass_=pass_name, peer=peer) for peer in peers]
            lines.append([dtype, pass_name, *(results.mean_speedup(cell) for cell in cells)])
    return markdown_table(["dtype", "pass", *(sequence_peers.PEERS[peer].label for peer in peers)], lines, 2)


def sequence_table(rows: list[dict[str, Any]], dtype: str) -> list[str]:
    """Each case: microseconds, nn.RNN's beside them with the quartiles of the ratio, and the other peers' ratios."""
    rows = [row for row in rows if row["dtype"] == dtype and row["nonlinearity"] == "tanh"]
    others = [name for name in results.values(rows, "peer") if name not in ("rnn_ext", "rnn")]
    others = [name for name in others if results.select(rows, peer=name)]
    lines = []
    for case in results.values([{**row, "case": case_of(row)} for row in rows], "case"):
        found = {row["peer"]: row for row in results.select(rows) if case_of(row) == case}
        if not {"rnn_ext", "rnn"} <= found.keys():
            continue
        ours, theirs = found["rnn_ext"], found["rnn"]
        lines.append(
            [
                sequence_peers.name_of(ours),
                ours["pass"],
                f"{ours['median_us']:.1f}",
                f"{ours['median_us'] / ours['T']:.2f}",
                f"{theirs['median_us']:.1f}",
                results.formatted(theirs),
                f"{theirs['speedup_q25']:.2f} to {theirs['speedup_q75']:.2f}",
                f"{ours['peak_share']:.0%}",
                *(results.formatted(found[name]) if name in found else "" for name in others),
            ]
        )
    labels = [sequence_peers.PEERS[name].label for name in others]
    header = ["T, B, I, H", "pass", "rnn_ext µs", "a step", "nn.RNN µs", "speed-up", "quartiles", "of peak", *labels]
    return markdown_table(header, lines, 2)


def case_of(row: dict[str, Any]) -> str:
    return f"{sequence_peers.name_of(row)} {row['pass']}"


def memory_table(rows: list[dict[str, Any]]) -> list[str]:
    """What a training step keeps for its backward, and its peak, next to nn.RNN's."""
    lines = []
    for ours in results.select(rows, peer="rnn_ext", pass_="forward_backward", nonlinearity="tanh"):
        for theirs in results.select(rows, peer="rnn", pass_="forward_backward", nonlinearity="tanh"):
            if case_of(theirs) == case_of(ours) and theirs["dtype"] == ours["dtype"]:
                kept = [
                    "" if (size := row["saved_bytes"]) is None else f"{size / 1024:.1f} KiB" for row in (ours, theirs)
                ]
                peaks = [peak_memory(row["peak_bytes"]) for row in (ours, theirs)]
                lines.append([sequence_peers.name_of(ours), ours["dtype"], *kept, *peaks])
    header = ["T, B, I, H", "dtype", "kept, rnn_ext", "kept, nn.RNN", "peak, rnn_ext", "peak, nn.RNN"]
    return markdown_table(header, lines, 2)


def peak_memory(size: int | None) -> str:
    """Pages are counted, and the system's own come and go: less than 64 of them say nothing."""
    if size is None:
        return ""
    return f"{size / 2**20:.2f} MiB" if size >= 2**18 else "under 0.25 MiB"


def sequence_section(document: dict[str, Any], folder: str) -> list[str]:
    """One device's whole sequences; `folder` is where the figure lies."""
    rows, facts = document["rows"], document["facts"]
    layouts = ", ".join(f"{name}: {meaning}" for name, meaning in sequence_peers.LAYOUTS.items() if name != "padded")
    lines = [f"### Whole sequences on {title(document)}", ""]
    if not document["complete"]:
        lines += ["The run was interrupted; this is what it had measured.", ""]
    lines += [
        software(document),
        "",
        f"Kernels for {facts['instruction_set']}. Geometric means over the shapes that are no limits of each peer's",
        "time / that of `rnn_ext.RNN`:",
        "",
        *sequence_summary(rows),
        "",
        f"By shape; {layouts}. *Every step* computes the padding too.",
        "",
    ]
    for dtype in results.values(rows, "dtype"):
        lines += [f"<details><summary>{dtype}, tanh, by shape</summary>", "", *sequence_table(rows, dtype)]
        lines += ["", "</details>", ""]
    if any(row["peak_bytes"] is not None or row["saved_bytes"] is not None for row in rows):
        lines += [
            "<details><summary>memory of a training step</summary>",
            "",
            "Kept for the backward besides input, hx and parameters; and the most that a step takes at once, its",
            "results included.",
            "",
            *memory_table(rows),
            "",
            "</details>",
            "",
        ]
    return lines + [f"![{Path(name).stem}]({folder}/{name})" for name in plots.FIGURES[results.SEQUENCES]] + [""]


def section(document: dict[str, Any], folder: str) -> list[str]:
    """One device's part of the page; `folder` is where its figures lie, seen from there."""
    rows, facts = document["rows"], document["facts"]
    peaks = ", ".join(f"{dtype} {value:.3g} TFLOP/s" for dtype, value in facts["gemm_tflop_s"].items())
    start = f"launch {facts['launch_us']:.2f} µs, autograd {facts['autograd_us']:.1f} µs"
    if facts["node_us"]:
        start += f", graph node {facts['node_us']:.2f} µs"
    lines = [f"## {title(document)}", ""]
    if not document["complete"]:
        lines += ["The run was interrupted; this is what it had measured.", ""]
    lines += [
        software(document),
        "",
        f"Measured ceilings: {peaks}, copy {facts['copy_gb_s']:.0f} GB/s, in cache {facts['cache_gb_s']:.0f} GB/s, "
        f"{start}.",
        "",
        "Geometric means over shapes of each peer's time / rnn_ext's:",
        "",
        *summary_table(rows),
        "",
    ]
    clock = plots.main_clock(document)
    for dtype in results.values(rows, "dtype"):
        table = shape_table(rows, dtype, clock)
        lines += [f"<details><summary>{dtype}, tanh, {CLOCKS[clock]}, by shape</summary>", "", *table, "", "</details>"]
        lines.append("")
    return lines + [f"![{Path(name).stem}]({folder}/{name})" for name in plots.FIGURES[results.CELLS]] + [""]


def summary(files: list[Path], root: Path) -> str:
    """What stands between the README's markers."""
    meaning = [
        "Time of `nn.RNNCell` divided by rnn_ext's in the same run, geometric means over shapes and nonlinearities;",
        "above 1 rnn_ext is faster.",
    ]
    if any(len(measured(path)) > 1 for path in files):
        meaning[1] = "above 1 rnn_ext is faster. Of whole sequences the same against `nn.RNN`, tanh alone."
    lines = [
        "",
        *meaning,
        "",
    ]
    for path in files:
        lines += overview(results.read(path), sequences_beside(path), path.parent.relative_to(root).as_posix())
    if not files:
        lines += ["Nothing has been measured yet.", ""]
    return "\n".join(lines)


def page(files: list[Path], root: Path) -> str:
    """All of benchmarks/results/README.md."""
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/report.py` from the `bench.json` and `sequence.json` files beside it. A",
        "speed-up is another implementation's time divided by rnn_ext's in the same run, median over alternating",
        f"rounds; above 1 rnn_ext is faster. `~` marks noise: a difference under {results.NOISE:.0%}, or quartiles on",
        "either side of 1. The floor is the time that the device's measured ceilings allow; on the host's clock it",
        "contains what PyTorch takes for a small operation, and with a backward for one that has six leaves, like the",
        "cell (`autograd`).",
        "",
    ]
    for path in files:
        folder = path.parent.relative_to((root / PAGE).parent).as_posix()
        lines += section(results.read(path), folder)
        if sequences := sequences_beside(path):
            lines += sequence_section(sequences, folder)
    if not files:
        lines += ["Nothing has been measured yet.", ""]
    return "\n".join(lines)


def split(readme: str) -> tuple[str, str, str]:
    """README.md before, between and after the markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        sys.exit(f"README.md must hold the line {BEGIN} once and, after it, the line {END} once")
    before, rest = readme.split(BEGIN)
    between, after = rest.split(END)
    return before, between, after


def figure_source(path: Path) -> str | None:
    """The hash of the document that a figure was drawn from."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get("Source")


def typed_figures(root: Path) -> list[str]:
    """Figures outside the generated text, as PATH: FIGURE."""
    before, _, after = split((root / "README.md").read_text())
    texts = {"README.md": before + after}
    for path in [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("benchmarks/README.md")]:
        texts.setdefault(path.relative_to(root).as_posix(), path.read_text())
    return [f"{name}: {found.group()}" for name, text in texts.items() for found in FIGURE.finditer(text)]


def measured(path: Path) -> list[Path]:
    """A device's result files: of the cell, and of sequences where they were measured."""
    return [file for file in (path, path.with_name(results.SEQUENCES)) if file.is_file()]


def disagreements(files: list[Path], root: Path) -> list[str]:
    """What in the pages and the figures isn't as the files say."""
    found = []
    if split((root / "README.md").read_text())[1] != summary(files, root):
        found.append("README.md: the table of speed-ups")
    if not (root / PAGE).is_file() or (root / PAGE).read_text() != page(files, root):
        found.append(PAGE)
    for path in files:
        for file in measured(path):
            wanted = plots.source(results.read(file))
            found += [
                str((path.parent / name).relative_to(root))
                for name in plots.FIGURES[file.name]
                if figure_source(path.parent / name) != wanted
            ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where something disagrees")
    parser.add_argument("--summary", type=Path, metavar="JSON", help="print one file's means, nothing else")
    parser.add_argument("--root", type=Path, default=results.REPOSITORY, help="the repository")
    args = parser.parse_args()
    if args.summary:
        rows = results.read(args.summary)["rows"]
        print("\n".join((sequence_summary if args.summary.name == results.SEQUENCES else summary_table)(rows)))
        return 0
    root = args.root.resolve()
    files = sorted((root / "benchmarks" / "results").glob("**/bench.json"))
    if args.check:
        found, typed = disagreements(files, root), typed_figures(root)
        for name in found:
            print(f"{name} disagrees with benchmarks/results/: run python benchmarks/report.py")
        for figure in typed:
            print(f"{figure!r} is typed: figures are read from benchmarks/results/")
        return 1 if found or typed else 0
    before, _, after = split((root / "README.md").read_text())
    (root / "README.md").write_text(before + BEGIN + summary(files, root) + END + after)
    (root / PAGE).write_text(page(files, root))
    every = [file for path in files for file in measured(path)]
    for file in every:
        plots.draw_all(results.read(file), file.parent, file.name)
    print(f"README.md, {PAGE} and the figures were written from {len(every)} result files")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
