"""`latent_langevin`: laws known in closed form, with their bias and without it; detailed balance; decisions; errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2, chisquare

import refine_ext as rx
from refine_ext.guidance import philox_normal

P_VALUE = 1e-4
# Data N(CENTRE, SPREAD), the model N(OFFSET, MIX MIX'), x = MIX z + OFFSET.
MIX = torch.tensor([[1.2, 0.0], [0.5, 0.8]], dtype=torch.float64)
OFFSET = torch.tensor([0.5, -0.2], dtype=torch.float64)
CENTRE = torch.tensor([1.0, 0.3], dtype=torch.float64)
SPREAD = torch.tensor([[0.8, 0.2], [0.2, 0.5]], dtype=torch.float64)
# The refined latents' law, by x = MIX z + OFFSET from the data's.
UNMIX = torch.linalg.inv(MIX)
MEAN = UNMIX @ (CENTRE - OFFSET)
COVARIANCE = UNMIX @ SPREAD @ UNMIX.T


def generator(z):
    return z @ MIX.to(z).T + OFFSET.to(z)


def log_ratio(x):
    """log dP/dQ of the two Gaussians."""

    def log_density(mean, covariance):
        return torch.distributions.MultivariateNormal(mean.to(x), covariance.to(x)).log_prob(x)

    return log_density(CENTRE, SPREAD) - log_density(OFFSET, MIX @ MIX.T)


def langevin(z, **options):
    return rx.latent_langevin(generator, log_ratio, z, **{"progress": False, **options})


def normal(n, seed, width=2):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def limit_without_correction(eta, temperature=1.0):
    """Covariance S of z' = z - eta/2 H (z - m) + sqrt(eta T) xi: S = M S M + eta T, by H's eigenvectors."""
    curvature, basis = torch.linalg.eigh(torch.linalg.inv(COVARIANCE))
    return basis @ torch.diag(eta * temperature / (1 - (1 - 0.5 * eta * curvature) ** 2)) @ basis.T


def moments_agree(z, mean, covariance):
    """Squared z-scores of all first and second moments of independent Gaussian draws, all within 4.5 deviations."""
    n, centred = len(z), z - mean
    deviation = covariance.diagonal().sqrt()
    assert ((z.mean(0) - mean).abs() < 4.5 * deviation / n**0.5).all()
    found = centred.T @ centred / n
    error = (covariance**2 + deviation[:, None] ** 2 * deviation**2).div(n).sqrt()
    assert ((found - covariance).abs() < 4.5 * error).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_corrected_chains_have_the_refined_law(seed):
    result = langevin(normal(1500, seed), steps=60, step_size=0.45, metropolis=True, seed=seed)
    moments_agree(result.z, MEAN, COVARIANCE)
    # at this step the uncorrected law is far off: the correction did it
    assert limit_without_correction(0.45)[1, 1] > 1.15 * COVARIANCE[1, 1]
    assert 0.5 < result.acceptance.mean() < 0.95


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_plain_chains_have_the_law_of_their_step_size(temperature):
    result = langevin(normal(1500, 7), steps=60, step_size=0.45, temperature=temperature, seed=3)
    moments_agree(result.z, MEAN, limit_without_correction(0.45, temperature))
    assert result.acceptance is None


def test_temperature_of_corrected_chains():
    result = langevin(normal(1500, 7), steps=60, step_size=0.6, temperature=0.25, metropolis=True, seed=3)
    moments_agree(result.z, MEAN, 0.25 * COVARIANCE)


def test_no_temperature_is_gradient_ascent():
    result = langevin(normal(3, 0), steps=200, step_size=0.3, temperature=0, seed=0)
    torch.testing.assert_close(result.z, MEAN.expand(3, 2))


def test_a_step_is_the_formula():
    z = normal(5, 1)
    slope = torch.linalg.solve(COVARIANCE, (MEAN - z).T).T  # grad log of the refined law
    deviation = (0.1 * 0.7) ** 0.5
    want = z + 0.05 * slope + deviation * philox_normal(z.shape, 4, step=0, dtype=torch.float64)
    got = langevin(z, steps=1, step_size=0.1, temperature=0.7, seed=4)
    torch.testing.assert_close(got.z, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got.x, generator(got.z))
    torch.testing.assert_close(got.trace, torch.stack([log_ratio(generator(z)).mean(), got.log_ratio.mean()]))
    by_density = langevin(z, steps=1, step_size=0.1, temperature=0.7, seed=4, prior=lambda z: -0.5 * z.square().sum(1))
    torch.testing.assert_close(by_density.z, want, rtol=1e-12, atol=1e-13)


def test_decisions_are_the_metropolis_rule():
    """The rule from the densities of the normal laws as scipy has them, with the uniform that the seed gives."""
    from scipy.stats import multivariate_normal

    z, eta, temperature = normal(200, 2), 1.6, 0.6
    proposal = langevin(z, steps=1, step_size=eta, temperature=temperature, seed=9).z
    got = langevin(z, steps=1, step_size=eta, temperature=temperature, seed=9, metropolis=True)
    pair = philox_normal((200, 2), 9, step=1, dtype=torch.float64)
    uniform = np.exp(-0.5 * pair.square().sum(1).numpy())
    law = multivariate_normal(MEAN.numpy(), temperature * COVARIANCE.numpy())

    def log_kernel(start, end):
        mean = start + 0.5 * eta * np.linalg.solve(COVARIANCE.numpy(), (MEAN.numpy() - start).T).T
        return -0.5 * ((end - mean) ** 2).sum(1) / (eta * temperature)

    a, b = z.numpy(), proposal.numpy()
    ratio = np.exp(law.logpdf(b) - law.logpdf(a) + log_kernel(b, a) - log_kernel(a, b))
    taken = uniform < ratio
    assert 20 < taken.sum() < 180
    assert np.array_equal(got.acceptance.numpy(), taken.astype(float))
    assert torch.equal(got.z, torch.where(torch.from_numpy(taken)[:, None], proposal, z))


# One dimension: p(z) r(z), r = e^(2 cos 3z), three modes.
EDGES = torch.tensor([-math.inf, -1.9, -1.3, -0.7, -0.25, 0.25, 0.7, 1.3, 1.9, math.inf], dtype=torch.float64)


def bumpy(x):
    return 2 * torch.cos(3 * x[:, 0])


def bumpy_draws(n):
    grid = torch.linspace(-7, 7, 20001, dtype=torch.float64)
    weights = torch.exp(-0.5 * grid.square() + 2 * torch.cos(3 * grid))
    place = torch.rand(n, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    cumulative = weights.cumsum(0) / weights.sum()
    return grid[torch.searchsorted(cumulative, place)][:, None], cumulative, grid


def bins(z):
    return torch.bucketize(z[:, 0], EDGES[1:-1])


def test_detailed_balance():
    """From draws of the target, a step goes from bin i to j as often as from j to i (Bowker's test of symmetry)."""
    start, cumulative, grid = bumpy_draws(6000)
    result = rx.latent_langevin(
        lambda z: z, bumpy, start, steps=4, step_size=0.3, metropolis=True, seed=1, progress=False
    )
    assert 0.3 < result.acceptance.mean() < 0.9
    number = len(EDGES) - 1
    counts = torch.bincount(bins(start) * number + bins(result.z), minlength=number**2).reshape(number, number).double()
    pairs = [(i, j) for i in range(number) for j in range(i) if counts[i, j] + counts[j, i] >= 10]
    assert len(pairs) >= 10
    statistic = sum(float((counts[i, j] - counts[j, i]) ** 2 / (counts[i, j] + counts[j, i])) for i, j in pairs)
    assert chi2.sf(statistic, len(pairs)) > P_VALUE
    # and the law stays what it was
    below = torch.tensor([0.0, *(cumulative[torch.searchsorted(grid, e)] for e in EDGES[1:-1]), 1.0])
    expected = below.diff() / below.diff().sum() * len(start)
    assert chisquare(torch.bincount(bins(result.z), minlength=number).numpy(), expected.numpy()).pvalue > P_VALUE
    # uncorrected, the same steps leave another law
    plain = rx.latent_langevin(lambda z: z, bumpy, start, steps=4, step_size=0.3, seed=1, progress=False)
    assert chisquare(torch.bincount(bins(plain.z), minlength=number).numpy(), expected.numpy()).pvalue < 1e-12


def test_a_uniform_prior_keeps_its_box():
    """The square's log density has no gradient; the data are e^{x} tilted: mean of one coordinate 1 / tanh(1) - 1."""

    def square(z):
        return torch.where((z.abs() <= 1).all(1), 0.0, -math.inf)

    result = rx.latent_langevin(
        lambda z: z, lambda x: x.sum(1), 2 * torch.rand(1500, 2) - 1, prior=square, steps=60, step_size=0.7,
        metropolis=True, seed=0, progress=False,
    )  # fmt: skip
    assert (result.z.abs() <= 1).all()
    variance = 1 - 1 / math.sinh(1) ** 2
    assert ((result.z.mean(0) - (1 / math.tanh(1) - 1)).abs() < 4.5 * (variance / 1500) ** 0.5).all()


def test_schedules_cool_the_chain():
    steps = 80
    cooled = langevin(normal(400, 3), steps=steps, step_size=0.3, temperature=lambda k: 1 - k / (steps - 1), seed=0)
    assert cooled.z.var(0).max() < 0.1 * COVARIANCE.diagonal().min()
    assert torch.equal(
        langevin(normal(4, 3), steps=3, step_size=[0.1, 0.1, 0.1], seed=0).z,
        langevin(normal(4, 3), steps=3, step_size=0.1, seed=0).z,
    )


@pytest.mark.parametrize("metropolis", [False, True])
def test_chains_do_not_depend_on_their_company(metropolis):
    def scaled(x):  # elementwise: matrix products round by batch
        return -(x - 1).square().sum(1)

    def run(z, seed, batch_size=None):
        return rx.latent_langevin(
            lambda z: z.tanh(), scaled, z, steps=8, step_size=0.9, metropolis=metropolis, seed=seed,
            batch_size=batch_size, progress=False,
        )  # fmt: skip

    z, seeds = normal(6, 4), torch.tensor([4, 8, 15, 16, 23, 42])
    all_ = run(z, seeds)
    assert torch.equal(all_.z[[5, 2]], run(z[[5, 2]], seeds[[5, 2]]).z)
    assert torch.equal(run(z, 3).z[:4], run(z[:4], 3).z)
    for size in (1, 4, 6):
        batched = run(z, seeds, size)
        assert torch.equal(batched.z, all_.z) and torch.equal(batched.trace, all_.trace)
    assert not torch.equal(run(z, 3).z, run(z, 4).z)


def test_modes_and_what_is_left_alone():
    network = torch.nn.Linear(2, 2).double()
    z = normal(4, 5)
    kept = z.clone()

    def run():
        options = {"steps": 3, "step_size": 0.3, "metropolis": True, "seed": 2, "progress": False}
        return rx.latent_langevin(network, log_ratio, z, **options)

    plain = run()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = run()
        assert torch.equal(plain.z, again.z) and torch.equal(plain.acceptance, again.acceptance)
    assert torch.equal(z, kept) and network.weight.grad is None


def test_the_callback_sees_every_state():
    seen = []
    result = langevin(normal(4, 6), steps=3, seed=0, callback=lambda k, z, log_ratio: seen.append((k, z)))
    assert [k for k, _ in seen] == [0, 1, 2, 3] and torch.equal(seen[-1][1], result.z)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"temperature": -1}, ValueError, "temperature must be finite and at least 0, got -1"),
        ({"temperature": 0.0, "metropolis": True}, ValueError, "temperature must be finite and above 0, got 0.0"),
        ({"step_size": -0.1}, ValueError, "step_size must be finite and above 0, got -0.1"),
        ({"prior": None}, TypeError, "prior must be 'normal' or a log density z -> [B], got None"),
        ({"prior": lambda z: 0.0}, ValueError, "prior must return log densities [5], got float"),
        ({"divergence": "total_variation", "kind": "variational"}, ValueError, "divergence must be one of kl, "),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"z": normal(5, 0).long()}, TypeError, "z must be float64"),
        ({"discriminator": lambda x: log_ratio(x).detach()}, ValueError, "discriminator's output has no gradient"),
        ({"generator": lambda z: z.round().long()}, ValueError, "generator's output has no gradient in its latents"),
        ({"discriminator": lambda x: log_ratio(x) / 0 * 0}, ValueError, "infinite at step 0: the discriminator"),
        (
            {"step_size": 1e300, "discriminator": lambda x: -x.square().sum(1)},
            ValueError,
            "the steps may be too large",
        ),
    ],
)
def test_errors(change, error, text):
    options = {"generator": generator, "discriminator": log_ratio, "z": normal(5, 0), "steps": 3, "progress": False}
    options |= change
    with pytest.raises(error) as caught:
        rx.latent_langevin(options.pop("generator"), options.pop("discriminator"), options.pop("z"), **options)
    message = str(caught.value)
    assert message.startswith("latent_langevin: ") and text in message and "\n" not in message
