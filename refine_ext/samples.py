"""Samples as users hold them (NumPy or torch, any trailing shape) made ready for a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .io import RowSource

MIN_SAMPLES = 10
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_BLOCK_ELEMENTS = 1 << 22


def array_tensor(x: Any, *, function: str, argument: str) -> Tensor:
    """A tensor as it is; a NumPy array, or anything with DLPack's protocol, as one over its memory where that can be.

    Raises:
        TypeError: not an array or tensor, or a NumPy array neither floating nor uint8.
        ValueError: no sample dimension.
    """
    if isinstance(x, Tensor):
        pass
    elif isinstance(x, np.ndarray):
        dtype = x.dtype.newbyteorder("=")
        if dtype not in (np.uint8, np.float16, np.float32, np.float64):
            raise TypeError(f"{function}: {argument} must be floating or uint8, got a NumPy {x.dtype} array")
        # asarray also undoes foreign byte orders; read-only maps are copied by torch's rules.
        native = np.asarray(x, dtype=dtype)
        if not native.flags.writeable or any(s < 0 for s in native.strides):
            native = native.copy()
        x = torch.from_numpy(native)
    elif hasattr(x, "__dlpack__"):
        x = torch.from_dlpack(x)
    else:
        raise TypeError(f"{function}: {argument} must be a NumPy array or a torch tensor, got {type(x).__name__}")
    if x.ndim == 0:
        raise ValueError(f"{function}: {argument} must be [n, ...], got a 0-dim value")
    return x


def as_tensor(x: Any, *, function: str, argument: str) -> Tensor:
    """What `array_tensor` takes, detached, as ``[n, ...]`` of float64 or, else, float32: numbers are a column.

    Raises:
        TypeError: not an array or tensor, or neither floating nor uint8.
        ValueError: no sample dimension.
    """
    tensor = array_tensor(x, function=function, argument=argument).detach()
    if tensor.dtype in (torch.uint8, torch.float16, torch.bfloat16):
        tensor = tensor.float()
    elif tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{function}: {argument} must be floating or uint8, got {tensor.dtype}")
    return tensor.unsqueeze(1) if tensor.ndim == 1 else tensor


def stored_tensor(source: RowSource, raw: np.ndarray) -> Tensor:
    """Bytes of a file's rows -> [rows, features], of a floating dtype as it is stored."""
    if source.element in _FLOATS:
        values = torch.from_numpy(raw).view(-1).view(getattr(torch, source.element))
    else:
        values = torch.from_numpy(source.decode(raw))
    return values.view(len(raw), source.features)


def check_samples(real: Any, fake: Any, *, function: str) -> tuple[Tensor, Tensor]:
    """Both sample sets as floating tensors of equal trailing shape, finite and numerous enough.

    Raises:
        TypeError: a type or dtype that is not supported.
        ValueError: empty or too small, not finite, shapes or devices that differ, or no feature that varies.
    """
    pair = []
    for argument, x in (("real", real), ("fake", fake)):
        tensor = as_tensor(x, function=function, argument=argument)
        if tensor.numel() == 0:
            raise ValueError(f"{function}: {argument} is empty, shape {list(tensor.shape)}")
        if len(tensor) < MIN_SAMPLES:
            raise ValueError(
                f"{function}: {argument} has {len(tensor)} samples, "
                f"at least {MIN_SAMPLES} are needed to train and to hold some out"
            )
        bad = count_nonfinite(tensor)
        if bad:
            raise ValueError(
                f"{function}: {argument} has {bad} NaN or infinite values of {tensor.numel()}; "
                "only finite values are allowed"
            )
        pair.append(tensor)
    first, second = pair
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"{function}: real and fake must have the same features, got "
            f"{list(first.shape[1:])} and {list(second.shape[1:])} per sample"
        )
    if first.device != second.device:
        raise ValueError(f"{function}: real and fake must be on one device, got {first.device} and {second.device}")
    if all(bool((x == first[:1]).all()) for x in pair):
        raise ValueError(f"{function}: real and fake are constant: every sample is the same")
    return first, second


def as_column(values: Tensor, x: Tensor) -> Tensor:
    """Values ``[B]``, or one for all, as ``[B, 1, ...]`` beside samples ``[B, ...]``."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


def count_nonfinite(x: Tensor) -> int:
    """How many entries are NaN or infinite, in blocks of bounded memory."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, x[0].numel()))
    return sum(int((~torch.isfinite(block)).sum()) for block in x.split(rows))


def rows_text(bad: Tensor, first: int = 0, most: int = 5) -> str:
    """`row 3`, or `rows 3, 7 and 20 more`: where ``[n]`` bools are set, counted from `first`."""
    places = [first + i for i in bad.nonzero().flatten().tolist()]
    shown = ", ".join(map(str, places[:most]))
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return f"row{'s' if len(places) > 1 else ''} {shown}{more}"


def check_finite_rows(x: Tensor, *, function: str, argument: str) -> None:
    """Raise, naming rows, where samples ``[n, ...]`` are NaN or infinite; in blocks of bounded memory."""
    size = max(1, _BLOCK_ELEMENTS // max(1, x[0].numel()))
    for start, rows in zip(range(0, len(x), size), x.split(size), strict=True):
        # The sums of finite rows are finite, unless huge: one pass without a mask of the data's size.
        if bool(rows.flatten(1).sum(1, dtype=torch.float64).isfinite().all()):
            continue
        bad = ~rows.isfinite().flatten(1).all(1)
        if bool(bad.any()):
            raise ValueError(
                f"{function}: {argument} has NaN or infinite values in {rows_text(bad, start)}; only finite values "
                "are allowed"
            )
