"""Pareto k̂ against a plain transcription of Zhang and Stephens, one sample at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

import refine_ext as rx
from refine_ext.pareto import pareto_khat


def zhang_stephens(log_weights: np.ndarray) -> float:
    """k̂ by the loops of the paper: Zhang and Stephens 2009, section 2; shrinkage of Vehtari et al. 2024, appendix C."""
    weights = sorted(math.exp(x - log_weights.max()) for x in log_weights)
    n = len(weights)
    m = math.ceil(min(0.2 * n, 3 * math.sqrt(n)))
    threshold = weights[n - m - 1]
    excess = [w - threshold for w in weights[n - m :]]
    grid_size = 30 + int(math.sqrt(m))
    quartile = excess[int(m / 4 + 0.5) - 1]
    theta, likelihood = [], []
    for j in range(1, grid_size + 1):
        t = 1 / excess[-1] + (1 - math.sqrt(grid_size / (j - 0.5))) / (3 * quartile)
        k = -sum(math.log(1 - t * x) for x in excess) / m
        theta.append(t)
        likelihood.append(m * (math.log(t / k) + k - 1))
    share = [1 / sum(math.exp(other - own) for other in likelihood) for own in likelihood]
    estimate = sum(t * s for t, s in zip(theta, share, strict=True))
    # Their k is minus the shape that importance sampling calls k.
    shape = sum(math.log(1 - estimate * x) for x in excess) / m
    return (shape * m + 0.5 * 10) / (m + 10)


@pytest.mark.parametrize("n", [25, 26, 100, 224, 225, 226, 1000, 5000])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_against_the_paper(n, spread):
    x = np.random.default_rng(n).normal(0, spread, n)
    got = pareto_khat(torch.from_numpy(x))
    assert got.dtype == torch.float64 and got.shape == ()
    assert float(got) == pytest.approx(zhang_stephens(x), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("k", [0.1, 0.3, 0.5, 0.7, 1.0])
def test_recovers_the_shape_of_a_pareto_sample(k):
    weights = stats.genpareto(c=k, scale=2.0).rvs(20000, random_state=1)
    m = math.ceil(3 * math.sqrt(20000))
    # The estimator's standard deviation is (1 + k) / sqrt(m); the shrinkage pulls to 1/2 by 10 / (m + 10).
    tolerance = 3 * (1 + k) / math.sqrt(m) + abs(k - 0.5) * 10 / (m + 10)
    assert float(pareto_khat(torch.from_numpy(np.log(weights)))) == pytest.approx(k, abs=tolerance)


def test_scale_and_order_do_not_matter():
    x = torch.randn(3, 400, dtype=torch.float64) * 2
    want = pareto_khat(x)
    torch.testing.assert_close(pareto_khat(x + 5000), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pareto_khat(x.flip(-1) - 5000), want, rtol=1e-9, atol=1e-9)
    for row in range(3):
        torch.testing.assert_close(pareto_khat(x[row]), want[row], rtol=1e-12, atol=1e-12)


def test_zero_weights_below_the_tail_only_count():
    x = torch.randn(400, dtype=torch.float64)
    zeros = torch.full((200,), -math.inf, dtype=torch.float64)
    padded = torch.cat([x, zeros])
    expected = torch.cat([x, torch.full((200,), -800.0, dtype=torch.float64)])
    torch.testing.assert_close(pareto_khat(padded), pareto_khat(expected))


def test_no_tail_no_estimate():
    for n in (1, 2, 10, 20):
        assert pareto_khat(torch.randn(n)).isnan()
    assert not pareto_khat(torch.randn(25)).isnan()
    assert pareto_khat(torch.zeros(1000)).isnan()
    assert pareto_khat(torch.full((1000,), -math.inf)).isnan()


def test_one_sample_holds_everything():
    """The excesses of all others vanish beside it: the estimate must warn, or be undefined, but not reassure."""
    x = torch.randn(1000, dtype=torch.float64)
    x[3] = 1e5
    khat = float(pareto_khat(x))
    assert math.isnan(khat) or khat > 0.7
    x[3] = 200.0
    khat = float(pareto_khat(x))
    assert khat > 0.7


def test_equal_weights_at_the_threshold():
    """Ties make the smallest excesses zero: duplicated samples are common, and k̂ is still a number."""
    x = torch.randn(200, dtype=torch.float64).repeat_interleave(5)
    assert math.isfinite(float(pareto_khat(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_of_density_ratios(dtype):
    h = torch.randn(4, 300, dtype=torch.float64).to(dtype)
    result = rx.density_ratio(h, "jensen_shannon", dim=1)
    assert result.khat.dtype == torch.float64 and result.khat.shape == (4,)
    for row in range(4):
        want = zhang_stephens(result.log_ratio[row].double().numpy())
        assert float(result.khat[row]) == pytest.approx(want, rel=1e-6, abs=1e-6)
    w = torch.rand(300, dtype=torch.float64).to(dtype) + 0.01
    weighted = rx.density_ratio(h, "kl", dim=1, base_weights=w)
    for row in range(4):
        want = zhang_stephens(weighted.weights[row].double().log().numpy())
        # log of a weight that is stored in half precision carries its rounding.
        assert float(weighted.khat[row]) == pytest.approx(want, abs=0.02 if dtype.itemsize == 2 else 1e-4)


def test_finite_and_infinite_variance():
    """kl weights of a Gaussian shift are log-normal, fine; e^x of an exponential of rate 1 has no variance."""
    h = torch.randn(100000, dtype=torch.float64)
    assert float(rx.density_ratio(h, "kl").khat) < 0.5
    heavy = torch.from_numpy(np.random.default_rng(0).exponential(1.0, 100000))
    assert float(rx.density_ratio(heavy, "kl").khat) > 0.7
