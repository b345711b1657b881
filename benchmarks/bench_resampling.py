"""Draws from the refined model: refine_ext against torch, NumPy, and the bytes that must move.

    python benchmarks/bench_resampling.py --out benchmarks/results/resampling_cpu.json

What must move stands in traffic.py. `limit` makes the same passes in torch: `weights.sum()` twice and a fill of the
result, or of the mask. No library has these ops; NumPy is a contender on the CPU, where it is what many use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from common import Case, normal, parser, run
from torch import Tensor
from traffic import draws_traffic

import refine_ext as rx
from refine_ext.resampling import METHODS


def torch_systematic(weights: Tensor, num: int, random: bool) -> Tensor:
    """Systematic or stratified resampling as particle filters in torch have it, in float64."""
    running = torch.cumsum(weights.double(), 0)
    points = torch.rand(num if random else 1, dtype=torch.float64, device=weights.device)
    points = points + torch.arange(num, device=weights.device)
    return torch.searchsorted(running, points * (running[-1] / num), right=True)


def torch_multinomial(weights: Tensor, num: int) -> Tensor:
    running = torch.cumsum(weights.double(), 0)
    points = torch.rand(num, dtype=torch.float64, device=weights.device) * running[-1]
    return torch.searchsorted(running, points, right=True)


def torch_residual(weights: Tensor, num: int) -> Tensor:
    expected = weights.double() * (num / weights.double().sum())
    copies = expected.floor()
    certain = torch.repeat_interleave(copies.long())
    rest = num - len(certain)
    running = torch.cumsum(expected - copies, 0)
    points = torch.rand(rest, dtype=torch.float64, device=weights.device) * running[-1]
    return torch.cat([certain, torch.searchsorted(running, points, right=True)])


def torch_rejection(log_ratio: Tensor) -> Tensor:
    d = log_ratio - log_ratio.max()
    f = d - torch.log1p(-torch.exp(d - 1e-6))
    return torch.rand_like(f) < torch.sigmoid(f)


def torch_metropolis(log_ratio: Tensor, num: int, chains: int, burn_in: int) -> Tensor:
    """All chains at once, one step at a time, as MH-GAN's own code does."""
    n, device = len(log_ratio), log_ratio.device
    state = torch.randint(n, (chains,), device=device)
    drawn = torch.empty((chains, num), dtype=torch.int64, device=device)
    for step in range(burn_in + num):
        proposal = torch.randint(n, (chains,), device=device)
        accept = torch.rand(chains, device=device).log() <= log_ratio[proposal] - log_ratio[state]
        state = torch.where(accept, proposal, state)
        if step >= burn_in:
            drawn[:, step - burn_in] = state
    return drawn


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


def _count_error(weights: Tensor, indices: Tensor) -> float:
    """The largest distance of a count from its expectation, in units of the deviation of a Poisson count beside one:
    below 1 for systematic draws, about 5 for ten million independent ones."""
    expected = weights.double() * (len(indices) / weights.double().sum())
    counts = torch.bincount(indices, minlength=len(weights))
    return ((counts - expected).abs() / (1 + expected).sqrt()).max().item()


def resample_case(
    method: str, n: int, num: int, device: str, dtype: torch.dtype = torch.float32, threads: int = 1
) -> Case:
    random_generator = np.random.default_rng(0)

    def inputs(random: torch.Generator) -> dict[str, Any]:
        weights = normal((n,), random).exp().to(dtype)
        result: dict[str, Any] = {"weights": weights, "log_weights": weights.log()}
        result["sink"] = torch.empty(num, dtype=torch.int64, device=weights.device)
        if method == "multinomial" and device == "cpu":
            p = weights.double().numpy()
            result["p"] = p / p.sum()
        return result

    def limit(s: dict[str, Any]) -> None:
        s["weights"].sum()
        s["weights"].sum()
        s["sink"].fill_(1)

    def searchsorted(s: dict[str, Any]) -> Tensor:
        if method == "multinomial":
            return torch_multinomial(s["weights"], num)
        if method == "residual":
            return torch_residual(s["weights"], num)
        return torch_systematic(s["weights"], num, method == "stratified")

    contenders: dict[str, Callable[[dict[str, Any]], Any]] = {
        "limit": limit,
        "refine_ext": lambda s: rx.resample(s["weights"], num, method, seed=0),
        "refine_ext_log": lambda s: rx.resample(s["log_weights"], num, method, seed=0, log=True),
        "searchsorted": searchsorted,
    }
    if method == "multinomial":
        if n < 2**24:  # torch's own limit
            contenders["torch.multinomial"] = lambda s: torch.multinomial(s["weights"], num, replacement=True)
        if device == "cpu":
            contenders["numpy choice"] = lambda s: random_generator.choice(n, size=num, p=s["p"])

    def accuracy(s: dict[str, Any]) -> dict[str, dict[str, float]]:
        ours = rx.resample(s["weights"], num, method, seed=0)
        errors = {"refine_ext": _count_error(s["weights"], ours)}
        return {"count_error": {**errors, "searchsorted": _count_error(s["weights"], searchsorted(s))}}

    return Case(
        op="resample",
        variant=f"{method} num={num}",
        dtype=dtype,
        shape=(n,),
        traffic=draws_traffic("resample", n, num, dtype.itemsize),
        inputs=inputs,
        contenders=contenders,
        capturable=("limit", "refine_ext", "refine_ext_log", *(() if method == "residual" else ("searchsorted",))),
        accuracy=accuracy,
        axes={"method": method, "num": num},
        threads=threads,
    )


def rejection_case(n: int, threads: int = 1) -> Case:
    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        log_ratio = normal((n,), random)
        return {"log_ratio": log_ratio, "mask": torch.empty(n, dtype=torch.bool, device=log_ratio.device)}

    def limit(s: dict[str, Tensor]) -> None:
        s["log_ratio"].sum()
        s["log_ratio"].sum()
        s["mask"].fill_(True)

    def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """How far the share of accepted samples is from its expectation, in standard deviations."""
        d = s["log_ratio"].double() - s["log_ratio"].double().max()
        p = torch.sigmoid(d - torch.log1p(-torch.exp(d - 1e-6)))
        deviation = (p * (1 - p)).sum().sqrt()
        got = {"refine_ext": rx.rejection(s["log_ratio"], seed=0).keep, "torch": torch_rejection(s["log_ratio"])}
        return {"acceptance_error": {name: ((x.sum() - p.sum()) / deviation).item() for name, x in got.items()}}

    return Case(
        op="rejection",
        variant="rejection",
        shape=(n,),
        traffic=draws_traffic("rejection", n, n, 4),
        inputs=inputs,
        contenders={
            "limit": limit,
            "refine_ext": lambda s: rx.rejection(s["log_ratio"], seed=0),
            "torch": lambda s: torch_rejection(s["log_ratio"]),
        },
        capturable=("limit", "refine_ext", "torch"),
        accuracy=accuracy,
        axes={"method": "rejection", "num": n},
        threads=threads,
    )


def metropolis_case(n: int, num: int, chains: int, burn_in: int, device: str) -> Case:
    def inputs(random: torch.Generator) -> dict[str, Any]:
        log_ratio = normal((n,), random)
        return {"log_ratio": log_ratio, **({"array": log_ratio.double().numpy()} if device == "cpu" else {})}

    contenders: dict[str, Callable[[dict[str, Any]], Any]] = {
        "refine_ext": lambda s: rx.metropolis(s["log_ratio"], num, chains=chains, burn_in=burn_in, seed=0),
        "torch": lambda s: torch_metropolis(s["log_ratio"], num, chains, burn_in),
    }
    if device == "cpu":
        contenders["numpy"] = lambda s: numpy_metropolis(s["array"], num, chains, burn_in)
    return Case(
        op="metropolis",
        variant=f"chains={chains} steps={num + burn_in}",
        shape=(n,),
        traffic=draws_traffic("metropolis", n, num * chains, 4),
        inputs=inputs,
        contenders=contenders,
        axes={"method": "metropolis", "num": num, "chains": chains, "burn_in": burn_in},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    if quick:
        sizes, decisions = [(4096, 4096), (100_000, 100_000)], [100_000]
    elif device == "cpu":
        sizes = [(64, 64), (4096, 4096), (10**6, 10**6), (10**7, 10**5), (1000, 10**6)]
        decisions = [1000, 10**6, 10**7]
    else:
        sizes = [(10**7, 10**7), (64, 64), (10**8, 10**6), (1000, 10**7)]
        decisions = [10**7, 64, 10**8]
    for n, num in sizes:
        for method in METHODS:
            yield resample_case(method, n, num, device)
    for n in decisions:
        yield rejection_case(n)
    yield metropolis_case(100_000, 100 if quick else 10_000, 1, 0, device)
    yield metropolis_case(100_000, 1, 100 if quick else 10_000, 64 if quick else 640, device)
    if device == "cuda":
        for method in METHODS:
            yield resample_case(method, 10_000 if quick else 10**7, 10_000 if quick else 10**7, device, torch.bfloat16)
    elif not quick and (cores := torch.get_num_threads()) > 1:
        for n in (10**6, 10**7):
            for method in METHODS:
                yield resample_case(method, n, n, device, threads=cores)
        yield rejection_case(10**7, threads=cores)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    run(arguments, "resampling", cases(arguments.device, arguments.quick))


if __name__ == "__main__":
    main()
