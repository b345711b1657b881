"""The diffusion time T, chosen by the bound from the training data alone, or learned along with a model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .arguments import whole
from .diffusion_bound_result import DiffusionBound
from .diffusion_bounds import BoundProblem, bound_problem
from .diffusion_checkpoint import Checkpoint
from .diffusion_scores import Term
from .diffusion_terms import schedule_of
from .forward_process import ForwardProcess
from .progress import progress_bar
from .results import PicturedResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GRID = 20
_CONFIDENCE = 0.95
_SEARCH_STEPS = 25
_SEARCH_TOLERANCE = 1e-3  # of the bracket


@dataclass(eq=False, repr=False)
class TimeSelection(PicturedResult):
    """The bound over T and its minimiser. Made by `select_diffusion_time`.

    `plot` draws the bound and its terms over T.

    Attributes:
        time: the T with the lowest bound of those that were evaluated.
        bounds: the `DiffusionBound` of every T, ascending; each term with its Monte-Carlo error.
        time_interval: of the minimiser, 95 % of the bootstrap's resamples of the training set.
        time_stderr: the standard deviation of the minimiser over these.
        sampling_errors: the bound's standard error at every T that the training samples leave, by the same bootstrap.
        at_edge: "lowest" or "highest" where the minimum is at the end of what was tried, else None.
        notes: what to mind.
    """

    time: float
    bounds: list[DiffusionBound]
    time_interval: tuple[float, float]
    time_stderr: float
    sampling_errors: list[float]
    at_edge: Literal["lowest", "highest"] | None
    notes: list[str] = field(default_factory=list)

    @property
    def times(self) -> list[float]:
        """Every T, ascending."""
        return [bound.time for bound in self.bounds]

    @property
    def best(self) -> DiffusionBound:
        """The bound at `time`."""
        return next(bound for bound in self.bounds if bound.time == self.time)

    def curve(self, term: str = "bound") -> list[Term]:
        """A term by its name in `DiffusionBound` over the times: "bound", "mutual_information", "prior_gap", ..."""
        return [getattr(bound, term) for bound in self.bounds]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "time": self.time,
            "time_interval": list(self.time_interval),
            "time_stderr": self.time_stderr,
            "at_edge": self.at_edge,
            "complete": self.best.complete,
            "notes": self.notes,
            "sampling_errors": self.sampling_errors,
            "curve": [bound.to_dict() for bound in self.bounds],
        }

    def _draw(self) -> Figure:
        from .diffusion_figure import draw_selection

        return draw_selection(self)

    def __str__(self) -> str:
        low, high = self.time_interval
        lines = [f"T = {self.time:.4g}, 95 % of resampled training sets {low:.4g} to {high:.4g}"]
        names = {"T": 9, "A": 20, "B": 12, **({"C": 20, "L_sm": 20} if self.best.complete else {}), "bound": 20}
        lines.append("".join(name.rjust(width) for name, width in names.items()))
        for bound in self.bounds:
            a = Term(-bound.mutual_information.value, bound.mutual_information.stderr)
            cells = [f"{bound.time:.4g}", _cell(a), f"{bound.prior_gap.value:.4g}"]
            if bound.generator is not None and bound.score_matching is not None:
                cells += [_cell(bound.generator), _cell(bound.score_matching)]
            cells.append(_cell(bound.bound))
            row = "".join(cell.rjust(width) for cell, width in zip(cells, names.values(), strict=True))
            lines.append(row + ("  <" if bound.time == self.time else ""))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def __repr__(self) -> str:
        low, high = self.time_interval
        return f"TimeSelection(time={self.time:.6g}, interval={low:.4g} to {high:.4g}, at_edge={self.at_edge})"


def select_diffusion_time(
    data: Any,
    times: Sequence[float] | Tensor | None = None,
    model: Callable[..., Tensor] | None = None,
    *,
    schedule: str | ForwardProcess = "vp",
    optimize: bool = False,
    draws: int = 100,
    sub_gaussian: float = 1.0,
    steps: int = 1000,
    model_draws: int = 64,
    parametrization: str = "score",
    time_scale: float = 1.0,
    batch_size: int | None = None,
    seed: int = 0,
    bootstrap: int = 1000,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> TimeSelection:
    """The T with the lowest `diffusion_bound`, ``A + sqrt2 R B + sqrt2 R C + L_sm``, from the training data.

    A rises with T (from -log m, where no two noised samples meet, to 0) and B falls (from the full distance to the
    prior to 0); C and L_sm rise. The noise is the same at every T, so that the curve is smooth and differences along it
    are more accurate than its values. Without a model the curve is that of the data terms, A + sqrt2 R B.

    The uncertainty of the minimiser is that of the training samples: their parts of A and B are resampled (the mixture
    of A, and the model's terms, stay as they are), and the curve's lowest T found again.

    Args:
        data, model, schedule, draws, sub_gaussian, steps, model_draws, parametrization, time_scale, batch_size, seed,
            progress: as `diffusion_bound`; at least 2 samples.
        times: T values to try, at least 2. None: 20 over the schedule's range, equally spaced (EDM: on a log scale).
        optimize: after the grid, search between the neighbours of its lowest T (Brent's method; needs SciPy).
        bootstrap: how often the training samples are resampled.
        checkpoint: a file; every finished T is written there, and found there by the next call, which may be an
            interrupted one repeated, one with more times, or one with another sub_gaussian. Results are the same bits.
            A model that is no `nn.Module` is known by its name only: give changed functions another file.

    Returns:
        `TimeSelection`: time, its interval, the curve of every term, at_edge, plot, save.

    Raises:
        TypeError, ValueError: as `diffusion_bound`; fewer than 2 samples or times; a checkpoint of other data or
            arguments (it says which), or one that cannot be read or written.
        ModuleNotFoundError: `optimize` without SciPy.

    Source: Chen, Zhu and Shkurti 2025, section 4; Brent 1973.

    >>> import torch, refine_ext as rx
    >>> x = 3 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    >>> rx.select_diffusion_time(x, [0.01, 0.05, 0.5], sub_gaussian=0.5, draws=4)
    TimeSelection(time=0.05, interval=0.05 to 0.05, at_edge=None)
    """
    function = "select_diffusion_time"
    problem = bound_problem(
        function, data, model, schedule, draws, seed, sub_gaussian, steps, model_draws, parametrization, time_scale,
        batch_size, least=2,
    )  # fmt: skip
    whole(function, "bootstrap", bootstrap, 2)
    grid = _grid(function, problem.process, times)
    if optimize:
        _require_scipy(function)
    store = Checkpoint(function, checkpoint, problem)
    wanted = [time for time in grid if time not in store.found]
    searched = _SEARCH_STEPS if optimize else 0
    with progress_bar(function, (len(wanted) + searched) * problem.evaluations(), progress) as bar:
        found = {time: store.at(time, bar.update) for time in grid}
        if optimize:
            found |= _search(found, lambda time: store.at(time, bar.update))
    bounds = [found[time] for time in sorted(found)]
    return _selection(problem, bounds, bootstrap)


def _grid(function: str, process: ForwardProcess, times: Any) -> list[float]:
    if times is None:
        times = process.between(torch.arange(1, _GRID, dtype=torch.float64) / _GRID).tolist()
        times.append(process.time_range[1])
    elif isinstance(times, Tensor):
        times = times.detach().reshape(-1).tolist()
    try:
        listed = list(times)
    except TypeError:
        raise TypeError(f"{function}: times must be a sequence of numbers, got {type(times).__name__}") from None
    grid = sorted({process.check_time(function, "times", time) for time in listed})
    if len(grid) < 2:
        raise ValueError(f"{function}: times must have at least 2 different values, got {len(grid)}")
    return grid


def _require_scipy(function: str) -> None:
    import importlib.util

    if importlib.util.find_spec("scipy") is None:
        raise ModuleNotFoundError(f"{function}: optimize needs SciPy: pip install 'refine-ext[demo]'", name="scipy")


def _search(
    found: dict[float, DiffusionBound], evaluate: Callable[[float], DiffusionBound]
) -> dict[float, DiffusionBound]:
    """The bounds at the places that Brent's method looks at, between the neighbours of the grid's lowest."""
    from scipy.optimize import minimize_scalar

    times = sorted(found)
    at = times.index(min(times, key=lambda time: found[time].bound.value))
    low, high = times[max(0, at - 1)], times[min(len(times) - 1, at + 1)]
    seen: dict[float, DiffusionBound] = {}

    def value(time: float) -> float:
        seen[float(time)] = evaluate(float(time))
        return seen[float(time)].bound.value

    options = {"xatol": _SEARCH_TOLERANCE * (high - low), "maxiter": _SEARCH_STEPS}
    minimize_scalar(value, bounds=(low, high), method="bounded", options=options)
    return seen


def _selection(problem: BoundProblem, bounds: list[DiffusionBound], bootstrap: int) -> TimeSelection:
    values = torch.tensor([bound.bound.value for bound in bounds], dtype=torch.float64)
    lowest = int(values.argmin())
    factor = math.sqrt(2) * problem.sub_gaussian
    parts = torch.stack([factor * bound.prior_kl_root - bound.kl for bound in bounds])  # [times, m]
    offset = values - parts.mean(1)  # the model's terms
    generator = torch.Generator().manual_seed(problem.seed)
    m = parts.shape[1]
    curves = torch.empty((bootstrap, len(bounds)), dtype=torch.float64)
    for k in range(bootstrap):
        drawn = torch.randint(m, (m,), generator=generator)
        curves[k] = parts @ torch.bincount(drawn, minlength=m).double() / m
    curves += offset
    times = torch.tensor([bound.time for bound in bounds], dtype=torch.float64)
    minimisers = times[curves.argmin(1)]
    tail = (1 - _CONFIDENCE) / 2
    low, high = torch.quantile(minimisers, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    at_edge: Literal["lowest", "highest"] | None = None
    if lowest in (0, len(bounds) - 1):
        at_edge = "lowest" if lowest == 0 else "highest"
    return TimeSelection(
        time=float(times[lowest]),
        bounds=bounds,
        time_interval=(low, high),
        time_stderr=float(minimisers.std()),
        sampling_errors=curves.std(0).tolist(),
        at_edge=at_edge,
        notes=_notes(problem, bounds[lowest], at_edge),
    )


def _notes(problem: BoundProblem, best: DiffusionBound, at_edge: str | None) -> list[str]:
    notes = []
    if not best.complete:
        notes.append("no model: the curve is that of the data terms A + √2 R B; C and L_sm, which rise with T, are out")
    if at_edge is not None:
        limits = dict(zip(("lowest", "highest"), problem.process.time_range, strict=True))
        end = "that the schedule has" if best.time == limits[at_edge] else "tried; a wider grid may have a lower bound"
        notes.append(f"the minimum is at the {at_edge} T {end}")
    return notes


def _cell(term: Term) -> str:
    return f"{term.value:.4g} ± {term.stderr:.1g}"


class LearnedTime(nn.Module):
    """``T = between(u_0 + (u_1 - u_0) sigmoid(w))``: a diffusion time inside a range, for an optimiser.

    `between` is the schedule's: T is linear in the sigmoid, of EDM its logarithm is.

    Args:
        initial: T to start from, inside the range.
        schedule: as `diffusion_bound`.
        low, high: the range. None: the schedule's.

    Raises:
        TypeError, ValueError: a T outside the schedule, an initial T that is not between low and high.

    Source: Chen, Zhu and Shkurti 2025, section 4: the bound is differentiable in T.

    >>> T = LearnedTime(0.5)
    >>> round(T().item(), 6), T().requires_grad
    (0.5, True)
    """

    def __init__(
        self,
        initial: float = 1.0,
        *,
        schedule: str | ForwardProcess = "vp",
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        super().__init__()
        name = "LearnedTime"
        self.process = schedule_of(name, schedule)
        ends = self.process.time_range
        self.low = self.process.check_time(name, "low", ends[0] if low is None else low)
        self.high = self.process.check_time(name, "high", ends[1] if high is None else high)
        start = self.process.check_time(name, "initial", initial)
        if not self.low < start < self.high:
            raise ValueError(f"{name}: initial must be between {self.low:g} and {self.high:g}, got {start:g}")
        u = self._fraction(start)
        self.weight = nn.Parameter(torch.logit((u - self._fraction(self.low)) / self._span()))

    def forward(self) -> Tensor:
        """T, a 0-dim float64 tensor with a gradient."""
        u = self._fraction(self.low) + self._span() * torch.sigmoid(self.weight.double())
        return self.process.between(u).clamp(self.low, self.high)  # rounding may leave the range

    def __float__(self) -> float:
        return float(self.forward().detach())

    def extra_repr(self) -> str:
        return f"{float(self):.4g}, schedule={self.process.name!r}, low={self.low:g}, high={self.high:g}"

    def _fraction(self, time: float) -> Tensor:
        return self.process.fraction(time).to(getattr(self, "weight", torch.empty(0)).device)

    def _span(self) -> Tensor:
        return self._fraction(self.high) - self._fraction(self.low)
