"""What is said of performance, from the result files alone.

python benchmarks/report.py            writes README.md between the markers, benchmarks/results/README.md, and the
                                       figures beside each bench.json
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


def overview(document: dict[str, Any], folder: str) -> list[str]:
    """One device's part of the README: three rows and a figure, which lies in `folder`."""
    clock = plots.main_clock(document)
    ours = results.select(document["rows"], peer="rnn_cell", clock=clock)
    dtypes = results.values(ours, "dtype")
    lines = [
        [name, *(results.mean_speedup(results.select(ours, dtype=dtype, pass_=key)) for dtype in dtypes)]
        for key, name in PASS_NAMES.items()
    ]
    heading = f"{title(document)}, torch {document['torch']}, {CLOCKS[clock]}"
    return [
        *markdown_table([heading, *dtypes], lines, 1),
        "",
        f"![time of nn.RNNCell / time of rnn_ext, by shape]({folder}/speedup.png)",
        "",
    ]


def section(document: dict[str, Any], folder: str) -> list[str]:
    """One device's part of the page; `folder` is where its figures lie, seen from there."""
    rows, facts = document["rows"], document["facts"]
    software = [f"torch {document['torch']}", f"Python {document['python']}"]
    if document["gpu"]:
        software += [f"CUDA {document['cuda']}", f"driver {document['driver']}"]
    peaks = ", ".join(f"{dtype} {value:.3g} TFLOP/s" for dtype, value in facts["gemm_tflop_s"].items())
    start = f"launch {facts['launch_us']:.2f} µs, autograd {facts['autograd_us']:.1f} µs"
    if facts["node_us"]:
        start += f", graph node {facts['node_us']:.2f} µs"
    lines = [f"## {title(document)}", ""]
    if not document["complete"]:
        lines += ["The run was interrupted; this is what it had measured.", ""]
    lines += [
        f"{', '.join(software)}; {document['date'][:10]}, commit {document['commit']}, csrc/ tree "
        f"{document['csrc_tree'][:12]}, load average {document['load']:.1f} before the run: `{document['command']}`",
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
    return lines + [f"![{Path(name).stem}]({folder}/{name})" for name in plots.FIGURES] + [""]


def summary(files: list[Path], root: Path) -> str:
    """What stands between the README's markers."""
    lines = [
        "",
        "Time of `nn.RNNCell` divided by rnn_ext's in the same run, geometric means over shapes and nonlinearities;",
        "above 1 rnn_ext is faster.",
        "",
    ]
    for path in files:
        lines += overview(results.read(path), path.parent.relative_to(root).as_posix())
    if not files:
        lines += ["Nothing has been measured yet.", ""]
    return "\n".join(lines)


def page(files: list[Path], root: Path) -> str:
    """All of benchmarks/results/README.md."""
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/report.py` from the `bench.json` files beside it. A speed-up is another",
        "implementation's time divided by rnn_ext's in the same run, median over alternating rounds; above 1 rnn_ext",
        f"is faster. `~` marks noise: a difference under {results.NOISE:.0%}, or quartiles on either side of 1. The",
        "floor is the time that the device's measured ceilings allow; on the host's clock it contains what PyTorch",
        "takes for a small operation, and with a backward for one that has six leaves, like the cell (`autograd`).",
        "",
    ]
    for path in files:
        lines += section(results.read(path), path.parent.relative_to((root / PAGE).parent).as_posix())
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


def disagreements(files: list[Path], root: Path) -> list[str]:
    """What in the pages and the figures isn't as the files say."""
    found = []
    if split((root / "README.md").read_text())[1] != summary(files, root):
        found.append("README.md: the table of speed-ups")
    if not (root / PAGE).is_file() or (root / PAGE).read_text() != page(files, root):
        found.append(PAGE)
    for path in files:
        wanted = plots.source(results.read(path))
        found += [
            str((path.parent / name).relative_to(root))
            for name in plots.FIGURES
            if figure_source(path.parent / name) != wanted
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where something disagrees")
    parser.add_argument("--summary", type=Path, metavar="BENCH_JSON", help="print one file's means, nothing else")
    parser.add_argument("--root", type=Path, default=results.REPOSITORY, help="the repository")
    args = parser.parse_args()
    if args.summary:
        print("\n".join(summary_table(results.read(args.summary)["rows"])))
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
    for path in files:
        plots.draw_all(results.read(path), path.parent)
    print(f"README.md, {PAGE} and the figures were written from {len(files)} result files")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
