"""Gaussian log-mixtures: refine_ext against distances and matrix products with logsumexp, KeOps, scikit-learn.

    python benchmarks/bench_log_mixture.py --out benchmarks/results/log_mixture_cpu.json

Two regimes. `dense`: exponents of a few, most centres count. `peaked`: draws of a diffusion, z = a y_i + s noise, of
which few centres count, in many dimensions one. Contenders make the matrix of all pairs, but `attention` (torch's fused
kernel, which keeps a log-sum-exp), `keops` and `sklearn` (KernelDensity, a tree). Rates are pairs (x_i, y_j) a second;
`limits` has what a matrix product and exp alone would do. Errors: of the worst row, |L - L64| / max(1, |L64|), and the
same with data and samples moved by 1000. A first run compiles KeOps' formulas, a minute; --resume goes on with a run of
the same commit that was cut short.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch_log_mixture as forms
from common import Case, normal, parser, run
from timing import interleaved
from torch import Tensor
from torch_rademacher import at_precision
from traffic import mixture_traffic

import refine_ext as rx
from refine_ext import _C

ops = torch.ops.refine_ext
OFFSET = 1000.0
Form = Callable[[Tensor, Tensor, Tensor], Tensor]
# (M, N, d): the matrix of all pairs fits beside others, and a device has something to do.
SIZES = {
    "cpu": ((4096, 4096, 2), (4096, 4096, 16), (4096, 4096, 64), (2000, 2000, 784)),
    "cuda": ((65536, 65536, 2), (32768, 32768, 16), (16384, 16384, 64), (16384, 16384, 784)),
}
A_TERM = (60_000, 60_000, 784)  # one draw of the bound's data term, of a set as large as MNIST
SMALL = ((16, 16, 2), (64, 64, 16), (1, 1000, 2), (256, 256, 64))
SIGNAL = 0.95  # of a peaked row, z = SIGNAL y + scale noise
PEAK = {2: 0.1, 16: 0.3, 64: 0.3, 784: 0.3}


def scale_of(regime: str, d: int) -> float:
    """Dense: |x - y|^2 / (2 s^2) is about 4, of normal x and y."""
    return (d / 4) ** 0.5 if regime == "dense" else PEAK[d]


def _inputs(
    m: int, n: int, d: int, regime: str, keops: bool, backward: bool
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        y = normal((n, d), random)
        s = torch.tensor(scale_of(regime, d), device=y.device)
        x = normal((m, d), random)
        if regime == "peaked":
            x = SIGNAL * y[torch.arange(m, device=y.device) % n] + s * x
        found = {"x": x, "y": y, "s": s}
        if keops:
            _warm_keops(found, backward)
        return found

    return inputs


def _warm_keops(s: dict[str, Tensor], backward: bool) -> None:
    """Compiles the formula, and holds KeOps to torch's number of threads: its OpenMP is not torch's."""
    import pykeops
    from threadpoolctl import threadpool_limits

    pykeops.set_verbose(False)
    if backward:
        _gradients(forms.by_keops, s)
    else:
        forms.by_keops(s["x"], s["y"], s["s"])
    threadpool_limits(torch.get_num_threads())


def _sklearn(s: dict[str, Tensor]) -> Callable[[], Tensor]:
    from sklearn.neighbors import KernelDensity

    x, y = s["x"].numpy(), s["y"].numpy()
    constant = float(
        torch.log(torch.tensor(len(y))) + 0.5 * y.shape[1] * torch.log(2 * torch.pi * s["s"].double() ** 2)
    )
    density = KernelDensity(bandwidth=float(s["s"])).fit(y)
    return lambda: torch.from_numpy(density.score_samples(x) + constant)


def _once(make: Callable[[dict[str, Tensor]], Callable[[], Tensor]]) -> Callable[[dict[str, Tensor]], Tensor]:
    """Prepared at the first call."""
    made: dict[int, Callable[[], Tensor]] = {}

    def call(s: dict[str, Tensor]) -> Tensor:
        if id(s) not in made:
            made[id(s)] = make(s)
        return made[id(s)]()

    return call


def _applied(form: Form) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda s: form(s["x"], s["y"], s["s"])


def _ours(s: dict[str, Tensor]) -> Tensor:
    """Without the weights 1 / N, as the others are."""
    return rx.log_mixture(s["x"], s["y"], s["s"], log_weights=s["x"].new_zeros(len(s["y"])))


def _ours_op(s: dict[str, Tensor]) -> Tensor:
    return ops.log_mixture(s["x"], s["y"], s["s"], None, None, False, False)[0]


def reference(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """In float64, in blocks."""
    x, y, s = x.double(), y.double(), s.double()
    rows = max(1, 2**24 // y.numel())
    return torch.cat([forms.by_differences(part, y, s) for part in x.split(rows)])


def _errors(found: dict[str, Callable[[dict[str, Tensor]], Tensor]], s: dict[str, Tensor]) -> dict[str, float]:
    want = reference(s["x"], s["y"], s["s"])
    scale = want.abs().clamp(min=1)
    return {name: ((form(s).double() - want) / scale).abs().max().item() for name, form in found.items()}


def _axes(what: str, m: int, n: int, d: int, regime: str) -> dict[str, Any]:
    simd = _C.build_info()["simd_level"]
    return {"what": what, "m": m, "centers": n, "d": d, "regime": regime, "scale": scale_of(regime, d), "simd": simd}


def _case(op: str, what: str, size: tuple[int, int, int], regime: str, **rest: Any) -> Case:
    m, n, d = size
    return Case(
        op=op,
        variant=f"{what} {regime} N={n}",
        shape=(m, d),
        traffic=mixture_traffic(m, n, d, 4),
        axes=_axes(what, m, n, d, regime),
        **rest,
    )


def forward_case(
    size: tuple[int, int, int],
    regime: str = "dense",
    *,
    device: str = "cpu",
    compiled: bool = False,
    libraries: bool = False,
    threads: int = 1,
    budget: float | None = None,
) -> Case:
    m, n, d = size
    keops = libraries and d <= 64
    contenders: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        "refine_ext": _ours,
        "refine_ext_op": _ours_op,
        "cdist": _applied(forms.by_cdist),
        "matmul": _applied(forms.by_matmul),
        "matmul medium": _applied(at_precision("medium", forms.by_matmul)),
        "attention": _applied(forms.by_attention),
    }
    if compiled:
        contenders["compile"] = _applied(torch.compile(forms.by_matmul))
        contenders["compile medium"] = _applied(at_precision("medium", torch.compile(forms.by_matmul)))
        if d <= 16:
            contenders["compile differences"] = _applied(torch.compile(forms.by_differences))
    if keops:
        contenders["keops"] = _applied(forms.by_keops)
    if libraries and device == "cpu":
        contenders["sklearn"] = _once(_sklearn)

    def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        compared = {k: f for k, f in contenders.items() if not k.startswith("compile") and k != "refine_ext_op"}
        # Few rows: the reference is a loop.
        few = {**s, "x": s["x"][:256]}
        moved = {**few, "x": few["x"] + OFFSET, "y": few["y"] + OFFSET}
        return {"worst_error": _errors(compared, few), "offset_error": _errors(compared, moved)}

    return _case(
        "log_mixture",
        "value",
        size,
        regime,
        inputs=_inputs(m, n, d, regime, keops, False),
        contenders=contenders,
        capturable=("refine_ext_op", "cdist", "matmul", "attention"),
        accuracy=accuracy,
        threads=threads,
        budget=budget,
    )


def mean_case(size: tuple[int, int, int], regime: str, budget: float | None = None) -> Case:
    """Value and posterior mean, the ideal denoiser."""

    def ours(s: dict[str, Tensor]) -> Any:
        return rx.log_mixture(s["x"], s["y"], s["s"], return_mean=True)

    def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        few = {**s, "x": s["x"][:256]}
        _, want = forms.posterior_mean(few["x"].double(), few["y"].double(), few["s"].double())
        found = {"refine_ext": ours(few)[1], "matmul": forms.posterior_mean(few["x"], few["y"], few["s"])[1]}
        return {"worst_error": {name: (got.double() - want).abs().max().item() for name, got in found.items()}}

    return _case(
        "log_mixture",
        "mean",
        size,
        regime,
        inputs=_inputs(*size, regime, False, False),
        contenders={
            "refine_ext": ours,
            "matmul": _applied(forms.posterior_mean),
            "matmul medium": _applied(at_precision("medium", forms.posterior_mean)),
        },
        capturable=("matmul",),
        accuracy=accuracy,
        budget=budget,
    )


def _gradients(form: Form, s: dict[str, Tensor], by: str = "xys") -> tuple[Tensor, ...]:
    """Of the sum of all values by samples, centres and scale, or some of them."""
    inputs = [s[name].detach().requires_grad_(name in by) for name in "xys"]
    return torch.autograd.grad(form(*inputs).sum(), [each for each in inputs if each.requires_grad])


def backward_case(
    size: tuple[int, int, int],
    regime: str = "dense",
    *,
    by: str = "xys",
    libraries: bool = False,
    budget: float | None = None,
) -> Case:
    m, n, d = size

    def ours(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return rx.log_mixture(x, y, s)

    compared: dict[str, Form] = {
        "refine_ext": ours,
        "cdist": forms.by_cdist,
        "matmul": forms.by_matmul,
        "matmul medium": at_precision("medium", forms.by_matmul),
    }
    if libraries:
        compared["keops"] = forms.by_keops
    contenders: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        name: partial(_gradients, form, by=by) for name, form in compared.items()
    }

    def op(s: dict[str, Tensor]) -> Any:
        inputs = (s["x"], s["y"], s["s"], None, None)
        if by == "x":
            return ops.log_mixture_with_score(*inputs)
        return ops.log_mixture_backward(s["grad"], s["value"], *inputs, 7)

    contenders["refine_ext_op"] = op
    contenders["refine_ext_forward"] = _ours_op
    inputs = _inputs(m, n, d, regime, libraries, True)

    def with_value(random: torch.Generator) -> dict[str, Tensor]:
        s = inputs(random)
        return {**s, "value": _ours_op(s), "grad": torch.ones(m, dtype=torch.float64, device=s["x"].device)}

    def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        few = {**s, "x": s["x"][:64]}
        want = _gradients(reference, few, by)
        return {
            "worst_error": {
                name: max(
                    ((g.double() - w).abs().max() / w.abs().max()).item()
                    for g, w in zip(_gradients(form, few, by), want, strict=True)
                )
                for name, form in compared.items()
            }
        }

    return _case(
        *(("log_mixture_with_score", "score") if by == "x" else ("log_mixture_backward", "gradients")),
        size,
        regime,
        inputs=with_value,
        contenders=contenders,
        capturable=("refine_ext_op", "refine_ext_forward"),
        accuracy=accuracy,
        budget=budget,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    if quick:
        yield forward_case((40, 30, 3), device=device)
        yield mean_case((40, 30, 3), "dense")
        yield backward_case((40, 30, 3), by="x")
        yield backward_case((40, 30, 3))
        return
    compiled, sizes = True, SIZES[device]
    # KeOps is compiled on the spot, for which a borrowed device may lack the tools.
    libraries = device == "cpu" or importlib.util.find_spec("pykeops") is not None
    for size in sizes:
        yield forward_case(size, device=device, compiled=compiled, libraries=libraries, budget=8.0)
    for size in (sizes[0], sizes[-1]):
        yield forward_case(size, "peaked", device=device, libraries=libraries, budget=6.0)
    if device == "cuda":
        yield forward_case(A_TERM, "peaked", device=device, budget=6.0)
    yield mean_case(sizes[-1], "dense", budget=5.0)
    yield mean_case(sizes[-1], "peaked", budget=5.0)
    for size in sizes:
        yield backward_case(size, by="x", libraries=libraries and size[2] == 2, budget=8.0)
    yield backward_case(sizes[-1], "peaked", by="x", budget=6.0)
    for size in sizes:
        yield backward_case(size, libraries=libraries and size[2] == 2, budget=8.0)
    yield backward_case(sizes[-1], "peaked", budget=6.0)
    for size in SMALL:
        yield forward_case(size, device=device)
    if device == "cpu" and (cores := torch.get_num_threads()) > 1:
        for size in (sizes[0], sizes[-1]):
            yield forward_case(size, threads=cores, budget=5.0)


def exp_limits(device: str, quick: bool) -> dict[str, float]:
    """Exponentials a second: torch's own in cache, and pairs of one dimension of ours, which cost little else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else threads)
    count = 2**10 if quick else 2**15 if device == "cpu" else 2**26
    values, out = -10 * torch.rand(count, device=device), torch.empty(count, device=device)
    m = 64 if quick else 2048 if device == "cpu" else 2**15
    x, s = torch.randn(m, 1, device=device), torch.tensor(0.7, device=device)
    runs = {
        "exp": lambda: torch.exp(values, out=out),
        "refine_ext": lambda: ops.log_mixture(x, x, s, None, None, False, False),
    }
    try:
        timed = interleaved(runs, budget=1.0, device=device)
    finally:
        torch.set_num_threads(threads)
    return {
        "torch_exp_per_second": count / timed["exp"]["seconds"],
        "one_dimension_pairs_per_second": m * m / timed["refine_ext"]["seconds"],
    }


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    device, quick = arguments.device, arguments.quick
    run(arguments, "log_mixture", cases(device, quick), more_limits=exp_limits(device, quick))


if __name__ == "__main__":
    main()
