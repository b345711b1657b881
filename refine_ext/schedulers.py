"""Discriminator guidance for the schedulers of diffusers, and so for its pipelines."""

from __future__ import annotations

import copy
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .arguments import positive
from .denoiser import guide_and_weight, refined_prediction
from .guide import Guide, PerSample

# Schedulers by what their sample is: alpha x_0 + sigma eps with the level looked up by timestep, the model's input
# divided by sqrt(1 + sigma^2) of x_0 + sigma eps, alpha^2 + sigma^2 = 1 (or flow) by step, flow.
_BY_TIMESTEP = ("DDPMScheduler", "DDIMScheduler")
_UNSCALED = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
_SOLVERS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler",)
SUPPORTED = (*_BY_TIMESTEP, *_UNSCALED, *_SOLVERS, *_FLOW)

_PARAMETRIZATIONS = {
    "epsilon": "noise",
    "sample": "denoised",
    "original_sample": "denoised",
    "v_prediction": "velocity",
    "flow_prediction": "velocity",
}


def scheduler_family(function: str, scheduler: Any) -> str:
    """The name of the supported scheduler that this one is.

    Raises:
        TypeError: none of them; ValueError: one, but configured in a way that is not supported.
    """
    for base in type(scheduler).__mro__:
        if base.__name__ in SUPPORTED and base.__module__.startswith("diffusers."):
            break
    else:
        raise TypeError(
            f"{function}: scheduler must be one of diffusers' {', '.join(SUPPORTED)}, got {type(scheduler).__name__}"
        )
    if base.__name__ in _FLOW and scheduler.config.invert_sigmas:
        raise ValueError(f"{function}: a scheduler with invert_sigmas is not supported")
    parametrization(function, scheduler)
    return base.__name__


def parametrization(function: str, scheduler: Any) -> str:
    """What the model predicts, of "noise", "denoised" and "velocity"."""
    prediction_type = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction_type not in _PARAMETRIZATIONS:
        raise ValueError(
            f"{function}: the scheduler's prediction_type must be one of {', '.join(_PARAMETRIZATIONS)}, "
            f"got {prediction_type!r}"
        )
    return _PARAMETRIZATIONS[prediction_type]


def noise_levels(scheduler: Any, family: str, timestep: Any) -> tuple[float | Tensor, float | Tensor, float]:
    """alpha, sigma and norm: the scheduler's sample is alpha x_0 + sigma eps, its model sees sample / norm.

    Numbers where the scheduler keeps its levels on the CPU, else tensors on the device: nothing waits for it.
    """
    if family in _BY_TIMESTEP:
        signal = _level(_at_timestep(scheduler, timestep))
        if isinstance(signal, Tensor):
            return signal.sqrt(), (1.0 - signal).sqrt(), 1.0
        return math.sqrt(signal), math.sqrt(1.0 - signal), 1.0
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)  # what the scheduler's own step begins with
    sigma = _level(scheduler.sigmas[scheduler.step_index])
    if family in _UNSCALED:
        return 1.0, sigma, math.sqrt(1.0 + sigma * sigma)
    if family in _FLOW:
        return 1.0 - sigma, sigma, 1.0
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
    return alpha, sigma, 1.0


def _at_timestep(scheduler: Any, timestep: Any) -> Tensor:
    """The product of alphas at a timestep."""
    if not isinstance(timestep, Tensor) or timestep.device.type == "cpu":
        return scheduler.alphas_cumprod[int(timestep)]
    # A timestep on the device is looked up on the device, in a table that is taken there once.
    table = scheduler.__dict__.get("_alphas_on_device")
    if table is None or table.device != timestep.device:
        table = scheduler._alphas_on_device = scheduler.alphas_cumprod.to(timestep.device)
    return table.index_select(0, timestep.reshape(1))


def _level(value: Tensor) -> Any:
    return value.item() if value.device.type == "cpu" else value.double()


def check_range(function: str, guide: Guide, scheduler: Any, family: str, latent_scale: float) -> None:
    """A ValueError if none of the levels of a run, sigma / (alpha latent_scale), is in the guide's range."""
    if family in _BY_TIMESTEP:
        signal = scheduler.alphas_cumprod.cpu()[scheduler.timesteps.cpu().long()].double()
        levels = ((1.0 - signal) / signal).sqrt()
    else:
        levels = scheduler.sigmas[:-1].cpu().double()
        if family in _FLOW or scheduler.config.get("use_flow_sigmas"):
            levels = levels / (1.0 - levels)
    found = (levels / latent_scale).tolist()
    if not any(map(guide.covers, found)):
        raise ValueError(
            f"{function}: none of the scheduler's noise levels, {min(found):.4g} to {max(found):.4g}, is in the "
            f"discriminator's range, {guide.sigma_min:.4g} to {guide.sigma_max:.4g}: nothing would be guided"
        )


class Watch:
    """Warns when its owner goes, or the program ends, without a run."""

    def __init__(self, owner: Any, message: str) -> None:
        self.ran = False
        weakref.finalize(owner, self._warn, message)

    def _warn(self, message: str) -> None:
        if not self.ran:
            warnings.warn(message, stacklevel=2)


class _Hook:
    """What the schedulers of one call of wrap_scheduler share: the wrapped one, its copies, and those rebuilt from
    its configuration by its own class."""

    def __init__(self, guide: Guide, weight: float | Tensor, latent_scale: float) -> None:
        self.guide = guide
        self.weight = weight
        self.latent_scale = latent_scale
        self.extra: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] = {}
        self.watch: Watch | None = None

    def refine(self, scheduler: Any, family: str, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch.ran = True
        kind = parametrization("wrap_scheduler", scheduler)
        alpha, sigma, norm = noise_levels(scheduler, family, timestep)
        channels = sample.shape[1] if sample.dim() > 1 else 0
        variance = None
        if model_output.dim() > 1 and model_output.shape[1] == 2 * channels:  # a learned variance follows
            model_output, variance = model_output.split(channels, dim=1)
        refined = refined_prediction(
            "wrap_scheduler",
            self.guide,
            model_output,
            sample,
            sigma,
            parametrization=kind,
            alpha=alpha,
            latent_scale=self.latent_scale,
            # The velocity is that of sample / norm.
            weight=self.weight * norm if kind == "velocity" else self.weight,
            extra=self.extra(timestep) if callable(self.extra) else self.extra,
        )
        return refined if variance is None else torch.cat([refined, variance], dim=1)


def wrap_scheduler(
    scheduler: Any,
    discriminator: Guide | Callable[..., Tensor],
    weight: PerSample = 1.0,
    *,
    latent_scale: float = 1.0,
    discriminator_extra: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] | None = None,
    **options: Any,
) -> Any:
    """A diffusers scheduler whose model outputs a discriminator corrects: ``prediction' = prediction + factor grad h``.

    The factor is ``w c(h - nu)`` times ``-sigma`` for a predicted noise, ``sigma^2 / alpha`` for a predicted sample,
    ``-sigma / alpha`` for a velocity (v_prediction, flow matching), where the scheduler's sample is
    ``alpha x_0 + sigma eps``. Every evaluation of the model is corrected, Heun's second and those of the multistep
    solvers too; pure noise (alpha = 0: flow matching's first step, a zero terminal signal) is not. Whatever else the
    scheduler does is as it was: it is one of the same class, with the signatures of that class.

    ``pipe.scheduler = wrap_scheduler(pipe.scheduler, discriminator)``: wrap after the pipeline is made. Some pipelines
    build their scheduler anew from its configuration when they are made and lose the wrapper; one that never took a
    step warns when it is dropped or the program ends. Saving saves the plain scheduler.

    Args:
        scheduler: DDPM, DDIM, EulerDiscrete, EulerAncestralDiscrete, HeunDiscrete, DPMSolverMultistep, UniPCMultistep
            or FlowMatchEulerDiscrete of diffusers. It is copied and stays as it is.
        discriminator: ``(x, sigma, **extra) -> h[B]`` for x = x_0 + sigma eps, or a :class:`Guide`. On the pipeline's
            device: ``pipe.to`` does not move it.
        weight: w, a number, a ``[B]`` tensor, or a function of the ``[B]`` noise levels; times the Guide's own.
        latent_scale: what the pipeline multiplied latents by (``vae.config.scaling_factor``), if the discriminator
            knows the unscaled ones.
        discriminator_extra: keyword arguments for the discriminator (labels, embeddings): a dict, or a function from
            the timestep to one. The wrapped scheduler has it as an attribute to be set before each run.
        options: of :class:`Guide`: kind, divergence, shift, schedule, sigma_min, sigma_max, dtype, check.

    Returns:
        The guided scheduler; its ``guide`` is the :class:`Guide`.

    Raises:
        TypeError: a scheduler that is not supported (the message lists those that are).
        ValueError: one that is guided already, predicts something unknown, or inverts its sigmas; a latent_scale that
            is not positive; in set_timesteps, levels all outside the guide's range; in a step, timesteps per token,
            and everything :class:`Guide` refuses (NaN on CUDA after the last step).

    Source: Kim et al. 2022, eq. 8, in the parametrisations of Salimans and Ho 2022 and of Lipman et al. 2023.

    >>> import torch, refine_ext as rx
    >>> from diffusers import DDIMScheduler
    >>> guided = rx.wrap_scheduler(DDIMScheduler(), lambda x, sigma: -x.square().sum(1), weight=0.0)
    >>> guided.set_timesteps(1); guided.step(torch.zeros(1, 2), 0, torch.ones(1, 2)).pred_original_sample
    tensor([[1., 1.]])
    """
    family = scheduler_family("wrap_scheduler", scheduler)
    if hasattr(type(scheduler), "_refine_hook"):
        raise ValueError(
            f"wrap_scheduler: this {family} is guided already; {family}.from_config(scheduler.config) is a plain one"
        )
    guide, weight = guide_and_weight(discriminator, weight, options)
    hook = _Hook(guide, weight, positive("wrap_scheduler", "latent_scale", latent_scale))
    wrapped = copy.deepcopy(scheduler)
    wrapped.__class__ = _guided_class(type(scheduler), family, hook)
    wrapped.discriminator_extra = discriminator_extra
    hook.watch = Watch(
        wrapped,
        f"wrap_scheduler: a wrapped {family} never took a step, so nothing was guided. A pipeline that builds its "
        "scheduler anew, as DDIMPipeline does, drops the wrapper: wrap after the pipeline is made, "
        "pipe.scheduler = wrap_scheduler(pipe.scheduler, discriminator)",
    )
    return wrapped


def _guided_class(host: Any, family: str, hook: _Hook) -> type:
    """A subclass of the scheduler's class, bound to one hook: what its from_config makes is guided too."""

    class Guided(host):  # type: ignore[misc]
        _refine_hook = hook
        _guided_steps = 0

        @property
        def guide(self) -> Guide:
            return hook.guide

        @property
        def discriminator_extra(self) -> Mapping[str, Any] | Callable[[Any], Any]:
            return hook.extra

        @discriminator_extra.setter
        def discriminator_extra(self, extra: Mapping[str, Any] | Callable[[Any], Any] | None) -> None:
            if extra is not None and not callable(extra) and not isinstance(extra, Mapping):
                got = type(extra).__name__
                raise TypeError(f"wrap_scheduler: discriminator_extra must be a dict or a function, got {got}")
            hook.extra = {} if extra is None else extra

        # Pipelines look for arguments in these signatures: wraps shows the scheduler's own.
        @functools.wraps(host.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            hook.guide.finish()
            super().set_timesteps(*args, **kwargs)
            self._guided_steps = 0
            check_range("wrap_scheduler", hook.guide, self, family, hook.latent_scale)

        @functools.wraps(host.step)
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("per_token_timesteps") is not None:
                raise ValueError("wrap_scheduler: per_token_timesteps are not supported: one noise level per sample")
            model_output = hook.refine(self, family, model_output, timestep, sample)
            result = super().step(model_output, timestep, sample, *args, **kwargs)
            self._guided_steps += 1
            if self._guided_steps == len(self.timesteps):
                hook.guide.finish()
            return result

    # Pipelines save a scheduler by the name and module of its class: the plain one is what can be loaded.
    Guided.__name__, Guided.__module__ = host.__name__, host.__module__
    Guided.__qualname__ = f"wrap_scheduler({host.__name__})"
    return Guided
