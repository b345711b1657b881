"""The ops of the density-ratio family one by one, against closed forms: every storage type, short rows and long ones.

On CUDA a row of up to 16,384 samples is one team's work, a longer one that of several blocks (csrc/cuda); the tests
take both ways, aligned to 16 bytes and not.
"""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from reference import (
    ALPHAS,
    CLIPPED,
    FAMILIES,
    NAMED,
    alpha_of,
    log_ratio,
    numpy_of,
    outputs,
    score_factor,
    slope,
    solve,
)
from test_density_ratio import EPS, assert_normalised

import refine_ext as rx
from refine_ext.divergence import parse_divergence

pytestmark = pytest.mark.usefixtures("device")
ops = torch.ops.refine_ext
LONG = 20_001
every_type = pytest.mark.parametrize("dtype", EPS, ids=str)
# One divergence of each form that the kernels tell apart, and a clipped power.
FORMS = (*NAMED, "alpha:0.3", "alpha:3")


def shifted_by(offset: int, values: torch.Tensor) -> torch.Tensor:
    """The same values at `offset` elements from the beginning of their memory, up to its very end."""
    memory = torch.full((values.numel() + offset,), math.nan, dtype=values.dtype)
    memory[offset:] = values.reshape(-1)
    return memory[offset:].view(values.shape)


def conjugate(name: str, t: np.ndarray) -> np.ndarray:
    """f*(t) as the table of the literature writes it."""
    u = np.exp(log_ratio(name, t))
    with np.errstate(all="ignore"):
        closed = {
            "kl": lambda: np.exp(t - 1),
            "reverse_kl": lambda: -1 - np.log(-t),
            "jensen_shannon": lambda: -np.log(2 - np.exp(t)),
            "gan": lambda: -np.log(1 - np.exp(t)),
            "pearson_chi2": lambda: np.where(t >= -2, t * t / 4 + t, -1),
            "neyman_chi2": lambda: 2 - 2 * np.sqrt(1 - t),
            "squared_hellinger": lambda: t / (1 - t),
            "jeffreys": lambda: u + 1 / u + t - 2,
        }
        if name in closed:
            return closed[name]()
        a = alpha_of(name)
        return (np.maximum(1 + (a - 1) * t, 0) ** (a / (a - 1)) - 1) / a


@pytest.mark.sanitized
@pytest.mark.parametrize(
    "n", [1, 2, 3, 4, 7, 8, 9, 31, 32, 63, 127, 128, 129, 255, 256, 1024, 4096, 4097, 16384, 16385, LONG]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_every_element_is_written_once(n, dtype, assert_same):
    """Around packs, warps and blocks. bfloat16 has the sizes of float16."""
    for name in ("kl", "squared_hellinger"):
        h = outputs(name, (2, n), dtype)
        want = rx.density_ratio(h, name, dim=-1).log_ratio
        for row in range(2 if n < 4097 else 1):
            assert_normalised(want[row], h[row], name)
        for offset in (0, 1, 3):
            out = shifted_by(1, torch.full_like(h, math.nan))
            rx.density_ratio(shifted_by(offset, h), name, dim=-1, out=out)
            assert_same(out, want, (name, offset))
            in_place = shifted_by(offset, h)
            rx.density_ratio(in_place, name, dim=-1, out=in_place)
            assert_same(in_place, want, (name, offset))


@pytest.mark.sanitized
@every_type
@pytest.mark.parametrize("name", (*FORMS, "logit"))
def test_weights(name, dtype):
    """Of every row its own or shared, some of them zero; log r and r."""
    kind = {"kind": "logit"} if name == "logit" else {"divergence": name}
    for rows, n in ((3, 70), (2, 3000), (1, LONG)):
        h = shifted_by(2, outputs(name, (rows, n), dtype))
        # Powers of two, which stay what they are in every type when the largest becomes one.
        counts = torch.randint(0, 2, (rows, n)) * 0.5 ** torch.randint(0, 4, (rows, n))
        counts[:, 0] = 1
        for w in (counts.to(dtype), counts[0].to(dtype))[: 1 if n == LONG else 2]:
            result = rx.density_ratio(h, **kind, dim=-1, base_weights=shifted_by(1, w))
            ratio = rx.density_ratio(h, **kind, dim=-1, base_weights=w, output="ratio").ratio
            for row in range(rows):
                assert_normalised(result.log_ratio[row], h[row], name, w.expand(rows, n)[row])
            log_r = result.log_ratio.double()
            want = log_r.exp()
            # Where log r falls to -inf at a finite output, its rounding says little about so small an r.
            kept = (want < torch.finfo(dtype).max) & (log_r > (-3 if name in CLIPPED else -math.inf))
            # Half's smallest numbers are coarse.
            wide = (2 * EPS[dtype] * (1 + log_r.abs()) + 2e-6) * want + (2.0**-24 if dtype == torch.float16 else 1e-30)
            assert ((ratio.double() - want).abs() <= wide)[kept].all()
            assert (ratio[log_r < -3] < 0.06).all()


@pytest.mark.sanitized
@pytest.mark.parametrize("n", [50, LONG])
@pytest.mark.parametrize("name", FORMS)
def test_given_shift(name, n):
    for dtype in (torch.float64, torch.float32):
        h = outputs(name, (2, n), dtype)
        shift = torch.tensor([0.25, -0.01] if name not in ("reverse_kl", "gan") else [0.02, 1.5], dtype=torch.float64)
        result = rx.density_ratio(h, name, dim=-1, shift=shift)
        for row in range(2):
            x = numpy_of(h[row])
            want = log_ratio(name, x - np.longdouble(float(shift[row])))
            got = numpy_of(result.log_ratio[row])
            finite = np.isfinite(want)
            c = score_factor(name, want[finite])
            bound = 8 * EPS[dtype] * (1 + np.abs(want[finite]) + c * (1 + np.abs(x[finite])))
            np.testing.assert_array_less(np.abs(got[finite] - want[finite]), bound)
            assert (np.exp(got[~finite]) <= 1e-5).all()
            total = np.sum(np.exp(want))
            assert float(result.log_normalizer[row]) == pytest.approx(float(np.log(total / n)), rel=1e-5, abs=1e-5)
            ess = float(total**2 / np.sum(np.exp(2 * want)))
            assert float(result.ess[row]) == pytest.approx(ess, rel=3e-5)


@pytest.mark.sanitized
@pytest.mark.parametrize("n", [100, 2000, LONG])
@pytest.mark.parametrize("name", (*FORMS, "logit"))
def test_special_samples(name, n):
    """-inf is a sample of ratio zero; NaN, +inf, bad weights and rows of nothing else make their own row NaN alone."""
    kind = {"kind": "logit"} if name == "logit" else {"divergence": name}
    for dtype in (torch.float32, torch.bfloat16):
        h = outputs(name, (6, n), dtype)
        h[0, ::3], h[1, n // 2], h[2, n - 1], h[3] = -math.inf, math.nan, math.inf, -math.inf
        h[4] = h[4, 0]
        result = rx.density_ratio(h, **kind, dim=-1, nan_policy="propagate")
        bad = torch.tensor([False, True, True, True, False, False])
        assert result.log_ratio[bad].isnan().all()
        for value in (result.shift, result.ess, result.max_weight, result.log_normalizer):
            assert torch.equal(value.isnan(), bad)
        for row in (0, 4, 5):
            assert_normalised(result.log_ratio[row], h[row], name)
        assert (result.ratio[0, ::3] == 0).all()
        assert float(result.log_ratio[4].abs().max()) <= 1e-6
        w = torch.ones(5, n, dtype=dtype)
        w[0, n // 3], w[1, 0], w[2, -1], w[3] = math.nan, -1.0, math.inf, 0.0
        h = outputs(name, (5, n), dtype)
        result = rx.density_ratio(h, **kind, dim=-1, base_weights=w, nan_policy="propagate")
        assert result.log_ratio[:4].isnan().all() and result.shift[:4].isnan().all()
        assert_normalised(result.log_ratio[4], h[4], name)


@pytest.mark.parametrize("n", [100, LONG])
@pytest.mark.parametrize("name", FORMS)
def test_weights_over_sixty_decades(name, n):
    """The largest ratio is then beyond float32, and so are squares of weighted ratios."""
    h = outputs(name, n, torch.float32)
    decades = 10 ** (60 * torch.rand(n, dtype=torch.float64) - 30)
    for w in (decades.float(), torch.where(h == h.max(), 1e-36, 1.0).float()):
        result = rx.density_ratio(h, name, base_weights=w)
        # As the op gets them: the largest is one.
        assert_normalised(result.log_ratio, h, name, w / w.max())


@pytest.mark.sanitized
@pytest.mark.parametrize("tight", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_variational_bound_and_its_gradient(name, tight):
    for dtype, n, real_n in ((torch.float64, 60, 33), (torch.float32, 3000, 4500), (torch.float32, LONG, 700)):
        # Next to alpha = 1 ratios near the edge of the domain overflow.
        drawn = name if name != "alpha:0.999" else "kl"
        fake, real = shifted_by(1, outputs(drawn, (2, n), dtype)), shifted_by(1, outputs(drawn, (2, real_n), dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        code = parse_divergence("test", name)
        values, stats = ops.variational_bound(real, fake, tight, *code)
        assert values.dtype == wide
        grad = torch.tensor([0.7, -1.3], dtype=wide)
        back = ops.variational_bound_backward(grad, fake, stats, tight, *code)
        rtol = 1e-9 if dtype == torch.float64 else 5e-6
        for row in range(2):
            x = numpy_of(fake[row])
            log_r, shift = solve(name, x) if tight else (log_ratio(name, x), np.longdouble(0))
            terms = conjugate(name, x - shift)
            want = np.mean(numpy_of(real[row])) - shift - np.mean(terms)
            scale = 1 + abs(shift) + np.mean(np.abs(terms)) + np.abs(x).max()
            assert abs(float(values[row]) - want) <= rtol * scale
            gradient = -float(grad[row]) * np.exp(log_r) / n
            limit = rtol * 20 * np.abs(gradient) + np.abs(gradient).max() * rtol
            np.testing.assert_array_less(np.abs(numpy_of(back[row]) - gradient), limit + 1e-300)


@pytest.mark.sanitized
@every_type
@pytest.mark.parametrize("name", (*FORMS, "logit"))
def test_backward(name, dtype):
    """The gradient's own closed form (implicit differentiation of E r = 1), in float64 from the stored log-ratios."""
    code = parse_divergence("test", "kl" if name == "logit" else name, "logit" if name == "logit" else "variational")
    for n, weighted in ((40, False), (1500, True), (LONG, False)):
        h = outputs(name, (2, n), dtype)
        w = torch.randint(0, 3, (2, n)).to(dtype) if weighted else None
        x, stats = ops.density_ratio(h, w, None, *code, False, True)
        x, grad = shifted_by(1, x), shifted_by(1, torch.randn(2, n).to(dtype))
        grad_stats = torch.randn(2, 8, dtype=torch.float64)
        for solved in (True, False):
            got = ops.density_ratio_backward(grad, grad_stats, x, stats, w, solved, *code)
            for row in range(2):
                log_r, g = numpy_of(x[row]).astype(float), numpy_of(grad[row]).astype(float)
                mass = np.exp(log_r) * (numpy_of(w[row]).astype(float) if weighted else 1)
                clipped = log_r == -np.inf
                with np.errstate(all="ignore"):
                    c = np.where(clipped, 0, score_factor(name, np.where(clipped, 0, log_r))).astype(float)
                through = (
                    (float(grad_stats[row, 0]) - np.sum(c * g)) / np.sum(c * mass)
                    if solved
                    else float(grad_stats[row, 1]) / np.exp(float(stats[row, 1]))
                )
                want = c * (g + mass * through)
                eps = EPS[dtype] if dtype.itemsize == 2 else 8 * EPS[dtype] * np.sqrt(n)
                scale = c * (np.abs(g) + mass * (abs(through) + np.mean(np.abs(c * g)) * n / np.sum(c * mass)))
                limit = eps * scale * (1 + np.abs(np.where(clipped, 0, log_r)))
                tiny = 2.0**-24 if dtype == torch.float16 else 1e-30
                np.testing.assert_array_less(np.abs(numpy_of(got[row]).astype(float) - want), limit + tiny)


def mp_slopes(name: str, x: np.ndarray) -> np.ndarray:
    return np.array([float(slope(name, mpmath.exp(float(value)))) for value in x])


@pytest.mark.sanitized
@every_type
@pytest.mark.parametrize("name", (*NAMED, *ALPHAS[:4]))
def test_dual(name, dtype):
    """f'(e^l), its derivative and f*(f'(e^l)) of logits, against the definitions."""
    code = parse_divergence("test", name)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Half formats round what they store, once.
    eps = {torch.float64: 1e-11, torch.float32: 3e-6}.get(dtype, EPS[dtype])
    least = 2.0**-24 if dtype == torch.float16 else 1e-30
    for rows, n in ((2, 37), (1, 5000)):
        # What half can hold: up to e^(3.5 * 2.5), times a few.
        logits = shifted_by(1, (torch.randn(rows, n, dtype=torch.float64) * 1.5).clamp(-2.5, 2.5).to(dtype))
        x = numpy_of(logits).astype(float)
        got = numpy_of(ops.dual_output(logits, *code)).astype(float)
        some = np.arange(0, n, max(1, n // 40))
        want = mp_slopes(name, x[0, some])
        np.testing.assert_array_less(np.abs(got[0, some] - want), eps * (1 + np.abs(want)))
        c, ratio = score_factor(name, x).astype(float), np.exp(x)
        for conjugated, derivative in ((False, 1 / c), (True, ratio / c)):
            grad = shifted_by(1, torch.randn(rows, n).to(dtype))
            by_sample = numpy_of(ops.dual_slope(grad, logits, conjugated, *code)).astype(float)
            want = numpy_of(grad).astype(float) * derivative
            np.testing.assert_allclose(by_sample, want, rtol=10 * eps, atol=least)
            per_row = torch.linspace(-1, 2, rows, dtype=wide)
            by_row = numpy_of(ops.dual_slope(per_row, logits, conjugated, *code)).astype(float)
            want = numpy_of(per_row).astype(float)[:, None] * derivative
            np.testing.assert_allclose(by_row, want, rtol=10 * eps, atol=least)
        real = torch.randn(rows, 45, dtype=torch.float64).to(dtype)
        values = ops.dual_bound(real, logits, *code)
        assert values.dtype == wide
        exact = np.array([np.mean(mp_slopes(name, numpy_of(real[row]))) for row in range(rows)])
        # What f* takes is not rounded to the storage type in between.
        means = conjugate(name, numpy_of(ops.dual_output(logits.double(), *code))).mean(axis=1)
        scale = 1 + np.abs(means) + np.abs(exact)
        tolerance = 30 * (1e-11 if dtype == torch.float64 else 3e-6) * scale
        assert (np.abs(numpy_of(values).astype(float) - (exact - means)) <= tolerance).all()
