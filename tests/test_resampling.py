"""`resample`: exact agreement with integer and rational references, the laws of the counts, and the edges."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import resampling_reference as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import on_device, seeded
from scipy.stats import chisquare
from torch import Tensor

import refine_ext as rx
from refine_ext.resampling import METHODS

pytestmark = pytest.mark.usefixtures("device")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
P_VALUE = 1e-4  # seeds are fixed: a p-value below this is a defect, not bad luck


def sample_weights(kind: str, n: int) -> Tensor:
    generator = seeded(n)
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    return {
        "uniform": uniform,
        "equal": torch.full((n,), 1 / 3, dtype=torch.float64),
        "decades": 10 ** (30 * uniform - 15),
        "sparse": torch.where(uniform < 0.1, uniform, 0.0).index_fill(0, torch.tensor(n - 1), 0.5),
    }[kind]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["uniform", "equal", "decades", "sparse"])
@pytest.mark.parametrize("n", [1, 2, 7, 100, 4095, 4096, 4097, 9000])
def test_equals_the_integer_definition(n, kind, method):
    weights = sample_weights(kind, n)
    boundaries = reference.cumulative(weights.tolist())
    for num in (0, 1, 5, n // 40, n, 2 * n + 3):
        drawn = rx.resample(weights, num, method, seed=12345, offset=3)
        assert drawn.dtype == torch.int64
        assert drawn.tolist() == reference.resample(boundaries, num, method, 12345, 3)


@pytest.mark.parametrize("method", METHODS)
def test_many_draws_of_few_weights(method):
    """More draws than one chunk's task takes, so that they are shared out."""
    weights = torch.tensor([0.3, 0.0, 1e-3, 5.0, 0.2], dtype=torch.float64)
    boundaries = reference.cumulative(weights.tolist())
    drawn = rx.resample(weights, 40_000, method, seed=1)
    assert drawn.tolist() == reference.resample(boundaries, 40_000, method, 1)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("method", ["systematic", "stratified"])
def test_equals_rational_arithmetic(method, log):
    """Draw j owns the point (j + u) / num of the weights' exact running sum; nothing is rounded in this reference."""
    generator = seeded(5)
    for n, num in ((3, 50), (1000, 700), (5000, 3001)):
        values = 5 * torch.randn(n, generator=generator, dtype=torch.float64)
        values = values if log else values.exp()
        if log:
            from mpmath import mp, mpf

            with mp.workdps(40):
                exact = [Fraction(int(mp.exp(mpf(v)) * 2**100), 2**100) for v in values.tolist()]
        else:
            exact = [Fraction(v) for v in values.tolist()]
        total, running, sums = sum(exact), Fraction(0), []
        for w in exact:
            running += w
            sums.append(running / total)
        uniforms = [Fraction(reference.number(8, 0 if method == "systematic" else j), 2**64) for j in range(num)]
        expected, i = [], 0
        for j, u in enumerate(uniforms):
            while sums[i] <= (j + u) / num:
                i += 1
            expected.append(i)
        assert rx.resample(values, num, method, seed=8, log=log).tolist() == expected


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_storage_types_draw_alike(dtype, method):
    weights = torch.rand(9001).to(dtype)
    drawn = rx.resample(weights, 5000, method, seed=3)
    assert torch.equal(drawn, rx.resample(weights.double(), 5000, method, seed=3))
    log_weights = torch.randn(1003).to(dtype)
    drawn = rx.resample(log_weights, 500, method, seed=3, log=True)
    assert torch.equal(drawn, rx.resample(log_weights.double(), 500, method, seed=3, log=True))


@pytest.mark.parametrize("method", METHODS)
def test_expected_counts(method):
    """Counts summed over many seeds. Multinomial counts are chi-square; the others vary less, so theirs is below it."""
    weights = torch.tensor([5.0, 1.0, 0.0, 2.5, 1e-3, 1.25, 0.7, 3.0], dtype=torch.float64)
    p = (weights / weights.sum()).cpu().numpy()
    seeds = torch.arange(500)
    drawn = rx.resample(weights.expand(500, -1), 400, method, seed=seeds)
    counts = torch.bincount(drawn.flatten(), minlength=8).cpu().numpy()
    assert counts[2] == 0
    used = p > 0
    statistic = chisquare(counts[used], 200_000 * p[used])
    assert statistic.pvalue > P_VALUE
    if method == "multinomial":
        assert statistic.pvalue < 1 - P_VALUE


def test_multinomial_draws_are_independent():
    """Pairs of consecutive draws against the product law."""
    weights = torch.tensor([1.0, 2.0, 3.0])
    drawn = rx.resample(weights, 200_000, "multinomial", seed=11)
    pairs = torch.bincount(drawn[::2] * 3 + drawn[1::2], minlength=9).cpu().numpy()
    p = weights.double().cpu().numpy() / 6
    assert chisquare(pairs, 100_000 * np.outer(p, p).flatten()).pvalue > P_VALUE


@given(
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=40).filter(any),
    st.integers(1, 200),
    st.integers(0, 2**64 - 1),
)
def test_counts_are_rounded_expectations(weights, num, seed):
    """Systematic: num p_i rounded up or down. Residual: at least rounded down. Exactly, from the float weights."""
    exact = [Fraction(w) for w in weights]
    total = sum(exact)
    tensor = torch.tensor(weights, dtype=torch.float64)
    systematic = torch.bincount(rx.resample(tensor, num, seed=seed), minlength=len(weights)).tolist()
    residual = torch.bincount(rx.resample(tensor, num, "residual", seed=seed), minlength=len(weights)).tolist()
    assert sum(systematic) == sum(residual) == num
    slack = Fraction(num * len(weights), 2**49)  # the unit of the masses
    for w, s, r in zip(exact, systematic, residual, strict=True):
        expected = num * w / total
        assert math.floor(expected - slack) <= s <= math.ceil(expected + slack)
        assert r >= math.floor(expected - slack)
        assert w > 0 or s == r == 0


@pytest.mark.parametrize("n", [5, 4096, 100_003])
def test_equal_weights_are_drawn_once_each(n):
    for value in (1.0, 0.1, 3e-39):
        for seed in range(5):
            drawn = rx.resample(torch.full((n,), value), n, seed=seed)
            assert torch.equal(drawn, torch.arange(n))


@pytest.mark.parametrize("method", METHODS)
def test_thirty_orders_of_magnitude(method):
    """A million weights of 1e-9 beside one of 1: a float32 running sum loses them, one draw in 1001 is theirs."""
    weights = torch.full((1_000_001,), 1e-9)
    weights[300_000] = 1.0
    small = 1e6 * float(weights[0])
    p = small / (1 + small)
    drawn = rx.resample(weights, 2_000_000, method, seed=2)
    others = (drawn != 300_000).sum().item()
    spread = math.sqrt(2e6 * p * (1 - p)) if method == "multinomial" else math.sqrt(2e6 * p)
    assert abs(others - 2e6 * p) < (1.01 if method == "systematic" else 4 * spread)
    # 1e-15 ... 1e15: each decade has the share that exact arithmetic gives it.
    wide = sample_weights("decades", 300_000)
    drawn = rx.resample(wide, 1_000_000, method, seed=3)
    exponents = wide.log10().floor().long() + 16
    expected = torch.zeros(33, dtype=torch.float64).index_add_(0, exponents, wide / math.fsum(wide.tolist()))
    counts = torch.bincount(exponents[drawn], minlength=33)
    expected *= 1_000_000
    for count, mean in zip(counts.tolist(), expected.tolist(), strict=True):
        assert abs(count - mean) < 4 * math.sqrt(mean) + 1.01


def test_masses_bias_nothing():
    """The integers behind the draws, which the tests above show to be the op's own, against exact sums."""
    weights = sample_weights("decades", 9000)
    boundaries = reference.cumulative(weights.tolist())
    exact = [Fraction(w) for w in weights.tolist()]
    total, running = sum(exact), Fraction(0)
    for boundary, w in zip(boundaries, exact, strict=True):
        running += w
        assert abs(Fraction(boundary, boundaries[-1]) - running / total) < Fraction(1, 2**50)


@pytest.mark.parametrize("method", METHODS)
def test_log_weights_far_from_zero(method):
    weights = torch.randn(5000, dtype=torch.float64)
    here = rx.resample(weights, 3000, method, seed=4, log=True)
    for shift in (-1e4, 1e4, 1e5):
        assert torch.equal(rx.resample(weights + shift, 3000, method, seed=4, log=True), here)
    weights[:2500] = -math.inf
    assert rx.resample(weights, 3000, method, seed=4, log=True).min() >= 2500
    wide = torch.tensor([-1e300, 0.0, -1e308, -2000.0], dtype=torch.float64)
    assert torch.equal(rx.resample(wide, 9, method, seed=4, log=True), torch.ones(9, dtype=torch.int64))


@pytest.mark.parametrize("method", METHODS)
def test_thread_count_does_not_matter(method, threads):
    weights = torch.rand(400_003) ** 6
    log_weights = weights.log()
    threads(1)
    one = [rx.resample(weights, 300_001, method, seed=5), rx.resample(log_weights, 1000, method, seed=5, log=True)]
    rows = rx.resample(weights[:400_000].view(40, 10_000), 5000, method, seed=5)
    threads(2)
    two = [rx.resample(weights, 300_001, method, seed=5), rx.resample(log_weights, 1000, method, seed=5, log=True)]
    assert all(map(torch.equal, one, two))
    assert torch.equal(rows, rx.resample(weights[:400_000].view(40, 10_000), 5000, method, seed=5))


@pytest.mark.parametrize("method", METHODS)
def test_rows(method):
    weights = torch.rand(2, 3, 50)
    seeds = torch.tensor([[1, 2, 3], [4, 5, 2**62]])
    drawn = rx.resample(weights, 20, method, seed=seeds)
    assert drawn.shape == (2, 3, 20)
    for a in range(2):
        for b in range(3):
            alone = rx.resample(weights[a, b], 20, method, seed=int(seeds[a, b]))
            assert torch.equal(drawn[a, b], alone)
    shared = rx.resample(weights, 20, method, seed=7)
    assert torch.equal(shared[0, 0], rx.resample(weights[0, 0], 20, method, seed=7))
    for r, row in enumerate(weights.view(6, 50)):
        expected = reference.resample(reference.cumulative(row.tolist()), 20, method, 7, row=r)
        assert shared.view(6, 20)[r].tolist() == expected
    by_vmap = torch.vmap(lambda w: rx.resample(w, 20, method, seed=7))(weights)
    assert torch.equal(by_vmap[1], rx.resample(weights[1], 20, method, seed=7))


@pytest.mark.parametrize("method", METHODS)
def test_layouts(method):
    weights = torch.rand(3000)
    expected = rx.resample(weights, 777, method, seed=6)
    spread = torch.zeros(3000, 2)
    spread[:, 1] = weights
    assert torch.equal(rx.resample(spread[:, 1], 777, method, seed=6), expected)
    padded = torch.cat([torch.zeros(1), weights])[1:]  # 4 bytes off alignment
    assert torch.equal(rx.resample(padded, 777, method, seed=6), expected)
    assert torch.equal(rx.resample(weights.requires_grad_(), 777, method, seed=6), expected)


def test_multinomial_continues_at_an_offset():
    weights = torch.rand(100)
    whole = rx.resample(weights, 1000, "multinomial", seed=1)
    parts = [rx.resample(weights, k, "multinomial", seed=1, offset=o) for k, o in ((333, 0), (667, 333))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("method", METHODS)
def test_edges(method):
    one = torch.tensor([0.25])
    assert rx.resample(one, 5, method, seed=0).tolist() == [0] * 5
    assert rx.resample(torch.rand(10), 0, method, seed=0).shape == (0,)
    huge = torch.rand(10_000, dtype=torch.float64)
    huge[5000] = 1e300
    assert torch.equal(rx.resample(huge, 50_000, method, seed=0), torch.full((50_000,), 5000))
    top = torch.full((3,), torch.finfo(torch.float64).max, dtype=torch.float64)
    counts = torch.bincount(rx.resample(top, 3000, method, seed=0), minlength=3)
    assert counts.sum() == 3000 and (counts - 1000).abs().max() < 120
    subnormal = torch.tensor([5e-324, 1e-323, 0.0, 5e-324], dtype=torch.float64)
    counts = torch.bincount(rx.resample(subnormal, 4000, method, seed=0), minlength=4)
    assert counts[2] == 0 and (counts - torch.tensor([1000, 2000, 0, 1000])).abs().max() < 150
    assert rx.resample(torch.tensor([-0.0, 1.0]), 3, method, seed=0).tolist() == [1, 1, 1]


def test_seeds():
    weights = torch.rand(1000)
    torch.manual_seed(3)
    first = rx.resample(weights, 100)
    second = rx.resample(weights, 100)
    torch.manual_seed(3)
    assert torch.equal(rx.resample(weights, 100), first)
    assert not torch.equal(first, second)
    by_generator = [rx.resample(weights, 100, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*by_generator)
    assert torch.equal(rx.resample(weights, 100, seed=-1), rx.resample(weights, 100, seed=2**64 - 1))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"weights": [1.0]}, TypeError, "weights must be a torch.Tensor, got list"),
        ({"weights": torch.ones(3, dtype=torch.int64)}, TypeError, "got torch.int64"),
        ({"weights": torch.ones(0)}, ValueError, "must not be empty"),
        ({"weights": torch.tensor(1.0)}, ValueError, "at least one dimension"),
        ({"num": -1}, ValueError, "num must be at least 0, got -1"),
        ({"num": 2.0}, TypeError, "num must be an int, got float"),
        ({"num": True}, TypeError, "num must be an int, got bool"),
        ({"method": "alias"}, ValueError, "method must be one of multinomial"),
        ({"seed": 2**64}, ValueError, "seed must be between"),
        ({"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor, got float"),
        ({"seed": torch.ones(2, dtype=torch.int64)}, ValueError, "seed must hold one value"),
        ({"seed": torch.ones(1)}, TypeError, "got torch.float32"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "give seed or generator"),
        ({"offset": -1}, ValueError, "offset must be at least 0"),
    ],
)
def test_errors(arguments, error, text):
    arguments = on_device({"weights": torch.ones(3), "num": 2, **arguments})
    with pytest.raises(error) as caught:
        rx.resample(**arguments)
    message = str(caught.value)
    assert message.startswith("resample: ") and text in message and "\n" not in message


@pytest.mark.sanitized
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("at", "bad", "log", "text"),
    [
        (slice(None), 0.0, False, "weights must not be all zero"),
        (3, -1e-30, False, "weights must hold no NaN or +inf and nothing negative"),
        (4999, math.nan, False, "weights must hold no NaN or +inf and nothing negative"),
        (0, math.inf, False, "weights must hold no NaN or +inf and nothing negative"),
        (17, math.inf, True, "log-weights must hold no NaN or +inf"),
        (slice(None), -math.inf, True, "log-weights must not be all -inf"),
    ],
)
def test_bad_data(at, bad, log, text, method, kernels):
    """An error on the CPU; on CUDA, where it would wait for the device, that row draws its first index."""
    weights = torch.rand(3, 5000, dtype=torch.float64)
    good = weights.clone()
    weights[1, at] = bad
    if kernels == "cpu":
        with pytest.raises(ValueError) as caught:
            rx.resample(weights, 70, method, seed=3, log=log)
        assert str(caught.value) == f"resample: {text} (row 1)"
        return
    drawn = rx.resample(weights, 70, method, seed=3, log=log)
    assert (drawn[1] == 0).all()
    # A row's numbers do not depend on its neighbours.
    want = rx.resample(good, 70, method, seed=3, log=log)
    assert torch.equal(drawn[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 5)])
def test_registrations(shape, log):
    weights = torch.rand(shape)
    for method in range(4):
        arguments = (weights, 6, torch.tensor(3), 1, method, log)
        torch.library.opcheck(torch.ops.refine_ext.resample.default, arguments)


def test_compiles():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def refine(samples, log_ratio, seed):
        return samples[rx.resample(log_ratio, 20, seed=seed, log=True)], rx.resample(log_ratio.exp(), 5)

    samples, log_ratio = torch.rand(50, 2), torch.randn(50)
    chosen, _ = refine(samples, log_ratio, 5)
    assert torch.equal(chosen, samples[rx.resample(log_ratio, 20, seed=5, log=True)])


def test_compiles_for_any_size():
    """One graph for all numbers of weights and draws."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda w, more: rx.resample(w, 2 * w.shape[0] + more, seed=3), fullgraph=True, dynamic=True, backend=count
    )
    for n in (5, 9, 13):
        weights = torch.rand(n)
        assert torch.equal(compiled(weights, 2), rx.resample(weights, 2 * n + 2, seed=3))
    assert len(graphs) == 1
