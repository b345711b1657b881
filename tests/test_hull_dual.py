"""The hull of discriminators against a general solver, its active set against the optimality conditions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dual_reference import FAMILIES, reference_value, samples, scipy_optimize
from hypothesis import given
from hypothesis import strategies as st

from refine_ext.hull_dual import _maximise_quadratic, solve_hull_dual
from refine_ext.linear_dual import solve_linear_dual


def tensors(seed: int = 0, width: int = 4):
    return (torch.tensor(x) for x in samples(seed, width))


@pytest.mark.parametrize("divergence", FAMILIES)
@pytest.mark.parametrize("norm_bound", [0.3, 5.0])
def test_agrees_with_slsqp(divergence, norm_bound):
    """SLSQP on a = u - v, u and v >= 0, sum (u + v) <= B, with the objective minimised over the shift by scipy."""
    real, fake = samples(width=3)
    solved = solve_hull_dual(*tensors(width=3), divergence, norm_bound=norm_bound, tolerance=1e-9)
    assert solved.converged
    assert float(solved.weight.abs().sum()) <= norm_bound * (1 + 1e-12)
    assert solved.value == pytest.approx(reference_value(solved.weight.numpy(), real, fake, divergence), abs=1e-7)
    found = scipy_optimize.minimize(
        lambda x: -reference_value(x[:3] - x[3:], real, fake, divergence),
        np.full(6, 0.01),
        method="SLSQP",
        bounds=[(0.0, norm_bound)] * 6,
        constraints={"type": "ineq", "fun": lambda x: norm_bound - x.sum()},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    # SLSQP differentiates numerically: it may fall short, but it must never beat the certificate.
    assert -found.fun <= solved.value + solved.gap + 1e-7
    assert -found.fun == pytest.approx(solved.value, abs=2e-5)


@pytest.mark.parametrize("divergence", FAMILIES)
def test_one_discriminator_is_the_linear_class_of_one_feature(divergence):
    for seed in range(3):
        real, fake = tensors(seed, width=1)
        for bound in (0.2, 3.0):
            hull = solve_hull_dual(real, fake, divergence, norm_bound=bound, tolerance=1e-11)
            ball = solve_linear_dual(real, fake, divergence, norm_bound=bound, tolerance=1e-11)
            assert hull.value == pytest.approx(ball.value, abs=1e-10)
            # The value is flat at an inner maximum: a gap of 1e-11 leaves 1e-5 of the weight open.
            torch.testing.assert_close(hull.weight, ball.weight, rtol=0, atol=2e-5)


def test_gap_bounds_the_error_at_any_point():
    real, fake = tensors(3, width=12)
    best = solve_hull_dual(real, fake, norm_bound=5.0, tolerance=1e-12)
    for iterations in (0, 1, 2):
        early = solve_hull_dual(real, fake, norm_bound=5.0, tolerance=1e-12, max_iterations=iterations)
        assert not early.converged
        assert best.value - early.value <= early.gap * (1 + 1e-9)
        assert best.value > early.value


@pytest.mark.parametrize("divergence", ["kl", "jensen_shannon", "pearson_chi2", "reverse_kl"])
@pytest.mark.parametrize("bound", [0.5, 5.0, 50.0])
def test_many_discriminators_are_solved_to_the_gap(divergence, bound):
    """More discriminators than generated samples, some of them equal, opposite or constant; most stay unused."""
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(8, 100))
    real = np.tanh(rng.normal(0.2, 1.0, (120, 8)) @ mixing)
    fake = np.tanh(rng.normal(0.0, 1.2, (90, 8)) @ mixing)
    real, fake = (torch.tensor(np.concatenate([x, x[:, :20], -x[:, :20], 0 * x[:, :2] + 1], 1)) for x in (real, fake))
    solved = solve_hull_dual(real, fake, divergence, norm_bound=bound)
    assert solved.converged
    assert int((solved.weight != 0).sum()) < 90
    total = float(solved.weight.abs().sum())
    assert total <= bound * (1 + 1e-12)


def test_a_large_offset_of_all_outputs_changes_nothing():
    """Equal constants added to the outputs on both samples: the shift takes them up."""
    real, fake = tensors(2)
    plain = solve_hull_dual(real, fake, norm_bound=2.0, tolerance=1e-9)
    moved = solve_hull_dual(real + 1e4, fake + 1e4, norm_bound=2.0, tolerance=1e-9)
    # Values of 1e4 are averaged: 1e-16 of that, and some, is left of each output.
    assert moved.value == pytest.approx(plain.value, abs=1e-9)
    torch.testing.assert_close(moved.weight, plain.weight, rtol=0, atol=1e-4)


def test_warm_start_reaches_the_same_solution():
    real, fake = tensors(4)
    small = solve_hull_dual(real, fake, norm_bound=1.0)
    warm = solve_hull_dual(real, fake, norm_bound=2.0, initial=small.weight, tolerance=1e-10)
    cold = solve_hull_dual(real, fake, norm_bound=2.0, tolerance=1e-10)
    torch.testing.assert_close(warm.weight, cold.weight, rtol=0, atol=1e-6)
    too_long = solve_hull_dual(real, fake, norm_bound=0.5, initial=cold.weight)
    assert too_long.converged and float(too_long.weight.abs().sum()) <= 0.5 * (1 + 1e-12)


def test_float32_outputs_are_solved_in_float64():
    real, fake = (x.float() for x in tensors(5))
    solved = solve_hull_dual(real, fake, norm_bound=1.0)
    assert solved.weight.dtype == torch.float64 and solved.converged


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 30), st.floats(-3, 3), st.booleans())
def test_the_quadratic_programme_meets_the_optimality_conditions(seed, count, rank, log_radius, warm):
    """v >= 0, sum v <= R; slopes equal l >= 0 where v > 0, are below it elsewhere; l (R - sum v) = 0."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(rank, count)) * np.exp(rng.normal(size=count))
    hessian = torch.tensor(factor.T @ factor)
    linear = torch.tensor(rng.normal(size=count))
    radius = math.exp(log_radius)
    start = torch.zeros(count, dtype=torch.float64)
    if warm:
        start = torch.tensor(rng.dirichlet(np.full(count, 0.3)) * radius * rng.uniform(0.1, 1.0))
    value = _maximise_quadratic(hessian, linear, radius, start)
    assert bool((value >= 0).all()) and float(value.sum()) <= radius * (1 + 1e-12)
    slope = linear - hessian @ value
    multiplier = max(0.0, float(slope.max()))
    # What is lost to the optimum is at most <slope, v* - v> <= l R - <slope, v>, which is 0 under the conditions.
    lost = multiplier * radius - float(slope @ value)
    # Where the Hessian is singular, the ridge of 1e-12 of its diagonal decides, and the multipliers are of order one.
    assert lost <= 1e-8 * max(1.0, radius * float(linear.abs().max()), float(hessian.diagonal().mean()) * radius**2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_bound": 0.0}, "solve_hull_dual: norm_bound must be positive"),
        ({"norm_bound": math.nan}, "norm_bound must be positive"),
        ({"outputs_fake": torch.zeros(5, 3)}, r"\[150, 4\] and \[5, 3\]"),
        ({"outputs_fake": torch.zeros(0, 4)}, "non-empty"),
        ({"outputs_real": torch.zeros(0, 4)}, "outputs_real is empty"),
        ({"outputs_real": torch.zeros(4)}, r"outputs must be \[n, d\]"),
        ({"divergence": "wasserstein"}, "wasserstein"),
    ],
)
def test_bad_input_is_named(change, words):
    real, fake = tensors()
    arguments = {"outputs_real": real, "outputs_fake": fake, "norm_bound": 1.0, **change}
    with pytest.raises(ValueError, match=words):
        solve_hull_dual(**arguments)
