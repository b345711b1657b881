"""Gaussian log-mixtures: log-density, posterior mean and weights over all centres, without an M x N array."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._autograd import is_transformed
from ._call import called
from ._ops_log_mixture import ops
from .arguments import values_readable
from .mixture_arguments import (
    as_array_tensor,
    as_excluded,
    as_log_weights,
    as_scale,
    batch_shape,
    log_count,
    refuse_nan,
)
from .mixture_stream import StreamedMixture, blocks_of

_OP, _OP_WITH_SCORE = ops.log_mixture.default, ops.log_mixture_with_score.default
_LOG_2PI = math.log(2 * math.pi)


class LogMixture(NamedTuple):
    """What :func:`log_mixture` knows with ``return_stats=True``.

    Attributes:
        value: L, shaped as x without the dimensions of a sample.
        mean: sum_j p_j y_j, shaped as x, the ideal denoiser of the centres; None unless asked for.
        top_weight: max_j p_j, float64.
        effective_centers: 1 / sum_j p_j^2, float64: between 1 and N.
        top_index: int64, the first j with the largest p_j; -1 where no centre has a weight.
    """

    value: Tensor
    mean: Tensor | None
    top_weight: Tensor
    effective_centers: Tensor
    top_index: Tensor


def log_mixture(
    x: Any,
    centers: Any,
    scale: float | Tensor,
    weights: Any = None,
    *,
    log_weights: Any = None,
    return_mean: bool = False,
    return_stats: bool = False,
    leave_one_out: bool | Tensor = False,
    normalized: bool = False,
    dtype: torch.dtype | None = None,
    nan_policy: Literal["raise", "propagate"] | None = None,
) -> Tensor | tuple[Tensor, Tensor] | LogMixture:
    """``L(x) = log sum_j w_j exp(-|x - y_j|^2 / (2 s^2))``, its weights p_j and its mean ``m(x) = sum_j p_j y_j``.

    The log-likelihood of a kernel density estimate, the marginal of a diffusion's training set at a noise level (m is
    then the ideal denoiser, ``grad L = (m - x) / s^2`` the ideal score), the aggregated posterior of a VAE. Every pair
    is worked on in one pass; memory is that of x, centres and results. Differences are squared as they are: data far
    from the origin lose nothing, as they do in ``|x|^2 + |y|^2 - 2 x y``.

    First derivatives of L by x, centers, scale and weights come from one more fused pass (from 256 dimensions on, on
    the CPU, weights p_j below 2^-80 are zero there), on the CPU from the same one where only x needs a gradient; those
    of the mean, and second derivatives, from torch's operations on blocks of rows.

    Args:
        x: ``[..., *shape]``, any number of leading dimensions; float64, float32, float16 or bfloat16, uint8 as
            float32; a tensor, a NumPy array, or anything with DLPack's protocol.
        centers: ``[N, *shape]``; ``[N]`` for numbers. A NumPy memory map, an iterable of blocks ``[n, *shape]``, or a
            function that returns one, is streamed: N is bounded by the disk. A stream is read once, takes one scale,
            and has gradients by x only.
        scale: s > 0 in the units of x: a number, ``[N]``, or ``[N, *shape]`` (``[1, *shape]``: one for each
            dimension), as a VAE's posteriors have.
        weights: ``[N]``, not negative, used as they are. None: 1 / N, and 1 / (N - 1) where one is left out. No
            gradient flows to a weight of 0.
        log_weights: their logarithms instead, -inf allowed.
        return_mean: (L, m) instead of L.
        return_stats: a :class:`LogMixture`, whose mean is None without `return_mean`.
        leave_one_out: True: row i leaves out centre i, with x as many as the centres. An int64 tensor, shaped as L:
            which centre each row leaves out, -1 for none.
        normalized: adds ``-sum_k log s_k - d/2 log 2 pi`` to each term: the log-density of the mixture.
        dtype: of L and the mean. None: float64 for float64 x, else float32. L is summed in float64 whatever the
            storage; ``torch.float64`` keeps its digits where it is in the thousands.
        nan_policy: "raise" refuses NaN and scales that are not positive, and waits for the device; "propagate" lets
            them through as NaN. None: "raise" on the CPU, "propagate" elsewhere and under torch.compile.

    Returns:
        L, (L, m), or a :class:`LogMixture`. Where no centre has a weight L is -inf and the mean NaN.

    Raises:
        TypeError: not arrays or tensors, or a dtype that is not supported.
        ValueError: shapes or devices that do not fit, no centres, a scale that is not positive, negative weights,
            NaN (with the rows that have it), both kinds of weights, a stream with what it does not take.

    Source: Parzen 1962 (kernel density); Karras et al. 2022, appendix B.3 (ideal denoiser); Chen, Zhu and Shkurti
    2025, section 4 (the mixture of term A).

    >>> log_mixture(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 4.0]), 1.0)
    tensor([-0.6928, -1.1750])
    """
    function = "log_mixture"
    if weights is not None and log_weights is not None:
        raise ValueError(f"{function}: give weights or log_weights, not both")
    if nan_policy not in (None, "raise", "propagate"):
        raise ValueError(f"{function}: nan_policy must be raise or propagate, got {nan_policy!r}")
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"{function}: dtype must be torch.float32 or torch.float64, got {dtype}")
    x = as_array_tensor(function, "x", x, may_be_empty=True)
    check = nan_policy == "raise" if nan_policy else x.is_cpu and values_readable()
    stream = blocks_of(function, centers)
    if stream is None:
        centers = as_array_tensor(function, "centers", centers)
        shape = centers.shape[1:]
    else:
        shape = stream.shape
    batch = batch_shape(function, x, shape)
    # Each call of torch costs a microsecond or two, the kernel seven at small sizes.
    plain = len(batch) == len(shape) == 1
    rows = x if plain else x.reshape(-1, max(1, math.prod(shape)))
    n = None if stream else centers.shape[0]
    exclude = None if leave_one_out is False else as_excluded(function, leave_one_out, batch, n, x.device)
    terms = as_log_weights(function, weights, log_weights, check)

    result: tuple[Tensor, Tensor, Any, Any]
    if stream is not None:
        result = StreamedMixture(function, stream, scale, terms, normalized, check).apply(
            rows, exclude, return_mean, return_stats
        )
    else:
        result = _whole(function, rows, centers, scale, terms, exclude, return_mean, return_stats, normalized, check)
    value, mean, stats, top = result
    kind = dtype or (torch.float64 if rows.dtype == torch.float64 else torch.float32)
    value = value if kind == torch.float64 else value.float()
    value = value if plain else value.reshape(batch)
    posterior = mean.to(kind).reshape(x.shape) if return_mean else None
    if return_stats:
        return LogMixture(value, posterior, stats[:, 0].reshape(batch), stats[:, 1].reshape(batch), top.reshape(batch))
    return value if posterior is None else (value, posterior)


def _whole(
    function: str,
    x: Tensor,
    centers: Tensor,
    scale: float | Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    mean: bool,
    stats: bool,
    normalized: bool,
    check: bool,
) -> tuple[Tensor, Tensor, Any, Any]:
    n, shape = centers.shape[0], centers.shape[1:]
    device, dtype = x.device, x.dtype
    if device != centers.device:
        raise ValueError(f"{function}: x and centers must be on one device, got {device} and {centers.device}")
    centers = centers if len(shape) == 1 else centers.reshape(n, -1)
    if centers.dtype != dtype:
        dtype = torch.promote_types(dtype, centers.dtype)
        x, centers = x.to(dtype), centers.to(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scale = as_scale(function, scale, shape, n, compute, device, check)
    uniform = log_weights is None
    if log_weights is not None:
        if log_weights.shape != (n,):
            raise ValueError(f"{function}: weights must be [{n}], one for each centre, got {list(log_weights.shape)}")
        log_weights = log_weights.to(compute)
    added: Any = 0.0  # to every L
    if normalized:
        d = centers.shape[1]
        if scale.numel() == 1:
            added = -d * (scale.double().log().reshape(()) + 0.5 * _LOG_2PI)
        else:
            each = scale.log() if scale.dim() == 2 else d * scale.log().unsqueeze(1)
            each = -each.sum(1) - 0.5 * d * _LOG_2PI
            log_weights = each if log_weights is None else log_weights + each
    every = (x, centers, scale, log_weights, exclude)
    others = centers.requires_grad or scale.requires_grad or (log_weights is not None and log_weights.requires_grad)
    tracked = torch.is_grad_enabled() and (x.requires_grad or others)
    if tracked and not (others or mean or stats) and x.is_cpu and not is_transformed():
        value, posterior = called(function, _OP_WITH_SCORE, tracked, *every)
        numbers = top = None
    else:
        value, posterior, numbers, top = called(function, _OP, tracked, *every, mean, stats)
    if check:
        refuse_nan(function, value, x, centers, log_weights)
    if uniform:
        added = added - log_count(n, exclude)
    if isinstance(added, Tensor) or added:
        value = value + added
    return value, posterior, numbers, top
