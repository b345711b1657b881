"""Pareto-smoothed diagnosis of importance weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pareto_khat(log_weights: Tensor) -> Tensor:
    """Shape k̂ of a generalised Pareto distribution fitted to the largest weights, along the last dimension.

    The m = min(n/5, 3√n) largest weights' excesses over the next one are fitted by the profile-likelihood average of
    Zhang and Stephens (2009), shrunk to 1/2 as by ten more observations. k̂ < 0.5: finite variance; above 0.7 an
    importance-sampling average of these weights is unreliable at any practical sample size.

    Args:
        log_weights: [..., n] log importance weights, any normalisation; −inf is a weight of zero.

    Returns:
        k̂, float64, shape [...]; NaN where fewer than five weights are in the tail or all in it are equal.

    Source: Vehtari, Simpson, Gelman, Yao, Gabry 2024, Pareto Smoothed Importance Sampling, section 3.

    >>> import torch
    >>> bool(pareto_khat(torch.randn(10000)) < 0.7)
    True
    """
    n = log_weights.shape[-1]
    tail = math.ceil(min(n / 5, 3 * math.sqrt(n)))
    if tail < 5:
        return log_weights.new_full(log_weights.shape[:-1], math.nan, dtype=torch.float64)
    top = log_weights.topk(tail + 1, dim=-1).values.double()
    # Relative to the threshold; the fit does not depend on the scale, the range of exp does.
    top = (top - top[..., :1]).exp()
    excess = (top[..., :-1] - top[..., -1:]).flip(-1)  # ascending
    count = 30 + math.isqrt(tail)
    quartile = excess[..., math.floor(tail / 4 + 0.5) - 1, None]
    grid = torch.arange(1, count + 1, dtype=torch.float64, device=excess.device) - 0.5
    theta = (1 - (count / grid).sqrt()) / (3 * quartile) + 1 / excess[..., -1:]
    shape = torch.log1p(-theta.unsqueeze(-1) * excess.unsqueeze(-2)).mean(-1)
    log_likelihood = tail * ((-theta / shape).log() - shape - 1)
    posterior = log_likelihood.softmax(-1)
    theta = (posterior * theta).sum(-1, keepdim=True)
    khat = torch.log1p(-theta * excess).mean(-1)
    return (khat * tail + 5) / (tail + 10)
