"""The linear class against an independent solver, its certificate, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dual_reference import FAMILIES, reference_value, samples

from refine_ext.linear_dual import solve_linear_dual

scipy_optimize = pytest.importorskip("scipy.optimize")


@pytest.mark.parametrize("divergence", FAMILIES)
@pytest.mark.parametrize("norm_bound", [0.3, 5.0])
def test_agrees_with_slsqp(divergence, norm_bound):
    real, fake = samples()
    solved = solve_linear_dual(
        torch.tensor(real), torch.tensor(fake), divergence, norm_bound=norm_bound, tolerance=1e-9
    )
    assert solved.converged
    assert float(solved.weight.norm()) <= norm_bound * (1 + 1e-12)
    ours = reference_value(solved.weight.numpy(), real, fake, divergence)
    assert solved.value == pytest.approx(ours, abs=1e-7)
    found = scipy_optimize.minimize(
        lambda w: -reference_value(w, real, fake, divergence),
        np.full(4, 0.01),
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda w: norm_bound**2 - w @ w},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    # SLSQP differentiates numerically: it may fall short, but it must never beat the certificate.
    assert -found.fun <= solved.value + solved.gap + 1e-7
    assert -found.fun == pytest.approx(solved.value, abs=2e-5)


def test_logistic_agrees_with_bfgs_and_has_the_best_intercept():
    real, fake = samples(1)

    def loss(parameters):
        w, b = parameters[:-1], parameters[-1]
        return np.logaddexp(0, -(real @ w + b)).mean() + np.logaddexp(0, fake @ w + b).mean()

    solved = solve_linear_dual(torch.tensor(real), torch.tensor(fake), norm_bound=50.0, objective="logistic")
    found = scipy_optimize.minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-10})
    assert -solved.value == pytest.approx(found.fun, abs=1e-9)
    np.testing.assert_allclose(solved.weight.numpy(), found.x[:-1], atol=2e-3)
    assert solved.intercept == pytest.approx(found.x[-1], abs=2e-3)


@pytest.mark.parametrize("divergence", ["kl", "jensen_shannon", "squared_hellinger"])
def test_the_primal_side_of_the_duality_equals_the_value(divergence):
    """min_Q' {D_f(Q'||Q) + B ||E_P phi - E_Q' phi||} with Q' = r Q, in closed form for each f."""
    from refine_ext.density_ratio import density_ratio

    f = {
        "kl": lambda u: u * np.log(u),
        "jensen_shannon": lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
        "squared_hellinger": lambda u: (np.sqrt(u) - 1) ** 2,
    }[divergence]
    real, fake = samples(2)
    solved = solve_linear_dual(torch.tensor(real), torch.tensor(fake), divergence, norm_bound=2.0, tolerance=1e-10)
    r = density_ratio(torch.tensor(fake) @ solved.weight, divergence).ratio.numpy()
    distance = np.linalg.norm(real.mean(0) - (r[:, None] * fake).mean(0))
    assert f(r).mean() + 2.0 * distance == pytest.approx(solved.value, abs=1e-8)


def test_gap_bounds_the_error_at_any_point():
    """Stopped early, the certificate still covers the distance to the optimum."""
    real, fake = (torch.tensor(x) for x in samples(3))
    best = solve_linear_dual(real, fake, norm_bound=5.0, tolerance=1e-12)
    for iterations in (0, 1, 2):
        early = solve_linear_dual(real, fake, norm_bound=5.0, tolerance=1e-12, max_iterations=iterations)
        assert not early.converged
        assert best.value - early.value <= early.gap * (1 + 1e-9)
        assert best.value > early.value


def test_more_features_than_samples_and_repeated_features():
    """A singular Hessian: the ball alone makes the problem well posed."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(20, 30, generator=generator, dtype=torch.float64).repeat(1, 2) + 0.2
    fake = torch.randn(25, 30, generator=generator, dtype=torch.float64).repeat(1, 2)
    for bound in (0.1, 1.0, 10.0):
        solved = solve_linear_dual(real, fake, norm_bound=bound)
        assert solved.converged
        # Copies of a feature share its weight: the minimal-norm solution is symmetric.
        torch.testing.assert_close(solved.weight[:30], solved.weight[30:], rtol=0, atol=1e-6)


def test_warm_start_reaches_the_same_solution():
    real, fake = (torch.tensor(x) for x in samples(4))
    small = solve_linear_dual(real, fake, norm_bound=1.0)
    warm = solve_linear_dual(real, fake, norm_bound=2.0, initial=small.weight, tolerance=1e-10)
    cold = solve_linear_dual(real, fake, norm_bound=2.0, tolerance=1e-10)
    torch.testing.assert_close(warm.weight, cold.weight, rtol=0, atol=1e-6)


def test_float32_features_are_solved_in_float64():
    real, fake = (torch.tensor(x).float() for x in samples(5))
    solved = solve_linear_dual(real, fake, norm_bound=1.0)
    assert solved.weight.dtype == torch.float64 and solved.converged


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_bound": 0.0}, "norm_bound must be positive"),
        ({"norm_bound": math.inf}, "norm_bound must be positive"),
        ({"objective": "hinge"}, "'hinge'"),
        ({"features_fake": torch.zeros(5, 3)}, r"\[150, 4\] and \[5, 3\]"),
        ({"features_fake": torch.zeros(0, 4)}, "non-empty"),
        ({"features_real": torch.zeros(0, 4)}, "features_real is empty"),
        ({"features_real": torch.zeros(4)}, r"must be \[n, d\]"),
    ],
)
def test_bad_input_is_named(change, words):
    real, fake = (torch.tensor(x) for x in samples())
    arguments = {"features_real": real, "features_fake": fake, "norm_bound": 1.0, **change}
    with pytest.raises(ValueError, match=words):
        solve_linear_dual(**arguments)
