"""Refining any generator in its latent space: discriminator gradient flow, and Langevin dynamics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import whole
from .guidance import guidance_factor, guided_step, philox_normal
from .latent_arguments import Schedule, check_batch_size, check_flow, check_start, divergence_read_by, schedule_of
from .latent_prior import Prior, log_acceptance, prior_of
from .latent_ratio import Evaluation, LatentRatio
from .progress import progress_bar
from .samples import as_column

# Rows of samples that an early stop compares: the energy distance takes their pairs.
_STOP_ROWS = 1000


class LatentFlow(NamedTuple):
    """What :func:`latent_flow` returns.

    z: refined latents, shaped as the given ones.
    x: their samples G(z).
    log_ratio: log r of each sample, [B].
    trace: mean log r of every iterate, float64 [iterates]; the first one is that of the given latents.
    step: which iterate z is: the last one, or the best one of an early stop.
    measure: what the early stop measured of every iterate, float64 [iterates]; None without one.
    """

    z: Tensor
    x: Tensor
    log_ratio: Tensor
    trace: Tensor
    step: int
    measure: Tensor | None


class LatentLangevin(NamedTuple):
    """What :func:`latent_langevin` returns.

    z: latents after the last step, one a chain.
    x: their samples G(z).
    log_ratio: log r of each sample, [B].
    trace: mean log r of every state, float64 [steps + 1].
    acceptance: share of accepted proposals of each chain, float64 [B]; None without the Metropolis correction.
    """

    z: Tensor
    x: Tensor
    log_ratio: Tensor
    trace: Tensor
    acceptance: Tensor | None


def latent_flow(
    generator: Callable[[Tensor], Tensor],
    discriminator: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    steps: int = 25,
    step_size: Schedule = 0.1,
    noise: Schedule = 0.01,
    divergence: str = "kl",
    kind: str | None = None,
    shift: float | Tensor | None = None,
    prior: Prior | None = None,
    early_stop: Callable[[Tensor], float] | Tensor | None = None,
    patience: int = 5,
    seed: int | Tensor | None = None,
    batch_size: int | None = None,
    callback: Callable[[int, Tensor, Tensor], Any] | None = None,
    check: bool = True,
    progress: bool = True,
) -> LatentFlow:
    r"""Gradient flow of an f-divergence in latent space (DGflow):

    ``z <- z + eta kappa(log r) grad_z log r(G(z)) + eta gamma grad log p(z) + sqrt(2 eta gamma) xi``,

    ``kappa = u f''(u)`` at ``u = 1/r``: 1 for "kl", ``r / (1 + r)`` for "jensen_shannon", ``1 / (1 + r)`` for "logD".

    The particles start at the generator's law and descend the divergence between it and the data, plus gamma times
    minus their entropy. The published flow has no prior: the noise is then free to carry latents away from where the
    generator was trained, and there is a limit law (proportional to ``r(G(z))^(1/gamma)``, for "kl") only if that can
    be normalised, so stop after some steps. With a prior p the noise leaves p as it is, and the limit for "kl" is
    proportional to ``p(z) r(G(z))^(1/gamma)``: at gamma = 1 the refined model itself, as :func:`latent_langevin`'s.
    r is the ratio at the start throughout: a flow that has removed the difference does not notice, which is why few
    steps, or an early stop, are needed.

    Args:
        generator: differentiable function from latents ``[B, ...]`` to samples ``[B, ...]``. For a conditional one,
            bind the conditions and leave ``batch_size`` None.
        discriminator: a :class:`refine_ext.Discriminator`, whose calibrated log_ratio is used, or any differentiable
            ``x -> h[B]`` or ``[B, 1]``.
        z: latents to start from, ``[B, ...]``; float64, float32, float16 or bfloat16. It is left as it is.
        steps: how many.
        step_size: eta, positive: a number, one per step, or a function of the step 0, 1, ...
        noise: gamma, at least 0, likewise. 0 is the plain gradient flow, without random numbers.
        divergence: the flow's: one of :func:`refine_ext.divergences` or "logD". kappa is at most 1 for "kl",
            "jensen_shannon", "gan" and "logD"; it grows without bound with 1/r for "pearson_chi2" and "alpha" above 1,
            with r for the others: take small steps there.
        kind: of the discriminator's output h: "logit" (``log r = h - shift``), or "variational" (``r = (f*)'(h -
            shift)`` for f the discriminator's attribute ``divergence``, else ``divergence``). None: the
            discriminator's attribute, else "logit".
        shift: subtracted from h. None: the discriminator's attribute, else 0.
        prior: "normal", or a differentiable log density ``z -> [B]``, normalised or not.
        early_stop: held-out real samples ``[n, ...]``, whose energy distance to the iterate's is measured (first
            1000 of each), or a function of the samples ``x`` that returns a number, lower is better. The best
            iterate is returned, which may be the start. Judge the result by other samples than these. Each step
            waits for the device.
        patience: iterates without a better measure after which the flow stops.
        seed: of the noise: an int, or int64 ``[B]`` with one seed for each latent, whose noise then does not depend on
            the batch it is in, or a 0-dim int64 tensor. None: drawn from torch's generator.
        batch_size: latents that go through the networks at once; None for all. The result does not depend on it
            beyond the networks' own rounding.
        callback: called with (step, z, log_ratio) of every iterate, the start included.
        check: refuse outputs that look like probabilities.
        progress: show a progress bar if it takes more than a second.

    Returns:
        :class:`LatentFlow`. Parameters get no ``.grad``; nothing waits for the device in a step unless there is an
        early stop.

    Raises:
        TypeError: an argument that is no tensor, function or number where one is needed.
        ValueError: shapes, schedules and names that are not allowed; an output without a gradient (says whether the
            generator's or the discriminator's); NaN or an infinite gradient (says at which step; on CUDA at the end);
            probabilities.

    Source: Ansari, Ang and Soh, "Refining deep generative models via discriminator gradient flow", ICLR 2021,
    section 3 and algorithm 1.

    >>> import torch, refine_ext as rx
    >>> z = torch.zeros(2, 1)
    >>> rx.latent_flow(lambda z: 2 * z, lambda x: x.sum(1), z, steps=5, step_size=0.5, noise=0, check=False).x
    tensor([[10.],
            [10.]])
    """
    function = "latent_flow"
    z, steps, seed = check_start(function, z, steps, seed)
    etas = schedule_of(function, "step_size", step_size, steps, least=0.0, exclusive=True)
    gammas = schedule_of(function, "noise", noise, steps, least=0.0)
    check_flow(function, divergence)
    ratio = LatentRatio(
        function,
        generator,
        discriminator,
        kind=kind,
        divergence=divergence_read_by(function, discriminator, divergence, kind),
        shift=shift,
        batch_size=check_batch_size(function, batch_size),
        check=check,
    )
    law = prior_of(function, prior)
    stop = None if early_stop is None else _EarlyStop(function, early_stop, whole(function, "patience", patience, 1))
    trace = []
    # Tensors made in inference mode cannot enter a backward pass; what is made here can.
    with torch.inference_mode(False), torch.no_grad():
        z = z.clone() if z.is_inference() else z
        for k in _counted(steps, "latent flow", progress):
            at = ratio(z, k, gradient=k < steps, keep_samples=stop is not None or k == steps)
            trace.append(at.log_ratio.mean(dtype=torch.float64))
            if callback is not None:
                callback(k, z, at.log_ratio)
            if (stop is not None and stop(k, z, at)) or k == steps:
                break
            rate = etas[k] * gammas[k]
            keep, terms, pull = law.drift(z, rate)
            z = _step(
                z,
                [*terms, at.gradient],
                [keep, *pull, etas[k]],
                math.sqrt(2.0 * rate),
                factor=_kappa(at.log_ratio, divergence),
                seed=seed,
                step=k,
            )
        ratio.finish()
        step = k
        measure = None
        if stop is not None:
            step, z, at = stop.best
            measure = torch.tensor(stop.measures, dtype=torch.float64)
    return LatentFlow(z, at.x, at.log_ratio, torch.stack(trace), step, measure)


def latent_langevin(
    generator: Callable[[Tensor], Tensor],
    discriminator: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    steps: int = 100,
    step_size: Schedule = 0.01,
    temperature: Schedule = 1.0,
    metropolis: bool = False,
    prior: Prior = "normal",
    divergence: str = "kl",
    kind: str | None = None,
    shift: float | Tensor | None = None,
    seed: int | Tensor | None = None,
    batch_size: int | None = None,
    callback: Callable[[int, Tensor, Tensor], Any] | None = None,
    check: bool = True,
    progress: bool = True,
) -> LatentLangevin:
    r"""Langevin dynamics on the energy of the refined model's latents (DDLS):

    ``z <- z - (eta/2) grad E(z) + sqrt(eta T) xi``,  ``E(z) = -log p(z) - log r(G(z))``.

    The target is ``exp(-E/T)``. At T = 1 and with r the exact ratio of the data to the generator, its samples G(z)
    follow the refined model r dQ, whatever the divergence. Without the Metropolis correction the chain's limit is off
    by an error of order eta; with it the target is exact for every step size: z' is taken with probability
    ``min(1, exp((E(z) - E(z'))/T) q(z|z') / q(z'|z))``, q the proposal's density, else z stays. An acceptance of
    about 0.57 mixes fastest in many dimensions; raise or lower the step size to get there.

    Args:
        generator, discriminator, z, steps, seed, batch_size, check, progress: as in :func:`latent_flow`; each latent
            is the start of a chain of its own.
        step_size: eta, positive: a number, one per step, or a function of the step 0, 1, ...
        temperature: T, likewise; at least 0, and with ``metropolis`` positive. Below 1 it prefers likely samples,
            0 is gradient ascent.
        metropolis: correct each step by accepting or rejecting it.
        prior: "normal" (standard normal latents), or a differentiable log density ``z -> [B]``, normalised or not;
            one without a gradient is flat (``-inf`` outside of a uniform prior, with ``metropolis``).
        divergence, kind, shift: how the discriminator's output is read: "logit" (``log r = h - shift``), or
            "variational" (``r = (f*)'(h - shift)`` for f the discriminator's attribute ``divergence``, else
            ``divergence``). None: the discriminator's attributes, else "logit" and 0.
        callback: called with (step, z, log_ratio) of every state, the start included: to thin a chain, or to follow
            it.

    Returns:
        :class:`LatentLangevin`. Parameters get no ``.grad``; nothing waits for the device in a step.

    Raises:
        TypeError, ValueError: as in :func:`latent_flow`.

    Source: Che, Zhang, Sohl-Dickstein, Larochelle, Paull, Cao and Bengio, "Your GAN is secretly an energy-based model
    and you should use discriminator driven latent sampling", NeurIPS 2020, algorithm 1; Roberts and Tweedie 1996 for
    the correction.

    >>> import torch, refine_ext as rx
    >>> start = torch.zeros(4000, 1)
    >>> options = {"step_size": 0.5, "metropolis": True, "seed": 0}
    >>> chain = rx.latent_langevin(lambda z: z, lambda x: 2 * x.sum(1) - 2, start, **options)
    >>> bool((chain.z.mean() - 2).abs() < 0.1 and (chain.z.std() - 1).abs() < 0.1)  # N(0, 1) e^(2z - 2) is N(2, 1)
    True
    """
    function = "latent_langevin"
    z, steps, seed = check_start(function, z, steps, seed)
    etas = schedule_of(function, "step_size", step_size, steps, least=0.0, exclusive=True)
    temperatures = schedule_of(function, "temperature", temperature, steps, least=0.0, exclusive=metropolis)
    ratio = LatentRatio(
        function,
        generator,
        discriminator,
        kind=kind,
        divergence=divergence_read_by(function, discriminator, divergence, kind),
        shift=shift,
        batch_size=check_batch_size(function, batch_size),
        check=check,
    )
    law = prior_of(function, prior)
    if prior is None:
        raise TypeError(f"{function}: prior must be 'normal' or a log density z -> [B], got None")
    trace = []
    with torch.inference_mode(False), torch.no_grad():
        z = z.clone() if z.is_inference() else z
        at = ratio(z, 0, keep_samples=False)
        accepted = torch.zeros(z.shape[0], dtype=torch.float64, device=z.device) if metropolis else None
        for k in _counted(steps, "latent Langevin", progress):
            trace.append(at.log_ratio.mean(dtype=torch.float64))
            if callback is not None:
                callback(k, z, at.log_ratio)
            if k == steps:
                break
            keep, terms, pull = law.drift(z, 0.5 * etas[k])
            deviation = math.sqrt(etas[k] * temperatures[k])
            # Odd steps are the decisions'.
            new_z = _step(z, [*terms, at.gradient], [keep, *pull, 0.5 * etas[k]], deviation, seed=seed, step=2 * k)
            new_at = ratio(new_z, k + 1, keep_samples=False)
            if accepted is not None:
                exponential = _exponential(z, seed, 2 * k + 1)
                take = -exponential < log_acceptance(law, z, at, new_z, new_at, etas[k], temperatures[k])
                accepted += take
                new_z, new_at = _where(take, new_z, z), _chosen(take, new_at, at)
            z, at = new_z, new_at
        final = ratio(z, steps, gradient=False)
        ratio.finish()
        acceptance = None if accepted is None else accepted / steps
    return LatentLangevin(z, final.x, final.log_ratio, torch.stack(trace), acceptance)


def _step(
    z: Tensor,
    terms: list[Tensor],
    coefficients: list[float],
    deviation: float,
    *,
    factor: Tensor | None = None,
    seed: int | Tensor,
    step: int,
) -> Tensor:
    if deviation == 0.0:
        return guided_step(z, terms, coefficients, factor=factor)
    return guided_step(z, terms, [*coefficients, deviation], factor=factor, seed=seed, step=step)


def _kappa(log_ratio: Tensor, divergence: str) -> Tensor:
    if divergence == "logD":  # f(u) = (1 + u) log(1 + u) - u, which is none of the divergences: f(1) is not 0
        return torch.sigmoid(-log_ratio.double())
    return guidance_factor(log_ratio, divergence=divergence, kind="logit", flow=True)


def _exponential(z: Tensor, seed: int | Tensor, step: int) -> Tensor:
    """-log U of one uniform number per latent: half the squared length of two standard normals."""
    pair = philox_normal((z.shape[0], 2), seed, step=step, dtype=torch.float64, device=z.device)
    return 0.5 * pair.square().sum(1)


def _where(take: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(as_column(take, new), new, old)


def _chosen(take: Tensor, new: Evaluation, old: Evaluation) -> Evaluation:
    return Evaluation(new.x, _where(take, new.log_ratio, old.log_ratio), _where(take, new.gradient, old.gradient))


class _EarlyStop:
    """Keeps the best iterate by a measure of its samples; called once an iterate, says whether to stop."""

    def __init__(self, function: str, judge: Callable[[Tensor], float] | Tensor, patience: int) -> None:
        self.function = function
        self.patience = patience
        self.measures: list[float] = []
        self.best: tuple[int, Tensor, Evaluation]
        if callable(judge):
            self.judge = judge
            return
        from .measures import energy_distance
        from .samples import as_tensor

        real = as_tensor(judge, function=function, argument="early_stop")[:_STOP_ROWS].cpu().numpy()
        self.judge = lambda x: energy_distance(real, x[:_STOP_ROWS].float().cpu().numpy())

    def __call__(self, step: int, z: Tensor, at: Evaluation) -> bool:
        value = float(self.judge(at.x))
        if math.isnan(value):
            raise ValueError(f"{self.function}: early_stop returned NaN at step {step}")
        if not self.measures or value < min(self.measures):
            self.best = step, z, at
        self.measures.append(value)
        return step - self.best[0] >= self.patience


def _counted(steps: int, title: str, progress: bool) -> Iterator[int]:
    """0 ... steps, with a bar that counts the steps between them."""
    with progress_bar(title, steps, progress, "step") as bar:
        yield 0
        for k in range(1, steps + 1):
            bar.update()
            yield k
