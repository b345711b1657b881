"""Normal numbers of Philox words: the definition, extremes, the laws they follow, and who they do not depend on."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import guidance_reference as reference
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import refine_ext as rx
from refine_ext import _C

HERE = Path(__file__).parent
# Of a number up to 6.8: the elementary functions' few roundings of r (2^-24) and of the angle. Half formats round that.
ERROR = {torch.float64: 4e-15, torch.float32: 1.2e-6}
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_are_normals(got: torch.Tensor, want: np.ndarray) -> None:
    error = np.abs(got.cpu().double().numpy() - want)
    limit = ERROR.get(got.dtype, ERROR[torch.float32]) + ROUNDING.get(got.dtype, 0.0) * np.abs(want)
    assert (error <= limit).all(), error.max()


def test_known_answers():
    """Seed 0, step 0, sample 0: computed with mpmath in 50 digits from Random123's words."""
    import mpmath

    z = rx.philox_normal((1, 4), 0, dtype=torch.float64)[0].tolist()
    w = [mpmath.mpf(int(v)) for v in reference.philox([np.array(c) for c in (0, 0, 0, reference.NOISE)], 0, 0)]
    want = []
    for radius, angle in ((w[0], w[1]), (w[2], w[3])):
        r = mpmath.sqrt(-2 * mpmath.log((radius + 0.5) / 2**32))
        want += [float(r * f(2 * mpmath.pi * angle / 2**32)) for f in (mpmath.cos, mpmath.sin)]
    np.testing.assert_allclose(z, want, rtol=0, atol=ERROR[torch.float64])
    # The reference's Philox itself, by the generator's known answers.
    words = reference.philox([np.array(0)] * 4, 0, 0)
    assert [int(v) for v in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(v) for v in reference.philox([np.array(2**32 - 1)] * 4, 2**32 - 1, 2**32 - 1)] == list(
        _C.philox((2**32 - 1,) * 4, (2**32 - 1,) * 2)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 31, 63, 64, 65, 127, 130, 257, 8191, 8192, 8193, 20_001])
def test_definition(n, dtype, device):
    shape = (3, n) if n < 1000 else (2, n)
    assert_are_normals(rx.philox_normal(shape, 2**40 + 7, step=3, dtype=dtype), reference.normal(shape, 2**40 + 7, 3))


@given(seed=st.integers(-(2**63), 2**64 - 1), step=st.integers(0, 2**32 - 1), n=st.integers(1, 90))
def test_any_seed_and_step(seed, step, n, device):
    got = rx.philox_normal((2, n), seed, step=step, dtype=torch.float64)
    assert_are_normals(got, reference.normal((2, n), seed, step))


def test_seeds_beyond_an_int64_are_the_negative_ones(device):
    assert torch.equal(rx.philox_normal((2, 9), 2**64 - 5), rx.philox_normal((2, 9), -5))


def test_a_sample_does_not_depend_on_its_batch(device):
    """With a seed each, on nothing beside it; with one seed, on its place."""
    seeds = torch.tensor([5, 6, -7, 5])
    z = rx.philox_normal((4, 3, 50), seeds, step=2)
    assert torch.equal(z[0], z[3]) and not torch.equal(z[0], z[1])
    for b, seed in enumerate(seeds.tolist()):
        assert torch.equal(rx.philox_normal((1, 3, 50), seed, step=2)[0], z[b])
        assert torch.equal(rx.philox_normal((1, 3, 50), seeds[b : b + 1], step=2)[0], z[b])
    whole = rx.philox_normal((9, 77), 11)
    for size in (1, 4, 8):
        assert torch.equal(rx.philox_normal((size, 77), 11), whole[:size])
    # A longer sample begins as a shorter one does.
    assert torch.equal(rx.philox_normal((9, 20_000), 11)[:, :77], whole)


def test_dtypes_are_roundings_of_one_set_of_numbers(device):
    z = {dtype: rx.philox_normal((2, 5000), 4, dtype=dtype) for dtype in (*ERROR, *ROUNDING)}
    assert (z[torch.float32].double() - z[torch.float64]).abs().max() <= ERROR[torch.float32]
    for dtype in ROUNDING:
        assert torch.equal(z[dtype], z[torch.float32].to(dtype))


@pytest.mark.kernels("cpu")
def test_threads_make_the_same(threads, device):
    made = []
    for count in (1, 2, 5):
        threads(count)
        made.append(rx.philox_normal((3, 70_001), 8))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


PROBE = """
import torch, refine_ext as rx, sys
for dtype in (torch.float32, torch.float64):
    sys.stdout.buffer.write(rx.philox_normal((2, 1003), 3, step=4, dtype=dtype).double().numpy().tobytes())
"""


def test_every_instruction_set_makes_the_same():
    """To a rounding: fused multiply-adds are not everywhere."""
    want = reference.normal((2, 1003), 3, 4)
    for level in _C.build_info()["simd_compiled"]:
        environment = dict(os.environ, REFINE_EXT_SIMD=level)
        done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, check=True)
        single, double = np.frombuffer(done.stdout).reshape(2, 2, 1003)
        assert np.abs(single - want).max() <= ERROR[torch.float32], level
        assert np.abs(double - want).max() <= ERROR[torch.float64], level


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """normal_pair of given words: the vectors of the instruction set that g++ takes by default, and a scalar double."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    target = tmp_path_factory.mktemp("normal") / "normal_arithmetic.so"
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-ffp-contract=fast", "-DREFINE_EXT_ISA=isa_test"]
    subprocess.run([*command, str(HERE / "normal_arithmetic.cpp"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def test_every_word(vectors):
    """Both ends, every octant's edge, where the logarithm changes its form, and many between."""
    edges = [0, 1, 2, 3, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]
    edges += [k * 2**29 + d for k in range(1, 8) for d in (-1, 0, 1)]
    edges += [2**k + d for k in range(2, 32) for d in (-1, 0)]
    some = np.random.default_rng(0).integers(0, 2**32, 20_000).tolist()
    radius = np.array([w for w in edges for _ in edges] + some, dtype=np.uint32)
    angle = np.array(edges * len(edges) + some[::-1], dtype=np.uint32)
    radius, angle = (np.concatenate([w, w[: -w.size % 64]]) for w in (radius, angle))
    want = np.stack(reference.box_muller(radius, angle))
    largest = np.hypot(*want)
    for name, dtype, allowed in (
        ("single", np.float32, 2.5e-7),
        ("wide", np.float64, 1e-15),
        ("scalar", np.float64, 1e-15),
    ):
        got = np.empty((2, radius.size), dtype=dtype)
        getattr(vectors, name)(
            *(ctypes.c_void_p(a.ctypes.data) for a in (radius, angle, got[0], got[1])), ctypes.c_long(radius.size)
        )
        # A few roundings of r, whatever its size: r is 1.5e-5 at the last word, 6.66 at the first.
        assert (np.abs(got - want) <= allowed * largest).all(), (name, (np.abs(got - want) / largest).max())
    assert largest.max() < 6.77 and largest.min() > 1e-5


BINS, WIDTH = 4096, 256  # from -8 to 8; a power of two, by which a float32 is scaled exactly
EDGES = np.arange(-BINS // 2, BINS // 2 + 1) / WIDTH


def binned(z: torch.Tensor) -> np.ndarray:
    return torch.bincount(z.flatten().mul(WIDTH).floor_().int() + BINS // 2, minlength=BINS).numpy()


def assert_follows_the_normal_law(counts: np.ndarray) -> None:
    """Kolmogorov-Smirnov at the edges, chi-square where 20 or more are expected; p below 1e-6 for each."""
    n = counts.sum()
    below = stats.norm.cdf(EDGES)
    assert np.abs(np.cumsum(counts) / n - below[1:]).max() < 2.7 / math.sqrt(n)
    expected = n * np.where(EDGES[:-1] < 0, np.diff(below), -np.diff(stats.norm.sf(EDGES)))
    kept = expected >= 20
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert stats.chi2.sf(statistic, kept.sum()) > 1e-6


def test_ten_million_are_standard_normal():
    """The law, moments, and no dependence on neighbours, other samples and other steps."""
    n = 10_000_000
    z = rx.philox_normal((10, n // 10), 123)
    assert_follows_the_normal_law(binned(z))
    z = z.double()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((z**power).mean()) - mean) < 5 * math.sqrt(variance / n), power
    for lag in (1, 2, 3, 4, 8, 64):
        products = z[:, lag:] * z[:, :-lag]
        assert abs(float(products.mean())) < 5 / math.sqrt(n), lag
        assert abs(float(products.square().mean()) - 1) < 5 * math.sqrt(8 / n), lag
    assert (torch.corrcoef(z) - torch.eye(10)).abs().max() < 5.5 / math.sqrt(n / 10)
    other = rx.philox_normal((10, n // 10), 123, step=1)
    assert abs(float((z * other).mean())) < 5 / math.sqrt(n)


@pytest.mark.slow
def test_a_billion_are_standard_normal():
    """The law and moments to 1e9 draws, and the tails: as many beyond 3 to 6 standard deviations as there should be."""
    n, part = 10**9, 10**7
    counts, sums = np.zeros(BINS, dtype=np.int64), np.zeros(4)
    for step in range(n // part):
        z = rx.philox_normal((1, part), 99, step=step)
        counts += binned(z)
        squares = z.double().square_()
        sums += [
            float(v) for v in (z.sum(dtype=torch.float64), squares.sum(), (squares * z).sum(), squares.square().sum())
        ]
    assert counts.sum() == n
    assert_follows_the_normal_law(counts)
    for value, mean, variance in zip(sums / n, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(value - mean) < 5 * math.sqrt(variance / n)
    for level in (3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0):
        expected = n * stats.norm.sf(level)
        for count in (counts[EDGES[:-1] >= level].sum(), counts[EDGES[1:] <= -level].sum()):
            assert stats.poisson.sf(count - 1, expected) > 1e-6 and stats.poisson.cdf(count, expected) > 1e-6, level


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: rx.philox_normal((), 1), ValueError, "size must have at least the batch dimension"),
        (lambda: rx.philox_normal((2, 2), 1, dtype=torch.int64), TypeError, "dtype must be float64, float32"),
        (lambda: rx.philox_normal((2, 2), None), TypeError, "seed must be an int or an int64 tensor, got NoneType"),
        (lambda: rx.philox_normal((2, 2), 1.5), TypeError, "seed must be an int or an int64 tensor, got float"),
        (lambda: rx.philox_normal((2, 2), True), TypeError, "seed must be an int or an int64 tensor, got bool"),
        (lambda: rx.philox_normal((2, 2), 2**64), ValueError, "seed must be between"),
        (lambda: rx.philox_normal((2, 2), torch.ones(2)), TypeError, "got torch.float32"),
        (lambda: rx.philox_normal((2, 2), torch.tensor([1, 2, 3])), ValueError, r"shape \[2\], got \[3\]"),
        (lambda: rx.philox_normal((2, 2), 1, step=-1), ValueError, "step must be between 0 and"),
        (lambda: rx.philox_normal((2, 2), 1, step=2**32), ValueError, "step must be between 0 and"),
        (lambda: rx.philox_normal((2, 2), 1, step=0.5), TypeError, "step must be an int, got float"),
    ],
)
def test_errors(call, error, text, device):
    with pytest.raises(error, match=text) as caught:
        call()
    assert str(caught.value).startswith("philox_normal: ")


def test_empty(device):
    assert rx.philox_normal((0, 5), 1).shape == (0, 5)
    assert rx.philox_normal((5, 0), 1).shape == (5, 0)
    assert rx.philox_normal((3,), 1).shape == (3,)
