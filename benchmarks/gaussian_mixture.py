"""Gaussian mixtures diffused in closed form: a true one, a biased model of it, and their exact ratio at every level.

A mixture of N(mu_k, s_k^2 I) plus sigma times standard normal noise is the mixture of N(mu_k, (s_k^2 + sigma^2) I).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Weights ``[K]``, means ``[K, d]`` and standard deviations ``[K]``, float64."""

    weights: Tensor
    means: Tensor
    scales: Tensor

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """log p ``[B]`` of the states at noise levels sigma, ``[B]`` or a number."""
        return torch.logsumexp(self._joint(x, sigma), 1)

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x], what a perfectly trained denoiser returns."""
        share = torch.softmax(self._joint(x, sigma), 1)[:, :, None]
        noise, own = sigma.reshape(-1, 1, 1) ** 2, self.scales[:, None] ** 2
        return (share * (own * x[:, None] + noise * self.means) / (own + noise)).sum(1)

    def sample(self, n: int, seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=random)
        z = torch.randn(n, self.means.shape[1], generator=random, dtype=torch.float64)
        return self.means[k] + self.scales[k, None] * z

    def _joint(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1)
        variance = self.scales**2 + level**2
        squares = (x[:, None] - self.means).square().sum(2)
        d = self.means.shape[1]
        return self.weights.log() - 0.5 * squares / variance - 0.5 * d * (2 * math.pi * variance).log()


@dataclass(frozen=True)
class Problem:
    """The data's mixture, and the model's: reweighted, shifted and too narrow."""

    true: Mixture
    model: Mixture

    def log_ratio(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.true.log_density(x, sigma) - self.model.log_density(x, sigma)


def problem(d: int) -> Problem:
    """In two dimensions four modes, in more five, with every fault at once."""
    random = torch.Generator().manual_seed(d)
    if d == 2:
        weights, scales = [0.4, 0.3, 0.2, 0.1], [0.5, 0.6, 0.4, 0.5]
        means = torch.tensor([[2.0, 0.0], [0.0, 2.5], [-2.0, -0.5], [0.5, -2.0]], dtype=torch.float64)
        narrow = 0.8
    else:
        weights, scales = [0.3, 0.25, 0.2, 0.15, 0.1], [0.5, 0.55, 0.6, 0.7, 0.8]
        means = torch.randn(5, d, generator=random, dtype=torch.float64) * (3 / math.sqrt(d))
        narrow = 0.9
    true = Mixture(torch.tensor(weights, dtype=torch.float64), means, torch.tensor(scales, dtype=torch.float64))
    shift = torch.randn(true.means.shape, generator=random, dtype=torch.float64)
    shift = 0.2 * shift / shift.norm(dim=1, keepdim=True)
    biased = replace(true, weights=true.weights.flip(0), means=true.means + shift, scales=narrow * true.scales)
    return Problem(true, biased)


def log_density_of_samples(
    sampler: Callable[[Tensor], Tensor], noise: Tensor, h: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Samples of a deterministic sampler, and the exact log-density they have: log N(noise; 0, I) - log |det J|.

    The sampler is a smooth map of noise ``[B, d]``, taken as it is, discretisation and all. J comes of central
    differences, off by h^2 times its second derivative, and by 1e-15 / h of rounding: about 1e-9.
    """
    batch, d = noise.shape
    steps = h * torch.eye(d, dtype=noise.dtype)
    moved = torch.stack([noise + sign * step for step in steps for sign in (1.0, -1.0)])
    ends = sampler(torch.cat([noise[None], moved]).reshape(-1, d)).reshape(1 + 2 * d, batch, d)
    jacobian = ((ends[1::2] - ends[2::2]) / (2 * h)).permute(1, 2, 0)
    normal = -0.5 * noise.square().sum(1) - 0.5 * d * math.log(2 * math.pi)
    return ends[0], normal - torch.linalg.slogdet(jacobian)[1]
