"""What only a GPU can show: graphs, streams, processes, devices, memory tools. Run with `pytest -m cuda`.

What the ops compute is compared elsewhere, on every device (test_op_cases.py, and the ops' own suites); here the same
bits must come whatever the circumstances.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from op_cases import CASES, Case, assert_same, near

import refine_ext as rx

ops = torch.ops.refine_ext
cuda = pytest.mark.cuda
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
COMPILED = ("density_ratio-gan", "density_ratio_backward-gan", "variational_bound-kl", "dual_bound-gan", "rejection",
            "guided_step", "guidance_factor-gan")  # fmt: skip
# An order of magnitude above what submitting a case takes the host.
CYCLES = 100_000_000


@pytest.fixture
def forbid_waiting():
    """Every operation of torch that would wait for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def warm_up(case: Case, inputs: list[torch.Tensor]) -> torch.cuda.Stream:
    """A stream on which the case has run: its kernels are loaded, its memory is in the allocator's cache."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.run(*inputs)
    stream.synchronize()
    return stream


@cuda
@every_case
def test_graph(case: Case):
    """A replay computes from what then lies in the inputs, seeds included, and writes every result anew."""
    inputs = case.make("cuda")
    warm_up(case, case.make("cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run(*inputs)
    for seed in (1, 2, 2, 0):
        for result in captured:
            result.untyped_storage().fill_(255)
        for old, new in zip(inputs, case.make("cuda", seed), strict=True):
            old.copy_(new)
        graph.replay()
        assert_same(captured, case.run(*case.make("cuda", seed)), case.name)


@cuda
@every_case
def test_stream(case: Case, forbid_waiting):
    """Work goes to the current stream, behind what is there, and the host does not wait for it."""
    want = case.run(*case.make("cuda", seed=1))
    fresh, inputs = case.make("cuda", seed=1), case.make("cuda")
    stream = warm_up(case, case.make("cuda"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        forbid_waiting()
        torch.cuda._sleep(CYCLES)
        for old, new in zip(inputs, fresh, strict=True):
            old.copy_(new, non_blocking=True)
        got = case.run(*inputs)
        waited = stream.query()
        torch.cuda.set_sync_debug_mode("default")
        stream.synchronize()
    assert not waited, "the host waited for the device"
    assert_same(got, want, case.name)


@cuda
def test_graph_draws_anew_when_the_seed_changes():
    """What refine_ext/resampling.py says of graphs."""
    weights, seed = torch.rand(5000, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")

    def draw(seed):
        return (
            rx.resample(weights, 4000, "multinomial", seed=seed),
            rx.rejection(weights.log(), seed=seed).keep,
            rx.metropolis(weights.log(), 50, chains=20, seed=seed),
        )

    draw(seed), draw(None)
    given, drawn = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(given):
        by_seed = draw(seed)
    with torch.cuda.graph(drawn):
        by_generator = draw(None)
    for value in (0, 1, 2**62):
        seed.fill_(value)
        given.replay()
        assert_same(by_seed, draw(value), "a seed tensor")
    torch.manual_seed(7)
    eager = [draw(None) for _ in range(3)]
    assert not torch.equal(eager[0][0], eager[1][0])
    torch.manual_seed(7)
    for want in eager:
        drawn.replay()
        assert_same(by_generator, want, "torch's generator")


@cuda
def test_graph_of_a_guided_step_draws_anew_when_the_seeds_change():
    """A denoiser, a discriminator with its backward pass, the factor and the fused step, captured as one graph."""
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 3, 3, padding=1, device="cuda")
    discriminator = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 1)).to("cuda")
    x, sigma = torch.randn(4, 3, 8, 8, device="cuda"), torch.full((4,), 2.0, dtype=torch.float64, device="cuda")
    table = torch.tensor([0.9, 0.08, 1.0, 0.3], dtype=torch.float64, device="cuda")
    seeds = torch.arange(4, device="cuda")

    def guided() -> torch.Tensor:
        with torch.no_grad():
            denoised = net(x)
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            h = discriminator(state)[:, 0]
            (gradient,) = torch.autograd.grad(h.sum(), state)
        numbers = [0.0, 1.5, float("nan"), 1.0, 0.0, 80.0]
        factor = ops.guidance_factor(h.detach(), None, None, sigma, None, numbers, 0, 0.0, True, False, 1)
        return ops.guided_step(x, [denoised, gradient], table, [], factor, seeds, 0, 3, True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        guided()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = guided()
    results = []
    for first in (0, 100, 0):
        seeds.copy_(torch.arange(4, device="cuda") + first)
        sigma.fill_(2.0 + first)  # the levels are read at every replay too: 102 gets no guidance
        graph.replay()
        results.append(captured.clone())
        # cuDNN and cuBLAS may choose other algorithms inside a graph.
        torch.testing.assert_close(results[-1], guided(), rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
    noise = [ops.guided_step(x, [], None, [0.0, 1.0], None, seeds + k, 0, 3, True) for k in (0, 100)]
    assert not torch.equal(*noise)


@cuda
def test_graph_of_a_guided_trajectory():
    """All steps of sample_edm, its churn included; a replay reads the noise and the seeds as they then are."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 16, device="cuda")
    direction = torch.randn(16, device="cuda")
    noise, seeds = torch.randn(32, 16, device="cuda"), torch.arange(32, device="cuda")

    def sample() -> torch.Tensor:
        return rx.sample_edm(
            lambda x, sigma: torch.tanh(linear(x)),
            noise,
            num_steps=5,
            S_churn=2.0,
            discriminator=rx.Guide(lambda x, sigma: x @ direction / (1 + sigma), check=False),
            seed=seeds,
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sample()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample()
    results = []
    for first in (0, 50, 0):
        seeds.copy_(torch.arange(32, device="cuda") + first)
        graph.replay()
        results.append(captured.clone())
        torch.testing.assert_close(results[-1], sample(), rtol=1e-4, atol=1e-4)
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


@cuda
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch.compile needs triton on CUDA")
@pytest.mark.parametrize("name", COMPILED)
def test_compile(name: str):
    case = next(case for case in CASES if case.name.startswith(f"{name}-float32"))
    torch._dynamo.reset()
    want = case.run(*case.make("cuda"))
    got = torch.compile(lambda *inputs: tuple(case.call(*inputs)))(*case.make("cuda"))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        # The ops are called as they are; what follows them (exp of a logarithm) may be fused and rounded once less.
        assert near(a, b, 2e-6), f"result {i}"


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_case
def test_device_of_the_tensor(case: Case):
    want = case.run(*case.make("cuda:0"))
    got = case.run(*case.make("cuda:1"))
    assert torch.cuda.current_device() == 0
    for result in got:
        assert result.device == torch.device("cuda:1")
    assert_same([x.cpu() for x in got], [x.cpu() for x in want], case.name)


@cuda
def test_invalid_rows_are_nan_and_do_not_wait(forbid_waiting):
    h = torch.randn(3, 40_000, device="cuda")
    h[1, 5] = float("nan")
    rx.density_ratio(h, "gan", dim=-1)
    forbid_waiting()
    log_ratio = rx.density_ratio(h, "gan", dim=-1).log_ratio
    torch.cuda.set_sync_debug_mode("default")
    assert log_ratio[1].isnan().all() and log_ratio[[0, 2]].isfinite().all()
    with pytest.raises(ValueError, match="NaN"):
        rx.density_ratio(h, "gan", dim=-1, nan_policy="raise")


@cuda
def test_tensors_on_different_devices():
    with pytest.raises(ValueError, match="base_weights is on cpu, h is on cuda:0"):
        rx.density_ratio(torch.randn(9).cuda(), base_weights=torch.ones(9))
    grad = torch.ones(3, 5)
    with pytest.raises(RuntimeError, match="grad must be on the same CUDA device"):
        torch.ops.refine_ext.dual_slope(grad, grad.cuda(), False, 0, 0.0)


def run_python(source: str) -> None:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


IMPORT = """
import importlib, pathlib
import torch

def asked(*_):
    raise AssertionError("importing asked for devices")

torch.cuda.is_available = torch.cuda.device_count = torch._C._cuda_getDeviceCount = asked
import refine_ext as rx
from refine_ext import _C, _library

rx.density_ratio(torch.randn(5))
# Once more as in a CUDA build of torch and of this package, up to the library itself.
info = _C.build_info()
_C.build_info = lambda: {**info, "cuda": True, "cuda_version": info["cuda_version"] or "12.4"}
torch.version.cuda = torch.version.cuda or "12.4"
pathlib.Path.exists = lambda self: True
loaded = []
torch.ops.load_library = loaded.append
importlib.reload(_library)
assert len(loaded) == 1
assert not torch.cuda.is_initialized()
"""


def test_import_leaves_cuda_alone():
    """Even asking for the number of devices would end the use of CUDA in forked processes."""
    run_python(IMPORT)


FORK = """
import os, torch, refine_ext as rx
assert not torch.cuda.is_initialized()
h = torch.linspace(-1, 1, 5000)
want = rx.density_ratio(h).log_ratio
def works():
    torch.testing.assert_close(rx.density_ratio(h.cuda()).log_ratio.cpu(), want, rtol=1e-5, atol=1e-5)
    return torch.equal(rx.resample(h.exp().cuda(), 99, seed=1).cpu(), rx.resample(h.exp(), 99, seed=1))
for _ in range(2):
    child = os.fork()
    if child == 0:
        try:
            good = works()
        except BaseException as error:
            print(error, file=__import__("sys").stderr, flush=True)
            good = False
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0, "in a forked process"
assert works()
"""


@cuda
def test_fork_before_cuda_is_initialised():
    run_python(FORK)
