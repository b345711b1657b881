"""Bad arguments of `rademacher` and its relatives: each error names the function, the argument, what it got."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import refine_ext as rx

FUNCTIONS = (rx.rademacher, rx.rademacher_linear, rx.rademacher_l1)
X = torch.ones(6, 2)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (torch.ones(2, 3, 4), ValueError, r"must be \[n, m\], got shape \[2, 3, 4\]"),
        (torch.tensor(1.0), ValueError, r"must be \[n, m\], got shape \[\]"),
        (torch.ones(0, 3), ValueError, r"must not be empty, got shape \[0, 3\]"),
        (torch.ones(3, 0), ValueError, r"must not be empty, got shape \[3, 0\]"),
        (torch.ones(3, 2, dtype=torch.int64), TypeError, r"must be float64, float32, .* got torch.int64"),
        (torch.ones(3, 2).to_sparse(), TypeError, r"must be a dense tensor, got layout"),
        (np.ones((3, 2), dtype=np.int32), TypeError, r"must be floating or uint8, got a NumPy int32"),
        (np.float64(3.0), TypeError, r"must be a tensor.*got float64"),
        (None, TypeError, r"must be a tensor.*got NoneType"),
        ("D.npy", TypeError, r"must be a tensor, a NumPy array, row blocks in an iterable, or a function.*got str"),
    ],
)
def test_values(function, values, error, message):
    argument = "outputs" if function is rx.rademacher else "features"
    with pytest.raises(error, match=rf"^{function.__name__}: {argument} {message}"):
        function(values)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draws": 0}, ValueError, "draws must be at least 1, got 0"),
        ({"draws": 1.5}, TypeError, "draws must be an int, got float"),
        ({"draws": True}, TypeError, "draws must be an int, got bool"),
        ({"draws": "every"}, ValueError, "draws must be an int or 'all', got 'every'"),
        ({"draws": 2**40 + 1}, ValueError, r"draws must be between 1 and 2\^40"),
        ({"first_draw": -1}, ValueError, "first_draw must be at least 0, got -1"),
        ({"first_draw": 2**41}, ValueError, r"first_draw must be between 0 and 2\^40"),
        ({"seed": 1.0}, TypeError, "seed must be an int"),
        ({"seed": torch.tensor(1)}, TypeError, "seed must be an int, got a tensor"),
        ({"seed": 2**64}, ValueError, r"seed must be between -2\*\*63 and 2\*\*64 - 1"),
        ({"distribution": "gauss"}, ValueError, "distribution must be rademacher or normal, got 'gauss'"),
        ({"nan_policy": "omit"}, ValueError, "nan_policy must be raise or propagate, got 'omit'"),
        ({"precision": 4}, ValueError, "precision must be 1, 2 or 3, got 4"),
        ({"stderr": 0.0}, ValueError, "stderr must be positive, got 0.0"),
        ({"stderr": math.nan}, ValueError, "stderr must be positive, got nan"),
        ({"stderr": "small"}, TypeError, "stderr must be a number or None, got str"),
        ({"stderr": 1.0, "max_draws": 3}, ValueError, "max_draws must be at least 8, got 3"),
        ({"bound": 0.5}, ValueError, r"bound must be finite and at least the largest \|f\(x_i\)\| seen, 1.*, got 0.5"),
        ({"bound": math.inf}, ValueError, "bound must be finite"),
        ({"bound": math.nan}, ValueError, "bound must be finite"),
        ({"bound": "1"}, TypeError, "bound must be a number or None, got str"),
        ({"memory": 0}, ValueError, "memory must be at least 1, got 0"),
        ({"draws": "all", "stderr": 0.1}, ValueError, "draws='all' takes signs, and neither stderr="),
        ({"draws": "all", "distribution": "normal"}, ValueError, "draws='all' takes signs"),
    ],
)
def test_options(function, options, error, message):
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        function(X, **{"draws": 8, **options})


@pytest.mark.parametrize("function", FUNCTIONS[1:], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.0, ValueError, "positive and finite, got 0.0"),
        (-1, ValueError, "positive and finite, got -1"),
        (math.nan, ValueError, "positive and finite, got nan"),
        (math.inf, ValueError, "positive and finite, got inf"),
        ("1", TypeError, "a number, got str"),
        (torch.ones(()), TypeError, "a number, got Tensor"),
    ],
)
def test_norm_bounds(function, value, error, message):
    with pytest.raises(error, match=f"^{function.__name__}: norm_bound must be {message}"):
        function(X, value)


def test_too_many_samples_to_enumerate():
    with pytest.raises(ValueError, match=r"^rademacher: draws='all' takes at most 20 samples, got 21"):
        rx.rademacher(torch.ones(21, 1), "all")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"draws": "all"}, {"distribution": "normal"}, {"precision": 1}])
def test_the_place_of_what_is_not_finite(value, options):
    x = torch.randn(9, 7)
    x[5, 2] = x[8, 2] = x[1, 6] = value
    message = f"^rademacher: outputs must be finite, got {value} in column 2, row 5; nan_policy='propagate' lets it"
    with pytest.raises(ValueError, match=message):
        rx.rademacher(x, **{"draws": 8, "seed": 0, **options})
    lost = rx.rademacher(x, **{"draws": 8, "seed": 0, **options}, nan_policy="propagate")
    assert not lost.suprema.isfinite().any() or options == {"draws": "all"}
    assert not math.isfinite(float(lost)) and not math.isfinite(lost.bound)


def test_a_seed_is_needed_in_a_graph():
    with pytest.raises(Exception, match="give a seed"):
        torch.compile(lambda x: rx.rademacher(x, 8).mean, fullgraph=True)(X)


def test_a_bound_that_is_only_rounded_off_is_taken():
    phi = torch.nn.functional.normalize(torch.randn(500, 33))
    assert rx.rademacher_linear(phi, 1.0, 8, 0, bound=1.0).bound == 1.0
