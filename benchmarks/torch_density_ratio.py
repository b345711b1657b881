"""Density ratios as torch users write them, restated as well as we can.

`kl` in closed form; for the others a safeguarded Newton search for the shift, to our tolerance, that stops as soon as
it is met and waits for the device once an evaluation. Ratios are along the last dimension. 16-bit outputs are computed
in float32, as every kernel of torch's does inside.

No library has these ops: KeOps reduces over pairs, cuBLAS and CUTLASS multiply matrices. CUB's reductions are what
torch's are made of.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 1e-6
Evaluation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _lambert_w_exp(s: Tensor) -> Tensor:
    """W(e^s), by Newton on w + log w = s."""
    w = torch.where(s > 1, s, (s - 1).exp().clamp_min(1e-30))
    for _ in range(6):
        w = (w * (1 + s - w.log()) / (1 + w)).clamp_min(1e-30)
    return w


# r(t) and its derivative, as one would type them from the table of f-divergences.
FORMULAS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "kl": lambda t: ((r := (t - 1).exp()), r),
    "reverse_kl": lambda t: (-1 / t, 1 / t**2),
    "jensen_shannon": lambda t: ((r := t.exp() / (2 - t.exp())), r + r * r),
    "gan": lambda t: ((r := t.exp() / (1 - t.exp())), r + r * r),
    "pearson_chi2": lambda t: ((1 + t / 2).clamp_min(0), 0.5 * (t > -2)),
    "neyman_chi2": lambda t: ((1 - t) ** -0.5, 0.5 * (1 - t) ** -1.5),
    "squared_hellinger": lambda t: ((1 - t) ** -2, 2 * (1 - t) ** -3),
    "jeffreys": lambda t: ((w := 1 / _lambert_w_exp(1 - t)), w * w / (1 + w)),
    "alpha:0.3": lambda t: ((1 - 0.7 * t) ** (-1 / 0.7), (1 - 0.7 * t) ** (-1 / 0.7 - 1)),
}
FAMILIES = tuple(FORMULAS)
# f*(t), for the bounds.
CONJUGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda t: (t - 1).exp(),
    "reverse_kl": lambda t: -1 - torch.log(-t),
    "jensen_shannon": lambda t: -torch.log(2 - t.exp()),
    "gan": lambda t: -torch.log(-torch.expm1(t)),
    "pearson_chi2": lambda t: torch.where(t > -2, t + t * t / 4, -1.0),
    "squared_hellinger": lambda t: t / (1 - t),
}
SUPREMUM = {"reverse_kl": 0.0, "jensen_shannon": math.log(2), "gan": 0.0, "neyman_chi2": 1.0}
SUPREMUM |= {"squared_hellinger": 1.0, "alpha:0.3": 1 / 0.7}
TANGENT = {"reverse_kl": -1.0, "gan": -math.log(2)}


def evaluation(family: str) -> Evaluation:
    """Ratios at a shift, their mean and its slope: what one step of the search needs."""
    formula = FORMULAS[family]

    def evaluate(h: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ratio, slope = formula(h - shift)
        return ratio, ratio.mean(-1, keepdim=True), slope.mean(-1, keepdim=True)

    return evaluate


def closed_form(h: Tensor) -> Tensor:
    wide = h if h.dtype == torch.float64 else h.float()
    return torch.exp(wide - (torch.logsumexp(wide, -1, keepdim=True) - math.log(h.shape[-1]))).to(h.dtype)


def solve(h: Tensor, family: str, evaluate: Evaluation) -> tuple[Tensor, Tensor]:
    """Ratios and shift, every row at once; the last evaluated ones where 60 steps do not converge."""
    top = h.amax(-1, keepdim=True)
    low = top - SUPREMUM[family] if family in SUPREMUM else h.amin(-1, keepdim=True) - TANGENT.get(family, 0.0)
    high = top - TANGENT.get(family, 0.0)
    shift = 0.5 * (low + high)
    for _ in range(60):
        ratio, mean, slope = evaluate(h, shift)
        if (mean - 1).abs().amax().item() < TOLERANCE:
            break
        above = mean > 1
        low, high = torch.where(above, shift, low), torch.where(above, high, shift)
        step = shift + (mean - 1) / slope
        shift = torch.where((low < step) & (step < high), step, 0.5 * (low + high))
    return ratio, shift


def torch_ratio(h: Tensor, family: str, evaluate: Evaluation | None = None) -> Tensor:
    if family == "kl":
        return closed_form(h)
    wide = h if h.dtype == torch.float64 else h.float()
    return solve(wide, family, evaluate or evaluation(family))[0].to(h.dtype)


@functools.cache
def _compiled(function: Callable) -> Callable:
    torch._dynamo.config.recompile_limit = 64  # every family is a version of the same function
    return torch.compile(function, dynamic=True)


@functools.cache
def _compiled_evaluation(family: str) -> Evaluation:
    return _compiled(evaluation(family))


def compiled_ratio(h: Tensor, family: str) -> Tensor:
    """The closed form compiled whole, or a compiled evaluation in each step of the search."""
    if family == "kl":
        return _compiled(closed_form)(h)
    return torch_ratio(h, family, _compiled_evaluation(family))


def tight_bound(real: Tensor, fake: Tensor, family: str) -> Tensor:
    """E_P[h] − min_ν {ν + E_Q f*(h − ν)}; differentiable in both, the shift held fixed (envelope theorem)."""
    if family == "kl":
        return real.mean() - (torch.logsumexp(fake, -1) - math.log(fake.shape[-1]))
    with torch.no_grad():
        shift = solve(fake, family, evaluation(family))[1]
    return real.mean() - shift.squeeze() - CONJUGATES[family](fake - shift).mean()


def loose_bound(real: Tensor, fake: Tensor, family: str) -> Tensor:
    return real.mean() - CONJUGATES[family](fake).mean()
