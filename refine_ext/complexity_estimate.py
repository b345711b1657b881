"""What an estimate of a complexity knows: its draws, their mean and error, and how high the truth may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ._ops_rademacher import ops

_SIGNS = 64  # from as many samples on, two equal draws are not worth looking for


@dataclass(eq=False, repr=False)
class Estimate:
    """Monte-Carlo estimate of E_sigma sup_f (1/n) sum_i sigma_i f(x_i). Made by `rademacher` and its relatives.

    Attributes:
        suprema: `[draws]` float64, the supremum of each draw; differentiable where the outputs are.
        n: number of samples.
        ranges: (first draw, number of draws) of every unbroken run of draws, in the order of `suprema`.
        seed: whose draws they are.
        family: the class of functions, in words.
        kind: "exact" suprema, or "lower" where each was searched for and is a lower estimate.
        distribution: of the sigma_i: "rademacher" (signs) or "normal".
        index: `[draws]` int64, the column j of the maximiser, -1 - j where it is -f_j; None where there is none.
        largest: max |f(x_i)| over what was seen, a number or a tensor whose maximum it is; None where unknown.
        given_bound: max |f(x_i)| as the caller knows it, which is not below what was seen.
        enumerated: whether the draws are all 2^n sign vectors, once each.
        looks_price: what `upper` divides delta by where the number of draws was chosen by looking at them (`stderr=`).
        pending: a check that has to wait for the device and runs at the first number that is read.
    """

    suprema: Tensor
    n: int
    ranges: tuple[tuple[int, int], ...]
    seed: int | None
    family: str
    kind: Literal["exact", "lower"] = "exact"
    distribution: Literal["rademacher", "normal"] = "rademacher"
    index: Tensor | None = None
    largest: Tensor | float | None = None
    given_bound: float | None = None
    enumerated: bool = False
    looks_price: int = 1
    pending: Callable[[], None] | None = None

    @property
    def draws(self) -> int:
        return len(self.suprema)

    @property
    def mean(self) -> Tensor:
        """The estimate, a 0-dim float64 tensor; differentiable where the outputs are."""
        return self.suprema.mean()

    def __float__(self) -> float:
        self._settle()
        return float(self.mean.detach())

    @property
    def stderr(self) -> float:
        """Standard error of `mean`; NaN of a single draw, 0 of all sign vectors."""
        self._settle()
        if self.enumerated:
            return 0.0
        return float(self.suprema.detach().std()) / math.sqrt(self.draws) if self.draws > 1 else math.nan

    @property
    def argmax(self) -> Tensor | None:
        """`[draws]` int64, which column attains each supremum, the first where several do."""
        return None if self.index is None else torch.where(self.index < 0, -1 - self.index, self.index)

    @property
    def bound(self) -> float:
        """M = max |f(x_i)| over the class and the samples: as given, else the largest seen; NaN where unknown."""
        self._settle()
        if self.given_bound is not None:
            return self.given_bound
        if self.largest is None:
            return math.nan
        return float(self.largest.max()) if isinstance(self.largest, Tensor) else float(self.largest)

    @property
    def effective_draws(self) -> int:
        """How many different sign vectors the draws have: equal ones bring nothing, and few samples have few."""
        if self.enumerated or self.distribution != "rademacher" or self.n >= _SIGNS or self.seed is None:
            return self.draws
        place = torch.tensor([1 << i if i < 63 else -(1 << 63) for i in range(self.n)])
        like = torch.empty(0, dtype=torch.float32)
        codes = []
        for first, count in self.ranges:
            for start in range(0, count, 1 << 16):
                part = min(1 << 16, count - start)
                signs = ops.multipliers(like, self.n, part, 0, first + start, self.seed, False)
                codes.append(torch.where(signs > 0, place, 0).sum(1))
        return len(torch.unique(torch.cat(codes)))

    def upper(self, delta: float = 0.05) -> float:
        """mean + M sqrt(2 log(1/delta) / (n draws)): above the complexity with probability at least 1 - delta.

        For signs by McDiarmid's inequality (one sign moves the mean by at most 2M / (n draws)), for normal
        multipliers by the concentration of Lipschitz functions of normals, with the same constant. Where `stderr=`
        chose the number of draws at the l-th look, that look gets delta / (l (l + 1)) of delta. All sign vectors have
        no error: the mean itself.

        Raises:
            ValueError: a delta that is not between 0 and 1; suprema that are lower estimates; an unknown M.
        """
        if not 0.0 < delta < 1.0:
            raise ValueError(f"Estimate.upper: delta must be between 0 and 1, got {delta}")
        if self.kind == "lower":
            raise ValueError(f"Estimate.upper: the suprema of {self.family} are lower estimates; they bound nothing")
        if self.enumerated:
            return float(self)
        if math.isnan(self.bound) and not math.isnan(float(self)):
            raise ValueError(f"Estimate.upper: no bound of |f| is known for {self.family}; give bound=")
        return float(self) + self.bound * math.sqrt(2 * math.log(self.looks_price / delta) / (self.n * self.draws))

    def merge(self, other: Estimate) -> Estimate:
        """This estimate and another one's draws of the same seed on the same outputs: that of one run of them all.

        Raises:
            TypeError: not an Estimate.
            ValueError: another seed, class, number of samples or bound; draws that both have; all sign vectors.
        """
        if not isinstance(other, Estimate):
            raise TypeError(f"Estimate.merge: other must be an Estimate, got {type(other).__name__}")
        if self.enumerated or other.enumerated:
            raise ValueError("Estimate.merge: all sign vectors are already in an estimate of draws='all'")
        for name in ("n", "seed", "family", "kind", "distribution", "bound"):
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others and not (mine != mine and others != others):
                raise ValueError(f"Estimate.merge: both must have one {name}, got {mine} and {others}")
        if self.seed is None:
            raise ValueError("Estimate.merge: without a seed it is not known which draws the estimates share")
        parts = sorted([*_parts(self), *_parts(other)], key=lambda part: part[0])
        ranges: list[tuple[int, int]] = []
        for first, suprema, _ in parts:
            end = sum(ranges[-1]) if ranges else -1
            if first < end:
                last = min(end, first + len(suprema)) - 1
                raise ValueError(f"Estimate.merge: draws {first} to {last} are in both; give first_draw= for others")
            if first == end:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + len(suprema))
            else:
                ranges.append((first, len(suprema)))
        index = None if self.index is None else torch.cat([part for _, _, part in parts if part is not None])
        suprema = torch.cat([part for _, part, _ in parts])
        price = self.looks_price * other.looks_price
        return replace(self, suprema=suprema, ranges=tuple(ranges), index=index, looks_price=price, pending=None)

    def to_dict(self, delta: float | None = None) -> dict[str, Any]:
        """Plain numbers and strings for JSON, None for what is not known; with `delta`, `upper(delta)` too."""
        facts: dict[str, Any] = {
            "mean": float(self),
            "stderr": self.stderr,
            "n": self.n,
            "draws": self.draws,
            "effective_draws": self.effective_draws,
            "draw_ranges": [list(each) for each in self.ranges],
            "looks_price": self.looks_price,
            "seed": self.seed,
            "family": self.family,
            "kind": self.kind,
            "distribution": self.distribution,
            "bound": self.bound,
        }
        if delta is not None:
            facts |= {"delta": delta, "upper": self.upper(delta)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}

    def __str__(self) -> str:
        every = "all " if self.enumerated else ""
        multipliers = "sign vectors" if self.distribution == "rademacher" else "normal vectors"
        lower = "lower estimate, " if self.kind == "lower" else ""
        error = f" ± {self.stderr:.2g}" if self.stderr > 0 else ""
        return f"{float(self):.6g}{error} ({lower}{self.family}, {every}{self.draws} {multipliers}, n = {self.n})"

    def __repr__(self) -> str:
        return f"Estimate({self})"

    def _settle(self) -> None:
        if self.pending is not None:
            self.pending()
            self.pending = None


def _parts(estimate: Estimate) -> list[tuple[int, Tensor, Tensor | None]]:
    """(first draw, suprema, index) of each run of draws."""
    parts, start = [], 0
    for first, count in estimate.ranges:
        these = slice(start, start + count)
        parts.append((first, estimate.suprema[these], None if estimate.index is None else estimate.index[these]))
        start += count
    return parts
