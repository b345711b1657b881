"""Rademacher complexities as torch users write them: a matrix of signs, a matrix product, the largest of its rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def signs(draws: int, like: Tensor) -> Tensor:
    return torch.randint(0, 2, (draws, len(like)), device=like.device).to(like.dtype) * 2 - 1


def largest(outputs: Tensor, sigma: Tensor) -> Tensor:
    """[draws] of max_j |sum_i sigma_ki outputs_ij| / n."""
    return (sigma @ outputs).abs().amax(1) / len(outputs)


def length(outputs: Tensor, sigma: Tensor) -> Tensor:
    """[draws] of the Euclidean norm: the supremum over an l2 ball of linear functions."""
    return (sigma @ outputs).norm(dim=1) / len(outputs)


def at_precision(precision: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run` under torch.set_float32_matmul_precision."""

    def under(*arguments: Tensor) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return run(*arguments)
        finally:
            torch.set_float32_matmul_precision(before)

    return under
