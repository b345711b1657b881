"""`rademacher_rkhs`: a Gram matrix, a kernel in blocks, and what neither may be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from rademacher_reference import all_signs, signs

import refine_ext as rx


def gaussian_kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.exp(-0.5 * torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2)


def reference(gram: torch.Tensor, sigma: np.ndarray) -> np.ndarray:
    g = gram.double().numpy()
    return np.sqrt(np.einsum("ki,ij,kj->k", sigma, g, sigma, optimize=True)) / len(g)


@pytest.mark.parametrize("n", [1, 7, 2100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_each_supremum_is_that_of_the_signs(n, dtype):
    x = torch.randn(n, 3, dtype=dtype)
    gram = gaussian_kernel(x, x)
    want = 2.0 * reference(gram, signs(n, 9, 4, 5))
    estimate = rx.rademacher_rkhs(gram, 2.0, 9, 5, first_draw=4)
    # Half of n^2 values in [0, 1] are rounded to 21 bits or 52, and the root divides by 2 sup n^2.
    allowed = 4 * n * (2.0**-22 if dtype == torch.float32 else 2.0**-52) / (n**2 * want.min())
    np.testing.assert_allclose(estimate.suprema.numpy(), want, rtol=1e-13, atol=allowed)
    assert estimate.bound == 2.0 and estimate.argmax is None
    by_kernel = rx.rademacher_rkhs(None, 2.0, 9, 5, kernel=gaussian_kernel, x=x, first_draw=4)
    assert torch.allclose(by_kernel.suprema, estimate.suprema, rtol=2e-6 if dtype == torch.float32 else 1e-14)


def test_the_linear_kernel_is_the_linear_class():
    x = torch.randn(2500, 6, dtype=torch.float64)
    linear = rx.rademacher_linear(x, 3.0, 40, 1)
    kernel = rx.rademacher_rkhs(kernel=lambda a, b: a @ b.T, x=x, norm_bound=3.0, draws=40, seed=1)
    assert torch.allclose(kernel.suprema, linear.suprema, rtol=1e-12)
    assert math.isclose(kernel.bound, linear.bound, rel_tol=1e-12)


def test_all_sign_vectors_once():
    x = torch.randn(9, 4, dtype=torch.float64)
    gram = gaussian_kernel(x, x)
    exact = rx.rademacher_rkhs(gram, 1.0, "all")
    np.testing.assert_allclose(np.sort(exact.suprema.numpy()), np.sort(reference(gram, all_signs(9))), rtol=1e-12)
    jensen = math.sqrt(float(gram.trace())) / 9
    assert exact.stderr == 0.0 and jensen / math.sqrt(2) <= float(exact) <= jensen
    estimate = rx.rademacher_rkhs(kernel=gaussian_kernel, x=x, draws=3000, seed=0)
    assert abs(float(estimate) - float(exact)) < 5 * estimate.stderr


def test_parts_and_groups_of_draws_are_one_run():
    x = torch.randn(2100, 3)
    whole = rx.rademacher_rkhs(kernel=gaussian_kernel, x=x, draws=30, seed=2)
    groups = rx.rademacher_rkhs(kernel=gaussian_kernel, x=x, draws=30, seed=2, memory=24 * 2048 * 7)
    parts = rx.rademacher_rkhs(kernel=gaussian_kernel, x=x, draws=1, seed=2).merge(
        rx.rademacher_rkhs(kernel=gaussian_kernel, x=x, draws=29, seed=2, first_draw=1)
    )
    assert torch.equal(whole.suprema, groups.suprema) and torch.equal(whole.suprema, parts.suprema)
    once = rx.rademacher_rkhs(kernel=gaussian_kernel, x=x, draws=8, seed=2, stderr=whole.stderr)
    assert torch.equal(once.suprema[:30], whole.suprema[: once.draws]) and once.stderr <= whole.stderr


def test_a_kernel_is_asked_for_blocks_and_by_symmetry_for_half_of_them():
    asked = []

    def kernel(a, b):
        asked.append((len(a), len(b)))
        return a @ b.T

    x = torch.randn(5000, 2)
    rx.rademacher_rkhs(kernel=kernel, x=x, draws=3, seed=0)
    assert sorted(asked) == sorted([(2048, 2048)] * 3 + [(2048, 904)] * 2 + [(904, 904)])


def test_samples_of_any_shape_and_gaussian_complexity():
    x = np.random.default_rng(0).normal(size=(40, 2, 3)).astype(np.float32)

    def kernel(a, b):
        return a.flatten(1) @ b.flatten(1).T

    normal = rx.rademacher_rkhs(kernel=kernel, x=x, draws=500, seed=0, distribution="normal")
    linear = rx.rademacher_linear(x.reshape(40, 6), 1.0, 500, 0, distribution="normal")
    assert torch.allclose(normal.suprema, linear.suprema, rtol=1e-5)
    exact = rx.rademacher_rkhs(torch.eye(1), 1.0, 4000, 0, distribution="normal")
    assert abs(float(exact) - math.sqrt(2 / math.pi)) < 4 * exact.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "give gram, or kernel and x, got none of them"),
        ({"x": torch.ones(3, 2)}, TypeError, "give gram, or kernel and x, got x"),
        ({"gram": torch.eye(3), "x": torch.ones(3, 2)}, TypeError, "give gram, or kernel and x, got gram, x"),
        ({"gram": torch.ones(2, 3)}, ValueError, r"gram must be \[n, n\], got shape \[2, 3\]"),
        ({"gram": torch.ones(3, 3).triu()}, ValueError, "gram must be symmetric"),
        ({"gram": -torch.eye(3)}, ValueError, "the Gram matrix must be positive semidefinite"),
        ({"gram": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, ValueError, "the Gram matrix must be positive semidefinite"),
        ({"gram": torch.eye(3, requires_grad=True)}, ValueError, "gram requires gradients"),
        ({"gram": torch.eye(3, dtype=torch.int64)}, TypeError, "gram must be float64"),
        ({"gram": [[1.0]]}, TypeError, "gram must be a torch.Tensor, got list"),
        ({"kernel": 3, "x": torch.ones(3, 2)}, TypeError, "kernel must be a function of two batches.*got int"),
        ({"kernel": lambda a, b: a, "x": torch.ones(3, 2)}, ValueError, r"kernel must return \[3, 3\].*got \[3, 2\]"),
        (
            {"kernel": lambda a, b: torch.ones(3, 3).tril(), "x": torch.ones(3, 2)},
            ValueError,
            "kernel must be symmetric",
        ),
        ({"gram": torch.eye(3), "norm_bound": 0}, ValueError, "norm_bound must be positive"),
        ({"gram": torch.eye(3), "draws": 0}, ValueError, "draws must be at least 1"),
        ({"gram": torch.eye(30), "draws": "all"}, ValueError, "draws='all' takes at most 20 samples, got 30"),
        ({"gram": torch.eye(3), "bound": 0.5}, ValueError, r"bound must be finite and at least .* 1\.0, got 0\.5"),
        ({"gram": torch.eye(3), "distribution": "gauss"}, ValueError, "distribution must be rademacher or normal"),
        ({"gram": torch.eye(3), "nan_policy": "omit"}, ValueError, "nan_policy must be raise or propagate"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=f"^rademacher_rkhs: {message}"):
        rx.rademacher_rkhs(**arguments)


def test_asymmetry_far_from_the_diagonal_is_found():
    gram = torch.eye(2100)
    gram[5, 2099] = 0.5
    with pytest.raises(ValueError, match=r"^rademacher_rkhs: gram must be symmetric"):
        rx.rademacher_rkhs(gram, 1.0, 2, 0)


def test_nan_is_found_where_it_is():
    gram = torch.eye(2100)
    gram[7, 2090] = gram[2090, 7] = torch.nan
    with pytest.raises(ValueError, match=r"^rademacher_rkhs: gram must be finite, got nan in column 2090, row 7"):
        rx.rademacher_rkhs(gram, 1.0, 2, 0)
    lost = rx.rademacher_rkhs(gram, 1.0, 2, 0, nan_policy="propagate")
    assert math.isnan(float(lost))
