"""The figures of a result file: speed-up by shape; of the cell also latency over B with the floor, and a roofline.

Each PNG carries the hash of the rows it was drawn from (`Source` in its metadata), so that report.py --check can tell
whether figure and file belong together.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a figure goes to a file; there may be no display

import matplotlib.pyplot as plt
from device import peak_tflop_s
from matplotlib.axes import Axes
from peers import PASSES, PEERS, Case
from results import CELLS, SEQUENCES, is_noise, select, values
from sequence_peers import name_of

COLOURS = dict(zip(PEERS, plt.get_cmap("tab10").colors, strict=False))

# By pass. The colours are of Okabe and Ito's palette, which colour-blind readers can tell apart too.
MARKERS = {"forward": ("o", "#0072B2"), "forward_grad": ("s", "#E69F00"), "forward_backward": ("D", "#009E73")}


def source(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def main_clock(document: dict[str, Any]) -> str:
    """Device time where there is any; the host's otherwise."""
    return "warm" if select(document["rows"], clock="warm") else "host"


def machine(document: dict[str, Any]) -> str:
    device = document["gpu"] or f"{document['cpu']}, {document['threads']} threads"
    return f"{device}, torch {document['torch']}"


def grid(count: int, columns: int, width: float, height: float) -> tuple[Any, list[Axes]]:
    """A figure of `count` panels; the cells that remain are blank."""
    columns = max(1, min(columns, count))
    rows = max(1, math.ceil(count / columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )
    for spare in axes.flat[count:]:
        spare.axis("off")
    return figure, list(axes.flat[:count])


def save(figure: Any, document: dict[str, Any], path: Path) -> Path:
    figure.savefig(path, dpi=130, metadata={"Source": source(document)})
    plt.close(figure)
    return path


def speedup(document: dict[str, Any], path: Path) -> Path:
    """A panel a dtype, a line a shape, a dot a pass: how many times as long as rnn_ext nn.RNNCell takes."""
    tanh = select(document["rows"], nonlinearity=values(document["rows"], "nonlinearity")[0], peer="rnn_cell")
    keys = [(c, d) for c in dict.fromkeys(("host", main_clock(document))) for d in values(tanh, "dtype")]
    panels = {f"{dtype}, {clock} time": select(tanh, clock=clock, dtype=dtype) for clock, dtype in keys}
    by_work = sorted(tanh, key=lambda row: (row["B"] * row["H"] * (row["I"] + row["H"]), row["B"], row["I"], row["H"]))

    def name(row: dict[str, Any]) -> str:
        return " × ".join(str(row[size]) for size in "BIH")

    names = list(dict.fromkeys(map(name, by_work)))
    figure = speedup_panels(panels, names, name, "B × I × H", len(values(tanh, "dtype")))
    return titled(figure, "nn.RNNCell", document, path)


def sequence_speedup(document: dict[str, Any], path: Path) -> Path:
    """The same of whole sequences and nn.RNN; the cases in the order in which they were measured."""
    tanh = select(document["rows"], nonlinearity=values(document["rows"], "nonlinearity")[0], peer="rnn")
    panels = {dtype: select(tanh, dtype=dtype) for dtype in values(tanh, "dtype")}
    names = list(dict.fromkeys(map(name_of, tanh)))
    return titled(speedup_panels(panels, names, name_of, "T, B, I, H", len(panels)), "nn.RNN", document, path)


def speedup_panels(
    panels: dict[str, list[dict[str, Any]]],
    names: list[str],
    name: Callable[[dict[str, Any]], str],
    label: str,
    columns: int,
) -> Any:
    """A panel for each list of rows under its title, a line for each of `names`, which `name` gives a row."""
    panels = {title: rows for title, rows in panels.items() if rows}
    found = [row["speedup"] for rows in panels.values() for row in rows]
    # One scale for all panels, with something of the side where rnn_ext is slower.
    low, high = min([0.75, *(0.9 * x for x in found)]), max([2, *(1.15 * x for x in found)])
    figure, axes = grid(len(panels), columns, 3.6, 1.4 + 0.24 * len(names))
    present = {row["pass"] for rows in panels.values() for row in rows}
    markers = {pass_name: style for pass_name, style in MARKERS.items() if pass_name in present}
    for i, (panel, (title, rows)) in enumerate(zip(axes, panels.items(), strict=True)):
        for row in rows:
            marker, colour = markers[row["pass"]]
            noise = is_noise(row["speedup"], row["speedup_q25"], row["speedup_q75"])
            style = {"color": colour, "markerfacecolor": "white" if noise else colour}
            panel.plot(row["speedup"], names.index(name(row)), marker, markersize=6.5, alpha=0.9, **style)
        panel.axvline(1, color="black", linewidth=1.2)
        panel.axvspan(low, 1, color="black", alpha=0.07, linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_xlim(low, high)
        panel.xaxis.set_major_formatter("{x:g}×")
        panel.set_yticks(range(len(names)), names if i % columns == 0 else [""] * len(names), fontsize=8)
        panel.set_ylim(len(names) - 0.5, -0.5)  # the first on top
        panel.tick_params(axis="y", length=0)
        panel.set_title(title, fontsize=9)
        panel.grid(alpha=0.3, linewidth=0.5)
    handles = [
        plt.Line2D([], [], linestyle="", marker=marker, color=colour, label=pass_name)
        for pass_name, (marker, colour) in markers.items()
    ]
    handles.append(plt.Line2D([], [], linestyle="", marker="o", color="grey", markerfacecolor="white", label="noise"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    figure.supylabel(label, fontsize=8)
    return figure


def titled(figure: Any, peer: str, document: dict[str, Any], path: Path) -> Path:
    title = f"time of {peer} / time of rnn_ext: right of the line, rnn_ext is faster"
    figure.suptitle(f"{title}\n{machine(document)}", fontsize=9)
    return save(figure, document, path)


def latency(document: dict[str, Any], path: Path) -> Path:
    """Microseconds over B for the I and H that were measured at most values of B, every peer and the floor."""
    tanh = select(document["rows"], nonlinearity=values(document["rows"], "nonlinearity")[0])
    sizes = Counter((row["I"], row["H"]) for row in select(tanh, peer="rnn_ext"))
    (I, H), _ = max(sizes.items(), key=lambda item: (item[1], item[0][1]))  # noqa: E741
    clocks = dict.fromkeys(("host", main_clock(document)))
    panels = [(c, d, p) for c in clocks for d in values(tanh, "dtype") for p in PASSES if p != "forward_grad"]
    panels = [key for key in panels if select(tanh, clock=key[0], dtype=key[1], pass_=key[2], I=I, H=H)]
    figure, axes = grid(len(panels), 4 if len(panels) % 4 == 0 else 2, 4.2, 3.6)
    for panel, (clock, dtype, pass_name) in zip(axes, panels, strict=True):
        rows = select(tanh, clock=clock, dtype=dtype, pass_=pass_name, I=I, H=H)
        for peer in values(rows, "peer"):
            line = sorted(select(rows, peer=peer), key=lambda row: row["B"])
            middle = [row["median_us"] for row in line]
            below = [row["median_us"] - row["q25_us"] for row in line]
            above = [row["q75_us"] - row["median_us"] for row in line]
            panel.errorbar(
                [row["B"] for row in line],
                middle,
                (below, above),
                marker="o",
                markersize=3,
                linewidth=2 if peer == "rnn_ext" else 1,
                color=COLOURS[peer],
                label=PEERS[peer].label,
            )
        floor = sorted({(row["B"], row["floor_us"]) for row in rows})
        panel.plot(*zip(*floor, strict=True), ":", color="black", marker="_", label="floor")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        panel.set_xlabel("B", fontsize=8)
        panel.set_ylabel("µs a call", fontsize=8)
        panel.set_title(f"{dtype}, {pass_name}, {clock}", fontsize=8)
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
    if axes:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(f"latency, I = {I}, H = {H}\n{machine(document)}", fontsize=9)
    return save(figure, document, path)


def roofline(document: dict[str, Any], path: Path) -> Path:
    """TFLOP/s over FLOP per byte, rnn_ext and nn.RNNCell under the measured ceilings."""
    facts, clock = document["facts"], main_clock(document)
    rows = select(document["rows"], clock=clock)
    figure, axes = grid(len(values(rows, "dtype")), 3, 5.2, 4.0)
    for panel, dtype in zip(axes, values(rows, "dtype"), strict=True):
        every: list[float] = []
        for peer, marker in (("rnn_cell", "x"), ("rnn_ext", "o")):
            points = []
            for row in select(rows, dtype=dtype, peer=peer):
                if row["pass"] == "forward_grad":
                    continue
                case = Case(row["B"], row["I"], row["H"], dtype, row["nonlinearity"], row["pass"])
                points.append((case.flop / case.bytes, case.flop / row["median_us"] * 1e-6))
            if points:
                x, y = zip(*points, strict=True)
                panel.scatter(x, y, marker=marker, s=18, color=COLOURS[peer], label=PEERS[peer].label)
                every += x
        peak = peak_tflop_s(dtype, facts)
        ends = [min(every) / 2, max([*every, peak * 1e3 / facts["copy_gb_s"]]) * 2]
        for name, bandwidth, style in (("memory", "copy_gb_s", "-"), ("cache", "cache_gb_s", "--")):
            ridge = peak * 1e3 / facts[bandwidth]
            x = sorted([ends[0], min(max(ridge, ends[0]), ends[1]), ends[1]])
            y = [min(peak, value * facts[bandwidth] * 1e-3) for value in x]
            panel.plot(x, y, style, color="black", linewidth=1, label=f"{name} {facts[bandwidth]:.0f} GB/s")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("FLOP a byte", fontsize=8)
        panel.set_ylabel("TFLOP/s", fontsize=8)
        panel.set_title(f"{dtype}: {peak:.3g} TFLOP/s", fontsize=8)
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        panel.legend(fontsize=7)
    figure.suptitle(f"roofline, {clock} time\n{machine(document)}", fontsize=9)
    return save(figure, document, path)


# By the file that they are drawn from.
FIGURES = {
    CELLS: {"speedup.png": speedup, "latency.png": latency, "roofline.png": roofline},
    SEQUENCES: {"sequence.png": sequence_speedup},
}


def draw_all(document: dict[str, Any], folder: Path, file: str = CELLS) -> list[Path]:
    """All figures that the rows allow; none where nothing was measured."""
    if not select(document["rows"], peer="rnn_ext"):
        return []
    return [draw(document, folder / name) for name, draw in FIGURES[file].items()]
