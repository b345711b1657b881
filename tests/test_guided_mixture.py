"""Guided sampling turns a biased model into the truth: Gaussian mixtures, where everything is known exactly.

The score of the biased mixture plus the gradient of the exact log-ratio is the score of the true one, at every noise
level, so that the samples must be the true model's. `benchmarks/bench_guided_mixture.py` measures more of this.
"""

from __future__ import annotations

import math

import pytest
import torch
from bench_guided_mixture import train
from gaussian_mixture import Problem, log_density_of_samples, problem
from reference import slope

import refine_ext as rx

SAMPLERS = {
    "Heun": {"num_steps": 18},
    "Euler": {"num_steps": 30, "order": 1},
    "churn": {"num_steps": 18, "S_churn": 5.0, "S_noise": 1.003, "seed": 4},
    "churn of each sample": {"num_steps": 18, "S_churn": 10.0, "S_min": 0.05, "S_max": 20.0, "seed": torch.arange(400)},
}
DIVERGENCES = [name for name in rx.divergences() if name != "alpha"] + ["alpha:0.3", "alpha:1.5"]


@pytest.fixture(scope="module", params=[2, 16])
def mixtures(request) -> Problem:
    return problem(request.param)


def noise(mixtures: Problem, n: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, mixtures.true.means.shape[1], generator=random, dtype=torch.float64)


def sample(mixtures: Problem, n: int = 400, **options) -> torch.Tensor:
    return rx.sample_edm(mixtures.model.denoised, noise(mixtures, n), **options)


def test_the_closed_forms():
    """The denoiser is x plus sigma^2 times the score, in both mixtures; the densities integrate to one."""
    mixtures = problem(2)
    x, sigma = noise(mixtures, 50) * 2, torch.logspace(-2, 1.5, 50, dtype=torch.float64)
    for mixture in (mixtures.true, mixtures.model):
        leaf = x.clone().requires_grad_()
        (score,) = torch.autograd.grad(mixture.log_density(leaf, sigma).sum(), leaf)
        want = x + sigma[:, None] ** 2 * score
        torch.testing.assert_close(mixture.denoised(x, sigma), want, rtol=1e-10, atol=1e-10)
        axis = torch.linspace(-9, 9, 300, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        for level in (0.0, 0.7):  # the trapezoid rule is exact to rounding for what vanishes at the ends
            total = mixture.log_density(grid, level).exp().sum() * (axis[1] - axis[0]) ** 2
            assert total.item() == pytest.approx(1.0, abs=1e-9)


def test_the_density_of_a_samplers_output():
    """Against a sampler that is linear, whose output is a Gaussian: Heun's method on N(0, 1)."""

    def gaussian(x, sigma):
        return x / (1 + sigma[:, None] ** 2)

    z = torch.randn(50, 3, dtype=torch.float64)
    samples, density = log_density_of_samples(lambda z: rx.sample_edm(gaussian, z), z)
    scale = (samples / z).mean()
    want = -0.5 * (samples / scale).square().sum(1) - 1.5 * math.log(2 * math.pi) - 3 * scale.log()
    torch.testing.assert_close(density, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_exact_ratio_turns_the_model_into_the_truth(mixtures, name):
    """Sample by sample the true model's output, whatever the sampler."""
    options = SAMPLERS[name]
    want = rx.sample_edm(mixtures.true.denoised, noise(mixtures, 400), **options)
    got = sample(mixtures, discriminator=mixtures.log_ratio, **options)
    # Both sum the same densities in another order: 1e-16 times sigma^2 = 6400 at the start, spread between the modes.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-8)
    assert (sample(mixtures, **options) - want).abs().median() > 0.02, "the model's own samples are others"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_gives_the_same_samples(mixtures, name):
    """h = f'(r) of the exact ratio, and the factor c(h - nu), for the logit."""

    def variational(x, sigma):
        return slope(name, mixtures.log_ratio(x, sigma).exp()) - 0.5

    guide = rx.Guide(variational, kind="variational", divergence=name, shift=-0.5)
    want = sample(mixtures, discriminator=mixtures.log_ratio)
    got = sample(mixtures, discriminator=guide)
    # Some f' are flat where r is large or small: h keeps log r, here up to 8, only to e^8 (Neyman: e^16) roundings.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def test_the_truth_is_recovered_to_sampling_error():
    """KL(samples || truth) by the exact density of the sampler's output, discretisation and all.

    Its estimate E[p/q - 1 - log(p/q)] has no negative terms (E[p/q] = 1).
    """
    mixtures = problem(2)
    start = noise(mixtures, 800)

    def divergence(steps: int, discriminator) -> tuple[float, float]:
        samples, density = log_density_of_samples(
            lambda z: rx.sample_edm(mixtures.model.denoised, z, num_steps=steps, discriminator=discriminator), start
        )
        log_ratio = mixtures.true.log_density(samples) - density
        terms = log_ratio.expm1() - log_ratio
        return terms.mean().item(), terms.std().item() / math.sqrt(len(terms))

    before, error = divergence(18, None)
    assert before - 4 * error > 0.3
    coarse, fine = divergence(18, mixtures.log_ratio)[0], divergence(48, mixtures.log_ratio)[0]
    # Heun's local error is third order: KL, quadratic in the error of the map, falls as the 4th power of the step,
    # (48 / 18)^4 = 50; half of that is asked for.
    assert coarse < 0.02 and fine < coarse / 25


@pytest.mark.slow
def test_a_trained_discriminator_closes_most_of_the_gap():
    """Trained on samples alone. Over seeds the benchmark has 0.73 +- 0.04; 0.5 is five standard errors less."""
    mixtures = problem(2)
    start = noise(mixtures, 1000)

    def divergence(discriminator) -> float:
        def sampler(z: torch.Tensor) -> torch.Tensor:
            return rx.sample_edm(mixtures.model.denoised, z, num_steps=32, discriminator=discriminator)

        samples, density = log_density_of_samples(sampler, start)
        return (density - mixtures.true.log_density(samples)).mean().item()

    assert 1 - divergence(train(mixtures, seed=0, quick=False)) / divergence(None) > 0.5


@pytest.mark.parametrize("name", ["churn", "Heun"])
def test_held_out_measures_cannot_tell_the_samples_from_the_truth(mixtures, name):
    """The permutation test of the energy distance: nothing against the guided samples, much against the model's."""
    from refine_ext.measures import distances, permutation_test

    options = {**SAMPLERS[name], "num_steps": 40}

    def p_value(generated: torch.Tensor, seed: int) -> float:
        held_out = mixtures.true.sample(len(generated), 100 + seed)
        pooled = distances(torch.cat([held_out, generated]).numpy())
        return permutation_test(pooled, len(held_out), permutations=199, seed=seed)[1]

    guided = sample(mixtures, 800, discriminator=mixtures.log_ratio, **options)
    assert p_value(guided, 0) > 0.01 and p_value(sample(mixtures, 800, **options), 0) == 1 / 200
