"""Guided sampling's arithmetic: the discriminator's part of a score, and fused sampler updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .density_ratio import density_ratio
from ._ops import _score_factor
from .divergence import parse_divergence

PARAMETRIZATIONS = ("score", "noise", "denoised", "velocity")


def philox_normal(
    size: Sequence[int],
    seed: int | Tensor,
    *,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    seeds = seed.tolist() if isinstance(seed, Tensor) else [seed] * size[0]
    rows = []
    for row, s in enumerate(seeds):
        sequence = 0 if isinstance(seed, Tensor) else row
        g = torch.Generator().manual_seed((s * 1000003 + sequence * 10007 + step) & (2**62 - 1))
        rows.append(torch.randn(tuple(size[1:]), generator=g))
    return torch.stack(rows).to(device=device, dtype=dtype)


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
    table = torch.as_tensor(coefficients, dtype=torch.float64, device=x.device)
    table = table.expand(len(x), table.shape[-1])
    noisy = table.shape[-1] == len(terms) + 2
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    result = torch.zeros_like(x, dtype=compute)
    for k, term in enumerate([x, *terms]):
        c = table[:, k]
        if factor is not None and k == len(terms):
            c = c * factor
        c = c.to(compute).reshape(-1, *[1] * (x.dim() - 1))
        result = result + torch.where(c == 0, 0.0, c * term.to(compute))
    if noisy:
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        s = table[:, -1].to(compute).reshape(-1, *[1] * (x.dim() - 1))
        result = result + s * philox_normal(x.shape, seed, step=step, dtype=compute, device=x.device)
    result = result.to(x.dtype)
    return result if out is None else out.copy_(result)


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
    sigma_max: float = float("inf"),
    flow: bool = False,
) -> Tensor:
    code, a = parse_divergence("guidance_factor", divergence, kind)
    log_ratio = density_ratio(
        h.reshape(-1, 1), divergence, kind=kind, dim=1,
        shift=torch.as_tensor(shift, dtype=torch.float64, device=h.device).expand(h.numel()), nan_policy="propagate"
    ).log_ratio.reshape(h.shape)
    if flow:
        code, a = parse_divergence("guidance_factor", divergence)
        c = (log_ratio * 0 + 1) / _score_factor(-log_ratio, code, a)
    else:
        c = _score_factor(log_ratio, code, a)
    c = c * weight
    if parametrization != "score":
        scale = {"noise": lambda: -sigma, "denoised": lambda: sigma * sigma / alpha, "velocity": lambda: -sigma / alpha}
        c = c * scale[parametrization]()
    if sigma is not None:
        ratio = torch.as_tensor(sigma / alpha, device=h.device)
        c = torch.where((ratio >= sigma_min) & (ratio <= sigma_max), c, 0.0)
    return c


def guided_score(prediction: Tensor, h: Tensor, gradient: Tensor, **options) -> Tensor:
    return guided_step(prediction, [gradient], [1.0, 1.0], factor=guidance_factor(h, **options))
