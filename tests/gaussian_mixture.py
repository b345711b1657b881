"""Diffused Gaussian mixtures in closed form: every prediction a model of diffusion makes, for adapters' tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Mixture:
    """sum_k w_k N(m_k, s^2 I) of flattened samples, diffused to alpha x_0 + sigma eps."""

    def __init__(self, means: Tensor, std: float, weights: Tensor) -> None:
        self.means, self.std, self.weights = means.double(), std, weights.double() / weights.sum()

    def scaled(self, scale: float) -> Mixture:
        return Mixture(self.means * scale, self.std * scale, self.weights)

    def _parts(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.flatten(1).double()
        alpha, sigma = (v.double().reshape(-1).expand(len(rows))[:, None] for v in (alpha, sigma))
        variance = alpha**2 * self.std**2 + sigma**2
        offsets = alpha[..., None] * self.means - rows[:, None]
        log_parts = self.weights.log() - offsets.square().sum(-1) / (2 * variance) - rows.shape[1] / 2 * variance.log()
        return log_parts, offsets, variance

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Of x_0 + sigma eps, up to the constant (2 pi)^(-d/2)."""
        return self._parts(x, torch.ones(1, dtype=torch.float64), sigma)[0].logsumexp(1)

    def predict(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, what: str) -> Tensor:
        """E[. | x] of the noise, the sample x_0, or a velocity of VP diffusions or flow matching."""
        alpha, sigma = (torch.as_tensor(v, dtype=torch.float64) for v in (alpha, sigma))
        log_parts, offsets, variance = self._parts(x, alpha, sigma)
        score = (log_parts.softmax(1)[..., None] * offsets).sum(1) / variance
        shape = (-1, *[1] * (x.dim() - 1))
        alpha, sigma = alpha.reshape(shape), sigma.reshape(shape)
        noise = -sigma * score.reshape(x.shape)
        sample = (x.double() - sigma * noise) / alpha
        return {
            "epsilon": lambda: noise,
            "sample": lambda: sample,
            "v_prediction": lambda: alpha * noise - sigma * sample,
            "flow_prediction": lambda: noise - sample,
        }[what]().to(x.dtype)


def true_and_biased(dimension: int = 8) -> tuple[Mixture, Mixture]:
    """Two mixtures that overlap, so that their log-ratio is moderate wherever trajectories go."""
    generator = torch.Generator().manual_seed(7)
    means = torch.randn(3, dimension, generator=generator, dtype=torch.float64)
    shift = 0.3 * torch.randn(3, dimension, generator=generator, dtype=torch.float64)
    return Mixture(means, 0.5, torch.tensor([0.5, 0.3, 0.2])), Mixture(
        means + shift, 0.6, torch.tensor([0.3, 0.3, 0.4])
    )


class LogRatio:
    """The exact discriminator: log p / q of x_0 + sigma eps. Records the noise levels it was asked at."""

    def __init__(self, true: Mixture, biased: Mixture) -> None:
        self.true, self.biased = true, biased
        self.levels: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.levels.append(sigma.detach())
        return self.true.log_density(x, sigma) - self.biased.log_density(x, sigma)


# h = f'(r) of a log-ratio: what a discriminator of the f-divergence's dual returns at its optimum.
DUALS = {
    "kl": lambda log_ratio: log_ratio + 1,
    "reverse_kl": lambda log_ratio: -torch.exp(-log_ratio),
    "jensen_shannon": lambda log_ratio: math.log(2) - torch.log1p(torch.exp(-log_ratio)),
    "gan": lambda log_ratio: -torch.log1p(torch.exp(-log_ratio)),
    "pearson_chi2": lambda log_ratio: 2 * torch.expm1(log_ratio),
    "neyman_chi2": lambda log_ratio: -torch.expm1(-2 * log_ratio),
    "squared_hellinger": lambda log_ratio: -torch.expm1(-log_ratio / 2),
    "jeffreys": lambda log_ratio: log_ratio + 1 - torch.exp(-log_ratio),
    "alpha:0.5": lambda log_ratio: torch.expm1(-0.5 * log_ratio) / -0.5,
}
