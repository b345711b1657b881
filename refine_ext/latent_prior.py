"""The laws that latents are drawn from, as a part of a step and of an energy; the Metropolis ratio of both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .latent_ratio import Evaluation

Prior = str | Callable[[Tensor], Tensor]


class NoPrior:
    """What a prior adds to a step and to an energy: here nothing."""

    def drift(self, z: Tensor, rate: float) -> tuple[float, list[Tensor], list[float]]:
        """``z + rate grad log p`` as the step takes it: a coefficient of z, terms, and their coefficients."""
        return 1.0, [], []

    def density(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log p [B] and its gradient, float64."""
        wide = z.double()
        return wide.new_zeros(len(z)), torch.zeros_like(wide)


class _NormalPrior(NoPrior):
    def drift(self, z: Tensor, rate: float) -> tuple[float, list[Tensor], list[float]]:
        return 1.0 - rate, [], []

    def density(self, z: Tensor) -> tuple[Tensor, Tensor]:
        wide = z.double()
        return -0.5 * wide.square().flatten(1).sum(1), -wide


class _DensityPrior(NoPrior):
    def __init__(self, function: str, log_density: Callable[[Tensor], Tensor]) -> None:
        self.function, self.log_density = function, log_density

    def drift(self, z: Tensor, rate: float) -> tuple[float, list[Tensor], list[float]]:
        return 1.0, [self._evaluate(z)[1]], [rate]

    def density(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_p, score = self._evaluate(z)
        return log_p.double(), score.double()

    def _evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            state = z.detach().requires_grad_()
            log_p = self.log_density(state)
            if not isinstance(log_p, Tensor) or log_p.shape != (z.shape[0],):
                got = list(log_p.shape) if isinstance(log_p, Tensor) else type(log_p).__name__
                raise ValueError(f"{self.function}: prior must return log densities [{z.shape[0]}], got {got}")
            score = None
            if log_p.requires_grad:
                (score,) = torch.autograd.grad(log_p.sum(), state, allow_unused=True)
        return log_p.detach(), torch.zeros_like(z) if score is None else score


def prior_of(function: str, prior: Prior | None) -> NoPrior:
    if prior is None:
        return NoPrior()
    if isinstance(prior, str):
        if prior != "normal":
            raise ValueError(f"{function}: prior must be 'normal' or a log density z -> [B], got {prior!r}")
        return _NormalPrior()
    if not callable(prior):
        raise TypeError(f"{function}: prior must be 'normal' or a log density z -> [B], got {type(prior).__name__}")
    return _DensityPrior(function, prior)


def log_acceptance(
    law: NoPrior, z: Tensor, at: Evaluation, new_z: Tensor, new_at: Evaluation, eta: float, temperature: float
) -> Tensor:
    """log of the Metropolis ratio, float64 [B]: the energies' difference, and the proposal's asymmetry.

    With drifts d = eta/2 grad(-E) at z and d' at z', and D = z' - z, log q(z|z') - log q(z'|z) is
    (|D - d|^2 - |D + d'|^2) / (2 eta T) = -(d + d')(2 D + d' - d) / (2 eta T): the squares' difference would cancel.
    """
    densities, drifts = [], []
    for state, known in ((z, at), (new_z, new_at)):
        density, score = law.density(state)
        densities.append(density + known.log_ratio.double())
        drifts.append(0.5 * eta * (score + known.gradient.double()))
    difference = new_z.double() - z.double()
    products = (drifts[0] + drifts[1]) * (2.0 * difference + drifts[1] - drifts[0])
    return (densities[1] - densities[0]) / temperature - products.flatten(1).sum(1) / (2.0 * eta * temperature)
