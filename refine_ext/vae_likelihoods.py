"""What a decoder's output says of a sample: Bernoulli, Gaussian and discretised logistic pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from .arguments import positive, whole
from .samples import rows_text

Output = tuple[Tensor, ...]  # of a decoder, as one tensor [..., D] for each parameter of a pixel's law

_LOG_2PI = math.log(2 * math.pi)
_OFF_GRID = 0.1  # of a level's distance to the next: float16 of k / 255 is 0.06 off
_LEVEL_ELEMENTS = 1 << 22  # of levels x pixels at once


class Likelihood(Protocol):
    """log p(x|z) of independent pixels, from a decoder's output for z."""

    name: str
    parameters: tuple[str, ...]  # of a pixel; a decoder may return the first alone

    def complete(self, output: Output) -> Output:
        """The output with the parameters that the decoder left out."""
        ...

    def check(self, function: str, argument: str, x: Tensor) -> None:
        """Raise where samples ``[n, ...]`` cannot come from this law."""
        ...

    def log_prob(self, output: Output, x: Tensor) -> Tensor:
        """log p(x|z) in nats, summed over the last dimension of output and x, which broadcast."""
        ...

    def divergence(self, output: Output, other: Output) -> Tensor:
        """KL(p(.|z) || p'(.|z)) in nats, summed over the last dimension; float64."""
        ...


LikelihoodName = Literal["bernoulli", "gaussian", "discretized_logistic"]


@dataclass(frozen=True)
class BernoulliLikelihood:
    """``log p(x|z) = sum_k x_k log s(l_k) + (1 - x_k) log s(-l_k)``, s the sigmoid, l the decoder's logits.

    x in [0, 1]. Where it is neither 0 nor 1 this is the usual cross-entropy, and no log-probability.

    >>> float(BernoulliLikelihood().log_prob((torch.zeros(2),), torch.ones(2)).exp())
    0.25
    """

    name: str = field(default="bernoulli", init=False)
    parameters: tuple[str, ...] = field(default=("logits",), init=False)

    def complete(self, output: Output) -> Output:
        return output

    def check(self, function: str, argument: str, x: Tensor) -> None:
        _check_range(function, argument, x, 0.0, 1.0, "a Bernoulli likelihood")

    def log_prob(self, output: Output, x: Tensor) -> Tensor:
        (logits,) = output
        logits, x = torch.broadcast_tensors(logits, x)
        return -binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)

    def divergence(self, output: Output, other: Output) -> Tensor:
        # In float64: of nearly equal decoders the terms cancel to their second order.
        a, b = output[0].double(), other[0].double()
        p = a.sigmoid()
        return (p * (logsigmoid(a) - logsigmoid(b)) + (1 - p) * (logsigmoid(-a) - logsigmoid(-b))).sum(-1)


@dataclass(frozen=True)
class GaussianLikelihood:
    """``log p(x|z) = sum_k log N(x_k; mean_k, scale_k^2)`` of a decoder's mean, or (mean, log_scale).

    Args:
        scale: s > 0 in the units of x where the decoder returns the mean alone.

    >>> law = GaussianLikelihood(scale=2.0)
    >>> round(float(law.log_prob(law.complete((torch.zeros(1),)), torch.ones(1))), 4)
    -1.7371
    """

    scale: float = 1.0
    name: str = field(default="gaussian", init=False)
    parameters: tuple[str, ...] = field(default=("mean", "log_scale"), init=False)

    def __post_init__(self) -> None:
        positive("GaussianLikelihood", "scale", self.scale)

    def complete(self, output: Output) -> Output:
        return _with_scale(output, self.scale)

    def check(self, function: str, argument: str, x: Tensor) -> None:
        """Any finite values will do."""

    def log_prob(self, output: Output, x: Tensor) -> Tensor:
        mean, log_scale = output
        return (-0.5 * ((x - mean) * (-log_scale).exp()).square() - log_scale - 0.5 * _LOG_2PI).sum(-1)

    def divergence(self, output: Output, other: Output) -> Tensor:
        (mean, log_scale), (other_mean, other_log_scale) = ([p.double() for p in each] for each in (output, other))
        ratio = 2 * (log_scale - other_log_scale)
        distance = ((mean - other_mean) * (-other_log_scale).exp()).square()
        return 0.5 * (ratio.expm1() - ratio + distance).sum(-1)


@dataclass(frozen=True)
class DiscretizedLogisticLikelihood:
    """``log p(x|z) = sum_k log [F((x_k + w/2 - mean_k) / scale_k) - F((x_k - w/2 - mean_k) / scale_k)]``.

    F is the sigmoid, x one of `levels` equidistant values from `low` to `high`, w apart; the first takes all that is
    below it and the last all that is above, so that the probabilities add up to 1.

    Args:
        levels, low, high: the values of a pixel; by default those of 8-bit images divided by 255.
        scale: s > 0 in the units of x where the decoder returns the mean alone.

    Source: Kingma et al. 2016, "Improved variational inference with inverse autoregressive flow"; Salimans et al. 2017.

    >>> x, law = torch.linspace(0, 1, 256)[:, None], DiscretizedLogisticLikelihood()
    >>> round(float(law.log_prob((torch.tensor([0.3]), torch.tensor([-2.0])), x).exp().sum()), 5)
    1.0
    """

    scale: float = 0.1
    levels: int = 256
    low: float = 0.0
    high: float = 1.0
    name: str = field(default="discretized_logistic", init=False)
    parameters: tuple[str, ...] = field(default=("mean", "log_scale"), init=False)

    def __post_init__(self) -> None:
        positive("DiscretizedLogisticLikelihood", "scale", self.scale)
        whole("DiscretizedLogisticLikelihood", "levels", self.levels, 2)
        if not self.low < self.high:
            raise ValueError(
                f"DiscretizedLogisticLikelihood: low must be below high, got {self.low:g} and {self.high:g}"
            )

    @property
    def width(self) -> float:
        """w, how far levels are apart."""
        return (self.high - self.low) / (self.levels - 1)

    def complete(self, output: Output) -> Output:
        return _with_scale(output, self.scale)

    def check(self, function: str, argument: str, x: Tensor) -> None:
        law = f"a discretised logistic likelihood of {self.levels} levels"
        _check_range(function, argument, x, self.low, self.high, law)
        for start, rows in zip(range(0, len(x), 1024), x.split(1024), strict=True):
            place = (rows.double() - self.low) / self.width
            off = ((place - place.round()).abs() > _OFF_GRID).flatten(1).any(1)
            if bool(off.any()):
                raise ValueError(
                    f"{function}: {argument} must be among {self.levels} equidistant values from {self.low:g} to "
                    f"{self.high:g} for {law}, got others in {rows_text(off, start)}"
                )

    def log_prob(self, output: Output, x: Tensor) -> Tensor:
        return self._log_mass(output, ((x - self.low) / self.width).round()).sum(-1)

    def _log_mass(self, output: Output, level: Tensor) -> Tensor:
        """log F(a) - F(b) = log F(a) + log F(-b) + log(1 - e^(b - a)), which keeps its digits far out in the tails."""
        mean, log_scale = output
        inverse = (-log_scale).exp()
        above = self.low + (level + 0.5) * self.width - mean
        upper, lower = above * inverse, (above - self.width) * inverse
        inner = logsigmoid(upper) + logsigmoid(-lower) + torch.log(-torch.expm1(-self.width * inverse))
        edge = torch.where(level <= 0, logsigmoid(upper), logsigmoid(-lower))
        return torch.where((level <= 0) | (level >= self.levels - 1), edge, inner)

    def divergence(self, output: Output, other: Output) -> Tensor:
        """The sum over all levels, a block of them at a time."""
        ours, theirs = ([p.double().unsqueeze(0) for p in each] for each in (output, other))
        pixels = max(1, max(p.numel() for p in ours))
        total = torch.zeros(torch.broadcast_shapes(*(p.shape for p in output)), dtype=torch.float64)
        total = total.to(ours[0].device)
        levels = torch.arange(self.levels, dtype=torch.float64, device=total.device)
        for block in levels.split(max(1, _LEVEL_ELEMENTS // pixels)):
            level = block.reshape(-1, *[1] * total.dim())
            log_mass = self._log_mass(tuple(ours), level)
            total = total + (log_mass.exp() * (log_mass - self._log_mass(tuple(theirs), level))).sum(0)
        return total.sum(-1)


_NAMED: dict[str, type] = {
    "bernoulli": BernoulliLikelihood,
    "gaussian": GaussianLikelihood,
    "discretized_logistic": DiscretizedLogisticLikelihood,
}


def likelihood_of(function: str, likelihood: Any) -> Likelihood:
    """A name, or an object with log_prob and the like."""
    if isinstance(likelihood, str):
        if likelihood not in _NAMED:
            raise ValueError(f"{function}: likelihood must be one of {', '.join(_NAMED)}, got {likelihood!r}")
        named: Likelihood = _NAMED[likelihood]()
        return named
    if isinstance(likelihood, type) or not all(hasattr(likelihood, a) for a in ("log_prob", "divergence", "complete")):
        raise TypeError(
            f"{function}: likelihood must be one of {', '.join(_NAMED)}, or an object such as "
            f"GaussianLikelihood(scale=0.1), got {likelihood!r}"
        )
    return likelihood  # type: ignore[no-any-return]


def _with_scale(output: Output, scale: float) -> Output:
    return output if len(output) == 2 else (output[0], output[0].new_tensor(math.log(scale)))


def _check_range(function: str, argument: str, x: Tensor, low: float, high: float, law: str) -> None:
    for start, rows in zip(range(0, len(x), 1024), x.split(1024), strict=True):
        outside = ((rows < low) | (rows > high)).flatten(1).any(1)
        if bool(outside.any()):
            raise ValueError(
                f"{function}: {argument} must be between {low:g} and {high:g} for {law}, got values from "
                f"{float(rows.min()):g} to {float(rows.max()):g} in {rows_text(outside, start)}"
            )
