"""Variational bounds, their gradients and the maps between logits and outputs: refine_ext against torch.

    python benchmarks/bench_variational_bound.py --out benchmarks/results/variational_bound_cpu.json

`step` is the value and both gradients through autograd, as a training loop takes them. The other rows call one op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from common import Case, normal, parser, run
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus
from torch_density_ratio import FORMULAS, loose_bound, tight_bound
from traffic import traffic

import refine_ext as rx
from refine_ext._ops import SHIFT, ops
from refine_ext.divergence import parse_divergence

FAMILIES = ("kl", "jensen_shannon", "pearson_chi2")


def _pair(n: int, random: torch.Generator) -> dict[str, Tensor]:
    """As many real outputs as generated ones, all below zero: the loose bound needs them in the domain of f*."""
    return {name: -normal((n,), random).abs() - 0.1 for name in ("real", "fake")}


def _relative_errors(got: dict[str, Tensor], want: Tensor) -> dict[str, dict[str, float]]:
    scale = want.abs().max()
    return {"relative_error": {name: ((x.double() - want).abs().max() / scale).item() for name, x in got.items()}}


def bound_case(n: int, family: str, tight: bool) -> Case:
    bound = tight_bound if tight else loose_bound

    def ours(s: dict[str, Tensor]) -> Tensor:
        return rx.variational_bound(s["real"], s["fake"], family, tight=tight)

    def eager(s: dict[str, Tensor]) -> Tensor:
        return bound(s["real"], s["fake"], family)

    def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        want = bound(s["real"].double(), s["fake"].double(), family)
        return _relative_errors({"refine_ext": ours(s), "eager": eager(s)}, want)

    return Case(
        op="variational_bound",
        variant=family if tight else f"{family} loose",
        shape=(n,),
        traffic=traffic("variational_bound", n, 4, family if tight else "loose"),
        inputs=lambda random: _pair(n, random),
        contenders={"refine_ext": ours, "eager": eager},
        capturable=("refine_ext", *(("eager",) if family == "kl" or not tight else ())),
        accuracy=accuracy,
    )


def backward_case(n: int, family: str) -> Case:
    """The gradient with respect to the generated outputs; torch's by autograd from a bound taken before."""
    code, alpha = parse_divergence("benchmark", family, "variational")

    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        s = _pair(n, random)
        value, stats = ops.variational_bound.default(s["real"], s["fake"], True, code, alpha)
        tracked = s["fake"].clone().requires_grad_()
        eager = tight_bound(s["real"], tracked, family)
        return {**s, "grad": torch.ones_like(value), "stats": stats, "tracked": tracked, "eager": eager}

    def ours(s: dict[str, Tensor]) -> Tensor:
        return ops.variational_bound_backward.default(s["grad"], s["fake"], s["stats"], True, code, alpha)

    def eager(s: dict[str, Tensor]) -> Tensor:
        return torch.autograd.grad(s["eager"], s["tracked"], retain_graph=True)[0]

    def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        want = FORMULAS[family](s["fake"].double() - s["stats"][..., SHIFT])[0] / -n
        return _relative_errors({"refine_ext": ours(s), "eager": eager(s)}, want)

    return Case(
        op="variational_bound_backward",
        variant=family,
        shape=(n,),
        traffic=traffic("variational_bound_backward", n, 4),
        inputs=inputs,
        contenders={"refine_ext": ours, "eager": eager},
        accuracy=accuracy,
    )


def logistic_loss(real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-real).mean() + softplus(fake).mean()


# Objectives that torch writes in one line, which torch.compile makes one kernel of.
WRITTEN = {"kl": partial(tight_bound, family="kl"), "logistic_loss": logistic_loss}


@cache
def compiled(name: str) -> Callable[..., Tensor]:
    return torch.compile(WRITTEN[name])


def step_case(n: int, name: str, quick: bool) -> Case:
    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        return {name: x.requires_grad_() for name, x in _pair(n, random).items()}

    def step(objective: Callable[..., Tensor]) -> Callable[[dict[str, Tensor]], Any]:
        return lambda s: torch.autograd.grad(objective(s["real"], s["fake"]), (s["real"], s["fake"]))

    logistic = name == "logistic_loss"
    value = traffic("dual_bound", n, 4) if logistic else traffic("variational_bound", n, 4, name)
    gradient = traffic("variational_bound_backward", n, 4)
    real = n * 4 * (2 if logistic else 1)  # the real outputs' gradient is written too, and is theirs in a logistic loss
    ours = rx.logistic_loss if logistic else partial(rx.variational_bound, divergence=name)
    contenders = {"refine_ext": step(ours), "eager": step(WRITTEN.get(name) or partial(tight_bound, family=name))}
    if name in WRITTEN and not quick:
        contenders["compile"] = step(compiled(name))
    return Case(
        op="dual_bound" if logistic else "variational_bound",
        variant=f"{name} step",
        shape=(n,),
        traffic=type(value)(value.streamed + gradient.streamed + real, value.once + n * 4 + real),
        inputs=inputs,
        contenders=contenders,
        capturable=(),
    )


def logit_cases(n: int) -> Iterator[Case]:
    """What a classifier's logits go through: the logistic loss, f'(e^l) for Jensen-Shannon, and its slope."""
    code, alpha = parse_divergence("benchmark", "jensen_shannon", "variational")

    def loss(s: dict[str, Tensor]) -> Tensor:
        return logistic_loss(s["real"], s["fake"])

    def output(x: Tensor) -> Tensor:
        return math.log(2) + logsigmoid(x)

    def slope(grad: Tensor, x: Tensor) -> Tensor:
        return grad * torch.sigmoid(-x)

    def case(op: str, variant: str, ours: Callable, eager: Callable, wanted: Callable) -> Case:
        def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
            wide = {name: x.double() for name, x in s.items()}
            return _relative_errors({"refine_ext": ours(s), "eager": eager(s)}, wanted(wide))

        return Case(
            op=op,
            variant=variant,
            shape=(n,),
            traffic=traffic(op, n, 4),
            inputs=lambda random: _pair(n, random),
            contenders={"refine_ext": ours, "eager": eager},
            capturable=("refine_ext", "eager"),
            accuracy=accuracy,
        )

    yield case("dual_bound", "logistic_loss", lambda s: rx.logistic_loss(s["real"], s["fake"]), loss, loss)
    yield case(
        "dual_output",
        "jensen_shannon",
        lambda s: ops.dual_output.default(s["fake"], code, alpha),
        lambda s: output(s["fake"]),
        lambda s: output(s["fake"]),
    )
    yield case(
        "dual_slope",
        "jensen_shannon",
        lambda s: ops.dual_slope.default(s["real"], s["fake"], False, code, alpha),
        lambda s: slope(s["real"], s["fake"]),
        lambda s: slope(s["real"], s["fake"]),
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    sizes = (20_000,) if quick else (10**6, 64) if device == "cpu" else (10**7, 64, 10**8)
    for n in sizes:
        for family in FAMILIES:
            yield bound_case(n, family, tight=True)
            yield backward_case(n, family)
            yield step_case(n, family, quick)
        yield step_case(n, "logistic_loss", quick)
        yield bound_case(n, "jensen_shannon", tight=False)
        yield from logit_cases(n)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    run(arguments, "variational_bound", cases(arguments.device, arguments.quick))


if __name__ == "__main__":
    main()
