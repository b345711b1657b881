"""Log-mixtures whose centres come in blocks from a file or a generator, read once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._call import called
from ._ops_log_mixture import ops
from .mixture_arguments import as_array_tensor, as_scale, log_count, refuse_nan

_OP, _OP_WITH_SCORE = ops.log_mixture.default, ops.log_mixture_with_score.default
_BLOCK_BYTES = 64 << 20


class Blocks:
    """Blocks of centres, and the shape of one, for which the first block is read at once."""

    def __init__(self, function: str, source: Iterable[Any]) -> None:
        self._function, self._source = function, iter(source)
        self._first = next(self._source, None)
        if self._first is None:
            raise ValueError(f"{function}: centers must not be empty, got no blocks")
        self.shape = tuple(self._tensor(self._first).shape[1:])

    def __iter__(self) -> Iterator[Tensor]:
        first, self._first = self._first, None
        if first is None:
            raise ValueError(f"{self._function}: the blocks of centers were read before")
        yield self._tensor(first)
        for block in self._source:
            tensor = self._tensor(block)
            if tuple(tensor.shape[1:]) != self.shape:
                raise ValueError(
                    f"{self._function}: blocks of centers must be [n, {', '.join(map(str, self.shape))}], "
                    f"got {list(tensor.shape)}"
                )
            yield tensor

    def _tensor(self, block: Any) -> Tensor:
        return as_array_tensor(self._function, "centers", block, may_be_empty=True).detach()


def blocks_of(function: str, centers: Any) -> Blocks | None:
    """None for what is in memory."""
    if isinstance(centers, np.memmap):
        return Blocks(function, _rows(centers))
    if isinstance(centers, (Tensor, np.ndarray)) or hasattr(centers, "__dlpack__"):
        return None
    if callable(centers):
        centers = centers()
    if isinstance(centers, (str, bytes)) or not isinstance(centers, Iterable):
        raise TypeError(
            f"{function}: centers must be a tensor, a NumPy array, blocks of centers in an iterable, or a function "
            f"that returns one, got {type(centers).__name__}"
        )
    return Blocks(function, centers)


def _rows(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
    for first in range(0, len(array), rows):
        yield np.array(array[first : first + rows])


class StreamedMixture:
    """The mixture of all blocks, of which one is in memory at a time; made for one pass."""

    def __init__(
        self, function: str, blocks: Blocks, scale: Any, log_weights: Tensor | None, normalized: bool, check: bool
    ) -> None:
        self.function, self.blocks, self.scale, self.log_weights = function, blocks, scale, log_weights
        self.normalized, self.check = normalized, check
        tensors = [t for t in (scale, log_weights) if isinstance(t, Tensor)]
        if any(t.requires_grad for t in tensors) and torch.is_grad_enabled():
            raise ValueError(f"{function}: streamed centers have gradients by x only, not by scale or weights")
        if isinstance(scale, Tensor) and scale.numel() != 1:
            raise ValueError(f"{function}: streamed centers take one scale, got shape {list(scale.shape)}")

    def apply(
        self, x: Tensor, exclude: Tensor | None, mean: bool, stats: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if x.requires_grad and torch.is_grad_enabled():
            if mean:
                raise ValueError(f"{self.function}: the mean of streamed centers has no gradient; x.detach() it")
            return _Streamed.apply(x, self, exclude, stats)
        return self.pass_over(x.detach(), exclude, mean, stats)

    def pass_over(
        self, x: Tensor, exclude: Tensor | None, want_mean: bool, want_stats: bool, want_score: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, means or scores, statistics and the first centres of the largest weights."""
        want_vectors = want_mean or want_score
        value = x.new_full((len(x),), -math.inf, dtype=torch.float64)
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        empty = math.nan if want_mean else 0.0  # of a row that no centre has a weight in
        vectors = x.new_full(x.shape if want_vectors else (0, x.shape[1]), empty, dtype=torch.float64)
        largest, squares = value.clone(), value.clone()  # log max_j p_j and log sum_j p_j^2, times the sum
        top = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        scale = as_scale(self.function, self.scale, (), 1, kind, x.device, self.check).reshape(())
        n = 0
        for block in self.blocks:
            centers = block.reshape(len(block), x.shape[1]).to(device=x.device, dtype=x.dtype)
            if len(centers) == 0:
                continue
            part = self._weights_of(n, len(centers), x.device, kind)
            local = None
            if exclude is not None:
                local = torch.where((exclude >= n) & (exclude < n + len(centers)), exclude - n, -1)
            inputs = (x, centers, scale, part, local)
            if want_score:
                v, m = called(self.function, _OP_WITH_SCORE, False, *inputs)
            if want_stats or not want_score:
                v, *means, s, t = called(self.function, _OP, False, *inputs, want_mean, want_stats)
                m = m if want_score else means[0]
            if self.check:
                refuse_nan(self.function, v, x, centers, part)
            total = torch.logaddexp(value, v)
            if want_vectors:
                old, new = _share(value, total), _share(v, total)
                vectors = torch.where(old > 0, old * vectors, 0.0) + torch.where(new > 0, new * m, 0.0)
                vectors = torch.where(total.unsqueeze(1) == -math.inf, empty, vectors)
            if want_stats:
                candidate = torch.where(t >= 0, s[:, 0].log() + v, -math.inf)
                later = candidate > largest
                top = torch.where(later, t + n, top)
                largest = torch.where(later, candidate, largest)
                squares = torch.logaddexp(squares, torch.where(t >= 0, 2 * v - s[:, 1].log(), -math.inf))
            value = total
            n += len(centers)
        if n == 0:
            raise ValueError(f"{self.function}: centers must not be empty, got blocks without rows")
        self._weights_of(n, 0, x.device, kind, last=True)
        numbers = value.new_empty((0, 2))
        if want_stats:
            numbers = torch.stack([(largest - value).exp(), (2 * value - squares).exp()], 1)
        if self.normalized:
            value = value - x.shape[1] * (scale.double().log() + 0.5 * math.log(2 * math.pi))
        if self.log_weights is None:
            value = value - log_count(n, exclude)
        return value, vectors.to(kind), numbers, top if want_stats else top[:0]

    def _weights_of(self, first: int, count: int, device: Any, dtype: torch.dtype, last: bool = False) -> Tensor | None:
        if self.log_weights is None:
            return None
        have = len(self.log_weights)
        if first + count > have or (last and first != have):
            raise ValueError(
                f"{self.function}: weights must be one for each centre, got {have} for "
                f"{'' if last else 'at least '}{first + count} centers"
            )
        return self.log_weights[first : first + count].detach().to(device=device, dtype=dtype)


def _share(part: Tensor, total: Tensor) -> Tensor:
    return torch.where(part == -math.inf, 0.0, (part - total).exp()).unsqueeze(1)


class _Streamed(torch.autograd.Function):
    """The one pass over the blocks also makes the gradient by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stream: StreamedMixture, exclude: Tensor | None, stats: bool):
        value, score, numbers, top = stream.pass_over(x.detach(), exclude, False, stats, want_score=True)
        ctx.save_for_backward(score)
        ctx.dtype = x.dtype
        ctx.mark_non_differentiable(numbers, top)
        return value, score[:0], numbers, top

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any):
        (score,) = ctx.saved_tensors
        return (grad.unsqueeze(1) * score).to(ctx.dtype), None, None, None
