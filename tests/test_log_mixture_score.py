"""The gradient of a log-mixture by x from the pass that makes the value: against extended precision, and autograd."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import log_mixture_reference as reference
import numpy as np
import pytest
import torch
from log_mixture_reference import KINDS, problem

import refine_ext as rx
from refine_ext import _C

ops = torch.ops.refine_ext


def check(p, what=None):
    value, score = ops.log_mixture_with_score(*p)
    assert score.dtype == p.x.dtype and value.dtype == torch.float64
    # With what is less than 2^-26 of the sum.
    assert torch.allclose(value, ops.log_mixture(*p, False, False)[0], rtol=1e-15, atol=2.0**-26), what
    ones = torch.ones(len(p.x), dtype=torch.float64)
    right = reference.gradients(p.reference, ones, p.scale)["x"]
    if p.x.shape[1] >= 256:  # weights below 2^-80 are zero
        terms = p.reference
        right = right._replace(allowed=right.allowed + 2.0**-80 * abs(terms.difference / terms.scale**2).sum(1))
    right.check(score, what)
    return value, score


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_against_the_reference(dtype, kind):
    for m, n, d in ((40, 30, 1), (33, 70, 2), (20, 65, 3), (37, 41, 16), (70, 90, 40)):
        for width in (0.05, 0.5, 20.0):
            p = problem(m, n, d, kind, dtype, weights=True, exclude=True, width=width)
            value, _ = check(p, (m, n, d, width))
            assert torch.equal(value, ops.log_mixture(*p, False, False)[0])


@pytest.mark.parametrize("kind", ["one", "per_center"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_dimensions(dtype, kind):
    """Where one centre counts and the others' distances are screened, and where all do."""
    for width in (0.02, 0.5, 20.0):
        p = problem(140, 600, 300, kind, dtype, weights=True, exclude=True, width=width)
        p = p._replace(x=p.x[:9], exclude=p.exclude[:9]) if dtype == torch.bfloat16 else p
        value, score = ops.log_mixture_with_score(*p)
        rows = slice(0, 12)
        check(p._replace(x=p.x[rows], exclude=p.exclude[rows]), width)
        # A row's bits do not depend on the others.
        alone = ops.log_mixture_with_score(p.x[rows], *p[1:4], p.exclude[rows])
        assert torch.equal(alone[0], value[rows]) and torch.equal(alone[1], score[rows])


def test_far_from_the_origin():
    """Differences are summed: rounding is of theirs, not of the data's. A mean less x would be off by 1e-4."""
    for d in (2, 16, 300):
        for dtype in (torch.float32, torch.float64):
            p = problem(50, 64, d, "one", dtype, offset=1e3, width=0.3)
            _, score = check(p)
            if dtype == torch.float32:
                exact = reference.gradients(p.reference, torch.ones(50).double(), p.scale)["x"].want
                assert abs(reference.numbers(score) - exact).max() <= 1e-5 * abs(exact).max()


def test_a_row_on_its_own_centre():
    """All of its gradient is that of centres of small weight."""
    for d in (3, 300):
        p = problem(80, 80, d, "one", torch.float32, width=0.2)
        p = p._replace(x=p.centers.clone())
        _, score = check(p)
        assert (score.abs().amax(1) > 0).all() and (d == 3 or score.abs().max() < 1e-3)


def test_extremes():
    for d in (3, 300):
        for scale, tolerance in ((1e-7, 1e-5), (1e8, 1e-5)):
            p = problem(40, 90, d, "one", torch.float32)
            p = p._replace(scale=torch.tensor(scale))
            value, score = ops.log_mixture_with_score(*p)
            # Of values of 1e13 and more the weights are those of exact exponents.
            terms = p.reference
            want = -(terms.p[:, :, None] * terms.difference).sum(1) / scale**2
            assert bool((value.abs() > 1e12).any()) == (scale < 1)
            assert abs(reference.numbers(score) - want).max() <= tolerance * abs(want).max()
    x, centers = torch.randn(40, 3), torch.randn(9, 3)
    x[3, 0], x[4] = math.nan, math.inf
    centers[5, 1] = math.inf  # of no weight
    value, score = ops.log_mixture_with_score(x, centers, torch.tensor(1.0), None, None)
    assert score[3].isnan().all() and (score[4] == 0).all() and value[4] == -math.inf
    rest = torch.arange(9) != 5
    others = ops.log_mixture_with_score(x, centers[rest], torch.tensor(1.0), None, None)[1]
    # The sums' orders differ.
    torch.testing.assert_close(score, others, rtol=1e-5, atol=1e-6, equal_nan=True)
    none = torch.full((9,), -math.inf)
    value, score = ops.log_mixture_with_score(x[:3], centers, torch.tensor(1.0), none, None)
    assert (value == -math.inf).all() and (score == 0).all()
    assert ops.log_mixture_with_score(x[:0], centers, torch.tensor(1.0), None, None)[1].shape == (0, 3)


def test_threads():
    for m, n, d in ((300, 500, 5), (3, 20000, 5), (100, 600, 300), (3, 9000, 300)):
        p = problem(m, n, d, "one", torch.float32, width=0.2)
        threads = torch.get_num_threads()
        try:
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(ops.log_mixture_with_score(*p))
        finally:
            torch.set_num_threads(threads)
        for value, score in results[1:]:
            assert torch.equal(value, results[0][0]) and torch.equal(score, results[0][1])


LEVEL = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from refine_ext import _C
import test_log_mixture_score as tests
assert _C.build_info()["simd_level"] == sys.argv[2], _C.build_info()["simd_level"]
for kind in ("one", "per_center", "per_dimension"):
    tests.test_against_the_reference(torch.float32, kind)
tests.test_many_dimensions(torch.float32, "per_center")
tests.test_a_row_on_its_own_centre()
tests.test_extremes()
"""


@pytest.mark.parametrize("level", [e for e in _C.build_info()["simd_compiled"] if e != _C.build_info()["simd_level"]])
def test_every_instruction_set(level):
    subprocess.run(
        [sys.executable, "-c", LEVEL, os.path.dirname(__file__), level],
        env={**os.environ, "REFINE_EXT_SIMD": level, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )


# ---- What autograd makes of it


class Calls:
    """The ops that are called meanwhile."""

    def __init__(self, monkeypatch):
        from refine_ext import _autograd

        self.names = []
        for name in ("recorded", "unrecorded"):
            original = getattr(_autograd, name)

            def noted(op, *inputs, original=original, **out):
                self.names.append(op.name().partition("::")[2])
                return original(op, *inputs, **out)

            for module in ("_autograd", "_call", "_ops_log_mixture"):
                if hasattr(sys.modules[f"refine_ext.{module}"], name):
                    monkeypatch.setattr(sys.modules[f"refine_ext.{module}"], name, noted)


def test_where_x_alone_needs_a_gradient(monkeypatch):
    p = problem(30, 40, 4, "one", torch.float32)
    calls = Calls(monkeypatch)
    x = p.x.clone().requires_grad_()
    grad = torch.randn(30)
    (got,) = torch.autograd.grad(rx.log_mixture(x, p.centers, 0.7), x, grad)
    assert calls.names == ["log_mixture_with_score"]
    p = p._replace(scale=torch.tensor(0.7))
    reference.gradients(p.reference, grad.double(), p.scale)["x"].check(got)

    calls.names.clear()
    centers = p.centers.clone().requires_grad_()
    both = torch.autograd.grad(rx.log_mixture(x, centers, 0.7), (x, centers), grad)
    assert set(calls.names) == {"log_mixture", "log_mixture_backward"}
    torch.testing.assert_close(both[0], got, rtol=1e-5, atol=1e-6)

    calls.names.clear()
    value, _ = rx.log_mixture(x, p.centers, 0.7, return_mean=True)
    torch.testing.assert_close(torch.autograd.grad(value, x, grad)[0], got, rtol=1e-5, atol=1e-6)
    assert calls.names == ["log_mixture", "log_mixture_backward"]


def test_second_derivatives():
    p = problem(5, 6, 3, "one")
    x = p.x.clone().requires_grad_()

    def call(x):
        return rx.log_mixture(x, p.centers, 0.9)

    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)
    (first,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(call(x).sum(), x)
    torch.testing.assert_close(first.detach(), again)


def test_a_row_without_gradient_stays_without():
    """Though its score may not be finite."""
    x = torch.tensor([[0.0], [math.nan]], requires_grad=True)
    value = rx.log_mixture(x, torch.tensor([[1.0], [2.0]]), 0.5, nan_policy="propagate")
    (grad,) = torch.autograd.grad(value[:1].sum(), x)
    assert grad[1] == 0 and grad[0] > 0


def test_torchs_machinery():
    p = problem(12, 5, 3, "one", torch.float32, weights=True)
    torch.library.opcheck(ops.log_mixture_with_score.default, (p.x.clone().requires_grad_(), *p[1:]))
    x, exclude, scales = p.x.view(3, 4, 3), torch.randint(-1, 5, (3, 4)), torch.rand(3) + 0.5
    for call, arguments in (
        (lambda x, e: ops.log_mixture_with_score(x, *p[1:4], e), (x, exclude)),
        (lambda x, s: ops.log_mixture_with_score(x, p.centers, s, None, None), (x, scales)),
    ):
        got = torch.vmap(call)(*arguments)
        for i in range(3):
            for a, b in zip(got, call(*(t[i] for t in arguments)), strict=True):
                torch.testing.assert_close(a[i], b)
    with torch.autocast("cpu", torch.bfloat16):
        half = ops.log_mixture_with_score(p.x.bfloat16(), p.centers.bfloat16(), *p[2:])
    assert half[1].dtype == torch.float32

    def loss(x):
        return rx.log_mixture(x, p.centers, 0.8, nan_policy="propagate").square().sum()

    x = p.x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.func.grad(loss)(p.x), want)


@pytest.mark.parametrize("stats", [False, True])
def test_streamed_centers(stats):
    """As if in memory, also where the data are far from the origin."""
    p = problem(20, 50, 3, "one", torch.float32, offset=1e3)
    x = p.x.clone().requires_grad_()
    grad = torch.randn(20)
    result = rx.log_mixture(
        x,
        lambda: iter(np.split(p.centers.numpy(), 5)),
        float(p.scale),
        return_stats=stats,
    )
    (got,) = torch.autograd.grad(result.value if stats else result, x, grad)
    # As without, and a rounding for each block.
    (want,) = torch.autograd.grad(rx.log_mixture(x, p.centers, float(p.scale)), x, grad)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
