"""density_ratio against bisection in extended precision: values, groups, layouts, weights, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    CLIPPED,
    FAMILIES,
    log_ratio,
    numpy_of,
    outputs,
    score_factor,
    seeded,
    solve,
)

import refine_ext as rx

pytestmark = pytest.mark.usefixtures("device")
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# What the docstring promises of the search: |E r − 1| of the solved shift.
RESIDUAL = {torch.float64: 1e-12, torch.float32: 3e-7, torch.float16: 3e-7, torch.bfloat16: 3e-7}
every_family = pytest.mark.parametrize("name", FAMILIES)
BOUNDARIES = [1, 2, 3, 15, 16, 17, 33, 4095, 4096, 4097, 65535, 65536, 65537, 262143, 262144, 262145]


def log_ratio_bound(name: str, h: np.ndarray, want: np.ndarray, w, dtype: torch.dtype) -> np.ndarray:
    """How far log r may be off.

    A few roundings of log r and of the distance to the largest output, which the score factor c turns into an error of
    log r; and the shift's residual: E r is off by it, so the shift by residual / E[r c] and log r by c times that.
    Half formats compute in float32 and round once. The general power works on the largest log r (never beyond log n
    but for base weights) in float64.
    """
    compute = EPS[dtype] if dtype == torch.float64 else EPS[torch.float32]
    c = score_factor(name, want)
    with np.errstate(invalid="ignore"):
        mean_slope = np.average(np.where(want > -np.inf, np.exp(want) * c, 0), weights=w)
    # A float64 distance between numbers of size |h| is off by their rounding only if they are not exact themselves.
    spread = h[np.isfinite(h)].max() - np.where(np.isfinite(h), h, h[np.isfinite(h)].max())
    with np.errstate(invalid="ignore"):
        top = EPS[torch.float64] * want.max() if name.startswith("alpha") else 0
        bound = 6 * top + 6 * compute * (1 + np.abs(want) + c * spread) + RESIDUAL[dtype] * c / mean_slope
    return bound + (0 if dtype in (torch.float32, torch.float64) else EPS[dtype] / 2 * np.abs(want))


def assert_normalised(log_ratio: torch.Tensor, h: torch.Tensor, name: str, w: torch.Tensor | None = None) -> None:
    """One group's log-ratios against bisection on the shift."""
    x = numpy_of(h.reshape(-1))
    weights = None if w is None else numpy_of(w.reshape(-1))
    want, _ = solve(name, x, weights)
    got = numpy_of(log_ratio.reshape(-1))
    bound = log_ratio_bound(name, x, want, weights, h.dtype)
    clipped = want == -np.inf
    # Within its error of the clipping point a sample may fall on either side: its ratio is then as small.
    near = ~clipped & (bound >= 1)
    assert (got[near] < 0).all()
    assert (np.exp(got[clipped]) <= 1e-5).all()
    kept = ~clipped & ~near
    off = np.abs(got - want)[kept] / bound[kept]
    assert off.size == 0 or off.max() <= 1, f"{off.max()} of the bound, {got[kept][off.argmax()]}"


@every_family
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_against_bisection(name, dtype):
    h = outputs(name, 700, dtype)
    result = rx.density_ratio(h, name)
    assert_normalised(result.log_ratio, h, name)
    assert result.log_ratio.dtype == result.ratio.dtype == result.weights.dtype == dtype
    assert result.shift.dtype == torch.float64 and result.shift.dim() == 0


@every_family
def test_shift_float64(name):
    h = outputs(name, 300)
    _, want = solve(name, numpy_of(h))
    assert float(rx.density_ratio(h, name).shift) == pytest.approx(float(want), rel=1e-10, abs=1e-10)


@every_family
@pytest.mark.parametrize("n", BOUNDARIES)
def test_sizes_around_the_block_boundaries(name, n):
    """Every sample is counted once: the mean ratio is one, and each log r is f*'s at the reported shift."""
    h = outputs(name, n, torch.float32)
    result = rx.density_ratio(h, name)
    assert abs(float(result.ratio.double().mean()) - 1) <= 1e-6
    x = numpy_of(h)
    want = log_ratio(name, x - np.longdouble(float(result.shift)))
    kept = want > (-np.inf if name not in CLIPPED else -3)
    # The reported shift is rounded to float64; c times that is what it can move log r by.
    bound = log_ratio_bound(name, x, want, None, torch.float32) + score_factor(name, want) * 1e-15 * (
        1 + abs(float(result.shift))
    )
    assert (np.abs(numpy_of(result.log_ratio) - want)[kept] <= bound[kept]).all()


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_base_weights(name, dtype):
    h = outputs(name, 500, dtype)
    w = (torch.randn(500, dtype=torch.float64) * 3).exp().to(dtype)
    w[::7] = 0
    result = rx.density_ratio(h, name, base_weights=w)
    assert_normalised(result.log_ratio, h, name, w)
    weights = result.weights
    assert (weights[::7] == 0).all()
    assert float(weights.double().sum()) == pytest.approx(1, abs=500 * EPS[dtype])
    # Only proportions matter.
    again = rx.density_ratio(h, name, base_weights=w * 1024)
    torch.testing.assert_close(again.log_ratio, result.log_ratio, rtol=1e-5, atol=1e-5)


@every_family
def test_multiplicities_are_repeated_samples(name):
    h = outputs(name, 60)
    counts = torch.randint(0, 5, (60,))
    weighted = rx.density_ratio(h, name, base_weights=counts)
    repeated = rx.density_ratio(h.repeat_interleave(counts), name)
    assert float(weighted.shift) == pytest.approx(float(repeated.shift), rel=1e-10, abs=1e-10)
    torch.testing.assert_close(weighted.log_ratio.repeat_interleave(counts), repeated.log_ratio, rtol=1e-9, atol=1e-9)


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_health_of_the_weights(name, dtype):
    h = outputs(name, 5000, dtype)
    w = torch.rand(5000, dtype=dtype)
    for weights in (None, w):
        result = rx.density_ratio(h, name, base_weights=weights)
        r = numpy_of(result.log_ratio)
        mass = np.exp(r) * (1 if weights is None else numpy_of(weights))
        # Sums over rounded log-ratios: eps max|log r| each.
        tolerance = float(4 * EPS[dtype] * (4 + np.abs(r[r > -20]).max()))
        assert float(result.ess) == pytest.approx(float(mass.sum() ** 2 / (mass**2).sum()), rel=tolerance)
        assert float(result.max_weight) == pytest.approx(float(mass.max() / mass.sum()), rel=tolerance)
        np.testing.assert_allclose(numpy_of(result.weights), mass / mass.sum(), rtol=tolerance, atol=1e-38)
        assert float(result.weights.double().sum()) == pytest.approx(1, abs=tolerance)
        assert abs(float(result.log_normalizer)) <= RESIDUAL[dtype] * 1.01
        torch.testing.assert_close(result.ratio, result.log_ratio.exp(), rtol=tolerance, atol=1e-38)


@every_family
def test_ratio_output_is_the_exponential(name):
    h = outputs(name, 3000, torch.float32)
    written = rx.density_ratio(h, name, output="ratio")
    derived = rx.density_ratio(h, name)
    r, x = numpy_of(written.ratio), numpy_of(derived.log_ratio)
    # log r carries eps |log r|, and near the clipping point r carries the absolute rounding of the output.
    bound = 8 * EPS[torch.float32] * ((1 + np.abs(np.where(x > -np.inf, x, 0))) * np.exp(x) + (name in CLIPPED))
    assert (np.abs(r - np.exp(x)) <= bound).all()
    assert written.shift == derived.shift and written.ess == derived.ess
    torch.testing.assert_close(written.log_ratio, derived.log_ratio, rtol=0, atol=0)


@every_family
def test_given_shift(name):
    h = outputs(name, (4, 50))
    solved = rx.density_ratio(h, name, dim=1)
    again = rx.density_ratio(h, name, dim=1, shift=solved.shift)
    assert torch.equal(again.shift, solved.shift)
    # The shift is a float64: that is c times its rounding in log r.
    c = torch.tensor(score_factor(name, numpy_of(solved.log_ratio)).astype(np.float64))
    near = solved.log_ratio > -3 if name in CLIPPED else torch.ones_like(h, dtype=torch.bool)
    off = (again.log_ratio - solved.log_ratio).abs()
    assert (off <= 1e-14 * (4 + solved.log_ratio.abs() + c * (4 + solved.shift.abs()[:, None])))[near].all()
    # On other samples each ratio is its own, and the mean need not be one.
    shift = float(solved.shift.max())
    one = rx.density_ratio(h[:, :7], name, shift=shift)
    want = log_ratio(name, numpy_of(h[:, :7]) - np.longdouble(shift))
    np.testing.assert_allclose(numpy_of(one.ratio), np.exp(want), rtol=1e-11, atol=1e-14)
    mean = float(one.ratio.mean())
    assert float(one.log_normalizer) == pytest.approx(math.log(mean), rel=1e-12, abs=1e-12)


@every_family
def test_logit_kind_ignores_the_divergence(name):
    logit = torch.randn(40, dtype=torch.float64) * 5
    result = rx.density_ratio(logit, name, kind="logit")
    want = logit - (logit.logsumexp(0) - math.log(40))
    torch.testing.assert_close(result.log_ratio, want, rtol=1e-14, atol=1e-14)
    assert float(result.shift) == pytest.approx(float(logit.exp().mean().log()), rel=1e-13)


def test_swapping_the_classes_negates_a_classifiers_log_ratio():
    logit = torch.randn(100, dtype=torch.float64) * 20
    one = rx.density_ratio(logit, kind="logit", shift=0.25).log_ratio
    other = rx.density_ratio(-logit, kind="logit", shift=-0.25).log_ratio
    assert torch.equal(one, -other)


def test_alpha_matches_named_divergences_up_to_scale():
    h = outputs("neyman_chi2", 400)
    for alpha, named, scale in (
        ("alpha:2", "pearson_chi2", 2.0),
        ("alpha:0.5", "squared_hellinger", 0.5),
        ("alpha:-1", "neyman_chi2", 2.0),
    ):
        one, other = rx.density_ratio(h, alpha), rx.density_ratio(h * scale, named)
        torch.testing.assert_close(one.ratio, other.ratio, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one.shift * scale, other.shift, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("small", [1e-3, -1e-3, 1e-6, -1e-6, 1e-9])
def test_alpha_approaches_kl_and_reverse_kl(small):
    h = torch.randn(300, dtype=torch.float64)
    for limit, alpha in (("kl", 1 + small), ("reverse_kl", small)):
        near = rx.density_ratio(h, f"alpha:{alpha!r}").log_ratio
        # First order in alpha, times log² r; what the tiny exponent costs in rounding is eps over it.
        torch.testing.assert_close(near, rx.density_ratio(h, limit).log_ratio, rtol=0, atol=100 * abs(small) + 1e-12)


@every_family
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_dimensions(name, dim, assert_same):
    h = outputs(name, (3, 5, 4))
    result = rx.density_ratio(h, name, dim=dim)
    groups = h.movedim(dim, -1)
    assert result.shift.shape == result.ess.shape == result.khat.shape == groups.shape[:-1]
    assert result.log_ratio.shape == result.ratio.shape == result.weights.shape == h.shape
    for index in np.ndindex(*groups.shape[:-1]):
        alone = rx.density_ratio(groups[index], name)
        for attribute in ("log_ratio", "ratio", "weights"):
            rows = getattr(result, attribute).movedim(dim, -1)
            assert_same(rows[index], getattr(alone, attribute), attribute)
        for attribute in ("shift", "ess", "max_weight", "log_normalizer"):
            assert_same(getattr(result, attribute)[index], getattr(alone, attribute), attribute)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (1,), (20000, 3), (3, 70000), (2, 300000)])
def test_many_and_few_groups(shape, assert_same):
    h = torch.randn(shape)
    result = rx.density_ratio(h, "jensen_shannon", dim=-1)
    torch.testing.assert_close(
        result.ratio.double().mean(-1), torch.ones(shape[:-1], dtype=torch.float64), rtol=0, atol=1e-6
    )
    for row in sorted({0, shape[0] // 2, shape[0] - 1}) if len(shape) == 2 else ():
        assert_same(result.log_ratio[row], rx.density_ratio(h[row], "jensen_shannon").log_ratio)


def test_zero_dimensional():
    for name in FAMILIES:
        result = rx.density_ratio(torch.tensor(3.25), name)
        assert result.log_ratio.shape == () and abs(float(result.log_ratio)) < 1e-6
        assert float(result.ess) == pytest.approx(1) and float(result.max_weight) == pytest.approx(1)
        assert math.isnan(float(result.khat))


def layouts(h: torch.Tensor):
    """The same values behind every kind of stride and alignment."""
    n = h.numel()
    yield h.clone()
    for offset in (1, 2, 3, 5):
        storage = torch.full((n + offset,), math.nan, dtype=h.dtype)
        storage[offset:] = h
        yield storage[offset:]
    wide = torch.full((n, 3), math.nan, dtype=h.dtype)
    wide[:, 1] = h
    yield wide[:, 1]
    yield h.flip(0).clone().flip(0)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("n", [7, 67, 70001])
def test_layouts(dtype, n, assert_same):
    for name in ("kl", "reverse_kl", "jeffreys"):
        h = outputs(name, n, dtype)
        results = [rx.density_ratio(x, name) for x in layouts(h)]
        for other in results[1:]:
            assert_same(other.log_ratio, results[0].log_ratio, name)
            assert_same(other.shift.to(dtype), results[0].shift.to(dtype), name)


def test_expanded_and_transposed(assert_same):
    h = torch.randn(6)
    whole = rx.density_ratio(h.expand(4, 6), "pearson_chi2", dim=1)
    assert_same(whole.log_ratio, rx.density_ratio(h, "pearson_chi2").log_ratio.expand(4, 6))
    matrix = torch.randn(5, 8)
    assert_same(rx.density_ratio(matrix.t(), "gan", dim=0).ratio, rx.density_ratio(matrix, "gan", dim=1).ratio.t())
    assert_same(rx.density_ratio(matrix.t(), "gan").ratio, rx.density_ratio(matrix.t().contiguous(), "gan").ratio)


@every_family
@pytest.mark.parametrize("n", [5, 5000, 300001])
def test_out_and_in_place(name, n):
    h = outputs(name, n, torch.float32)
    want = rx.density_ratio(h, name)
    out = torch.full_like(h, math.nan)
    got = rx.density_ratio(h, name, out=out)
    assert got.log_ratio.data_ptr() == out.data_ptr()
    assert torch.equal(out, want.log_ratio) and torch.equal(got.shift, want.shift)
    ratio = rx.density_ratio(h, name, output="ratio", out=out)
    assert torch.equal(out, rx.density_ratio(h, name, output="ratio").ratio)
    assert ratio.ratio.data_ptr() == out.data_ptr()
    in_place = h.clone()
    got = rx.density_ratio(in_place, name, out=in_place)
    # The last pass of a large in-place call may stop one Newton step apart: both are within the residual.
    assert abs(float(got.ratio.double().mean()) - 1) <= 1e-6
    torch.testing.assert_close(got.shift, want.shift, rtol=1e-6, atol=1e-6)
    assert got.log_ratio.data_ptr() == in_place.data_ptr()


def test_out_through_views(assert_same):
    h = torch.randn(4, 6)
    want = rx.density_ratio(h, "jensen_shannon", dim=0).log_ratio
    for out in (torch.empty(4, 6), torch.empty(6, 4).t(), torch.empty(4, 12)[:, ::2], torch.empty(25)[1:].view(4, 6)):
        got = rx.density_ratio(h, "jensen_shannon", dim=0, out=out)
        assert_same(out, want)
        assert torch.equal(got.log_ratio, out)
    whole = rx.density_ratio(h, "jensen_shannon").log_ratio
    for out in (torch.empty(4, 6), torch.empty(6, 4).t(), torch.empty(4, 12)[:, ::2]):
        got = rx.density_ratio(h, "jensen_shannon", out=out)
        assert_same(out, whole)
        assert torch.equal(got.log_ratio, out)
    transposed = torch.randn(6, 4).t()
    want = rx.density_ratio(transposed, "kl").log_ratio.clone()
    rx.density_ratio(transposed, "kl", out=transposed)
    assert torch.equal(transposed, want)


def test_the_input_is_never_written():
    for n in (100, 300000):
        h = torch.randn(n)
        before = h.clone()
        for output in ("log_ratio", "ratio"):
            rx.density_ratio(h, "squared_hellinger", output=output)
            rx.density_ratio(h, "squared_hellinger", output=output, out=torch.empty_like(h))
        assert torch.equal(h, before)


@given(
    name=st.sampled_from(FAMILIES),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    permutation=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_stride_and_dimension(name, shape, permutation, step, dtype, weighted, seed, assert_same):
    generator = seeded(seed)
    order = list(range(len(shape)))
    permutation.shuffle(order)
    base = outputs(name, [size * step for size in shape], dtype, generator=generator)
    h = base[tuple(slice(None, None, step) for _ in shape)].permute(order)
    dim = permutation.choice([None, *range(h.dim())])
    w = torch.rand(h.shape, generator=generator).to(dtype) + 0.01 if weighted else None
    result = rx.density_ratio(h, name, dim=dim, base_weights=w)
    if dim is None:
        assert_normalised(result.log_ratio, h, name, w)
        return
    for position, group in enumerate(h.movedim(dim, -1).reshape(-1, h.shape[dim])):
        weights = None if w is None else w.movedim(dim, -1).reshape(-1, h.shape[dim])[position]
        alone = rx.density_ratio(group, name, base_weights=weights)
        assert_same(result.log_ratio.movedim(dim, -1).reshape(-1, h.shape[dim])[position], alone.log_ratio)
        if position == 0:
            assert_normalised(alone.log_ratio, group, name, weights)


def test_weights_shared_along_the_dimension(assert_same):
    h, w = torch.randn(4, 6), torch.rand(6)
    shared = rx.density_ratio(h, "kl", dim=1, base_weights=w)
    spelled = rx.density_ratio(h, "kl", dim=1, base_weights=w.expand(4, 6))
    for attribute in ("log_ratio", "weights", "shift", "ess", "khat"):
        assert_same(getattr(shared, attribute), getattr(spelled, attribute), attribute)
    crosswise = rx.density_ratio(h, "kl", dim=0, base_weights=torch.rand(4))
    torch.testing.assert_close((crosswise.weights.sum(0)), torch.ones(6))


def test_repr():
    one = rx.density_ratio(torch.zeros(2, 3))
    assert repr(one) == "DensityRatio(shape=[2, 3], shift=-1, ess=6, max_weight=0.167)"
    assert repr(rx.density_ratio(torch.zeros(2, 3), dim=1)) == "DensityRatio(shape=[2, 3], groups=[2])"
