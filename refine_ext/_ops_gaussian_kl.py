"""What torch must know of the Gaussian ops beyond their kernels: shapes (fake), gradients, autocast, vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library  # noqa: F401  (the ops are registered by then)
from ._autograd import differentiable, gradients, register_gradient
from ._ops import _front, _value_dtype

ops = torch.ops.refine_ext


def _bits(flags: Any) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


@torch.library.register_fake("refine_ext::gaussian_kl")
def _(mean, log_variance, prior_mean, prior_log_variance):
    return mean.new_empty((mean.shape[0],), dtype=_value_dtype(mean))


@torch.library.register_fake("refine_ext::gaussian_kl_backward")
def _(grad, mean, log_variance, prior_mean, prior_log_variance, wanted):
    rows, d = mean.shape
    return tuple(mean.new_empty((rows if wanted >> i & 1 else 0, d)) for i in range(4))


@torch.library.register_fake("refine_ext::importance_log_weights")
def _(z, mean, log_variance):
    return z.new_empty(z.shape[:2], dtype=_value_dtype(z))


@torch.library.register_fake("refine_ext::importance_log_weights_backward")
def _(grad, z, mean, log_variance, wanted):
    draws, rows, d = z.shape
    of_z = z.new_empty((draws if wanted & 1 else 0, rows, d))
    return of_z, *(mean.new_empty((rows if wanted >> i & 1 else 0, d)) for i in (1, 2))


# ---- Gradients. First order by kernels; the gradient of a gradient by the same formula in torch operations.


def _register(name: str, count: int, slopes: Any, batch: Any, backward_batch: Any) -> None:
    """`slopes(*inputs)` are the derivatives of a row's result by each of `count` inputs, None for inputs that are."""
    backward = getattr(ops, f"{name}_backward").default

    def setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def first(ctx: Any, grad: Tensor):
        grads = differentiable(backward, grad, *ctx.saved_tensors, _bits(ctx.needs_input_grad))
        return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True))

    def backward_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.wanted = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def second(ctx: Any, *upstream: Tensor | None):
        grad, *inputs = ctx.saved_tensors
        chosen = {i: u for i, u in enumerate(upstream) if ctx.wanted >> i & 1 and u is not None}
        if not chosen:
            return (None,) * (count + 2)
        given = [i for i in range(count) if inputs[i] is not None]

        def formula(grad: Tensor, *present: Tensor) -> Tensor:
            work: list[Tensor | None] = [None] * count
            for i, x in zip(given, present, strict=True):
                work[i] = x.to(grad.dtype)
            derivatives = slopes(*work)
            parts = [grad * (u.to(grad.dtype) * derivatives[i]).sum(-1) for i, u in chosen.items()]
            return torch.stack(parts).sum()

        grads = gradients(formula, [grad, *(inputs[i] for i in given)])
        result: list[Tensor | None] = [None] * count
        for i, g in zip(given, grads[1:], strict=True):
            result[i] = g
        return grads[0], *result, None

    register_gradient(name, first, setup, batch)
    register_gradient(f"{name}_backward", second, backward_setup, backward_batch)


def _kl_slopes(mean: Tensor, log_variance: Tensor, prior_mean: Tensor | None, prior_log_variance: Tensor | None):
    difference = mean if prior_mean is None else mean - prior_mean
    precision = 1.0 if prior_log_variance is None else (-prior_log_variance).exp()
    excess = (log_variance if prior_log_variance is None else log_variance - prior_log_variance).expm1()
    of_mean = difference * precision
    return of_mean, 0.5 * excess, -of_mean, -0.5 * (excess + difference * of_mean)


def _weight_slopes(z: Tensor, mean: Tensor, log_variance: Tensor):
    inward = (z - mean) * (-log_variance).exp()
    return inward - z, -inward, 0.5 * (1 - (z - mean) * inward)


# ---- autocast: a small divergence would drown in half precision, whatever the network ran in

for _name in ("gaussian_kl", "importance_log_weights"):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"refine_ext::{_name}", _device, torch.float32)


# ---- vmap: examples are more rows


def _rows(x: Tensor | None, dim: int | None, size: int, axis: int = 0) -> Tensor | None:
    """Examples joined with the rows, which are dimension `axis` of one example."""
    return None if x is None else _front(x, dim, size).movedim(0, axis).flatten(axis, axis + 1)


def _apart(x: Tensor, size: int, axis: int = 0) -> Tensor:
    return x.unflatten(axis, (size, x.shape[axis] // size)).movedim(axis, 0)


def _kl_batch(call, info, in_dims, *inputs):
    rows = [_rows(x, dim, info.batch_size) for x, dim in zip(inputs, in_dims, strict=True)]
    return _apart(call(ops.gaussian_kl.default, *rows), info.batch_size), 0


def _kl_backward_batch(call, info, in_dims, *arguments):
    *inputs, wanted = arguments
    rows = [_rows(x, dim, info.batch_size) for x, dim in zip(inputs, in_dims[:-1], strict=True)]
    return tuple(_apart(g, info.batch_size) for g in call(ops.gaussian_kl_backward.default, *rows, wanted)), (0,) * 4


def _weights_batch(call, info, in_dims, z, mean, log_variance):
    size = info.batch_size
    joined = _rows(z, in_dims[0], size, 1), _rows(mean, in_dims[1], size), _rows(log_variance, in_dims[2], size)
    return _apart(call(ops.importance_log_weights.default, *joined), size, 1), 0


def _weights_backward_batch(call, info, in_dims, grad, z, mean, log_variance, wanted):
    size = info.batch_size
    joined = [_rows(grad, in_dims[0], size, 1), _rows(z, in_dims[1], size, 1)]
    joined += [_rows(mean, in_dims[2], size), _rows(log_variance, in_dims[3], size)]
    of_z, of_mean, of_log_variance = call(ops.importance_log_weights_backward.default, *joined, wanted)
    return (_apart(of_z, size, 1), _apart(of_mean, size), _apart(of_log_variance, size)), (0,) * 3


_register("gaussian_kl", 4, _kl_slopes, _kl_batch, _kl_backward_batch)
_register("importance_log_weights", 3, _weight_slopes, _weights_batch, _weights_backward_batch)
