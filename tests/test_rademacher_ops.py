"""Rademacher sums to the bit: against NumPy, however split and laid out; extremes; errors."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import rademacher_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rademacher_reference import LARGEST, MAGNITUDE, NORM

from refine_ext import _C
from refine_ext import _ops_rademacher as registered

ops = torch.ops.refine_ext
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SUPREMA = (LARGEST, MAGNITUDE, NORM)

# Random123's kat_vectors for philox4x32: rounds, counter, key, answer.
KNOWN_ANSWERS = (
    (7, (0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        7,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
    (10, (0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        10,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def values(n, m, dtype=torch.float32, *, heavy=False):
    x = torch.randn(n, m, dtype=torch.float64)
    if heavy:  # a few values far beyond the others: fewer bits are left for these
        x = x * torch.exp(2 * torch.randn(n, m, dtype=torch.float64))
    return x.to(dtype)


def suprema(outputs, draws, supremum=MAGNITUDE, *, first_draw=0, seed=0, digits=3):
    return ops.rademacher_suprema(outputs, draws, first_draw, seed, supremum, digits)


def assert_bits(got, want, what=""):
    for name, a, b in zip(("suprema", "index", "largest"), got, want, strict=True):
        np.testing.assert_array_equal(a.cpu().numpy(), np.asarray(b), err_msg=f"{name} {what}")


def assert_same_bits(got, want):
    assert_bits(got, [x.cpu().numpy() for x in want])


@pytest.mark.parametrize(("rounds", "counter", "key", "answer"), KNOWN_ANSWERS)
def test_reference_knows_philox(rounds, counter, key, answer):
    assert tuple(int(w) for w in reference.philox(counter, key, rounds)) == answer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signs_are_philox_bits(dtype, device):
    like = torch.empty(0, dtype=dtype)
    for n, first_row, first_draw, seed in (
        (1, 0, 0, 0),
        (63, 0, 2**32 - 2, 5),
        (129, 1024, 2**40, -1),
        (3000, 2**33, 7, 2**63 - 1),
    ):
        got = ops.multipliers(like, n, 3, first_row, first_draw, seed, False)
        assert got.dtype == dtype and got.shape == (3, n)
        want = reference.signs(n, 3, first_draw, seed, first_row)
        np.testing.assert_array_equal(got.double().cpu().numpy(), want)


def test_signs_of_a_block_by_hand(device):
    """Draw 3 of seed 2^32 + 9, samples 256 to 383: block 2, whose words the scalar Philox gives."""
    words = _C.philox((2, 0, 3, reference.SIGN), (9, 1))
    bits = [words[i // 32] >> i % 32 & 1 for i in range(128)]
    got = ops.multipliers(torch.empty(0), 384, 1, 0, 3, 2**32 + 9, False)[0, 256:]
    assert got.tolist() == [2.0 * bit - 1.0 for bit in bits]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normals(dtype, device):
    n = 1027
    got = ops.multipliers(torch.empty(0, dtype=dtype), n, 3, 4096, 2**32 - 1, 11, True).double().cpu().numpy()
    want = reference.normals(n, 3, 2**32 - 1, 11, 4096)
    # The kernel's own error (csrc/math/normal.h), then one rounding to the storage type.
    own = 4e-15 if dtype == torch.float64 else 1.2e-6
    rounding = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}.get(dtype, 0.0)
    assert (np.abs(got - want) <= own + rounding * np.abs(want) + 2.0**-24 * (rounding > 0)).all()


@pytest.mark.parametrize("supremum", SUPREMA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits(dtype, supremum, device):
    for n, m, draws in ((1, 1, 3), (41, 5, 9), (129, 33, 20), (300, 17, 60), (1025, 18, 7), (2100, 16, 3)):
        x = values(n, m, dtype, heavy=n % 2 == 1)
        want = reference.suprema(x, reference.signs(n, draws, 2**32 - 3, 77), supremum)
        assert_bits(suprema(x, draws, supremum, first_draw=2**32 - 3, seed=77), want, (n, m, draws))


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_bits_of_fewer_digits(digits, device):
    for n, m in ((100, 7), (600, 4), (1500, 9)):
        x = values(n, m, heavy=True)
        sign = reference.signs(n, 12, 0, 3)
        assert_bits(suprema(x, 12, seed=3, digits=digits), reference.suprema(x, sign, MAGNITUDE, digits), n)


@given(n=st.integers(1, 1400), m=st.integers(1, 40), draws=st.integers(1, 150), supremum=st.sampled_from(SUPREMA))
@settings(max_examples=25)
def test_bits_of_any_shape(n, m, draws, supremum):
    x = values(n, m, heavy=True)
    assert_bits(suprema(x, draws, supremum, seed=n), reference.suprema(x, reference.signs(n, draws, 0, n), supremum))


# ---- Screening: sums to 16 bits decide which columns are summed exactly


@pytest.mark.parametrize("supremum", [LARGEST, MAGNITUDE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_screened_bits(dtype, supremum):
    n, m, draws = 1300, 97, 400
    sign = reference.signs(n, draws, 5, 1)
    for heavy in (False, True):
        x = values(n, m, dtype, heavy=heavy)
        x[:, 50] = x[:, 7]  # ties go to the first
        assert_bits(suprema(x, draws, supremum, first_draw=5, seed=1), reference.suprema(x, sign, supremum), heavy)


def test_screening_does_not_help():
    """Columns that differ little, or not at all: any may hold the supremum."""
    n, m, draws = 1100, 80, 390
    sign = reference.signs(n, draws, 0, 4)
    common = values(n, 1)
    for spread in (0.0, 1e-7, 1e-4, 1e-2):
        x = common + spread * values(n, m)
        for supremum in (LARGEST, MAGNITUDE):
            want = reference.suprema(x, sign, supremum)
            assert_bits(suprema(x, draws, supremum, seed=4), want, (spread, supremum))


def test_screening_of_extremes():
    n, m, draws = 500, 70, 400
    sign = reference.signs(n, draws, 0, 4)
    for scale in (1e-44, 1e-36, 1e-30, 1e30, 2e37):
        x = values(n, m) * scale
        assert_bits(suprema(x, draws, seed=4), reference.suprema(x, sign, MAGNITUDE), scale)
    x = torch.zeros(n, m)
    assert_bits(suprema(x, draws, seed=4), reference.suprema(x, sign, MAGNITUDE), "zeros")
    x = -values(n, m).abs()
    x[:, 1:] = 0.0  # the largest sum of a draw may be that of a column of zeros
    assert_bits(suprema(x, draws, LARGEST, seed=4), reference.suprema(x, sign, LARGEST), "one column")
    for bad in (math.nan, math.inf):
        x = values(n, m)
        x[3, 66] = bad
        got = suprema(x, draws, seed=4)
        assert got[0].isnan().all() and (got[1] == 66).all()
        np.testing.assert_array_equal(got[2].numpy(), reference.suprema(x, sign, MAGNITUDE)[2])


# ---- Every way to split them


def test_threads(threads):
    cases = [(values(700, 300), 450), (values(200, 5), 3000), (values(1100, 40, torch.float64), 130)]
    for x, draws in cases:
        for supremum in SUPREMA:
            results = []
            for count in (1, 2, 5):
                threads(count)
                results.append(suprema(x, draws, supremum))
            for other in results[1:]:
                assert_same_bits(other, results[0])
    x = values(3000, 11)
    index = torch.randint(-11, 11, (64,))
    parts = []
    for count in (1, 3):
        threads(count)
        sums = torch.zeros(64, 11, dtype=torch.float64)
        ops.rademacher_sums(sums, x, 0, 0, 0)
        parts.append((sums, ops.rademacher_backward(torch.rand(64, dtype=torch.float64), index, x, 0, 0).shape))
        parts[-1] += (ops.multipliers(x, 3000, 64, 0, 0, 0, False),)
    assert torch.equal(parts[0][0], parts[1][0]) and torch.equal(parts[0][2], parts[1][2])


@pytest.mark.parametrize("supremum", SUPREMA)
def test_draws_in_parts(supremum, device):
    x = values(150, 70)
    whole = suprema(x, 430, supremum, first_draw=9, seed=2)
    for at in (1, 64, 400):
        parts = [
            suprema(x, at, supremum, first_draw=9, seed=2),
            suprema(x, 430 - at, supremum, first_draw=9 + at, seed=2),
        ]
        for i in range(2):
            assert torch.equal(torch.cat([parts[0][i], parts[1][i]]), whole[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_parts(dtype, device):
    """Streams of row blocks have the bits of the fused op."""
    x = values(2600, 19, dtype, heavy=True)
    draws = 21
    whole = suprema(x, draws, first_draw=3, seed=8)
    for at in ((1024,), (2048,), (1024, 2048)):
        sums = torch.zeros(draws, 19, dtype=torch.float64)
        for first, last in itertools.pairwise((0, *at, 2600)):
            ops.rademacher_sums(sums, x[first:last], first, 3, 8)
        assert torch.equal(sums.abs().amax(1) / 2600, whole[0])
    want = reference.add_sums(np.zeros((draws, 19)), x, reference.signs(2600, draws, 3, 8))
    np.testing.assert_array_equal(sums.cpu().numpy(), want)


def test_sums_are_added(device):
    x = values(50, 4)
    sums = torch.ones(6, 4, dtype=torch.float64)
    ops.rademacher_sums(sums, x, 0, 0, 1)
    want = reference.add_sums(np.ones((6, 4)), x, reference.signs(50, 6, 0, 1))
    np.testing.assert_array_equal(sums.cpu().numpy(), want)


def test_columns_in_any_order(device):
    x = values(200, 90)
    order = torch.randperm(90)
    got, want = suprema(x[:, order], 400), suprema(x, 400)
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2][order])
    column = torch.where(got[1] < 0, -1 - order[-1 - got[1]], order[got[1]])
    assert torch.equal(column, want[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype, device):
    x = values(140, 21, dtype)
    want = suprema(x, 50)
    wide = torch.zeros(140, 64, dtype=dtype)
    wide[:, 3:24] = x
    rows = torch.zeros(280, 21, dtype=dtype)
    rows[::2] = x
    shifted = torch.zeros(140 * 21 + 1, dtype=dtype)
    shifted[1:] = x.flatten()
    for other in (wide[:, 3:24], rows[::2], x.T.contiguous().T, shifted[1:].view(140, 21)):
        assert_same_bits(suprema(other, 50), want)
    row = values(1, 21, dtype).expand(140, 21)
    assert_same_bits(suprema(row, 50), suprema(row.contiguous(), 50))


PROBE = """
import hashlib, torch, refine_ext
ops = torch.ops.refine_ext
g = torch.Generator().manual_seed(1)
digest = hashlib.sha256()
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    for n, m, draws in ((1100, 70, 400), (45, 3, 20), (1500, 33, 200)):
        x = torch.randn(n, m, generator=g).to(dtype)
        for supremum in range(3):
            for t in ops.rademacher_suprema(x, draws, 2**32 - 9, 5, supremum, 3):
                digest.update(t.numpy().tobytes())
        index = torch.randint(-m, m, (draws,), generator=g)
        grad = torch.randn(draws, generator=g, dtype=torch.float64)
        digest.update(ops.rademacher_backward(grad, index, x, 3, 5).double().numpy().tobytes())
        digest.update(ops.multipliers(x, n, 9, 1024, 3, 5, False).double().numpy().tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_has_the_same_bits():
    digests = {}
    for level in _C.build_info()["simd_compiled"]:
        environment = dict(os.environ, REFINE_EXT_SIMD=level)
        done = subprocess.run(
            [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True
        )
        digests[level] = done.stdout.strip()
    assert len(set(digests.values())) == 1, digests


# ---- What the numbers are


@pytest.mark.kernels("cpu", "cuda")  # thousands of draws, which are the same in the emulation, bit for bit
@pytest.mark.parametrize("supremum", SUPREMA)
def test_all_signs(supremum, device):
    """The mean over all 2^n signs is what the draws estimate, within five of their standard errors."""
    for n, m in ((1, 1), (3, 4), (9, 2), (12, 30)):
        x = values(n, m, torch.float64)
        every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
        sums = every @ x
        each = (
            sums.amax(1) if supremum == LARGEST else sums.abs().amax(1) if supremum == MAGNITUDE else sums.norm(dim=1)
        )
        drawn = suprema(x, 1500, supremum, seed=n)[0]
        error = drawn.std() / math.sqrt(len(drawn))
        assert abs(drawn.mean() - each.mean() / n) <= 5 * error + 1e-15, (n, m)


def test_error_against_float64(device):
    """At most 1e-6 of the supremum in float32; in float64, n roundings of the reference's own sums.

    Each value is off by at most 2^-(bits + 1) of 2 max|x| in a block, n independent such errors add up to
    sqrt(n / 3) of that, 1e-7 of a supremum of about 3 sqrt(n) standard deviations with 21 bits; and twice that for
    the worst of the draws.
    """
    for n, m, draws in ((4000, 70, 400), (1000, 5, 200)):
        for dtype, limit in ((torch.float32, 1e-6), (torch.float64, n * 2.0**-53)):
            x = values(n, m, dtype)
            sign = ops.multipliers(x.double(), n, draws, 0, 0, 6, False)
            want = (sign @ x.double()).abs().amax(1) / n
            error = ((suprema(x, draws, seed=6)[0] - want) / want).abs().max()
            assert error <= limit, (n, dtype, float(error))


def test_integers_are_exact(device):
    """Values of few bits have exact sums."""
    x = torch.randint(-7, 8, (3000, 30)).to(torch.float16)
    sign = ops.multipliers(x.double(), 3000, 40, 0, 0, 0, False)
    assert torch.equal(suprema(x, 40)[0], (sign @ x.double()).abs().amax(1) / 3000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales(dtype, device):
    """A power of two only scales, down to subnormal numbers and up to the largest."""
    finfo = torch.finfo(dtype)
    x = values(40, 9, torch.float64).clamp(-1.9, 1.9)
    x[0] = 1.0
    for scale in (finfo.max / 2, finfo.tiny, finfo.smallest_normal * 2.0**-5):
        y = (x.to(dtype).double() * 2.0 ** math.floor(math.log2(scale))).to(dtype)
        assert_bits(suprema(y, 33), reference.suprema(y, reference.signs(40, 33, 0, 0), MAGNITUDE), scale)


@pytest.mark.parametrize("supremum", SUPREMA)
def test_not_finite(supremum, device):
    for bad in (math.nan, math.inf, -math.inf):
        x = values(30, 20)
        x[11, 4] = x[12, 17] = bad
        value, index, largest = suprema(x, 12, supremum)
        assert value.isnan().all()
        assert (index == (-1 if supremum == NORM else 4)).all()
        assert (largest.isfinite() == torch.tensor([j not in (4, 17) for j in range(20)])).all()
        assert largest[4].isnan() == math.isnan(bad)


def test_zeros_and_ties(device):
    value, index, largest = suprema(torch.zeros(20, 3), 5)
    assert (value == 0).all() and (index == 0).all() and (largest == 0).all()
    x = values(20, 1).expand(20, 6)
    value, index, _ = suprema(x, 40)
    assert ((index == 0) | (index == -1)).all()  # the first column, by either sign
    _, index, _ = suprema(torch.cat([x, -x], 1), 40, LARGEST)
    assert ((index == 0) | (index == 6)).all()


# ---- What is refused


def test_names_of_suprema():
    assert registered.SUPREMA == ("largest", "magnitude", "norm")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: suprema(x[0], 3), "outputs must be .n, m., got shape"),
        (lambda x: suprema(x[:0], 3), "outputs must not be empty"),
        (lambda x: suprema(x, 0), "draws must be between 1 and"),
        (lambda x: suprema(x, 3, first_draw=-1), "first_draw must be between 0 and"),
        (lambda x: suprema(x, 3, 3), "unknown supremum code 3"),
        (lambda x: suprema(x, 3, digits=4), "precision must be 1, 2 or 3, got 4"),
        (lambda x: suprema(x.int(), 3), "outputs"),
        (lambda x: ops.rademacher_sums(torch.zeros(3, 4), x, 0, 0, 0), "sums must be a contiguous float64 tensor"),
        (lambda x: ops.rademacher_sums(torch.zeros(3, 4).double(), x, 7, 0, 0), "first_row must be a multiple of 1024"),
        (lambda x: ops.multipliers(x, 3, 2, 2**34, 0, 0, True), "at most 2.34"),
        (lambda x: ops.multipliers(x, -1, 2, 0, 0, 0, False), "n must not be negative"),
    ],
)
def test_errors(call, message, device):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        call(torch.zeros(5, 4))
