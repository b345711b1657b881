"""What torch must know of the guidance ops beyond their kernels: shapes (fake), gradients, vmap.

Under autocast the ops take their arguments as they are: the state keeps its dtype, and a step's terms may be narrower.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _C, _library  # noqa: F401  (the ops are registered by then)
from ._autograd import differentiable, register_gradient

ops = torch.ops.refine_ext
_FACTOR = ops.guidance_factor.default
PARAMETRIZATIONS = ("score", "noise", "denoised", "velocity")  # csrc/math/guidance_problem.h Parametrization
_SCORE = 0
# The constants of guidance_factor are shift, weight, sigma (NaN: none), alpha, sigma_min, sigma_max.
_SHIFT, _WEIGHT = range(2)


@torch.library.register_fake("refine_ext::guided_step")
def _(x, terms, coefficients, scalars, factor, seeds, seed, step, noisy):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("refine_ext::guided_step_out")
def _(x, terms, coefficients, scalars, factor, seeds, seed, step, noisy, *, out):
    return None


@torch.library.register_fake("refine_ext::guidance_factor")
def _(h, shift, weight, sigma, alpha, constants, divergence, alpha_divergence, logit, flow, parametrization):
    return h.new_empty(h.shape, dtype=torch.float64)


# ---- guided_step: linear in the state, the terms, the coefficients and the factor. Its gradient is a step itself and
# sums of products, all of which torch can differentiate again.


def _scaled(x: Tensor, coefficient: Tensor) -> Tensor:
    """coefficient * x for each sample; 0 where the coefficient is, whatever x holds."""
    return ops.guided_step(x, [], coefficient.reshape(-1, 1), [], None, None, 0, 0, False)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """``[B]`` sums of a * b over each sample, in float64."""
    return (a.double() * b.double()).flatten(1).sum(1) if a.dim() > 1 else a.double() * b.double()


def _step_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, terms, coefficients, scalars, factor, seeds, ctx.seed, ctx.step, ctx.noisy = inputs
    ctx.scalars = tuple(scalars)
    ctx.count = len(terms)
    ctx.save_for_backward(coefficients, factor, seeds, x, *terms)


def _step_backward(ctx: Any, grad: Tensor):
    coefficients, factor, seeds, x, *terms = ctx.saved_tensors
    batch = x.shape[0]
    if coefficients is None:
        columns = [grad.new_full((batch,), c, dtype=torch.float64) for c in ctx.scalars]
    else:
        columns = list(coefficients.expand(batch, coefficients.shape[-1]).unbind(1))
    plain = columns[ctx.count]  # of the last term, without the factor
    if factor is not None:
        # A coefficient of 0 is 0 whatever the factor is.
        columns[ctx.count] = torch.where(plain == 0, 0.0, plain * factor.reshape(batch))
    needs_x, needs_terms, needs_coefficients, _, needs_factor, *_ = ctx.needs_input_grad
    grad_x = _scaled(grad, columns[0]).to(x.dtype) if needs_x else None
    needs_terms = needs_terms if isinstance(needs_terms, (list, tuple)) else [needs_terms] * ctx.count
    grad_terms = [
        _scaled(grad, columns[k + 1]).to(term.dtype) if needs_terms[k] else None for k, term in enumerate(terms)
    ]
    grad_factor = grad_coefficients = None
    if needs_factor:
        assert factor is not None
        grad_factor = torch.where(plain == 0, 0.0, plain * _products(grad, terms[-1])).reshape(factor.shape)
    if needs_coefficients:
        parts = [_products(grad, tensor) for tensor in (x, *terms)]
        if factor is not None:
            parts[-1] = parts[-1] * factor.reshape(batch)
        if ctx.noisy:
            unit = [0.0, 1.0]
            noise = ops.guided_step(grad.detach(), [], None, unit, None, seeds, ctx.seed, ctx.step, True)
            parts.append(_products(grad, noise))
        grad_coefficients = torch.stack(parts, 1)
        if coefficients.dim() == 1:
            grad_coefficients = grad_coefficients.sum(0)
        elif coefficients.shape[0] == 1:
            grad_coefficients = grad_coefficients.sum(0, keepdim=True)
    none: list | None = None if ctx.scalars else []  # torch takes an empty list for one of tensors
    return grad_x, grad_terms, grad_coefficients, none, grad_factor, None, None, None, None


torch.library.register_autograd("refine_ext::guided_step", _step_backward, setup_context=_step_setup)


# ---- guidance_factor = scale * c(h - shift), scale = weight * {1, -sigma, ...} * gate: by the same op again


def _factor_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *values, constants, ctx.divergence, ctx.alpha_divergence, ctx.logit, ctx.flow, ctx.parametrization = inputs
    ctx.constants = tuple(constants)
    ctx.save_for_backward(*values)


def _slope(c: Tensor, ctx: Any) -> Tensor:
    """dc/dh as a function of c itself (of kappa, if flow), from dc/d log r and d log r/dh; csrc/math/divergence.h."""
    form = _C.family(ctx.divergence, ctx.alpha_divergence)
    exponent, scale = form["exponent"], form["scale"]
    if not ctx.flow:
        if ctx.logit:
            return torch.zeros_like(c)
        if form["form"] == "logistic":  # c = 1 + r
            return c * (c - 1)
        if form["form"] == "lambert":  # c = r / (1 + r)
            return c * c * (1 - c)
        return exponent * c * c  # c = scale r^exponent
    if form["form"] == "logistic":  # kappa = r / (1 + r)
        return c * (1 - c) if ctx.logit else c
    if form["form"] == "lambert":  # kappa = 1 + r
        return c - 1 if ctx.logit else (c - 1) * (c - 1) / c
    return exponent * c if ctx.logit else exponent * (scale * c) ** 2  # kappa = r^exponent / scale


def _factor_backward(ctx: Any, grad: Tensor):
    h, shift, weight, sigma, alpha = ctx.saved_tensors
    family = (ctx.divergence, ctx.alpha_divergence, ctx.logit, ctx.flow)
    needs_h, _, needs_weight, *_ = ctx.needs_input_grad
    plain = [ctx.constants[_SHIFT], 1.0, math.nan, 1.0, 0.0, math.inf]
    c = differentiable(_FACTOR, h, shift, None, None, None, plain, *family, _SCORE)
    grad_h = grad_weight = None
    # A logit's c is 1: what is left is the scale.
    as_logit = (ctx.divergence, ctx.alpha_divergence, True, False, ctx.parametrization)
    any_h = torch.zeros_like(h)
    if needs_h:
        scale = differentiable(_FACTOR, any_h, None, weight, sigma, alpha, ctx.constants, *as_logit)
        grad_h = torch.where(scale == 0, 0.0, grad * scale * _slope(c, ctx)).to(h.dtype)
    if needs_weight:
        unweighted = [*ctx.constants]
        unweighted[_WEIGHT] = 1.0
        scale = differentiable(_FACTOR, any_h, None, None, sigma, alpha, unweighted, *as_logit)
        grad_weight = torch.where(scale == 0, 0.0, grad * scale * c)
        grad_weight = (grad_weight.sum() if weight.numel() == 1 else grad_weight).reshape(weight.shape).to(weight.dtype)
    return grad_h, None, grad_weight, None, None, None, None, None, None, None, None


# ---- vmap


def _front(x: Any, dim: int | None, size: int) -> Any:
    """x with its batch dimension in front, added where there is none."""
    if not isinstance(x, Tensor):
        return x
    return x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)


@torch.library.register_vmap("refine_ext::guided_step")
def _(info, in_dims, x, terms, coefficients, scalars, factor, seeds, seed, step, noisy):
    size = info.batch_size
    x = _front(x, in_dims[0], size)
    term_dims = in_dims[1] if isinstance(in_dims[1], (list, tuple)) else [in_dims[1]] * len(terms)
    terms = [_front(term, dim, size) for term, dim in zip(terms, term_dims, strict=True)]
    coefficients, factor, seeds = (
        _front(value, in_dims[i], size) for i, value in ((2, coefficients), (4, factor), (5, seeds))
    )
    if noisy:
        # Samples are numbered within an example, so that vmap gives what a loop gives.
        steps = [
            ops.guided_step(
                x[i],
                [term[i] for term in terms],
                None if coefficients is None else coefficients[i],
                scalars,
                None if factor is None else factor[i],
                None if seeds is None else seeds[i],
                seed,
                step,
                noisy,
            )
            for i in range(size)
        ]
        return torch.stack(steps), 0
    batch = x.shape[1]
    if coefficients is not None:
        rows = coefficients.unsqueeze(1) if coefficients.dim() == 2 else coefficients
        coefficients = rows.expand(size, batch, rows.shape[-1]).reshape(size * batch, -1)
    flat = ops.guided_step(
        x.flatten(0, 1),
        [term.flatten(0, 1) for term in terms],
        coefficients,
        scalars,
        None if factor is None else factor.reshape(-1),
        None,
        0,
        0,
        False,
    )
    return flat.view(x.shape), 0


def _factor_batch(call, info, in_dims, h, shift, weight, sigma, alpha, *options):
    size = info.batch_size
    h = _front(h, in_dims[0], size)

    def each(value: Tensor | None, dim: int | None) -> Tensor | None:
        if value is None:
            return None
        return _front(value, dim, size).reshape(size, -1).expand(size, h[0].numel()).reshape(-1)

    values = [each(v, d) for v, d in zip((shift, weight, sigma, alpha), in_dims[1:5], strict=True)]
    return call(_FACTOR, h.reshape(-1), *values, *options).view(h.shape), 0


register_gradient("guidance_factor", _factor_backward, _factor_setup, _factor_batch)
