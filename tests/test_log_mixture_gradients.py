"""Float32 gradients of log-mixtures, of few and of many dimensions: against float64 sums row by row."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from refine_ext import _C

ops = torch.ops.refine_ext

# Of the largest entry. Where one centre counts: float32's exp (2e-7 at worst), the rounding of differences, and sums of
# some hundred terms. The exponent is the value's to the bit, so that p = 1 comes out as 1 though it is of hundreds.
GRADIENT = 3e-6
# Where several count, the ratio of their weights carries float32's rounding of their squared distances, 1e-7 of
# exponents of up to 166.
SEVERAL = 2e-5


def gradients(x, centers, scale, log_weights=None, exclude=None, grad=None):
    """Of sum_i grad_i L_i by x, centers, scale and log_weights, in float64."""
    x, y = x.double(), centers.double()
    kind = scale.shape
    s = scale.double().reshape(-1, 1) if scale.ndim < 2 else scale.double()
    s = s.expand(len(y), y.shape[1])
    grad = torch.ones(len(x), dtype=torch.float64) if grad is None else grad
    to_x, to_y, to_s, to_w = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(y), torch.zeros(len(y)).double()
    for i, row in enumerate(x):
        difference = row - y
        t = -0.5 * (difference / s).square().sum(1)
        if log_weights is not None:
            t = t + log_weights.double()
        if exclude is not None and exclude[i] >= 0:
            t[exclude[i]] = -math.inf
        p = (grad[i] * t.softmax(0))[:, None]
        to_x[i] = -(p * difference / s**2).sum(0)
        to_y += p * difference / s**2
        to_s += p * difference**2 / s**3
        to_w += p[:, 0]
    to_s = to_s if len(kind) == 2 else to_s.sum(1) if kind == (len(y),) else to_s.sum().reshape(kind)
    return to_x, to_y, to_s, to_w


def assert_right(x, centers, scale, log_weights=None, exclude=None, grad=None, tolerance=GRADIENT):
    tensors = [t.detach().clone().requires_grad_() for t in (x, centers, scale)]
    weights = torch.zeros(len(centers)) if log_weights is None else log_weights
    tensors.append(weights.clone().requires_grad_())
    value = ops.log_mixture(*tensors, exclude, False, False)[0]
    got = torch.autograd.grad(value, tensors, torch.ones_like(value) if grad is None else grad)
    for name, one, want in zip("xysw", got, gradients(x, centers, scale, weights, exclude, grad), strict=True):
        assert (one - want).abs().max() <= tolerance * want.abs().max(), name
    # Of one input alone: other kernels.
    for i, one in enumerate(got):
        alone = [t.detach().requires_grad_(i == k) for k, t in enumerate(tensors)]
        value = ops.log_mixture(*alone, exclude, False, False)[0]
        (own,) = torch.autograd.grad(value, alone[i], torch.ones_like(value) if grad is None else grad)
        assert (own - one).abs().max() <= tolerance * one.abs().max(), "xysw"[i]
    return got


def scales(kind, n, d, s):
    generator = torch.Generator().manual_seed(3)
    shape = {"shared": (), "per_center": (n,), "per_dimension": (n, d)}[kind]
    return s * (1 + 0.2 * torch.rand(shape, generator=generator))


def points(m, n, d, s, seed=0):
    """Noise of standard deviation s about 0.95 times the centres."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(n, d, generator=generator)
    x = 0.95 * centers[torch.arange(m) % n] + s * torch.randn(m, d, generator=generator)
    return x, centers


@pytest.mark.parametrize("kind", ["shared", "per_center", "per_dimension"])
@pytest.mark.parametrize("d", [3, 16, 64, 255, 256, 300, 784])
def test_where_few_centres_count(d, kind):
    """Exponents of some hundreds, whose rounding must not reach the weights."""
    x, centers = points(200, 170, d, 0.3)
    generator = torch.Generator().manual_seed(1)
    weights, grad = torch.randn(170, generator=generator), torch.randn(200, generator=generator).double()
    assert_right(x, centers, scales(kind, 170, d, 0.3), weights, None, grad)


@pytest.mark.parametrize("kind", ["shared", "per_center"])
@pytest.mark.parametrize("spread", [0.3, 3.0, 20.0])
def test_many_dimensions(spread, kind):
    """Several blocks of rows and of centres, where one centre counts, where some do and where all do."""
    x, centers = points(300, 600, 265, spread)
    generator = torch.Generator().manual_seed(1)
    weights, grad = torch.randn(600, generator=generator), torch.randn(300, generator=generator).double()
    grad[[0, 17, 299]] = 0.0
    exclude = torch.arange(300) * 2 - 1
    # Without its own centre a row is as near to several others, at exponents of up to 3000.
    assert_right(x, centers, scales(kind, 600, 265, spread), weights, exclude, grad, 3e-4 if spread < 1 else SEVERAL)
    assert_right(x, centers, scales(kind, 600, 265, spread), weights, None, grad, GRADIENT if spread < 1 else SEVERAL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    x, centers = (t.to(dtype) for t in points(130, 200, 300, 0.5))
    # A rounding to the storage.
    assert_right(x, centers, torch.tensor(0.5), tolerance=torch.finfo(dtype).eps)


def test_the_same_bits_in_any_company():
    x, centers = points(400, 600, 265, 0.4)
    for spread in (0.4, 20.0):
        scale = torch.tensor(spread, requires_grad=True)

        def run(rows, over_rows=True, scale=scale):
            leaves = [rows.detach().requires_grad_(), centers.clone().requires_grad_(over_rows), scale]
            value = ops.log_mixture(*leaves, None, None, False, False)[0]
            return torch.autograd.grad(value.sum(), leaves if over_rows else leaves[:1])

        whole, alone, threads = run(x), run(x, False)[0], torch.get_num_threads()
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                for one, other in zip(run(x), whole, strict=True):
                    assert torch.equal(one, other)
                assert torch.equal(run(x[:70], False)[0], alone[:70])
        finally:
            torch.set_num_threads(threads)


def test_rows_that_are_not_finite():
    x, centers = points(80, 150, 260, 0.4)
    good = [i for i in range(80) if i not in (3, 4)]
    x[3, 5], x[4] = math.nan, -math.inf
    x.requires_grad_()
    centers[7, 0] = math.inf  # of no weight
    value = ops.log_mixture(x, centers, torch.tensor(0.4), None, None, False, False)[0]
    (grad,) = torch.autograd.grad(value.sum(), x)
    assert grad[3].isnan().all() and (grad[4] == 0).all()
    centers[7] = 1e6
    want = gradients(x[good].detach(), centers, torch.tensor(0.4))[0]
    assert (grad[good] - want).abs().max() <= GRADIENT * want.abs().max()


LEVEL = """
import sys
sys.path.insert(0, sys.argv[1])
from refine_ext import _C
import test_log_mixture_gradients as tests
assert _C.build_info()["simd_level"] == sys.argv[2], _C.build_info()["simd_level"]
for d in (16, 300):
    tests.test_where_few_centres_count(d, "shared")
tests.test_many_dimensions(20.0, "per_center")
tests.test_the_same_bits_in_any_company()
tests.test_rows_that_are_not_finite()
"""


@pytest.mark.parametrize("level", [e for e in _C.build_info()["simd_compiled"] if e != _C.build_info()["simd_level"]])
def test_every_instruction_set(level):
    subprocess.run(
        [sys.executable, "-c", LEVEL, os.path.dirname(__file__), level],
        env={**os.environ, "REFINE_EXT_SIMD": level, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
