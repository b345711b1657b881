"""The default discriminators: a regularised MLP, and a linear function of features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .network_checks import one_output_each

Features = Callable[[Tensor], Tensor]

# Pairs used by the median heuristic: its error is far below what a bandwidth matters.
_MEDIAN_PAIRS = 4096


# Standard deviations at which standardised features saturate. Without it, generated samples far
# outside the training data get extrapolated outputs that spoil every average of exp(h).
_SATURATION = 6.0


class Standardise(nn.Module):
    """``s tanh(z / s)``, ``z = (x - mean) / std`` per feature of the flattened sample, s = 6.

    Constant features become 0. The statistics are float64 buffers and the subtraction is done in
    float64, so that data with a large offset keep their digits; the result is float32.
    """

    mean: Tensor
    inverse_scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("inverse_scale", torch.ones(width, dtype=torch.float64))

    def fit(self, samples: Sequence[Tensor]) -> None:
        """Set the statistics from several sets, each with the same total weight."""
        sets = [x.flatten(1) for x in samples]
        means = [x.mean(0, dtype=torch.float64) for x in sets]
        mean = torch.stack(means).mean(0)
        squares = []
        for x in sets:
            total = torch.zeros_like(mean)
            for rows in x.split(8192):
                total += (rows.double() - mean).square().sum(0)
            squares.append(total / len(x))
        deviation = torch.stack(squares).mean(0).sqrt()
        # A spread at the rounding of the mean is no spread.
        varies = deviation > 1e-12 * mean.abs()
        self.mean.copy_(mean)
        self.inverse_scale.copy_(torch.where(varies, 1.0 / deviation, torch.zeros_like(deviation)))

    def forward(self, x: Tensor) -> Tensor:
        z = ((x.flatten(1) - self.mean) * self.inverse_scale).float()
        return _SATURATION * torch.tanh(z / _SATURATION)


class MLP(nn.Module):
    """Standardised input, hidden layers of SiLU and dropout, one output per sample."""

    def __init__(self, width: int, hidden: Sequence[int] = (256, 256), dropout: float = 0.5):
        super().__init__()
        self.standardise = Standardise(width)
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.SiLU(), nn.Dropout(dropout)]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def features(self, x: Tensor) -> Tensor:
        """``[n, d]`` the last hidden layer of a batch, which the output is linear in."""
        hidden: Tensor = self.layers[:-1](self.standardise(x))
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(self.standardise(x)).squeeze(1)
        return output


class RandomFourierFeatures(nn.Module):
    """``phi(x) = sqrt(2/D) [cos(W z), sin(W z)]``, z the standardised x, of norm exactly 1.

    ``<phi(x), phi(y)>`` approximates ``exp(-||z_x - z_y||^2 / (2 s^2))`` for rows of W drawn from
    N(0, I/s^2), with s the median distance between pairs of samples.

    Source: Rahimi and Recht 2007; paired form, Sutherland and Schneider 2015.
    """

    frequencies: Tensor

    def __init__(self, width: int, features: int = 512) -> None:
        super().__init__()
        self.standardise = Standardise(width)
        self.register_buffer("frequencies", torch.zeros(features // 2, width, dtype=torch.float64))

    def fit(self, samples: Sequence[Tensor], generator: torch.Generator) -> None:
        """Standardise on the samples and draw the frequencies."""
        self.standardise.fit(samples)
        pool = [self._standardised(x, generator) for x in samples]
        z = torch.cat(pool)
        left, right = torch.randint(len(z), (2, _MEDIAN_PAIRS), generator=generator).to(z.device)
        distances = (z[left] - z[right]).norm(dim=1)
        bandwidth = float(distances[left != right].median())
        if bandwidth == 0.0:
            # More than half of the pairs coincide: the mean still sees the others.
            bandwidth = float(distances.mean())
        noise = torch.randn(self.frequencies.shape, generator=generator, dtype=torch.float64)
        self.frequencies.copy_(noise.to(z) / bandwidth)

    def _standardised(self, x: Tensor, generator: torch.Generator) -> Tensor:
        rows = torch.randperm(len(x), generator=generator)[:_MEDIAN_PAIRS].to(x.device)
        standardised: Tensor = self.standardise(x[rows])
        return standardised.double()

    def forward(self, x: Tensor) -> Tensor:
        phase = self.standardise(x).double() @ self.frequencies.T
        return torch.cat([phase.cos(), phase.sin()], 1) / math.sqrt(len(self.frequencies))


class LinearOnFeatures(nn.Module):
    """``<weight, phi(x)> + intercept`` in float64, phi a module or a plain function."""

    weight: Tensor
    intercept: Tensor

    def __init__(self, features: Features, width: int) -> None:
        super().__init__()
        if isinstance(features, RandomFourierFeatures):
            self.random_features: nn.Module | None = features
        else:
            self.random_features = None
            # Hidden from nn.Module's registration: the caller's features are not ours to save.
            self.__dict__["given_features"] = features
        self.register_buffer("weight", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("intercept", torch.zeros((), dtype=torch.float64))

    def features(self, x: Tensor) -> Tensor:
        """``[n, d]`` float64 features of a batch."""
        if self.random_features is not None:
            phi: Tensor = self.random_features(x)
            return phi
        return evaluate_features(self.__dict__["given_features"], x)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) @ self.weight + self.intercept


def evaluate_features(features: Features, x: Tensor) -> Tensor:
    """``[n, d]`` float64 result of a caller's function, which may return a NumPy array.

    Raises:
        ValueError: the result is not ``[n, d]``.
    """
    phi = torch.as_tensor(features(x)).to(device=x.device, dtype=torch.float64)
    if phi.ndim != 2 or len(phi) != len(x):
        raise ValueError(
            f"fit_discriminator: features must map a batch of {len(x)} samples to [{len(x)}, d], got {list(phi.shape)}"
        )
    return phi


def batch_output(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The network's ``[n]`` outputs for a batch; ``[n, 1]`` is squeezed.

    Raises:
        TypeError: no tensor; ValueError: any other shape.
    """
    return one_output_each("Discriminator", "model", network(x), x.shape[0])
