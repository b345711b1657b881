"""Density ratios with their normaliser: refine_ext against torch eager, torch.compile and a copy of the same bytes.

    python benchmarks/bench_density_ratio.py --out benchmarks/results/density_ratio_cpu.json

What torch users write is restated here as well as we can: logsumexp for `kl`, for the others a safeguarded Newton
search for the shift, to the same tolerance, that stops as soon as it is met. Bytes that must move for n float32
samples: 12 n for `kl` (read, read, write), 16 n for the others (one more read); a copy moves 8 n.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, parser, save
from torch import Tensor

import refine_ext as rx

FAMILIES = (
    "kl",
    "reverse_kl",
    "jensen_shannon",
    "gan",
    "pearson_chi2",
    "neyman_chi2",
    "squared_hellinger",
    "jeffreys",
    "alpha:0.3",
)
TOLERANCE = 1e-6


def _lambert_w_exp(s: Tensor) -> Tensor:
    """W(e^s), by Newton on w + log w = s."""
    w = torch.where(s > 1, s, (s - 1).exp().clamp_min(1e-30))
    for _ in range(6):
        w = (w * (1 + s - w.log()) / (1 + w)).clamp_min(1e-30)
    return w


# r(t) and its derivative, as one would type them from the table of f-divergences.
FORMULAS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "reverse_kl": lambda t: (-1 / t, 1 / t**2),
    "jensen_shannon": lambda t: ((r := t.exp() / (2 - t.exp())), r + r * r),
    "gan": lambda t: ((r := t.exp() / (1 - t.exp())), r + r * r),
    "pearson_chi2": lambda t: ((1 + t / 2).clamp_min(0), 0.5 * (t > -2)),
    "neyman_chi2": lambda t: ((1 - t) ** -0.5, 0.5 * (1 - t) ** -1.5),
    "squared_hellinger": lambda t: ((1 - t) ** -2, 2 * (1 - t) ** -3),
    "jeffreys": lambda t: ((w := 1 / _lambert_w_exp(1 - t)), w * w / (1 + w)),
    "alpha:0.3": lambda t: ((1 - 0.7 * t) ** (-1 / 0.7), (1 - 0.7 * t) ** (-1 / 0.7 - 1)),
}
SUPREMUM = {"reverse_kl": 0.0, "jensen_shannon": math.log(2), "gan": 0.0, "neyman_chi2": 1.0}
SUPREMUM |= {"squared_hellinger": 1.0, "alpha:0.3": 1 / 0.7}
TANGENT = {"reverse_kl": -1.0, "gan": -math.log(2)}


def torch_ratio(h: Tensor, family: str, *, step: Callable | None = None) -> Tensor:
    """The ratio in torch operations: closed form for kl, else safeguarded Newton for the shift."""
    if family == "kl":
        return torch.exp(h - (torch.logsumexp(h, 0) - math.log(h.numel())))
    formula = FORMULAS[family]

    def evaluate(h: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ratio, slope = formula(h - shift)
        return ratio, ratio.mean(), slope.mean()

    evaluate = step or evaluate
    top = h.max()
    low = top - SUPREMUM[family] if family in SUPREMUM else h.min() - TANGENT.get(family, 0.0)
    high = top - TANGENT.get(family, 0.0)
    shift = 0.5 * (low + high)
    for _ in range(60):
        ratio, mean, slope = evaluate(h, shift)
        if abs(mean.item() - 1) < TOLERANCE:
            break
        low, high = (shift, high) if mean > 1 else (low, shift)
        shift = shift + (mean - 1) / slope
        if not low < shift < high:
            shift = 0.5 * (low + high)
    return ratio


def compiled_steps() -> dict[str, Callable]:
    """One Newton evaluation of each family, compiled; kl is compiled whole."""
    torch._dynamo.config.recompile_limit = 64  # every family is a version of the same function
    steps: dict[str, Callable] = {}
    for family, formula in FORMULAS.items():

        def evaluate(h, shift, formula=formula):
            ratio, slope = formula(h - shift)
            return ratio, ratio.mean(), slope.mean()

        steps[family] = torch.compile(evaluate, dynamic=True)
    steps["kl"] = torch.compile(lambda h: torch.exp(h - (torch.logsumexp(h, 0) - math.log(h.numel()))), dynamic=True)
    return steps


def contenders(h: Tensor, family: str, step: Callable) -> dict[str, Callable[[], Any]]:
    wide, out, target = h.double(), torch.empty_like(h), torch.empty_like(h)
    for _ in range(2):  # compiling is not what is measured
        step(h) if family == "kl" else step(h, h.max() + 1)
    return {
        "copy": lambda: target.copy_(h),
        "refine_ext": lambda: rx.density_ratio(h, family, output="ratio", out=out),
        "refine_ext_fresh": lambda: rx.density_ratio(h, family, output="ratio"),
        "eager": lambda: torch_ratio(h, family),
        "eager_float64": lambda: torch_ratio(wide, family),
        "compile": (lambda: step(h)) if family == "kl" else lambda: torch_ratio(h, family, step=step),
    }


def measure(
    sizes: list[int], threads: int, compiled: dict[str, Callable], families: tuple[str, ...] = FAMILIES
) -> list[dict]:
    torch.set_num_threads(threads)
    rows = []
    for n in sizes:
        h = torch.randn(n, generator=torch.Generator().manual_seed(0))
        for family in families:
            timed = interleaved(contenders(h, family, compiled[family]), budget=4.0)
            errors = {
                "refine_ext": rx.density_ratio(h, family, output="ratio").ratio.double().mean().item() - 1,
                "eager": torch_ratio(h, family).double().mean().item() - 1,
            }
            rows.append({"n": n, "threads": threads, "divergence": family, "time": timed, "mean_error": errors})
            seconds = {name: value["seconds"] for name, value in timed.items()}
            ours = seconds["refine_ext"]
            moved = (12 if family == "kl" else 16) / 8
            print(
                f"n={n:<9} threads={threads} {family:18} {ours * 1e6:10.1f} us   "
                f"copy bandwidth x{moved * seconds['copy'] / ours:5.2f}   eager x{seconds['eager'] / ours:6.1f}   "
                f"f64 x{seconds['eager_float64'] / ours:6.1f}   compile x{seconds['compile'] / ours:6.1f}   "
                f"mean error {errors['refine_ext']:+.1e} (eager {errors['eager']:+.1e})",
                flush=True,
            )
    return rows


def measure_bound(family: str) -> dict:
    """Backward of the bound against its forward at 1e6."""
    real, fake = torch.randn(10**6), torch.randn(10**6, requires_grad=True)
    value = rx.variational_bound(real, fake, family)
    return interleaved(
        {
            "forward": lambda: rx.variational_bound(real, fake, family),
            "backward": lambda: torch.autograd.grad(value, fake, retain_graph=True),
        },
        repeats=15,
    )


def measure_calls() -> dict:
    """64-element calls, and the backward of the bound against its forward at 1e6."""
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
    bounds = {family: measure_bound(family) for family in ("kl", "jensen_shannon", "pearson_chi2")}
    print("64 elements:", {k: f"{v['seconds'] * 1e6:.1f} us" for k, v in calls.items()})
    for family, timed in bounds.items():
        ratio = timed["backward"]["seconds"] / timed["forward"]["seconds"]
        print(f"variational_bound {family}: backward / forward = {ratio:.2f}")
    return {"small_call": calls, "bound_backward": bounds}


def measure_simd() -> dict:
    """Seconds at 1e6, one thread, for each instruction set that this CPU runs, in turns."""
    script = (
        "import sys, torch, refine_ext as rx; from common import interleaved; torch.set_num_threads(1);"
        "h = torch.randn(10**6); out = torch.empty_like(h);"
        "t = interleaved({f: (lambda f=f: rx.density_ratio(h, f, output='ratio', out=out)) for f in sys.argv[1:]});"
        "print(*[t[f]['seconds'] for f in sys.argv[1:]])"
    )
    families = ("kl", "jensen_shannon", "pearson_chi2", "squared_hellinger")
    best: dict[str, list[float]] = {}
    for _ in range(3):
        for level in rx._C.build_info()["simd_compiled"]:
            environment = {**os.environ, "REFINE_EXT_SIMD": level}
            done = subprocess.run(
                [sys.executable, "-c", script, *families],
                capture_output=True,
                text=True,
                check=True,
                env=environment,
                cwd=os.path.dirname(__file__),
            )
            times = [float(x) for x in done.stdout.split()]
            best[level] = [min(a, b) for a, b in zip(best.get(level, times), times, strict=True)]
    for level, times in best.items():
        print(f"SIMD {level}:", {f: f"{t * 1e6:.0f} us" for f, t in zip(families, times, strict=True)})
    return {level: dict(zip(families, times, strict=True)) for level, times in best.items()}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    sizes = [10**2, 10**5] if arguments.quick else [10**k for k in range(2, 8)]
    cores = torch.get_num_threads()
    compiled = compiled_steps()
    calls = measure_calls()
    simd = measure_simd()
    rows = measure(sizes, 1, compiled)
    if cores > 1 and not arguments.quick:
        rows += measure([10**7], cores, compiled, ("kl", "jensen_shannon", "pearson_chi2", "squared_hellinger"))
    torch.set_num_threads(cores)
    save(arguments.out, "density_ratio", rows, calls=calls, simd=simd)


if __name__ == "__main__":
    main()
