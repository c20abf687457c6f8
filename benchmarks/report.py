"""What is said of performance, from the result files alone.

python benchmarks/report.py            writes README.md between the markers, benchmarks/results/README.md, and the
                                       figures beside each result file
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
from cases import GROUPS, LAYOUTS, Case, name_of
from peers import LAYERS
from PIL import Image

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
PAGE = "benchmarks/results/README.md"
PASS_NAMES = {
    "cell": {
        "forward": "forward, no gradient wanted",
        "forward_grad": "forward that records for backward",
        "forward_backward": "forward and backward",
    },
    "sequence": {
        "forward": "a whole sequence, `nn.RNN` against `RNN`: forward",
        "forward_grad": "a whole sequence: forward that records",
        "forward_backward": "a whole sequence: forward and backward",
    },
}
HEADINGS = {"cell": "## {}", "sequence": "### Whole sequences on {}"}
# A time, a rate or a ratio. They stand in generated text alone: typed ones would outlive what they were measured on.
FIGURE = re.compile(r"\d[\d.]*\s*(?:[µnm]s\b|us\b|%|×|[TGM]?FLOP/s|[GM]B/s|times (?:as )?(?:fast|slow)\w*)")
CLOCKS = {"host": "host-inclusive", "warm": "device, warm L2", "cold": "device, cold L2"}


def markdown_table(header: list[str], lines: list[list[str]], left: int) -> list[str]:
    """`left` columns of text, then columns of numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)]


def summary_table(rows: list[dict[str, Any]]) -> list[str]:
    """Geometric means over the shapes of each group that stands for a use, against every peer."""
    rows = [row for row in rows if row["group"] not in ("limits", "growth")]
    known = LAYERS[rows[0]["layer"]].peers if rows else {}
    peers = [name for name in known if name != "rnn_ext" and results.select(rows, peer=name)]
    several = len(results.values(rows, "group")) > 1
    lines = []
    for clock in CLOCKS:
        for group in results.values(rows, "group"):
            for dtype in results.values(rows, "dtype"):
                for pass_name in results.values(rows, "pass"):
                    chosen = results.select(rows, clock=clock, group=group, dtype=dtype, pass_=pass_name)
                    means = [results.mean_speedup(results.select(chosen, peer=peer)) for peer in peers]
                    if chosen:
                        lines.append([CLOCKS[clock], *[group] * several, dtype, pass_name, *means])
    header = ["time", *["group"] * several, "dtype", "pass"]
    return markdown_table([*header, *(known[peer].label for peer in peers)], lines, len(header))


def shape_table(rows: list[dict[str, Any]], dtype: str, clock: str) -> list[str]:
    """Each shape: microseconds, the ratio to the floor, what rnn_ext replaces beside it, and of sequences all peers."""
    layer = LAYERS[rows[0]["layer"]]
    sequences = layer is LAYERS["sequence"]
    chosen = results.select(rows, dtype=dtype, clock=clock, nonlinearity="tanh")
    others = [name for name in layer.peers if name not in ("rnn_ext", layer.replaced)]
    others = [name for name in others if sequences and results.select(chosen, peer=name)]
    by_case: dict[Case, dict[str, Any]] = {}
    for row in chosen:
        by_case.setdefault(Case.of(row), {})[row["peer"]] = row
    lines = []
    for case, found in by_case.items():
        ours, theirs = found.get("rnn_ext"), found.get(layer.replaced)
        if not ours or not theirs or (case.pass_name == "forward_grad" and not sequences):
            continue
        lines.append(
            [
                name_of(ours),
                ours["pass"],
                f"{ours['median_us']:.1f}",
                f"{ours['q75_us'] - ours['q25_us']:.1f}",
                *[f"{ours['median_us'] / ours['T']:.2f}"] * sequences,
                f"{theirs['median_us']:.1f}",
                results.formatted(theirs),
                *[f"{theirs['speedup_q25']:.2f} to {theirs['speedup_q75']:.2f}"] * sequences,
                f"{ours['floor_ratio']:.1f}",
                f"{ours['gflop_s']:.3g}",
                f"{ours['peak_share']:.0%}",
                *(results.formatted(found[name]) if name in found else "" for name in others),
            ]
        )
    sizes = "T, B, I, H" if sequences else "B, I, H"
    header = [sizes, "pass", "rnn_ext µs", "IQR", *["a step"] * sequences, f"{layer.peers[layer.replaced].label} µs"]
    header += ["speed-up", *["quartiles"] * sequences, "/ floor", "GFLOP/s", "of peak"]
    return markdown_table([*header, *(layer.peers[name].label for name in others)], lines, 2)


def title(document: dict[str, Any]) -> str:
    return document["gpu"] or f"{document['cpu']}, {document['threads']} threads"


def overview(documents: list[dict[str, Any]], folder: str) -> list[str]:
    """One device's part of the README: a row a pass and a figure a layer; these lie in `folder`."""
    first = documents[0]
    clock = plots.main_clock(first)
    dtypes = results.values(results.select(first["rows"], clock=clock), "dtype")
    lines, figures = [], []
    for document in documents:
        name = document["rows"][0]["layer"]
        layer = LAYERS[name]
        rows = results.select(document["rows"], peer=layer.replaced, clock=plots.main_clock(document), group="shapes")
        for pass_name, words in PASS_NAMES[name].items():
            if chosen := results.select(rows, pass_=pass_name):
                means = [results.mean_speedup(results.select(chosen, dtype=dtype)) for dtype in dtypes]
                lines.append([words, *means])
        figure = f"{folder}/{next(iter(plots.FIGURES[name]))}"
        figures.append(f"![time of {layer.peers[layer.replaced].label} / time of rnn_ext, by shape]({figure})")
    heading = f"{title(first)}, torch {first['torch']}, {CLOCKS[clock]}"
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


def memory_table(rows: list[dict[str, Any]]) -> list[str]:
    """What a training step keeps for its backward, and its peak, next to those of what rnn_ext replaces."""
    layer = LAYERS[rows[0]["layer"]]
    rows = results.select(rows, clock="host", nonlinearity="tanh")
    replaced = {Case.of(row): row for row in results.select(rows, peer=layer.replaced)}
    lines = []
    for ours in results.select(rows, peer="rnn_ext"):
        pair = (ours, replaced.get(Case.of(ours)))
        if pair[1] and all(row["saved_bytes"] is not None for row in pair):
            kept = [f"{row['saved_bytes'] / 1024:.1f} KiB" for row in pair]
            lines.append([name_of(ours), ours["dtype"], *kept, *(peak_memory(row["peak_bytes"]) for row in pair)])
    names = ("rnn_ext", layer.peers[layer.replaced].label)
    header = ["shape", "dtype", *(f"{what}, {name}" for what in ("kept", "peak") for name in names)]
    return markdown_table(header, lines, 2) if lines else []


def peak_memory(size: int | None) -> str:
    """Pages are counted, and the system's own come and go: less than 64 of them say nothing."""
    if size is None:
        return ""
    return f"{size / 2**20:.2f} MiB" if size >= 2**18 else "under 0.25 MiB"


def section(document: dict[str, Any], folder: str) -> list[str]:
    """One device's part of the page, of one layer; `folder` is where its figures lie, seen from there."""
    rows, facts = document["rows"], document["facts"]
    layer = rows[0]["layer"]
    peaks = ", ".join(f"{dtype} {value:.3g} TFLOP/s" for dtype, value in facts["gemm_tflop_s"].items())
    caches = ", ".join(f"in a cache of {size / 2**20:.3g} MiB {rate:.0f} GB/s" for size, rate in facts["caches"])
    start = f"launch {facts['launch_us']:.2f} µs, autograd {facts['autograd_us']:.1f} µs"
    if facts["node_us"]:
        start += f", graph node {facts['node_us']:.2f} µs"
    lines = [HEADINGS[layer].format(title(document)), ""]
    if not document["complete"]:
        lines += ["The run was interrupted; this is what it had measured.", ""]
    kernels = f" Kernels for {facts['instruction_set']}." if facts["instruction_set"] else ""
    lines += [
        software(document),
        "",
        f"Measured ceilings: {peaks}, copy {facts['copy_gb_s']:.0f} GB/s, {caches}, {start}.{kernels}",
        "",
        "Geometric means over shapes of each peer's time / rnn_ext's:",
        "",
        *summary_table(rows),
        "",
    ]
    clock = plots.main_clock(document)
    groups = results.values(rows, "group")
    if len(groups) > 1:
        lines += [f"- {name}: {GROUPS[name]}" for name in groups]
        layouts = "; ".join(f"{name}: {meaning}" for name, meaning in LAYOUTS.items() if name != "padded")
        lines += [f"- {layouts}; *every step* computes the padding too", ""]
    for group in groups:
        for dtype in results.values(rows, "dtype"):
            chosen = results.select(rows, group=group, dtype=dtype)
            if chosen:
                words = [*[group] * (len(groups) > 1), dtype, "tanh", CLOCKS[clock], "by shape"]
                lines += details(", ".join(words), shape_table(chosen, dtype, clock))
    if memory := memory_table(rows):
        meaning = [
            "Kept for the backward besides input, hx and parameters; and the most that a step takes at once, its",
            "results included.",
            "",
        ]
        lines += details("memory of a training step", [*meaning, *memory])
    return lines + [f"![{Path(name).stem}]({folder}/{name})" for name in plots.figures_of(document)] + [""]


def details(summary: str, lines: list[str]) -> list[str]:
    return [f"<details><summary>{summary}</summary>", "", *lines, "", "</details>", ""]


def documents_in(folder: Path) -> list[dict[str, Any]]:
    """What was measured on one device, a layer each."""
    return [results.read(folder / layer.file) for layer in LAYERS.values() if (folder / layer.file).is_file()]


def summary(folders: list[Path], root: Path) -> str:
    """What stands between the README's markers."""
    lines = [
        "",
        "Time of `nn.RNNCell` divided by rnn_ext's in the same run, geometric means over shapes and nonlinearities;",
        "above 1 rnn_ext is faster. Of whole sequences the same against `nn.RNN`, tanh alone.",
        "",
    ]
    for folder in folders:
        lines += overview(documents_in(folder), folder.relative_to(root).as_posix())
    if not folders:
        lines += ["Nothing has been measured yet.", ""]
    return "\n".join(lines)


def page(folders: list[Path], root: Path) -> str:
    """All of benchmarks/results/README.md."""
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/report.py` from the result files beside it. A speed-up is another",
        "implementation's time divided by rnn_ext's in the same run, median over alternating rounds; above 1 rnn_ext",
        f"is faster. `~` marks noise: a difference under {results.NOISE:.0%}, or quartiles on either side of 1. The",
        "floor is the time that the device's measured ceilings allow: the operations at the best matrix product's",
        "rate, or every operand once and U at each step from the level of the caches that holds it, whichever takes",
        "longer; on the host's clock, and what PyTorch takes for a small operation, with a backward for one that has",
        "six leaves, like the cell (`autograd`).",
        "",
    ]
    for folder in folders:
        for document in documents_in(folder):
            lines += section(document, folder.relative_to((root / PAGE).parent).as_posix())
    if not folders:
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


def disagreements(folders: list[Path], root: Path) -> list[str]:
    """What in the pages and the figures isn't as the files say."""
    found = []
    if split((root / "README.md").read_text())[1] != summary(folders, root):
        found.append("README.md: the table of speed-ups")
    if not (root / PAGE).is_file() or (root / PAGE).read_text() != page(folders, root):
        found.append(PAGE)
    for folder in folders:
        for document in documents_in(folder):
            wanted = plots.source(document)
            found += [
                str((folder / name).relative_to(root))
                for name in plots.figures_of(document)
                if figure_source(folder / name) != wanted
            ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where something disagrees")
    parser.add_argument("--summary", type=Path, metavar="JSON", help="print one file's means, nothing else")
    parser.add_argument("--root", type=Path, default=results.REPOSITORY, help="the repository")
    args = parser.parse_args()
    if args.summary:
        print("\n".join(summary_table(results.read(args.summary)["rows"])))
        return 0
    root = args.root.resolve()
    names = {layer.file for layer in LAYERS.values()}
    folders = sorted({path.parent for path in (root / PAGE).parent.glob("**/*.json") if path.name in names})
    if args.check:
        found, typed = disagreements(folders, root), typed_figures(root)
        for name in found:
            print(f"{name} disagrees with benchmarks/results/: run python benchmarks/report.py")
        for figure in typed:
            print(f"{figure!r} is typed: figures are read from benchmarks/results/")
        return 1 if found or typed else 0
    before, _, after = split((root / "README.md").read_text())
    (root / "README.md").write_text(before + BEGIN + summary(folders, root) + END + after)
    (root / PAGE).write_text(page(folders, root))
    for folder in folders:
        for document in documents_in(folder):
            plots.draw_all(document, folder)
    print(f"README.md, {PAGE} and the figures were written from {len(folders)} devices' results")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
