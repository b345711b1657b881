"""What the certificates that bench_certificate.py made have shown: tables and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import roofline
from report_common import commit, load

SHOWN = (100, 1000, 10_000)  # of n, and of N
BOUNDS = {
    "bound": "the bound",
    "no_confidence": "without its confidence term",
    "one_complexity": "R̂ₙ once, no confidence term",
    "training": "training IPM alone",
}
PROVEN = {"better_where_proven": "proven nearer (are)", "improved_where_certified": "improvement certified (is one)"}
DRAWN = "mixture, 2-D"
BASE = {"divergence": "kl", "n": 1000, "num_fake": 1000, "norm_bound": 3.0}


def _varied(rows: list[dict[str, Any]], problem: str, name: str | None) -> list[dict[str, Any]]:
    """The problem's rows in which nothing but `name` differs from the base, in its order."""
    kept = {key: value for key, value in BASE.items() if key != name}
    found = [row for row in rows if row["problem"] == problem and kept.items() <= row.items()]
    return sorted(found, key=lambda row: row[name]) if name else found


def _percent(value: float) -> str:
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def _worst(shares: list[dict[str, Any]]) -> str:
    """The largest rate of all settings, with its interval where nothing was seen."""
    worst = max(shares, key=lambda share: (share["count"] / share["of"], share["high"]))
    if worst["count"]:
        return _percent(worst["count"] / worst["of"])
    return f"0 of {worst['of']} (at most {_percent(worst['high'])})"


def _violations(document: dict[str, Any]) -> list[str]:
    rows = document["rows"]
    lines = [
        f"| discriminators | certificates | {' | '.join([*BOUNDS.values(), *PROVEN.values()])} |",
        f"|---|---|{'---|' * (len(BOUNDS) + len(PROVEN))}",
    ]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        own = [row for row in rows if row["problem"] == problem]
        cells = [_worst([row["violated"][name] for row in own]) for name in BOUNDS]
        for name in PROVEN:
            proven, true = (sum(row[name][key] for row in own) for key in ("of", "count"))
            cells.append(f"{proven:,} ({true:,})")
        lines.append(f"| {problem} | {sum(row['repetitions'] for row in own):,} | {' | '.join(cells)} |")
    return lines


def _sizes(document: dict[str, Any]) -> list[str]:
    rows = document["rows"]
    columns = {
        "unrefined_truth": "IPM(P, Q)",
        "truth": "IPM(P, Q̂)",
        "bound": "its bound",
        "unrefined_bound": "bound of IPM(P, Q)",
    }
    lines = [
        f"| discriminators | n | {' | '.join(columns.values())} | margin over needed | better |",
        f"|---|---|{'---|' * len(columns)}---|---|",
    ]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        for row in _varied(rows, problem, "n"):
            if row["n"] in SHOWN:
                cells = [f"{row['mean'][name]:.3g}" for name in columns]
                cells += [f"{row['margin_over_needed']:.0f}×", _percent(row["better"]["count"] / row["better"]["of"])]
                first = problem if row["n"] == SHOWN[0] else ""
                lines.append(f"| {first} | {row['n']:,} | {' | '.join(cells)} |")
    return lines


def _generator(document: dict[str, Any]) -> str:
    """What it costs if the model is not the generated sample but its generator."""
    rows = [row for row in _varied(document["rows"], DRAWN, "num_fake") if row["num_fake"] in SHOWN]
    sizes, sample, generator = (
        ", ".join(texts)
        for texts in (
            [f"{row['num_fake']:,}" for row in rows],
            *([f"{row['mean'][name]:.3g}" for row in rows] for name in ("truth", "generator")),
        )
    )
    return (
        f"The bound is about the sample: from N = {sizes} generated samples ({DRAWN}), IPM(P, Q̂) is {sample} for the "
        f"refined sample, and {generator} for the generator refined by the same discriminator. "
    )


def table(document: dict[str, Any]) -> str:
    """How often each bound is violated in its worst setting, then how large everything is as n grows."""
    facts, rows = document["facts"], document["rows"]
    at_most = max(row["repetitions"] for row in rows)
    note = (
        f"\nδ = {document['delta']:g}, {at_most} certificates a setting; violations in the worst setting of each "
        "problem, over n, N, B and five divergences. Proven nearer: the refined sample's bound is below what the same "
        "certificate says IPM(P, Q) is at least. Improvement certified: of the dual objective on unseen data.\n"
    )
    end = (
        f"\nMeans for the class of norm bound 1, `kl`, N = {BASE['num_fake']:,}, B = {BASE['norm_bound']:g}. Margin: "
        f"what the bound adds to the training IPM, over the least that {1 - document['delta']:.0%} of samples need. "
        f"{_generator(document)}"
        f"{document['cpu_seconds'] / 60:.0f} CPU minutes on {facts['cpu']}, torch {facts['torch']}, commit "
        f"{facts['commit']}, {facts['date']}."
    )
    return "\n".join([*_violations(document), note, *_sizes(document), end])


def certificate() -> str:
    result = load("certificate")
    return f"{table(result)}\n\n![Bounds and truths](certificate.png)" if result else ""


def draw(document: dict[str, Any], path: Path) -> None:
    """Bounds and truths as n, B and N grow, and how often bounds are violated."""
    rows, facts = document["rows"], document["facts"]
    title = f"{DRAWN}, kl, n = N = 1000 and B = 3 where not varied; IPM of the class of norm bound 1; {commit(facts)}"
    figure = roofline.sheet(12.5, 8.5, title)
    panels = figure.subplots(2, 2).flat
    black, orange, blue, green = "black", *(roofline.COLOURS[i] for i in (1, 0, 2))
    lines = {
        "unrefined_bound": ("bound, unrefined", orange, "--"),
        "bound": ("bound, refined", blue, "--"),
        "training": ("on training data, refined", black, ":"),
        "unrefined_truth": ("truth, unrefined", orange, "-"),
        "truth": ("truth, refined", blue, "-"),
    }
    generator = {
        "unrefined_generator": ("truth, generator", "0.6", "-"),
        "generator": ("truth, refined generator", green, "-"),
    }
    axes_of = {"n": "real samples n", "norm_bound": "norm bound B", "num_fake": "generated samples N"}
    for axes, (name, label) in zip(panels, axes_of.items(), strict=False):
        varied = _varied(rows, DRAWN, name)
        for key, (title, colour, style) in (lines | generator if name == "num_fake" else lines).items():
            values = [row["mean"][key] for row in varied]
            axes.plot([row[name] for row in varied], values, style, color=colour, marker="o", ms=4, label=title)
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.yaxis.set_minor_formatter("")
        axes.grid(True, which="major", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("IPM to the truth P")
    handles = panels[2].get_legend_handles_labels()
    _draw_violations(panels[3], document)
    figure.legend(*handles, loc="outside lower left", ncols=4, fontsize=10, frameon=False)
    roofline.keep(figure, rows, path)


def _draw_violations(axes: Any, document: dict[str, Any]) -> None:
    """At the base setting, with the intervals' ends."""
    rows = document["rows"]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    for index, (name, title) in enumerate(BOUNDS.items()):
        for place, problem in enumerate(problems):
            (row,) = _varied(rows, problem, None)
            share = row["violated"][name]
            height = place + 0.17 * (index - 1.5)
            colour = roofline.COLOURS[(0, 2, 4, 1)[index]]
            axes.plot([share["low"], share["high"]], [height, height], color=colour, linewidth=1.5)
            rate = share["count"] / share["of"]
            axes.plot(rate, height, "o", color=colour, markersize=4, label=None if place else title)
    axes.axvline(document["delta"], color="black", linewidth=1, linestyle=":")
    axes.set(xscale="symlog", yticks=range(len(problems)), yticklabels=problems, xlabel="share violated (dotted: δ)")
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlim(-0.001, 1.05)
    axes.set_xticks([0, 0.01, 0.05, 0.1, 0.3, 1], ["0", "1%", "5%", "10%", "30%", "100%"])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
