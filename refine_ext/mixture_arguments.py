"""Arguments of log-mixtures, made ready for the op: scales, weights, what a row leaves out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arguments import check_floating, values_readable
from .samples import array_tensor, rows_text


def log_count(n: int, exclude: Tensor | None) -> float | Tensor:
    """log of how many centres each row has; 0 for none, whose L is -inf already."""
    if exclude is None:
        return math.log(n)
    all_but_one = exclude.new_full((), math.log(max(1, n - 1)), dtype=torch.float64)
    return torch.where(exclude >= 0, all_but_one, math.log(n))


def as_scale(
    function: str,
    scale: float | Tensor,
    shape: tuple[int, ...],
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    check: bool,
) -> Tensor:
    """[], [1], [N] or [N, d], positive where that is checked."""
    if isinstance(scale, (float, int, np.floating, np.integer)) and not isinstance(scale, bool):
        if not 0.0 < scale < math.inf:
            raise ValueError(f"{function}: scale must be positive and finite, got {scale}")
        smallest = torch.finfo(dtype).tiny
        return torch.full((), max(float(scale), smallest), dtype=dtype, device=device)
    if isinstance(scale, np.ndarray):
        scale = torch.from_numpy(np.asarray(scale, dtype=np.float64)).to(device)
    if not isinstance(scale, Tensor):
        raise TypeError(f"{function}: scale must be a number or a tensor, got {type(scale).__name__}")
    dims = scale.dim()
    if dims > 0 and scale.device != device:
        raise ValueError(f"{function}: scale must be on x's device {device}, got {scale.device}")
    if not scale.dtype.is_floating_point:
        raise TypeError(f"{function}: scale must be floating, got {scale.dtype}")
    if dims > 0 and tuple(scale.shape) not in [(1,), (n,), (n, *shape), (1, *shape)]:
        raise ValueError(f"{function}: scale must be a number, [{n}] or {[n, *shape]}, got shape {list(scale.shape)}")
    if check and not (scale if dims == 0 else scale.min()).item() > 0:  # NaN is not
        bad = scale.detach().flatten()
        at = int((~(bad > 0)).nonzero()[0])
        raise ValueError(f"{function}: scale must be positive, got {float(bad[at]):g} at {at}")
    if scale.dtype != dtype or scale.device != device:
        scale = scale.to(device=device, dtype=dtype)
    if dims == 1 + len(shape) and len(shape) > 0:
        scale = scale.expand(n, *shape).reshape(n, -1)
    return scale


def refuse_nan(function: str, value: Tensor, x: Tensor, centers: Tensor, log_weights: Tensor | None) -> None:
    if not math.isnan(value.dot(value).item()):  # squares add up to NaN for nothing else, in half the time of a sum
        return
    for argument, tensor in (("x", x), ("centers", centers), ("log_weights", log_weights)):
        if tensor is None:
            continue
        bad = tensor.isnan().flatten(1).any(1) if tensor.dim() > 1 else tensor.isnan()
        if bool(bad.any()):
            raise ValueError(f"{function}: {argument} has NaN in {rows_text(bad)}")
    raise ValueError(f"{function}: {int(value.isnan().sum())} values are NaN: infinities in x and centers meet")


def as_array_tensor(function: str, argument: str, value: Any, *, may_be_empty: bool = False) -> Tensor:
    """`array_tensor` of a dtype that the op takes, uint8 as float32."""
    tensor = array_tensor(value, function=function, argument=argument)
    if tensor.dtype == torch.uint8:
        tensor = tensor.float()
    check_floating(function, argument, tensor, may_be_empty=may_be_empty)
    return tensor


def batch_shape(function: str, x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    given = x.shape
    leading = len(given) - len(shape)
    if leading < 0 or given[leading:] != shape:
        raise ValueError(
            f"{function}: x must be [..., {', '.join(map(str, shape))}] as the centers are, got {list(given)}"
            if shape
            else f"{function}: x must be of numbers as the centers are, got {list(given)}"
        )
    return given[:leading]


def as_log_weights(function: str, weights: Any, log_weights: Any, check: bool) -> Tensor | None:
    if weights is None and log_weights is None:
        return None
    argument = "weights" if log_weights is None else "log_weights"
    given = as_array_tensor(function, argument, weights if log_weights is None else log_weights)
    if given.dim() != 1:
        raise ValueError(f"{function}: {argument} must be [N], got {list(given.shape)}")
    if log_weights is not None:
        return given
    if check and not bool((given >= 0).all()):  # NaN is not
        at = int((~(given >= 0)).nonzero()[0])
        raise ValueError(f"{function}: weights must not be negative, got {float(given[at]):g} at {at}")
    given = given if given.dtype == torch.float64 else given.float()
    return torch.where(given != 0, given, 1.0).log().masked_fill(given == 0, -math.inf)


def as_excluded(
    function: str, leave_one_out: bool | Tensor, batch: tuple[int, ...], n: int | None, device: torch.device
) -> Tensor | None:
    if leave_one_out is False:
        return None
    rows = math.prod(batch)
    if leave_one_out is True:
        if n is not None and rows != n:
            raise ValueError(f"{function}: leave_one_out=True needs as many x as centers, got {rows} and {n}")
        return torch.arange(rows, device=device)
    if not isinstance(leave_one_out, Tensor) or leave_one_out.dtype != torch.int64:
        kind = leave_one_out.dtype if isinstance(leave_one_out, Tensor) else type(leave_one_out).__name__
        raise TypeError(f"{function}: leave_one_out must be a bool or an int64 tensor, got {kind}")
    if tuple(leave_one_out.shape) != batch:
        raise ValueError(
            f"{function}: leave_one_out must be {list(batch)}, one for each x, got {list(leave_one_out.shape)}"
        )
    if n is not None and device.type == "cpu" and rows and values_readable():
        low, high = int(leave_one_out.min()), int(leave_one_out.max())
        if low < -1 or high >= n:
            raise ValueError(f"{function}: leave_one_out must be between -1 and {n - 1}, got {low} to {high}")
    return leave_one_out.reshape(-1)
