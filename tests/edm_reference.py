"""Karras et al. 2022, Algorithm 2, and Kim et al. 2022's guided sampler, restated in plain torch operations; and
a network, a discriminator and noise to run them on."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def levels(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, eq. 5, and the 0 after it."""
    if num_steps == 1:
        return [sigma_max, 0.0]
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(high + i / (num_steps - 1) * (low - high)) ** rho for i in range(num_steps)] + [0.0]


def algorithm_2(
    net,
    noise: Tensor,
    t: list[float],
    randn,
    *,
    churn=0.0,
    s_min=0.0,
    s_max=math.inf,
    s_noise=1.0,
    rounded=float,
    order=2,
) -> Tensor:
    """Karras et al. 2022, Algorithm 2; order 1 leaves its lines 9 to 11 out. `randn(x)` draws the noise."""

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - net(x, torch.full((len(x),), sigma, dtype=x.dtype))) / sigma

    n = len(t) - 1
    x = t[0] * noise
    for i in range(n):
        gamma = min(churn / n, math.sqrt(2) - 1) if s_min <= t[i] <= s_max else 0.0
        t_hat = rounded(t[i] + gamma * t[i])
        eps = s_noise * randn(x)
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * eps
        d = slope(x_hat, t_hat)
        x = x_hat + (t[i + 1] - t_hat) * d
        if order == 2 and t[i + 1] != 0:
            x = x_hat + (t[i + 1] - t_hat) * (0.5 * d + 0.5 * slope(x, t[i + 1]))
    return x


def guided(
    net, log_ratio, noise: Tensor, t: list[float], randn, *, w1, w2, boosting=False, churn=0.0, low=0.0, high=math.inf
) -> Tensor:
    """Kim et al. 2022: Algorithm 2 with the score guided by grad log r where sigma is in [low, high], and EDM-G++'s
    boosting. `log_ratio(x, sigma[B])` -> [B]; its gradient by autograd.
    """
    n, batch = len(t) - 1, len(noise)
    columns = (-1, *[1] * (noise.dim() - 1))

    def guidance(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        state = x.clone().requires_grad_()
        value = log_ratio(state, sigma)
        (gradient,) = torch.autograd.grad(value.sum(), state)
        inside = (sigma >= low) & (sigma <= high)
        return torch.where(inside.view(columns), gradient, 0.0), torch.where(inside, value.detach(), math.inf)

    x = t[0] * noise
    last_ratio = torch.full((batch,), math.inf, dtype=noise.dtype)
    for i in range(n):
        churns = torch.full((batch,), churn, dtype=noise.dtype)
        if boosting and i % 5 == 0:
            churns[last_ratio < 0] = 4.0
        t_hat = t[i] * (1 + torch.clamp(churns / n, max=math.sqrt(2) - 1))
        x_hat = x + (t_hat**2 - t[i] ** 2).clamp(min=0).sqrt().view(columns) * randn(x)
        hat = t_hat.view(columns)
        d = (x_hat - net(x_hat, t_hat)) / hat
        if w1:
            g, last_ratio = guidance(x_hat, t_hat)
            w = torch.full((batch,), w1, dtype=noise.dtype)
            if boosting and i % 2 == 0:
                w[last_ratio < 0] *= 2
            d = d - w.view(columns) * hat * g
        x = x_hat + (t[i + 1] - hat) * d
        if i < n - 1:
            after = torch.full((batch,), t[i + 1], dtype=noise.dtype)
            d2 = (x - net(x, after)) / t[i + 1]
            if w2:
                d2 = d2 - w2 * t[i + 1] * guidance(x, after)[0]
            x = x_hat + (t[i + 1] - hat) * (0.5 * d + 0.5 * d2)
    return x


class Stream:
    """Normals like a state, always the same ones in the same order."""

    def __init__(self, seed: int = 3) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.drawn += 1
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


def images(batch: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def column(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """Of no particular data: nonlinear, and mixing the pixels."""
    v = 1 + column(sigma) ** 2
    return x / v + 0.3 * torch.tanh(x.roll(1, -1) + 0.5) * column(sigma) ** 2 / v


def logit(x: Tensor, sigma: Tensor) -> Tensor:
    x = x / column(1 + sigma**2).sqrt()
    return 4 * torch.sin(3 * x).mean((1, 2, 3)) + x[:, 0].square().mean((1, 2)) - 1
