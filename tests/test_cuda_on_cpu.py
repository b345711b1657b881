"""What running the CUDA kernels on the CPU (cuda_on_cpu/) shows beyond the suites that do so: memory, races, coverage.

The tests marked `sanitized` run again in a process whose kernels AddressSanitizer and UndefinedBehaviorSanitizer watch,
with workspaces and torch's tensors of exactly the size they need, and in one where ThreadSanitizer does, to which each
CUDA thread is a thread.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch
from reference import FAMILIES, outputs

import refine_ext as rx

pytestmark = pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on Linux")
TESTS = Path(__file__).parent
every_sanitizer = pytest.mark.parametrize("sanitizer", emulator.SANITIZERS)


# Arguments that the Python API refuses: an output over the input of other blocks, an input one element short.
MISUSE = """
import ctypes, sys
sys.path.insert(0, {folder!r})
import emulator, numpy, torch
emulator.load_ops()
op = torch.ops.refine_ext_on_cpu.density_ratio_out
n = 20_000
if {race}:
    values = torch.linspace(-1, 1, n + 64)
    h, out = values[:n], values[64:]
else:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    memory = libc.malloc(ctypes.c_size_t(4 * (n - 1)))
    h = torch.from_numpy(numpy.ctypeslib.as_array((ctypes.c_float * n).from_address(memory)))
    out = torch.empty(n)
op(h, None, None, 0, 0.0, False, False, out=out)
print("not reported")
"""


@every_sanitizer
def test_the_sanitizers_watch_the_ops(sanitizer):
    program = MISUSE.format(folder=str(TESTS / "cuda_on_cpu"), race=sanitizer == "thread")
    emulator.build_ops(sanitizer)
    environment = emulator.python_environment(sanitizer)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "not reported" not in done.stdout
    assert {"address": "heap-buffer-overflow", "thread": "data race"}[sanitizer] in done.stderr


@every_sanitizer
def test_sanitized(sanitizer, tmp_path):
    """No report, and every kernel of csrc/cuda has been launched."""
    library = emulator.build_ops(sanitizer)
    record = tmp_path / "launched"
    marked = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.sanitized" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", "-m", "sanitized"]
    environment = emulator.python_environment(sanitizer, CUDA_ON_CPU_LAUNCHED=str(record))
    # Without what is about a storage type whose kernels are not instrumented.
    chosen = " and not ".join(["cuda_on_cpu", *emulator.SANITIZERS[sanitizer].plain])
    done = subprocess.run(
        [*command, "-k", chosen, *(path for path in marked if path != __file__)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    launched = {re.search(r"cuda::(\w+)", name)[1] for name in emulator.launched(record, library)}
    assert launched == set(emulator.kernel_names())


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
@pytest.mark.kernels("cuda_on_cpu")
def test_the_order_of_blocks_does_not_matter(order, kernels, monkeypatch):
    log_weights = torch.randn(3, 9001)

    def results():
        for name in FAMILIES:
            for rows, n in ((20, 40), (2, 3000), (2, 20_000)):
                generator = torch.Generator().manual_seed(n)
                h = outputs(name, (rows, n), torch.float32, generator=generator)
                result = rx.density_ratio(h, name, dim=-1)
                yield from (result.log_ratio, result.shift, result.ess)
                yield rx.variational_bound(h[0], h[1], name)
        for method in rx.resampling.METHODS:
            yield rx.resample(log_weights, 5000, method, seed=3, log=True)
        yield from rx.rejection(log_weights, seed=3)
        yield rx.metropolis(log_weights[0], 40, chains=300, burn_in=5, seed=3)
        yield torch.ops.refine_ext.guided_step(
            log_weights, [log_weights], None, [0.5, 0.4, 1.0], None, None, 3, 0, True
        )

    want = list(results())
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    for one, other in zip(want, results(), strict=True):
        assert torch.equal(one, other)
