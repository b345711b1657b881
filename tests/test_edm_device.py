"""sample_edm and the device: no step waits for it, one graph of torch.compile for all of them, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from edm_reference import denoiser, images, logit
from host_reads import HostReads
from torch import nn

import refine_ext as rx


@pytest.mark.parametrize("boosting", [False, True])
def test_no_step_waits_for_the_device(boosting):
    """No value is read on the way: the check for NaN, which on the CPU reads at once, is off here."""
    guide = rx.Guide(logit, weight=lambda sigma: 1 + sigma, shift=torch.log1p, check=False, sigma_min=0.01)
    reads, evaluations = HostReads(), 0

    def net(x, sigma):
        nonlocal evaluations
        evaluations += 1
        if evaluations == 1:
            reads.__enter__()  # from the first evaluation on; the levels are worked out before
        return denoiser(x, sigma)

    seeds = torch.arange(4)
    try:
        rx.sample_edm(net, images(), num_steps=7, S_churn=2.0, seed=seeds, discriminator=guide, boosting=boosting)
    finally:
        reads.__exit__(None, None, None)
    assert evaluations == 13 and not reads.names


class SmallNet(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, out))

    def forward(self, x, sigma):
        return self.body(torch.cat([x / (1 + sigma[:, None]), sigma[:, None].log()], 1))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_whole_guided_step_compiles_into_one_graph(backend):
    """Network, discriminator, its gradient, factor and update with noise; no recompilation at another step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, guide = SmallNet(4), rx.Guide(SmallNet(1), sigma_min=0.01, sigma_max=50.0)

    def step(x, sigma, coefficients, seeds):
        denoised = net(x, sigma)
        output = guide(x, sigma)
        factor = guide.factor(output.h, sigma)
        return rx.guided_step(x, [denoised, output.gradient], coefficients, factor=factor, seed=seeds, step=1)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    for level in (5.0, 1.0, 60.0):
        x, seeds = torch.randn(6, 4), torch.arange(6)
        sigma = torch.full((6,), level)
        row = torch.tensor([0.8, 0.2, 0.2 * level**2, 0.1], dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, sigma, row, seeds), step(x, sigma, row, seeds), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_whole_trajectory_compiles_into_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, guide = SmallNet(4), rx.Guide(SmallNet(1))
    seeds, noise = torch.arange(3), torch.randn(3, 4)

    def run(noise, seeds):
        options = {"num_steps": 3, "S_churn": 1.0, "dtype": torch.float32}
        return rx.sample_edm(net, noise, discriminator=guide, seed=seeds, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(noise, seeds), run(noise, seeds), rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
def test_a_whole_guided_trajectory_as_a_cuda_graph():
    """Captured once with a compiled network; replays read the noise and the seeds that then lie in their tensors."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device("cuda"):
        net, disc = torch.compile(SmallNet(4), fullgraph=True), SmallNet(1)
        noise, seeds = torch.randn(32, 4), torch.arange(32)
    guide = rx.Guide(disc)
    options = {"num_steps": 6, "S_churn": 3.0, "boosting": True, "weight": 2.0, "dtype": torch.float32}

    def run():
        return rx.sample_edm(net, noise, discriminator=guide, seed=seeds, **options)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, loads kernels, looks at the first outputs
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    results = []
    for change in (0, 1, 1):
        noise.add_(0.01 * change)
        seeds.add_(100 * change)
        captured.fill_(torch.nan)
        graph.replay()
        results.append(captured.clone())
        guide.finish()
        # The same kernels in the same order; matrix products may take another algorithm in a graph: a few roundings.
        torch.testing.assert_close(results[-1], run(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


@pytest.mark.cuda
def test_no_step_waits_on_cuda():
    noise, seeds = images().cuda(), torch.arange(4, device="cuda")
    guide = rx.Guide(logit)
    options = {"num_steps": 6, "S_churn": 3.0, "boosting": True, "seed": seeds, "discriminator": guide}
    rx.sample_edm(denoiser, noise, **options)
    finish, guide.finish = guide.finish, lambda: None  # the one that waits, at the end
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = rx.sample_edm(denoiser, noise, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    finish()
    want = rx.sample_edm(denoiser, noise.cpu(), **{**options, "seed": seeds.cpu(), "discriminator": logit})
    torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)
