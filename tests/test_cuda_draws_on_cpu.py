"""The CUDA kernels of resampling, rejection and Metropolis without a GPU: the CPU's indices, bit for bit.

The same sources run on the host under sanitizers (cuda_on_cpu/); the CPU's own draws are tested against independent
references in test_resampling.py, test_rejection.py and test_metropolis.py.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import refine_ext  # noqa: F401 — registers the ops

sys.path.insert(0, str(Path(__file__).parent / "cuda_on_cpu"))

import emulator
from emulator import STORAGE, Process

pytestmark = pytest.mark.skipif(emulator.COMPILER is None or sys.platform != "linux", reason="needs g++ on Linux")
ops = torch.ops.refine_ext
METHODS = ("multinomial", "stratified", "systematic", "residual")
TYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@pytest.fixture(scope="module", params=["forward", "shuffled"])
def emulated(request):
    process = Process(emulator.build("resampling_main", "address"), CUDA_ON_CPU_ORDER=request.param)
    yield process
    process.close()


def stored(tensor: torch.Tensor | None) -> np.ndarray | None:
    if tensor is None:
        return None
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def ask(process, op, data, seeds, *, num=0, method=0, log=False, offset=0, bound=None, gamma=None, epsilon=1.0,
        chains=0, burn_in=0, thin=1, in_order=False):  # fmt: skip
    storage = next(STORAGE[name] for name, dtype in TYPES.items() if dtype == data.dtype)
    rows = data.numel() // data.shape[-1] if op != 2 else 1

    def each(values, count):
        return count // values.numel() if values is not None else 1

    request = struct.pack(
        "<15qd",
        *(op, storage, rows, data.shape[-1], num, method, log, offset, each(seeds, rows)),
        *(each(bound, chains if op == 2 else rows), each(gamma, rows), chains, burn_in, thin, in_order),
        epsilon,
    )
    answers = {0: 1, 1: 3, 2: 2}[op]
    return process.ask(request, [stored(data), stored(seeds), stored(bound), stored(gamma)], answers)


def weights_of(kind: str, shape, dtype: torch.dtype) -> torch.Tensor:
    if kind == "plain":
        return torch.rand(shape, dtype=torch.float64).to(dtype)
    if kind == "sparse":
        return (torch.rand(shape, dtype=torch.float64) * (torch.rand(shape) < 0.02)).to(dtype) + 0 * torch.ones(
            shape, dtype=dtype
        )
    if kind == "one":
        weights = torch.zeros(shape, dtype=dtype)
        weights[..., shape[-1] // 2] = 3
        return weights
    decades = 30 if dtype in (torch.float32, torch.bfloat16) else 4 if dtype == torch.float16 else 250
    return (10 ** ((torch.rand(shape, dtype=torch.float64) * 2 - 1) * decades)).to(dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["plain", "sparse", "one", "decades"])
def test_resample(emulated, kind, method):
    code = METHODS.index(method)
    for case, (rows, n, num) in enumerate(
        [(1, 1, 5), (3, 40, 64), (2, 4095, 300), (2, 4096, 5000), (2, 4097, 1), (1, 13_000, 9000)]
    ):
        dtype = list(TYPES.values())[case % 4]
        weights = weights_of(kind, (rows, n), dtype)
        weights[..., 0] = torch.where(weights.sum(-1) > 0, weights[..., 0], 1)
        seeds = torch.arange(7, 7 + (rows if case % 2 else 1))
        for log in (False, True):
            data = weights.double().log().to(dtype) if log else weights
            want = ops.resample.default(data, num, seeds, case, code, log)
            got = ask(emulated, 0, data, seeds, num=num, method=code, log=log, offset=case)
            np.testing.assert_array_equal(np.frombuffer(got[0], np.int64).reshape(rows, num), want.numpy())


def test_invalid_rows_draw_their_first_index(emulated):
    weights = torch.rand(6, 5000, dtype=torch.float64)
    weights[0, 17], weights[1, 4999], weights[2, 0], weights[3] = float("nan"), float("inf"), -1, 0
    seeds = torch.tensor([3])
    for code in range(4):
        got = np.frombuffer(ask(emulated, 0, weights, seeds, num=70, method=code)[0], np.int64).reshape(6, 70)
        assert (got[:4] == 0).all()
        # A row's numbers do not depend on its neighbours, so the valid rows can be compared within a valid batch.
        whole = weights.clone()
        whole[:4] = 1
        want = ops.resample.default(whole, 70, seeds, 0, code, False)
        np.testing.assert_array_equal(got[4:], want[4:].numpy())


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", TYPES.values(), ids=list(TYPES))
def test_rejection(emulated, dtype, shifted):
    for case, (rows, n) in enumerate([(1, 1), (3, 50), (2, 4097), (1, 9000)]):
        log_ratio = (torch.randn(rows, n, dtype=torch.float64) * 2).to(dtype)
        log_ratio[0, 0] = -float("inf") if n > 1 else 0
        seeds = torch.arange(rows if case % 2 else 1)
        bound = None if case == 0 else torch.linspace(0, 9, rows, dtype=torch.float64)
        gamma = torch.linspace(-1, 2, rows, dtype=torch.float64) if shifted else None
        want = ops.rejection.default(log_ratio, bound, gamma, 1e-8, seeds, case)
        got = ask(emulated, 1, log_ratio, seeds, bound=bound, gamma=gamma, epsilon=1e-8, offset=case)
        np.testing.assert_array_equal(np.frombuffer(got[0], bool).reshape(rows, n), want[0].numpy())
        np.testing.assert_array_equal(np.frombuffer(got[1]), want[1].numpy())
        np.testing.assert_array_equal(np.frombuffer(got[2], np.int64), want[2].numpy())


def test_rejection_of_invalid_rows(emulated):
    log_ratio = torch.randn(3, 5000)
    log_ratio[0, 3], log_ratio[1, 4998] = float("nan"), float("inf")
    keep, bound, accepted = ask(emulated, 1, log_ratio, torch.tensor([1]))
    assert not np.frombuffer(keep, bool).reshape(3, -1)[:2].any()
    assert np.isnan(np.frombuffer(bound)[:2]).all() and np.isfinite(np.frombuffer(bound)[2])
    counts = np.frombuffer(accepted, np.int64)
    assert (counts[:2] == 0).all() and counts[2] > 0


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("dtype", TYPES.values(), ids=list(TYPES))
def test_metropolis(emulated, dtype, in_order):
    for num, chains, burn_in, thin in ((1, 1, 0, 1), (40, 3, 5, 2), (7, 300, 2, 3)):
        n = chains * (burn_in + (num - 1) * thin + 1) if in_order else 500
        log_ratio = (torch.randn(n, dtype=torch.float64) * 2).to(dtype)
        for initial in (None, torch.tensor([0.5], dtype=torch.float64), torch.linspace(0, 9, chains).double()):
            seed = torch.tensor([11])
            want = ops.metropolis.default(log_ratio, num, chains, burn_in, thin, in_order, initial, seed)
            got = ask(emulated, 2, log_ratio, seed, num=num, chains=chains, burn_in=burn_in, thin=thin,
                      in_order=in_order, bound=initial)  # fmt: skip
            np.testing.assert_array_equal(np.frombuffer(got[0], np.int64).reshape(chains, num), want[0].numpy())
            np.testing.assert_array_equal(np.frombuffer(got[1], np.int64), want[1].numpy())


def test_metropolis_of_invalid_log_ratios(emulated):
    log_ratio = torch.randn(50)
    log_ratio[7] = float("nan")
    indices, accepted = ask(emulated, 2, log_ratio, torch.tensor([1]), num=9, chains=2)
    assert not np.frombuffer(indices, np.int64).any() and not np.frombuffer(accepted, np.int64).any()


def test_no_races():
    process = Process(emulator.build("resampling_main", "thread"))
    weights = torch.rand(2, 9000)
    for code in range(4):
        ask(process, 0, weights, torch.tensor([1]), num=3000, method=code)
    ask(process, 1, weights, torch.tensor([1]))
    ask(process, 2, weights[0], torch.tensor([1]), num=20, chains=40)
    process.close()
