"""Three small generators for the demonstration, trained here in seconds: a GAN, a VAE and a normalizing flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .training import isolated_rng

_BATCH = 64


class Generator(nn.Module):
    """Standard normal latents ``[B, latents]`` to flattened images ``[B, pixels]`` in [0, 1]."""

    def __init__(self, latents: int, network: nn.Module) -> None:
        super().__init__()
        self.latents = latents
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        x: Tensor = self.network(z)
        return x

    @torch.no_grad()
    def draw(self, number: int, seed: int) -> tuple[Tensor, Tensor]:
        """Latents and their images."""
        z = torch.randn(number, self.latents, generator=torch.Generator().manual_seed(seed))
        return z, self(z)


def _layers(width: int, hidden: tuple[int, ...], out: int, *, normalised: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), *([nn.BatchNorm1d(size)] if normalised else []), nn.SiLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, out))


def _batches(images: Tensor, iterations: int) -> Iterator[Tensor]:
    for _ in range(iterations):
        yield images[torch.randint(len(images), (_BATCH,))]


def train_gan(images: Tensor, iterations: int, latents: int = 16) -> Generator:
    """Goodfellow et al. 2014, the non-saturating loss, on images with noise of 0.1; the generator's weights averaged.

    Without the average (Yazıcı et al. 2019), which costs nothing, the last weights are twice as far from the digits.
    """
    width = images.shape[1]
    network = nn.Sequential(_layers(latents, (128, 128), width, normalised=True), nn.Sigmoid())
    critic = nn.Sequential(
        *(nn.Linear(width, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3)),
        *(nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 1)),
    )
    makes, judges = (torch.optim.Adam(m.parameters(), 1e-3, betas=(0.5, 0.99)) for m in (network, critic))
    # the batch norms' statistics too
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)

    def output(x: Tensor) -> Tensor:
        h: Tensor = critic(x + 0.1 * torch.randn_like(x))
        return h

    for real in _batches(images, iterations):
        fake = network(torch.randn(len(real), latents))
        _descend(judges, softplus(-output(real)).mean() + softplus(output(fake.detach())).mean())
        _descend(makes, softplus(-output(fake)).mean())
        average.update_parameters(network)
    return Generator(latents, average.module)


def train_vae(images: Tensor, iterations: int, latents: int = 8) -> Generator:
    """Kingma and Welling 2014, with Gaussian pixels of deviation 0.15; its samples are the decoder's means."""
    width = images.shape[1]
    encoder = _layers(width, (128,), 2 * latents)
    decoder = nn.Sequential(_layers(latents, (128,), width), nn.Sigmoid())
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-3)
    for real in _batches(images, iterations):
        mean, log_variance = encoder(real).chunk(2, 1)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        error = (decoder(z) - real).square().sum(1) / (2 * 0.15**2)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        _descend(optimizer, (error + divergence).mean())
    return Generator(latents, decoder)


class _Coupling(nn.Module):
    """One half of the pixels scales and shifts the other; z of x, and x of z with the inverse."""

    mask: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        mask = torch.zeros(width)
        mask[torch.randperm(width)[: width // 2]] = 1.0
        self.register_buffer("mask", mask)
        self.network = _layers(width, (128,), 2 * width)
        nn.init.zeros_(self.network[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.network[-1].bias)  # type: ignore[arg-type]

    def _scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.network(kept * self.mask).chunk(2, 1)
        return 2.0 * torch.tanh(0.5 * log_scale) * (1.0 - self.mask), shift * (1.0 - self.mask)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._scale_and_shift(x)
        return x * log_scale.exp() + shift, log_scale.sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        log_scale, shift = self._scale_and_shift(z)
        return (z - shift) * torch.exp(-log_scale)


class _Flow(nn.Module):
    """Couplings on standardised pixels; called on latents it gives images, clipped to [0, 1]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, images: Tensor, layers: int, noise: float) -> None:
        super().__init__()
        self.register_buffer("mean", images.mean(0))
        self.register_buffer("deviation", images.std(0) + noise)
        self.layers = nn.ModuleList([_Coupling(images.shape[1]) for _ in range(layers)])

    def negative_log_likelihood(self, x: Tensor) -> Tensor:
        """Per image, up to a constant."""
        z, volume = (x - self.mean) / self.deviation, torch.zeros(len(x))
        for layer in self.layers:
            z, log_scale = layer(z)
            volume = volume + log_scale
        return 0.5 * z.square().sum(1) - volume

    def forward(self, z: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            z = layer.inverse(z)  # type: ignore[operator]
        return (z * self.deviation + self.mean).clamp(0.0, 1.0)


def train_flow(images: Tensor, iterations: int, layers: int = 6, noise: float = 0.03) -> Generator:
    """Dinh et al. 2017 (RealNVP), on images with noise of half a grey level: without it a density does not exist."""
    network = _Flow(images, layers, noise)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for real in _batches(images, iterations):
        _descend(optimizer, network.negative_log_likelihood(real + noise * torch.randn_like(real)).mean())
    return Generator(images.shape[1], network)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# name -> (how it is trained, for how many iterations)
TRAINING: dict[str, tuple[Callable[[Tensor, int], Generator], int]] = {
    "GAN": (train_gan, 2000),
    "VAE": (train_vae, 2000),
    "normalizing flow": (train_flow, 1200),
}


def train_generator(name: str, images: Tensor, *, seed: int, effort: float = 1.0) -> Generator:
    """One of TRAINING, by flattened images ``[n, pixels]`` in [0, 1], reproducible from the seed.

    Args:
        effort: scales the number of iterations.
    """
    train, iterations = TRAINING[name]
    with isolated_rng(seed, images.device):
        return train(images, max(1, round(effort * iterations))).eval().requires_grad_(False)
