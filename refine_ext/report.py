"""Reports people want to look at: pictures of what refinement did, and the same facts as JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .measures import TITLES, TwoSample
from .output import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .judging import Samples
    from .pipeline import Refined

REAL, BEFORE, AFTER = "#3a3a3a", "#c8553d", "#2a6f97"
_DPI = 110


def require_matplotlib() -> None:
    """Raise, before any work is done, where the picture could not be drawn."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("the picture needs matplotlib: pip install 'refine-ext[demo]'", name="matplotlib")


def new_figure(width: float, height: float, title: str) -> Figure:
    """A figure that draws without a display and touches no global state of matplotlib."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=15, fontweight="bold", x=0.01, ha="left")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """PNG, complete or absent."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})


def save_json(facts: dict[str, Any], path: Path) -> None:
    """JSON, complete or absent; a number that is not finite becomes null."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_plain(facts), indent=2, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_images(samples: np.ndarray) -> np.ndarray | None:
    """Samples as grey [n, H, W] or colour [n, H, W, 3] images, or None where their shape is no
    image's."""
    shape = samples.shape[1:]
    side = math.isqrt(shape[0]) if len(shape) == 1 else 0
    if len(shape) == 1 and shape[0] >= 64 and side * side == shape[0]:
        return samples.reshape(-1, side, side)
    if len(shape) == 2 and min(shape) >= 4:
        return samples
    if len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 4:
        samples = np.moveaxis(samples, 1, -1)
    elif not (len(shape) == 3 and shape[2] in (1, 3) and min(shape[:2]) >= 4):
        return None
    return samples[..., 0] if samples.shape[-1] == 1 else samples


def draw_grid(axes: Axes, images: np.ndarray, rows: int, columns: int, limits: tuple[float, float]) -> None:
    """The first rows × columns images as one mosaic, all on one grey or colour scale."""
    images = images[: rows * columns]
    height, width = images.shape[1:3]
    gap = max(1, height // 8)
    low, high = limits
    scaled = np.clip((images - low) / ((high - low) or 1.0), 0.0, 1.0)
    colour = scaled.ndim == 4
    if not colour:
        scaled = np.repeat(1.0 - scaled[..., None], 3, axis=-1)  # ink on paper
    canvas = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3))
    for index, image in enumerate(scaled):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()


def draw_plane(axes: Axes, samples: np.ndarray, real: np.ndarray, generated: np.ndarray, colour: str) -> None:
    """Samples over the real ones: a histogram, the plane, or the first two principal axes of both.

    What `generated` covers decides the limits too, so that the panels of one report share them.
    """
    shown, base, other = (x.reshape(len(x), -1).astype(np.float64) for x in (samples, real, generated))
    both = np.concatenate([base, other])
    axes.set_yticks([])
    if base.shape[1] == 1:
        left, right = np.percentile(both, [0.5, 99.5])
        edges = np.linspace(left, right, 26)
        for values, shade, fill in ((base, "0.85", True), (shown, colour, False)):
            clipped = np.clip(values, edges[0], edges[-1])
            heights, _ = np.histogram(clipped, edges, density=True)
            axes.stairs(heights, edges, fill=fill, color=shade, linewidth=1.5)
        return
    if base.shape[1] > 2:
        centre = both.mean(axis=0)
        directions = np.linalg.svd(both - centre, full_matrices=False)[2][:2].T
        shown, base, both = ((x - centre) @ directions for x in (shown, base, both))
    axes.scatter(base[:, 0], base[:, 1], s=9, color="0.8", linewidths=0)
    axes.scatter(shown[:, 0], shown[:, 1], s=9, color=colour, alpha=0.6, linewidths=0)
    low, high = np.percentile(both, [0.3, 99.7], axis=0)
    margin = 0.1 * (high - low) + 1e-12
    axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
    axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
    axes.set_xticks([])


def draw_log_ratios(axes: Axes, groups: Sequence[tuple[str, np.ndarray, str]]) -> None:
    """Densities of log r, one outline per (label, log-ratios, colour)."""
    finite = [values[np.isfinite(values)].astype(np.float64) for _, values, _ in groups]
    pooled = np.concatenate(finite)
    if not pooled.size:
        return
    low, high = np.percentile(pooled, [0.3, 99.7])
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 46)
    for (label, _, colour), values in zip(groups, finite, strict=True):
        if values.size:
            # the tails are drawn in the outermost bins, not cut off
            heights, _ = np.histogram(np.clip(values, low, high), edges, density=True)
            axes.stairs(heights, edges, fill=True, color=colour, alpha=0.16)
            axes.stairs(heights, edges, color=colour, linewidth=1.6, label=label)
    axes.axvline(0.0, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xlabel("log r (nats)")
    axes.set_yticks([])
    axes.legend(frameon=False, fontsize=9)
    bare(axes)


def draw_weights(axes: Axes, weights: np.ndarray, ess: float) -> None:
    """Which share of the generated samples carries which share of the weight (a Lorenz curve)."""
    ordered = np.sort(weights.astype(np.float64))[::-1]
    share = np.concatenate([[0.0], np.cumsum(ordered)]) / ordered.sum()
    rows = np.linspace(0.0, 1.0, len(share))
    pick = np.unique(np.linspace(0, len(share) - 1, 500).astype(int))
    axes.plot(rows[pick], share[pick], color=AFTER, linewidth=2)
    axes.fill_between(rows[pick], rows[pick], share[pick], color=AFTER, alpha=0.12)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xlabel("share of generated samples, heaviest first")
    axes.set_ylabel("share of weight")
    axes.set_title(f"effective samples {ess:.0f} of {len(weights)} ({ess / len(weights):.0%})", fontsize=10)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.01)
    bare(axes)


def draw_measure(
    axes: Axes,
    name: str,
    before: Sequence[float],
    after: Sequence[float],
    ideal: float | None = None,
    errors: Sequence[float | None] = (None, None),
) -> None:
    """One measure before and after: a thin line per run, and the means with their standard errors, which are
    `errors` where there is one run."""
    title, direction = TITLES[name]
    pairs = np.array([before, after], dtype=np.float64)
    axes.plot([0, 1], pairs, color="0.78", linewidth=1, zorder=1)
    if pairs.shape[1] > 1:
        error = pairs.std(axis=1, ddof=1) / math.sqrt(pairs.shape[1])
    else:
        error = np.array([e if e is not None and math.isfinite(e) else 0.0 for e in errors])
    means = pairs.mean(axis=1)
    for x, colour in ((0, BEFORE), (1, AFTER)):
        axes.errorbar(x, means[x], error[x], fmt="o", markersize=9, capsize=5, color=colour, zorder=3)
        above = means[x] >= means[1 - x]
        clearance = 13 + (0.0 if error[x] == 0 else 8)
        axes.annotate(
            f"{means[x]:.3g}",
            (x, means[x]),
            xytext=(0, clearance if above else -clearance),
            textcoords="offset points",
            ha="center",
            va="center",
            color=colour,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.8},
        )
    if ideal is not None:
        axes.axhline(ideal, color="0.45", linewidth=1, linestyle="--", zorder=0)
    axes.set_xlim(-0.6, 1.6)
    axes.set_xticks([0, 1], ["generated", "refined"], fontsize=9)
    axes.locator_params(axis="y", nbins=5)
    axes.tick_params(axis="y", labelsize=9)
    axes.set_title(f"{title}\n", fontsize=11, fontweight="bold")
    axes.text(0.5, 1.03, direction, transform=axes.transAxes, ha="center", fontsize=9, color="0.4")
    axes.margins(y=0.28)
    bare(axes)


def bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def measured(before: TwoSample, after: TwoSample) -> list[str]:
    """The names of the measures both results have, in the order they are shown."""
    a, b = before.to_dict(), after.to_dict()
    return [name for name in TITLES if a[name] is not None and b[name] is not None]


def _draw_samples(figure: Any, grid: Any, samples: Samples, verdict: str) -> None:
    panels = [
        ("held-out real", samples.real, REAL),
        ("generated", samples.before, BEFORE),
        ("refined", samples.after, AFTER),
        ("highest weights", samples.highest, AFTER),
        ("lowest weights", samples.lowest, BEFORE),
    ]
    for column, (title, values, colour) in enumerate(panels):
        axes = figure.add_subplot(grid[0, column])
        axes.set_title(title, color=colour, fontweight="bold")
        if values is None:
            axes.set_axis_off()
            text = textwrap.fill(verdict, 34)
            axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=11, color=BEFORE)
            continue
        images = as_images(values)
        if images is not None:
            limits = np.percentile(samples.real, [0.1, 99.9])
            draw_grid(axes, images, 8, 8, (float(limits[0]), float(limits[1])))
        else:
            draw_plane(axes, values, samples.real, samples.before, colour)


def draw_refined(refined: Refined, title: str) -> Figure:
    """The picture of one refine job: samples, log-ratios, weights, the held-out measures, and its certificate."""
    heights = [1.0, 0.95] if refined.certificate is None else [1.0, 0.95, 0.8]
    figure = new_figure(19, 4.4 * sum(heights), title)
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    upper, lower = parts[:2]
    if refined.samples is not None:
        _draw_samples(upper, upper.add_gridspec(1, 5, wspace=0.06), refined.samples, refined.verdict)
    judged = [sample for sample in (refined.before, refined.after) if sample is not None]
    names = measured(*judged) if len(judged) == 2 else []
    grid = lower.add_gridspec(1, 2 + len(names), width_ratios=[1.9, 1.5, *[1.0] * len(names)])
    draw_log_ratios(
        lower.add_subplot(grid[0, 0]),
        [("held-out real", refined.real_log_ratio, REAL), ("generated", refined.log_ratio, BEFORE)],
    )
    draw_weights(lower.add_subplot(grid[0, 1]), refined.weights, refined.ess)
    for column, name in enumerate(names):
        values = [getattr(sample, name) for sample in judged]
        errors = [getattr(sample, f"{name}_stderr", None) for sample in judged]
        draw_measure(lower.add_subplot(grid[0, 2 + column]), name, values[:1], values[1:], errors=errors)
    if refined.certificate is not None:
        from .certificate_figure import draw_job

        draw_job(parts[2], refined.certificate)
    return figure
