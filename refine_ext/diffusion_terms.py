"""The terms of a diffusion's bound that its training data alone decide, A and B, sample by sample; their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from .arguments import check_seed
from .forward_process import ForwardProcess, forward_process
from .guidance import guided_step
from .log_mixture import log_mixture
from .samples import check_finite_rows

_BLOCK_ELEMENTS = 1 << 22  # of the noised samples that are in memory at once
_BLOCK_ROWS = 1 << 16


class Numbers(NamedTuple):
    """The random numbers of a seed, the same at every T: where the noise of each estimate starts, and more."""

    mixture: int
    score: int
    matching: int
    generator: torch.Generator

    @classmethod
    def of(cls, seed: int) -> Numbers:
        generator = torch.Generator().manual_seed(seed)
        mixture, score, matching = torch.randint(2**62, (3,), generator=generator).tolist()
        return cls(mixture, score, matching, generator)


def mixture_divergences(
    data: Tensor,
    process: ForwardProcess,
    time: Tensor,
    draws: int,
    base: int,
    rows: Tensor | None = None,
    advance: Callable[[int], Any] = lambda n: None,
) -> tuple[Tensor, Tensor]:
    """``[k, draws]`` float64 estimates of KL(E_T(x_i) || mixture of all), and of all but x_i; of all samples or `rows`.

    Draw r of sample i has the noise of seed ``base + i draws + r``, whatever the blocks. Differentiable in data and
    time.
    """
    m, d = data.shape
    coefficients = torch.stack([process.signal(time), process.noise(time)])
    index = torch.arange(m, device=data.device) if rows is None else rows
    size = max(1, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // d) // draws)
    parts = index.split(size)
    found = []
    for part in parts:
        if len(parts) > 1 and torch.is_grad_enabled() and (data.requires_grad or coefficients.requires_grad):
            from torch.utils.checkpoint import checkpoint

            block = checkpoint(
                _block, data, coefficients, part, draws, base, use_reentrant=False, preserve_rng_state=False
            )
        else:
            block = _block(data, coefficients, part, draws, base)
        found.append(block)
        advance(len(part) * draws)
    left_out = torch.cat(found)
    if m == 1:
        return left_out * 0.0, left_out * math.nan
    # Of all blocks at once: torch's logarithms are not the same bits at the end of a tensor as inside.
    excess = math.log(m - 1) - left_out
    return math.log(m) - torch.logaddexp(excess, torch.zeros_like(excess)), left_out


def _block(data: Tensor, coefficients: Tensor, index: Tensor, draws: int, base: int) -> Tensor:
    """``[k, draws]`` float64 log E_T(x_i)(z) - log of the mixture of the others at z, of the samples `index`."""
    scale = coefficients[1]
    centers = data * coefficients[0].to(data.dtype)
    leave = index.repeat_interleave(draws)
    seeds = base + (index.unsqueeze(1) * draws + torch.arange(draws, device=index.device)).flatten()
    z = guided_step(data[leave], [], coefficients, seed=seeds)
    # |eps|^2 / 2 of what z is after rounding, which is what the mixture's own term would be: no gradient flows, eps is.
    own = z.detach() - centers.detach()[leave]
    distance = torch.linalg.vector_norm(own, dim=1, dtype=torch.float64)  # no float64 copy is made
    exponent = -0.5 * (distance / scale.detach()).square()
    if len(data) == 1:
        return exponent.reshape(-1, draws)
    others = log_mixture(z, centers, scale, leave_one_out=leave, dtype=torch.float64, nan_policy="propagate")
    return (exponent - cast(Tensor, others)).reshape(-1, draws)


def prior_roots(data: Tensor, process: ForwardProcess, time: Tensor) -> Tensor:
    """``[m]`` float64 ``sqrt(KL(E_T(x_i) || N(0, p^2 I)))``, ``KL = (d (v - 1 - log v) + a^2 |x|^2 / p^2) / 2``,
    ``v = sigma^2 / p^2``."""
    prior = process.prior_std(time)
    excess = (process.noise(time) / prior).square() - 1.0
    signal = (process.signal(time) / prior).square()
    squares = data.square().sum(1, dtype=torch.float64)
    kl = 0.5 * (data.shape[1] * (excess - torch.log1p(excess)) + signal * squares)
    # The root has no slope at its minimum 0: 0 is taken, where autograd would find infinity times zero.
    positive = kl > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, kl, 1.0)), 0.0)


def checked_data(function: str, data: Tensor, least: int) -> tuple[Tensor, tuple[int, ...]]:
    if data.numel() == 0:
        raise ValueError(f"{function}: data is empty, shape {list(data.shape)}")
    if len(data) < least:
        raise ValueError(f"{function}: data has {len(data)} sample, at least {least} are needed")
    check_finite_rows(data, function=function, argument="data")
    return data.reshape(len(data), -1), tuple(data.shape[1:])


def checked_rows(function: str, rows: Any, m: int) -> Tensor:
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"{function}: rows must be an int64 tensor, got {got}")
    if rows.dim() != 1 or len(rows) == 0:
        raise ValueError(f"{function}: rows must be [k] with k at least 1, got {list(rows.shape)}")
    if int(rows.min()) < 0 or int(rows.max()) >= m:
        raise ValueError(f"{function}: rows must be from 0 to {m - 1}, got {int(rows.min())} to {int(rows.max())}")
    return rows


def schedule_of(function: str, schedule: Any) -> ForwardProcess:
    try:
        return forward_process(schedule)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("forward_process", function)) from None


def checked_seed(function: str, seed: Any) -> int:
    if isinstance(seed, Tensor):
        raise TypeError(f"{function}: seed must be an int, got a tensor")
    if isinstance(seed, np.integer):
        seed = int(seed)
    return int(check_seed(function, seed))
