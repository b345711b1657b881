"""The demonstration of guidance: a small diffusion of handwritten digits, trained too little, guided by a
discriminator and judged on digits that nobody trained on.

Half of scikit-learn's digits trains the denoiser, and then the discriminator against samples of the denoiser; the
other half judges. All samplers start at the same noise, so that what differs is the guidance.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .demo import LEVELS, load_digits, require_extras
from .demo_summary import as_text, gains, mean_and_error
from .diffusion_discriminator import DiffusionFitReport
from .measures import TITLES, TwoSample, two_sample
from .threads import at_most_threads
from .time_networks import Condition

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is judged, and its title.
COLUMNS = {
    "before": "generated",
    "after": "guided",
    "doubled": "guided, w = 2",
    "longer": "trained twice as long",
    "real": "training digits",
}
_STEPS, _BATCH, _RATE = 1500, 128, 2e-3
_GENERATED = 2400
# Of the sampler, for data in [-1, 1]: below the first, what is left of the noise vanishes in the grey levels.
_SAMPLER: dict[str, Any] = {"num_steps": 18, "sigma_min": 0.02, "sigma_max": 20.0}
# Of the discriminator: above two and a half standard deviations of the data it has nothing to tell apart here.
_RANGE: dict[str, Any] = {"sigma_min": 0.05, "sigma_max": 2.0}


class Denoiser(nn.Module):
    """``D(x; sigma) = c_skip x + c_out F(c_in x, log sigma)`` of [B, 1, 8, 8] digits, F an MLP.

    Source: Karras et al. 2022, table 1.
    """

    deviation = 0.75  # of the pixels of all digits, in [-1, 1]

    def __init__(self, width: int = 384) -> None:
        super().__init__()
        self.condition = Condition(64)
        self.layers = nn.ModuleList([nn.Linear(64, width), nn.Linear(width, width)])
        self.shifts = nn.ModuleList(nn.Linear(64, width) for _ in self.layers)
        self.last = nn.Linear(width, 64)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.reshape(-1, 1)
        total = level.square() + self.deviation**2
        state, condition = x.flatten(1) * total.rsqrt(), self.condition(sigma, None)
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            state = nn.functional.silu(layer(state) + shift(condition))
        skip = self.deviation**2 / total * x.flatten(1)
        return (skip + level * self.deviation * total.rsqrt() * self.last(state)).reshape(x.shape)


def train_denoiser(digits: Tensor, steps: int, seed: int) -> Denoiser:
    """A denoiser after so many steps of Adam, on levels with log sigma ~ N(-0.8, 1.2^2)."""
    from .training import isolated_rng

    with isolated_rng(seed, torch.device("cpu")):
        net = Denoiser()
        optimiser = torch.optim.Adam(net.parameters(), lr=_RATE)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps)
        for _ in range(steps):
            clean = digits[torch.randint(len(digits), (_BATCH,))]
            sigma = (1.2 * torch.randn(_BATCH) - 0.8).exp()
            denoised = net(clean + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(clean), sigma)
            weight = (sigma.square() + net.deviation**2) / (sigma * net.deviation).square()
            loss = (weight.reshape(-1, 1, 1, 1) * (denoised - clean).square()).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
    return net.eval()


@dataclass
class Outcome:
    """One repetition: measures and images of every column, and the discriminator's report."""

    seed: int
    measures: dict[str, TwoSample]
    images: dict[str, np.ndarray]
    fit: DiffusionFitReport

    def to_dict(self) -> dict[str, Any]:
        measures = {name: measure.to_dict() for name, measure in self.measures.items()}
        return {"seed": self.seed, **measures, "fit": self.fit.to_dict()}


def _grey(x: Tensor) -> np.ndarray:
    """Images [n, 8, 8] rounded to the grey levels that real ones have."""
    half = LEVELS / 2
    return np.clip(np.round(half * (x[:, 0].double().numpy() + 1.0)), 0, LEVELS)


def run_seed(seed: int, effort: float = 1.0) -> Outcome:
    """Train a denoiser and a discriminator, sample with and without guidance, judge by the held-out half.

    Args:
        seed: of the split, the training and the noise.
        effort: scales training steps, epochs and samples, for a quick look.
    """
    from .edm import sample_edm
    from .fit_diffusion import fit_diffusion_discriminator

    digits = load_digits(seed)
    real = torch.from_numpy(digits.train)[:, None] / (LEVELS / 2) - 1.0
    steps = max(20, round(effort * _STEPS))
    net, longer = (train_denoiser(real, n, seed) for n in (steps, 2 * steps))
    generator = torch.Generator().manual_seed(seed)

    def sample(noise: Tensor, net: Denoiser = net, **guidance: Any) -> Tensor:
        return sample_edm(net, noise, dtype=torch.float32, **_SAMPLER, **guidance)

    generated = sample(torch.randn(max(100, round(effort * _GENERATED)), 1, 8, 8, generator=generator))
    discriminator = fit_diffusion_discriminator(
        real,
        generated,
        channels=16,
        learning_rate=2e-3,
        max_epochs=max(2, round(40 * effort)),
        patience=10,
        seed=seed,
        progress=False,
        **_RANGE,
    )
    noise = torch.randn(len(digits.held_out), 1, 8, 8, generator=generator)
    samples = {
        "before": sample(noise),
        "after": sample(noise, discriminator=discriminator),
        "doubled": sample(noise, discriminator=discriminator, weight=2.0),
        "longer": sample(noise, longer),
        "real": real,
    }
    images = {name: _grey(x) for name, x in samples.items()}
    measures = {name: two_sample(digits.held_out, x, seed=seed) for name, x in images.items()}
    assert discriminator.report is not None
    return Outcome(seed, measures, {"held_out": digits.held_out, **images}, discriminator.report)


def _column(outcomes: list[Outcome], which: str, measure: str) -> list[float]:
    return [getattr(outcome.measures[which], measure) for outcome in outcomes]


def _report(outcomes: list[Outcome]) -> dict[str, Any]:
    gained = {
        name: {
            which: gains(name, _column(outcomes, "before", name), _column(outcomes, which, name))
            for which in ("after", "doubled")
        }
        for name in TITLES
    }
    return {
        "columns": COLUMNS,
        "summary": {
            name: {which: mean_and_error(_column(outcomes, which, name)) for which in COLUMNS} for name in TITLES
        },
        "seeds_improved": {name: {k: int((v > 0).sum()) for k, v in by.items()} for name, by in gained.items()},
        "not_improved": [
            f"{COLUMNS[which]}: {TITLES[name][0]}"
            for name, by in gained.items()
            for which, v in by.items()
            if v.mean() < 0
        ],
        "seeds": [outcome.to_dict() for outcome in outcomes],
    }


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text: a measure, then mean ± standard error of every column."""
    rows: list[tuple[str, ...]] = [("held-out measure", *COLUMNS.values(), "")]
    for name, (title, direction) in TITLES.items():
        cells = [as_text([seed[which][name] for seed in report["seeds"]]) for which in COLUMNS]
        rows.append((title, *cells, direction))
    return rows


def draw(outcomes: list[Outcome]) -> Figure:
    """Samples of the first repetition, the measures of all, and what the discriminators saw at each noise level."""
    from .report import AFTER, BEFORE, REAL, draw_grid, draw_measure, new_figure

    figure = new_figure(19, 12, "A small diffusion of digits, guided by a discriminator, judged on held-out digits")
    parts: Any = figure.subfigures(3, 1, height_ratios=[1.15, 1.0, 0.9])
    panels = (("held_out", "held-out real digits", REAL), ("before", "generated", BEFORE), ("after", "guided", AFTER),
              ("doubled", "guided, w = 2", AFTER), ("longer", "trained twice as long", BEFORE))  # fmt: skip
    for column, (name, title, colour) in zip(
        parts[0].subplots(1, len(panels), gridspec_kw={"wspace": 0.06}), panels, strict=True
    ):
        column.set_title(title, color=colour, fontweight="bold")
        draw_grid(column, outcomes[0].images[name], 8, 8, (0.0, float(LEVELS)))
    plural = "" if len(outcomes) == 1 else "s"
    parts[1].suptitle(
        f"Held-out measures, {len(outcomes)} seed{plural} (lines: the seeds, bars: standard error, "
        "dashed: the training digits)",
        fontsize=11,
        color="0.3",
    )
    for column, name in zip(parts[1].subplots(1, len(TITLES)), TITLES, strict=True):
        before, after, ideal = (_column(outcomes, which, name) for which in ("before", "after", "real"))
        draw_measure(column, name, before, after, float(np.mean(ideal)))
        column.set_xticks([0, 1], ["generated", "guided"], fontsize=9)
    _draw_levels(parts[2], outcomes)
    return figure


def _draw_levels(figure: Any, outcomes: list[Outcome]) -> None:
    from .report import AFTER

    titles = {
        "auc": "AUC of the discriminator on held-out noisy digits",
        "gain": "held-out gain, nats per digit",
        "temperature": "temperature of the guard",
    }
    for axes, (key, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for outcome in outcomes:
            levels = outcome.fit.levels
            axes.plot([row["sigma"] for row in levels], [row[key] for row in levels], color=AFTER, alpha=0.6)
        axes.set_xscale("log")
        axes.set_xlabel("noise level σ")
        axes.set_title(title, fontsize=10)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)


def run(out: Path, *, seeds: int = 5, seed: int = 0, progress: bool = True, effort: float = 1.0) -> dict[str, Any]:
    """The whole demonstration; writes ``report.json`` and ``demo_diffusion.png`` into a folder.

    Args:
        out: the folder; made if it does not exist.
        seeds: how many independent repetitions (split, training and noise).
        seed: of the first; the others follow.
        progress: show a bar.
        effort: scales training steps, epochs and samples, for a quick look.

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
    with at_most_threads(1):
        outcomes = [run_seed(seed + k, effort) for k in tqdm(range(seeds), desc="repetitions", disable=not progress)]
    report = _report(outcomes)
    save_json(report, out / "report.json")
    save_figure(draw(outcomes), out / "demo_diffusion.png")
    return report
