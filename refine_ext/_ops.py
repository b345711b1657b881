"""What torch must know of each op beyond its kernel: shapes (fake), gradients, autocast, vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _C, _library  # noqa: F401  (the ops are registered by then)
from ._autograd import differentiable, gradients, register_gradient

ops = torch.ops.refine_ext
_RATIO, _RATIO_BACKWARD = ops.density_ratio.default, ops.density_ratio_backward.default
_BOUND_BACKWARD, _SLOPE = ops.variational_bound_backward.default, ops.dual_slope.default
STATS = 8  # columns of a stats row, csrc/cpu/density_ratio.h RatioStats
SHIFT, LOG_SUM, LOG_SQUARE, LOG_LARGEST, LOG_WEIGHT = range(5)


def _value_dtype(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- shapes


@torch.library.register_fake("refine_ext::density_ratio")
def _(h, base_weights, shift, divergence, alpha, ratio, check):
    return _contiguous_like(h), h.new_empty((*h.shape[:-1], STATS), dtype=torch.float64)


@torch.library.register_fake("refine_ext::density_ratio_out")
def _(h, base_weights, shift, divergence, alpha, ratio, check, *, out):
    return h.new_empty((*h.shape[:-1], STATS), dtype=torch.float64)


@torch.library.register_fake("refine_ext::density_ratio_backward")
def _(grad, grad_stats, log_ratio, stats, base_weights, solved, divergence, alpha):
    return _contiguous_like(log_ratio)


@torch.library.register_fake("refine_ext::variational_bound")
def _(h_real, h_fake, tight, divergence, alpha):
    stats = h_fake.new_empty((*h_fake.shape[:-1], STATS), dtype=torch.float64)
    return h_fake.new_empty(h_fake.shape[:-1], dtype=_value_dtype(h_fake)), stats


@torch.library.register_fake("refine_ext::variational_bound_backward")
def _(grad, h_fake, stats, tight, divergence, alpha):
    return _contiguous_like(h_fake)


@torch.library.register_fake("refine_ext::dual_bound")
def _(logit_real, logit_fake, divergence, alpha):
    return logit_fake.new_empty(logit_fake.shape[:-1], dtype=_value_dtype(logit_fake))


@torch.library.register_fake("refine_ext::dual_output")
def _(logit, divergence, alpha):
    return _contiguous_like(logit)


@torch.library.register_fake("refine_ext::dual_slope")
def _(grad, logit, conjugate, divergence, alpha):
    return _contiguous_like(logit)


# ---- gradients. First order by kernels; the gradient of a gradient by the same formula in torch operations, which
# torch differentiates.


def _score_factor(log_ratio: Tensor, divergence: int, alpha: float) -> Tensor:
    family = _C.family(divergence, alpha)
    if family["form"] == "logistic":
        return 1 + log_ratio.exp()
    if family["form"] == "lambert":
        return log_ratio.sigmoid()
    factor = family["scale"] * (family["exponent"] * log_ratio).exp()
    return factor.where(log_ratio != -torch.inf, 0.0) if family["exponent"] < 0 else factor


def _density_ratio_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, base_weights, shift, ctx.divergence, ctx.alpha, ctx.ratio, _ = inputs
    ctx.solved = shift is None
    ctx.save_for_backward(*output, base_weights)


def _density_ratio_backward(ctx: Any, grad: Tensor | None, grad_stats: Tensor | None):
    log_ratio, stats, base_weights = ctx.saved_tensors
    if ctx.ratio:
        raise RuntimeError("density_ratio: only the log-ratio is differentiable, take its exp()")
    grad = torch.zeros_like(log_ratio) if grad is None else grad
    grad_stats = torch.zeros_like(stats) if grad_stats is None else grad_stats
    family = ctx.divergence, ctx.alpha
    grad_h = differentiable(_RATIO_BACKWARD, grad, grad_stats, log_ratio, stats, base_weights, ctx.solved, *family)
    return grad_h, None, None, None, None, None, None


def _density_ratio_backward_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, grad_stats, log_ratio, stats, base_weights, ctx.solved, ctx.divergence, ctx.alpha = inputs
    ctx.save_for_backward(grad, grad_stats, log_ratio, stats, base_weights)


def _density_ratio_double_backward(ctx: Any, upstream: Tensor):
    *inputs, base_weights = ctx.saved_tensors

    def formula(grad: Tensor, grad_stats: Tensor, log_ratio: Tensor, stats: Tensor) -> Tensor:
        factor = _score_factor(log_ratio, ctx.divergence, ctx.alpha)
        mass = log_ratio.exp() if base_weights is None else log_ratio.exp() * base_weights
        if ctx.solved:
            through = grad_stats[..., SHIFT] - (factor * grad).double().sum(-1)
            through = through / (mass * factor).double().sum(-1)
        else:
            through = grad_stats[..., LOG_SUM] * (-stats[..., LOG_SUM]).exp()
        return factor * (grad + mass * through.unsqueeze(-1).to(mass.dtype))

    grads = gradients(formula, inputs, upstream)
    return (*grads, None, None, None, None)


def _variational_bound_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    h_real, h_fake, ctx.tight, ctx.divergence, ctx.alpha = inputs
    ctx.real_shape, ctx.real_dtype = h_real.shape, h_real.dtype
    ctx.save_for_backward(h_fake, output[1])
    ctx.mark_non_differentiable(output[1])


def _variational_bound_backward(ctx: Any, grad: Tensor, _):
    h_fake, stats = ctx.saved_tensors
    grad_real = (grad / ctx.real_shape[-1]).to(ctx.real_dtype)
    if grad.dim() > 0:
        grad_real = grad_real.unsqueeze(-1)
    grad_real = grad_real.expand(ctx.real_shape)
    grad_fake = differentiable(_BOUND_BACKWARD, grad, h_fake, stats, ctx.tight, ctx.divergence, ctx.alpha)
    return grad_real, grad_fake, None, None, None


def _variational_bound_backward_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, h_fake, _, ctx.tight, ctx.divergence, ctx.alpha = inputs
    ctx.save_for_backward(grad, h_fake)


def _variational_bound_double_backward(ctx: Any, upstream: Tensor):
    def formula(grad: Tensor, h_fake: Tensor) -> Tensor:
        shift = None if ctx.tight else h_fake.new_zeros((), dtype=torch.float64)
        log_ratio, _ = differentiable(_RATIO, h_fake, None, shift, ctx.divergence, ctx.alpha, False, False)
        return log_ratio.exp() * (grad / -h_fake.shape[-1]).to(h_fake.dtype).unsqueeze(-1)

    grads = gradients(formula, list(ctx.saved_tensors), upstream)
    return (*grads, None, None, None, None)


def _dual_bound_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *logits, ctx.divergence, ctx.alpha = inputs
    ctx.save_for_backward(*logits)


def _dual_bound_backward(ctx: Any, grad: Tensor):
    real, fake = ctx.saved_tensors
    family = ctx.divergence, ctx.alpha
    grad_real = differentiable(_SLOPE, grad / real.shape[-1], real, False, *family)
    grad_fake = differentiable(_SLOPE, grad / -fake.shape[-1], fake, True, *family)
    return grad_real, grad_fake, None, None


def _dual_output_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logit, ctx.divergence, ctx.alpha = inputs
    ctx.save_for_backward(logit)


def _dual_output_backward(ctx: Any, grad: Tensor):
    (logit,) = ctx.saved_tensors
    return differentiable(_SLOPE, grad, logit, False, ctx.divergence, ctx.alpha), None, None


def _dual_slope_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, logit, ctx.conjugate, ctx.divergence, ctx.alpha = inputs
    ctx.save_for_backward(grad, logit)


def _dual_slope_backward(ctx: Any, upstream: Tensor):
    family = _C.family(ctx.divergence, ctx.alpha)

    def formula(grad: Tensor, x: Tensor) -> Tensor:
        if family["form"] == "logistic":
            slope = (x if ctx.conjugate else -x).sigmoid()
        elif family["form"] == "lambert":
            slope = 1 + (x if ctx.conjugate else -x).exp()
        else:
            exponent = ctx.conjugate - family["exponent"]
            slope = (exponent * x).exp() / family["scale"]
        return slope * (grad if grad.dim() == x.dim() else grad.unsqueeze(-1).to(x.dtype))

    grads = gradients(formula, list(ctx.saved_tensors), upstream)
    return (*grads, None, None, None)


# ---- autocast: ratios and losses are computed in float32 whatever the network ran in

for _name in ("density_ratio", "variational_bound", "dual_bound", "dual_output"):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"refine_ext::{_name}", _device, torch.float32)


# ---- vmap: the ops work on the last dimension, so a batch dimension goes in front


def _front(x: Any, dim: int | None, size: int) -> Any:
    """x with its batch dimension in front, added where there is none."""
    if not isinstance(x, Tensor):
        return x
    return x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)


def _batch(name: str) -> Callable[..., Any]:
    op = getattr(ops, name).default

    def rule(call: Callable[..., Any], info: Any, in_dims: tuple, *inputs: Any) -> Any:
        args = [_front(x, d, info.batch_size) for x, d in zip(inputs, in_dims, strict=True)]
        if name == "density_ratio":
            h, base_weights, shift = args[:3]
            # One row of weights or one shift for several groups of an example: spelled out, as [B, n] would be read
            # as the weights of B groups.
            if base_weights is not None and base_weights.dim() < h.dim():
                args[1] = base_weights.unsqueeze(1).expand(h.shape)
            if shift is not None:
                args[2] = shift.reshape(info.batch_size, -1).expand(-1, h[0].numel() // h.shape[-1])
        output = call(op, *args)
        return output, (0 if isinstance(output, Tensor) else (0,) * len(output))

    return rule


for _name, _backward, _setup in (
    ("density_ratio", _density_ratio_backward, _density_ratio_setup),
    ("density_ratio_backward", _density_ratio_double_backward, _density_ratio_backward_setup),
    ("variational_bound", _variational_bound_backward, _variational_bound_setup),
    ("variational_bound_backward", _variational_bound_double_backward, _variational_bound_backward_setup),
    ("dual_bound", _dual_bound_backward, _dual_bound_setup),
    ("dual_output", _dual_output_backward, _dual_output_setup),
    ("dual_slope", _dual_slope_backward, _dual_slope_setup),
):
    register_gradient(_name, _backward, _setup, _batch(_name))
