"""`rejection`: decisions against 50-digit arithmetic, the recovered density, the running bound."""

from __future__ import annotations

import math

import pytest
import resampling_reference as reference
import torch
from mpmath import mp, mpf
from reference import on_device
from scipy.stats import chisquare

import refine_ext as rx

pytestmark = pytest.mark.usefixtures("device")
P_VALUE = 1e-4


def decisions(log_ratio, bound, gamma, epsilon, seed, offset=0, row=0):
    """u < r/M or u < sigmoid(F), with the formulas of the paper as they stand."""
    keep = []
    with mp.workdps(50):
        for i, value in enumerate(log_ratio):
            bits = reference.number(seed, offset + i, row, reference.REJECTION)
            u = mpf(bits >> 12) / mpf(2) ** 52
            if value == -math.inf:
                keep.append(False)
                continue
            d = mpf(value) - mpf(bound)
            if gamma is None:
                keep.append(bool(u < mp.exp(d)))
                continue
            f = d - mp.log(1 - mp.exp(d - mpf(epsilon))) - mpf(gamma)
            keep.append(bool(u < 1 / (1 + mp.exp(-f))))
    return keep


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [None, 0.0, 2.5, -3.0])
def test_equals_the_definition(gamma, dtype):
    log_ratio = (3 * torch.randn(1500)).to(dtype)
    log_ratio[7] = -math.inf
    result = rx.rejection(log_ratio, gamma=gamma, epsilon=1e-4, seed=9, offset=5)
    assert result.log_bound.item() == log_ratio.max().item()
    expected = decisions(log_ratio.tolist(), log_ratio.max().item(), gamma, 1e-4, 9, 5)
    assert result.keep.tolist() == expected
    assert result.acceptance.item() == sum(expected) / 1500


def test_acceptance_law():
    """Shares kept at given log-ratios against r/M and against sigmoid(F): two-sided 4.5 standard errors."""
    levels = torch.tensor([0.0, -0.5, -2.0, -6.0], dtype=torch.float64)
    log_ratio = levels.repeat_interleave(200_000) + 30
    for gamma in (None, 0.0, 1.0):
        keep = rx.rejection(log_ratio, gamma=gamma, epsilon=1e-3, seed=1).keep.view(4, -1).double().mean(1)
        f = levels - torch.log(1 - (levels - 1e-3).exp()) - (gamma or 0)
        p = levels.exp() if gamma is None else f.sigmoid()
        assert ((keep - p).abs() <= 4.5 * (p * (1 - p) / 200_000).sqrt() + 1e-12).all()


def test_recovers_the_density():
    """Q uniform on 6 values, P known: what is kept is distributed as P."""
    p = torch.tensor([0.02, 0.08, 0.1, 0.15, 0.25, 0.4], dtype=torch.float64)
    values = torch.randint(6, (300_000,))
    keep = rx.rejection((p * 6).log()[values], gamma=None, seed=2)
    counts = torch.bincount(values[keep.keep], minlength=6)
    assert chisquare(counts.cpu().numpy(), (p * counts.sum()).cpu().numpy()).pvalue > P_VALUE
    # gamma = 0 is r/M up to epsilon
    shifted = rx.rejection((p * 6).log()[values], gamma=0.0, epsilon=1e-9, seed=2)
    assert (shifted.keep != keep.keep).double().mean() < 1e-4


def test_running_bound():
    log_ratio = torch.randn(1000)
    bound = None
    parts = []
    for start in range(0, 1000, 250):
        result = rx.rejection(log_ratio[start : start + 250], log_bound=bound, seed=3, offset=start)
        bound = result.log_bound
        assert bound.item() == log_ratio[: start + 250].max().item()
        parts.append(result.keep)
    given = rx.rejection(log_ratio, log_bound=10.0, seed=3)
    assert given.log_bound.item() == 10.0
    pieces = [rx.rejection(log_ratio[s : s + 333], log_bound=10.0, seed=3, offset=s).keep for s in (0, 333, 666, 999)]
    assert torch.equal(torch.cat(pieces), given.keep)
    assert rx.rejection(log_ratio, log_bound=-50.0, seed=3).log_bound.item() == log_ratio.max().item()


def test_percentile():
    """gamma at the q-th percentile of F: the sample there is kept with probability one half."""
    log_ratio = 2 * torch.randn(10_000, dtype=torch.float64)
    d = log_ratio - log_ratio.max()
    f = d - torch.log(-torch.expm1(d - 1e-6))
    for q in (50.0, 80.0, 95.0):
        gamma = f.sort().values[math.ceil(q * 100) - 1].item()
        by_percentile = rx.rejection(log_ratio, percentile=q, seed=4)
        assert torch.equal(by_percentile.keep, rx.rejection(log_ratio, gamma=gamma, seed=4).keep)
    assert by_percentile.acceptance < rx.rejection(log_ratio, percentile=50.0, seed=4).acceptance
    rows = rx.rejection(log_ratio.view(10, 1000), percentile=80.0, seed=torch.arange(10))
    alone = rx.rejection(log_ratio.view(10, 1000)[3], percentile=80.0, seed=3)
    assert torch.equal(rows.keep[3], alone.keep)


def test_rows_threads_and_vmap(threads):
    log_ratio = torch.randn(4, 100_001)
    threads(1)
    one = rx.rejection(log_ratio, seed=5)
    threads(2)
    two = rx.rejection(log_ratio, seed=5)
    assert torch.equal(one.keep, two.keep) and torch.equal(one.acceptance, two.acceptance)
    assert one.keep.shape == (4, 100_001) and one.log_bound.shape == one.acceptance.shape == (4,)
    assert torch.equal(one.keep[0], rx.rejection(log_ratio[0], seed=5).keep)
    by_vmap = torch.vmap(lambda x: rx.rejection(x, seed=5).keep)(log_ratio[:, :500])
    for r in range(4):
        assert torch.equal(by_vmap[r], rx.rejection(log_ratio[r, :500], seed=5).keep)


def test_edges():
    assert rx.rejection(torch.tensor([3.0]), gamma=None, seed=0).keep.tolist() == [True]
    nothing = rx.rejection(torch.full((5,), -math.inf), seed=0)
    assert not nothing.keep.any() and nothing.log_bound.item() == -math.inf
    equal = rx.rejection(torch.full((100_000,), -7e4), gamma=None, seed=0)
    assert equal.keep.all()
    far = rx.rejection(torch.tensor([-1e30, 0.0]), gamma=700.0, seed=0)
    assert not far.keep[0]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"log_ratio": torch.tensor(1.0)}, ValueError, "at least one dimension"),
        ({"log_ratio": torch.ones(0)}, ValueError, "must not be empty"),
        ({"log_bound": math.nan}, ValueError, "log_bound must not be NaN"),
        ({"log_bound": torch.zeros(2)}, ValueError, "log_bound must hold one value"),
        ({"gamma": "80%"}, TypeError, "gamma must be a number or a tensor, got str"),
        ({"percentile": 101}, ValueError, "percentile must be between 0 and 100"),
        ({"percentile": 80, "gamma": 1.0}, ValueError, "give gamma or percentile"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be a positive float"),
    ],
)
def test_errors(arguments, error, text):
    arguments = on_device({"log_ratio": torch.zeros(3), **arguments})
    with pytest.raises(error) as caught:
        rx.rejection(**arguments)
    message = str(caught.value)
    assert message.startswith("rejection: ") and text in message and "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"log_bound": math.inf}, "log_bound must be finite or -inf, got inf"),
        ({"gamma": -math.inf}, "gamma must be finite, got -inf"),
    ],
)
def test_infinite_numbers_are_refused(arguments, text, device):
    with pytest.raises(ValueError) as caught:
        rx.rejection(torch.zeros(3), **arguments)
    assert str(caught.value) == f"rejection: {text}"


@pytest.mark.sanitized
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_data(bad, kernels):
    """An error on the CPU; on CUDA, where it would wait for the device, that row keeps nothing."""
    log_ratio = torch.randn(3, 5000)
    log_ratio[1, 4998] = bad
    if kernels == "cpu":
        with pytest.raises(ValueError, match=r"^rejection: log_ratio must hold no NaN or .inf \(row 1\)$"):
            rx.rejection(log_ratio, seed=1)
        return
    result = rx.rejection(log_ratio, seed=1)
    assert not result.keep[1].any() and result.keep[0].any() and result.keep[2].any()
    assert result.log_bound.isnan().tolist() == [False, True, False]
    assert result.acceptance[1] == 0


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_registrations(shape):
    op = torch.ops.refine_ext.rejection.default
    double = torch.tensor(0.5, dtype=torch.float64)
    for bound, gamma in ((None, None), (double, double), (None, double.expand(shape[:-1]).contiguous())):
        torch.library.opcheck(op, (torch.randn(shape), bound, gamma, 1e-6, torch.tensor(3), 1))


def test_compiles():
    compiled = torch.compile(
        lambda x: rx.rejection(x, seed=1, percentile=80.0).keep, fullgraph=True, backend="aot_eager"
    )
    log_ratio = torch.randn(100)
    assert torch.equal(compiled(log_ratio), rx.rejection(log_ratio, seed=1, percentile=80.0).keep)
