"""More elements than 31 or 32 bits count, on a GPU; the same tests on a small tensor on the CPU check the tests.

References are computed on the device, in float64 and in pieces; outputs hold NaN (or -1) before they are written.
"""

from __future__ import annotations

import fcntl
import gc
import math
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import refine_ext as rx
from refine_ext import _C
from refine_ext.divergence import parse_divergence

ops = torch.ops.refine_ext
PIECE = 2**26
EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
on_gpu = partial(pytest.param, marks=pytest.mark.cuda)
sizes = pytest.mark.parametrize(
    ("device", "n"),
    [("cpu", 70_001), on_gpu("cuda", 2**31 - 1), on_gpu("cuda", 2**31), on_gpu("cuda", 2**31 + 65)],
)
dtypes = pytest.mark.parametrize("dtype", EPS, ids=str)


@pytest.fixture(autouse=True)
def _device_memory_to_itself(device):
    """One such test at a time, whatever the number of worker processes."""
    if device == "cpu":
        yield
        return
    with open(Path(tempfile.gettempdir()) / f"refine_ext_large_{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


def need(device: str, bytes_each: int, n: int) -> None:
    if device == "cpu":
        return
    free, wanted = torch.cuda.mem_get_info()[0], bytes_each * n + 8 * 8 * PIECE
    if free < wanted:
        pytest.skip(f"needs {wanted / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} GiB are free")


def pieces(*tensors: Tensor) -> Iterator[list[Tensor]]:
    for begin in range(0, tensors[0].shape[0], PIECE):
        yield [tensor[begin : begin + PIECE] for tensor in tensors]


def normal(n: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    result = torch.empty(n, dtype=dtype, device=device)
    for (piece,) in pieces(result):
        piece.copy_(torch.randn(piece.shape, device=device, generator=generator))
    return result


def poison(like: Tensor) -> Tensor:
    return torch.full_like(like, math.nan)


def poison_next(like: Tensor) -> None:
    """Leaves NaN where the allocator of a GPU puts the next tensor of this size."""
    poison(like)


def assert_near(got: Tensor, want: Tensor, rounding: float | Tensor, dtype: torch.dtype) -> None:
    """Within half a unit of the storage type, and the given absolute error of float32 arithmetic before it."""
    limit = EPS[dtype] / 2 * want.abs() + rounding
    # float16 has a smallest subnormal.
    assert bool(((got.double() - want).abs() <= limit + 2.0**-25).all())


@dtypes
@sizes
@pytest.mark.parametrize("name", ["kl", "gan"])
def test_density_ratio(name, device, n, dtype):
    need(device, 4, n)
    h = normal(n, dtype, device, 1)
    if name == "kl":
        h[-1] = 18.0 if n > 2**30 else 8.0  # of a few per cent of the mass: it is counted
    else:
        for (piece,) in pieces(h):
            piece.copy_(-0.05 - piece.abs())
    r = rx.density_ratio(h, name, out=poison(h))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for x, got in pieces(h, r.log_ratio):
        t = x.double() - r.shift
        want = t - 1 if name == "kl" else -torch.expm1(-t).log()
        sums += torch.stack([want.exp().sum(), (2 * want).exp().sum()])
        factor = 1.0 if name == "kl" else 1 + want.exp()
        assert_near(got, want, 2e-6 * (1 + want.abs() + factor), dtype)
    # The search ends at a residual of 3e-7; the sums of the kernel and of this test round in float64.
    assert abs(sums[0].item() / n - 1) < 1e-6
    assert abs(r.ess.item() / (sums[0] ** 2 / sums[1]).item() - 1) < 1e-5


@dtypes
@sizes
def test_density_ratio_backward(device, n, dtype):
    need(device, 6, n)
    log_ratio, grad = normal(n, dtype, device, 2), normal(n, dtype, device, 3)
    grad[-1] = 100.0
    grad += 1
    stats = torch.zeros(8, dtype=torch.float64, device=device)
    poison_next(grad)
    got = ops.density_ratio_backward(
        grad, torch.zeros_like(stats), log_ratio, stats, None, True, *parse_divergence("test", "kl")
    )
    masses = sum(x.double().exp().sum() for (x,) in pieces(log_ratio))
    through = -sum(g.double().sum() for (g,) in pieces(grad)) / masses
    for x, g, result in pieces(log_ratio, grad, got):
        mass = x.double().exp()
        rounding = 1e-6 * (g.double().abs() + mass * through.abs())
        assert_near(result, g.double() + mass * through, rounding, dtype)


@dtypes
@sizes
def test_bounds(device, n, dtype):
    need(device, 6, n)
    code = parse_divergence("test", "kl")
    real, fake = normal(n, dtype, device, 4), normal(n, dtype, device, 5)
    mean = sum(x.double().sum() for (x,) in pieces(real)) / n
    mass = sum(x.double().exp().sum() for (x,) in pieces(fake)) / n
    tight, stats = ops.variational_bound(real, fake, True, *code)
    assert abs(tight.item() - (mean - mass.log()).item()) < 1e-6
    dual = ops.dual_bound(real, fake, *code)
    assert abs(dual.item() - (mean + 1 - mass).item()) < 2e-6
    del real
    # An upstream gradient of n, as the mean's 1/n would leave the range of float16.
    upstream = torch.full((), float(n), device=device)
    poison_next(fake)
    got = ops.variational_bound_backward(upstream, fake, stats, True, *code)
    for x, result in pieces(fake, got):
        want = -(x.double() - mass.log()).exp()
        assert_near(result, want, 4e-6 * want.abs() * (1 + x.double().abs()), dtype)


@dtypes
@sizes
def test_elementwise(device, n, dtype):
    need(device, 6, n)
    code = parse_divergence("test", "kl")
    x, grad = normal(n, dtype, device, 6), normal(n, dtype, device, 7)
    poison_next(x)
    got = ops.dual_output(x, *code)
    for a, result in pieces(x, got):
        assert_near(result, a.double() + 1, 1e-6 * (1 + a.double().abs()), dtype)
    del got, result
    poison_next(x)
    got = ops.dual_slope(grad, x, True, *code)
    for a, g, result in pieces(x, grad, got):
        want = g.double() * a.double().exp()
        assert_near(result, want, 2e-6 * want.abs() * (1 + a.double().abs()), dtype)


@dtypes
@pytest.mark.parametrize(("device", "rows"), [("cpu", 1001), on_gpu("cuda", 2**25 + 1)])
def test_many_short_rows(device, rows, dtype):
    need(device, 6, 64 * rows)
    h = normal(64 * rows, dtype, device, 8).view(rows, 64)
    r = rx.density_ratio(h, "kl", dim=-1, out=poison(h))
    for x, got, shift in pieces(h, r.log_ratio, r.shift):
        for part, result, of_row in zip(x.split(2**20), got.split(2**20), shift.split(2**20), strict=True):
            wide = part.double()
            mean = wide.logsumexp(-1) - math.log(64)
            assert bool(((of_row - (mean - 1)).abs() < 2e-6).all())
            want = wide - mean.unsqueeze(-1)
            assert_near(result, want, 2e-6 * (2 + want.abs()), dtype)


def number(seed: int, index: int, stream: int, sequence: int = 0) -> int:
    """Number `index` of a sequence, from the words of Philox."""
    block = index >> 1
    words = _C.philox((block & 0xFFFFFFFF, block >> 32, sequence, stream), (seed, 0))
    return words[2] | words[3] << 32 if index & 1 else words[0] | words[1] << 32


@pytest.mark.parametrize("method", rx.resampling.METHODS)
@sizes
def test_resample(device, n, method):
    """From equal weights: as many ordered draws as weights take each once; others are Philox words, scaled to n."""
    need(device, 28, n)
    weights = torch.ones(n, dtype=torch.bfloat16, device=device)
    if method == "multinomial":
        offset = 2**32 - 30
        got = rx.resample(weights, 60, method, seed=9, offset=offset).tolist()
        assert got == [number(9, offset + j, 1) * n >> 64 for j in range(60)]
        return
    got = rx.resample(weights, n, method, seed=9)
    for begin in range(0, n, PIECE):
        piece = got[begin : begin + PIECE]
        assert torch.equal(piece, torch.arange(begin, begin + len(piece), device=device))


@dtypes
@sizes
def test_rejection(device, n, dtype):
    need(device, 4, n)
    log_ratio = torch.zeros(n, dtype=dtype, device=device)
    log_ratio[1::2] = -math.inf
    kept = rx.rejection(log_ratio, gamma=None, seed=3)
    assert kept.acceptance.item() * n == pytest.approx((n + 1) // 2, abs=0.25)
    assert not bool(kept.keep[1::2].any()) and bool(kept.keep[0::2].all())
    del kept
    # The last samples have the numbers that they would have alone.
    log_ratio[-1000:] = normal(1000, dtype, device, 4).abs().neg()
    keep = rx.rejection(log_ratio, gamma=None, seed=3).keep[-1000:]
    alone = rx.rejection(log_ratio[-1000:].cpu(), gamma=None, seed=3, offset=n - 1000, log_bound=0.0).keep
    assert torch.equal(keep.cpu(), alone) and 0 < alone.sum() < 1000


@sizes
def test_metropolis(device, n):
    """Equal ratios: every proposal is taken, which is a Philox word scaled to n."""
    need(device, 2, n)
    log_ratio = torch.zeros(n, dtype=torch.float16, device=device)
    got = rx.metropolis(log_ratio, 20, chains=3, seed=5)
    want = [[number(5, 2 * step, 3, chain) * n >> 64 for step in range(20)] for chain in range(3)]
    assert got.tolist() == want
