"""On a GPU: the CUDA ops against the CPU's, CUDA graphs, determinism, layouts, devices. Run with `pytest -m cuda`.

What the kernels compute is tested without a GPU in test_cuda_on_cpu.py; this is what only a GPU can show.
"""

from __future__ import annotations

import pytest
import torch
from reference import NAMED, outputs

import refine_ext as rx

pytestmark = pytest.mark.cuda
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SIZES = ((1,), (7,), (3, 65), (2, 4097), (2000, 40), (3, 16_385), (1_000_003,))


def both(shape, name, dtype):
    h = outputs(name, shape, dtype)
    return h, h.cuda()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", (*NAMED, "alpha:0.3"))
def test_density_ratio_matches_the_cpu(name, dtype):
    for shape in SIZES:
        cpu, gpu = both(shape, name, dtype)
        want, got = (rx.density_ratio(h, name, dim=-1) for h in (cpu, gpu))
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(got.log_ratio.cpu(), want.log_ratio, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got.shift.cpu(), want.shift, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(got.ess.cpu(), want.ess, rtol=1e-4, atol=1e-5)
        w = torch.rand(shape, dtype=torch.float64).to(dtype)
        want, got = (rx.density_ratio(h, name, dim=-1, base_weights=x) for h, x in ((cpu, w), (gpu, w.cuda())))
        torch.testing.assert_close(got.log_ratio.cpu(), want.log_ratio, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tight", [True, False])
@pytest.mark.parametrize("name", (*NAMED, "alpha:0.3"))
def test_bound_and_gradients_match_the_cpu(name, tight):
    for n in (50, 3000, 200_000):
        results = []
        for device in ("cpu", "cuda"):
            torch.manual_seed(1)
            real = outputs(name, (n // 2,)).to(device).requires_grad_()
            fake = outputs(name, (n,)).to(device).requires_grad_()
            bound = rx.variational_bound(real, fake, name, tight=tight)
            (2 * bound).backward()
            results.append([t.detach().cpu() for t in (bound, real.grad, fake.grad)])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jensen_shannon", "jeffreys"])
def test_cuda_graph_stream_and_determinism(name):
    for shape in ((64,), (9, 1000), (300_000,)):
        h = outputs(name, shape, torch.float32).cuda()
        eager = rx.density_ratio(h, name).log_ratio
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            rx.density_ratio(h, name)  # warm up the allocator
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = rx.density_ratio(h, name).log_ratio
        for _ in range(5):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, eager)
        # New inputs at the same place.
        h.copy_(outputs(name, shape, torch.float32) - 0.5)
        graph.replay()
        assert torch.equal(captured, rx.density_ratio(h, name).log_ratio)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_layouts(dtype):
    for n in (33, 5000, 70_001):
        base = outputs("gan", (n + 3, 2), dtype).cuda()
        for view in (base[3:, 0], base[:, 1].contiguous()[1:], base.T[0, 2:]):
            want = rx.density_ratio(view.clone(), "gan").log_ratio
            assert torch.equal(rx.density_ratio(view, "gan").log_ratio, want)
        h = base[:, 0].contiguous()
        want = rx.density_ratio(h, "gan").log_ratio
        assert torch.equal(rx.density_ratio(h, "gan", out=h).log_ratio, want)


def test_invalid_rows_are_nan_and_do_not_wait():
    h = torch.randn(3, 40_000, device="cuda")
    h[1, 5] = float("nan")
    log_ratio = rx.density_ratio(h, "kl", dim=-1, nan_policy="propagate").log_ratio
    assert log_ratio[1].isnan().all() and log_ratio[[0, 2]].isfinite().all()


@pytest.mark.parametrize("method", rx.resampling.METHODS)
def test_draws_are_the_cpu_s(method):
    for n, num in ((5, 9), (4097, 3000), (300_000, 500_000)):
        weights = torch.rand(2, n)
        for log in (False, True):
            given = weights.log() if log else weights
            want = rx.resample(given, num, method, seed=3, log=log)
            assert torch.equal(rx.resample(given.cuda(), num, method, seed=3, log=log).cpu(), want)


def test_rejection_and_metropolis_are_the_cpu_s():
    log_ratio = torch.randn(100_000)
    want, got = (rx.rejection(x, seed=1) for x in (log_ratio, log_ratio.cuda()))
    assert torch.equal(got.keep.cpu(), want.keep) and torch.equal(got.log_bound.cpu(), want.log_bound)
    for chains in (1, 500):
        want, got = (rx.metropolis(x, 40, chains=chains, burn_in=3, seed=1) for x in (log_ratio, log_ratio.cuda()))
        assert torch.equal(got.cpu(), want)


def test_tensors_on_different_devices():
    with pytest.raises((ValueError, RuntimeError), match="base_weights must be on the same CUDA device"):
        rx.density_ratio(torch.randn(9).cuda(), base_weights=torch.ones(9))
