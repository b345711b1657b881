"""The demonstration of latent refinement: a GAN, a VAE and a normalizing flow of handwritten digits, refined in their
latent spaces by a discriminator and judged on digits that nobody trained on.

Half of scikit-learn's digits trains the generators and the discriminators. Of the other half a third stops the flow,
and the rest judges.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .demo import LEVELS, load_digits, require_extras
from .demo_summary import gains, mean_and_error
from .measures import TITLES, TwoSample, two_sample
from .threads import at_most_threads

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

MODELS = ("GAN", "VAE", "normalizing flow")
# name -> title; all start at the same latents
METHODS = {
    "before": "generated",
    "flow_kl": "flow, KL",
    "flow_js": "flow, JS",
    "langevin": "Langevin",
}
# Of images in [0, 1]: the discriminators tell noisy digits from noisy samples, so that their supports overlap.
_INSTANCE_NOISE = 0.15
_GENERATED = 4000
_FLOW_STEPS, _LANGEVIN_STEPS, _PATIENCE = 40, 100, 8


@dataclass
class Outcome:
    """One generator in one repetition: measures and images of every method, and how the refinement went."""

    measures: dict[str, TwoSample]
    images: dict[str, np.ndarray]
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {**{k: m.to_dict() for k, m in self.measures.items()}, **self.facts}


def _pixels(images: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(images.reshape(len(images), -1) / np.float32(LEVELS))


def _grey(x: Tensor) -> np.ndarray:
    """Images [n, 8, 8] rounded to the grey levels that real ones have."""
    return np.round(LEVELS * x.clamp(0.0, 1.0).numpy()).reshape(-1, 8, 8)


def refine_generator(name: str, seed: int, effort: float = 1.0) -> Outcome:
    """Train a generator and a discriminator, refine samples by every method, judge all of them.

    Args:
        name: of MODELS.
        seed: of the split, the training and the draws.
        effort: scales iterations, samples and steps, for a quick look.
    """
    import torch

    from .demo_generators import train_generator
    from .fit import fit_discriminator
    from .latent import latent_flow, latent_langevin

    digits = load_digits(seed)
    train = _pixels(digits.train)
    stop, judge = np.split(digits.held_out, [len(digits.held_out) // 3])
    judge = judge[: max(200, round(effort * len(judge)))]
    generator = train_generator(name, train, seed=seed, effort=effort)
    noise = torch.Generator().manual_seed(seed)

    def noisy(x: Tensor) -> Tensor:
        return x + _INSTANCE_NOISE * torch.randn(x.shape, generator=noise)

    discriminator = fit_discriminator(
        noisy(train),
        noisy(generator.draw(max(500, round(effort * _GENERATED)), seed=2 * seed)[1]),
        objective="logistic",
        hidden=(128, 128),
        max_epochs=max(5, round(60 * effort)),
        seed=seed,
        progress=False,
    )
    z, x = generator.draw(len(judge), seed=2 * seed + 1)
    common: dict[str, Any] = {"seed": seed, "progress": False}
    steps = {"flow": max(4, round(effort * _FLOW_STEPS)), "langevin": max(4, round(effort * _LANGEVIN_STEPS))}
    flows = {
        f"flow_{short}": latent_flow(
            generator,
            discriminator,
            z,
            steps=steps["flow"],
            step_size=step_size,
            noise=0.1,
            prior="normal",
            divergence=divergence,
            early_stop=_pixels(stop),
            patience=_PATIENCE,
            **common,
        )
        for short, divergence, step_size in (("kl", "kl", 0.05), ("js", "jensen_shannon", 0.1))
    }
    chains = latent_langevin(
        generator, discriminator, z, steps=steps["langevin"], step_size=0.2, metropolis=True, **common
    )
    assert chains.acceptance is not None and discriminator.report is not None
    samples = {"before": x, **{k: flow.x for k, flow in flows.items()}, "langevin": chains.x}
    images = {k: _grey(v) for k, v in samples.items()}
    facts = {
        "temperature": discriminator.temperature,
        "auc_of_discriminator": discriminator.report.auc,
        "log_ratio": {k: float(discriminator.log_ratio(v).mean()) for k, v in samples.items()},
        "iterate": {k: flow.step for k, flow in flows.items()},
        "acceptance": float(chains.acceptance.mean()),
    }
    return Outcome({k: two_sample(judge, v, seed=seed) for k, v in images.items()}, {"real": judge, **images}, facts)


def _column(outcomes: list[dict[str, Outcome]], model: str, method: str, measure: str) -> list[float]:
    return [getattr(outcome[model].measures[method], measure) for outcome in outcomes]


def _report(outcomes: list[dict[str, Outcome]], seed: int) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    improved: dict[str, Any] = {}
    worse = []
    for model in MODELS:
        summary[model], improved[model] = {}, {}
        for measure, (title, _) in TITLES.items():
            columns = {method: _column(outcomes, model, method, measure) for method in METHODS}
            summary[model][measure] = {method: mean_and_error(values) for method, values in columns.items()}
            before = columns.pop("before")
            gained = {method: gains(measure, before, values) for method, values in columns.items()}
            improved[model][measure] = {method: int((gain > 0).sum()) for method, gain in gained.items()}
            worse += [f"{model}, {METHODS[method]}: {title}" for method, gain in gained.items() if gain.mean() < 0]
    return {
        "summary": summary,
        "seeds_improved": improved,
        "not_improved": worse,
        "seeds": [
            {"seed": seed + k, **{model: outcome[model].to_dict() for model in MODELS}}
            for k, outcome in enumerate(outcomes)
        ],
    }


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text: a model's measure, then mean ± standard error of every method."""
    rows: list[tuple[str, ...]] = [("", "held-out measure", *METHODS.values(), "")]
    for model, measures in report["summary"].items():
        for measure, (title, direction) in TITLES.items():
            cells = []
            for method in METHODS:
                value = measures[measure][method]
                digits = 4 if measure == "mmd2" else 3
                error = "" if value["stderr"] is None else f" ± {value['stderr']:.{digits}f}"
                cells.append(f"{value['mean']:.{digits}f}{error}")
            rows.append((model if measure == "auc" else "", title, *cells, direction))
    return rows


def draw(outcomes: list[dict[str, Outcome]]) -> Figure:
    """Samples of the first repetition before and after, and the measures of all."""
    from .report import AFTER, BEFORE, REAL, draw_grid, draw_measure, new_figure

    figure = new_figure(23, 11, "A GAN, a VAE and a flow refined in latent space, judged on held-out digits")
    panels = ("real", "before", "flow_kl", "langevin")
    titles = {"real": "held-out real digits", **METHODS}
    colours = {"real": REAL, "before": BEFORE}
    axes: Any = figure.subplots(
        len(MODELS), len(panels) + len(TITLES), gridspec_kw={"width_ratios": [1.25] * len(panels) + [1.0] * len(TITLES)}
    )
    for row, model in zip(axes, MODELS, strict=True):
        for column, name in zip(row, panels, strict=False):
            colour = colours.get(name, AFTER)
            title = titles[name] if name == "real" else f"{model}, {titles[name]}"
            column.set_title(title, color=colour, fontweight="bold", fontsize=11)
            draw_grid(column, outcomes[0][model].images[name], 8, 8, (0.0, float(LEVELS)))
        for column, measure in zip(row[len(panels) :], TITLES, strict=True):
            before, after = (_column(outcomes, model, method, measure) for method in ("before", "flow_kl"))
            draw_measure(column, measure, before, after)
    return figure


def run(out: Path, *, seeds: int = 5, seed: int = 0, progress: bool = True, effort: float = 1.0) -> dict[str, Any]:
    """The whole demonstration; writes ``report.json`` and ``demo_latent.png`` into a folder.

    Args:
        out: the folder; made if it does not exist.
        seeds: how many independent repetitions (split, training and draws).
        seed: of the first; the others follow.
        progress: show a bar.
        effort: scales iterations, samples and steps, for a quick look.

    Returns:
        The report: means and standard errors (``summary``), in how many repetitions each measure improved
        (``seeds_improved``), what did not improve on average (``not_improved``), and every repetition (``seeds``).

    Raises:
        ModuleNotFoundError: scikit-learn or matplotlib is missing.
    """
    require_extras()
    from tqdm import tqdm

    from .report import save_figure, save_json

    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[dict[str, Outcome]] = [{} for _ in range(seeds)]
    with at_most_threads(1), tqdm(total=seeds * len(MODELS), desc="generators", disable=not progress) as bar:
        for k, outcome in enumerate(outcomes):
            for model in MODELS:
                outcome[model] = refine_generator(model, seed + k, effort)
                bar.update()
    report = _report(outcomes, seed)
    save_json(report, out / "report.json")
    save_figure(draw(outcomes), out / "demo_latent.png")
    return report
