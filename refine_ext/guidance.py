"""Guided sampling's arithmetic: the discriminator's part of a score, and the steps of samplers, each in one pass.

Every update of a sampler is a linear combination of what it has in hand and fresh noise,
``x' = a x + sum_k c_k u_k + s z``: which sampler it is, is a choice of coefficients (`guided_step`). What a
discriminator adds to a model's prediction is its gradient times a factor for each sample (`guidance_factor`,
`guided_score`).

The noise is Philox4x32-10 with the seed as key and (element, step, sample) as counter (`philox_normal`): the same on
CPU and GPU, to a rounding, in any dtype, batch and number of threads. Under autocast these functions take their
arguments as they are: the state keeps its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._call import called
from ._ops_guidance import PARAMETRIZATIONS, ops
from .arguments import check_floating, check_seed
from .divergence import KINDS, parse_divergence

_STEP = ops.guided_step.default
_STEP_OUT = ops.guided_step_out.default
_FACTOR = ops.guidance_factor.default


def guided_step(
    x: Tensor,
    terms: Sequence[Tensor],
    coefficients: Sequence[float] | Tensor,
    *,
    factor: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """x' = a x + sum_k c_k u_k + s z for each sample, in one pass: one read of each tensor, one write.

    z is standard normal and never in memory. The arithmetic is float32 (float64 for a float64 state), in the order
    x, u_1 .. u_K, z, and rounded to the state's dtype once. A coefficient that is exactly 0 leaves its tensor out,
    whatever that holds: x may then be uninitialised, and an infinite or NaN gradient of a sample without guidance does
    no harm.

    Args:
        x: ``[B, ...]``, the state; float64, float32, float16 or bfloat16.
        terms: u_1 .. u_K, at most 7, shaped as x; in x's dtype, or float32 with a float64 state, or float16 or bfloat16
            with a float32 state. Samples may be any stride apart (a slice of channels is not copied).
        coefficients: a, c_1 .. c_K for a step without noise, a, c_1 .. c_K, s for one with it: numbers, or a float64
            tensor of that length, or of ``[B, .]``, on x's device. For a loop without host syncs, and for one graph of
            torch.compile for all steps, take the rows of a table made before it.
        factor: ``[B]`` float64, multiplies the last term's coefficient: what `guidance_factor` returns.
        seed: an int; or an int64 tensor on x's device with one seed for each sample, whose noise then does not depend
            on the batch it is in; or one of no dimension for all. None: drawn from torch's default generator.
        step: which of the seed's numbers: count the sampler's steps here, from 0 to 2**32 - 1.
        out: a contiguous tensor like x to write into; may be x or a term itself. Not differentiable.

    Returns:
        x', contiguous and like x, or `out`. Differentiable in x, terms, coefficients (a tensor) and factor, twice.

    Raises:
        TypeError: not tensors, or a dtype that is not supported.
        ValueError: shapes, dtypes or the number of coefficients that do not fit, more than 7 terms, a step out of
            range, an `out` that partly overlaps an input.

    Source: the update of Karras et al. 2022, Algorithm 2, Song et al. 2021 (DDIM, ancestral), Ansari et al. 2021
    (DGflow, eq. 8), for particular coefficients; numbers of Salmon et al. 2011 by Box and Muller 1958.

    >>> import torch, refine_ext as rx
    >>> rx.guided_step(torch.ones(2, 2), [torch.full((2, 2), 0.5)], [1.0, -2.0])
    tensor([[0., 0.],
            [0., 0.]])
    """
    name = "guided_step"
    check_floating(name, "x", x, may_be_empty=True)
    terms = list(terms)
    for term in terms:
        check_floating(name, "terms", term, may_be_empty=True)
    tracked = x.requires_grad or any(term.requires_grad for term in terms)
    if isinstance(coefficients, Tensor):
        if coefficients.dim() == 0:
            raise ValueError(f"{name}: coefficients must have one or two dimensions, got a 0-dim tensor")
        count, scalars = coefficients.shape[-1], []
        table = _float64(name, "coefficients", coefficients)
        tracked = tracked or table.requires_grad
    else:
        table, scalars = None, list(coefficients)
        if any(isinstance(c, Tensor) for c in scalars):
            raise TypeError(f"{name}: coefficients must be numbers or one tensor, got a sequence of tensors")
        count = len(scalars)
    if factor is not None:
        factor = _float64(name, "factor", factor)
        tracked = tracked or factor.requires_grad
    noisy = count == len(terms) + 2
    number, seeds = 0, None
    if noisy:
        number, seeds = _seed(name, seed, x.device)
        step = _step_number(name, step)
    tracked = tracked and torch.is_grad_enabled()
    arguments = (x, terms, table, scalars, factor, seeds, number, step, noisy)
    return called(name, _STEP, tracked, *arguments) if out is None else _step_into(out, x, tracked, arguments)


def _step_into(out: Tensor, x: Tensor, tracked: bool, arguments: tuple) -> Tensor:
    name = "guided_step"
    if not isinstance(out, Tensor) or out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        got = f"{list(out.shape)} {out.dtype} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{name}: out must be like x, {list(x.shape)} {x.dtype} on {x.device}, got {got}")
    if tracked or (out.requires_grad and torch.is_grad_enabled()):
        raise ValueError(f"{name}: out= is not differentiable; leave it out, or use torch.no_grad()")
    if out.is_contiguous():
        called(name, _STEP_OUT, True, *arguments, out=out)
        return out
    return out.copy_(called(name, _STEP, True, *arguments))


def philox_normal(
    size: Sequence[int],
    seed: int | Tensor,
    *,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal numbers of a seed: the z of `guided_step` with the same seed and step.

    Element e of sample b is number e % 4 of Philox block e // 4: key = seed, counter = (block, step, sample, stream).
    Of the block's words w_0 .. w_3, numbers 0 and 1 are ``r(w_0) cos(t_1), r(w_0) sin(t_1)``, numbers 2 and 3
    ``r(w_2) cos(t_3), r(w_2) sin(t_3)``, with ``r(w) = sqrt(-2 log((w + 1/2) / 2^32))`` and ``t_i = 2 pi w_i / 2^32``.
    |z| stays below 6.77.

    Args:
        size: ``[B, ...]``.
        seed: an int, with which sample b has the numbers of its own; or an int64 tensor of ``[B]`` seeds, with which
            its numbers are those of the first sample of its seed, whatever the batch.
        step: another set of numbers for each, from 0 to 2**32 - 1.
        dtype: float64 (accurate to 2e-15), float32 (6e-7, of numbers up to 6.8), float16 or bfloat16 (rounded from
            float32).
        device: where to make them. None: torch's default device.

    Raises:
        TypeError, ValueError: a dtype that is not floating, an empty `size`, a seed or step out of range.

    Source: Salmon, Moraes, Dror and Shaw 2011; Box and Muller 1958.

    >>> import refine_ext as rx
    >>> rx.philox_normal((2, 3), seed=1).shape
    torch.Size([2, 3])
    """
    if len(size) == 0:
        raise ValueError("philox_normal: size must have at least the batch dimension, got an empty one")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"philox_normal: dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    if seed is None:
        raise TypeError("philox_normal: seed must be an int or an int64 tensor, got NoneType")
    out = torch.empty(tuple(size), dtype=dtype, device=device)
    with torch.no_grad():
        try:
            return guided_step(out, [], (0.0, 1.0), seed=seed, step=step, out=out)
        except (TypeError, ValueError) as error:
            message = str(error).replace("guided_step: x", "philox_normal: the result")
            raise type(error)(message.replace("guided_step", "philox_normal")) from None


def guidance_factor(
    h: Tensor,
    *,
    divergence: str = "kl",
    kind: str = "variational",
    shift: float | Tensor = 0.0,
    weight: float | Tensor = 1.0,
    sigma: float | Tensor | None = None,
    alpha: float | Tensor = 1.0,
    parametrization: str = "score",
    sigma_min: float = 0.0,
    sigma_max: float = math.inf,
    flow: bool = False,
) -> Tensor:
    """w c(h - nu) {1, -sigma, sigma^2/alpha, -sigma/alpha} [sigma_min <= sigma/alpha <= sigma_max] for each sample.

    What multiplies grad h to guide the score, noise, denoised or velocity prediction of a diffusion
    x = alpha x_0 + sigma eps (velocity: alpha^2 + sigma^2 = 1). c = (f*)''/(f*)' at h - nu is d log r / dh, 1 for a
    logit. Every argument may differ from sample to sample, and nothing here waits for a GPU.

    Args:
        h: ``[B]`` outputs of the discriminator; float64, float32, float16 or bfloat16.
        divergence: one of `divergences()`. For a logit it matters with `flow` only.
        kind: "variational" or "logit", as in `density_ratio`.
        shift: nu, a number or ``[B]``: the one the discriminator was trained or normalised with.
        weight: w, a number or ``[B]``. A weight of 0 gives a factor of exactly 0 whatever h is.
        sigma, alpha: noise and signal level, numbers or ``[B]``. No sigma: no limits, and "score" only.
        parametrization: "score", "noise", "denoised" or "velocity".
        sigma_min, sigma_max: noise levels sigma/alpha outside get a factor of exactly 0.
        flow: kappa = u f''(u) at u = 1/r instead of c: the gradient flow of D_f(model || data), of grad log r.

    Returns:
        ``[B]`` float64, differentiable in h and weight, any number of times; the other arguments are constants. NaN
        where h is NaN or h - nu lies outside the domain of f*.

    Raises:
        TypeError: a type or dtype that is not supported.
        ValueError: unknown names, values for another number of samples, a parametrization without sigma.

    Source: Kim et al. 2022, eq. 8, for c = 1; Husain, De Bortoli and Nock 2026; Ansari et al. 2021, section 3 (flow).

    >>> import torch, refine_ext.guidance as g
    >>> g.guidance_factor(torch.zeros(2), kind="logit", sigma=torch.tensor([0.5, 9.0]), parametrization="noise",
    ...                   sigma_max=5.0)
    tensor([-0.5000,  0.0000], dtype=torch.float64)
    """
    name = "guidance_factor"
    check_floating(name, "h", h, may_be_empty=True)
    if kind not in KINDS:
        raise ValueError(f"{name}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    code, alpha_divergence = parse_divergence(name, divergence)
    if parametrization not in PARAMETRIZATIONS:
        raise ValueError(
            f"{name}: parametrization must be one of {', '.join(PARAMETRIZATIONS)}, got {parametrization!r}"
        )
    values, constants = [], []
    for argument, value in (("shift", shift), ("weight", weight), ("sigma", sigma), ("alpha", alpha)):
        tensor = value if isinstance(value, Tensor) else None
        if tensor is not None:
            check_floating(name, argument, tensor, may_be_empty=True)
            constant = math.nan
        elif value is None and argument == "sigma":
            constant = math.nan
        elif isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            constant = value
        else:
            raise TypeError(f"{name}: {argument} must be a number or a tensor, got {type(value).__name__}")
        values.append(tensor)
        constants.append(constant)
    constants += [sigma_min, sigma_max]
    arguments = (h, *values, constants, code, alpha_divergence, kind == "logit", flow)
    number = PARAMETRIZATIONS.index(parametrization)
    tracked = torch.is_grad_enabled() and (h.requires_grad or (values[1] is not None and values[1].requires_grad))
    return called(name, _FACTOR, tracked, *arguments, number)


def guided_score(
    prediction: Tensor,
    h: Tensor,
    gradient: Tensor,
    *,
    divergence: str = "kl",
    kind: str = "variational",
    shift: float | Tensor = 0.0,
    weight: float | Tensor = 1.0,
    sigma: float | Tensor | None = None,
    alpha: float | Tensor = 1.0,
    parametrization: str = "score",
    sigma_min: float = 0.0,
    sigma_max: float = math.inf,
    out: Tensor | None = None,
) -> Tensor:
    """prediction' = prediction + w c(h - nu) {1, -sigma, sigma^2/alpha, -sigma/alpha} grad h, gated by sigma/alpha.

    The score of the refined model, grad log q + w c(h - nu) grad h, in the parametrisation of the diffusion model:
    score s' = s + w g, noise eps' = eps - w sigma g, denoised x_0' = x_0 + w (sigma^2/alpha) g, velocity
    v' = v - w (sigma/alpha) g, with g = c(h - nu) grad h = grad log r.

    Args:
        prediction: ``[B, ...]``, the model's output at x = alpha x_0 + sigma eps; float64, float32, float16 or
            bfloat16.
        h: ``[B]`` outputs of the discriminator at x.
        gradient: the gradient of h in x, shaped as prediction; in its dtype, or narrower (see `guided_step`).
        divergence, kind, shift, weight, sigma, alpha, parametrization, sigma_min, sigma_max: see `guidance_factor`. A
            sample outside the noise levels, or of weight 0, keeps its prediction, whatever h and gradient hold.
        out: a contiguous tensor like prediction to write into; may be prediction itself. Not differentiable.

    Returns:
        prediction', like prediction. Differentiable in prediction, h, gradient and weight, twice.

    Raises:
        TypeError, ValueError: see `guidance_factor` and `guided_step`.

    Source: Kim et al. 2022 (Discriminator Guidance, arXiv 2211.17091), eq. 8; Husain, De Bortoli and Nock 2026 for
    other divergences than KL.

    >>> import torch, refine_ext as rx
    >>> rx.guided_score(torch.zeros(1, 2), torch.tensor([0.3]), torch.ones(1, 2), kind="logit", sigma=2.0,
    ...                 parametrization="denoised")
    tensor([[4., 4.]])
    """
    factor = guidance_factor(
        h,
        divergence=divergence,
        kind=kind,
        shift=shift,
        weight=weight,
        sigma=sigma,
        alpha=alpha,
        parametrization=parametrization,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
    )
    return guided_step(prediction, [gradient], (1.0, 1.0), factor=factor, out=out)


def _float64(function: str, argument: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {argument} must be a tensor, got {type(value).__name__}")
    if value.dtype == torch.float64:
        # torch would drop the tangent of a registered op without a word.
        if forward_ad._current_level >= 0:
            check_floating(function, argument, value, may_be_empty=True)
        return value
    check_floating(function, argument, value, may_be_empty=True)
    return value.double()


def _seed(function: str, seed: int | Tensor | None, device: torch.device) -> tuple[int, Tensor | None]:
    """The seed as a number, or as a tensor."""
    if seed is None:
        # On the device: nothing waits, and a CUDA graph draws another one at every replay.
        return 0, torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    seed = check_seed(function, seed)
    return (0, seed) if isinstance(seed, Tensor) else (seed, None)


def _step_number(function: str, step: int) -> int:
    if isinstance(step, bool) or not isinstance(step, (int, torch.SymInt)):
        raise TypeError(f"{function}: step must be an int, got {type(step).__name__}")
    return step
