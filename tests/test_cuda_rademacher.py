"""The CUDA kernels of the Rademacher sums: every path through them has the CPU's bits.

What the ops compute is compared with references, on every device, in test_rademacher_ops.py. Here: groups of draws,
columns and rows (the emulation's limits on memory make them small), sums that come in several parts, rows that begin
anywhere, the integers' extremes, and columns that are not finite.
"""

from __future__ import annotations

import math

import emulator
import pytest
import torch
from torch import Tensor

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
LARGEST, MAGNITUDE, NORM = range(3)
cpu = torch.ops.refine_ext
everywhere = pytest.mark.parametrize(
    "where", ["cuda_on_cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sanitizer])]
)


def run(where: str, op: str, *arguments):
    """The CUDA op; its results, which are the first argument where there are none."""
    if where == "cuda":
        # Moved as they lie in memory: their strides and their place beside a pack stay.
        arguments = tuple(on_gpu(a) if isinstance(a, Tensor) else a for a in arguments)
        ops = cpu
    elif emulator.AVAILABLE:
        emulator.load_ops()
        ops = torch.ops.refine_ext_on_cpu
    else:
        pytest.skip("needs g++ on Linux")
    result = getattr(ops, op)(*arguments)
    result = arguments[0] if result is None else result
    return [x.cpu() for x in result] if isinstance(result, tuple) else result.cpu()


def on_gpu(x: Tensor) -> Tensor:
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).cuda()
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def assert_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


def check_suprema(where: str, outputs: Tensor, draws: int, supremum: int, digits: int = 3, first: int = 0) -> None:
    arguments = outputs, draws, first, 2**63 - 5, supremum, digits
    for got, want in zip(run(where, "rademacher_suprema", *arguments), cpu.rademacher_suprema(*arguments), strict=True):
        assert_bits(got, want)


def every_value(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, dtype=f64).to(dtype)


@everywhere
@pytest.mark.parametrize("dtype", [f64, f32, f16, bf16], ids=str)
@pytest.mark.sanitized
def test_suprema(where, dtype):
    """One value, less than a tile, tiles that are not full, of rows and draws too."""
    for rows, columns, draws in ((1, 1, 1), (130, 3, 2), (1030, 65, 34)):
        outputs = every_value(rows, columns, dtype)
        for supremum in (LARGEST, MAGNITUDE, NORM) if rows < 1000 or dtype == f32 else (MAGNITUDE,):
            check_suprema(where, outputs, draws, supremum, first=2**34)


@everywhere
@pytest.mark.parametrize("supremum", [pytest.param(MAGNITUDE, marks=pytest.mark.sanitized), NORM])
def test_groups(where, supremum):
    """More draws, columns and blocks of rows than fit: all three are divided."""
    check_suprema(where, every_value(2050, 130, f32), 165, supremum)


@everywhere
@pytest.mark.parametrize("dtype", [f64, f32], ids=str)
@pytest.mark.sanitized
def test_large_tiles(where, dtype, monkeypatch):
    """Of few multiprocessors, where two tiles are enough for the larger blocks of threads."""
    monkeypatch.setenv("CUDA_ON_CPU_MULTIPROCESSORS", "1")
    check_suprema(where, every_value(200, 70, dtype), 130, MAGNITUDE)


@everywhere
@pytest.mark.parametrize("digits", [1, 2])
def test_precision(where, digits):
    check_suprema(where, every_value(1500, 40, f32), 40, MAGNITUDE, digits)


@everywhere
@pytest.mark.parametrize("dtype", [f64, f32])
@pytest.mark.sanitized
def test_sums(where, dtype):
    """In parts of whole blocks as in one, whatever is there already."""
    outputs, sums = every_value(3000, 66, dtype), torch.randn(35, 66, dtype=f64)
    want = sums.clone()
    cpu.rademacher_sums(want, outputs, 1024, 7, 99)
    parts = sums.clone()
    for row in (0, 2048):
        parts = run(where, "rademacher_sums", parts, outputs[row : row + 2048], 1024 + row, 7, 99)
    assert_bits(parts, want)


@everywhere
@pytest.mark.sanitized
def test_layouts(where):
    """Rows apart, one row for all, columns that begin between two packs, a transposed matrix."""
    memory = every_value(140, 80, f32)
    for outputs in (memory[:, 1:70], memory[::3, 5:6], memory[1:2].expand(50, 80), memory.T, memory[3:, :0:7][:, :4]):
        if outputs.numel():
            check_suprema(where, outputs, 5, LARGEST)


@everywhere
def test_integers_at_their_limits(where):
    """Every sum as large as its 32 bits hold; values that round up to a power of two; float16's and float64's ends."""
    block = torch.ones(1024, 6)
    block[:, 1] = -1.0
    block[:, 2] = 1 - 2.0**-24  # rounds up, to one more than fits
    block[:, 3] = 2.0**-149
    block[:, 4] = 3.4e38
    block[0, 5], block[1:, 5] = 1.0, 2.0**-23
    for draws in (4, 40):
        check_suprema(where, block, draws, LARGEST)
    # Signs that are all alike cannot be drawn; a column that follows a draw's signs has the largest sum there is.
    signs = cpu.multipliers(block, 1024, 3, 0, 0, 2**63 - 5, False).T
    check_suprema(where, torch.cat([signs, -signs, signs * (1 - 2.0**-24)], 1), 3, LARGEST)
    check_suprema(where, signs.double() * (1 + 2.0**-52), 3, MAGNITUDE)
    check_suprema(where, signs.half() * 65504, 3, MAGNITUDE)
    tiny = torch.tensor([[5e-324, 1e-310, 1e308], [-5e-324, 2e-308, -1e308]], dtype=f64)
    check_suprema(where, tiny, 8, LARGEST)


@everywhere
@pytest.mark.parametrize("supremum", [LARGEST, MAGNITUDE, NORM])
def test_not_finite(where, supremum):
    """A column with NaN or infinity has no sum; the first of them is the index, and `largest` tells which it was."""
    outputs = every_value(1100, 70, f32)
    outputs[1050, 66], outputs[3, 68] = math.inf, math.nan
    check_suprema(where, outputs, 3, supremum)
    outputs[:] = 0.0
    check_suprema(where, outputs, 3, supremum)


@everywhere
@pytest.mark.parametrize("dtype", [f64, f32, f16, bf16], ids=str)
@pytest.mark.sanitized
def test_backward(where, dtype):
    """More draws than a block of threads takes at a time, columns of all tiles, some by many draws, either sign."""
    rows, columns, draws = 200, 40, 300
    index = torch.randint(-columns, columns, (draws,))
    index[10:150] = 33
    arguments = torch.randn(draws, dtype=f64), index, every_value(rows, columns, dtype), 2**33, 11
    assert_bits(run(where, "rademacher_backward", *arguments), cpu.rademacher_backward(*arguments))


@everywhere
@pytest.mark.parametrize("dtype", [f64, f32, f16, bf16], ids=str)
@pytest.mark.sanitized
def test_multipliers(where, dtype):
    """Rows that begin on a pack and between two; signs have the CPU's bits, normals its values."""
    like = torch.empty(0, dtype=dtype)
    for n in (1, 8, 131, 1040):
        signs = like, n, 3, 1024, 2**34 + 1, 2**63 - 1, False
        assert_bits(run(where, "multipliers", *signs), cpu.multipliers(*signs))
        normals = (*signs[:-1], True)
        # An error of either's normals (test_cuda_guidance.py), or a rounding to the storage type the other way.
        tolerance = {f64: 2e-14, f32: 2e-6, f16: 2.0**-10, bf16: 2.0**-7}[dtype]
        got, want = run(where, "multipliers", *normals).double(), cpu.multipliers(*normals).double()
        assert ((got - want).abs() <= tolerance * want.abs().clamp(min=1)).all()


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_the_order_of_blocks_does_not_matter(order, monkeypatch):
    outputs = every_value(1030, 70, f32)
    want = run("cuda_on_cpu", "rademacher_suprema", outputs, 70, 0, 1, MAGNITUDE, 3)
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    got = run("cuda_on_cpu", "rademacher_suprema", outputs, 70, 0, 1, MAGNITUDE, 3)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.cuda
def test_large_groups():
    """Beyond the limits on memory that a GPU has: several groups of columns and of rows."""
    outputs = torch.randn(20_000, 9000)
    check_suprema("cuda", outputs, 20, MAGNITUDE)
    check_suprema("cuda", outputs[:3000, :100].contiguous(), 9000, NORM)


@everywhere
@pytest.mark.parametrize("digits", [1, 2, pytest.param(3, marks=pytest.mark.sanitized)])
def test_hopper(where, monkeypatch, digits):
    """Hopper's own instructions, which are taken only where they are asked for, give the same bits."""
    if where == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv("REFINE_EXT_WGMMA", "1")
    outputs = every_value(*((5000, 130) if where == "cuda" else (1100, 70)), f32)
    with emulator.launches(where) as launched:
        check_suprema(where, outputs, 300, MAGNITUDE, digits)
    assert any("hopper_sums_kernel" in name for name in launched)
