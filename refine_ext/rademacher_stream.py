"""Suprema of signed sums over values that come in blocks of rows, and of sums with normal multipliers.

Sums of sign vectors are exact in blocks of 1024 samples, which are then added in their order: read in any blocks of
rows, in any groups of draws, the bits are those of one call on the whole tensor. Sums of normal multipliers are matrix
products, equal to a rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._ops_rademacher import SUPREMA, ops
from .arguments import check_floating, values_readable
from .progress import progress_bar
from .samples import as_tensor

SIGN_BLOCK = 1024  # csrc/math/rademacher.h kSignBlock
_LANES = 16  # csrc/math/rademacher_problem.h, of a norm's squares
_NORMALS = 1 << 21  # multipliers at once
_LARGEST, _MAGNITUDE, _NORM = (SUPREMA.index(name) for name in ("largest", "magnitude", "norm"))


@dataclass(frozen=True)
class Multipliers:
    """Draws first .. first + count - 1 of a seed, signs or standard normals."""

    count: int
    first: int
    seed: int
    normal: bool

    def part(self, start: int, count: int) -> Multipliers:
        return replace(self, first=self.first + start, count=count)


class Rows:
    """[n, m] values in blocks of rows: a tensor, a NumPy array or map, an iterable of such, or a function that
    returns one."""

    def __init__(self, function: str, argument: str, source: Any, block_bytes: int) -> None:
        self.function, self.argument, self._source, self._block_bytes = function, argument, source, block_bytes
        self.shape = tuple(source.shape) if isinstance(source, (Tensor, np.ndarray)) else None
        self._kind: tuple[int, torch.dtype, torch.device] | None = None
        self.once = isinstance(source, Iterator)
        if isinstance(source, (str, bytes)) or not (
            self.shape is not None or callable(source) or isinstance(source, Iterable)
        ):
            raise TypeError(
                f"{function}: {argument} must be a tensor, a NumPy array, row blocks in an iterable, or a function "
                f"that returns one, got {type(source).__name__}"
            )

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, block), where every first row is a multiple of 1024."""
        pieces: list[Tensor] = []  # of less than 1024 rows
        row = held = 0
        for block in self._blocks():
            while held + len(block) >= SIGN_BLOCK:
                if pieces:
                    pieces.append(block[: SIGN_BLOCK - held])
                    block = block[SIGN_BLOCK - held :]
                    yield row, torch.cat(pieces)
                    row, pieces, held = row + SIGN_BLOCK, [], 0
                else:
                    whole = len(block) // SIGN_BLOCK * SIGN_BLOCK
                    yield row, block[:whole]
                    row, block = row + whole, block[whole:]
            if len(block):
                pieces.append(block.clone())  # the whole block need not stay
                held += len(block)
        if pieces:
            yield row, torch.cat(pieces)

    def _blocks(self) -> Iterator[Tensor]:
        if self.shape is not None:
            element = self._source.dtype.itemsize
            rows = max(1, self._block_bytes // (element * max(1, self.shape[1]) * SIGN_BLOCK)) * SIGN_BLOCK
            for start in range(0, self.shape[0], rows):
                block = self._source[start : start + rows]
                yield self._checked(block if isinstance(block, Tensor) else np.array(block))
            return
        blocks = self._source() if callable(self._source) else self._source
        if not isinstance(blocks, Iterable):
            raise TypeError(
                f"{self.function}: the function {self.argument} must return an iterable of row blocks, got "
                f"{type(blocks).__name__}"
            )
        for block in blocks:
            values = self._checked(block)
            # A block of a network's outputs over a whole file would not fit beside its copies.
            yield from values.split(max(SIGN_BLOCK, self._block_bytes // max(1, values[:1].nbytes)))

    def _checked(self, block: Any) -> Tensor:
        what = f"a block of {self.argument}"
        if isinstance(block, Tensor):
            check_floating(self.function, what, block)
            if block.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{self.function}: {what} requires gradients, which row blocks have not; give one tensor, or use "
                    "torch.no_grad()"
                )
            values = block.detach()
        else:
            values = as_tensor(block, function=self.function, argument=what)
            if values.numel() == 0:
                raise ValueError(f"{self.function}: {what} must not be empty, got shape {list(values.shape)}")
        if values.dim() == 1:
            values = values.unsqueeze(1)
        if values.dim() != 2:
            raise ValueError(f"{self.function}: {what} must be [rows, m], got shape {list(values.shape)}")
        kind = (values.shape[1], values.dtype, values.device)
        self._kind = self._kind or kind
        if kind != self._kind:
            raise ValueError(
                f"{self.function}: the blocks of {self.argument} must be alike, got [rows, {kind[0]}] {kind[1]} on "
                f"{kind[2]} after [rows, {self._kind[0]}] {self._kind[1]} on {self._kind[2]}"
            )
        return values


@dataclass(frozen=True)
class Suprema:
    """What one reading of all rows gives: as the op `rademacher_suprema`, and the largest 2-norm of a row."""

    suprema: Tensor
    index: Tensor
    largest: Tensor
    row_norm: Tensor
    n: int


def streamed_suprema(
    rows: Rows,
    draws: Multipliers,
    supremum: int,
    memory: int,
    progress: bool | None,
    inspect: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Suprema:
    """The suprema of all draws; the rows are read once for each group of draws whose sums fit into the memory.

    `inspect(first row, block, its largest magnitudes [m])` sees every block of the first reading.
    """

    groups: list[tuple[Tensor, Tensor]] = []
    largest = row_norm = None
    start = n = total = 0
    known = rows.shape[0] if rows.shape else None
    with progress_bar(rows.function, known, progress) as bar:
        while start < draws.count:
            sums, count, seen = None, 0, 0
            for first_row, block in rows:
                if sums is None:
                    m = block.shape[1]
                    count = min(draws.count - start, max(1, memory // (16 * m)))  # the sums, and as much to reduce them
                    passes = -(-draws.count // count) if start == 0 else 0
                    if passes > 1 and rows.once:
                        raise ValueError(
                            f"{rows.function}: {rows.argument} is an iterator, which can be read once, and the sums of "
                            f"{draws.count} draws and {m} columns need {8 * m * draws.count / 2**20:.0f} MiB, or "
                            f"{passes} readings; give a function that returns one, or raise memory="
                        )
                    if passes > 1 and known is not None:
                        bar.total = known * passes
                    sums = torch.zeros(count, m, dtype=torch.float64, device=block.device)
                    part = draws.part(start, count)
                if start == 0:
                    peak = column_peaks(block)
                    if inspect is not None:
                        inspect(first_row, block, peak)
                    norm = largest_row_norm(block) if supremum == _NORM else peak.new_zeros(())
                    largest = peak if largest is None else torch.maximum(largest, peak)
                    row_norm = norm if row_norm is None else torch.maximum(row_norm, norm)
                add_sums(sums, block, first_row, part)
                seen += len(block)
                bar.update(len(block))
            if sums is None:
                raise ValueError(f"{rows.function}: {rows.argument} must not be empty, got no row blocks")
            if start and seen != n:
                raise ValueError(
                    f"{rows.function}: {rows.argument} had {n} rows when first read and {seen} when read again"
                )
            n = seen
            groups.append(reduce_sums(sums, n, supremum))
            start += count
            total += seen
        bar.total = total
    suprema, index = (torch.cat(each) for each in zip(*groups, strict=True))
    assert largest is not None and row_norm is not None
    return Suprema(suprema, index, largest, row_norm, n)


def add_sums(sums: Tensor, block: Tensor, first_row: int, draws: Multipliers) -> None:
    """sums [draws, m] float64 += multipliers' block, row 0 of which is sample first_row, a multiple of 1024."""
    if not draws.normal:
        ops.rademacher_sums(sums, block, first_row, draws.first, draws.seed)
        return
    values = block if block.dtype == torch.float64 else block.float()
    rows = min(len(block), 8 * SIGN_BLOCK)
    step = max(1, _NORMALS // max(rows, block.shape[1]))
    with torch.autocast(block.device.type, enabled=False):
        for row in range(0, len(block), rows):
            part = values[row : row + rows]
            for start in range(0, draws.count, step):
                target = sums[start : start + step]
                target += multipliers(part, len(part), first_row + row, draws.part(start, len(target))) @ part


def multipliers(like: Tensor, n: int, first_row: int, draws: Multipliers) -> Tensor:
    """[draws, n] of the samples from first_row on, in the dtype and on the device of `like`."""
    return ops.multipliers(like, n, draws.count, first_row, draws.first, draws.seed, draws.normal)


def reduce_sums(sums: Tensor, n: int, supremum: int) -> tuple[Tensor, Tensor]:
    """The supremum of each draw's sums divided by n, and the column that has it, coded as by `rademacher_suprema`."""
    count = torch.full((), n, dtype=torch.float64, device=sums.device)  # a number's reciprocal would be multiplied by
    if supremum == _NORM:
        squares = sums * sums
        lanes = sums.new_zeros(len(sums), _LANES)
        for start in range(0, sums.shape[1], _LANES):
            part = squares[:, start : start + _LANES]
            lanes[:, : part.shape[1]] += part
        total = lanes[:, 0].clone()
        for lane in range(1, _LANES):
            total += lanes[:, lane]
        # On the CPU torch's square root is not correctly rounded, which the op's is.
        root = torch.from_numpy(np.sqrt(total.numpy())) if total.device.type == "cpu" else total.sqrt()
        return root / count, torch.full((len(sums),), -1, device=sums.device)
    column = (sums.abs() if supremum == _MAGNITUDE else sums).argmax(1)
    best = sums.gather(1, column[:, None])[:, 0]
    return (best.abs() if supremum == _MAGNITUDE else best) / count, torch.where(best < 0, -1 - column, column)


def largest_row_norm(rows: Tensor) -> Tensor:
    """max_i ||row i||_2, 0-dim float64."""
    rows = rows.detach()
    step = max(1, (1 << 18) // rows.shape[1])
    if rows.device.type == "cpu" and rows.dtype != torch.float64 and values_readable():
        # Float32 norms, 35 times as fast, say which rows may have it: their error is far below 1e-4 of them as long
        # as no square leaves the range.
        rough = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in rows.split(step)])
        largest = rough.amax()
        if 1e-15 < largest < 1e15:
            rows = rows[rough >= largest * (1 - 1e-4)]
    norms = [torch.linalg.vector_norm(part.double(), dim=1).amax() for part in rows.split(step)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).amax()


def column_peaks(rows: Tensor) -> Tensor:
    """max_i |row i| of each column, [m] float64, NaN where there is one; torch's norm takes five times as long."""
    rows = rows.detach()
    return torch.maximum(rows.amax(0), rows.amin(0).neg()).double()


class NormalSuprema(torch.autograd.Function):
    """(suprema, index, largest, row norm) of normal multipliers on a tensor, with the gradient of the maximiser."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, draws: Multipliers, supremum: int, memory: int, rows: Rows, progress: Any):
        found = streamed_suprema(rows, draws, supremum, memory, progress)
        ctx.draws, ctx.supremum = draws, supremum
        ctx.save_for_backward(outputs, found.suprema, found.index)
        ctx.mark_non_differentiable(found.index, found.largest, found.row_norm)
        return found.suprema, found.index, found.largest, found.row_norm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any):
        outputs, suprema, index = ctx.saved_tensors
        n, m = outputs.shape
        values = outputs if outputs.dtype == torch.float64 else outputs.float()
        result = torch.zeros_like(values, memory_format=torch.contiguous_format)
        step = max(1, _NORMALS // max(m, 8 * SIGN_BLOCK))
        with torch.autocast(outputs.device.type, enabled=False):
            for start in range(0, len(grad), step):
                part = slice(start, start + step)
                draws = ctx.draws.part(start, len(grad[part]))
                if ctx.supremum == _NORM:
                    sums = values.new_zeros(draws.count, m, dtype=torch.float64)
                    add_sums(sums, values, 0, draws)
                    scale = torch.where(suprema[part] > 0, grad[part] / (suprema[part] * float(n) ** 2), 0.0)
                    weights = (sums * scale[:, None]).to(values.dtype)
                else:
                    # A matrix with one number to a row: a product has an order that scattered sums on a GPU have not.
                    column = torch.where(index[part] < 0, -1 - index[part], index[part])
                    signed = torch.where(index[part] < 0, -grad[part], grad[part]) / n
                    weights = values.new_zeros(draws.count, m).scatter_(
                        1, column[:, None], signed[:, None].to(values.dtype)
                    )
                for row in range(0, n, 8 * SIGN_BLOCK):
                    target = result[row : row + 8 * SIGN_BLOCK]
                    target += multipliers(target, len(target), row, draws).T @ weights
        return result.to(outputs.dtype), None, None, None, None, None
