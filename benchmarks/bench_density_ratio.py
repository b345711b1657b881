"""Density ratios with their normaliser: refine_ext against torch eager, torch.compile and a copy of as many samples.

    python benchmarks/bench_density_ratio.py --out benchmarks/results/density_ratio_cpu.json

What torch users write is restated in torch_density_ratio.py; what must move stands in traffic.py. `refine_ext` writes
into a given output, `refine_ext_fresh` into a new one. On a GPU a name with `_graph` is the same call in a CUDA graph.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Case, normal, parser, run
from timing import interleaved
from torch import Tensor
from torch_density_ratio import FAMILIES, FORMULAS, compiled_ratio, torch_ratio
from traffic import traffic

import refine_ext as rx
from refine_ext._ops import ops
from refine_ext.divergence import parse_divergence

TYPICAL = ("kl", "jensen_shannon", "pearson_chi2", "squared_hellinger")


def _mean_error(ratio: Tensor) -> float:
    """The mean ratio − 1, of the row where it is largest."""
    error = ratio.double().mean(-1).reshape(-1) - 1
    return error[error.abs().argmax()].item()


def ratio_case(shape: tuple[int, ...], family: str, dtype: torch.dtype, compiled: bool, threads: int = 1) -> Case:
    rows = len(shape) > 1
    dim = -1 if rows else None

    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        h = normal(shape, random, dtype)
        wide = {"wide": h.double()} if dtype == torch.float32 else {}
        return {"h": h, "out": torch.empty_like(h), **wide}

    contenders: dict[str, Callable[[Any], Any]] = {
        "refine_ext": lambda s: rx.density_ratio(s["h"], family, dim=dim, output="ratio", out=s["out"]),
        "refine_ext_fresh": lambda s: rx.density_ratio(s["h"], family, dim=dim, output="ratio"),
        "eager": lambda s: torch_ratio(s["h"], family),
    }
    if dtype == torch.float32:
        contenders["eager_float64"] = lambda s: torch_ratio(s["wide"], family)
    if family == "kl":
        contenders["softmax"] = lambda s: torch.softmax(s["h"], -1) * shape[-1]
    if compiled:
        contenders["compile"] = lambda s: compiled_ratio(s["h"], family)

    def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        ours = rx.density_ratio(s["h"], family, dim=dim, output="ratio").ratio
        return {"mean_error": {"refine_ext": _mean_error(ours), "eager": _mean_error(torch_ratio(s["h"], family))}}

    short = rows and shape[-1] <= 16384  # what a block keeps in its caches
    return Case(
        op="density_ratio",
        variant=f"{family} rows" if rows else family,
        dtype=dtype,
        shape=shape,
        traffic=traffic("density_ratio", math.prod(shape), dtype.itemsize, "rows" if short else family),
        inputs=inputs,
        contenders=contenders,
        capturable=("refine_ext", "refine_ext_fresh", *(("eager", "softmax") if family == "kl" else ())),
        accuracy=accuracy,
        axes={"divergence": family},
        threads=threads,
    )


def given_shift_case(n: int, family: str) -> Case:
    """The shift of an earlier sample, which makes each ratio a function of its own output."""

    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        h = normal((n,), random)
        return {"h": h, "out": torch.empty_like(h), "shift": rx.density_ratio(h, family).shift + 0.01}

    def eager(s: dict[str, Tensor]) -> Tensor:
        return FORMULAS[family](s["h"] - s["shift"].float())[0]

    def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        want = FORMULAS[family](s["h"].double() - s["shift"])[0]
        ours = rx.density_ratio(s["h"], family, shift=s["shift"], output="ratio").ratio

        def largest(got: Tensor) -> float:
            return (got.double() / want - 1).abs()[want > 0].max().item()

        return {"relative_error": {"refine_ext": largest(ours), "eager": largest(eager(s))}}

    def ours(s: dict[str, Tensor]) -> Any:
        return rx.density_ratio(s["h"], family, shift=s["shift"], output="ratio", out=s["out"])

    return Case(
        op="density_ratio",
        variant=f"{family} given shift",
        shape=(n,),
        traffic=traffic("density_ratio", n, 4, "given"),
        inputs=inputs,
        contenders={"refine_ext": ours, "eager": eager},
        capturable=("refine_ext", "eager"),
        accuracy=accuracy,
    )


def backward_case(n: int, family: str) -> Case:
    """Gradient of log-ratios: through the op itself, through autograd, and the implicit function theorem in torch."""
    code, alpha = parse_divergence("benchmark", family, "variational")

    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        h = normal((n,), random).requires_grad_()
        log_ratio, stats = ops.density_ratio.default(h, None, None, code, alpha, False, False)
        grad = normal((n,), random)
        return {"h": h, "log_ratio": log_ratio, "stats": stats, "grad": grad, "grad_stats": torch.zeros_like(stats)}

    def ours(s: dict[str, Tensor]) -> Tensor:
        saved = s["log_ratio"].detach(), s["stats"].detach()
        return ops.density_ratio_backward.default(s["grad"], s["grad_stats"], *saved, None, True, code, alpha)

    def eager(grad: Tensor, log_ratio: Tensor) -> Tensor:
        # d log r / dh = k (1 - ...): k = 1 for kl, 1 + r for jensen_shannon.
        ratio = log_ratio.exp()
        factor = torch.ones_like(ratio) if family == "kl" else 1 + ratio
        return factor * (grad - ratio * ((factor * grad).sum() / (ratio * factor).sum()))

    def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        log_ratio = s["log_ratio"].detach()
        want = eager(s["grad"].double(), log_ratio.double())
        got = {"refine_ext": ours(s), "eager": eager(s["grad"], log_ratio)}
        return {"absolute_error": {name: (x.double() - want).abs().max().item() for name, x in got.items()}}

    return Case(
        op="density_ratio_backward",
        variant=family,
        shape=(n,),
        traffic=traffic("density_ratio_backward", n, 4),
        inputs=inputs,
        contenders={
            "refine_ext": ours,
            "refine_ext_autograd": lambda s: torch.autograd.grad(s["log_ratio"], s["h"], s["grad"], retain_graph=True),
            "eager": lambda s: eager(s["grad"], s["log_ratio"].detach()),
        },
        capturable=("refine_ext", "eager"),
        accuracy=accuracy,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64

    def ratio(shape: tuple[int, ...], family: str, dtype: torch.dtype = f32, threads: int = 1) -> Case:
        # Compiling takes seconds a family and dtype, for all of which a GPU's minutes are too short.
        compiled = family in TYPICAL if device == "cuda" else dtype == f32
        return ratio_case(shape, family, dtype, compiled and not quick, threads)

    if quick:
        for n in (100, 100_000):
            for family in TYPICAL[:3]:
                yield ratio((n,), family)
        yield ratio((20_000,), "kl", bf16)
    elif device == "cpu":
        for n in (10**k for k in range(2, 8)):
            for family in FAMILIES:
                yield ratio((n,), family)
        if (cores := torch.get_num_threads()) > 1:
            for family in TYPICAL:
                yield ratio((10**7,), family, threads=cores)
    else:  # what a run that is cut short must have comes first
        for n in (10**7, 64, 10**8):
            for family in FAMILIES:
                yield ratio((n,), family)
    medium, large = (20_000, 20_000) if quick else (10**6, 10**6) if device == "cpu" else (10**7, 10**8)
    for family in ("kl", "jensen_shannon"):
        yield given_shift_case(large, family)
        yield backward_case(large, family)
        yield ratio((medium // 1000, 1000), family)
        if device == "cuda":
            yield ratio((medium // 64, 64), family)
            yield ratio((100, medium // 100), family)
            yield ratio((medium,), family, f64)
    if device == "cuda" and not quick:
        for n in (10**8, 64, 10**5):
            for family in FAMILIES if n == 10**8 else TYPICAL:
                yield ratio((n,), family, bf16)
        for n in (10**5, 10**6):
            for family in FAMILIES:
                yield ratio((n,), family)


def measure_calls() -> dict:
    """64-element calls on the CPU, where they are Python and dispatch."""
    torch.set_num_threads(1)
    small = torch.randn(64)
    out = torch.empty_like(small)
    calls = interleaved(
        {
            "softmax": lambda: torch.softmax(small, 0),
            "refine_ext": lambda: rx.density_ratio(small),
            "refine_ext_out": lambda: rx.density_ratio(small, out=out),
            "eager": lambda: torch_ratio(small, "kl"),
        },
        repeats=50,
    )
    print("64 elements:", {k: f"{v['seconds'] * 1e6:.1f} us" for k, v in calls.items()})
    return calls


def measure_simd() -> dict:
    """Seconds at 1e6, one thread, for each instruction set that this CPU runs, in turns."""
    script = (
        "import sys, torch, refine_ext as rx; from timing import interleaved; torch.set_num_threads(1);"
        "h = torch.randn(10**6); out = torch.empty_like(h);"
        "t = interleaved({f: (lambda f=f: rx.density_ratio(h, f, output='ratio', out=out)) for f in sys.argv[1:]});"
        "print(*[t[f]['seconds'] for f in sys.argv[1:]])"
    )
    best: dict[str, list[float]] = {}
    for _ in range(3):
        for level in rx._C.build_info()["simd_compiled"]:
            environment = {**os.environ, "REFINE_EXT_SIMD": level}
            done = subprocess.run(
                [sys.executable, "-c", script, *TYPICAL],
                capture_output=True,
                text=True,
                check=True,
                env=environment,
                cwd=os.path.dirname(__file__),
            )
            times = [float(x) for x in done.stdout.split()]
            best[level] = [min(a, b) for a, b in zip(best.get(level, times), times, strict=True)]
    for level, times in best.items():
        print(f"SIMD {level}:", {f: f"{t * 1e6:.0f} us" for f, t in zip(TYPICAL, times, strict=True)})
    return {level: dict(zip(TYPICAL, times, strict=True)) for level, times in best.items()}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    extra = {}
    if arguments.device == "cpu" and not arguments.quick:
        every = torch.get_num_threads()
        extra = {"calls": {"small_call": measure_calls()}, "simd": measure_simd()}
        torch.set_num_threads(every)
    run(arguments, "density_ratio", cases(arguments.device, arguments.quick), **extra)


if __name__ == "__main__":
    main()
