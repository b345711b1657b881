"""Training a VAE with its generalisation bound, and the auxiliary decoder that the bound's last term needs."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from .arguments import not_negative, positive, whole
from .gaussian_kl import gaussian_kl
from .progress import progress_bar
from .rademacher_suprema import seed_of
from .training import isolated_rng
from .vae_likelihoods import Likelihood, LikelihoodName, likelihood_of
from .vae_model import (
    VAE,
    Decoder,
    Encoder,
    Posterior,
    by_draw,
    check_callable,
    evaluation,
    prepare,
    sample_noise,
    sample_seeds,
)


class VAELoss(NamedTuple):
    """:func:`vae_bound_loss` and its terms, in nats a sample.

    Attributes:
        loss: bound + auxiliary.
        bound: REC + (1 + rho) sqrt(RATE) + (1 + rho) sqrt(MI / m), of the batch.
        reconstruction, rate: REC and RATE of the batch.
        mutual_information: MI of the batch; None without an auxiliary decoder.
        auxiliary: -E log p'(x|z) that trains the auxiliary decoder alone; None where nothing trains it.
    """

    loss: Tensor
    bound: Tensor
    reconstruction: Tensor
    rate: Tensor
    mutual_information: Tensor | None
    auxiliary: Tensor | None


def vae_bound_loss(
    encoder: Encoder,
    decoder: Decoder,
    x: Tensor,
    *,
    likelihood: LikelihoodName | Likelihood = "bernoulli",
    auxiliary_decoder: Decoder | None = None,
    auxiliary_x: Tensor | None = None,
    num_training: int | None = None,
    rho: float = 1.0,
    draws: int = 1,
    smallest: float = 1e-6,
    seed: int | None = None,
    return_terms: bool = False,
) -> Tensor | VAELoss:
    """``REC + (1 + rho) root(RATE) + (1 + rho) root(MI / m)`` of a batch, to be minimised instead of REC + RATE.

    The terms of :func:`vae_bound`, differentiable in encoder and decoder. root(v) is sqrt(v) above `smallest` and its
    tangent below: never less than sqrt(v), and of finite slope at 0, where that of the square root is not (a posterior
    that has become the prior, an auxiliary decoder equal to the decoder). A batch's root is on average below that of
    all samples.

    The slope of the rate's root, (1 + rho) / (2 sqrt(RATE)), is the weight of RATE, 1 in the negative ELBO. Below
    ((1 + rho) / 2)^2 nats it is the heavier one and grows as the rate falls: from new weights the posterior becomes
    the prior and stays it. Above, it is lighter, and the decoder fits its training samples more closely. Begin with
    the negative ELBO (`reconstruction` + `rate` of the terms), or take ``smallest = ((1 + rho) / 2) ** 2``: RATE then
    never weighs more than in the ELBO. benchmarks/reproduce_vae_digits.py has the bound from new weights and after the
    ELBO, where posteriors get narrow (judge them by many draws): it fits faster, and overfits sooner.

    An auxiliary decoder is held fixed in MI. With `auxiliary_x` it is trained beside the others by one optimiser over
    all three: ``-E log p'(x|z)`` of those samples is added, with latents through which no gradient reaches the
    encoder. Take samples that `x` is never drawn from: see :func:`vae_bound` for what MI then is.

    Args:
        encoder, decoder, likelihood: as in :func:`vae_bound`; modules stay in the mode they are in.
        x: a batch ``[B, ...]``, where the networks are and of their dtype.
        auxiliary_decoder: p'. A module's parameters get no gradient from MI; a plain function's would.
        auxiliary_x: a batch ``[B', ...]``.
        num_training: m, how many training samples there are; needed with an auxiliary decoder.
        rho: not negative.
        draws: latents a sample.
        smallest: positive, nats.
        seed: of the latents. None: drawn from torch's default generator.
        return_terms: a :class:`VAELoss` instead of its loss.

    Returns:
        A 0-dim tensor, or :class:`VAELoss`.

    Raises:
        TypeError, ValueError: as :func:`vae_bound`; a loss that is not finite, with the rows and networks that made
            it so; an auxiliary decoder without `num_training`.

    Source: Chen, Zhu and Shkurti 2025, section 3, as an objective.

    >>> encoder, decoder = torch.nn.Linear(4, 4), torch.nn.Linear(2, 4)
    >>> vae_bound_loss(encoder, decoder, torch.eye(4), seed=0).backward()
    """
    function = "vae_bound_loss"
    law = likelihood_of(function, likelihood)
    for argument, network in (("encoder", encoder), ("decoder", decoder)):
        check_callable(function, argument, network)
    _check_batch(function, "x", x)
    draws, seed = whole(function, "draws", draws, 1), seed_of(function, seed)
    rho, smallest = not_negative(function, "rho", rho), positive(function, "smallest", smallest)
    if auxiliary_decoder is None and auxiliary_x is not None:
        raise ValueError(f"{function}: auxiliary_x needs an auxiliary_decoder")
    if auxiliary_decoder is not None:
        check_callable(function, "auxiliary_decoder", auxiliary_decoder)
        if num_training is None:
            raise ValueError(f"{function}: num_training, the number of training samples, is needed for MI / m")
        num_training = whole(function, "num_training", num_training, 1)
    vae = VAE(function, encoder, decoder, law)
    pixels = x[0].numel()

    posterior = vae.posterior(x)
    z = _latents(posterior, draws, seed)
    output = vae.output(z, pixels)
    log_p = vae.log_prob(output, x)
    reconstruction, rate = -log_p.mean(), gaussian_kl(*posterior.flat()).mean()
    bound = reconstruction + (1 + rho) * _root(rate, smallest)
    information = auxiliary = log_other = None
    if auxiliary_decoder is not None and num_training is not None:
        other = vae.output(z, pixels, "auxiliary_decoder", _frozen(auxiliary_decoder))
        each = law.divergence(by_draw(output, len(x)), by_draw(other, len(x)))
        information = each.mean().to(bound.dtype)
        bound = bound + (1 + rho) * _root(information / num_training, smallest / num_training)
        if auxiliary_x is not None:
            _check_batch(function, "auxiliary_x", auxiliary_x)
            with torch.no_grad():
                z = _latents(vae.posterior(auxiliary_x), draws, ~seed)
            other = vae.output(z, auxiliary_x[0].numel(), "auxiliary_decoder", auxiliary_decoder)
            log_other = vae.log_prob(other, auxiliary_x)
            auxiliary = -log_other.mean()
    loss = bound if auxiliary is None else bound + auxiliary
    if not bool(loss.isfinite()):
        _explain(vae, x, posterior, log_p, log_other)
    return VAELoss(loss, bound, reconstruction, rate, information, auxiliary) if return_terms else loss


def fit_auxiliary_decoder(
    encoder: Encoder,
    decoder: nn.Module,
    data: Tensor | np.ndarray,
    *,
    likelihood: LikelihoodName | Likelihood = "bernoulli",
    architecture: nn.Module | None = None,
    epochs: int = 100,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool | None = None,
) -> nn.Module:
    """A second decoder p' of the same encoder: minimises ``-E log p'(x|z)``, z ~ q(z|x), from new weights.

    For MI of :func:`vae_bound`. Give samples that the first decoder has not been trained on, as many as it had, and
    as many epochs: p' is then a decoder of another training set, and MI an upper estimate of the information that the
    first one keeps of its own. Its training samples again give the paper's second decoder, and no bound.

    Args:
        encoder: as in :func:`vae_bound`; it is not trained.
        decoder: the first decoder, of which a copy with new weights is trained; left as it is.
        data: samples ``[n, ...]``.
        likelihood: of the pixels.
        architecture: a decoder to train a copy of as it is. None: the first decoder's, every layer anew by its
            `reset_parameters`.
        epochs, batch_size, learning_rate: of Adam.
        seed: of weights, batches and latents. The global generators are left as they were.
        progress: a bar where it takes over a second. None: on a terminal.

    Returns:
        The second decoder, in evaluation mode.

    Raises:
        TypeError, ValueError: as :func:`vae_bound`; a decoder with parameters that no `reset_parameters` reaches;
            training that diverges.

    Source: Chen, Zhu and Shkurti 2025, the estimate of the generator's mutual information in their experiments.

    >>> encoder, decoder = torch.nn.Linear(4, 4), torch.nn.Linear(2, 4)
    >>> fit_auxiliary_decoder(encoder, decoder, torch.eye(4), epochs=2)
    Linear(in_features=2, out_features=4, bias=True)
    """

    function = "fit_auxiliary_decoder"
    model = decoder if architecture is None else architecture
    if not isinstance(model, nn.Module):
        argument = "decoder" if architecture is None else "architecture"
        raise TypeError(f"{function}: {argument} must be a torch module, got {type(model).__name__}")
    epochs = whole(function, "epochs", epochs, 1)
    learning_rate = positive(function, "learning_rate", learning_rate)
    work = prepare(function, encoder, model, data, likelihood, draws=1, seed=seed, batch_size=batch_size)
    device = work.like.device
    with isolated_rng(seed, device):
        trained = copy.deepcopy(model)
        if architecture is None:
            _reset(function, trained)
        trained.requires_grad_(True).train()
        optimiser = torch.optim.Adam(trained.parameters(), learning_rate)
        generator = torch.Generator().manual_seed(seed)
        vae = work.vae._replace(decoder=trained)
        with progress_bar(function, epochs, progress, "epoch") as bar, torch.enable_grad():
            for epoch in range(1, epochs + 1):
                for rows in torch.randperm(len(work.data), generator=generator).split(work.rows):
                    x = work.data[rows].to(work.like)
                    with evaluation(encoder):
                        posterior = vae.check_posterior(vae.posterior(x))
                        noise = torch.randn(posterior.mean.shape, generator=generator, dtype=torch.float64)
                        z = posterior.latent(noise.to(posterior.mean))
                    loss = -vae.log_prob(vae.output(z, x[0].numel()), x).mean()
                    if not bool(loss.isfinite()):
                        raise ValueError(
                            f"{function}: training diverged in epoch {epoch}; lower learning_rate ({learning_rate:g})"
                        )
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    optimiser.step()
                bar.update()
    return trained.eval()


def _root(value: Tensor, smallest: float) -> Tensor:
    """sqrt above `smallest`, its tangent there below; the first branch never sees what it is not used for."""
    edge = math.sqrt(smallest)
    return torch.where(value > smallest, value.clamp_min(smallest).sqrt(), 0.5 * (edge + value / edge))


def _latents(posterior: Posterior, draws: int, seed: int) -> Tensor:
    noise = sample_noise(sample_seeds(seed, len(posterior.mean)), range(draws), posterior.mean)
    return posterior.latent(noise).flatten(0, 1)


def _frozen(network: Decoder) -> Decoder:
    """The network with parameters that get no gradient; its input does."""
    if not isinstance(network, nn.Module):
        return network
    fixed = {name: p.detach() for name, p in network.named_parameters()}
    return lambda z: functional_call(network, fixed, (z,))


def _check_batch(function: str, argument: str, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{function}: {argument} must be a floating tensor, got {got}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"{function}: {argument} must be a batch [B, ...], got {list(x.shape)}")


def _explain(vae: VAE, x: Tensor, posterior: Posterior, log_p: Tensor, log_other: Tensor | None) -> None:
    """Raise by what made a loss that is not finite: looked for only then, as it waits for the device."""
    with torch.no_grad():
        vae.check_data(x)
        vae.check_posterior(posterior)
        vae.check_log_prob(log_p)
        if log_other is not None:
            vae.check_log_prob(log_other, argument="auxiliary_decoder")
    raise ValueError(f"{vae.function}: the loss is not finite: KL(p || p') of the two decoders overflows")


def _reset(function: str, network: nn.Module) -> None:
    reached: set[int] = set()
    for module in network.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
            reached |= {id(p) for p in module.parameters()}
    missed = [name for name, p in network.named_parameters() if id(p) not in reached]
    if missed:
        raise ValueError(
            f"{function}: no reset_parameters of decoder reaches {', '.join(missed[:3])}; give architecture=, a "
            "decoder with weights to start from"
        )
