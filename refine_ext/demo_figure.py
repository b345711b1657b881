"""The picture of the demonstration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .demo import KINDS, DemoResult, SeedResult
from .measures import TITLES
from .report import (
    AFTER,
    BEFORE,
    REAL,
    draw_grid,
    draw_log_ratios,
    draw_measure,
    draw_weights,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KIND_COLOURS = (AFTER, "#e09f3e", "#9e2a2b")
_LIMITS = (0.0, 16.0)


def draw_demo(result: DemoResult) -> Figure:
    """Samples before and after, weights, log-ratios, faults, and the held-out measures of all
    seeds."""
    first = result.seeds[0]
    figure = new_figure(19, 13, "Refining a faulty digit generator, judged on held-out digits")
    parts: Any = figure.subfigures(3, 1, height_ratios=[0.9, 1.0, 1.0])
    top, middle, bottom = parts
    _draw_samples(top, result, first)
    _draw_weights(middle, first)
    axes = bottom.subplots(1, len(TITLES))
    plural = "" if len(result.seeds) == 1 else "s"
    bottom.suptitle(
        f"Held-out measures, {len(result.seeds)} seed{plural} (lines: the seeds, "
        "bars: standard error, dashed: weights that know every fault)",
        fontsize=11,
        color="0.3",
    )
    for column, name in zip(axes, TITLES, strict=True):
        ideal = float(np.mean(result.column("oracle", name)))
        draw_measure(column, name, result.column("before", name), result.column("after", name), ideal)
    return figure


def _draw_samples(figure: Any, result: DemoResult, first: SeedResult) -> None:
    samples = first.refined.samples
    assert samples is not None and samples.after is not None
    panels = [
        ("held-out real digits", samples.real, REAL),
        ("generated", samples.before, BEFORE),
        ("refined", samples.after, AFTER),
        ("highest weights", samples.highest, AFTER),
        ("lowest weights", samples.lowest, BEFORE),
    ]
    axes = figure.subplots(1, 6, gridspec_kw={"wspace": 0.06})
    for column, (title, images, colour) in zip(axes, panels, strict=False):
        column.set_title(title, color=colour, fontweight="bold")
        draw_grid(column, images, 8, 8, _LIMITS)
    axes[5].set_title(f"refused generator, AUC {result.hopeless.fit['auc']:.3f}", color="0.45", fontweight="bold")
    draw_grid(axes[5], result.hopeless_images, 8, 8, _LIMITS)
    axes[5].text(
        0.5,
        -0.03,
        "a mixture that never hits the data's support:\nno reweighting can help",
        transform=axes[5].transAxes,
        ha="center",
        va="top",
        fontsize=9,
        color="0.3",
    )


def _draw_weights(figure: Any, first: SeedResult) -> None:
    log_ratio, axes = (
        first.refined.log_ratio,
        figure.subplots(1, 4, width_ratios=[1.5, 1.1, 0.8, 1.4]),
    )
    kinds = [
        (kind, log_ratio[first.generated.kind == index], colour)
        for index, (kind, colour) in enumerate(zip(KINDS, _KIND_COLOURS, strict=True))
    ]
    draw_log_ratios(axes[0], [("held-out real", first.refined.real_log_ratio, REAL), *kinds])
    axes[0].set_title("log-ratio by kind of sample (the fit never saw the kinds)", fontsize=10)
    draw_weights(axes[1], first.refined.weights, first.refined.ess)
    _draw_shares(axes[2], first)
    _draw_classes(axes[3], first)


def _draw_shares(axes: Axes, first: SeedResult) -> None:
    shares = first.shares()
    for x, which in enumerate(("before", "after")):
        bottom = 0.0
        for kind, colour, share in zip(KINDS, _KIND_COLOURS, shares[which], strict=True):
            axes.bar(x, share, 0.7, bottom=bottom, color=colour)
            if share > 0.025:
                text = f"{kind} {share:.0%}"
                axes.text(x, bottom + share / 2, text, ha="center", va="center", color="white")
            bottom += share
    axes.set_xticks([0, 1], ["generated", "refined"])
    axes.set_yticks([])
    axes.set_title("what the samples are", fontsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_classes(axes: Axes, first: SeedResult) -> None:
    proportions, places = first.class_proportions(), np.arange(10)
    axes.bar(places - 0.2, proportions["before"], 0.4, color=BEFORE, alpha=0.75, label="generated")
    axes.bar(places + 0.2, proportions["after"], 0.4, color=AFTER, label="refined")
    axes.step(
        np.append(places - 0.5, 9.5),
        np.append(proportions["real"], proportions["real"][-1]),
        where="post",
        color=REAL,
        linewidth=1.5,
        label="held-out real",
    )
    axes.set_xticks(places)
    axes.set_yticks([])
    axes.set_title("class proportions of the clean digits", fontsize=10)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center")
    axes.set_ylim(0, 1.25 * max(map(max, proportions.values())))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
