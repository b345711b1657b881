"""log p(x) of a VAE by importance sampling from its encoder, in bounded memory whatever the number of draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arguments import positive
from .gaussian_kl import importance_log_weights
from .results import JSONResult, SampleValues
from .vae_likelihoods import Likelihood, LikelihoodName
from .vae_model import Decoder, Encoder, evaluation, prepare

_FUNCTION = "importance_weighted_log_likelihood"


@dataclass(eq=False, repr=False)
class LogLikelihood(SampleValues, JSONResult):
    """log p(x) of each sample, in nats. Made by :func:`importance_weighted_log_likelihood`.

    Attributes:
        values: `[n]` float64, log (1/K) sum_k w_k; in expectation not above log p(x).
        monte_carlo_stderr: `[n]` float64, its standard error over the draws, sqrt((1/ESS - 1/K) K / (K - 1)); half its
            square is about how far `values` is below log p(x) on average. NaN of a single draw.
        effective_draws: `[n]` float64, ESS = (sum w)^2 / sum w^2, from 1 to K.
        elbo: `[n]` float64, the average of log w_k: the evidence lower bound of what the draws are from.
        mean, stderr: of `values`; the error holds that of the draws.
        draws, seed: K, and whose draws they are.
    """

    values: Tensor
    monte_carlo_stderr: Tensor
    effective_draws: Tensor
    elbo: Tensor
    draws: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Averages as plain numbers, for JSON."""
        n = len(self.values)
        return {
            "mean": self.mean,
            "stderr": self.stderr,
            "monte_carlo_stderr": float(self.monte_carlo_stderr.square().sum().sqrt()) / n,
            "elbo": float(self.elbo.mean()),
            "effective_draws": float(self.effective_draws.mean()),
            "smallest_effective_draws": float(self.effective_draws.min()),
            "n": n,
            "draws": self.draws,
            "seed": self.seed,
        }

    def __str__(self) -> str:
        facts = self.to_dict()
        return (
            f"log p(x) {facts['mean']:.6g} ± {facts['stderr']:.2g} nats a sample (elbo {facts['elbo']:.6g}), "
            f"{facts['n']} samples, {self.draws} draws, {facts['effective_draws']:.3g} of them effective "
            f"(at least {facts['smallest_effective_draws']:.3g})"
        )

    def __repr__(self) -> str:
        return f"LogLikelihood(mean={self.mean:.6g}, n={len(self.values)}, draws={self.draws})"


def importance_weighted_log_likelihood(
    encoder: Encoder,
    decoder: Decoder,
    data: Tensor | np.ndarray,
    *,
    likelihood: LikelihoodName | Likelihood = "bernoulli",
    draws: int = 1000,
    widen: float = 1.0,
    seed: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> LogLikelihood:
    """``log p(x) >= E log (1/K) sum_k w_k``, ``w_k = p(x|z_k) N(z_k; 0, I) / q(z_k|x)``, z_k ~ q(z|x).

    Rises with K to log p(x) (one draw: the ELBO). Draws are summed as they come, in float64: memory is that of a few
    draws of a batch. Few effective draws say that K is too small, or the encoder's posterior too narrow: the value is
    then below log p(x) by more than its standard error tells. `widen` draws from N(mean, widen^2 e^log_variance)
    instead of q, a lower bound as well; where it comes out higher it is nearer.

    Args:
        encoder, decoder, data, likelihood: as in :func:`vae_bound`.
        draws: K.
        widen: factor of the posterior's deviations in the draws, positive.
        seed: of the draws; a sample's do not depend on the batch, and more draws begin with fewer. None: drawn from
            torch's default generator.
        batch_size: samples at once. None: by memory.
        progress: a bar where it takes over a second. None: on a terminal.

    Returns:
        :class:`LogLikelihood`, of every sample.

    Raises:
        TypeError, ValueError: as :func:`vae_bound`.

    Source: Burda, Grosse and Salakhutdinov 2016, equation 8.

    >>> model = torch.nn.Linear(4, 4), torch.nn.Linear(2, 4)
    >>> importance_weighted_log_likelihood(*model, torch.eye(4), draws=8, seed=0).values.shape
    torch.Size([4])
    """
    widen = positive(_FUNCTION, "widen", widen)
    work = prepare(_FUNCTION, encoder, decoder, data, likelihood, draws=draws, seed=seed, batch_size=batch_size)
    found: list[list[Tensor]] = [[], [], [], []]
    with evaluation(encoder, decoder):
        for first, x in work.batches(progress):
            posterior = work.vae.check_posterior(work.vae.posterior(x), first)
            posterior = posterior._replace(log_variance=posterior.log_variance + 2 * math.log(widen))
            mean, log_variance = posterior.flat()
            sums = _Weights(len(x), x.device)
            for block in work.blocks_of_draws():
                noise = work.noise(block, first, posterior.mean)
                z = posterior.latent(noise)
                log_p = work.vae.log_prob(work.vae.output(z.flatten(0, 1), x[0].numel()), x)
                ratio = importance_log_weights(z.flatten(2), mean, log_variance)
                sums.add(work.vae.check_log_prob(log_p, first).double() + ratio.double())
            for part, value in zip(found, sums.result(work.draws), strict=True):
                part.append(value.cpu())
    values, errors, effective, elbo = (torch.cat(part) for part in found)
    return LogLikelihood(values, errors, effective, elbo, work.draws, work.seed)


class _Weights:
    """Sums of w, w^2 and log w over draws, by the largest log w so far."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.largest = torch.full((rows,), -math.inf, dtype=torch.float64, device=device)
        self.sum = torch.zeros(rows, dtype=torch.float64, device=device)
        self.squares, self.logs = torch.zeros_like(self.sum), torch.zeros_like(self.sum)

    def add(self, log_weights: Tensor) -> None:
        """Draws ``[S, rows]``."""
        largest = torch.maximum(self.largest, log_weights.amax(0))
        before, now = (self.largest - largest).exp(), (log_weights - largest).exp()
        self.sum = self.sum * before + now.sum(0)
        self.squares = self.squares * before.square() + now.square().sum(0)
        self.logs += log_weights.sum(0)
        self.largest = largest

    def result(self, draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, their standard errors, effective draws, and averages of log w."""
        effective = self.sum.square() / self.squares
        spread = (1 / effective - 1 / draws).clamp_min(0.0) * (draws / (draws - 1) if draws > 1 else math.nan)
        value = self.largest + self.sum.log() - math.log(draws)
        return value, spread.sqrt(), effective, self.logs / draws
