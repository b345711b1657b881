"""What the swiss rolls that reproduce_swiss_roll.py made have shown of the bound: tables and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import roofline
from report_common import RESULTS, commit, load, versions

Row = dict[str, Any]
BASE = {"m": 200, "T": 1.0}
BATCH = 256  # of swiss_roll.py, which needs torch
VARIED = {"T": "diffusion time T", "m": "training samples m"}
BLACK, GREY, BLUE, ORANGE, GREEN, PINK = "black", "0.55", *(roofline.COLOURS[i] for i in (0, 1, 2, 3))


def weight(document: dict[str, Any]) -> float:
    """sqrt(2) R, of B and C."""
    return math.sqrt(2) * document["settings"]["sub_gaussian"]


TERMS = {"A": "mutual_information", "B": "prior_gap", "C": "generator", "L_sm": "score_matching", "bound": "bound"}


def term(name: str) -> Callable[[Row], float]:
    sign = -1 if name == "A" else 1
    return lambda row: sign * row["bound"][TERMS[name]]["value"]


def published_bound(document: dict[str, Any]) -> Callable[[Row], float]:
    """As the published swiss-roll script adds it up."""
    factor = weight(document)

    def value(row: Row) -> float:
        published = row["published"]
        return published["A_deviation"] + factor * (term("B")(row) + published["C_from_data"]) + row["loss"]

    return value


def batched_bound(document: dict[str, Any]) -> Callable[[Row], float]:
    """With the shortcuts of the published image scripts: mixtures over batches, no root in B."""
    factor = weight(document)

    def value(row: Row) -> float:
        published = row["published"]
        return published["A_batches"] + factor * (published["B_no_root"] + term("C")(row)) + term("L_sm")(row)

    return value


def test(name: str) -> Callable[[Row], float]:
    return lambda row: row["test"][name]


def sweep(rows: Sequence[Row], name: str) -> dict[float, list[Row]]:
    """The rows in which nothing but `name` differs from the base, by its values."""
    (other,) = set(BASE) - {name}
    values = sorted({row[name] for row in rows if row[other] == BASE[other]})
    return {v: [row for row in rows if row[name] == v and row[other] == BASE[other]] for v in values}


def mean_and_error(rows: Sequence[Row], value: Callable[[Row], float]) -> tuple[float, float]:
    """Over the repeats."""
    values = [value(row) for row in rows]
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def minimiser(found: dict[float, list[Row]], value: Callable[[Row], float]) -> tuple[float, list[float]]:
    """Where the mean over the repeats is smallest, and where each repeat's own value is."""
    means = {at: mean_and_error(rows, value)[0] for at, rows in found.items()}
    repeats = range(min(len(rows) for rows in found.values()))
    each = [min(found, key=lambda at: value(found[at][repeat])) for repeat in repeats]
    return min(means, key=lambda at: means[at]), each


def rank_correlation(
    found: dict[float, list[Row]], one: Callable[[Row], float], other: Callable[[Row], float]
) -> float:
    """Spearman's, of the means over the repeats."""
    from scipy.stats import spearmanr

    means = [[mean_and_error(rows, value)[0] for rows in found.values()] for value in (one, other)]
    return float(spearmanr(*means).statistic)


def cell(rows: Sequence[Row], value: Callable[[Row], float]) -> str:
    mean, error = mean_and_error(rows, value)
    return f"{mean:.3g} ± {error:.1g}"


def _sweep_table(document: dict[str, Any], name: str) -> list[str]:
    factor = weight(document)
    columns: dict[str, Callable[[Row], float]] = {
        "A": term("A"),
        "√2·R·B": lambda row: factor * term("B")(row),
        "√2·R·C": lambda row: factor * term("C")(row),
        "L_sm": term("L_sm"),
        "bound": term("bound"),
        "published script's bound": published_bound(document),
        "test KL": test("kl"),
        "published estimate": test("published"),
    }
    lines = [f"| {name} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for at, rows in sweep(document["rows"], name).items():
        steps = f" ({rows[0]['epochs'] * math.ceil(at / BATCH):,} Adam steps)" if name == "m" else ""
        lines.append(f"| {at:g}{steps} | {' | '.join(cell(rows, value) for value in columns.values())} |")
    return lines


def answer(document: dict[str, Any]) -> str:
    """Whether the bound's T is near that of the best test KL, in numbers; whether both fall with m."""
    found = sweep(document["rows"], "T")
    best, best_each = minimiser(found, test("kl"))
    claims = []
    bounds = {
        "bound": term("bound"),
        "published script's bound": published_bound(document),
        "bound with mixtures over batches and without B's root": batched_bound(document),
    }
    for title, value in bounds.items():
        at, each = minimiser(found, value)
        distances = [abs(one - other) for one, other in zip(each, best_each, strict=True)]
        claims.append(
            f"{title}: smallest at T = {at:g} ({', '.join(f'{v:g}' for v in each)} in the repeats), "
            f"{statistics.fmean(distances):.2g} from the repeat's best on average, Spearman's ρ with the test KL "
            f"{rank_correlation(found, value, test('kl')):+.2f}"
        )
    sizes = sweep(document["rows"], "m")
    over_m = rank_correlation(sizes, term("bound"), test("kl"))
    return (
        f"The test KL is smallest at T = {best:g} ({', '.join(f'{v:g}' for v in best_each)} in the repeats). "
        f"{'; '.join(claims)}. Over m, ρ of bound and test KL is {over_m:+.2f}."
    )


def _arms(document: dict[str, Any]) -> list[str]:
    rows = document["objective"]
    columns: dict[str, Callable[[Row], float]] = {
        "T": lambda row: row["T"],
        "test KL": test("kl"),
        "by fifth neighbours": test("neighbours"),
        "held-out −log q (nats)": test("nats"),
        "off the roll": test("off_the_roll"),
        "bound": term("bound"),
        "L_sm": term("L_sm"),
    }
    lines = [
        f"| diffusion time | networks' loss | {' | '.join(columns)} | better than the first (test KL) |",
        f"|---|---|{'---|' * len(columns)}---|",
    ]
    first = [row for row in rows if row["arm"] == "fixed"]
    for arm, titles in ARMS.items():
        own = [row for row in rows if row["arm"] == arm]
        won = sum(test("kl")(a) < test("kl")(b) for a, b in zip(own, first, strict=True))
        count = "" if arm == "fixed" else f"{won} of {len(own)} seeds"
        lines.append(f"| {' | '.join(titles)} | {' | '.join(cell(own, v) for v in columns.values())} | {count} |")
    return lines


def table(document: dict[str, Any]) -> str:
    facts, settings = document["facts"], document["settings"]
    floor = document["floor"]
    own, neighbours, published = (
        statistics.fmean(row[name] for row in floor) for name in ("kl", "neighbours", "published")
    )
    return "\n".join(
        [
            *_sweep_table(document, "T"),
            "",
            *_sweep_table(document, "m"),
            "",
            "Published script's bound: σ_T for the variance in A, the score's norm along a path that starts from the "
            "data in C, the training loss for L_sm; ours counts L_sm from t = 0.001. Test KL: the true density against "
            "a kernel density of the generated samples, its bandwidth cross-validated; published: two kernel densities "
            "of bandwidth 0.1.",
            "",
            f"{answer(document)} True samples in the place of generated ones have a test KL of {own:.2g}, by the "
            f"published estimate {published:.2g}, by distances to fifth neighbours {neighbours:.1g}.",
            "",
            *_arms(document),
            "",
            f"Mean ± standard error over {settings['repeats']} repeats, {settings['seeds']} seeds of the objectives; "
            f"{settings['epochs']:,} epochs, R = {settings['sub_gaussian']:g}, N = {settings['steps']:,}. "
            f"{versions(facts)}.",
        ]
    )


ARMS = {
    "fixed": ("1", "denoising"),
    "learned": ("learned", "denoising"),
    "penalised": ("1", "denoising + √2·R·C"),
    "bounded": ("learned", "denoising + √2·R·C"),
}


def swiss_roll() -> str:
    result = load("swiss_roll")
    pictures = "![Terms, bounds and test KL](swiss_roll_time.png)\n\n![Samples](swiss_roll_samples.png)"
    return f"{table(result)}\n\n{pictures}" if result else ""


# ---- Pictures.

Line = tuple[str, str, str, Callable[[Row], float]]  # label, colour, line style, value


def _lines(axes: Any, found: dict[float, list[Row]], lines: Sequence[Line], name: str, label: str) -> None:
    for title, colour, style, value in lines:
        means, errors = zip(*(mean_and_error(rows, value) for rows in found.values()), strict=True)
        axes.errorbar(
            list(found),
            means,
            errors,
            color=colour,
            linestyle=style,
            marker="o",
            ms=3.5,
            lw=1.5,
            capsize=2.5,
            label=title,
        )
    axes.set(xlabel=VARIED[name], ylabel=label)
    if name == "m":
        axes.set_xscale("log")
        axes.set_xticks(list(found), [f"{value:g}" for value in found])
        axes.minorticks_off()
    axes.grid(True, which="major", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def draw(document: dict[str, Any], path: Path) -> None:
    """Over T and over m: test KL, bounds, terms; then each term beside its published shortcuts over T."""
    factor, settings = weight(document), document["settings"]
    title = (
        f"Swiss roll: m = 200 over T, T = 1 over m, {settings['repeats']} repeats (bars: standard error; stars: "
        f"smallest), R = {settings['sub_gaussian']:g}, N = {settings['steps']:,}\n{settings['epochs']:,} epochs; "
        f"{commit(document['facts'])}"
    )
    figure = roofline.sheet(14.5, 13, title)
    grid = figure.subplots(3, 3)
    kl: list[Line] = [
        ("true density, cross-validated KDE", BLACK, "-", test("kl")),
        ("fifth neighbours", GREEN, "-", test("neighbours")),
        ("published: both KDE, bandwidth 0.1", ORANGE, "--", test("published")),
    ]
    bounds: list[Line] = [
        ("bound", BLACK, "-", term("bound")),
        ("as the published toy script", ORANGE, "--", published_bound(document)),
        ("batches of 64, no root in B", PINK, "--", batched_bound(document)),
    ]
    terms: list[Line] = [
        ("A", BLUE, "-", term("A")),
        ("√2·R·B", GREEN, "-", lambda row: factor * term("B")(row)),
        ("√2·R·C", PINK, "-", lambda row: factor * term("C")(row)),
        ("L_sm", ORANGE, "-", term("L_sm")),
    ]
    floor = statistics.fmean(row["kl"] for row in document["floor"])
    for axes, name in zip(grid[:2], VARIED, strict=True):
        found = sweep(document["rows"], name)
        _lines(axes[0], found, kl, name, "test KL (nats)")
        axes[0].axhline(floor, color=GREY, lw=1, ls=":")
        at, align = (0.99, "right") if name == "T" else (0.01, "left")
        axes[0].annotate(
            "true samples", (at, floor), (0, 2), ("axes fraction", "data"), "offset points", ha=align, fontsize=8
        )
        _lines(axes[1], found, bounds, name, "bound (nats)")
        _lines(axes[2], found, terms, name, "terms (nats)")
        for panel, lines in ((axes[0], kl), (axes[1], bounds)):
            for _, colour, _, value in lines:
                at, _ = minimiser(found, value)
                panel.plot(at, mean_and_error(found[at], value)[0], "*", color=colour, ms=13, mec="white", zorder=5)
    grid[1][0].set_yscale("log")
    found = sweep(document["rows"], "T")
    shortcuts: list[tuple[str, list[Line]]] = [
        (
            "A (nats)",
            [
                ("definition", BLUE, "-", term("A")),
                ("mixtures over batches of 64", PINK, "--", lambda row: row["published"]["A_batches"]),
                ("σ for the variance", ORANGE, "--", lambda row: row["published"]["A_deviation"]),
            ],
        ),
        (
            "B",
            [
                ("definition: mean of √KL", GREEN, "-", term("B")),
                ("no root: mean KL", PINK, "--", lambda row: row["published"]["B_no_root"]),
            ],
        ),
        (
            "C, L_sm",
            [
                ("C, definition", PINK, "-", term("C")),
                ("C, path from the data", PINK, "--", lambda row: row["published"]["C_from_data"]),
                ("L_sm, definition", ORANGE, "-", term("L_sm")),
                ("L_sm, training loss", ORANGE, "--", lambda row: row["loss"]),
            ],
        ),
    ]
    for axes, (label, lines) in zip(grid[2], shortcuts, strict=True):
        _lines(axes, found, lines, "T", label)
    grid[2][1].set_yscale("log")
    roofline.keep(figure, document["rows"], path, dpi=85)


def draw_samples(document: dict[str, Any], path: Path) -> None:
    """What the first repeat's networks generate, over T and over m."""
    import numpy as np

    with np.load(RESULTS / "swiss_roll.npz") as file:
        kept = {name: file[name].astype(float) for name in file.files}
    over_time = [(f"T = {t}", f"m200_T{t}") for t in ("0.2", "0.4", "0.6", "1", "1.8")]
    over_size = [(f"m = {m}", f"m{m}_T1") for m in (10, 50, 200, 500, 2000)]
    title = "Generated (blue) over true samples (grey): m = 200 above, T = 1 below; the first repeat"
    figure = roofline.sheet(15, 6.4, title)
    rows = {(row["m"], row["T"]): row for row in document["rows"] if row["repeat"] == 0}
    for line, panels in zip(figure.subplots(2, 5), (over_time, over_size), strict=True):
        for axes, (title, name) in zip(line, panels, strict=True):
            size, _, time = name[1:].partition("_T")
            axes.scatter(*kept["truth"].T, s=6, color="0.75", linewidths=0)
            axes.scatter(*kept[name].T, s=6, color=BLUE, linewidths=0)
            axes.set_title(f"{title}, test KL {rows[int(size), float(time)]['test']['kl']:.2f}", fontsize=10)
            axes.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), xticks=[], yticks=[], aspect="equal")
    roofline.keep(figure, document["rows"], path)
