"""`rademacher`, `rademacher_linear` and `rademacher_l1`: values, identities, bounds, gradients, torch's machinery."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rademacher_reference import LARGEST, MAGNITUDE, NORM, all_signs, float_suprema, signs

import refine_ext as rx

CLASSES = {
    "finite": (rx.rademacher, MAGNITUDE),
    "one-sided": (lambda x, *a, **k: rx.rademacher(x, *a, absolute=False, **k), LARGEST),
    "linear": (lambda x, *a, **k: rx.rademacher_linear(x, 1.0, *a, **k), NORM),
    "l1": (lambda x, *a, **k: rx.rademacher_l1(x, 1.0, *a, **k), MAGNITUDE),
}
classes = pytest.mark.parametrize(("function", "supremum"), CLASSES.values(), ids=CLASSES)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def rounding(x: torch.Tensor) -> float:
    """Each value of a block is rounded to 52 bits, or 21 and the sign, of the block's largest."""
    return (2.0**-50 if x.dtype == torch.float64 else 2.0**-21) * float(x.detach().double().abs().max())


# ---- Values.


@classes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (130, 1), (60, 7), (1100, 40)])
def test_each_supremum_is_that_of_the_signs(function, supremum, dtype, n, m):
    x = torch.randn(n, m).to(dtype)
    estimate = function(x, 20, 11, first_draw=3)
    want = float_suprema(signs(n, 20, 3, 11), x.double().numpy(), supremum)
    # A norm sums the roundings of m columns.
    allowed = rounding(x) * (math.sqrt(m) if supremum == NORM else 1.0)
    np.testing.assert_allclose(estimate.suprema.numpy(), want, rtol=1e-15, atol=allowed)
    assert (estimate.n, estimate.draws, estimate.seed, estimate.ranges) == (n, 20, 11, ((3, 20),))
    if supremum != NORM:
        sums = signs(n, 20, 3, 11) @ x.double().numpy() / n
        chosen = sums[np.arange(20), estimate.argmax.numpy()]
        np.testing.assert_allclose(np.abs(chosen) if supremum == MAGNITUDE else chosen, want, atol=2 * allowed)


@given(
    n=st.integers(1, 300), m=st.integers(1, 40), skip=st.integers(1, 3), transposed=st.booleans(),
    dtype=st.sampled_from(DTYPES), name=st.sampled_from(list(CLASSES)), seed=st.integers(-(2**63), 2**64 - 1),
)  # fmt: skip
def test_strides_and_seeds_of_any_kind(n, m, skip, transposed, dtype, name, seed):
    x = (torch.randn(m, n).T if transposed else torch.randn(n * skip, m)[::skip]).to(dtype)
    function, supremum = CLASSES[name]
    want = float_suprema(signs(n, 5, 0, seed % 2**64), x.double().numpy(), supremum)
    got = function(x, 5, seed).suprema
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-15, atol=rounding(x) * math.sqrt(m))
    assert torch.equal(got, function(x.contiguous(), 5, seed).suprema)


@classes
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 4), (9, 2), (10, 6)])
def test_all_sign_vectors_once(function, supremum, n, m):
    x = torch.randn(n, m, dtype=torch.float64)
    exact = function(x, "all")
    want = float_suprema(all_signs(n), x.numpy(), supremum)
    np.testing.assert_allclose(np.sort(exact.suprema.numpy()), np.sort(want), rtol=0, atol=1e-14)
    assert exact.stderr == 0.0 and exact.draws == exact.effective_draws == 2**n
    assert exact.upper(0.01) == float(exact) == float(exact.mean)
    # Monte Carlo within five standard errors, and the rounding where its signs leave no error.
    estimate = function(x, 3000, 5)
    assert abs(float(estimate) - float(exact)) <= 5 * estimate.stderr + 1e-15
    in_blocks = function(x, "all", memory=16 * 10 * 7)
    assert torch.allclose(in_blocks.suprema, exact.suprema, rtol=0, atol=1e-14)


def test_enumeration_of_sixteen_samples_against_draws():
    x = torch.randn(16, 9)
    exact, estimate = rx.rademacher(x, "all"), rx.rademacher(x, 20_000, seed=1)
    assert abs(float(estimate) - float(exact)) < 4 * estimate.stderr < 0.01


# ---- What theory says.


@pytest.mark.parametrize("seed", range(4))
def test_finite_classes_lie_between_khintchine_and_massart(seed):
    torch.manual_seed(seed)
    n, m = 12, 30
    x = torch.randn(n, m, dtype=torch.float64)
    norm = float(x.norm(dim=0).max())
    one_sided, both = float(rx.rademacher(x, "all", absolute=False)), float(rx.rademacher(x, "all"))
    assert 0.0 <= one_sided <= norm * math.sqrt(2 * math.log(m)) / n  # Massart's lemma
    assert norm / (math.sqrt(2) * n) <= both <= norm * math.sqrt(2 * math.log(2 * m)) / n  # Khintchine, Massart
    assert one_sided <= both
    assert math.isclose(both, float(rx.rademacher(torch.cat([x, -x], 1), "all", absolute=False)), rel_tol=1e-14)


@pytest.mark.parametrize("seed", range(4))
def test_linear_classes_lie_between_khintchine_and_jensen(seed):
    torch.manual_seed(seed)
    n, d, bound = 12, 1 + 3 * seed, 2.5
    x = torch.randn(n, d, dtype=torch.float64) * torch.rand(n, 1)
    jensen = bound * float(x.norm()) / n
    assert jensen / math.sqrt(2) <= float(rx.rademacher_linear(x, bound, "all")) <= jensen
    estimate = rx.rademacher_linear(torch.randn(3000, d), bound, 400, 0)
    assert estimate.draws == 400 and estimate.stderr < 0.05 * float(estimate)


def test_khintchine_is_attained():
    """E |sigma_1 + sigma_2| = 1 = sqrt(2) / sqrt(2)."""
    x = torch.ones(2, 1, dtype=torch.float64)
    assert math.isclose(float(rx.rademacher_linear(x, 1.0, "all")), x.norm() / (math.sqrt(2) * 2), rel_tol=1e-15)


def test_linear_in_closed_form():
    """Orthogonal features: every sign vector gives B sqrt(sum ||phi_i||^2) / n; one sample: B ||phi||."""
    scale = torch.rand(50) + 0.5
    estimate = rx.rademacher_linear(torch.diag(scale), 3.0, 64, 2)
    # Values of 21 bits and the sign.
    assert torch.allclose(estimate.suprema, 3 * scale.double().norm() / 50, rtol=2e-7)
    phi = torch.randn(1, 9, dtype=torch.float64)
    assert torch.allclose(rx.rademacher_linear(phi, 3.0, 5, 0).suprema, 3 * phi.norm(), rtol=1e-14)
    assert math.isclose(rx.rademacher_linear(phi, 3.0, 5, 0).bound, 3 * phi.norm(), rel_tol=1e-15)


def test_the_1_norm_ball_is_the_hull_of_its_corners():
    x = torch.randn(200, 8)
    ball, corners = rx.rademacher_l1(x, 2.0, 100, 4), rx.rademacher(2.0 * x, 100, 4)
    assert torch.equal(ball.suprema, corners.suprema) and torch.equal(ball.argmax, corners.argmax)
    assert ball.bound == corners.bound == 2 * float(x.abs().max())


def test_a_convex_hull_costs_nothing():
    x = torch.randn(200, 8, dtype=torch.float64)
    inside = x @ torch.rand(8, 50, dtype=torch.float64).softmax(0)
    hull, corners = rx.rademacher(torch.cat([inside, x], 1), 100, 4), rx.rademacher(x, 100, 4)
    assert torch.equal(hull.suprema, corners.suprema) and (hull.argmax >= 50).all()


def test_scale_and_duplicates():
    x = torch.randn(70, 5)
    estimate = rx.rademacher(x, 30, 1)
    assert torch.equal(rx.rademacher(x * 2.0**60, 30, 1).suprema, estimate.suprema * 2.0**60)
    assert torch.equal(rx.rademacher(x * 2.0**-60, 30, 1).suprema, estimate.suprema * 2.0**-60)
    twice = rx.rademacher(torch.cat([x, x], 1), 30, 1)
    assert torch.equal(twice.suprema, estimate.suprema) and torch.equal(twice.argmax, estimate.argmax)
    zero = rx.rademacher(torch.zeros(70, 5), 30, 1)
    assert float(zero) == zero.stderr == zero.bound == zero.upper() == 0.0


# ---- Gaussian complexity.


def test_gaussian_complexity_of_one_function():
    """(1/n) E |sum_i z_i f(x_i)| = sqrt(2 / pi) ||f|| / n."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for n in (2, 1500):
            f = torch.randn(n).to(dtype)
            estimate = rx.rademacher(f, 4000, 3, distribution="normal")
            assert abs(float(estimate) - math.sqrt(2 / math.pi) * float(f.double().norm()) / n) < 4 * estimate.stderr
            assert 0.005 * float(estimate) < estimate.stderr < 0.02 * float(estimate)


def test_gaussian_complexity_of_orthogonal_features():
    """(B / n) E of a chi variable with n degrees of freedom."""
    n = 40
    estimate = rx.rademacher_linear(torch.eye(n), 2.0, 4000, 0, distribution="normal")
    want = 2 / n * math.sqrt(2) * math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2))
    assert abs(float(estimate) - want) < 4 * estimate.stderr


@classes
def test_signs_cost_at_most_what_normals_cost_times_a_constant(function, supremum):
    """R <= sqrt(pi / 2) G, with room for the two errors."""
    x = torch.randn(300, 12)
    gauss, rademacher = function(x, 2000, 0, distribution="normal"), function(x, 2000, 0)
    assert float(rademacher) <= math.sqrt(math.pi / 2) * float(gauss) + 4 * (rademacher.stderr + 2 * gauss.stderr)


@classes
def test_normal_multipliers_from_any_blocks(function, supremum):
    x = torch.randn(3000, 12, dtype=torch.float64)
    whole = function(x, 50, 2, distribution="normal")
    parts = function(x, 20, 2, distribution="normal").merge(function(x, 30, 2, distribution="normal", first_draw=20))
    streamed = function(x.split(700), 50, 2, distribution="normal", memory=16 * 12 * 9)
    for other in (parts, streamed):  # matrix products in another order
        assert torch.allclose(other.suprema, whole.suprema, rtol=1e-13)
        assert (other.n, other.draws) == (3000, 50)
        assert math.isclose(other.bound, whole.bound, rel_tol=1e-15)


# ---- The estimate's own figures.


def test_upper_fails_no_more_often_than_delta():
    """One function, one-sided: the estimate is a mean of signs around zero, where the limit is near its best."""
    x = torch.ones(40, 1)
    for delta in (0.5, 0.1):
        misses = sum(rx.rademacher(x, 5, seed, absolute=False).upper(delta) < 0.0 for seed in range(600))
        # A normal exceeds sqrt(2 log(1 / delta)) with probability 0.12 and 0.016; a count's error is at most 25.
        assert 0 < misses <= 600 * delta, (delta, misses)


def test_upper_is_mcdiarmids():
    x = torch.where(torch.rand(8, 3) > 0.5, 1.0, -1.0)
    estimate = rx.rademacher(x, 40, 0)
    assert math.isclose(estimate.upper(0.02) - float(estimate), math.sqrt(2 * math.log(50) / (8 * 40)), rel_tol=1e-12)
    wide = rx.rademacher(x, 40, 0, bound=2.0)
    assert math.isclose(wide.upper(0.02) - float(wide), 2 * math.sqrt(2 * math.log(50) / (8 * 40)), rel_tol=1e-12)
    assert (estimate.bound, wide.bound) == (1.0, 2.0)


def test_effective_draws():
    x = torch.randn(3, 2)
    few = rx.rademacher(x, 500, 0)
    want = len({tuple(row) for row in signs(3, 500, 0, 0)})
    assert few.effective_draws == want == 8
    assert rx.rademacher(x, 3, 7, first_draw=2**33).effective_draws == len(
        {tuple(row) for row in signs(3, 3, 2**33, 7)}
    )
    assert rx.rademacher(torch.randn(63, 2), 300, 0).effective_draws == 300
    assert rx.rademacher(torch.randn(64, 2), 300, 0).effective_draws == 300


# ---- Gradients.


@classes
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_gradients_in_outputs(function, supremum, distribution):
    x = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, 7, 3, distribution=distribution).mean, (x,))
    assert torch.autograd.gradcheck(lambda x: function(x, 7, 3, distribution=distribution).suprema, (x,))


@classes
def test_gradients_of_all_sign_vectors(function, supremum):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, "all").mean, (x,))


def test_the_gradient_is_the_maximisers_signs():
    x = torch.randn(200, 5, requires_grad=True)
    estimate = rx.rademacher(x, 60, 9)
    estimate.mean.backward()
    sigma, want = signs(200, 60, 0, 9), np.zeros((200, 5))
    sums = sigma @ x.detach().double().numpy()
    for k, j in enumerate(np.abs(sums).argmax(1)):
        want[:, j] += np.sign(sums[k, j]) * sigma[k] / (200 * 60)
    np.testing.assert_allclose(x.grad.numpy(), want, rtol=0, atol=1e-7 / 200)


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_gaussian_gradients_over_several_blocks(distribution):
    """Directional differences of a linear class over 9000 samples, which the multipliers are made in two blocks for."""
    x = torch.randn(9000, 3, dtype=torch.float64, requires_grad=True)
    way = torch.randn(9000, 3, dtype=torch.float64)

    def value(x):
        return rx.rademacher_linear(x, 1.0, 40, 3, distribution=distribution).mean

    value(x).backward()
    slope = (value(x.detach() + 1e-5 * way) - value(x.detach() - 1e-5 * way)) / 2e-5
    # the difference's error is of second order in the step
    assert math.isclose(float((x.grad * way).sum()), float(slope), rel_tol=1e-7)


def test_a_penalty_in_training_lowers_the_complexity():
    """Twenty discriminators fit noisy labels of 60 points; the penalty takes most of their complexity."""
    x, labels = torch.randn(60, 10), torch.randint(0, 2, (60, 1)).float()

    def train(penalty: float) -> tuple[float, float]:
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.Tanh(), torch.nn.Linear(32, 20))
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        for step in range(120):
            h = net(x)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(h, labels.expand_as(h))
            loss = loss + penalty * rx.rademacher(h, 32, seed=step).mean
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(rx.rademacher(net(x).detach(), 2000, 10**6)), float(loss.detach())

    free, _ = train(0.0)
    held, loss = train(1.0)
    assert held < 0.3 * free, (held, free)
    assert math.isfinite(loss)


# ---- torch's machinery.


def test_compile_makes_one_graph():
    x = torch.randn(40, 6)

    def call(x, seed):
        estimate = rx.rademacher(x, 16, seed)
        return estimate.suprema, estimate.argmax, estimate.mean

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 2**40):
        got, want = compiled(x, seed), call(x, seed)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert torch.allclose(got[2], want[2], rtol=1e-15)
    y = x.clone().requires_grad_()
    z = x.clone().requires_grad_()
    compiled(y, 5)[2].backward()
    call(z, 5)[2].backward()
    assert torch.equal(y.grad, z.grad)
    linear = torch.compile(lambda x: rx.rademacher_linear(x, 2.0, 16, 3).suprema, fullgraph=True, backend="aot_eager")
    assert torch.equal(linear(x), rx.rademacher_linear(x, 2.0, 16, 3).suprema)


@classes
def test_vmap_gives_every_example_the_same_signs(function, supremum):
    x = torch.randn(3, 40, 6)
    got = torch.func.vmap(lambda x: function(x, 16, 3).suprema)(x)
    assert torch.equal(got, torch.stack([function(each, 16, 3).suprema for each in x]))
    got = torch.func.vmap(lambda x: function(x, 16, 3).suprema, in_dims=1)(x.movedim(0, 1))
    assert torch.equal(got, torch.stack([function(each, 16, 3).suprema for each in x]))


@classes
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_autocast_leaves_the_outputs_as_they_are(function, supremum, distribution):
    x = torch.randn(40, 6, requires_grad=True)
    outside = function(x, 16, 3, distribution=distribution)
    (want,) = torch.autograd.grad(outside.mean, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = function(x, 16, 3, distribution=distribution)
        (got,) = torch.autograd.grad(inside.mean, x)
    assert torch.equal(inside.suprema, outside.suprema) and torch.equal(got, want)


def test_threads_do_not_matter(threads):
    x = torch.randn(2500, 70)
    results = []
    for count in (1, 3):
        threads(count)
        results.append([function(x, 80, 1).suprema for function, _ in CLASSES.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_seeds():
    x = torch.randn(100, 4)
    torch.manual_seed(3)
    first, second = rx.rademacher(x, 10), rx.rademacher(x, 10)
    torch.manual_seed(3)
    again = rx.rademacher(x, 10)
    assert first.seed == again.seed != second.seed
    assert torch.equal(first.suprema, again.suprema) and not torch.equal(first.suprema, second.suprema)
    assert torch.equal(rx.rademacher(x, 10, -1).suprema, rx.rademacher(x, 10, 2**64 - 1).suprema)
    assert torch.equal(rx.rademacher(x, 10, first.seed).suprema, first.suprema)


def test_calls_of_seconds_are_split_into_calls_of_the_same_draws(monkeypatch):
    from refine_ext import rademacher_suprema

    x = torch.randn(64, 8)
    want = rx.rademacher(x, 300, 1)
    monkeypatch.setattr(rademacher_suprema, "_CALL", 1)
    monkeypatch.setattr(rademacher_suprema, "_CALL_DRAWS", 128)
    got = rx.rademacher(x, 300, 1, progress=False)
    assert torch.equal(got.suprema, want.suprema) and torch.equal(got.argmax, want.argmax)
    assert got.bound == want.bound
