"""What reproduce_vae_digits.py has shown: a table and a picture."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import roofline
from report_common import commit, load, versions

OBJECTIVES = {"elbo": "negative ELBO", "bound": "the bound", "after": "ELBO, then the bound"}
COLUMNS = {
    "train_nll": "train −log p(x)",
    "test_nll": "held-out −log p(x)",
    "reconstruction": "REC",
    "rate": "RATE",
    "earlier_bound": "earlier bound",
    "bound": "bound",
    "mutual_information": "MI",
    "mutual_information_own": "MI, own digits",
}
LAST = ("rate", "bound", "test_nll", "test_effective_draws")


def averaged(document: dict[str, Any], objective: str, name: str) -> list[tuple[int, float, float]]:
    """(epoch, mean, standard error) over seeds; `memorization` is that of the models trained by their ELBO."""
    curves = [
        [{"memorization": each["mean"], "epoch": each["epoch"]} for each in row["memorization"]]
        if name == "memorization"
        else row["curves"][objective]
        for row in document["rows"]
    ]
    found = []
    for points in zip(*curves, strict=True):
        values = [point[name] for point in points]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        found.append((points[0]["epoch"], statistics.fmean(values), error))
    return found


def _mean(values: list[float], digits: int = 2) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


def many_draws(document: dict[str, Any], objective: str, name: str, place: int) -> list[float]:
    """Of each seed, what many draws say after the last epoch (place -1) or the one before."""
    rows = [row["many_draws"] for row in document["rows"] if "many_draws" in row]
    return [row[objective][place][name] for row in rows if objective in row]


def _gain(document: dict[str, Any], place: int) -> str:
    """By how much the bound after the ELBO lowers the ELBO's -log p(x), many draws, seed by seed."""
    pairs = zip(*(many_draws(document, name, "many", place) for name in ("elbo", "after")), strict=True)
    gains = [elbo - after for elbo, after in pairs]
    return _mean(gains) if gains else "–"


def table(document: dict[str, Any]) -> str:
    """The terms after the epochs that were looked at, then what each objective reaches."""
    facts, settings = document["facts"], document["settings"]
    lines = [
        f"| epoch | {' | '.join(COLUMNS.values())} | memorisation |",
        f"|---|{'---|' * (len(COLUMNS) + 1)}",
    ]
    columns = [averaged(document, "elbo", name) for name in (*COLUMNS, "memorization")]
    for points in zip(*columns, strict=True):
        cells = [
            f"{mean:.3g} ± {error:.1g}" if abs(mean) < 10 else f"{mean:.1f} ± {error:.1g}" for _, mean, error in points
        ]
        lines.append(f"| {points[0][0]} | {' | '.join(cells)} |")
    lines += [
        "",
        "| trained by | RATE | bound | held-out −log p(x) | effective draws | by many | effective | a look before |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for objective, title in OBJECTIVES.items():
        last = {name: [row["curves"][objective][-1][name] for row in document["rows"]] for name in LAST}
        cells = [_mean(last[name], 0 if name == "test_effective_draws" else 2) for name in LAST]
        for name, place, digits in (("many", -1, 2), ("many_effective", -1, 0), ("many", -2, 2)):
            values = many_draws(document, objective, name, place)
            cells.append(_mean(values, digits) if values else "–")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    epochs = settings["epochs"]
    gains = [_gain(document, place) for place in (-2, -1)]
    minutes = sum(row["cpu_seconds"] for row in document["rows"]) / 60
    lines.append(
        f"\nNats a digit, {len(document['rows'])} seeds, mean ± standard error; {settings['train']} binary digits "
        f"train the VAE, {settings['other']} others the second decoder of MI (own digits: the first decoder's), the "
        f"rest is held out. Likelihoods by {settings['draws']} importance draws: a narrow posterior leaves few of them "
        f"effective and −log p(x) too high. By many: {settings['many_draws']:,}, of {settings['many_digits']} "
        f"held-out digits and {len(many_draws(document, 'elbo', 'many', -1))} seeds. The first table is trained by "
        f"the ELBO; the second is after epoch {epochs[-1]} (a look before: {epochs[-2]}), and switches to the bound "
        f"after {settings['warm_epochs']} epochs where it says so: −log p(x) by many is then lower than the "
        f"ELBO's, seed by seed, by {gains[0]} at the look before and by {gains[1]} at last. "
        f"{minutes:.0f} CPU minutes on {facts['cpu']}, {versions(facts)}."
    )
    return "\n".join(lines)


def vae_digits() -> str:
    result = load("vae_digits")
    return f"{table(result)}\n\n![The bound over training](vae_digits.png)" if result else ""


def draw(document: dict[str, Any], path: Path) -> None:
    """Bounds and likelihoods, gap and memorisation, MI by both second decoders, and the three objectives."""
    facts = document["facts"]
    title = (
        f"VAE on {document['settings']['train']} binary digits, {len(document['rows'])} seeds, bars: standard errors; "
        f"{commit(facts)}"
    )
    figure = roofline.sheet(12.5, 8.5, title)
    panels = list(figure.subplots(2, 2).flat)
    blue, orange, green, pink = roofline.COLOURS[:4]

    def line(axes: Any, name: str, label: str, colour: str, style: str = "-", objective: str = "elbo") -> None:
        points = averaged(document, objective, name)
        if axes in (panels[0], panels[3]) and len(points) > 3:
            points = points[2:]  # the first fall, alike for all, would hide the rest
        epochs, means, errors = zip(*points, strict=True)
        axes.errorbar(epochs, means, errors, color=colour, linestyle=style, marker="o", ms=4, capsize=3, label=label)

    line(panels[0], "bound", "bound", blue, "--")
    line(panels[0], "earlier_bound", "earlier bound", orange, "--")
    line(panels[0], "test_nll", "held-out −log p(x)", "black")
    line(panels[0], "train_nll", "training −log p(x)", "0.55")
    panels[0].set_title("trained by the negative ELBO", fontsize=10)
    line(panels[1], "gap", "held-out − training −log p(x)", "black")
    line(panels[1], "memorization", "memorisation score", pink)
    line(panels[1], "generator_term", "generator term of the bound", blue, "--")
    panels[1].set_title("what the bound's last term is about", fontsize=10)
    line(panels[2], "mutual_information", "MI, second decoder on other digits", blue)
    line(panels[2], "mutual_information_own", "MI, on the first decoder's own", green)
    line(panels[2], "likelihood_gap", "difference of losses, on other digits", blue, ":")
    line(panels[2], "likelihood_gap_own", "difference of losses, on its own", green, ":")
    panels[2].set_title("the generator's mutual information, by definition and by shortcuts", fontsize=10)
    for (objective, title), colour in zip(OBJECTIVES.items(), (blue, orange, green), strict=True):
        line(panels[3], "test_nll", f"{title}: held-out", colour, "-", objective)
        line(panels[3], "train_nll", f"{title}: training", colour, ":", objective)
    for objective, colour in (("elbo", blue), ("after", green)):
        looks = [many_draws(document, objective, name, place) for place in (-2, -1) for name in ("epoch", "many")]
        if all(looks):
            means = [statistics.fmean(values) for values in looks]
            label = f"{OBJECTIVES[objective]}: many draws"
            panels[3].plot(means[::2], means[1::2], "*", color=colour, ms=11, mec="black", mew=0.6, label=label)
    panels[3].set_title("−log p(x) by what is minimised", fontsize=10)
    for axes in panels:
        axes.set(xscale="log", xlabel="epochs", ylabel="nats a digit")
        axes.set_xticks(document["settings"]["epochs"], list(map(str, document["settings"]["epochs"])))
        axes.minorticks_off()
        axes.grid(True, which="major", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        place = {"loc": "upper right", "bbox_to_anchor": (1.0, 0.93), "fontsize": 8} if axes is panels[3] else {}
        axes.legend(**{"fontsize": 9, "frameon": False, **place})
    for axes in (panels[0], panels[3]):
        shown = document["settings"]["epochs"]
        axes.set_xlim(0.85 * shown[2 if len(shown) > 3 else 0], 1.15 * shown[-1])
    roofline.keep(figure, document["rows"], path)
