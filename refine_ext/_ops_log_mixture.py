"""What torch must know of the log-mixture ops beyond their kernels: shapes (fake), gradients, autocast, vmap."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _library  # noqa: F401  (the ops are registered by then)
from ._autograd import differentiable, gradients, register_gradient

ops = torch.ops.refine_ext
_FORWARD, _BACKWARD = ops.log_mixture.default, ops.log_mixture_backward.default
_WITH_SCORE = ops.log_mixture_with_score.default
_X, _CENTERS, _SCALE, _LOG_WEIGHTS = (1, 2, 4, 8)  # csrc/ops/log_mixture.h Wanted
# Of rows x centres x dimensions, of which second derivatives hold a few at once; or of one row.
_BLOCK_ELEMENTS = 1 << 22


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("refine_ext::log_mixture")
def _(x, centers, scale, log_weights, exclude, mean, stats):
    rows = x.shape[0]
    return (
        x.new_empty((rows,), dtype=torch.float64),
        x.new_empty((rows if mean else 0, x.shape[1]), dtype=_compute_dtype(x)),
        x.new_empty((rows if stats else 0, 2), dtype=torch.float64),
        x.new_empty((rows if stats else 0,), dtype=torch.int64),
    )


@torch.library.register_fake("refine_ext::log_mixture_with_score")
def _(x, centers, scale, log_weights, exclude):
    return x.new_empty((x.shape[0],), dtype=torch.float64), torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("refine_ext::log_mixture_backward")
def _(grad, value, x, centers, scale, log_weights, exclude, wanted):
    n, d = centers.shape
    return (
        x.new_empty((x.shape[0] if wanted & _X else 0, d)),
        x.new_empty((n if wanted & _CENTERS else 0, d)),
        scale.new_empty(scale.shape if wanted & _SCALE else (0,)),
        scale.new_empty((n if wanted & _LOG_WEIGHTS else 0,)),
    )


# ---- Gradients. That of the values is a fused op; those of the posterior mean, and second derivatives, are made of
# torch's own operations on blocks of rows.


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, centers, scale, log_weights, exclude, ctx.mean, _ = inputs
    value, _, stats, top = output
    ctx.mark_non_differentiable(stats, top)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, centers, scale, log_weights, exclude, value)


def _backward(ctx: Any, grad: Tensor | None, grad_mean: Tensor | None, *_: Any):
    x, centers, scale, log_weights, exclude, value = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    if not ctx.mean:
        grad_mean = None
    grads = _value_gradients(needs, grad, value, x, centers, scale, log_weights, exclude)
    if grad_mean is not None:
        more = _vector_jacobian(_mean, [x, centers, scale, log_weights], exclude, [grad_mean])
        grads = [_sum(a, b) if need else None for a, b, need in zip(grads, more[:4], needs, strict=True)]
    return (*grads, None, None, None)


def _value_gradients(needs: Any, grad: Tensor | None, value: Tensor, *inputs: Tensor | None) -> list[Tensor | None]:
    """Of x, centers, scale and log_weights, of which those are made that `needs` names."""
    wanted = sum(bit for bit, need in zip((_X, _CENTERS, _SCALE, _LOG_WEIGHTS), needs, strict=True) if need)
    if grad is None or not wanted:
        return [None] * 4
    parts = differentiable(_BACKWARD, grad, value, *inputs, wanted)
    return [part if need else None for part, need in zip(parts, needs, strict=True)]


def _score_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    value, score = output
    ctx.mark_non_differentiable(score)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, value, score)


def _score_backward(ctx: Any, grad: Tensor | None, _: Tensor | None):
    *inputs, value, score = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    if grad is None or any(needs[1:]) or torch.is_grad_enabled():
        return (*_value_gradients(needs, grad, value, *inputs), None)
    grad = grad.to(_compute_dtype(score)).unsqueeze(1)
    # A row without gradient has none, also where its score is not finite.
    return torch.where(grad == 0, 0.0, grad * score).to(score.dtype), None, None, None, None


def _backward_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, _, x, centers, scale, log_weights, exclude, ctx.wanted = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, x, centers, scale, log_weights, exclude)


def _double_backward(ctx: Any, *upstream: Tensor | None):
    grad, x, centers, scale, log_weights, exclude = ctx.saved_tensors
    bits = (_X, _CENTERS, _SCALE, _LOG_WEIGHTS)
    upstream = tuple(u if ctx.wanted & bit else None for u, bit in zip(upstream, bits, strict=True))
    if all(u is None for u in upstream):
        return (None,) * 8

    def formula(x: Tensor, centers: Tensor, scale: Tensor, log_weights: Tensor | None, exclude: Any, grad: Tensor):
        """Products of the upstream and the gradients, for rows whose part of `upstream` comes along."""
        inputs: list[Any] = [x, centers, scale, log_weights]
        chosen = [i for i, u in enumerate(upstream) if u is not None and inputs[i] is not None]

        def value(*leaves: Tensor) -> Tensor:
            for i, leaf in zip(chosen, leaves, strict=True):
                inputs[i] = leaf
            x, centers, scale, log_weights = inputs
            return (_value(x, centers, scale, log_weights, exclude) * grad).sum()

        return gradients(value, [inputs[i] for i in chosen])

    grads = _vector_jacobian(formula, [x, centers, scale, log_weights, grad], exclude, list(upstream), second=True)
    *first, of_grad = grads
    # value, which the op is given, is a function of the others: what flows through it is counted with them.
    return of_grad, None, *first, None, None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _logits(x: Tensor, centers: Tensor, scale: Tensor, log_weights: Tensor | None, exclude: Tensor | None) -> Tensor:
    """``[M, N]`` log w_j - sum_k (x_ik - y_jk)^2 / (2 s_jk^2), -inf for an excluded pair.

    Zeros, which depend on nothing, in a row that no centre is left for: its value is constant.
    """
    if scale.dim() == 1 and scale.numel() == len(centers):
        scale = scale.unsqueeze(1)
    logits = -0.5 * ((x.unsqueeze(1) - centers) / scale).square().sum(2)
    if log_weights is not None:
        logits = logits + log_weights
    if exclude is not None:
        logits = logits.masked_fill(exclude.unsqueeze(1) == torch.arange(len(centers), device=x.device), -math.inf)
    return logits.masked_fill(logits.detach().amax(1, keepdim=True) == -math.inf, 0.0)


def _value(x: Tensor, centers: Tensor, scale: Tensor, log_weights: Tensor | None, exclude: Tensor | None) -> Tensor:
    return _logits(x, centers, scale, log_weights, exclude).logsumexp(1)


def _mean(x: Tensor, centers: Tensor, scale: Tensor, log_weights: Tensor | None, exclude: Tensor | None) -> Tensor:
    return _logits(x, centers, scale, log_weights, exclude).softmax(1) @ centers


def _vector_jacobian(formula, inputs, exclude, upstream, second=False):
    """Products of `upstream` and the Jacobian of ``formula(x, centers, scale, log_weights, exclude, [grad])``.

    In float32 at least, over blocks of rows; differentiable again where grad mode is on. Per row are x, grad, exclude
    and the upstream of what is per row: the first of the gradients where `second`, else the formula's only result.
    """
    x, centers = inputs[:2]
    rows = max(1, _BLOCK_ELEMENTS // max(1, centers.numel()))
    create = torch.is_grad_enabled()
    total: list[Any] = [None] * len(inputs)
    per_row: dict[int, list[Tensor]] = {0: [], 4: []}
    with torch.autocast(x.device.type, enabled=False):
        for first in range(0, max(1, len(x)), rows):
            part = slice(first, first + rows)
            block = [None if each is None else each[part] if i in per_row else each for i, each in enumerate(inputs)]
            present = {i: t for i, t in enumerate(block) if t is not None}
            given = [u for u in upstream if u is not None]
            head = not second or upstream[0] is not None
            given = [u[part] if head and i == 0 else u for i, u in enumerate(given)]
            others = None if exclude is None else exclude[part]

            def value(*leaves: Tensor, present=present, given=given, others=others) -> Tensor:
                work: list[Any] = [None] * len(inputs)
                for i, t in zip(present, leaves, strict=True):
                    work[i] = t.to(torch.promote_types(t.dtype, torch.float32))
                result = formula(*work[:4], others, *work[4:])
                results = list(result) if second else [result]
                return torch.stack([(r * u.to(r.dtype)).sum() for r, u in zip(results, given, strict=True)]).sum()

            grads = gradients(value, list(present.values()), create_graph=create)
            for i, g in zip(present, grads, strict=True):
                if i in per_row:
                    per_row[i].append(torch.zeros_like(present[i]) if g is None else g)
                else:
                    total[i] = _sum(total[i], g)
    for i, parts in per_row.items():
        if i < len(inputs) and parts:
            total[i] = torch.cat(parts)
    return total


# ---- autocast: exponents of thousands need float32 whatever the network ran in

for _name in ("log_mixture", "log_mixture_with_score", "log_mixture_backward"):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"refine_ext::{_name}", _device, torch.float32)


# ---- vmap: examples that share their centres are more rows; others are worked on one by one


def _example(x: Any, dim: int | None, i: int) -> Any:
    return x if dim is None else x.select(dim, i)


def _batch(call, info, in_dims, x, centers, scale, log_weights, exclude, mean, stats):
    return _batched(partial(call, _FORWARD), info, in_dims, (x, centers, scale, log_weights, exclude), mean, stats)


def _score_batch(call, info, in_dims, *inputs):
    return _batched(partial(call, _WITH_SCORE), info, in_dims, inputs)


def _batched(call, info, in_dims, inputs, *options):
    size = info.batch_size
    x, centers, scale, log_weights, exclude = inputs
    if all(dim is None for dim in in_dims[1:4]):
        rows = x.movedim(in_dims[0], 0) if in_dims[0] is not None else x.expand(size, *x.shape)
        if exclude is not None:
            front = exclude.movedim(in_dims[4], 0) if in_dims[4] is not None else exclude.expand(size, -1)
            exclude = front.reshape(-1)
        results = call(rows.flatten(0, 1), centers, scale, log_weights, exclude, *options)
        every = [r.reshape(size, -1, *r.shape[1:]) if len(r) else r.new_empty((size, *r.shape)) for r in results]
        return tuple(every), (0,) * len(every)
    parts = [
        call(*(_example(t, dim, i) for t, dim in zip(inputs, in_dims[:5], strict=True)), *options) for i in range(size)
    ]
    return tuple(torch.stack(each) for each in zip(*parts, strict=True)), (0,) * len(parts[0])


def _backward_batch(call, info, in_dims, *inputs):
    tensors, wanted = inputs[:7], inputs[7]
    parts = [
        call(_BACKWARD, *(_example(t, d, i) for t, d in zip(tensors, in_dims[:7], strict=True)), wanted)
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(each) for each in zip(*parts, strict=True)), (0,) * 4


register_gradient("log_mixture", _backward, _setup, _batch)
register_gradient("log_mixture_with_score", _score_backward, _score_setup, _score_batch)
register_gradient("log_mixture_backward", _double_backward, _backward_setup, _backward_batch)
