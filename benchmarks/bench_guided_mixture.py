"""Does guidance recover the truth? Biased Gaussian mixtures, where scores, ratios and densities are exact.

python benchmarks/bench_guided_mixture.py --out benchmarks/results/guided_mixture.json

A deterministic sampler's output has a density that is known exactly (`gaussian_mixture.py`), and so is its KL from the
truth, but for sampling. With churn there is none: there the energy distance to held-out samples of the truth speaks, as
it does for all. `closed` is the share of the unguided sampler's KL that guidance removes. Means and standard errors
over seeds; a seed has its own training samples, initial weights, noise and held-out samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from common import parser, save
from gaussian_mixture import Problem, log_density_of_samples, problem
from torch import Tensor

import refine_ext as rx
from refine_ext.divergence import parse_divergence
from refine_ext.measures import energy_distance

SAMPLERS: dict[str, dict[str, Any]] = {
    "Heun, 32 steps": {"num_steps": 32},
    "Euler, 64 steps": {"num_steps": 64, "order": 1},
    "Heun with churn, 32 steps": {"num_steps": 32, "S_churn": 10.0},
}
DIVERGENCES = [name for name in rx.divergences() if name != "alpha"] + ["alpha:0.3", "alpha:1.5"]
SAMPLES = {2: 1000, 16: 100}  # times 2 d + 1 trajectories for the density
TRAINED_ON = 20_000
HELD_OUT = 1000
SEEDS = 3


def train(mixtures: Problem, seed: int, quick: bool) -> rx.DiffusionDiscriminator:
    """On samples only; in float64 afterwards, in which differences of its guidance are exact enough."""
    n = 500 if quick else TRAINED_ON
    real, fake = mixtures.true.sample(n, 1000 + seed), mixtures.model.sample(n, 2000 + seed)
    options = {"max_epochs": 2 if quick else 30, "batch_size": 512, "hidden": (128, 128, 128), "dropout": 0.0}
    options |= {"learning_rate": 2e-3, "seed": seed, "progress": False}
    return rx.fit_diffusion_discriminator(real.float(), fake.float(), **options).double()


def outcomes(d: int, seed: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Every sampler with every guide, once."""
    mixtures = problem(d)
    n = 50 if quick else SAMPLES[d]
    random = torch.Generator().manual_seed(3000 + seed)
    noise = torch.randn(n, d, generator=random, dtype=torch.float64)
    start = torch.randn(HELD_OUT, d, generator=random, dtype=torch.float64)
    held_out, others = mixtures.true.sample(HELD_OUT, 4000 + seed), mixtures.true.sample(HELD_OUT, 5000 + seed)
    yield {"sampler": "the truth itself", "guide": "none", "energy": energy_distance(held_out.numpy(), others.numpy())}
    chosen = {"none": None, "exact": mixtures.log_ratio, "trained": train(mixtures, seed, quick)}
    for sampler, options in SAMPLERS.items():
        unguided = math.nan
        for name, guide in chosen.items():

            def run(z: Tensor, options=options, guide=guide) -> Tensor:
                return rx.sample_edm(mixtures.model.denoised, z, discriminator=guide, seed=seed, **options)

            row = {"sampler": sampler, "guide": name}
            row["energy"] = energy_distance(held_out.numpy(), run(start).numpy())
            if "S_churn" not in options:
                samples, density = log_density_of_samples(run, noise)
                row["kl"] = (density - mixtures.true.log_density(samples)).mean().item()
                if guide is None:
                    unguided = row["kl"]
                else:
                    row["closed"] = 1 - row["kl"] / unguided
            yield row


def line(row: dict[str, Any]) -> str:
    """A row for the eye."""
    measures = ((name, row[name]) for name in ("kl", "closed", "energy") if name in row)
    shown = "  ".join(f"{name} {m['mean']:8.4f} +- {m['stderr']:.4f}" for name, m in measures)
    return f"{row['dimensions']:2}  {row['sampler']:26}{row['guide']:9}{shown}"


def same_for_every_divergence(d: int) -> dict[str, float]:
    """The largest difference of a coordinate, of samples guided by h = f'(r) from those by the exact ratio's logit."""
    mixtures = problem(d)
    noise = torch.randn(500, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    want = rx.sample_edm(mixtures.model.denoised, noise, discriminator=mixtures.log_ratio)
    result = {}
    for name in DIVERGENCES:
        code = parse_divergence("bench_guided_mixture", name)

        def variational(x: Tensor, sigma: Tensor, code=code) -> Tensor:
            return torch.ops.refine_ext.dual_output(mixtures.log_ratio(x, sigma), *code)

        guide = rx.Guide(variational, kind="variational", divergence=name)
        got = rx.sample_edm(mixtures.model.denoised, noise, discriminator=guide)
        result[name] = (got - want).abs().max().item()
    return result


def mean(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.fmean(values), "stderr": error}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], devices=("cpu",)).parse_args()
    torch.set_num_threads(1)
    seeds = 2 if arguments.quick else SEEDS
    rows: list[dict[str, Any]] = []
    difference = {}
    for d in (2, 16):
        collected: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for seed in range(seeds):
            for row in outcomes(d, seed, arguments.quick):
                collected.setdefault((row.pop("sampler"), row.pop("guide")), []).append(row)
                print(d, seed, row, flush=True)
        for (sampler, guide), each in collected.items():
            summary = {measure: mean([row[measure] for row in each]) for measure in each[0]}
            rows.append({"dimensions": d, "sampler": sampler, "guide": guide, **summary})
            print(line(rows[-1]), flush=True)
        difference[d] = same_for_every_divergence(d)
        print(f"{d:2}  largest difference of a sample, by divergence: {max(difference[d].values()):.1e}", flush=True)
        save(arguments.out, "guided_mixture", rows, seeds=seeds, largest_difference_by_divergence=difference)


if __name__ == "__main__":
    main()
