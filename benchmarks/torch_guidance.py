"""Guided steps and trajectories as torch users write them, restated as well as we can, and networks to run them on.

The loops are Karras et al. 2022, Algorithm 2 without churn: as EDM's own code has it (a float64 state) with the
discriminator's gradient added to the slope (Kim et al. 2022), and as k-diffusion has it (the state in the model's
dtype, guidance added to what the model returns).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Network = Callable[[Tensor, Tensor], Tensor]


def noise_levels(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, eq. 5, and 0 at the end."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / (num_steps - 1) * (low - high)) ** rho for i in range(num_steps)] + [0.0]


def guidance(discriminator: Network, x: Tensor, sigma: Tensor) -> Tensor:
    """grad_x of the logit."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(discriminator(leaf, sigma).sum(), leaf)[0]


def edm_loop(net: Network, discriminator: Network | None, noise: Tensor, levels: list[float]) -> Tensor:
    """Heun on dx/dsigma = (x - D)/sigma - sigma grad log r."""

    def slope(x: Tensor, sigma: float) -> Tensor:
        rows = torch.full((len(x),), sigma, dtype=noise.dtype, device=x.device)
        state = x.to(noise.dtype)
        d = (x - net(state, rows).double()) / sigma
        if discriminator is None:
            return d
        return d - sigma * guidance(discriminator, state, rows).double()

    with torch.no_grad():
        x = noise.double() * levels[0]
        for sigma, following in pairwise(levels):
            d = slope(x, sigma)
            x_next = x + (following - sigma) * d
            if following > 0:
                x_next = x + (following - sigma) * (0.5 * d + 0.5 * slope(x_next, following))
            x = x_next
        return x


def k_diffusion_loop(net: Network, discriminator: Network | None, noise: Tensor, levels: list[float]) -> Tensor:
    """Heun on a guided denoiser, D + sigma^2 grad log r, in the noise's dtype."""

    def model(x: Tensor, rows: Tensor) -> Tensor:
        denoised = net(x, rows)
        if discriminator is None:
            return denoised
        return denoised + rows.square().reshape(-1, *[1] * (x.dim() - 1)) * guidance(discriminator, x, rows)

    with torch.no_grad():
        ones = noise.new_ones(len(noise))
        x = noise * levels[0]
        for sigma, following in pairwise(levels):
            d = (x - model(x, sigma * ones)) / sigma
            step = following - sigma
            if following == 0:
                x = x + d * step
            else:
                x_2 = x + d * step
                d_2 = (x_2 - model(x_2, following * ones)) / following
                x = x + (d + d_2) / 2 * step
        return x


def networks_alone(net: Network, discriminator: Network | None, noise: Tensor, levels: list[float]) -> Tensor:
    """Every call of the networks that the loops above make, forward and backward, and nothing else."""
    with torch.no_grad():
        out = noise
        for sigma in [levels[0], *(s for s in levels[1:-1] for _ in range(2))]:
            rows = torch.full((len(noise),), sigma, dtype=noise.dtype, device=noise.device)
            out = net(noise, rows)
            if discriminator is not None:
                guidance(discriminator, noise, rows)
        return out


class Denoiser(nn.Module):
    """EDM's preconditioning (Karras et al. 2022, table 1) around `body(x, embedding)`."""

    def __init__(self, body: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.body, self.sigma_data = body, sigma_data

    def forward(self, x: Tensor, sigma: Tensor, **extra: object) -> Tensor:
        total = (sigma.square() + self.sigma_data**2).sqrt()
        shape = (-1, *[1] * (x.dim() - 1))
        out = self.body(x / total.reshape(shape), sigma.log() / 4)
        skip = (self.sigma_data / total).square().reshape(shape)
        return skip * x + (sigma * self.sigma_data / total).reshape(shape) * out


class Block(nn.Module):
    """A residual block of two convolutions, shifted by the noise level."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.GroupNorm(8, channels_in), nn.GroupNorm(8, channels)
        self.conv, self.conv_2 = (nn.Conv2d(c, channels, 3, padding=1) for c in (channels_in, channels))
        self.level = nn.Linear(1, channels)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.conv(F.silu(self.norm(x))) + self.level(level[:, None])[:, :, None, None]
        return self.skip(x) + self.conv_2(F.silu(self.norm_2(h)))


class UNet(nn.Module):
    """A small U-Net: at each of `depth` resolutions a block on the way down and one on the way up, with a skip."""

    def __init__(self, image_channels: int = 3, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        widths = [width * 2**k for k in range(depth)]
        self.first, self.last = (
            nn.Conv2d(image_channels, width, 3, padding=1),
            nn.Conv2d(width, image_channels, 3, padding=1),
        )
        self.down = nn.ModuleList(Block(a, b) for a, b in zip([width, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(Block(2 * a, b) for a, b in zip(widths, [width, *widths[:-1]], strict=True))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        x, skips = self.first(x), []
        for k, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if k else x, level)
            skips.append(x)
        for k in reversed(range(len(self.up))):
            x = self.up[k](torch.cat([x, skips[k]], 1), level)
            x = F.interpolate(x, scale_factor=2.0) if k else x
        return self.last(x)


class Convolutions(nn.Module):
    """As much arithmetic as a U-Net of that many channels does, without its meaning."""

    def __init__(self, image_channels: int = 3, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        channels = [image_channels, *[width] * layers, image_channels]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.layers[-1](x)


class Discriminator(nn.Module):
    """Logits of images at a noise level: strided convolutions, then their mean."""

    def __init__(self, image_channels: int = 3, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        widths = [image_channels, *(width * 2**k for k in range(layers))]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
        self.last = nn.Linear(widths[-1] + 1, 1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        x = x / (1 + sigma.square()).sqrt().reshape(-1, 1, 1, 1)
        for layer in self.layers:
            x = F.silu(layer(x))
        return self.last(torch.cat([x.mean((2, 3)), sigma.log()[:, None] / 4], 1))[:, 0]


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sigma: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return torch.zeros_like(sigma)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return ctx.saved_tensors[0], None, None


class Free:
    """Networks that cost nothing: what they return lies ready. What is left of a trajectory is its arithmetic."""

    def __init__(self, noise: Tensor) -> None:
        self.denoised, self.gradient = 0.1 * noise, 0.01 * noise

    def net(self, x: Tensor, sigma: Tensor, **extra: object) -> Tensor:
        return self.denoised

    def discriminator(self, x: Tensor, sigma: Tensor) -> Tensor:
        return _Slope.apply(x, sigma, self.gradient)
