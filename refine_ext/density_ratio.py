"""Density ratios from discriminator outputs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._call import called
from ._ops import LOG_LARGEST, LOG_SQUARE, LOG_SUM, LOG_WEIGHT, SHIFT, ops
from .arguments import check_floating
from .divergence import parse_divergence
from .pareto import pareto_khat

_OP = ops.density_ratio.default


class DensityRatio:
    """Density ratios r = dP/dQ at the samples of Q, and the health of their weights. Made by `density_ratio`.

    Per sample, shaped and typed as `h`:
        log_ratio: log r.
        ratio: r; overflows where log r does not fit, which `log_ratio` never does.
        weights: base weight times r, divided by its sum over the group; sums to one.
    Per group, float64:
        shift: ν, the root of E_Q[(f*)'(h − ν)] = 1, or the given one. Pass it back as `shift=` to reuse it.
            For kind "logit": log E_Q e^h.
        ess: effective sample size (Σr)²/Σr², between 1 and n. Not differentiable: use 1 / weights.square().sum().
        max_weight: the largest of `weights`.
        log_normalizer: log E_Q r; zero up to the search's tolerance unless the shift was given.
        khat: Pareto k̂ of the largest ratios (Vehtari et al. 2024): above 0.7 the weights are not to be trusted.
    """

    __slots__ = ("_base_weights", "_dim", "_log_ratio", "_ratio", "_shape", "_solve", "_stats")

    def __init__(self, values, stats, solve, shape, dim, is_ratio, base_weights):
        self._log_ratio = None if is_ratio else values
        self._ratio = values if is_ratio else None
        self._stats = stats
        self._solve = solve
        self._shape = shape
        self._dim = dim
        self._base_weights = base_weights

    def _shaped(self, rows: Tensor) -> Tensor:
        if self._dim is None:
            return rows.view(self._shape)
        return rows.movedim(-1, self._dim)

    def _log_rows(self) -> Tensor:
        if self._log_ratio is None:
            self._log_ratio = self._solve()
        return self._log_ratio

    def _weighted_rows(self) -> Tensor:
        """log r, −inf where the base weight is zero: such a sample may lie outside the domain of f*, log r = NaN."""
        rows = self._log_rows()
        return rows if self._base_weights is None else rows.masked_fill(self._base_weights == 0, -torch.inf)

    def _ratio_rows(self) -> Tensor:
        if self._ratio is None:
            self._ratio = self._log_rows().exp()
        return self._ratio

    @property
    def log_ratio(self) -> Tensor:
        return self._shaped(self._log_rows())

    @property
    def ratio(self) -> Tensor:
        return self._shaped(self._ratio_rows())

    @property
    def weights(self) -> Tensor:
        log_sum = self._stats[..., LOG_SUM, None]
        rows = self._weighted_rows()
        # The sum is subtracted in float64: a float32 one would put its rounding into every weight.
        scaled = (rows - log_sum).exp() if rows.dtype == torch.float64 else _scaled(rows, log_sum)
        return self._shaped(scaled if self._base_weights is None else scaled * self._base_weights)

    @property
    def shift(self) -> Tensor:
        return self._stats[..., SHIFT]

    @property
    def ess(self) -> Tensor:
        stats = self._stats.detach()  # no backward formula: an error for who asks, not a gradient of zero
        return (2 * stats[..., LOG_SUM] - stats[..., LOG_SQUARE]).exp()

    @property
    def max_weight(self) -> Tensor:
        stats = self._stats.detach()
        return (stats[..., LOG_LARGEST] - stats[..., LOG_SUM]).exp()

    @property
    def log_normalizer(self) -> Tensor:
        return self._stats[..., LOG_SUM] - self._stats[..., LOG_WEIGHT]

    @property
    def khat(self) -> Tensor:
        log_weights = self._weighted_rows().detach()
        if self._base_weights is not None:
            log_weights = log_weights + self._base_weights.log()
        return pareto_khat(log_weights)

    def __repr__(self) -> str:
        if self._stats.dim() > 1:
            return f"DensityRatio(shape={list(self._shape)}, groups={list(self._stats.shape[:-1])})"
        return (
            f"DensityRatio(shape={list(self._shape)}, shift={self.shift.item():.6g}, "
            f"ess={self.ess.item():.6g}, max_weight={self.max_weight.item():.3g})"
        )


def _scaled(log_ratio: Tensor, log_sum: Tensor) -> Tensor:
    high = log_sum.to(torch.float32)
    low = (log_sum - high).to(torch.float32)
    return ((log_ratio.float() - high) - low).exp().to(log_ratio.dtype)


def density_ratio(
    h: Tensor,
    divergence: str = "kl",
    *,
    kind: Literal["variational", "logit"] = "variational",
    dim: int | None = None,
    base_weights: Tensor | None = None,
    shift: float | Tensor | None = None,
    output: Literal["log_ratio", "ratio"] = "log_ratio",
    out: Tensor | None = None,
    nan_policy: Literal["raise", "propagate"] | None = None,
) -> DensityRatio:
    """Density ratios r = (f*)'(h − ν) of discriminator outputs on samples of Q, with E_Q r = 1.

    The shift ν is the root of E_Q[(f*)'(h − ν)] = 1, found by a safeguarded Newton search to a relative residual of
    3e-7 (1e-12 in float64). For `kl` it is in closed form: log r = h − log E_Q e^h.

    Args:
        h: discriminator outputs on samples of Q, any shape; float64, float32, float16 or bfloat16 (computed in
            float32), CPU or CUDA. −inf is allowed (r = 0).
        divergence: one of `divergences()`; for `alpha:<a>` any a other than 0 and 1.
        kind: "variational": h is the output of the f-divergence's dual, in nats.
            "logit": h is a classifier's logit log P(real|x)/P(fake|x), log r = h − log E_Q e^h whatever f.
        dim: the dimension over which E_Q runs, one group for every index of the others. None: all elements.
        base_weights: non-negative weights of the samples under Q (importance weights, multiplicities), shaped as
            `h` or one-dimensional along `dim`; they need not be normalised. Treated as constants by autograd.
        shift: None to solve for ν, or a given ν: a number, or a float64 tensor with one value per group, such as
            an earlier result's `.shift`. Then each r depends on its own h only. Treated as a constant by autograd.
        output: what the kernel writes, the other one follows from it on demand. Gradients need "log_ratio".
        out: a contiguous tensor like `h` to write into; may be `h` itself. Not differentiable. A large fresh tensor
            costs more in page faults than the arithmetic does.
        nan_policy: "raise" refuses NaN, +inf and shifts outside the domain of f*; "propagate" makes the group that
            has one NaN. Default: "raise" on CPU, "propagate" on CUDA, where raising waits for the device.

    Returns:
        A `DensityRatio`: log_ratio, ratio, weights, shift, ess, max_weight, log_normalizer, khat.

    Raises:
        TypeError: a dtype or argument type that is not supported.
        ValueError: an empty `h`, unknown names, shapes that do not fit, NaN or +inf in `h`, weights that are negative
            or all zero, a `shift` that puts an h outside the domain of f*.

    Source: Husain, De Bortoli, Nock 2026, refined model dQ̂ = (f*)'(h* − ν*) dQ; shift of Ruderman et al. 2012 and
    Birrell et al. 2022 ((f,Γ)-divergences).

    >>> import torch, refine_ext as rx
    >>> rx.density_ratio(torch.tensor([0.0, 1.0, 2.0]), "pearson_chi2").ratio
    tensor([0.5000, 1.0000, 1.5000])
    """
    check_floating("density_ratio", "h", h)
    code, alpha = parse_divergence("density_ratio", divergence, kind)
    if dim is None:
        rows = h if h.dim() == 1 else h.reshape(-1)
    else:
        if not isinstance(dim, int):
            raise TypeError(f"density_ratio: dim must be an integer or None, got {type(dim).__name__}")
        if not -h.dim() <= dim < h.dim():
            raise ValueError(f"density_ratio: dim must be in [{-h.dim()}, {h.dim() - 1}], got {dim}")
        rows = h.movedim(dim, -1)
    if base_weights is not None:
        base_weights = _weights_like(base_weights, h, rows, dim)
    if shift is not None:
        shift = _shift_like(shift, rows)
    check = nan_policy == "raise" if nan_policy is not None else h.device.type == "cpu"
    if nan_policy not in (None, "raise", "propagate"):
        raise ValueError(f"density_ratio: nan_policy must be raise or propagate, got {nan_policy!r}")
    if output not in ("log_ratio", "ratio"):
        raise ValueError(f"density_ratio: output must be log_ratio or ratio, got {output!r}")
    is_ratio = output == "ratio"
    tracked = torch.is_grad_enabled() and h.requires_grad
    if tracked and (is_ratio or out is not None):
        raise ValueError(
            "density_ratio: out= and output='ratio' are not differentiable; "
            "use the default output and .ratio, or torch.no_grad()"
        )

    def solve() -> Tensor:
        return _OP(rows, base_weights, shift, code, alpha, False, check)[0]

    if out is not None:
        values, stats = _write_into(out, h, rows, dim, base_weights, shift, code, alpha, is_ratio, check)
    else:
        values, stats = called("density_ratio", _OP, tracked, rows, base_weights, shift, code, alpha, is_ratio, check)
    if check and h.device.type != "cpu" and bool(stats.isnan().any()):
        raise ValueError("density_ratio: h must hold no NaN or +inf and lie, after the shift, in the domain of f*")
    return DensityRatio(values, stats, solve, h.shape, dim, is_ratio, base_weights)


def _weights_like(weights: Tensor, h: Tensor, rows: Tensor, dim: int | None) -> Tensor:
    if not isinstance(weights, Tensor):
        raise TypeError(f"density_ratio: base_weights must be a torch.Tensor, got {type(weights).__name__}")
    if weights.is_complex():
        raise TypeError(f"density_ratio: base_weights must be real, got {weights.dtype}")
    if weights.device != h.device:
        raise ValueError(f"density_ratio: base_weights is on {weights.device}, h is on {h.device}")
    if weights.shape == h.shape:
        weights = weights.reshape(-1) if dim is None else weights.movedim(dim, -1)
    elif weights.shape != rows.shape[-1:]:
        raise ValueError(
            f"density_ratio: base_weights must have shape {list(h.shape)} or [{rows.shape[-1]}], "
            f"got {list(weights.shape)}"
        )
    weights = weights.detach().to(torch.promote_types(weights.dtype, h.dtype))
    # Only proportions count: with a largest weight of one, no size of the weights leaves the range of h's dtype.
    return (weights / weights.abs().amax(-1, keepdim=True)).to(h.dtype)


def _shift_like(shift: float | Tensor, rows: Tensor) -> Tensor:
    try:
        if isinstance(shift, (int, float)):  # filled on the device: a copy would wait for it
            return torch.full((), shift, dtype=torch.float64, device=rows.device)
        value = torch.as_tensor(shift, dtype=torch.float64, device=rows.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"density_ratio: shift must be a number or a tensor, got {type(shift).__name__}") from error
    groups = rows.shape[:-1]
    if value.numel() == 1:
        return value.reshape(())
    if value.shape != groups:
        raise ValueError(
            f"density_ratio: shift must be one number or have shape {list(groups)}, got {list(value.shape)}"
        )
    return value


def _write_into(out, h, rows, dim, base_weights, shift, code, alpha, is_ratio, check):
    if not isinstance(out, Tensor) or out.shape != h.shape or out.dtype != h.dtype:
        got = f"{list(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"density_ratio: out must be a {h.dtype} tensor of shape {list(h.shape)}, got {got}")
    if out.device != h.device:
        raise ValueError(f"density_ratio: out is on {out.device}, h is on {h.device}")
    target = out.reshape(-1) if dim is None and out.is_contiguous() else out
    target = target if dim is None else out.movedim(dim, -1)
    arguments = (base_weights, shift, code, alpha, is_ratio, check)
    # A view of the input that starts elsewhere would be read after it is written.
    shifted = (
        not torch.compiler.is_compiling()
        and rows.data_ptr() != target.data_ptr()
        and rows.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
    )
    if target.is_contiguous() and target.dim() == rows.dim() and not shifted:
        stats = called("density_ratio", ops.density_ratio_out.default, True, rows, *arguments, out=target)
        return target, stats
    values, stats = called("density_ratio", _OP, True, rows, *arguments)
    shaped = values.view(h.shape) if dim is None else values.movedim(-1, dim)
    out.copy_(shaped)
    return values, stats
