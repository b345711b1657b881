"""What torch must know of the Rademacher ops beyond their kernels: shapes (fake), gradients, vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library  # noqa: F401  (the ops are registered by then)
from ._autograd import differentiable, register_gradient

ops = torch.ops.refine_ext
SUPREMA = ("largest", "magnitude", "norm")  # csrc/math/rademacher_problem.h Supremum
_LARGEST, _NORM = SUPREMA.index("largest"), SUPREMA.index("norm")
_DRAWS = 64  # whose sums the gradient of a norm holds at once


@torch.library.register_fake("refine_ext::rademacher_suprema")
def _(outputs, draws, first_draw, seed, supremum, digits):
    return (
        outputs.new_empty((draws,), dtype=torch.float64),
        outputs.new_empty((draws,), dtype=torch.int64),
        outputs.new_empty((outputs.shape[1],), dtype=torch.float64),
    )


@torch.library.register_fake("refine_ext::rademacher_sums")
def _(sums, outputs, first_row, first_draw, seed):
    return None


@torch.library.register_fake("refine_ext::rademacher_backward")
def _(grad, index, outputs, first_draw, seed):
    return torch.empty_like(outputs, memory_format=torch.contiguous_format)


@torch.library.register_fake("refine_ext::multipliers")
def _(like, n, draws, first_row, first_draw, seed, normal):
    return like.new_empty((draws, n))


def _column(index: Tensor) -> Tensor:
    return torch.where(index < 0, -1 - index, index)


# ---- The supremum's gradient, by the envelope theorem, is its maximiser's: linear in what comes from above.


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    outputs, _, ctx.first_draw, ctx.seed, ctx.supremum, _ = inputs
    suprema, index, largest = output
    ctx.mark_non_differentiable(index, largest)
    ctx.save_for_backward(outputs, suprema, index)


def _backward(ctx: Any, grad: Tensor, *_: Any):
    outputs, suprema, index = ctx.saved_tensors
    if ctx.supremum == _NORM:
        result = _norm_backward(grad, outputs, suprema, ctx.first_draw, ctx.seed)
    else:
        # A magnitude falls where a negative sum grows; a largest sum is itself, negative or not.
        signed = _column(index) if ctx.supremum == _LARGEST else index
        result = differentiable(ops.rademacher_backward.default, grad, signed, outputs, ctx.first_draw, ctx.seed)
    return result, None, None, None, None, None


def _norm_backward(grad: Tensor, outputs: Tensor, suprema: Tensor, first_draw: int, seed: int) -> Tensor:
    """sum_k grad_k sigma_k S_k / (n^2 sup_k), S_k = sigma_k' outputs: two matrix products for each block of draws."""
    n = outputs.shape[0]
    like = outputs if outputs.dtype == torch.float64 else outputs.float()
    result = torch.zeros_like(like)
    with torch.autocast(outputs.device.type, enabled=False):
        for first in range(0, len(grad), _DRAWS):
            part = slice(first, first + _DRAWS)
            scale = torch.where(suprema[part] > 0, grad[part] / (suprema[part] * float(n) ** 2), 0.0).to(like.dtype)
            signs = ops.multipliers(like, n, len(scale), 0, first_draw + first, seed, False)
            result = result + signs.T @ ((signs @ like) * scale[:, None])
    return result.to(outputs.dtype)


def _gather_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, index, outputs, ctx.first_draw, ctx.seed = inputs
    ctx.n = outputs.shape[0]
    ctx.save_for_backward(index)


def _gather_backward(ctx: Any, grad: Tensor):
    (index,) = ctx.saved_tensors
    column = _column(index)
    parts = []
    for first in range(0, len(index), _DRAWS):
        part = slice(first, first + _DRAWS)
        signs = ops.multipliers(grad, ctx.n, len(index[part]), 0, ctx.first_draw + first, ctx.seed, False)
        sums = (signs.double() * grad.T[column[part]].double()).sum(1)
        parts.append(torch.where(index[part] < 0, -sums, sums) / ctx.n)
    return torch.cat(parts), None, None, None, None


# ---- vmap: every example has the same signs, as a loop with one seed gives.


def _batch(call, info, in_dims, outputs, *options):
    parts = [call(ops.rademacher_suprema.default, example, *options) for example in outputs.movedim(in_dims[0], 0)]
    return tuple(torch.stack(each) for each in zip(*parts, strict=True)), (0, 0, 0)


def _gather_batch(call, info, in_dims, grad, index, outputs, first_draw, seed):
    front = [
        x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)
        for x, dim in zip((grad, index, outputs), in_dims[:3], strict=True)
    ]
    return torch.stack(
        [call(ops.rademacher_backward.default, *each, first_draw, seed) for each in zip(*front, strict=True)]
    ), 0


register_gradient("rademacher_suprema", _backward, _setup, _batch)
register_gradient("rademacher_backward", _gather_backward, _gather_setup, _gather_batch)
