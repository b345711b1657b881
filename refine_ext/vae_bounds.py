"""The information-theoretic generalisation bound of a VAE, term by term, from its training data."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .arguments import not_negative, whole
from .gaussian_kl import gaussian_kl
from .log_mixture import log_mixture
from .vae_bound_result import VAEBound
from .vae_likelihoods import Likelihood, LikelihoodName
from .vae_model import Decoder, Encoder, Work, by_draw, check_callable, evaluation, prepare, sample_noise, sample_seeds

_FUNCTION = "vae_bound"
Latents = Literal["posterior", "prior"]


def vae_bound(
    encoder: Encoder,
    decoder: Decoder,
    data: Tensor | np.ndarray,
    *,
    likelihood: LikelihoodName | Likelihood = "bernoulli",
    auxiliary_decoder: Decoder | None = None,
    rho: float = 1.0,
    num_training: int | None = None,
    draws: int = 16,
    seed: int | None = None,
    latents: Latents = "posterior",
    aggregate: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> VAEBound:
    """``bound = REC + (1 + rho) sqrt(RATE) + (1 + rho) sqrt(MI / m)``, beside the earlier ``REC + sqrt(RATE)``.

    Averages over samples, in nats: ``REC = -E log p(x|z)``, ``RATE = E KL(q(z|x) || N(0, I))`` in closed form, and

        MI = E_z KL(p(.|z) || p'(.|z)) = E_z E_{x ~ p(.|z)} [log p(x|z) - log p'(x|z)],

    z from q(z|x) of the data (the codes that the decoder was trained on), the inner average exact, so that MI is never
    negative and nothing is clipped. p' is the auxiliary decoder. What it stands for is the decoder averaged over
    training sets, p_bar = E_S p_S, with which MI would be the information that the generator's output keeps of its
    training set S, given z: ``I(x; S | z) = E_S E_z KL(p_S || p_bar)``. With any p' that does not depend on S,
    ``E_S E_z KL(p_S || p') = I(x; S | z) + E_z KL(p_bar || p')``: an upper estimate. Such a p' is a decoder trained on
    samples that p has not seen (:func:`fit_auxiliary_decoder`). One trained beside p on p's own samples, as in the
    paper's experiments, depends on S; it sees how far training itself is random, and is neither an upper nor a lower
    estimate, but in general too small. `likelihood_gap` is the same difference at the training samples,
    ``E_{x, z ~ q(.|x)} [log p(x|z) - log p'(x|z)]``: a difference of two reconstruction errors, of either sign.

    The theorem's factors (of losses that are sub-Gaussian) are 1, as in the paper's experiments: a figure to follow and
    to compare, no certificate. It can be below the held-out -E log p(x) (benchmarks/reproduce_vae_digits.py).

    Args:
        encoder: x ``[B, ...]`` to (mean, log_variance) of latents ``[B, d]`` or ``[B, ...]``, one tensor
            ``[B, 2 d, ...]`` of both, or an object with latent_dist, as the `encode` of diffusers' autoencoders
            returns. A module or a function; modules are used in evaluation mode and get their mode back.
        decoder: z to logits ("bernoulli"), or to the mean or (mean, log_scale) ("gaussian", "discretized_logistic"),
            with as many pixels as x; log_scale may be a number or one for each pixel. Or an object with `sample`.
        data: the training samples ``[n, ...]``, floating or uint8 (taken as floats without scaling).
        likelihood: a name, or a :class:`BernoulliLikelihood`, :class:`GaussianLikelihood` or
            :class:`DiscretizedLogisticLikelihood` with its options.
        auxiliary_decoder: p'. None: no MI, and neither generator_term nor bound.
        rho: not negative.
        num_training: m, where `data` is a part of the training samples. None: n.
        draws: latents a sample. MI of a discretised logistic law adds up all levels for each: take few.
        seed: of the latents; a sample's do not depend on the batch. None: drawn from torch's default generator.
        latents: "prior": MI over z ~ N(0, I) instead, as the model generates.
        aggregate: also split RATE in the information of the code, ``I_q(x; z) = E log q(z|x) / q(z)``, at most log n,
            and ``KL(q(z) || N(0, I))``, q(z) = sum_j q(z|x_j) / n over all samples; n^2 pairs for each draw.
        batch_size: samples at once. None: by memory.
        progress: a bar where it takes over a second. None: on a terminal.

    Returns:
        :class:`VAEBound`: the terms, and for each `stderr` (over samples and latents) and `monte_carlo_stderr` (over
        latents alone, the samples given).

    Raises:
        TypeError: networks, likelihoods or arguments of another type.
        ValueError: fewer than 2 samples, NaN (with the rows that have it), samples outside the likelihood's range, an
            output of the wrong shape, a log_variance that overflows, numbers out of range.

    Source: Chen, Zhu and Shkurti 2025, section 3 and the constants of their experiments; the inequality for MI: Barber
    and Agakov 2003; the split of RATE: Hoffman and Johnson 2016.

    >>> decoder = torch.nn.Linear(2, 4)
    >>> vae_bound(torch.nn.Linear(4, 4), decoder, torch.eye(4), auxiliary_decoder=decoder, seed=0).mutual_information
    0.0
    """
    work = prepare(
        _FUNCTION, encoder, decoder, data, likelihood, draws=draws, seed=seed, batch_size=batch_size, least=2
    )
    rho = not_negative(_FUNCTION, "rho", rho)
    if latents not in ("posterior", "prior"):
        raise ValueError(f"{_FUNCTION}: latents must be posterior or prior, got {latents!r}")
    if auxiliary_decoder is not None:
        check_callable(_FUNCTION, "auxiliary_decoder", auxiliary_decoder)
    m = len(work.data) if num_training is None else whole(_FUNCTION, "num_training", num_training, 1)
    sums = _Sums(work, auxiliary_decoder, latents)
    with evaluation(encoder, decoder, auxiliary_decoder):
        for first, x in work.batches(progress):
            sums.add(first, x)
        split = _aggregate(work, sums) if aggregate else None
    return VAEBound.of(
        reconstruction=sums.reconstruction,
        rate=sums.rate,
        information=sums.information,
        gap=sums.gap,
        within=sums.within / len(work.data) ** 2 if work.draws > 1 else None,
        num_training=m,
        rho=float(rho),
        draws=work.draws,
        seed=work.seed,
        likelihood=work.vae.likelihood.name,
        latents=latents,
        aggregated=split,
    )


class _Sums:
    """Averages over the latents of each sample, float64, and how far they vary with them."""

    def __init__(self, work: Work, auxiliary: Decoder | None, latents: Latents) -> None:
        n = len(work.data)
        self.work, self.auxiliary, self.latents = work, auxiliary, latents
        self.reconstruction = torch.zeros(n, dtype=torch.float64)
        self.rate = torch.zeros(n, dtype=torch.float64)
        self.information = None if auxiliary is None else torch.zeros(n, dtype=torch.float64)
        self.gap = None if auxiliary is None else torch.zeros(n, dtype=torch.float64)
        # the covariance of the averages of (reconstruction, rate, information) over latents, summed over samples
        self.within = torch.zeros(3, 3, dtype=torch.float64)
        self.means: list[Tensor] = []
        self.deviations: list[Tensor] = []
        self.prior_seeds = sample_seeds(~work.seed, n) if latents == "prior" else None

    def add(self, first: int, x: Tensor) -> None:
        work, vae = self.work, self.work.vae
        posterior = vae.check_posterior(vae.posterior(x), first)
        rows = slice(first, first + len(x))
        mean, log_variance = posterior.flat()
        self.rate[rows] = gaussian_kl(mean.double(), log_variance.double()).cpu()
        self.means.append(mean)
        self.deviations.append((0.5 * log_variance).exp())
        each: list[list[Tensor]] = [[], [], []]
        for draws in work.blocks_of_draws():
            z = posterior.latent(work.noise(draws, first, posterior.mean)).flatten(0, 1)
            output = vae.output(z, x[0].numel())
            log_p = vae.check_log_prob(vae.log_prob(output, x), first).double()
            each[0].append(-log_p)
            if self.auxiliary is None:
                continue
            other = vae.output(z, x[0].numel(), "auxiliary_decoder", self.auxiliary)
            log_other = vae.check_log_prob(vae.log_prob(other, x), first, "auxiliary_decoder").double()
            each[2].append(log_p - log_other)
            if self.prior_seeds is not None:
                z = sample_noise(self.prior_seeds[rows], draws, posterior.mean).flatten(0, 1)
                output = vae.output(z, x[0].numel())
                other = vae.output(z, x[0].numel(), "auxiliary_decoder", self.auxiliary)
            divergence = vae.likelihood.divergence(by_draw(output, len(x)), by_draw(other, len(x)))
            each[1].append(vae.check_log_prob(divergence, first, "auxiliary_decoder"))
        reconstruction = torch.cat(each[0]).cpu()
        information, gap = (torch.cat(part).cpu() if part else None for part in each[1:])
        self.reconstruction[rows] = reconstruction.mean(0)
        if self.information is not None and self.gap is not None and information is not None and gap is not None:
            self.information[rows], self.gap[rows] = information.mean(0), gap.mean(0)
        if work.draws > 1:
            zero = torch.zeros_like(reconstruction)
            varied = torch.stack([reconstruction, zero, zero if information is None else information])
            varied = varied - varied.mean(1, keepdim=True)
            self.within += torch.einsum("asb,csb->ac", varied, varied) / (work.draws * (work.draws - 1))


def _aggregate(work: Work, sums: _Sums) -> Tensor:
    """log q(z|x) - log q(z) ``[n]``, averaged over each sample's latents.

    With z = mean_i + s_i eps the first is known without rounding of z: both have the same constants, so that only
    -|eps|^2 / 2 - sum log s_i and the mixture's exponent remain.
    """
    means, deviations = torch.cat(sums.means), torch.cat(sums.deviations)
    log_weights = -deviations.double().log().sum(1)
    value = torch.zeros(len(means), dtype=torch.float64)
    for first in range(0, len(means), work.rows):
        rows = slice(first, first + work.rows)
        for draws in work.blocks_of_draws():
            noise = work.noise(draws, first, means[rows])
            z = means[rows] + deviations[rows] * noise
            mixture = log_mixture(z, means, deviations, log_weights=log_weights, dtype=torch.float64)
            assert isinstance(mixture, Tensor)
            own = -0.5 * noise.double().square().sum(2) + log_weights[rows]
            value[rows] += (own - mixture + math.log(len(means))).sum(0).cpu() / work.draws
    return value
