"""Diagonal Gaussians: their Kullback-Leibler divergence, and the log-weights of draws from an encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ._call import called
from ._ops_gaussian_kl import ops
from .arguments import check_floating

_KL = ops.gaussian_kl.default
_WEIGHTS = ops.importance_log_weights.default
_ARGUMENTS = ("mean", "log_variance", "prior_mean", "prior_log_variance")


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, prior_mean: Tensor | None = None, prior_log_variance: Tensor | None = None
) -> Tensor:
    """KL(N(m, e^l) || N(m0, e^l0)) = 1/2 sum_k [e^(l - l0) - 1 - (l - l0) + (m - m0)^2 e^(-l0)]_k, in nats.

    The rate of a VAE. Summed in float64, and without cancellation: a divergence of 1e-8 has the digits that its
    arguments determine. Log-variances of any size; a variance of 0 (-inf) is infinitely far from any other.

    Args:
        mean, log_variance: m and l, `[..., d]`; float64, float32, float16 or bfloat16 (computed in float32), CPU or
            CUDA. The two halves of an encoder's output are read as they lie.
        prior_mean, prior_log_variance: m0 and l0. None: zeros, the standard normal.
            All four broadcast to one shape and are promoted to one dtype; a prior `[d]` is not copied for each row.

    Returns:
        `[...]`, float64 for float64 arguments, else float32. Differentiable twice in all four.

    Raises:
        TypeError: an argument that is no tensor, or its dtype.
        ValueError: shapes that do not broadcast, no dimension d, tensors on different devices.

    Source: Kingma and Welling 2014, appendix B; the term E KL(q(z|x) || pi) of the bounds of Chen, Zhu and Shkurti
    2025 (ICLR).

    >>> import torch, refine_ext as rx
    >>> rx.gaussian_kl(torch.tensor([1.0, 2.0]), torch.zeros(2))  # (1 + 4) / 2
    tensor(2.5000)
    """
    given = {"mean": mean, "log_variance": log_variance}
    if prior_mean is not None:
        given["prior_mean"] = prior_mean
    if prior_log_variance is not None:
        given["prior_log_variance"] = prior_log_variance
    shape = _alike("gaussian_kl", given, given)
    flat = [given.get(name) for name in _ARGUMENTS]
    if len(shape) == 2:
        return _applied("gaussian_kl", _KL, flat)
    rows = math.prod(shape[:-1]), shape[-1]
    flat = [x if x is None else x.reshape(rows) for x in flat]
    return _applied("gaussian_kl", _KL, flat).view(shape[:-1])


def importance_log_weights(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(z; 0, I) - log N(z; m, diag e^l), what draws z ~ q(.|x) add to the log of their importance weights.

    With a likelihood it is that of the importance-weighted bound: for draws z_1 ... z_K, log (1/K) sum_k p(x|z_k)
    N(z_k; 0, I) / N(z_k; m, diag e^l) is at most log p(x) on average, and nears it as K grows. With m and l as `mean`
    and `log_variance`, minus its mean over draws is `gaussian_kl` of them.

    Args:
        z: `[K, ..., d]`, K draws; dtypes and devices as of `gaussian_kl`.
        mean, log_variance: m and l, `[..., d]` or what broadcasts to it.

    Returns:
        `[K, ...]`, float64 for float64 arguments, else float32. Summed in float64. Differentiable twice in all three.

    Raises:
        TypeError, ValueError: see `gaussian_kl`.

    Source: Burda, Grosse and Salakhutdinov 2016, eq. 8 (importance-weighted autoencoders).

    >>> import torch, refine_ext as rx
    >>> rx.importance_log_weights(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.ones(2), torch.zeros(2))
    tensor([ 1., -1.])
    """
    function = "importance_log_weights"
    check_floating(function, "z", z, may_be_empty=True)
    if z.dim() < 2:
        raise ValueError(f"{function}: z must be [K, ..., d], got shape {list(z.shape)}")
    given = {"mean": mean, "log_variance": log_variance}
    every = {"z": z, **given}
    _alike(function, every, given, z.shape[1:])
    z, *flat = every.values()
    shape = z.shape
    if len(shape) == 3:
        return _applied(function, _WEIGHTS, [z, *flat])
    rows = math.prod(shape[1:-1]), shape[-1]
    flat = [z.reshape(shape[0], *rows), *(x.reshape(rows) for x in flat)]
    return _applied(function, _WEIGHTS, flat).view(shape[:-1])


def _alike(function: str, every: dict[str, Tensor], rows: dict[str, Tensor], shape: torch.Size | None = None):
    """Makes all of one dtype and expands those of `rows` to one shape, `shape` if it is given; returns it."""
    for name, x in rows.items():
        check_floating(function, name, x, may_be_empty=True)
    first = next(iter(every.values()))
    common: torch.Size | None = rows["mean"].shape if shape is None else shape
    if any([x.shape != common for x in rows.values()]):
        common = _broadcast(rows, shape)
    if common is None:
        got = ", ".join(f"{name} {list(x.shape)}" for name, x in every.items())
        to = "shape" if shape is None else "[..., d] of z [K, ..., d]"
        raise ValueError(f"{function}: the arguments must broadcast to one {to}, got {got}")
    if len(common) == 0 or common[-1] == 0:
        raise ValueError(f"{function}: mean must be [..., d] with d of at least 1, got shape {list(common)}")
    device, dtype = first.device, first.dtype
    for name, x in every.items():
        if x.device != device:
            raise ValueError(f"{function}: {name} is on {x.device}, {next(iter(every))} is on {device}")
    if any([x.dtype != dtype for x in every.values()]):
        dtype = reduce(torch.promote_types, (x.dtype for x in every.values()))
        every.update({name: x.to(dtype) for name, x in every.items()})
    every.update({name: every[name].expand(common) for name, x in rows.items() if x.shape != common})
    return common


def _broadcast(rows: dict[str, Tensor], shape: torch.Size | None) -> torch.Size | None:
    """What they broadcast to, None where that is no shape or not `shape`."""
    try:
        found = torch.broadcast_shapes(*(x.shape for x in rows.values()), *([] if shape is None else [shape]))
    except RuntimeError:
        return None
    return found if shape in (None, found) else None


def _applied(function: str, op: Any, tensors: Sequence[Tensor | None]) -> Tensor:
    tracked = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])
    return called(function, op, tracked, *tensors)
