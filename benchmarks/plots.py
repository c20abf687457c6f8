"""The figures of a result file: speed-up by shape, latency over each size with the floor, and a roofline.

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
from cases import Case, name_of
from device import peak_tflop_s
from matplotlib.axes import Axes
from peers import LAYERS, Layer
from results import is_noise, select, values

COLOURS = plt.get_cmap("tab20").colors

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


def layer_of(document: dict[str, Any]) -> Layer:
    return LAYERS[document["rows"][0]["layer"]]


def colour(layer: Layer, peer: str) -> Any:
    return COLOURS[(2 * list(layer.peers).index(peer)) % 19]  # the strong ones first


def drawn(document: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """The rows of the first nonlinearity, tanh where it was measured."""
    return select(document["rows"], nonlinearity=values(document["rows"], "nonlinearity")[0], **wanted)


def speedup(document: dict[str, Any], path: Path) -> Path:
    """A panel a dtype, a line a shape, a dot a pass: how many times as long as rnn_ext what it replaces takes."""
    layer = layer_of(document)
    rows = [row for row in drawn(document, peer=layer.replaced) if row["group"] != "growth"]
    keys = [(c, d) for c in dict.fromkeys(("host", main_clock(document))) for d in values(rows, "dtype")]
    panels = {f"{dtype}, {clock} time": select(rows, clock=clock, dtype=dtype) for clock, dtype in keys}
    names = list(dict.fromkeys(map(name_of, sorted(rows, key=order))))
    label = "T, B, I, H" if layer is LAYERS["sequence"] else "B, I, H"
    figure = speedup_panels(panels, names, label, len(values(rows, "dtype")))
    title = f"time of {layer.peers[layer.replaced].label} / time of rnn_ext: right of the line, rnn_ext is faster"
    figure.suptitle(f"{title}\n{machine(document)}", fontsize=9)
    return save(figure, document, path)


def order(row: dict[str, Any]) -> tuple[int, ...]:
    """Cells by work; sequences stay as they were measured, by what they stand for."""
    return (Case.of(row | {"pass": "forward"}).flop, row["B"], row["I"], row["H"]) if row["layer"] == "cell" else (0,)


def speedup_panels(
    panels: dict[str, list[dict[str, Any]]],
    names: list[str],
    label: str,
    columns: int,
) -> Any:
    """A panel for each list of rows under its title, a line for each of `names`."""
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
            panel.plot(row["speedup"], names.index(name_of(row)), marker, markersize=6.5, alpha=0.9, **style)
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


def series(rows: list[dict[str, Any]], size: str) -> list[dict[str, Any]]:
    """The rows in which `size` alone differs (I goes with H), at the other sizes of which there are most."""

    def rest(row: dict[str, Any]) -> tuple[Any, ...]:
        case = {**row, "I": 0 if size == "H" else row["I"], size: 0}
        return tuple(case[name] for name in ("layers", "directions", "layout", "H", "I", "B", "T"))

    rows = [row for row in rows if size != "H" or row["I"] == row["H"]]
    counts = Counter(rest(row) for row in rows if row["peer"] == "rnn_ext")
    most = max(counts, key=lambda key: (counts[key], key), default=None)
    return [row for row in rows if rest(row) == most]


def latency(document: dict[str, Any], path: Path) -> Path:
    """Microseconds over B, and of sequences over T and H, one at a time: every peer and the floor."""
    layer, rows = layer_of(document), drawn(document)
    clocks = dict.fromkeys(("host", main_clock(document)))
    passes = [name for name in values(rows, "pass") if name != "forward_grad"]
    keys = [(c, d, p) for c in clocks for d in values(rows, "dtype") for p in passes]
    panels = {}
    for clock, dtype, pass_name in keys:
        chosen = select(rows, clock=clock, dtype=dtype, pass_=pass_name)
        for size in "TBH" if layer is LAYERS["sequence"] else "B":
            panels[(size, clock, dtype, pass_name)] = series(chosen, size)
    panels = {key: chosen for key, chosen in panels.items() if chosen}
    columns = 3 if layer is LAYERS["sequence"] else 4 if len(panels) % 4 == 0 else 2
    figure, axes = grid(len(panels), columns, 4.2, 3.6)
    for panel, ((size, clock, dtype, pass_name), rows) in zip(axes, panels.items(), strict=True):
        for peer in values(rows, "peer"):
            line = sorted(select(rows, peer=peer), key=lambda row: row[size])
            middle = [row["median_us"] for row in line]
            below = [row["median_us"] - row["q25_us"] for row in line]
            above = [row["q75_us"] - row["median_us"] for row in line]
            panel.errorbar(
                [row[size] for row in line],
                middle,
                (below, above),
                marker="o",
                markersize=3,
                linewidth=2 if peer == "rnn_ext" else 1,
                color=colour(layer, peer),
                label=layer.peers[peer].label,
            )
        floor = sorted({(row[size], row["floor_us"]) for row in rows})
        panel.plot(*zip(*floor, strict=True), ":", color="black", marker="_", label="floor")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        panel.set_xlabel("I = H" if size == "H" else size, fontsize=8)
        panel.set_ylabel("µs a call", fontsize=8)
        fixed = [(name, rows[0][name]) for name in "TBIH" if name not in (size, "I" if size == "H" else "")]
        fixed = [f"{name} = {value}" for name, value in fixed if name != "T" or layer is LAYERS["sequence"]]
        panel.set_title(f"{dtype}, {pass_name}, {clock}\n{', '.join(fixed)}", fontsize=8)
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
    labels = {label: line for panel in axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if labels:
        figure.legend(labels.values(), labels, loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(f"latency\n{machine(document)}", fontsize=9)
    return save(figure, document, path)


def roofline(document: dict[str, Any], path: Path) -> Path:
    """TFLOP/s over FLOP per byte, rnn_ext and what it replaces under the measured ceilings."""
    facts, clock, layer = document["facts"], main_clock(document), layer_of(document)
    rows = select(document["rows"], clock=clock)
    figure, axes = grid(len(values(rows, "dtype")), 3, 5.2, 4.0)
    for panel, dtype in zip(axes, values(rows, "dtype"), strict=True):
        every: list[float] = []
        for peer, marker in ((layer.replaced, "x"), ("rnn_ext", "o")):
            points = []
            for row in select(rows, dtype=dtype, peer=peer):
                if row["pass"] == "forward_grad":
                    continue
                case = Case.of(row)
                points.append(
                    (
                        case.flop / (case.bytes + case.recurrent_reads * case.recurrent_bytes),
                        case.flop / row["median_us"] * 1e-6,
                    )
                )
            if points:
                x, y = zip(*points, strict=True)
                panel.scatter(x, y, marker=marker, s=18, color=colour(layer, peer), label=layer.peers[peer].label)
                every += x
        peak = peak_tflop_s(dtype, facts)
        ends = [min(every) / 2, max([*every, peak * 1e3 / facts["copy_gb_s"]]) * 2]
        levels = [("memory", facts["copy_gb_s"])]
        levels += [(f"cache of {size / 2**20:.3g} MiB", rate) for size, rate in reversed(facts["caches"])]
        for (name, rate), style in zip(levels, ("-", "--", "-.", ":"), strict=False):
            ridge = peak * 1e3 / rate
            x = sorted([ends[0], min(max(ridge, ends[0]), ends[1]), ends[1]])
            y = [min(peak, value * rate * 1e-3) for value in x]
            panel.plot(x, y, style, color="black", linewidth=1, label=f"{name}, {rate:.0f} GB/s")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("FLOP a byte", fontsize=8)
        panel.set_ylabel("TFLOP/s", fontsize=8)
        panel.set_title(f"{dtype}: {peak:.3g} TFLOP/s", fontsize=8)
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        panel.legend(fontsize=7)
    figure.suptitle(f"roofline, {clock} time\n{machine(document)}", fontsize=9)
    return save(figure, document, path)


FIGURES: dict[str, dict[str, Callable[[dict[str, Any], Path], Path]]] = {
    "cell": {"speedup.png": speedup, "latency.png": latency, "roofline.png": roofline},
    "sequence": {
        "sequence.png": speedup,
        "sequence-latency.png": latency,
        "sequence-roofline.png": roofline,
    },
}


def figures_of(document: dict[str, Any]) -> dict[str, Callable[[dict[str, Any], Path], Path]]:
    """All figures that the rows allow; none where nothing was measured."""
    found = select(document["rows"], peer="rnn_ext")
    return FIGURES[found[0]["layer"]] if found else {}


def draw_all(document: dict[str, Any], folder: Path) -> list[Path]:
    return [draw(document, folder / name) for name, draw in figures_of(document).items()]
