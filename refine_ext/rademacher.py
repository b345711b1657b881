"""Rademacher complexity by Monte Carlo: the exact supremum over a class of functions for each random sign vector."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._ops_rademacher import SUPREMA, ops
from .arguments import check_seed, whole
from .complexity_estimate import Estimate
from .density_ratio import check_floating, reraise

_OP = ops.rademacher_suprema.default
_LARGEST, _MAGNITUDE, _NORM = (SUPREMA.index(name) for name in ("largest", "magnitude", "norm"))
_MAX_DRAWS = 1 << 20  # what draws double to where a standard error is asked for


class _Class(NamedTuple):
    """A class of functions whose supremum is one of SUPREMA of the signed sums, times a factor."""

    family: str
    supremum: int
    norm_bound: float = 1.0


class _Draws(NamedTuple):
    """Which draws, and how carefully."""

    count: int
    first: int
    seed: int
    precision: int
    check: bool
    bound: float | None


def rademacher(
    outputs: Tensor,
    draws: int = 1024,
    seed: int | None = None,
    *,
    absolute: bool = True,
    stderr: float | None = None,
    max_draws: int | None = None,
    precision: Literal[1, 2, 3] = 3,
    nan_policy: Literal["raise", "propagate"] = "raise",
    first_draw: int = 0,
    bound: float | None = None,
) -> Estimate:
    """E_sigma max_j |(1/n) sum_i sigma_i f_j(x_i)|, the empirical Rademacher complexity of {±f_1 .. ±f_m}.

    >>> import torch, refine_ext as rx
    >>> rx.rademacher(torch.ones(1, 3), draws=8, seed=0)
    Estimate(1 ± 0 (±outputs; 8 sign vectors, n = 1))
    """
    function = _Class("±outputs", _MAGNITUDE) if absolute else _Class("outputs", _LARGEST)
    options = (draws, seed, stderr, max_draws, precision, nan_policy, first_draw, bound)
    return _estimate("rademacher", "outputs", outputs, function, *options)


def rademacher_linear(
    features: Tensor,
    norm_bound: float = 1.0,
    draws: int = 1024,
    seed: int | None = None,
    *,
    stderr: float | None = None,
    max_draws: int | None = None,
    precision: Literal[1, 2, 3] = 3,
    nan_policy: Literal["raise", "propagate"] = "raise",
    first_draw: int = 0,
    bound: float | None = None,
) -> Estimate:
    """E_sigma (B/n) ||sum_i sigma_i phi_i||_2, the empirical Rademacher complexity of {<w, phi>, ||w||_2 <= B}.

    >>> import torch, refine_ext as rx
    >>> round(float(rx.rademacher_linear(torch.eye(100), norm_bound=2.0, draws=8, seed=0)), 6)  # 2 sqrt(100) / 100
    0.2
    """
    function = _Class("linear, 2-norm", _NORM, _norm_bound("rademacher_linear", norm_bound))
    options = (draws, seed, stderr, max_draws, precision, nan_policy, first_draw, bound)
    return _estimate("rademacher_linear", "features", features, function, *options)


def rademacher_l1(
    features: Tensor,
    norm_bound: float = 1.0,
    draws: int = 1024,
    seed: int | None = None,
    *,
    stderr: float | None = None,
    max_draws: int | None = None,
    precision: Literal[1, 2, 3] = 3,
    nan_policy: Literal["raise", "propagate"] = "raise",
    first_draw: int = 0,
    bound: float | None = None,
) -> Estimate:
    """E_sigma (B/n) ||sum_i sigma_i phi_i||_inf, the empirical Rademacher complexity of {<w, phi>, ||w||_1 <= B}.

    >>> import torch, refine_ext as rx
    >>> round(float(rx.rademacher_l1(torch.eye(100), norm_bound=2.0, draws=8, seed=0)), 6)  # 2 / 100
    0.02
    """
    function = _Class("linear, 1-norm", _MAGNITUDE, _norm_bound("rademacher_l1", norm_bound))
    options = (draws, seed, stderr, max_draws, precision, nan_policy, first_draw, bound)
    return _estimate("rademacher_l1", "features", features, function, *options)


def _norm_bound(function: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
        raise TypeError(f"{function}: norm_bound must be a number, got {type(value).__name__}")
    if not 0.0 < value < math.inf:
        raise ValueError(f"{function}: norm_bound must be positive and finite, got {value}")
    return float(value)


def _estimate(
    function: str,
    argument: str,
    outputs: Tensor,
    functions: _Class,
    draws: int,
    seed: int | None,
    stderr: float | None,
    max_draws: int | None,
    precision: int,
    nan_policy: str,
    first_draw: int,
    bound: float | None,
) -> Estimate:
    if isinstance(outputs, np.ndarray):
        outputs = torch.from_numpy(outputs)
    check_floating(function, argument, outputs)
    if outputs.dim() != 2:
        raise ValueError(f"{function}: {argument} must be [n, m], got shape {list(outputs.shape)}")
    if nan_policy not in ("raise", "propagate"):
        raise ValueError(f"{function}: nan_policy must be raise or propagate, got {nan_policy!r}")
    draws = whole(function, "draws", draws, 1)
    if seed is None:
        if torch.compiler.is_compiling():
            raise ValueError(f"{function}: give a seed under torch.compile, which would make one of all of them")
        seed = int(torch.randint(2**63 - 1, ()).item())
    elif isinstance(seed, Tensor):
        raise TypeError(f"{function}: seed must be an int, got a tensor")
    else:
        seed = check_seed(function, seed)  # type: ignore[assignment]

    def run(first: int, count: int) -> Estimate:
        each = _Draws(count, first, seed, precision, nan_policy == "raise", bound)
        return _in_memory(function, argument, outputs, functions, each)

    if stderr is None:
        return run(first_draw, draws)
    return until_stderr(function, run, first_draw, draws, stderr, max_draws)


def until_stderr(
    function: str,
    run: Callable[[int, int], Estimate],
    first_draw: int,
    draws: int,
    stderr: float,
    max_draws: int | None,
) -> Estimate:
    """`run(first draw, draws)` with twice the draws until their standard error is small enough."""
    if not (isinstance(stderr, (int, float)) and stderr > 0):
        raise ValueError(f"{function}: stderr must be positive, got {stderr!r}")
    most = whole(function, "max_draws", _MAX_DRAWS if max_draws is None else max_draws, draws)
    estimate, looks = run(first_draw, draws), 1
    while not estimate.stderr <= stderr and estimate.draws < most:
        count = min(estimate.draws, most - estimate.draws)
        estimate = estimate.merge(run(first_draw + estimate.draws, count))
        looks += 1
    estimate.looks = looks
    if not estimate.stderr <= stderr:
        warnings.warn(
            f"{function}: the standard error is {estimate.stderr:.3g} after {estimate.draws} draws, {stderr:.3g} was "
            "asked for; raise max_draws",
            stacklevel=4,
        )
    return estimate


def _in_memory(function: str, argument: str, outputs: Tensor, functions: _Class, draws: _Draws) -> Estimate:
    options = (draws.count, draws.first, draws.seed, functions.supremum, draws.precision)
    compiling = torch.compiler.is_compiling()
    try:
        if compiling or (outputs.requires_grad and torch.is_grad_enabled()):
            suprema, index, largest = _OP(outputs, *options)
        else:
            # The Python autograd layer costs as much as the kernel at small sizes.
            with torch._C._AutoDispatchBelowAutograd():
                suprema, index, largest = _OP(outputs, *options)
    except RuntimeError as error:
        reraise(function, error)
        raise
    scale = functions.norm_bound
    estimate = Estimate(
        suprema if scale == 1.0 else suprema * scale,
        outputs.shape[0],
        ((draws.first, draws.count),),
        draws.seed,
        functions.family,
        index=None if functions.supremum == _NORM else index,
        largest=largest if functions.supremum != _NORM else _row_norm(outputs),
        given_bound=draws.bound,
    )
    if scale != 1.0:
        estimate.largest = estimate.largest * scale  # type: ignore[operator]
    # Inside torch.func the values cannot be read.
    if not draws.check or compiling or torch._C._functorch.peek_interpreter_stack() is not None:
        return estimate
    if outputs.device.type == "cpu":
        if math.isnan(suprema[0].item()):
            refuse_nan(function, argument, largest, outputs)
    else:
        estimate.pending = lambda: refuse_nan(function, argument, largest)
    return estimate


def _row_norm(features: Tensor) -> Tensor:
    return torch.linalg.vector_norm(features.detach(), dim=1, dtype=torch.float64).max()


def refuse_nan(function: str, argument: str, largest: Tensor, rows: Tensor | None = None, first_row: int = 0) -> None:
    """Raise where a column's largest magnitude is not finite, naming the column and, of `rows`, its first bad row."""
    bad = (~largest.isfinite()).nonzero()
    if not len(bad):
        return
    column = int(bad[0])
    where = f"column {column}"
    if rows is not None:
        row = int((~rows[:, column].isfinite()).nonzero()[0])
        where += f", row {first_row + row}"
        value: Any = rows[row, column].item()
    else:
        value = "NaN or infinity"
    raise ValueError(
        f"{function}: {argument} has {value} in {where}; only finite values are allowed (nan_policy='propagate' lets "
        "them through)"
    )
