"""The truths that certificates are held against: exact expectations against large samples and against quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_mixture import problem
from known_truth import PROBLEMS, Truth, _digits, mean_fourier, one_function, train_networks, truth

N = 40_000


@pytest.fixture(params=PROBLEMS)
def known(request) -> Truth:
    return truth(request.param)


def test_expectations_are_the_averages_of_many_draws(known):
    """Each within 5 standard errors: fewer than 600 averages, each beyond that with probability 6e-7."""
    for draw, expected in ((known.real, known.mean_real), (known.fake, known.mean_model)):
        phi = draw(N, 1)
        assert phi.shape == (N, len(expected)) and phi.dtype == expected.dtype == torch.float64
        error = phi.std(0) / math.sqrt(N)
        assert ((phi.mean(0) - expected).abs() <= 5 * error).all()


def test_no_draw_exceeds_the_bound(known):
    for phi in (known.real(N, 2), known.fake(N, 3)):
        size = phi.abs().max() if known.hull else phi.norm(dim=1).max()
        assert size.item() <= known.bound * (1 + 1e-12)


def test_draws_depend_on_the_seed_only(known):
    for draw in (known.real, known.fake):
        assert torch.equal(draw(50, 7), draw(50, 7)) and not torch.equal(draw(50, 7), draw(50, 8))


def test_quadrature_of_the_generator(known):
    """Positive weights, and an error at the rounding of thousands of terms; the closed form knows no grid."""
    if known.nodes is None:
        assert known is truth("mixture, 8-D")
        return
    assert (known.node_weights >= 0).all() and known.node_weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(known.node_weights @ known.nodes, known.mean_model, rtol=0, atol=1e-12)


def test_the_metric_is_a_supremum_over_the_class(known):
    """No discriminator of the unit ball exceeds it, and one attains it."""
    gap = known.mean_real - known.mean_model
    random = torch.Generator().manual_seed(0)
    inside = torch.randn(1000, len(gap), generator=random, dtype=torch.float64)
    inside /= inside.abs().sum(1, keepdim=True) if known.hull else inside.norm(dim=1, keepdim=True)
    assert (inside @ gap).max().item() <= known.ipm(gap) * (1 + 1e-12)
    steepest = gap.abs().argmax()
    best = torch.zeros_like(gap).index_fill_(0, steepest, gap[steepest].sign().item()) if known.hull else gap
    best = best / best.norm().clamp_min(1e-300)
    assert (best @ gap).item() == pytest.approx(known.ipm(gap), rel=1e-12, abs=1e-300)


def test_the_model_is_biased_where_it_should_be():
    for name in PROBLEMS:
        known = truth(name)
        gap = known.ipm(known.mean_real - known.mean_model) / known.bound
        assert gap == 0 if name == "mixture, perfect model" else gap > 0.05


def test_characteristic_function_of_one_gaussian():
    """E cos<w, x> of N(m, s^2 I) is exp(-s^2 ||w||^2 / 2) cos<w, m>, from a mixture of two equal halves."""
    true = problem(2).true
    weights = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    means = torch.tensor([[1.0, -2.0]], dtype=torch.float64).expand(4, 2)
    one = type(true)(weights, means, torch.full((4,), 0.3, dtype=torch.float64))
    frequencies = torch.tensor([[0.7, 1.1]], dtype=torch.float64)
    phase, size = 0.7 - 2.2, math.exp(-0.5 * 0.09 * (0.49 + 1.21))
    want = torch.tensor([size * math.cos(phase), size * math.sin(phase)], dtype=torch.float64)
    torch.testing.assert_close(mean_fourier(one, frequencies), want, rtol=1e-14, atol=1e-15)


def test_one_function_exceeds_twice_its_complexity_as_often_as_it_says():
    """P(|mean of n| > 2 R_n) = P(|z| > 2 sqrt(2/pi)) = 0.11 for normal z, within 5 standard errors of 4000 samples."""
    known, n, samples = one_function(), 400, 4000
    assert known.mean_real.abs().max().item() < 1e-15
    outputs = known.real(n * samples, 0).reshape(samples, n)
    complexity = math.sqrt(2 / math.pi) * outputs.square().mean(1).sqrt() / math.sqrt(n)
    rate = (outputs.mean(1).abs() > 2 * complexity).double().mean().item()
    expected = math.erfc(2 * math.sqrt(2 / math.pi) / math.sqrt(2))
    assert rate == pytest.approx(expected, abs=5 * math.sqrt(expected / samples))
    assert expected == pytest.approx(0.11, abs=0.005)


def test_networks_learn_apart():
    """Each tells its own two sets apart, and what one is trained on leaves the others as they are."""
    real, fake = (pool[:300].reshape(3, 100, -1) for pool in _digits())
    networks = train_networks(real, fake, 0)
    hidden, right = networks(real)
    assert hidden.shape == (3, 100, 16) and hidden.abs().max() <= 1
    assert ((right > 0).double().mean(1) > 0.9).all() and ((networks(fake)[1] < 0).double().mean(1) > 0.9).all()
    changed = torch.cat([fake[:2], real[:1]])
    others = train_networks(real, changed, 0)(real)[1]
    torch.testing.assert_close(others[:2], right[:2], rtol=1e-9, atol=1e-9)
    assert (others[2] - right[2]).abs().max() > 0.1
