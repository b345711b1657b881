"""Arguments that many functions take, checked alike: tensors, numbers, counts and seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._library import require_device

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def values_readable() -> bool:
    """Whether a tensor's values can be read: not inside torch.func and torch.compile."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def check_floating(function: str, argument: str, value: Tensor, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {argument} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{function}: {argument} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{function}: {argument} must be float64, float32, float16 or bfloat16, got {value.dtype}")
    if not may_be_empty and value.numel() == 0:
        raise ValueError(f"{function}: {argument} must not be empty, got shape {list(value.shape)}")
    if not value.is_cpu:
        require_device(function, argument, value)
    # torch would drop the tangent of a registered op without a word.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(f"{function}: {argument} has a forward-mode tangent; only reverse mode is supported")


def whole(function: str, argument: str, value: int, least: int) -> int:
    """An int, which may be NumPy's, of at least so much."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
            raise TypeError(f"{function}: {argument} must be an int, got {type(value).__name__}")
        value = value.__index__()  # NumPy's
    if value < least:
        raise ValueError(f"{function}: {argument} must be at least {least}, got {value}")
    return value


def positive(function: str, argument: str, value: Any) -> float:
    """A finite number above 0, which may be NumPy's."""
    if not 0.0 < (number := _number(function, argument, value)) < math.inf:
        raise ValueError(f"{function}: {argument} must be positive and finite, got {value}")
    return number


def not_negative(function: str, argument: str, value: Any) -> float:
    """A finite number from 0 on, which may be NumPy's."""
    if not 0.0 <= (number := _number(function, argument, value)) < math.inf:
        raise ValueError(f"{function}: {argument} must be finite and not negative, got {value}")
    return number


def _number(function: str, argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{function}: {argument} must be a number, got {type(value).__name__}")
    return float(value)


def check_seed(function: str, seed: int | Tensor) -> int | Tensor:
    """An int64 tensor, or a number as the int64 that has its bits."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{function}: seed must be an int or an int64 tensor, got {seed.dtype}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"{function}: seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{function}: seed must be between -2**63 and 2**64 - 1, got {seed}")
    return seed if seed < 2**63 else seed - 2**64
