"""Draws from the refined model: refine_ext against torch, NumPy, and the bytes that must move.

    python benchmarks/bench_resampling.py --out benchmarks/results/resampling_cpu.json

Bytes that must move for float32 weights: 8 n + 8 num for resampling (the weights are read for their sum and again for
the draws; an index is 8 bytes), 9 n for rejection (read, read, one byte of decision). The limit is measured:
`weights.sum()` twice and a fill of the result, or of the mask. Multinomial draws come in random order
and add two reads at random places per draw.
"""

from __future__ import annotations

import numpy as np
import torch
from common import interleaved, parser, save
from torch import Tensor

import refine_ext as rx
from refine_ext.resampling import METHODS


def torch_systematic(weights: Tensor, num: int, random: bool) -> Tensor:
    """Systematic or stratified resampling as particle filters in torch have it, in float64."""
    running = torch.cumsum(weights.double(), 0)
    points = torch.rand(num if random else 1, dtype=torch.float64) + torch.arange(num)
    return torch.searchsorted(running, points * (running[-1] / num), right=True)


def torch_residual(weights: Tensor, num: int) -> Tensor:
    expected = weights.double() * (num / weights.double().sum())
    copies = expected.floor()
    certain = torch.repeat_interleave(copies.long())
    rest = num - len(certain)
    running = torch.cumsum(expected - copies, 0)
    points = torch.rand(rest, dtype=torch.float64) * running[-1]
    return torch.cat([certain, torch.searchsorted(running, points, right=True)])


def torch_rejection(log_ratio: Tensor) -> Tensor:
    d = log_ratio - log_ratio.max()
    f = d - torch.log1p(-torch.exp(d - 1e-6))
    return torch.rand_like(f) < torch.sigmoid(f)


def numpy_metropolis(log_ratio: np.ndarray, num: int, chains: int, burn_in: int) -> np.ndarray:
    """All chains at once, one NumPy step at a time."""
    random = np.random.default_rng(0)
    state = random.integers(len(log_ratio), size=chains)
    drawn = np.empty((chains, num), dtype=np.int64)
    for step in range(burn_in + num):
        proposal = random.integers(len(log_ratio), size=chains)
        accept = np.log(random.random(chains)) <= log_ratio[proposal] - log_ratio[state]
        state = np.where(accept, proposal, state)
        if step >= burn_in:
            drawn[:, step - burn_in] = state
    return drawn


def contenders(method: str, weights: Tensor, num: int) -> dict:
    log_weights = weights.log()
    array, generator = weights.double().numpy(), np.random.default_rng(0)
    p = array / array.sum()
    sink = torch.empty(num, dtype=torch.int64)

    def limit() -> None:
        weights.sum()
        weights.sum()
        sink.fill_(1)

    result = {
        "limit": limit,
        "refine_ext": lambda: rx.resample(weights, num, method, seed=0),
        "refine_ext_log": lambda: rx.resample(log_weights, num, method, seed=0, log=True),
    }
    if method == "multinomial":
        if len(weights) < 2**24:  # torch's own limit
            result["torch.multinomial"] = lambda: torch.multinomial(weights, num, replacement=True)
        result["numpy choice"] = lambda: generator.choice(len(p), size=num, p=p)
        result["searchsorted"] = lambda: torch.searchsorted(
            torch.cumsum(weights.double(), 0), torch.rand(num, dtype=torch.float64) * weights.double().sum(), right=True
        )
    elif method == "residual":
        result["searchsorted"] = lambda: torch_residual(weights, num)
    else:
        result["searchsorted"] = lambda: torch_systematic(weights, num, method == "stratified")
    return result


def report(row: dict) -> None:
    times = {name: value["seconds"] for name, value in row["time"].items()}
    ours = times["refine_ext"]
    others = "   ".join(f"{name} x{value / ours:.2f}" for name, value in times.items() if name != "refine_ext")
    print(
        f"{row['method']:12} n={row['n']:<9} num={row['num']:<9} threads={row['threads']} "
        f"{ours * 1e6:10.1f} us   {others}",
        flush=True,
    )


def measure_resample(sizes: list[tuple[int, int]], threads: int) -> list[dict]:
    torch.set_num_threads(threads)
    rows = []
    for n, num in sizes:
        weights = torch.randn(n, generator=torch.Generator().manual_seed(0)).exp()
        for method in METHODS:
            timed = interleaved(contenders(method, weights, num), budget=4.0)
            rows.append({"method": method, "n": n, "num": num, "threads": threads, "time": timed})
            report(rows[-1])
    return rows


def rejection_contenders(log_ratio: Tensor) -> dict:
    mask = torch.empty(len(log_ratio), dtype=torch.bool)

    def limit() -> None:
        log_ratio.sum()
        log_ratio.sum()
        mask.fill_(True)

    return {
        "limit": limit,
        "refine_ext": lambda: rx.rejection(log_ratio, seed=0),
        "torch": lambda: torch_rejection(log_ratio),
    }


def metropolis_contenders(log_ratio: Tensor, num: int, chains: int, burn_in: int) -> dict:
    array = log_ratio.double().numpy()
    return {
        "refine_ext": lambda: rx.metropolis(log_ratio, num, chains=chains, burn_in=burn_in, seed=0),
        "numpy": lambda: numpy_metropolis(array, num, chains, burn_in),
    }


def measure_decisions(sizes: list[int], threads: int) -> list[dict]:
    torch.set_num_threads(threads)
    rows = []
    for n in sizes:
        log_ratio = torch.randn(n, generator=torch.Generator().manual_seed(0))
        timed = interleaved(rejection_contenders(log_ratio), budget=4.0)
        rows.append({"method": "rejection", "n": n, "num": n, "threads": threads, "time": timed})
        report(rows[-1])
    log_ratio = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for chains, num, burn_in in ((1, 10_000, 0), (10_000, 1, 640)):
        timed = interleaved(metropolis_contenders(log_ratio, num, chains, burn_in), budget=4.0)
        row = {"method": "metropolis", "n": 100_000, "num": num, "chains": chains, "burn_in": burn_in}
        rows.append({**row, "threads": threads, "time": timed})
        report(rows[-1])
    return rows


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    sizes = [(64, 64), (4096, 4096), (1_000_000, 1_000_000), (10_000_000, 100_000), (1000, 1_000_000)]
    every = torch.get_num_threads()
    if arguments.quick:
        rows = measure_resample([(4096, 4096), (100_000, 100_000)], 1) + measure_decisions([100_000], 1)
    else:
        rows = measure_resample(sizes, 1) + measure_decisions([1000, 1_000_000, 10_000_000], 1)
        rows += measure_resample([(1_000_000, 1_000_000), (10_000_000, 10_000_000)], every)
        rows += measure_decisions([10_000_000], every)
    save(arguments.out, "resampling", rows)


if __name__ == "__main__":
    main()
