"""What holds for every op on every device: none untested, the CPU's results, the same bits again, threads, no data.

The table of calls is op_cases.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import emulator
import pytest
import torch
from op_cases import CASES, Case, assert_same, near
from torch.utils._python_dispatch import TorchDispatchMode

import refine_ext as rx

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
ops = torch.ops.refine_ext
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


class _CalledOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "refine_ext":
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_every_op_has_a_case():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("refine_ext::")}
    assert len(registered) >= 11
    called = _CalledOps()
    with called:
        for case in CASES:
            case.run(*case.make("cpu"))
    assert registered == called.names


# And once more what has kernels of Hopper's own instructions, which are the same for all storage types.
RUN_THE_TABLE = """
import os

import emulator
from op_cases import CASES

hopper = {path.stem.replace("_hopper", "-float32") for path in emulator.CUDA.glob("*_hopper.cu")}
with emulator.replace_cpu_ops():
    for case in CASES:
        case.run(*case.make("cpu"))
    os.environ["REFINE_EXT_WGMMA"] = "1"
    for case in CASES:
        if case.name in hopper:
            case.run(*case.make("cpu"))
"""


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on Linux")
def test_every_cuda_kernel_has_a_case(tmp_path):
    """Of a template, some instance; in a process of its own, as what was launched is written down when it ends."""
    library, record = emulator.load_ops(), tmp_path / "launched"
    path = os.pathsep.join([*map(str, (emulator.HERE.parent, emulator.HERE)), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_ON_CPU_LAUNCHED": str(record)}
    subprocess.run([sys.executable, "-c", RUN_THE_TABLE], check=True, env=environment, timeout=600)
    launched = {re.search(r"cuda::(\w+)[<(]", kernel)[1] for kernel in emulator.launched(record, library)}
    assert launched == set(emulator.kernel_names())


@every_case
def test_results_depend_on_the_inputs(case: Case):
    """So that comparing results means something: other inputs give other results, and none is empty or NaN."""
    one, two = (case.run(*case.make("cpu", seed)) for seed in (0, 1))
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        assert a.numel() and a.dtype == b.dtype
        assert not a.isnan().any()
        # A few numbers may agree by chance: constants of a family, counts of a few.
        if a.numel() > 100:
            assert not torch.equal(a, b), f"result {i}"
    assert any(not torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    "where",
    ["cuda_on_cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sanitizer])],
)
@every_case
def test_results_are_the_cpu_s(case: Case, where: str):
    """The draws are the CPU's, the values near enough to be the same ones; every kernel once, for compute-sanitizer.

    How near they must be is tested op by op elsewhere. Here: a few roundings of the storage type, and in float32 of a
    shift that a ratio or a gradient depends on steeply, against the largest value of a result.
    """
    tolerance = {"float64": 1e-9, "float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
    limit = next(limit for name, limit in tolerance.items() if f"-{name}" in case.name)
    want = case.run(*case.make("cpu"))
    if where == "cuda":
        got = case.run(*case.make("cuda"))
    elif emulator.AVAILABLE:
        with emulator.replace_cpu_ops():
            got = case.run(*case.make("cpu"))
    else:
        pytest.skip("needs g++ on Linux")
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype and near(a.cpu(), b, limit), f"result {i}"


@pytest.mark.parametrize("device", DEVICES)
@every_case
def test_the_same_bits_on_every_run(case: Case, device: str):
    first = case.run(*case.make(device))
    for _ in range(4):
        assert_same(case.run(*case.make(device)), first, case.name)


@pytest.mark.parametrize("device", DEVICES)
def test_eight_threads_at_once(device: str):
    """Each on its own inputs and, on a GPU, its own stream: scratch memory and state must not be shared."""
    cases = CASES[:: 1 if device == "cuda" else 4]
    want = [[case.run(*case.make(device, seed)) for case in cases] for seed in range(8)]
    if device == "cuda":
        torch.cuda.synchronize()
    errors: list[BaseException] = []
    start = threading.Barrier(8, timeout=300)

    def work(seed: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream() if device == "cuda" else None):
                inputs = [case.make(device, seed) for case in cases]
                start.wait()
                got = [case.run(*x) for case, x in zip(cases, inputs, strict=True)]
                if device == "cuda":
                    torch.cuda.current_stream().synchronize()
            for case, one, other in zip(cases, got, want[seed], strict=True):
                assert_same(one, other, case.name)
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


def test_empty_inputs(device):
    """No rows and no draws are fine (vmap and graphs make them); the public functions refuse an empty tensor."""
    rows, values = torch.empty(0, 7, device=device), torch.empty(0, device=device)
    stats = torch.empty(0, 8, device=device, dtype=torch.float64)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    results = [
        ops.density_ratio(rows, None, None, 3, 0.0, False, False),
        [ops.density_ratio_out(rows, None, None, 3, 0.0, False, False, out=torch.empty_like(rows))],
        [ops.density_ratio_backward(rows, stats, rows, stats, None, True, 3, 0.0)],
        ops.variational_bound(rows, rows, True, 3, 0.0),
        [ops.variational_bound_backward(values, rows, stats, True, 3, 0.0)],
        [ops.dual_bound(rows, rows, 3, 0.0)],
        [ops.dual_output(rows, 3, 0.0)],
        [ops.dual_slope(rows, rows, True, 3, 0.0), ops.dual_slope(values, rows, True, 3, 0.0)],
        [ops.resample(rows, 5, seed, 0, method, False) for method in range(len(rx.resampling.METHODS))],
        ops.rejection(rows, None, None, 1e-6, seed, 0),
        [ops.guided_step(rows, [rows], None, [1.0, 1.0, 1.0], None, None, 0, 0, True)],
        [ops.guided_step(rows.new_empty(0), [], None, [1.0], None, None, 0, 0, False)],
        [ops.guidance_factor(values, None, None, None, None, [0.0, 1.0, 1.0, 1.0, 0.0, 2.0], 3, 0.0, False, False, 1)],
        [ops.rademacher_backward(stats.new_empty(3), seed.new_empty(3), values[:, None].expand(0, 4), 0, 0)],
        [ops.multipliers(rows, 0, 3, 0, 0, 0, normal) for normal in (False, True)],
        [ops.gaussian_kl(rows, rows, None, None), ops.importance_log_weights(rows[None], rows, rows)],
        ops.gaussian_kl_backward(values, rows, rows, None, rows, 11),
        ops.importance_log_weights_backward(values[None], rows[None], rows, rows, 7),
    ]
    for tensors in results:
        for tensor in tensors:
            assert tensor.numel() == 0 and tensor.device.type == device.type
    assert rx.resample(torch.rand(3, 7, device=device), 0, seed=0).shape == (3, 0)
    assert rx.metropolis(torch.rand(7, device=device), 0, chains=2, seed=0).shape == (2, 0)
    none = torch.empty(3, 0, device=device)
    assert ops.guided_step(none, [none], None, [1.0, 1.0, 1.0], None, None, 0, 0, True).shape == (3, 0)
    for call in (
        lambda: rx.density_ratio(none, dim=-1),
        lambda: rx.resample(none, 2, seed=0),
        lambda: rx.rejection(none, seed=0),
        lambda: rx.metropolis(none[0], 2, seed=0),
        lambda: rx.variational_bound(none, torch.rand(3, device=device)),
    ):
        with pytest.raises(ValueError, match="empty"):
            call()


def test_draws_are_philox_words(device):
    """Multinomial draws from 2**20 equal weights are the top bits of the sequence's 64-bit numbers."""
    seed, num, skip = 2**63 + 12_345, 4001, 2**33 + 1
    got = rx.resample(torch.ones(2**20, device=device), num, "multinomial", seed=seed, offset=skip)
    want = []
    for i in range(skip, skip + num):
        block, stream = i >> 1, 1
        counter = (block & 0xFFFFFFFF, block >> 32, 0, stream)
        words = rx._C.philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
        want.append(words[3 if i & 1 else 1] >> 12)
    assert got.tolist() == want
