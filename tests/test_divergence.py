"""The divergence table: every formula of `_C` against its definition in 50 digits."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from mpmath import mpf
from reference import (
    ALPHAS,
    CLIPPED,
    FAMILIES,
    NAMED,
    SUPREMUM,
    alpha_of,
    definition,
    log_ratio,
    log_ratio_below,
    mp_log_ratio,
    slope,
)
from scipy.optimize import minimize_scalar

import refine_ext as rx
from refine_ext import _C
from refine_ext.divergence import parse_divergence

EPS = np.finfo(np.float64).eps
# Log-ratios from subnormal to overflowing ratios, dense around one.
LOG_RATIOS = np.concatenate([np.linspace(-690, 690, 139), np.linspace(-3, 3, 61), [1e-3, -1e-3, 1e-8, -1e-8, 1e-300]])
every_family = pytest.mark.parametrize("name", FAMILIES)


def code(name: str) -> tuple[int, float]:
    return parse_divergence("test", name)


@every_family
def test_generator_is_the_definition(name):
    ratios = np.concatenate([np.exp(np.linspace(-30, 30, 61)), np.linspace(0.5, 2, 31)])
    got = _C.generator(*code(name), ratios)
    for u, value in zip(ratios, got, strict=True):
        want, dual = definition(name, mpf(u)), slope(name, mpf(u))
        # f = u f' - f*: rounding of either term stays in the difference.
        scale = abs(u * dual) + abs(u * dual - want) + 1
        assert abs(value - want) <= 20 * EPS * scale, u


@pytest.mark.parametrize("name", ["kl", "jensen_shannon", "gan", "pearson_chi2", "alpha:0.3"])
def test_generator_at_zero_is_its_limit(name):
    limit = definition(name, mpf(10) ** -45)
    assert float(_C.generator(*code(name), 0.0)) == pytest.approx(float(limit), abs=1e-12)


@pytest.mark.parametrize("name", ["reverse_kl", "neyman_chi2", "jeffreys", "alpha:-2.5"])
def test_generator_at_zero_is_infinite(name):
    assert float(_C.generator(*code(name), 0.0)) == math.inf


@every_family
def test_reference_slope_is_the_derivative(name):
    for x in (-20, -3, -0.1, 0, 0.1, 3, 20):
        u = mpmath.exp(x)
        derivative = mpmath.diff(lambda u: definition(name, u), u, h=u * mpf(10) ** -15)
        want = slope(name, u)
        assert abs(derivative - want) <= mpf(10) ** -12 * (1 + abs(want))


@every_family
def test_dual_output_is_the_derivative(name):
    got = _C.dual_output(*code(name), LOG_RATIOS)
    for x, value in zip(LOG_RATIOS, got, strict=True):
        want = slope(name, mpmath.exp(mpf(x)))
        if abs(want) > 1e307:
            assert math.isinf(value) or abs(value / want - 1) < 1e-10
            assert (value > 0) == (want > 0)
            continue
        # An exponent of size |(a - 1) x| carries that many roundings into the power.
        exponent = max(1.0, abs(alpha_of(name) - 1)) if name.startswith("alpha") else 2.0
        bound = 4 * EPS * (abs(want) * (1 + exponent * abs(x)) + 2)
        if abs(x) < 1e-2:
            bound += EPS * abs(SUPREMUM.get(name, 1))
        assert abs(value - want) <= bound, (x, value, want)


@every_family
def test_conjugate_by_maximisation(name):
    """f*(t) = sup_u ut − f(u): the supremum is flat, so a search in log u finds its value to rounding."""
    for x in (-6.0, -2.0, -0.3, 0.0, 0.3, 2.0, 6.0):
        t = slope(name, mpmath.exp(mpf(x)))
        found = minimize_scalar(
            lambda y, t=t: float(definition(name, mpmath.exp(y)) - mpmath.exp(y) * t),
            bounds=(x - 2, x + 2),
            method="bounded",
            options={"xatol": 1e-9},
        )
        got = float(_C.conjugate(*code(name), x))
        assert got == pytest.approx(-found.fun, rel=1e-12, abs=1e-12), x


@every_family
def test_conjugate_beyond_a_search(name):
    """u f'(u) − f(u) in 50 digits where a ratio spans 1e-300 … 1e300."""
    log_ratios = LOG_RATIOS[::6]
    got = _C.conjugate(*code(name), log_ratios)
    for x, value in zip(log_ratios, got, strict=True):
        with mpmath.workdps(700):  # u f' and f cancel by hundreds of digits
            u = mpmath.exp(mpf(x))
            want = u * slope(name, u) - definition(name, u)
        if abs(want) > 1e307:
            assert not abs(value) < 1e306
            continue
        exponent = abs(alpha_of(name)) if name.startswith("alpha") else 1.0
        bound = 4 * EPS * (abs(want) * (1 + (1 + exponent) * abs(x)) + 2)
        if name.startswith("alpha"):
            bound /= min(1.0, abs(alpha_of(name)))  # (u^a - 1)/a
        assert abs(value - want) <= bound, (x, value, want)


@every_family
def test_log_ratio_inverts_the_slope(name):
    """Against bisection on f' in 50 digits, and by how much log r may move for one rounding of t."""
    for x in np.concatenate([np.linspace(-200, 200, 21), np.linspace(-2, 2, 9), [1e-6, -1e-6]]):
        t = float(slope(name, mpmath.exp(mpf(x))))
        if abs(t) > 1e300 or t >= SUPREMUM.get(name, math.inf):
            continue
        want = mp_log_ratio(name, mpf(t))
        got = float(_C.log_ratio(*code(name), t))
        if want == -mpmath.inf:
            assert got == -math.inf
            continue
        # Forms that measure t from the edge of the domain round that edge once.
        edge = abs(SUPREMUM.get(name, 0.0)) + (2.0 if name in CLIPPED else 0.0)
        conditioning = float(_C.score_factor(*code(name), float(want)))
        bound = 8 * EPS * (1 + abs(float(want)) + conditioning * (edge + abs(t)))
        assert abs(got - want) <= bound, (x, t, got, want)


@every_family
def test_round_trip_in_log_ratios(name):
    """(f*)'(f'(u)) = u over 1e-300 … 1e300, to what one rounding of f'(u) leaves of log u."""
    t = _C.dual_output(*code(name), LOG_RATIOS)
    back = _C.log_ratio(*code(name), t)
    with np.errstate(over="ignore", invalid="ignore"):
        conditioning = _C.score_factor(*code(name), LOG_RATIOS)
        bound = 12 * EPS * (1 + np.abs(LOG_RATIOS) + conditioning * (1 + np.abs(t)))
    kept = np.isfinite(t) & (bound < 0.1)
    # Every family keeps a hundred decades or more on the side where f' is not flat.
    assert kept.sum() > 60
    assert (np.abs(back - LOG_RATIOS)[kept] <= bound[kept]).all()


@every_family
def test_round_trip_in_outputs(name):
    """f'((f*)'(t)) = t up to the edge of the domain, at distances down to 1e-300 where the edge is zero."""
    decades = np.exp(np.linspace(math.log(1e-290), math.log(1e290), 117))
    middle = np.linspace(0.01, 4, 60) * max(1.0, SUPREMUM.get(name, 1.0))
    distances = np.concatenate([decades, middle])
    if name in SUPREMUM:
        t = SUPREMUM[name] - distances
        t = t[t < SUPREMUM[name]]
    else:
        t = np.concatenate([-distances, distances])
    x = _C.log_ratio(*code(name), t)
    kept = np.isfinite(x) & (np.abs(x) < 690)
    assert kept.sum() > 15
    t, x = t[kept], x[kept]
    back = _C.dual_output(*code(name), x)
    # log r is rounded to eps |log r|, which f' multiplies by dt / dlog r = 1 / score factor.
    scale = 1 / _C.score_factor(*code(name), x)
    bound = 8 * EPS * (np.abs(t) + abs(SUPREMUM.get(name, 2.0)) + scale * (1 + np.abs(x)))
    assert (np.abs(back - t) <= bound).all()


@every_family
def test_score_factor_is_the_reciprocal_curvature(name):
    for x in (-12.0, -1.0, 0.0, 1.0, 12.0):
        u = mpmath.exp(mpf(x))
        curvature = mpmath.diff(lambda u: definition(name, u), u, 2, h=u * mpf(10) ** -12)
        got = float(_C.score_factor(*code(name), x))
        assert got == pytest.approx(float(1 / (u * curvature)), rel=1e-9)


@every_family
def test_family_constants(name):
    family = _C.family(*code(name))
    assert family["tangent"] == pytest.approx(float(slope(name, mpf(1))), abs=1e-15)
    assert family["supremum"] == pytest.approx(SUPREMUM.get(name, math.inf), rel=1e-15)


def test_alpha_equals_the_named_divergences_up_to_scale():
    for alpha, named, scale in (
        ("alpha:2", "pearson_chi2", 0.5),
        ("alpha:0.5", "squared_hellinger", 2.0),
        ("alpha:-1", "neyman_chi2", 0.5),
    ):
        x = np.linspace(-5, 5, 41)
        for formula in (_C.dual_output, _C.conjugate):
            np.testing.assert_allclose(
                formula(*code(alpha), x), scale * formula(*code(named), x), rtol=1e-14, atol=1e-14
            )
        np.testing.assert_allclose(
            _C.generator(*code(alpha), np.exp(x)),
            scale * _C.generator(*code(named), np.exp(x)),
            rtol=1e-13,
            atol=1e-13,
        )


@pytest.mark.parametrize("small", [1e-4, 1e-7, -1e-7])
def test_alpha_approaches_kl_and_reverse_kl(small):
    """With an error of first order in alpha: x²/2 from the power, a few times e^x of it from f."""
    u = np.exp(np.linspace(-2, 2, 41))
    near_kl = _C.generator(*code(f"alpha:{1 + small}"), u)
    near_reverse = _C.generator(*code(f"alpha:{small}"), u)
    # Their f has f'(1) = 0; the named ones differ by a multiple of u − 1.
    np.testing.assert_allclose(near_kl, u * np.log(u) - (u - 1), atol=20 * abs(small))
    np.testing.assert_allclose(near_reverse, -np.log(u) + (u - 1), atol=20 * abs(small))


def test_jensen_shannon_is_symmetric():
    """D_f(P‖Q) = D_f(Q‖P) for the f with f(u) = u f(1/u)."""
    u = np.exp(np.linspace(-8, 8, 65))
    for name in ("jensen_shannon", "gan", "squared_hellinger", "jeffreys", "alpha:0.5"):
        np.testing.assert_allclose(
            _C.generator(*code(name), u), u * _C.generator(*code(name), 1 / u), rtol=1e-12, atol=1e-12
        )
    # And the asymmetric ones come in pairs, or this test could not fail.
    for one, other in (("kl", "reverse_kl"), ("pearson_chi2", "neyman_chi2")):
        np.testing.assert_allclose(
            _C.generator(*code(one), u), u * _C.generator(*code(other), 1 / u), rtol=1e-12, atol=1e-9
        )
        assert not np.allclose(_C.generator(*code(one), u), u * _C.generator(*code(one), 1 / u))


def test_names():
    assert rx.divergences() == (*NAMED, "alpha")
    for name in (*NAMED, *ALPHAS, "alpha:-3e2", "alpha: 0.5"):
        parse_divergence("f", name)


@pytest.mark.parametrize(
    "name", ["", "KL", "kl:1", "alpha", "alpha:", "alpha:0", "alpha:1.0", "alpha:nan", "alpha:inf",
             "alpha:x", "alpha:0:1", "logit", "reverse-kl"],
)  # fmt: skip
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"^some_function: (divergence|alpha) must be") as caught:
        parse_divergence("some_function", name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"some_function: divergence must be a string, got int"):
        parse_divergence("some_function", 3)
    with pytest.raises(ValueError, match=r"kind must be one of variational, logit, got 'raw'"):
        parse_divergence("some_function", "kl", "raw")


@every_family
def test_the_extended_precision_reference(name):
    """The examiner's own formulas, which the tests of density_ratio rely on, against bisection in 120 digits."""
    edge = SUPREMUM.get(name)
    for distance in (1e-9, 0.01, 0.3, 1.0, 2.5, 40.0):
        t = edge - distance if edge is not None else 1.5 - distance
        want = mp_log_ratio(name, mpf(float(t)))
        got = log_ratio(name, np.array([t]))[0]
        if want == -mpmath.inf:
            assert got == -np.inf
            continue
        if want > 2999:  # where the bisection ends: alpha:0.999 next to its edge
            continue
        # Next to an edge that is not a float64 itself, t keeps seven digits of 1e-9.
        digits = 1e-6 if distance < 1e-8 else 1e-12
        assert float(got) == pytest.approx(float(want), rel=digits, abs=digits)
        below = log_ratio_below(name, np.array([(edge if edge is not None else 0.0) - np.longdouble(t)]))[0]
        assert float(below) == pytest.approx(float(want), rel=digits, abs=digits)
