"""Achieved bandwidth against a copy's, per op and size, log-log."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gate_results import device_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f3c8d", "#8c6d31", "#6b6b6b")
MARKERS = "osD^vP*Xh"
LEAST_POINTS = 2  # a line needs two sizes


def fingerprint(rows: list[dict[str, Any]]) -> str:
    """What a picture was drawn from, kept in its metadata."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def source_of(path: Path) -> str | None:
    from PIL import Image

    with Image.open(path) as image:
        return getattr(image, "text", {}).get("Source")


def _series(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(bytes, bytes a second) of each variant by size, and of the copies."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["n"]):
        found[row["variant"]].append((row["bytes"], row["bytes"] / device_seconds(row, "refine_ext")))
    return {name: points for name, points in found.items() if len(points) >= LEAST_POINTS}


def _copies(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """The median copy of each size: every row has measured one."""
    times: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        times[2 * row["n"] * row["itemsize"]].append(device_seconds(row, "copy"))
    return [(moved, moved / sorted(values)[len(values) // 2]) for moved, values in sorted(times.items())]


def sheet(width: float, height: float, title: str) -> Figure:
    """An empty figure, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure


def keep(figure: Figure, rows: list[dict[str, Any]], path: Path, dpi: int = 80) -> None:
    """PNG that says what it was drawn from."""
    figure.savefig(path, dpi=dpi, metadata={"Source": fingerprint(rows), "Software": None})


def draw(rows: list[dict[str, Any]], title: str, limit: float | None, path: Path) -> None:
    """One panel an op; rows need op, variant, n, itemsize, bytes and time."""
    by_op: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_op[row["op"]].append(row)
    panels = {op: series for op, found in by_op.items() if (series := _series(found))}
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = sheet(1.5 + 6.0 * columns, 4.4 * lines, title)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (op, series) in zip(grid.flat, panels.items(), strict=False):
        copies = _copies(by_op[op])
        axes.plot(*zip(*copies, strict=True), color="black", linewidth=2.5, label="copy of as many samples")
        if limit:
            axes.axhline(limit, color="black", linestyle="--", linewidth=1, label="large copy")
        for index, (name, points) in enumerate(series.items()):
            style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            axes.plot(*zip(*points, strict=True), linewidth=1.3, markersize=5, label=name, **style)
        axes.set(xscale="log", yscale="log", title=op, xlabel="bytes that must move", ylabel="bytes a second")
        axes.grid(True, which="major", color="0.88")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    keep(figure, rows, path, dpi=110)
