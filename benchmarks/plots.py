"""The figures of a result file: speed-up over B × H, latency over B with the floor, roofline.

Each PNG carries the hash of the rows it was drawn from (`Source` in its metadata), so that report.py --check can tell
whether figure and file belong together.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a figure goes to a file; there may be no display

import matplotlib.pyplot as plt
from device import peak_tflop_s
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from peers import PASSES, PEERS, Case
from results import select, values

COLOURS = dict(zip(PEERS, plt.get_cmap("tab10").colors, strict=False))


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
    """A heat map a peer and dtype: how many times as long as rnn_ext it takes, over B × H, forward and backward."""
    tanh = select(document["rows"], nonlinearity=values(document["rows"], "nonlinearity")[0])
    panels = []
    for clock in dict.fromkeys(("host", main_clock(document))):
        for dtype in values(tanh, "dtype"):
            for pass_name in [name for name in PASSES if name != "forward_grad"]:
                for peer in PEERS:
                    rows = select(tanh, clock=clock, dtype=dtype, pass_=pass_name, peer=peer)
                    # Peers that were measured at a shape or two have no map.
                    if peer != "rnn_ext" and rows and (peer == "rnn_cell" or len(rows) > 2):
                        panels.append((f"{PEERS[peer].label}\n{dtype}, {pass_name}, {clock}", rows))
    columns = len({row["peer"] for _, rows in panels for row in rows})
    figure, axes = grid(len(panels), columns, 3.4, 3.2)
    norm = LogNorm(0.25, 4)
    for panel, (title, rows) in zip(axes, panels, strict=True):
        hidden, batches = sorted(set(values(rows, "H"))), sorted(set(values(rows, "B")))
        image = [[math.nan] * len(hidden) for _ in batches]
        for row in rows:
            y, x = batches.index(row["B"]), hidden.index(row["H"])
            image[y][x] = row["speedup"] or math.nan
            dark = not 0.4 < image[y][x] < 2.5
            colour = "white" if dark else "black"
            panel.text(x, y, f"{image[y][x]:.2f}", ha="center", va="center", fontsize=6, color=colour)
        drawn = panel.imshow(image, cmap="RdYlGn", norm=norm, origin="lower", aspect="auto")
        panel.set_xticks(range(len(hidden)), [str(h) for h in hidden], fontsize=6, rotation=45)
        panel.set_yticks(range(len(batches)), [str(b) for b in batches], fontsize=6)
        panel.set_xlabel("H", fontsize=7)
        panel.set_ylabel("B", fontsize=7)
        panel.set_title(title, fontsize=7)
    if axes:
        bar = figure.colorbar(
            drawn, ax=axes, shrink=0.4, aspect=30, extend="both", ticks=[0.25, 0.5, 1, 2, 4], format="%g×"
        )
        bar.ax.minorticks_off()
    figure.suptitle(f"time of each peer / time of rnn_ext\n{machine(document)}", fontsize=9)
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


FIGURES = {"speedup.png": speedup, "latency.png": latency, "roofline.png": roofline}


def draw_all(document: dict[str, Any], folder: Path) -> list[Path]:
    """All figures that the rows allow; none where nothing was measured."""
    if not select(document["rows"], peer="rnn_ext"):
        return []
    return [draw(document, folder / name) for name, draw in FIGURES.items()]
