"""The float32 functions that only the CUDA kernels use, against float64, to the bounds in csrc/math/arithmetic.h.

The host takes the errors of the GPU's approximate instructions to their limit: the bounds are for the worst GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("arithmetic") / "float_arithmetic.so"
    source = Path(__file__).with_name("float_arithmetic.cpp")
    # As on the GPU and as in the emulation: with and without fused multiply-adds the bounds hold.
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-ffp-contract=off", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


def call(function, x: np.ndarray, outputs: int = 1) -> list[np.ndarray]:
    results = [np.empty_like(x) for _ in range(outputs)]
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, *results)]
    function(*pointers, ctypes.c_long(x.size))
    return results


def ulps(got: np.ndarray, want: np.ndarray) -> float:
    """The largest error in units of the last place of the wanted float32."""
    return float(np.max(np.abs(got - want) / np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)))


def test_exp_and_expm1(library):
    x = np.concatenate([np.linspace(-87.3, 88.0, 2_000_001), np.geomspace(1e-38, 1, 10_001)]).astype(np.float32)
    x = np.concatenate([x, -x[-10_001:]])
    e, em1 = call(library.exp_and_expm1, x, 2)
    wide = x.astype(np.float64)
    assert ulps(e, np.exp(wide)) <= 2
    assert ulps(em1, np.expm1(wide)) <= 2


def test_exp_and_expm1_of_special_values(library):
    x = np.array([0.0, -0.0, -88.0, -1e4, -np.inf, np.nan], dtype=np.float32)
    e, em1 = call(library.exp_and_expm1, x, 2)
    np.testing.assert_array_equal(e, np.array([1, 1, 0, 0, 0, np.nan], dtype=np.float32))
    np.testing.assert_array_equal(em1, np.array([0, 0, -1, -1, -1, np.nan], dtype=np.float32))


def test_log1p(library):
    x = np.concatenate([np.geomspace(1e-37, 1e38, 1_000_001), np.linspace(0.3, 2, 1_000_001)]).astype(np.float32)
    (y,) = call(library.log1p_of, x)
    assert ulps(y, np.log1p(x.astype(np.float64))) <= 10
    (y,) = call(library.log1p_of, np.array([0.0, np.inf, np.nan], dtype=np.float32))
    np.testing.assert_array_equal(y, np.array([0.0, np.inf, np.nan], dtype=np.float32))


def test_log(library):
    x = np.concatenate([np.geomspace(1.5e-45, 3e38, 1_000_001), np.linspace(0.4, 2.2, 1_000_001)]).astype(np.float32)
    (y,) = call(library.log_of, x)
    want = np.log(x.astype(np.float64))
    error, near = np.abs(y - want), (x >= 0.5) & (x <= 2)
    # The special unit's 2^-22 at base 2 and two of its ulps; elsewhere the roundings of two products and their sum.
    assert error[near].max() <= 2.5e-7
    assert (error - np.spacing(np.abs(want).astype(np.float32))).max() <= 4e-7
    (y,) = call(library.log_of, np.array([0.0, 1.0, np.inf, -1.0, np.nan], dtype=np.float32))
    np.testing.assert_array_equal(y, np.array([-np.inf, 0.0, np.inf, np.nan, np.nan], dtype=np.float32))


def test_squared_radius(library):
    """-2 log((w + 1/2) / 2^32) of words everywhere and at both ends, where the logarithm is largest and next to 0."""
    top = 2**32
    words = np.concatenate([np.arange(1, top, 4099), np.arange(10_000), top - 1 - np.arange(10_000)]).astype(np.uint32)
    got = np.empty(len(words), np.float32)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (words, got))
    library.squared_radius_of(*pointers, ctypes.c_long(len(words)))
    exact = words.astype(np.longdouble)
    # From one side or the other, so that nothing cancels.
    want = -2 * np.where(words >= 2**31, np.log1p(-(top - exact - 0.5) / top), np.log((exact + 0.5) / top))
    error = np.abs(got / want - 1)
    # Next to one a reciprocal, a quotient and a series; below, the instruction's 2^-22, which the host exaggerates by
    # an ulp, of a logarithm of 1/2 at least, and two roundings.
    near = words >= 0xB504F334
    assert error[near].max() < 5e-7 and error[~near].max() < 8e-7
