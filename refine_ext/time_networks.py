"""The default discriminators of noisy samples: an MLP for vectors, a convolutional network for images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .samples import as_column

# Wavelengths from 1.5 to 25 in log sigma: what tells two levels apart by a factor, not by a percent.
_FREQUENCIES = 8
_LOWEST, _HIGHEST = 0.25, 4.0
# Downsampling ends at this side; what is left is flattened, so that places can still be told apart.
_SMALLEST_SIDE = 4


class NoisyStandardise(nn.Module):
    """``(x - mean) / sqrt(variance + sigma^2)``: unit variance at every noise level (c_in of Karras et al. 2022).

    Statistics are per feature of a vector, per channel of an image. ``gain`` is ``1 / sqrt(1 + sigma^2 / variance)``
    of the mean variance: where the noise drowns the data, a log-ratio falls off like it.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        kept = [shape[0]] + [1] * (len(shape) - 1)
        self.register_buffer("mean", torch.zeros(kept, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(kept, dtype=torch.float64))

    def fit(self, samples: Sequence[Tensor]) -> None:
        """Set the statistics from several sets, each with the same total weight."""
        dims = [0, *range(2, samples[0].dim())]
        means = torch.stack([x.double().mean(dims) for x in samples])
        mean = means.mean(0)
        spread = torch.stack([x.double().var(dims, correction=0) for x in samples])
        variance = (spread + (means - mean).square()).mean(0)
        # A constant feature has no scale of its own; a small one of the others' keeps the smallest levels finite.
        variance = variance.clamp_min(1e-4 * float(variance.mean()))
        self.mean.copy_(mean.reshape(self.mean.shape))
        self.variance.copy_(variance.reshape(self.variance.shape))

    def forward(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        level = as_column(sigma, x).to(x.dtype)
        mean, variance = self.mean.to(x.dtype), self.variance.to(x.dtype)
        scaled = (x - mean) * torch.rsqrt(variance + level.square())
        gain = torch.rsqrt(1.0 + sigma.to(x.dtype).square() / variance.mean())
        return scaled, gain


class Condition(nn.Module):
    """Features ``[B, width]`` of the noise level, sines and cosines of log sigma, and of a class if there are any."""

    frequencies: Tensor

    def __init__(self, width: int, classes: int = 0) -> None:
        super().__init__()
        ladder = torch.logspace(math.log2(_LOWEST), math.log2(_HIGHEST), _FREQUENCIES, base=2.0)
        self.register_buffer("frequencies", ladder, persistent=False)
        self.level = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Linear(classes, width, bias=False) if classes else None

    def forward(self, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        phase = sigma.log().to(self.frequencies.dtype)[:, None] * self.frequencies
        features: Tensor = self.level(torch.cat([phase.cos(), phase.sin()], 1))
        if (class_labels is None) != (self.classes is None):
            trained = "without" if self.classes is None else "with"
            raise ValueError(f"DiffusionDiscriminator: class_labels must be as trained, {trained} them")
        if self.classes is not None and class_labels is not None:
            features = features + self.classes(one_hot(class_labels, self.classes.in_features).to(features.dtype))
        return nn.functional.silu(features)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """``[B, classes]`` of class numbers ``[B]``; one-hot rows are passed through."""
    if labels.dim() == 2:
        return labels
    return (labels[:, None] == torch.arange(classes, device=labels.device)).to(torch.float32)


class TimeMLP(nn.Module):
    """Hidden layers of SiLU and dropout on the scaled sample, the noise level added in each."""

    def __init__(self, width: int, hidden: Sequence[int] = (256, 256), dropout: float = 0.1, classes: int = 0):
        super().__init__()
        self.scale = NoisyStandardise((width,))
        self.condition = Condition(64, classes)
        widths = [width, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.shifts = nn.ModuleList(nn.Linear(64, b, bias=False) for b in hidden)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        state, gain = self.scale(x.flatten(1), sigma)
        condition = self.condition(sigma, class_labels)
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            state = self.dropout(nn.functional.silu(layer(state) + shift(condition)))
        output: Tensor = self.last(state).squeeze(1) * gain
        return output


class _Block(nn.Module):
    """A residual pair of 3 x 3 convolutions with the noise level between them."""

    def __init__(self, channels: int, out: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, channels), nn.GroupNorm(8, out)])
        self.shift = nn.Linear(64, out)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        state = self.first(nn.functional.silu(self.norms[0](x))) + self.shift(condition)[:, :, None, None]
        state = self.second(self.dropout(nn.functional.silu(self.norms[1](state))))
        result: Tensor = self.skip(x) + state
        return result


class TimeConvNet(nn.Module):
    """Residual blocks at halving resolutions, 8 x 8 to 64 x 64, then one linear layer of what is left."""

    def __init__(self, shape: Sequence[int], channels: int = 32, dropout: float = 0.1, classes: int = 0) -> None:
        super().__init__()
        colours, height, width = shape
        self.scale = NoisyStandardise(shape)
        self.condition = Condition(64, classes)
        self.stem = nn.Conv2d(colours, channels, 3, padding=1)
        blocks, out = [_Block(channels, channels, dropout)], channels
        while max(height, width) > _SMALLEST_SIDE:
            blocks.append(_Block(out, min(2 * out, 4 * channels), dropout))
            out = min(2 * out, 4 * channels)
            height, width = -(-height // 2), -(-width // 2)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.GroupNorm(8, out)
        self.last = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(out * height * width, 1))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        state, gain = self.scale(x, sigma)
        condition = self.condition(sigma, class_labels)
        state = self.stem(state)
        for index, block in enumerate(self.blocks):
            if index:
                state = nn.functional.avg_pool2d(state, 2, ceil_mode=True)
            state = block(state, condition)
        output: Tensor = self.last(nn.functional.silu(self.norm(state))).squeeze(1) * gain
        return output
