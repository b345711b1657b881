"""Complexity of the ball of a reproducing kernel Hilbert space, block by block of its Gram matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .arguments import check_floating, positive
from .complexity_estimate import Estimate
from .progress import progress_bar
from .rademacher_stream import Multipliers, add_sums, column_peaks, multipliers
from .rademacher_suprema import (
    MEMORY,
    NORM,
    Functions,
    Options,
    Range,
    all_signs,
    check_all_signs,
    check_options,
    draw,
    made,
    refuse_nonfinite,
)
from .samples import as_tensor

_BLOCK = 2048  # samples, whatever the memory: sums then have one order
_NAME = "rademacher_rkhs"

Kernel = Callable[[Tensor, Tensor], Tensor]


def rademacher_rkhs(
    gram: Tensor | np.ndarray | None = None,
    norm_bound: float = 1.0,
    draws: int | Literal["all"] = 1024,
    seed: int | None = None,
    *,
    kernel: Kernel | None = None,
    x: Tensor | np.ndarray | None = None,
    distribution: Literal["rademacher", "normal"] = "rademacher",
    stderr: float | None = None,
    max_draws: int | None = None,
    nan_policy: Literal["raise", "propagate"] = "raise",
    first_draw: int = 0,
    bound: float | None = None,
    memory: int = MEMORY,
    progress: bool | None = None,
) -> Estimate:
    """R_n = E_sigma (B/n) sqrt(sigma' G sigma), the complexity of the ball {||f|| <= B} of a kernel k's function space.

    G_ij = k(x_i, x_j). At most B sqrt(trace G) / n, and at least that over sqrt(2). Of a kernel only blocks of
    2048 x 2048 values are in memory, and by symmetry half of them are asked for.

    Args:
        gram: `[n, n]`, G; symmetric and positive semidefinite. Or give kernel and x.
        norm_bound: B.
        kernel: k, a function of two batches `[r, ...]` and `[c, ...]` of samples that returns `[r, c]`.
        x: `[n, ...]`, the samples.
        bound: M >= max |f(x_i)| = B max_i sqrt(k(x_i, x_i)). None: the largest seen.
        memory: bytes that sums may take; more draws are done in several passes over the blocks.
        draws, seed and the others: see `rademacher`.

    Returns:
        `Estimate`, without argmax and without gradients.

    Raises:
        TypeError: neither a gram nor both of kernel and x; a type or dtype that is not supported.
        ValueError: a matrix that is not square, symmetric and positive semidefinite, to the square root of its
            precision; NaN or infinity in it; see `rademacher` for the others.

    Source: Mohri et al., 2nd edition, Theorem 6.12; Bartlett and Mendelson 2002, Lemma 22.

    >>> import torch, refine_ext as rx
    >>> rx.rademacher_rkhs(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), draws="all")  # (sqrt(6) + sqrt(2)) / 2 / 2
    Estimate(0.965926 (kernel, norm, all 4 sign vectors, n = 2))
    """
    functions = Functions("kernel, norm", NORM, positive(_NAME, "norm_bound", norm_bound))
    options = Options(draws, seed, distribution, stderr, max_draws, 3, nan_policy, first_draw, bound, memory, progress)
    check_options(_NAME, options)
    n, block = _blocks(gram, kernel, x, check=nan_policy == "raise")
    if isinstance(draws, str):
        check_all_signs(_NAME, n, options)
        with torch.no_grad():
            matrix = block(0, 0)
            values, vectors = torch.linalg.eigh(matrix.double())
            _refuse_indefinite(values, matrix.diagonal(), matrix.dtype)
            features = vectors * values.clamp(min=0.0).sqrt()  # whose inner products are the matrix
        return all_signs(_NAME, "gram", features, functions, options)

    def run(range_: Range) -> Estimate:
        suprema, diagonal = _suprema(n, block, range_, options)
        index = torch.full_like(suprema, -1, dtype=torch.int64)
        found = (suprema, index, diagonal, diagonal.amax().sqrt(), n)
        return made(_NAME, "gram", functions, options, range_, found, True)

    return draw(_NAME, run, options)


def _blocks(gram: Any, kernel: Kernel | None, x: Any, check: bool) -> tuple[int, Callable[[int, int], Tensor]]:
    """n, and G's block of the samples from row and from column on, checked."""
    if (gram is None) == (kernel is None or x is None) or (gram is not None and not (kernel is None and x is None)):
        given = [name for name, value in (("gram", gram), ("kernel", kernel), ("x", x)) if value is not None]
        raise TypeError(f"{_NAME}: give gram, or kernel and x, got {', '.join(given) or 'none of them'}")
    source = gram if gram is not None else x
    argument = "gram" if gram is not None else "x"
    if isinstance(source, Tensor) and source.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{_NAME}: {argument} requires gradients, which are not supported; use torch.no_grad()")
    values = as_tensor(source, function=_NAME, argument=argument) if isinstance(source, np.ndarray) else source
    check_floating(_NAME, argument, values)
    n = len(values)
    if gram is not None and list(values.shape) != [n, n]:
        raise ValueError(f"{_NAME}: gram must be [n, n], got shape {list(values.shape)}")
    if kernel is not None and not callable(kernel):
        raise TypeError(f"{_NAME}: kernel must be a function of two batches of samples, got {type(kernel).__name__}")
    largest = 0.0

    def block(row: int, column: int) -> Tensor:
        nonlocal largest
        rows, columns = slice(row, row + _BLOCK), slice(column, column + _BLOCK)
        if kernel is None:
            part = values[rows, columns]
        else:
            part = kernel(values[rows], values[columns])
            check_floating(_NAME, "what the kernel returns", part)
            shape = [len(values[rows]), len(values[columns])]
            if list(part.shape) != shape:
                raise ValueError(f"{_NAME}: kernel must return {shape} for so many samples, got {list(part.shape)}")
        if check:
            what = argument if kernel is None else "kernel"
            refuse_nonfinite(_NAME, what, column_peaks(part), part, row, column)
        other = part.T if row == column else values[columns, rows].T if kernel is None else None
        tolerance = torch.finfo(part.dtype).eps ** 0.5
        if row == column:
            peak = float(part.diagonal().abs().amax())
            largest = largest if peak <= largest else peak
        if other is not None and float((part - other).abs().amax()) > tolerance * largest:
            raise ValueError(f"{_NAME}: {'gram' if kernel is None else 'kernel'} must be symmetric")
        return part

    return n, block


def _suprema(n: int, block: Callable[[int, int], Tensor], range_: Range, options: Options) -> tuple[Tensor, Tensor]:
    """sqrt(sigma' G sigma) / n of each draw, and G's diagonal."""

    first, count, seed = range_
    group = min(count, max(1, options.memory // (24 * _BLOCK)))
    starts = range(0, n, _BLOCK)
    parts, diagonals = [], []
    total = -(-count // group) * len(starts) * (len(starts) + 1) // 2
    with progress_bar(_NAME, total, options.progress, "block") as bar, torch.no_grad():
        for start in range(0, count, group):
            draws = Multipliers(min(group, count - start), first + start, seed, options.distribution == "normal")
            squares = None
            for row in starts:
                for column in starts[row // _BLOCK :]:
                    part = block(row, column)
                    if squares is None:
                        squares = torch.zeros(draws.count, dtype=torch.float64, device=part.device)
                    sums = squares.new_zeros(draws.count, part.shape[1])
                    add_sums(sums, part, row, draws)
                    like = part if part.dtype == torch.float64 else part.float()
                    twice = (sums * multipliers(like, part.shape[1], column, draws)).sum(1)
                    squares += twice if row == column else 2 * twice
                    if start == 0 and row == column:
                        diagonals.append(part.diagonal().double())
                    bar.update()
            assert squares is not None
            parts.append(squares)
    squares, diagonal = torch.cat(parts), torch.cat(diagonals)
    _refuse_indefinite(squares, diagonal, part.dtype)
    return squares.clamp(min=0.0).sqrt() / n, diagonal


def _refuse_indefinite(squares: Tensor, diagonal: Tensor, dtype: torch.dtype) -> None:
    """Raise where a quadratic form is negative beyond the rounding of the matrix, whose trace is that of `diagonal`."""
    least = float(squares.min())
    if least < -(torch.finfo(dtype).eps ** 0.5) * float(diagonal.abs().sum()) or bool((diagonal < 0).any()):
        raise ValueError(f"{_NAME}: the Gram matrix must be positive semidefinite, got sigma' G sigma = {least:.3g}")
