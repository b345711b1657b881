"""Inputs that break a straightforward density ratio: offsets, outliers, edges, NaN, infinities, many samples."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from reference import CLIPPED, FAMILIES, NAMED, SUPREMUM, log_ratio, numpy_of, outputs, score_factor, seeded, solve
from test_density_ratio import EPS, assert_normalised

import refine_ext as rx

pytestmark = pytest.mark.usefixtures("device")
every_family = pytest.mark.parametrize("name", FAMILIES)
both_precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
INF, NAN = math.inf, math.nan


def mean_of(result) -> float:
    return float(result.ratio.double().mean())


@every_family
@both_precisions
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_offsets(name, dtype, offset):
    """A constant added to h is a constant added to the shift, and nothing else: tight bounds do not see it."""
    h = (outputs(name, 400, torch.float64) + offset).to(dtype)
    result = rx.density_ratio(h, name)
    assert_normalised(result.log_ratio, h, name)
    assert abs(mean_of(result) - 1) <= (1e-6 if dtype == torch.float32 else 2e-12)
    # The rounded inputs are the truth; once they are, the offset comes off exactly.
    plain = rx.density_ratio(h.double() - offset, name)
    assert float(result.shift) - offset == pytest.approx(
        float(plain.shift), abs=1e-5 if dtype == torch.float32 else 1e-11
    )


@every_family
@both_precisions
def test_heavy_tails(name, dtype):
    """Cauchy outputs and an outlier of 1e30: one sample takes all the mass, the others keep their log-ratios."""
    tangent = np.tan(np.pi * (np.random.default_rng(0).random(1001) - 0.5))
    for h in (torch.tensor(tangent, dtype=dtype), torch.tensor([*tangent[:100], 1e30]).to(dtype)):
        result = rx.density_ratio(h, name)
        assert_normalised(result.log_ratio, h, name)
        assert abs(mean_of(result) - 1) <= (1e-6 if dtype == torch.float32 else 2e-12)
        assert result.log_ratio.argmax() == h.argmax()
        assert not result.log_ratio.isnan().any()
    assert float(result.ratio[-1]) <= 101 * (1 + 1e-6)
    # Sums of r and of r² round differently.
    assert float(result.ess) >= 1 - 4 * EPS[dtype]


@every_family
@both_precisions
def test_outputs_of_any_magnitude(name, dtype):
    for scale in (1e-30, 1e-6, 1e3, 1e10, 1e30):
        h = (torch.randn(300, dtype=torch.float64) * scale).to(dtype)
        result = rx.density_ratio(h, name)
        assert not result.log_ratio.isnan().any(), scale
        assert abs(mean_of(result) - 1) <= (1e-6 if dtype == torch.float32 else 2e-12), scale
        assert_normalised(result.log_ratio, h, name)


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_largest_finite_outputs(dtype):
    top = torch.finfo(dtype).max
    for name in FAMILIES:
        # Differences up to the largest number; beyond that they are infinite, and r = 0.
        for values in ([top, top / 2, 0.0, 1.0], [-top, -top, 0.0], [top / 2, -top / 2]):
            h = torch.tensor(values, dtype=dtype)
            result = rx.density_ratio(h, name)
            assert not result.log_ratio.isnan().any(), (name, values)
            n = len(values)
            assert float(result.ratio.max()) == pytest.approx(n, rel=8 * EPS[dtype] * (1 + math.log(n))) or (
                float(result.ratio.double().mean()) == pytest.approx(1, abs=4 * EPS[dtype])
            ), (name, values, result.ratio)


@every_family
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_all_equal(name, dtype):
    for value in (0.0, 0.5, -3.75, 1e4, -3e4):
        for n in (1, 2, 3, 1000, 300000):
            h = torch.full((n,), value, dtype=dtype)
            result = rx.density_ratio(h, name)
            assert float(result.log_ratio.abs().max()) <= 1e-6, (value, n)
            assert float(result.ess) == pytest.approx(n, rel=1e-6)
            assert float(result.max_weight) == pytest.approx(1 / n, rel=1e-6)


@every_family
@both_precisions
def test_two_samples(name, dtype):
    for gap in (1e-30, 1e-7, 0.1, 1.0, 30.0, 1e5, 1e30):
        h = torch.tensor([0.0, gap], dtype=dtype)
        result = rx.density_ratio(h, name)
        assert_normalised(result.log_ratio, h, name)
        low, high = result.ratio.double().tolist()
        assert 0 <= low <= 1 + 1e-6 and 1 - 1e-6 <= high <= 2 + 1e-6
        assert low + high == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("name", list(SUPREMUM))
@both_precisions
def test_outputs_at_the_edge_of_the_domain(name, dtype, kernels):
    """With a given shift of zero, the last number below the edge still has its ratio; the edge itself has infinity."""
    edge = SUPREMUM[name]
    last = torch.nextafter(torch.tensor(edge, dtype=dtype), torch.tensor(-INF, dtype=dtype))
    if float(last) >= edge:  # the edge rounded up
        last = torch.nextafter(last, torch.tensor(-INF, dtype=dtype))
    h = torch.stack([last, last - 0.5])
    result = rx.density_ratio(h, name, shift=0.0)
    want = log_ratio(name, numpy_of(h))
    got = numpy_of(result.log_ratio)
    # The edge, log 2 or 1 / (1 - a), is itself rounded to a float64; at one ulp from it that is a shift of log r.
    distance = np.maximum(np.longdouble(edge) - numpy_of(h), 1e-300)
    curvature = score_factor(name, want) * distance  # bounded: c is 1 / distance to within a constant
    bound = 4 * EPS[dtype] * (1 + np.abs(want)) + curvature * 1.2e-16 * abs(edge) / distance
    assert (np.abs(got - want) <= bound).all(), (got, want)
    assert got[0] > got[1]
    if kernels == "cpu":
        with pytest.raises(ValueError, match=r"density_ratio: shift puts h outside the domain of f"):
            rx.density_ratio(h + 1.0, name, shift=0.0)
    quiet = rx.density_ratio(h + 1.0, name, shift=0.0, nan_policy="propagate")
    assert quiet.log_ratio.isnan().all() and quiet.shift.isnan()


@every_family
@both_precisions
def test_minus_infinity_is_a_ratio_of_zero(name, dtype):
    h = outputs(name, 50, dtype)
    h[[3, 17, 49]] = -INF
    result = rx.density_ratio(h, name)
    assert (result.ratio[[3, 17, 49]] == 0).all() and (result.weights[[3, 17, 49]] == 0).all()
    assert (result.log_ratio[[3, 17, 49]] == -INF).all()
    assert mean_of(result) == pytest.approx(1, abs=1e-6)
    assert not result.log_ratio.isnan().any()
    assert_normalised(result.log_ratio, h, name)
    given = rx.density_ratio(h, name, shift=result.shift)
    assert (given.log_ratio[[3, 17, 49]] == -INF).all() and not given.log_ratio.isnan().any()
    assert 1 <= float(result.ess) <= 47 * (1 + 1e-6)
    single = torch.full((5,), -INF, dtype=dtype)
    single[2] = 7.0
    assert rx.density_ratio(single, name).ratio.tolist() == pytest.approx([0, 0, 5, 0, 0], rel=1e-6)


@every_family
@both_precisions
def test_weights_over_thirty_orders_of_magnitude(name, dtype):
    generator = seeded(3)
    h = outputs(name, 600, dtype, generator=generator)
    w = (10 ** (30 * torch.rand(600, dtype=torch.float64, generator=generator) - 25)).to(dtype)
    result = rx.density_ratio(h, name, base_weights=w)
    assert_normalised(result.log_ratio, h, name, w)
    mean = float((result.ratio.double() * w.double()).sum() / w.double().sum())
    assert mean == pytest.approx(1, abs=1e-6 if dtype == torch.float32 else 1e-11)
    assert float(result.weights.double().sum()) == pytest.approx(1, abs=1e-5 if dtype == torch.float32 else 1e-12)


@every_family
def test_the_heaviest_weight_far_below_the_largest_output(name):
    """The root is then far beyond log n: weights do not bound the largest ratio."""
    for light in (1e-3, 1e-12, 1e-30):
        h = torch.tensor([0.0, -3.0, -5.0], dtype=torch.float64)
        w = torch.tensor([light, 1e-6, 1.0], dtype=torch.float64)
        assert_normalised(rx.density_ratio(h, name, base_weights=w).log_ratio, h, name, w)
        assert_normalised(
            rx.density_ratio(h.float(), name, base_weights=w.float()).log_ratio, h.float(), name, w.float()
        )


@every_family
@both_precisions
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_the_size_of_the_weights_does_not_matter(name, dtype, scale):
    """Squares of weights leave float32 from 1e±19 on."""
    h = outputs(name, 300, dtype)
    w = torch.rand(300, dtype=torch.float64) + 0.1
    want = rx.density_ratio(h, name, base_weights=w.to(dtype))
    got = rx.density_ratio(h, name, base_weights=(w * scale).to(dtype))
    for attribute in ("log_ratio", "weights", "shift", "ess", "max_weight", "khat"):
        torch.testing.assert_close(
            getattr(got, attribute).double(), getattr(want, attribute).double(),
            rtol=1e-5 if dtype == torch.float32 else 1e-11, atol=1e-5 if dtype == torch.float32 else 1e-11,
        )  # fmt: skip
    # float64 weights of a half-precision h are scaled before they are rounded.
    half = rx.density_ratio(h.bfloat16(), name, base_weights=w * scale)
    assert abs(float(half.log_normalizer)) <= 1e-6


@every_family
def test_light_samples_that_hold_all_the_mass(name):
    """Weights over 30 orders, the light ones on the large outputs: squares of their shares must not vanish."""
    h = torch.tensor([80.0, 80.0, 0.0, 0.0])
    w = torch.tensor([1e-30, 1e-30, 1.0, 1.0])
    result = rx.density_ratio(h, name, base_weights=w)
    r, shift = solve(name, numpy_of(h), numpy_of(w))
    mass = np.exp(r) * numpy_of(w)
    # log r near 70 is a float32: 4e-6, in the ratio as well.
    assert float(result.ess) == pytest.approx(float(mass.sum() ** 2 / (mass**2).sum()), rel=2e-5)
    assert float(result.max_weight) == pytest.approx(float(mass.max() / mass.sum()), rel=2e-5)
    # A clipped family's r at h = 0 is a difference of 41 and 40.
    assert float(result.shift) == pytest.approx(float(shift), rel=1e-6, abs=80 * EPS[torch.float32])


@every_family
def test_a_zero_weight_on_the_largest_output(name):
    h = torch.tensor([5.0, 0.0, -1.0, -2.0])
    w = torch.tensor([0.0, 1.0, 2.0, 0.5])
    if name in SUPREMUM:
        # That output is beyond what the others' shift allows: its ratio is not defined, and its weight is zero.
        result = rx.density_ratio(h, name, base_weights=w, nan_policy="propagate")
        assert not bool(result.shift.isnan()), "a sample of weight zero must not spoil the group"
    else:
        result = rx.density_ratio(h, name, base_weights=w)
    without = rx.density_ratio(h[1:], name, base_weights=w[1:])
    torch.testing.assert_close(result.log_ratio[1:], without.log_ratio, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.ess, without.ess)
    assert result.weights[0] == 0
    torch.testing.assert_close(result.weights[1:], without.weights, rtol=1e-5, atol=1e-6)


def test_khat_ignores_samples_of_weight_zero():
    h = torch.randn(200)
    h[0] = 50.0
    w = torch.ones(200)
    w[0] = 0
    result = rx.density_ratio(h, "reverse_kl", base_weights=w)
    assert result.log_ratio[0].isnan() and not result.khat.isnan()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("n", [1, 40, 300001])
def test_nan_and_infinity(bad, name, n, kernels):
    for position in {0, n // 2, n - 1}:
        h = outputs(name, n, torch.float32)
        h[position] = bad
        for shift in (None, 1.0):
            if kernels == "cpu":
                with pytest.raises(ValueError, match=r"density_ratio: h must hold no NaN or .inf") as caught:
                    rx.density_ratio(h, name, shift=shift)
                assert "\n" not in str(caught.value)
            result = rx.density_ratio(h, name, shift=shift, nan_policy="propagate")
            assert result.log_ratio.isnan().all()
            for value in (result.shift, result.ess, result.max_weight, result.log_normalizer):
                assert value.isnan()


def test_a_bad_group_is_named_and_leaves_the_others_alone(kernels, assert_same):
    h = torch.randn(4, 30)
    h[2, 7] = NAN
    if kernels == "cpu":
        with pytest.raises(ValueError, match=r"\(group 2\)"):
            rx.density_ratio(h, "jensen_shannon", dim=1)
    result = rx.density_ratio(h, "jensen_shannon", dim=1, nan_policy="propagate")
    assert result.log_ratio[2].isnan().all() and result.shift.isnan().tolist() == [False, False, True, False]
    for row in (0, 1, 3):
        assert_same(result.log_ratio[row], rx.density_ratio(h[row], "jensen_shannon").log_ratio)


@pytest.mark.parametrize("name", ["kl", "gan"])
def test_no_mass_at_all(name, kernels):
    for h, w in (
        (torch.full((4,), -INF), None),
        (torch.zeros(4), torch.zeros(4)),
        (torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, 1.0])),
        (torch.zeros(4), torch.tensor([1.0, NAN, 1.0, 1.0])),
        (torch.zeros(4), torch.tensor([1.0, INF, 1.0, 1.0])),
        (torch.tensor([0.0, -INF]), torch.tensor([0.0, 1.0])),
    ):
        result = rx.density_ratio(h, name, base_weights=w, nan_policy="propagate")
        assert result.log_ratio.isnan().all() and result.shift.isnan()
        if kernels == "cpu":
            with pytest.raises(ValueError, match=r"density_ratio: .* (weights|finite)"):
                rx.density_ratio(h, name, base_weights=w)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_mass_at_a_given_shift(name):
    """r = 0 everywhere is an answer, and the same one from every family."""
    result = rx.density_ratio(torch.full((4,), -INF), name, shift=0.5)
    assert (result.log_ratio == -INF).all() and (result.ratio == 0).all()
    assert float(result.log_normalizer) == -INF


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_subnormal_outputs(name, dtype):
    tiny = torch.finfo(dtype).tiny
    h = torch.tensor([tiny / 2, tiny / 4, 0.0, -tiny / 2, -tiny / 8], dtype=dtype)
    result = rx.density_ratio(h, name)
    # log r has a slope of about one at r = 1, or 1/2 or 2 where f''(1) is 2 or 1/2; and the search its residual.
    assert float(result.log_ratio.double().abs().max()) <= 4 * tiny + 3.1e-7


@pytest.mark.parametrize("name", FAMILIES)
def test_ten_million_float32(name, kernels):
    """|mean ratio − 1| ≤ 1e-6 at 1e7, where float32 sums are off by up to 0.8.

    Emulated it is a tenth of that: as many blocks, each thread with a tenth of the samples.
    """
    h = torch.empty(10_000_000 if kernels != "cuda_on_cpu" else 1_000_000).normal_(generator=seeded(5))
    h.clamp_(max=4.0)
    h[234567] = 9.0
    result = rx.density_ratio(h, name, out=h)
    total = sum(float(part.double().exp().sum()) for part in result.log_ratio.split(1 << 20))
    assert abs(total / h.numel() - 1) <= 1e-6
    assert abs(math.expm1(float(result.log_normalizer))) <= 1e-6


@pytest.mark.parametrize("name", [*NAMED, "alpha:0.3", "alpha:3"])
@pytest.mark.parametrize("n", [1, 1000, 65537, 400003])
@pytest.mark.kernels("cpu")
def test_thread_count_changes_no_bit(name, n, threads):
    h = outputs(name, n, torch.float32)
    rows = outputs(name, (64, 1 + n // 64), torch.float32)
    real = h + 0.01
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        x = h.clone().requires_grad_()
        flat = rx.density_ratio(x, name, base_weights=torch.ones(n))
        bound = rx.variational_bound(real, x, name)
        grads = torch.autograd.grad(flat.log_ratio[::2].sum() + flat.shift + bound, x)
        many = rx.density_ratio(rows, name, dim=1)
        results.append([flat.log_ratio, flat.shift, flat.ess, bound, *grads, many.log_ratio, many.shift, many.ess])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))


SIMD_PROGRAM = """
import sys, torch
sys.path[:0] = {paths!r}
import refine_ext as rx
from reference import FAMILIES, outputs
torch.manual_seed(0)
results = {{"level": rx._C.build_info()["simd_level"]}}
for name in FAMILIES:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        h = outputs(name, 70001, dtype)
        r = rx.density_ratio(h, name)
        fixed = rx.density_ratio(h, name, shift=0.25, output="ratio")
        bound = rx.variational_bound(h[:1000], h, name)
        results[name, str(dtype)] = h, r.log_ratio, fixed.ratio, r.shift, bound
torch.save(results, {path!r})
"""


@pytest.mark.kernels("cpu")
def test_simd_levels_agree(tmp_path):
    """Every level that this machine runs is within the error model of the widest one."""
    results = {}
    for level in rx._C.build_info()["simd_compiled"]:
        path = str(tmp_path / f"{level}.pt")
        program = SIMD_PROGRAM.format(paths=sys.path, path=path)
        environment = {**os.environ, "REFINE_EXT_SIMD": level}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
        loaded = torch.load(path, weights_only=True)
        if loaded.pop("level") == level:
            results[level] = loaded
    assert "baseline" in results
    reference = results.pop("baseline")
    for level, result in results.items():
        for (name, dtype), (h, *values) in result.items():
            same, *want = reference[name, dtype]
            assert torch.equal(h, same)
            eps = EPS[getattr(torch, dtype.partition(".")[2])]
            for got, expected in zip(values[:2], want[:2], strict=True):
                kept = expected > -3 if name in CLIPPED else torch.ones_like(h, dtype=torch.bool)
                # Each level may be four roundings of log r and the search's residual off.
                rounding = 8 * eps * (1 + float(want[0][kept].abs().max()))
                torch.testing.assert_close(
                    got[kept], expected[kept], rtol=rounding, atol=1e-11 if eps < 1e-9 else 2e-6,
                    msg=lambda text, where=(level, name, dtype): f"{where}: {text}",
                )  # fmt: skip
            for got, expected in zip(values[2:], want[2:], strict=True):
                torch.testing.assert_close(
                    got.double(), expected.double(), rtol=1e-11 if eps < 1e-9 else 1e-6,
                    atol=1e-11 if eps < 1e-9 else 1e-6,
                )  # fmt: skip


def test_repeated_calls_are_identical():
    h = torch.randn(300001)
    for name in NAMED:
        one, two = (rx.density_ratio(h, name) for _ in range(2))
        assert torch.equal(one.log_ratio, two.log_ratio) and torch.equal(one.shift, two.shift)


def test_reference_solver_on_a_closed_form():
    """The examiner's own check: two equal weights and chi², r = 1 ± gap/4."""
    got, shift = solve("pearson_chi2", np.array([0.0, 1.0]))
    np.testing.assert_allclose(np.exp(got).astype(float), [0.75, 1.25], rtol=1e-15)
    assert float(shift) == pytest.approx(0.5)
