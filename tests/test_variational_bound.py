"""variational_bound and logistic_loss: independent minimisation, identities, the meaning of gradients, bad input."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import FAMILIES, SUPREMUM, definition, log_ratio, numpy_of, outputs, seeded, slope, solve
from scipy.optimize import minimize_scalar

import refine_ext as rx
from refine_ext import _C
from refine_ext.divergence import parse_divergence

pytestmark = pytest.mark.usefixtures("device")
every_family = pytest.mark.parametrize("name", FAMILIES)
EPS32 = 2.0**-23


def conjugate(name: str, t) -> np.ndarray:
    """f*(t) = u t − f(u) at u = (f*)'(t), by mpmath from the definition of f."""
    values = []
    for x, y in zip(np.atleast_1d(log_ratio(name, t)), np.atleast_1d(t), strict=True):
        if x == -np.inf:
            u = mpmath.mpf(10) ** -60  # f(0)
        else:
            u = mpmath.exp(mpmath.mpf(repr(x).partition("'")[2].partition("'")[0]))
        values.append(float(u * mpmath.mpf(float(y)) - definition(name, u)))
    return np.array(values)


def tight_value(name: str, real: np.ndarray, fake: np.ndarray) -> float:
    _, shift = solve(name, fake)
    return float(real.mean() - shift) - conjugate(name, (fake - shift).astype(np.float64)).mean()


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values(name, dtype):
    real, fake = outputs(name, 40, dtype), outputs(name, 60, dtype)
    inside = name not in SUPREMUM or bool((fake.double() < SUPREMUM[name]).all())
    # alpha:0.999 has its edge at 1000, where float16 rounds to halves and over the edge.
    assert inside or name == "alpha:0.999"
    for tight in (True, False) if inside else (True,):
        got = rx.variational_bound(real, fake, name, tight=tight)
        assert got.shape == () and got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if tight:
            want = tight_value(name, numpy_of(real), numpy_of(fake))
        else:
            want = float(numpy_of(real).mean()) - conjugate(name, fake.double().cpu().numpy()).mean()
        # The tight bound is stationary in the shift: its residual enters squared. alpha near one has h near 1000.
        scale = 1 + abs(want) + float(fake.double().abs().max())
        tolerance = 1e-11 * scale if dtype == torch.float64 else 8 * EPS32 * scale
        assert float(got) == pytest.approx(want, abs=tolerance), tight


@every_family
def test_tight_is_the_minimum_over_the_shift(name):
    """Against scipy's minimiser on nu + E f*(h − nu), and no shift does better."""
    real, fake = outputs(name, 20), outputs(name, 25)
    h = fake.cpu().numpy()
    shift = float(rx.density_ratio(fake, name).shift)

    def objective(nu: float) -> float:
        code = parse_divergence("test", name)
        return nu + float(_C.conjugate(*code, _C.log_ratio(*code, h - nu)).mean())

    low = h.max() - SUPREMUM[name] + 1e-9 if name in SUPREMUM else shift - 3
    found = minimize_scalar(objective, bounds=(low, shift + 3), method="bounded", options={"xatol": 1e-9})
    want = float(real.mean()) - found.fun
    got = float(rx.variational_bound(real, fake, name))
    assert got == pytest.approx(want, abs=1e-9 * (1 + abs(shift)))
    for nu in (shift - 0.01, shift + 0.01, shift + 1):
        if nu > low:
            assert got >= float(real.mean()) - objective(nu) - 1e-12 * (1 + abs(shift))


@every_family
def test_tight_dominates_loose_and_ignores_offsets(name):
    real, fake = outputs(name, 100), outputs(name, 100)
    tight, loose = (float(rx.variational_bound(real, fake, name, tight=t)) for t in (True, False))
    assert tight >= loose - 1e-12 * (1 + abs(loose))
    # f has f(1) = 0 or, for gan, −2 log 2: the bound of identical outputs is at most that.
    same = float(rx.variational_bound(fake, fake, name))
    assert same <= float(definition(name, mpmath.mpf(1))) + 1e-9


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_of_both_changes_nothing(name, dtype, offset, kernels):
    """Also for many samples, where a float32 sum of 1e4's would lose the bound's digits."""
    real = (outputs(name, 30000) + offset).to(dtype)
    fake = (outputs(name, 30000) + offset).to(dtype)
    got = float(rx.variational_bound(real, fake, name))
    want = float(rx.variational_bound(real.double() - offset, fake.double() - offset, name))
    # The shift is a float64; its 1e4 keeps 12 digits behind the point, a returned float32 its own. On CUDA each float64
    # addition follows a few in float32, which round numbers of 1e4 by up to 5e-4 each, independently.
    float32 = 2e-6 * (1 + abs(want)) + (0 if kernels == "cpu" else 4 * 5e-4 / math.sqrt(30000))
    assert got == pytest.approx(want, abs=1e-8 if dtype == torch.float64 else float32)


@every_family
def test_logit_kind(name):
    real, fake = torch.randn(50, dtype=torch.float64) * 2, torch.randn(70, dtype=torch.float64) * 2
    h_real, h_fake = (
        torch.tensor([float(slope(name, mpmath.exp(mpmath.mpf(float(x))))) for x in logits], dtype=torch.float64)
        for logits in (real, fake)
    )
    loose = rx.variational_bound(real, fake, name, tight=False, kind="logit")
    want = float(h_real.mean()) - conjugate(name, h_fake.cpu().numpy()).mean()
    scale = float(h_real.abs().max() + h_fake.abs().max())
    assert float(loose) == pytest.approx(want, rel=1e-11, abs=1e-12 * scale)
    tight = rx.variational_bound(real, fake, name, kind="logit")
    assert float(tight) == pytest.approx(
        tight_value(name, numpy_of(h_real), numpy_of(h_fake)), rel=1e-10, abs=1e-11 * scale
    )


@pytest.mark.parametrize(
    ("name", "swapped"),
    [("jensen_shannon", "jensen_shannon"), ("gan", "gan"), ("squared_hellinger", "squared_hellinger"),
     ("jeffreys", "jeffreys"), ("alpha:0.5", "alpha:0.5"), ("kl", "reverse_kl"),
     ("pearson_chi2", "neyman_chi2"), ("alpha:3", "alpha:-2")],
)  # fmt: skip
def test_swapping_the_classes(name, swapped):
    """D_f(P‖Q) = D_g(Q‖P) with g(u) = u f(1/u), and the logits change sign."""
    real, fake = torch.randn(40, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    one = rx.variational_bound(real, fake, name, tight=False, kind="logit")
    other = rx.variational_bound(-fake, -real, swapped, tight=False, kind="logit")
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_logistic_loss():
    real, fake = torch.randn(50, dtype=torch.float64) * 10, torch.randn(33, dtype=torch.float64) * 10
    zero = torch.zeros((), dtype=torch.float64)
    want = torch.logaddexp(-real, zero).mean() + torch.logaddexp(fake, zero).mean()
    torch.testing.assert_close(rx.logistic_loss(real, fake), want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(rx.logistic_loss(-fake, -real), want, rtol=1e-13, atol=1e-13)
    gan = rx.variational_bound(real, fake, "gan", tight=False, kind="logit")
    torch.testing.assert_close(-gan, want, rtol=1e-13, atol=1e-13)


@pytest.mark.kernels("cpu")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("logit", [-80.0, -16.6, -1.0, 0.0, 20.0, None])
def test_logistic_loss_of_many(logit, dtype):
    """A sum of logarithms is taken as those of products, of a thousand vectors at most: sizes about their ends."""
    for n in (1, 15, 17, 2000, 3999, 4001, 8001, 16000, 16001, 65536, 65536 + 4003, 2 * 65536 + 1):
        x = torch.randn(n, dtype=dtype, generator=seeded(n)) * 5 if logit is None else torch.full((n,), logit).to(dtype)
        wide = numpy_of(x)
        want = 2 * (np.maximum(wide, 0) + np.log1p(np.exp(-np.abs(wide)))).mean()
        # Of float32 the exponential is off by a unit, the sums' roundings are float64's: one for each of the products'
        # thousand factors, and one for each sum of them.
        tolerance = 3e-7 if dtype == torch.float32 else 2e-13
        assert abs(float(rx.logistic_loss(-x, x)) / want - 1) <= tolerance, n


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_saturated_logits(dtype):
    """Logits far beyond where a sigmoid rounds to 0 or 1, and infinite confidence that is right costs nothing."""
    big = torch.tensor([30.0, 200.0, 30000.0], dtype=dtype)
    assert float(rx.logistic_loss(big, -big)) == pytest.approx(0, abs=1e-12)
    want = 2 * float(big.double().mean())
    assert float(rx.logistic_loss(-big, big)) == pytest.approx(want, rel=1e-6)
    x = (-big).float().requires_grad_()
    (gradient,) = torch.autograd.grad(rx.logistic_loss(x, x), x)
    assert torch.isfinite(gradient).all()


def test_true_divergences_of_gaussians():
    """At the optimal outputs on many samples the bound is the divergence, in closed form for N(1, 1) and N(0, 1)."""
    generator = seeded(1)
    n = 400_000
    real = torch.randn(n, dtype=torch.float64, generator=generator) + 1
    fake = torch.randn(n, dtype=torch.float64, generator=generator)
    logit_real, logit_fake = real - 0.5, fake - 0.5  # log p(x)/q(x) = x − 1/2
    for name, want, deviation in (
        ("kl", 0.5, 1.0),
        ("reverse_kl", 0.5, 1.3),
        ("pearson_chi2", math.e - 1, 9.0),
        ("squared_hellinger", 2 - 2 * math.exp(-1 / 8), 0.8),
        ("jeffreys", 1.0, 2.5),
        ("alpha:0.5", 4 - 4 * math.exp(-1 / 8), 1.6),
    ):
        for tight in (True, False):
            got = float(rx.variational_bound(logit_real, logit_fake, name, tight=tight, kind="logit"))
            assert got == pytest.approx(want, abs=5 * deviation / math.sqrt(n)), (name, tight)


@every_family
def test_the_gradient_on_fake_samples_is_the_density_ratio(name):
    """Envelope theorem: −r/n, whatever the shift does; on real samples 1/m. float32 as well, without differences."""
    for dtype, eps in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        real = outputs(name, 30, dtype).requires_grad_()
        fake = outputs(name, (5, 8), dtype).requires_grad_()
        for tight in (True, False):
            bound = rx.variational_bound(real, fake, name, tight=tight)
            on_real, on_fake = torch.autograd.grad(3 * bound, (real, fake))
            torch.testing.assert_close(on_real, torch.full_like(on_real, 0.1), rtol=1e-6, atol=0)
            shift = None if tight else 0.0
            ratio = rx.density_ratio(fake.detach(), name, output="ratio", shift=shift).ratio
            torch.testing.assert_close(on_fake, -3 * ratio / 40, rtol=30 * eps, atol=eps)


@given(
    n=st.integers(1, 200),
    m=st.integers(1, 200),
    name=st.sampled_from(FAMILIES),
    tight=st.booleans(),
    kind=st.sampled_from(["variational", "logit"]),
    seed=st.integers(0, 2**31),
)
def test_sizes_and_strides(n, m, name, tight, kind, seed, assert_same):
    generator = seeded(seed)
    real = outputs(name, (2 * n, 2), generator=generator)
    fake = outputs(name, (3, m), generator=generator)
    if kind == "logit":
        real, fake = real.clamp(-5, 5), fake.clamp(-5, 5)
    views = real[::2].t(), fake.t()
    got = rx.variational_bound(*views, name, tight=tight, kind=kind)
    want = rx.variational_bound(
        views[0].reshape(-1).clone(), views[1].reshape(-1).clone(), name, tight=tight, kind=kind
    )
    assert_same(got, want)
    mixed = rx.variational_bound(views[0], views[1].float().double(), name, tight=tight, kind=kind)
    assert mixed.dtype == torch.float64


def test_two_precisions_meet_in_the_higher():
    real, fake = torch.randn(9).bfloat16(), torch.randn(9)
    assert torch.equal(rx.variational_bound(real, fake), rx.variational_bound(real.float(), fake))
    half = rx.variational_bound(real, fake.half())
    assert torch.equal(half, rx.variational_bound(real.float(), fake.half().float()))


@pytest.mark.parametrize("name", [*SUPREMUM])
def test_loose_bound_outside_the_domain(name, kernels):
    h = torch.tensor([SUPREMUM[name] + 1.0, SUPREMUM[name] - 1.0])
    if kernels == "cpu":
        with pytest.raises(ValueError, match=r"variational_bound: .* outside the domain") as caught:
            rx.variational_bound(h, h, name, tight=False)
        assert "\n" not in str(caught.value) and "h_fake" in str(caught.value)
        assert "shift puts" not in str(caught.value), "the user gave no shift"
    else:
        assert rx.variational_bound(h, h, name, tight=False).isnan()
    assert math.isfinite(rx.variational_bound(h, h, name, tight=True))


def test_bad_input(kernels):
    good = torch.randn(5)
    for bad, argument, message in (
        (torch.empty(0), "h_real", r"must not be empty, got shape \[0\]"),
        (torch.arange(3), "h_real", "must be float64, float32, float16 or bfloat16, got torch.int64"),
        ([1.0], "h_real", "must be a torch.Tensor, got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"^variational_bound: {argument} {message}"):
            rx.variational_bound(bad, good)
    for bad in (torch.tensor([1.0, math.nan]), torch.tensor([math.inf, 1.0])):
        for tight in (True, False):
            if kernels == "cpu":
                with pytest.raises(ValueError, match=r"^variational_bound: h_fake must hold no NaN"):
                    rx.variational_bound(good, bad, tight=tight)
                with pytest.raises(ValueError, match=r"^variational_bound: h_real must be finite"):
                    rx.variational_bound(bad, good, tight=tight)
            else:
                assert rx.variational_bound(good, bad, tight=tight).isnan()
                assert not rx.variational_bound(bad, good, tight=tight).isfinite()
    with pytest.raises(ValueError, match=r"^logistic_loss: logit_fake must not be empty"):
        rx.logistic_loss(good, torch.empty(2, 0))
    with pytest.raises(TypeError, match=r"^logistic_loss: logit_real must be a torch.Tensor"):
        rx.logistic_loss(None, good)
    with pytest.raises(ValueError, match=r"^variational_bound: divergence must be one of kl, .*'kld'"):
        rx.variational_bound(good, good, "kld")
    with pytest.raises(ValueError, match=r"^variational_bound: kind must be one of variational, logit"):
        rx.variational_bound(good, good, kind="probability")
