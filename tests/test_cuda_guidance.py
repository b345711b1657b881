"""The guided step's CUDA kernels: every path through them gives the same numbers, and nothing else is read.

What a step computes is tested on every device in test_guidance*.py. Here: 16-byte packs against single elements, rows
that begin between two packs, teams of one thread to many blocks, terms of two and of three storage types, coefficients
that leave a tensor out, and the accuracy of the normals, which come from the GPU's special unit.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.kernels("cuda_on_cpu", "cuda")
step = torch.ops.refine_ext.guided_step
step_out = torch.ops.refine_ext.guided_step_out
NOISE = 4  # Stream::noise of csrc/math/philox.h
f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# State, storage of the terms: every kernel.
STORAGES = [(f64, f64), (f64, f32), (f32, f32), (f32, f16), (f32, bf16), (f16, f16), (bf16, bf16)]
every_storage = pytest.mark.parametrize(("state", "terms"), STORAGES, ids=lambda d: str(d).removeprefix("torch."))
# Lengths of rows: below and at a Philox block, at and beside a pack, a warp's, a block's and several blocks' work.
LENGTHS = (1, 3, 4, 8, 17, 64, 1000, 2048, 2051, 40_000)


def words(seed: int, step: int, row: int, blocks: int) -> list[np.ndarray]:
    """Philox4x32-10 of the counters (block, step, row), with NumPy."""
    low = np.uint64(0xFFFFFFFF)
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    ones = np.ones(blocks, dtype=np.uint64)
    constants = (step, row & 0xFFFFFFFF, NOISE | row >> 32 << 8)
    counter = [np.arange(blocks, dtype=np.uint64), *(ones * np.uint64(value) for value in constants)]
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            second >> np.uint64(32) ^ counter[1] ^ np.uint64(key[0]),
            second & low,
            first >> np.uint64(32) ^ counter[3] ^ np.uint64(key[1]),
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def normals(n: int, seed: int, step: int, row: int) -> Tensor:
    """Box-Muller of those words in extended precision."""
    word = [w.astype(np.longdouble) for w in words(seed, step, row, (n + 3) // 4)]
    z = np.empty((len(word[0]), 4), dtype=np.longdouble)
    for pair in (0, 2):
        radius = np.sqrt(-2 * np.log((word[pair] + 0.5) / 2**32))
        angle = 2 * np.longdouble("3.14159265358979323846264338327950288") * word[pair + 1] / 2**32
        z[:, pair], z[:, pair + 1] = radius * np.cos(angle), radius * np.sin(angle)
    return torch.from_numpy(z.reshape(-1)[:n].astype(np.float64))


def noise(x: Tensor, seed: int | Tensor, number: int = 0) -> Tensor:
    """The op's normals alone, of x's shape and dtype; x holds what must not be read."""
    seeds = seed if isinstance(seed, Tensor) else None
    return step(
        torch.full_like(x, math.nan), [], None, [0.0, 1.0], None, seeds, 0 if seeds is not None else seed, number, True
    )


# Relative to max(1, |z|): in float32 the logarithm is within 5e-7 of itself, half of that in its root, an ulp of the
# root, of sine and cosine, of two products; float64 has libm's functions. Then the rounding to the storage type.
NORMAL_TOLERANCE = {f64: 5e-15, f32: 1e-6, f16: 2.0**-11 + 1e-6, bf16: 2.0**-8 + 1e-6}


@pytest.mark.parametrize("dtype", NORMAL_TOLERANCE, ids=str)
@pytest.mark.sanitized
def test_normals(dtype, device):
    """Of the definition, for any length; the seed's 64 bits, the step and the row all count."""
    for n in LENGTHS[:-1]:
        for seed, number in ((0, 0), (2**63 - 12_345, 2**32 - 1)):
            got = noise(torch.empty(3, n, dtype=dtype), seed, number).double().cpu()
            want = torch.stack([normals(n, seed, number, row) for row in range(3)])
            assert ((got - want).abs() <= NORMAL_TOLERANCE[dtype] * want.abs().clamp(min=1)).all(), (n, seed)


def test_normals_next_to_zero_and_in_the_tail(device):
    """Relative accuracy where u is near 1 and r near 0, which log(u) alone would lose; the largest r too."""
    n = 2_000_000
    got = noise(torch.empty(1, n, dtype=f32), 7).double().cpu()[0]
    want = normals(n, 7, 0, 0)
    radius = want.reshape(-1, 2).square().sum(1).sqrt()
    assert radius.min() < 5e-3 and radius.max() > 5
    error = (got - want).reshape(-1, 2).abs().amax(1) / radius
    # An ulp or two of the sine and cosine, which are of order one, are errors of r too.
    assert error.max() < 1e-6


@pytest.mark.sanitized
@every_storage
@pytest.mark.parametrize("noisy", [False, True])
def test_every_path_gives_the_same_bits(state, terms, noisy, device):
    """Rows on packs and rows between them, few terms' kernel and many terms'."""
    for n in LENGTHS:
        rows = 1 if n > 9000 else 3
        x = torch.randn(rows, n).to(state)
        u = [torch.randn(rows, n).to(terms) for _ in range(3)]
        table = torch.randn(rows, 5 if noisy else 4, dtype=f64)
        factor = torch.rand(rows, dtype=f64)
        seeds = torch.arange(rows) + 2**40
        want = step(x, u, table, [], factor, seeds, 0, 5, noisy)
        reference = table[:, :1] * x.double()
        for k in range(3):
            c = table[:, k + 1] * (factor if k == 2 else 1.0)
            reference += c[:, None] * u[k].double()
        if noisy:
            # In the arithmetic's type: the state's own would round before it is added.
            z = noise(torch.empty(rows, n, dtype=f64 if state == f64 else f32), seeds, 5)
            reference += table[:, 4:] * z.double()
        # Five roundings of the arithmetic, and one of the storage.
        scale = reference.abs().amax() + 10
        tolerance = {f64: 1e-15, f32: 5e-7, f16: 2.0**-11 + 5e-7, bf16: 2.0**-8 + 5e-7}[state] * scale
        assert (want.double() - reference).abs().max() <= tolerance, n

        def moved(tensor: Tensor) -> Tensor:
            """Beginning one element behind a pack, as all rows of odd length do at some time."""
            memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
            return memory.copy_(tensor.reshape(-1)).reshape(tensor.shape)

        assert torch.equal(step(moved(x), [moved(t) for t in u], table, [], factor, seeds, 0, 5, noisy), want), n
        zeros = [torch.full_like(u[0], math.nan)] * 2
        wide = torch.cat([table[:, :1], torch.zeros(rows, 2, dtype=f64), table[:, 1:]], 1)
        assert torch.equal(step(x, [*zeros, *u], wide, [], factor, seeds, 0, 5, noisy), want), n


@pytest.mark.sanitized
def test_terms_of_three_storages(device):
    x, u, v, w = torch.randn(4, 3, 500).unbind()
    got = step(x, [u.to(f16), v.to(bf16), w], None, [1.0, 2.0, 3.0, 4.0], None, None, 0, 0, False)
    want = step(x, [u.to(f16).float(), v.to(bf16).float(), w], None, [1.0, 2.0, 3.0, 4.0], None, None, 0, 0, False)
    assert torch.equal(got, want)


@pytest.mark.sanitized
@every_storage
def test_in_place_and_expanded(state, terms, device):
    """The output may be the state or a term; a sample that serves all rows is read as it is."""
    x, u, shared = torch.randn(5, 300).to(state), torch.randn(5, 300).to(terms), torch.randn(300).to(terms)
    table = torch.randn(5, 4, dtype=f64)
    want = step(x, [u, shared.expand(5, 300).clone()], table, [], None, None, 3, 1, True)
    assert torch.equal(step(x, [u, shared.expand(5, 300)], table, [], None, None, 3, 1, True), want)
    outs = [x.clone()] + ([u.clone()] if terms == state else [])
    for out in outs:
        arguments = (out, [u, shared.expand(5, 300)]) if out is outs[0] else (x, [out, shared.expand(5, 300)])
        step_out(*arguments, table, [], None, None, 3, 1, True, out=out)
        assert torch.equal(out, want)


def test_a_zero_row_leaves_its_tensors_out(device):
    """Each row by its own coefficients, after the factor: NaN stays out of the rows that do not ask for it."""
    x, u = torch.full((4, 64), math.nan), torch.full((4, 64), math.nan)
    x[1], u[2] = 1.0, 1.0
    table = torch.tensor([[0.0, 0, 2], [1, 3, 0], [0, 1, 0], [1, 1, 0]], dtype=f64)
    factor = torch.tensor([math.nan, 0.0, 5.0, 1.0], dtype=f64)
    got = step(x, [u], table, [], factor, None, 9, 0, True)
    assert torch.equal(got[0], 2 * noise(torch.empty(1, 64), 9)[0])
    assert torch.equal(got[1], torch.ones(64)) and torch.equal(got[2], torch.full((64,), 5.0))
    assert got[3].isnan().all()


def test_a_sample_does_not_depend_on_its_batch(device):
    """Per-sample seeds: alone, among others, at another place, the same numbers."""
    seeds = torch.tensor([5, -1, 2**62, 7])
    x, u = torch.randn(4, 3, 40), torch.randn(4, 3, 40)
    table = torch.randn(4, 3, dtype=f64)
    want = step(x, [u], table, [], None, seeds, 0, 2, True)
    for rows in ([2], [3, 0], [1, 1, 2, 3, 0, 0]):
        got = step(x[rows], [u[rows]], table[rows], [], None, seeds[rows], 0, 2, True)
        assert torch.equal(got, want[rows])


@pytest.mark.sanitized
def test_factor(device):
    """A thread a sample, over several blocks: kappa = r / (1 + r) of the flow of the Jensen-Shannon divergence."""
    h, weight, shift, sigma = torch.randn(4, 700, dtype=f64).unbind()
    sigma = sigma.exp()
    numbers = [0.0, 1.0, math.nan, 1.0, 0.5, 2.0]
    jensen_shannon, noise_prediction = 2, 1
    got = torch.ops.refine_ext.guidance_factor(
        h.float(), shift, weight, sigma, None, numbers, jensen_shannon, 0.0, True, True, noise_prediction
    )
    inside = (sigma >= 0.5) & (sigma <= 2.0)
    want = torch.where(inside, -sigma * weight * torch.sigmoid(h.float().double() - shift), 0.0)
    # Some roundings of float64.
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)


def test_inputs_on_different_devices(kernels):
    if kernels != "cuda":
        pytest.skip("needs two devices")
    x = torch.randn(3, 5, device="cuda")
    seeds, table = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3, dtype=f64)
    for arguments in (([x.cpu()], None, None, None), ([x], table, None, None), ([x], None, table[:, 0], None)):
        with pytest.raises(RuntimeError, match="must be on the same CUDA device"):
            step(x, arguments[0], arguments[1], [1.0, 1.0, 1.0], arguments[2], arguments[3], 0, 0, True)
    with pytest.raises(RuntimeError, match="seed must be on the same CUDA device"):
        step(x, [x], None, [1.0, 1.0, 1.0], None, seeds, 0, 0, True)
