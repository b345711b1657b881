"""Local Rademacher complexity: of the functions that are small on the samples, by radius, and its fixed point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arguments import not_negative, positive, whole
from .complexity_estimate import Estimate
from .progress import progress_bar
from .rademacher import Blocks
from .rademacher_stream import SIGN_BLOCK, Multipliers, Rows, add_sums
from .rademacher_suprema import MEMORY, refuse_nonfinite, seed_of

_FUNCTION = "rademacher_local"
_TOLERANCE = 1e-12  # of log r*, near what means of float64 suprema hold


@dataclass(eq=False, repr=False)
class LocalComplexity:
    """Local Rademacher complexity by radius. Made by `rademacher_local`.

    Attributes:
        radius: `[R]` float64, as given.
        estimates: one `Estimate` for each radius, all of the same draws.
        second_moments: `[m]` float64, P_n f_j^2, or the variances where centred.
        fixed_point: r* = factor R_n(r*) + offset; 0 where all functions vanish; None where it was not asked for.
        fixed_point_stderr: at least its standard error, by 2 factor stderr(R_n(r*)): the slope of a sub-root function
            at its fixed point is at most 1/2.
        factor, offset: of the fixed point.
    """

    radius: Tensor
    estimates: list[Estimate]
    second_moments: Tensor
    fixed_point: float | None
    fixed_point_stderr: float | None
    factor: float
    offset: float

    @property
    def mean(self) -> Tensor:
        """`[R]` float64, the complexity at each radius."""
        return torch.stack([estimate.mean for estimate in self.estimates])

    @property
    def stderr(self) -> Tensor:
        """`[R]` float64, its standard errors; the draws are shared, so that errors of all radii go together."""
        return torch.tensor([estimate.stderr for estimate in self.estimates], dtype=torch.float64)

    def to_dict(self, delta: float | None = None) -> dict[str, Any]:
        """Plain numbers and strings for JSON; with `delta`, `upper(delta)` of every estimate."""
        return {
            "radius": self.radius.tolist(),
            "estimates": [estimate.to_dict(delta) for estimate in self.estimates],
            "fixed_point": self.fixed_point,
            "fixed_point_stderr": self.fixed_point_stderr,
            "factor": self.factor,
            "offset": self.offset,
        }

    def __str__(self) -> str:
        lines = [f"r = {float(r):.4g}: {e}" for r, e in zip(self.radius, self.estimates, strict=True)]
        if self.fixed_point is not None:
            lines.append(f"fixed point: {self.fixed_point:.6g} ± {self.fixed_point_stderr:.2g}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"LocalComplexity({len(self.estimates)} radii, fixed_point={self.fixed_point})"


def rademacher_local(
    outputs: Tensor | np.ndarray | Blocks,
    radius: float | Sequence[float] | Tensor | np.ndarray,
    draws: int = 1024,
    seed: int | None = None,
    *,
    star_hull: bool = True,
    centred: bool = False,
    absolute: bool = True,
    factor: float = 1.0,
    offset: float = 0.0,
    fixed_point: bool | None = None,
    first_draw: int = 0,
    memory: int = MEMORY,
    progress: bool | None = None,
) -> LocalComplexity:
    """R_n(r) = E_sigma sup {|(1/n) sum_i sigma_i f(x_i)| : f in F, P_n f^2 <= r}, for F of m functions, by radius r.

    With the star hull, F = {a f_j : 0 <= a <= 1}: each function shrunk until it is small enough,
    ``sup = max_j min(1, sqrt(r / P_n f_j^2)) |(1/n) sum_i sigma_i f_j(x_i)|``; R_n(r) then grows and R_n(r) / sqrt(r)
    falls with r (R_n is sub-root), so that r = factor R_n(r) + offset has one solution r* > 0, the radius in fast
    rates. Without it F = {0, f_1 .. f_m}. One set of draws serves every radius.

    Args:
        outputs: ``[n, m]``, f_j(x_i) in row i and column j, as in `rademacher`: tensors and arrays, or row blocks in an
            iterable or from a function that returns one, which are read several times.
        radius: r > 0, a number or several in any order, in squared units of the outputs.
        draws, seed, first_draw: as in `rademacher`, whose signs these are.
        star_hull: whether functions may be shrunk.
        centred: take f - P_n f for f, and with it the empirical variance for the second moment.
        absolute: with the negatives of all functions. Otherwise 0 is the least supremum: it is in the class.
        factor, offset: of the fixed point's equation, positive and at least 0: a theorem's constants, such as the
            confidence term x / n.
        fixed_point: whether to find r*. None: with the star hull, without which it is not defined.
        memory: bytes that sums and blocks may take. The outputs are read once for each group of draws whose sums fit,
            and where that is not one group, again for each of the ten or so radii that lead to r*.
        progress: a bar where it takes over a second. None: on a terminal.

    Returns:
        `LocalComplexity`: radius, estimates, mean, stderr, second_moments, fixed_point, fixed_point_stderr.

    Raises:
        TypeError: an argument's type, or a dtype that is not supported.
        ValueError: radii that are not positive, outputs that are not [n, m], empty or not finite, an iterator (which
            could not be read twice), a fixed point without the star hull.

    Source: Bartlett, Bousquet and Mendelson, "Local Rademacher complexities", Annals of Statistics 2005: empirical
    local averages and sub-root functions, sections 3 and 4.

    >>> import torch, refine_ext as rx
    >>> local = rx.rademacher_local(torch.eye(100), [0.0025, 0.01], draws=8, seed=0)  # P_n f^2 = 0.01, suprema 0.01
    >>> local.mean
    tensor([0.0050, 0.0100], dtype=torch.float64)
    >>> round(local.fixed_point, 6)
    0.01
    """
    radii = _radii(radius)
    factor = positive(_FUNCTION, "factor", factor)
    offset = not_negative(_FUNCTION, "offset", offset)
    solve = star_hull if fixed_point is None else fixed_point
    if solve and not star_hull:
        raise ValueError(f"{_FUNCTION}: fixed_point needs star_hull=True; other classes may have none or several")
    draws, first_draw = whole(_FUNCTION, "draws", draws, 1), whole(_FUNCTION, "first_draw", first_draw, 0)
    which = Multipliers(draws, first_draw, seed_of(_FUNCTION, seed), normal=False)
    memory = whole(_FUNCTION, "memory", memory, 1)
    source = outputs.detach() if isinstance(outputs, Tensor) else outputs
    if isinstance(source, (Tensor, np.ndarray)) and source.ndim == 1:
        source = source[:, None]
    rows = Rows(_FUNCTION, "outputs", source, memory // 8)
    if rows.once:
        raise ValueError(f"{_FUNCTION}: outputs is an iterator, which can be read once; give a function that makes one")
    curve = _Curve(rows, which, memory, star_hull, centred, absolute, progress)
    suprema = curve.suprema(radii)
    moment = "variance" if centred else "P_n f^2"
    hull = "star hull of " if star_hull else ""
    estimates = [
        Estimate(
            values,
            curve.n,
            ((which.first, which.count),),
            which.seed,
            f"{hull}{'±f' if absolute else 'f'}, {moment} <= {float(r):.6g}",
            largest=(curve.scales(r) * curve.largest).amax(),
        )
        for r, values in zip(radii, suprema, strict=True)
    ]
    point = error = None
    if solve:
        point = _fixed_point(lambda r: factor * float(curve.suprema(r[None]).mean()) + offset)
        at = curve.suprema(torch.tensor([point], dtype=torch.float64))[0] if point > 0.0 else suprema.new_zeros(draws)
        error = 2 * factor * float(at.std()) / math.sqrt(draws) if draws > 1 else math.nan
    return LocalComplexity(radii, estimates, curve.second_moments, point, error, factor, offset)


def _fixed_point(psi: Callable[[Tensor], float]) -> float:
    """The root r* of r = psi(r), psi sub-root, of which it is enough to know psi at about ten radii.

    In s = log r the curve g(s) = log psi(e^s) has slopes from 0 to 1/2, and so has every secant. From s the root is
    (g(s) - s) / (1 - slope to the root) away: with the last secant's slope a step never ends farther from it, and
    with a slope of at most 1/3 it leaves at most half of the way, which is what a step that did not halve g - s is
    followed by.
    """
    radius = psi(torch.tensor(math.inf, dtype=torch.float64))  # the largest value, and so not below the root
    if radius == 0.0:
        return 0.0
    s, gap = math.log(radius), math.inf
    slope = before = moved = 0.0
    while True:
        g = math.log(psi(torch.tensor(math.exp(s), dtype=torch.float64)))
        if abs(g - s) <= _TOLERANCE:
            return math.exp(g)
        if moved != 0.0:
            most = 1.0 / 2.0 if abs(g - s) <= gap / 2.0 else 1.0 / 3.0
            slope = min(max((g - before) / moved, 0.0), most)
        before, gap, moved = g, abs(g - s), (g - s) / (1.0 - slope)
        s += moved


class _Curve:
    """The suprema of every draw as a function of the radius."""

    def __init__(
        self,
        rows: Rows,
        draws: Multipliers,
        memory: int,
        star_hull: bool,
        centred: bool,
        absolute: bool,
        progress: bool | None,
    ) -> None:
        self.rows, self.draws, self.star_hull, self.absolute = rows, draws, star_hull, absolute
        self.progress = progress
        self.centre: Tensor | None = None
        self._measure(centred)
        self.count = min(draws.count, max(1, memory // (24 * len(self.largest))))  # sums, and two more to reduce them
        self.kept: Tensor | None = None

    def _measure(self, centred: bool) -> None:
        """Second moments, float64, and largest magnitudes of the columns."""
        n = 0
        for first, block in self.rows:
            low, high = block.amin(0).double(), block.amax(0).double()
            refuse_nonfinite(_FUNCTION, "outputs", torch.maximum(-low, high), block, first)
            if n == 0:
                lowest, highest = low, high
            else:
                lowest, highest = torch.minimum(lowest, low), torch.maximum(highest, high)
            # In pieces of one size, so that the bits do not depend on the blocks.
            for rows in block.split(SIGN_BLOCK):
                values = rows.double().contiguous()
                mean = values.mean(0) if centred else torch.zeros_like(low)
                squares = (values - mean).square().sum(0)
                if n == 0:
                    total, centre = squares, mean
                else:  # squares around the mean of both parts
                    share = len(rows) / (n + len(rows))
                    total = total + squares + (mean - centre).square() * (n * share)
                    centre = centre + (mean - centre) * share
                n += len(rows)
        if n == 0:
            raise ValueError(f"{_FUNCTION}: outputs must not be empty, got no row blocks")
        self.n, self.second_moments = n, total / n
        self.centre = centre if centred else None
        self.largest = torch.maximum(highest - centre, centre - lowest)
        if not bool(self.second_moments.isfinite().all()):
            raise ValueError(f"{_FUNCTION}: outputs are too large to square, up to {float(self.largest.max()):g}")

    def scales(self, radius: Tensor) -> Tensor:
        """[m], by which each function is shrunk to be within the radius; 0 where it is not in the class."""
        if self.star_hull:
            return (radius.to(self.second_moments) / self.second_moments).sqrt().clamp(max=1.0)
        return (self.second_moments <= radius.to(self.second_moments)).double()

    def suprema(self, radii: Tensor) -> Tensor:
        """[R, draws] float64."""
        parts = []
        for sums in self._sums():
            each = [(sums * self.scales(radius)).amax(1).clamp(min=0.0) for radius in radii]
            parts.append(torch.stack(each) / self.n)
        return torch.cat(parts, 1)

    def _sums(self) -> Iterator[Tensor]:
        """[draws, m] signed sums, or their magnitudes, in groups of draws; made once if one group has them all."""
        if self.kept is not None:
            yield self.kept
            return
        groups = range(0, self.draws.count, self.count)
        with progress_bar(_FUNCTION, len(groups) * self.n, self.progress) as bar:
            for start in groups:
                part = self.draws.part(start, min(self.count, self.draws.count - start))
                sums = torch.zeros(part.count, len(self.largest), dtype=torch.float64, device=self.largest.device)
                for first, block in self.rows:
                    if self.centre is not None:
                        # Before it is rounded to the fixed point of sums: a large mean would take their digits.
                        centred = block.double() - self.centre
                        block = centred if block.dtype == torch.float64 else centred.float()
                    add_sums(sums, block, first, part)
                    bar.update(len(block))
                sums = sums.abs_() if self.absolute else sums
                if self.count == self.draws.count:
                    self.kept = sums
                yield sums


def _radii(radius: Any) -> Tensor:
    try:
        radii = torch.as_tensor(radius, dtype=torch.float64).detach().reshape(-1).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{_FUNCTION}: radius must be a number or several, got {type(radius).__name__}") from None
    if not len(radii) or not bool((radii > 0).all()) or not bool(radii.isfinite().all()):
        raise ValueError(f"{_FUNCTION}: radius must be positive and finite, got {radius}")
    return radii
