"""The CPU's vector log1p of [0, 1] against extended precision, for each instruction set that this machine has."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from refine_ext import _C

MARCH = {"baseline": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
LEVELS = list(MARCH)[: list(MARCH).index(_C.build_info()["simd_level"]) + 1]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module", params=LEVELS)
def library(request, tmp_path_factory):
    target = tmp_path_factory.mktemp("vectors") / "vector_arithmetic.so"
    source = Path(__file__).with_name("vector_arithmetic.cpp")
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-ffp-contract=fast", "-DREFINE_EXT_ISA=isa_test"]
    subprocess.run([*command, *MARCH[request.param], str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def log1p(library, x: np.ndarray) -> np.ndarray:
    padded = np.concatenate([x, np.zeros(-x.size % 16, x.dtype)])
    y = np.full_like(padded, np.nan)
    function = library.single if x.dtype == np.float32 else library.wide
    function(*(ctypes.c_void_p(array.ctypes.data) for array in (padded, y)), ctypes.c_long(padded.size))
    return y[: x.size]


def numbers(dtype: type) -> np.ndarray:
    """Of [0, 1]: for float32 one of every 997 there are and those next to 1; for float64 some of every size."""
    if dtype == np.float32:
        one = int(np.float32(1).view(np.uint32))
        return np.concatenate([np.arange(0, one, 997), np.arange(one - 4096, one + 1)]).astype(np.uint32).view(dtype)
    parts = np.linspace(0, 1, 200_001), np.geomspace(5e-324, 1, 100_001), 1 - np.arange(1, 4097) * 2.0**-53
    return np.concatenate(parts)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log1p_of_the_unit_interval(library, dtype):
    x = numbers(dtype)
    got, want = log1p(library, x), np.log1p(x.astype(np.longdouble))
    # Half a unit of the last difference; of what it subtracts, at most 0.44 of the result, a few roundings.
    error = np.abs(got - want) / np.spacing(want.astype(dtype))
    assert error.max() <= 1.2, (error.max(), x[error.argmax()])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ends_and_nan(library, dtype):
    least = np.finfo(dtype).smallest_subnormal
    got = log1p(library, np.array([0, least, 3 * least, 1, np.nan], dtype=dtype))
    np.testing.assert_array_equal(got[[0, 1, 2, 4]], np.array([0, least, 3 * least, np.nan], dtype=dtype))
    assert not np.signbit(got[0])
    assert abs(float(got[3]) - np.log(2)) <= np.finfo(dtype).eps / 2
