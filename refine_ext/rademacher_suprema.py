"""How `rademacher` and its relatives come to their estimate: by one op, by blocks of rows, by all sign vectors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._call import called
from ._ops_rademacher import SUPREMA, ops
from .arguments import check_floating, check_seed, values_readable, whole
from .complexity_estimate import Estimate
from .progress import progress_bar

LARGEST, MAGNITUDE, NORM = (SUPREMA.index(name) for name in ("largest", "magnitude", "norm"))
MEMORY = 1 << 30

_OP = ops.rademacher_suprema.default
_MAX_DRAWS = 1 << 20  # what draws double to where a standard error is asked for
_MOST_DRAWS = 1 << 40  # csrc/ops/rademacher.h kMostDraws
_MOST_ENUMERATED = 20  # samples whose sign vectors are all taken
_CALL, _CALL_DRAWS = 1 << 37, 512  # products of signs in a call of seconds on a CPU; its draws are not cut below


class Functions(NamedTuple):
    """A class of functions whose supremum is one of SUPREMA of the sums over samples, times a factor."""

    family: str
    supremum: int
    norm_bound: float = 1.0


class Options(NamedTuple):
    """The arguments that `rademacher` and its relatives share."""

    draws: int | str
    seed: int | None
    distribution: str
    stderr: float | None
    max_draws: int | None
    precision: int
    nan_policy: str
    first_draw: int
    bound: float | None
    memory: int
    progress: bool | None


Range = tuple[int, int, int]  # first draw, draws, seed


def seed_of(function: str, seed: int | None) -> int:
    """The seed as the int64 with its bits; None: one from torch's default generator."""
    if seed is None:
        if torch.compiler.is_compiling():
            raise ValueError(f"{function}: give a seed: torch.compile would make one constant of it")
        return int(torch.randint(2**63 - 1, ()).item())
    if isinstance(seed, Tensor):
        raise TypeError(f"{function}: seed must be an int, got a tensor")
    return check_seed(function, seed)  # type: ignore[return-value]


def estimate_complexity(function: str, argument: str, outputs: Any, functions: Functions, options: Options) -> Estimate:
    check_options(function, options)
    normal = options.distribution == "normal"
    if isinstance(outputs, np.ndarray) and not (isinstance(outputs, np.memmap) and outputs.nbytes > options.memory):
        outputs = _from_numpy(function, argument, outputs)
    if isinstance(outputs, Tensor):
        check_floating(function, argument, outputs)
        if outputs.dim() == 1:
            outputs = outputs.unsqueeze(1)
        if outputs.dim() != 2:
            raise ValueError(f"{function}: {argument} must be [n, m], got shape {list(outputs.shape)}")
        if isinstance(options.draws, str):
            return all_signs(function, argument, outputs, functions, options)
        sums = _normal_sums if normal else _signed_sums
    elif isinstance(options.draws, str):
        raise TypeError(f"{function}: draws='all' takes {argument} in a tensor or an array, not in blocks")
    else:
        sums = _streamed_sums
    return draw(function, lambda range_: sums(function, argument, outputs, functions, options, range_), options)


def check_options(function: str, options: Options) -> None:
    if options.distribution not in ("rademacher", "normal"):
        raise ValueError(f"{function}: distribution must be rademacher or normal, got {options.distribution!r}")
    if options.nan_policy not in ("raise", "propagate"):
        raise ValueError(f"{function}: nan_policy must be raise or propagate, got {options.nan_policy!r}")
    whole(function, "memory", options.memory, 1)


def draw(function: str, run: Callable[[Range], Estimate], options: Options) -> Estimate:
    """`run` on the draws that the options ask for, doubled until their standard error is small enough."""
    draws = whole(function, "draws", options.draws, 1)  # type: ignore[arg-type]
    if draws > _MOST_DRAWS:
        raise ValueError(f"{function}: draws must be between 1 and 2^40, got {draws}")
    first = whole(function, "first_draw", options.first_draw, 0)
    seed = seed_of(function, options.seed)
    stderr = options.stderr
    if stderr is None:
        return run((first, draws, seed))
    if isinstance(stderr, bool) or not isinstance(stderr, (int, float, np.floating)):
        raise TypeError(f"{function}: stderr must be a number or None, got {type(stderr).__name__}")
    if not stderr > 0:
        raise ValueError(f"{function}: stderr must be positive, got {stderr}")
    most = whole(
        function, "max_draws", max(draws, _MAX_DRAWS) if options.max_draws is None else options.max_draws, draws
    )
    estimate, looks = run((first, draws, seed)), 1
    while not estimate.stderr <= stderr and estimate.draws < most:
        done = estimate.draws
        estimate = estimate.merge(run((first + done, min(done, most - done), seed)))
        looks += 1
    # Look l spends delta / (l (l + 1)), delta in all.
    estimate.looks_price = looks * (looks + 1)
    if not estimate.stderr <= stderr:
        warnings.warn(
            f"{function}: the standard error is {estimate.stderr:.3g} after {estimate.draws} draws, {stderr:.3g} was "
            "asked for; raise max_draws",
            stacklevel=4,
        )
    return estimate


def _from_numpy(function: str, argument: str, outputs: np.ndarray) -> Tensor:
    from .samples import as_tensor

    return as_tensor(outputs, function=function, argument=argument)


def _signed_sums(
    function: str, argument: str, outputs: Tensor, functions: Functions, options: Options, draws: Range
) -> Estimate:
    """By the op, on a tensor."""
    first, count, seed = draws
    arguments = (seed, functions.supremum, options.precision)
    tracked = outputs.requires_grad and torch.is_grad_enabled()
    compiling = torch.compiler.is_compiling()
    several = count > _CALL_DRAWS and outputs.numel() * count > _CALL and outputs.device.type == "cpu"
    if several and not (tracked or compiling):
        suprema, index, largest = _in_calls(function, outputs, count, first, arguments, options.progress)
    else:
        suprema, index, largest = called(function, _OP, tracked, outputs, count, first, *arguments)
    readable = values_readable()
    if readable and options.nan_policy == "raise" and outputs.device.type == "cpu":
        first_value = suprema[0].item() if tracked else suprema.numpy()[0]  # NumPy's view takes half the time
        if math.isnan(first_value):
            refuse_nonfinite(function, argument, largest, outputs)
    norm = functions.supremum == NORM
    if norm:
        from .rademacher_stream import largest_row_norm

        peak = largest_row_norm(outputs)
    else:
        peak = largest
    found = (suprema, index, largest, peak, outputs.shape[0])
    return made(function, argument, functions, options, draws, found, readable)


def _in_calls(
    function: str, outputs: Tensor, count: int, first: int, arguments: tuple, progress: bool | None
) -> tuple[Tensor, ...]:
    """The op in several calls, between which a bar moves and Ctrl-C is heard."""
    parts = []
    with progress_bar(function, count, progress, "draw") as bar:
        for start in range(0, count, _CALL_DRAWS):
            some = min(_CALL_DRAWS, count - start)
            parts.append(called(function, _OP, False, outputs, some, first + start, *arguments))
            bar.update(len(parts[-1][0]))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), parts[0][2]


def _normal_sums(
    function: str, argument: str, outputs: Tensor, functions: Functions, options: Options, draws: Range
) -> Estimate:
    """By matrix products, on a tensor."""
    from .rademacher_stream import Multipliers, NormalSuprema, Rows

    rows = Rows(function, argument, outputs.detach(), options.memory // 8)
    which = Multipliers(draws[1], draws[0], draws[2], True)
    suprema, index, largest, row_norm = NormalSuprema.apply(
        outputs, which, functions.supremum, options.memory, rows, options.progress
    )
    if options.nan_policy == "raise" and outputs.device.type == "cpu":
        refuse_nonfinite(function, argument, largest, outputs)
    peak = row_norm if functions.supremum == NORM else largest
    return made(function, argument, functions, options, draws, (suprema, index, largest, peak, len(outputs)), True)


def _streamed_sums(
    function: str, argument: str, outputs: Any, functions: Functions, options: Options, draws: Range
) -> Estimate:
    """Block by block."""
    from .rademacher_stream import Multipliers, Rows, streamed_suprema

    if options.precision != 3:
        raise ValueError(f"{function}: precision must be 3 where {argument} come in blocks, got {options.precision}")
    rows = Rows(function, argument, outputs, options.memory // 8)
    if rows.once and options.stderr is not None:
        raise ValueError(f"{function}: with stderr= the {argument} are read again and again, which an iterator is not")

    def inspect(first_row: int, block: Tensor, largest: Tensor) -> None:
        if options.nan_policy == "raise":
            refuse_nonfinite(function, argument, largest, block, first_row)

    which = Multipliers(draws[1], draws[0], draws[2], options.distribution == "normal")
    found = streamed_suprema(rows, which, functions.supremum, options.memory, options.progress, inspect)
    peak = found.row_norm if functions.supremum == NORM else found.largest
    values = (found.suprema, found.index, found.largest, peak, found.n)
    return made(function, argument, functions, options, draws, values, True)


def all_signs(function: str, argument: str, outputs: Tensor, functions: Functions, options: Options) -> Estimate:
    """Over each of the 2^n sign vectors once, in float64."""
    n = outputs.shape[0]
    check_all_signs(function, n, options)
    from .rademacher_stream import column_peaks, largest_row_norm

    largest = column_peaks(outputs)
    if options.nan_policy == "raise":
        refuse_nonfinite(function, argument, largest, outputs)
    values, bit = outputs.double(), torch.arange(n, device=outputs.device)
    step = max(1, options.memory // (16 * max(n, outputs.shape[1])))
    parts = []
    with torch.autocast(outputs.device.type, enabled=False):
        for start in range(0, 1 << n, step):
            code = torch.arange(start, min(start + step, 1 << n), device=outputs.device)
            sums = ((code[:, None] >> bit & 1) * 2 - 1).double() @ values
            if functions.supremum == NORM:
                parts.append((torch.linalg.vector_norm(sums, dim=1) / n, torch.full_like(code, -1)))
                continue
            column = (sums.abs() if functions.supremum == MAGNITUDE else sums).argmax(1)
            best = sums.gather(1, column[:, None])[:, 0]
            size = best.abs() if functions.supremum == MAGNITUDE else best
            parts.append((size / n, torch.where(best < 0, -1 - column, column)))
    suprema, index = (torch.cat(each) for each in zip(*parts, strict=True))
    peak = largest_row_norm(outputs) if functions.supremum == NORM else largest
    estimate = made(function, argument, functions, options, (0, 1 << n, 0), (suprema, index, largest, peak, n), True)
    estimate.enumerated, estimate.seed = True, None
    return estimate


def check_all_signs(function: str, n: int, options: Options) -> None:
    if options.draws != "all":
        raise ValueError(f"{function}: draws must be an int or 'all', got {options.draws!r}")
    if n > _MOST_ENUMERATED:
        raise ValueError(f"{function}: draws='all' takes at most {_MOST_ENUMERATED} samples, got {n}")
    if options.distribution != "rademacher" or options.stderr is not None or options.first_draw != 0:
        raise ValueError(f"{function}: draws='all' takes signs, and neither stderr= nor first_draw=")


def made(
    function: str,
    argument: str,
    functions: Functions,
    options: Options,
    draws: Range,
    found: tuple[Tensor, Tensor, Tensor, Tensor, int],
    readable: bool,
) -> Estimate:
    """The estimate of (suprema, index, largest of each column, largest |f| over B, n)."""
    suprema, index, largest, peak, n = found
    first, count, seed = draws
    if functions.norm_bound != 1.0:
        suprema, peak = suprema * functions.norm_bound, peak * functions.norm_bound
    estimate = Estimate(
        suprema,
        n,
        ((first, count),),
        seed,
        functions.family,
        distribution=options.distribution,  # type: ignore[arg-type]
        index=None if functions.supremum == NORM else index,
        largest=peak,
        given_bound=options.bound,
    )
    if not readable:
        return estimate
    if options.bound is not None or (options.nan_policy == "raise" and suprema.device.type != "cpu"):

        def check() -> None:
            if options.nan_policy == "raise":
                refuse_nonfinite(function, argument, largest)
            refuse_bound(function, options.bound, peak)

        if suprema.device.type == "cpu":
            check()
        else:
            estimate.pending = check
    return estimate


def refuse_bound(function: str, bound: float | None, seen: Tensor) -> None:
    """Raise where the given bound is below what was seen, by more than a rounding."""
    if bound is None:
        return
    if isinstance(bound, bool) or not isinstance(bound, (int, float, np.floating, np.integer)):
        raise TypeError(f"{function}: bound must be a number or None, got {type(bound).__name__}")
    most = float(seen.max())
    if not 0.0 <= bound < math.inf or most > bound * (1 + 1e-6):
        raise ValueError(
            f"{function}: bound must be finite and at least the largest |f(x_i)| seen, {most}, got {bound}"
        )


def refuse_nonfinite(
    function: str,
    argument: str,
    largest: Tensor,
    rows: Tensor | None = None,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """Raise where a column's largest magnitude is not finite, naming the column and, of `rows`, its first bad row."""
    finite = largest.isfinite()
    if finite.all():
        return
    column = int(finite.logical_not().nonzero()[0])
    value, where = "NaN or infinity", f"column {first_column + column}"
    if rows is not None:
        row = int(rows[:, column].isfinite().logical_not().nonzero()[0])
        value, where = str(rows[row, column].item()), f"{where}, row {first_row + row}"
    raise ValueError(
        f"{function}: {argument} must be finite, got {value} in {where}; nan_policy='propagate' lets it through"
    )
