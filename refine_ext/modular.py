"""Discriminator guidance as a guider of diffusers' modular pipelines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

try:
    import diffusers
    from diffusers.guiders.guider_utils import BaseGuidance
except ImportError as error:
    raise ImportError(
        'refine_ext.DiscriminatorGuidance needs diffusers 0.36 or later: pip install "refine-ext[diffusers]"'
    ) from error

from .arguments import positive
from .denoiser import guide_and_weight, refined_prediction
from .guide import Guide, PerSample
from .schedulers import Watch, check_range, noise_levels, parametrization, scheduler_family

_PLAIN = (bool, int, float, str, type(None))


class DiscriminatorGuidance(BaseGuidance):
    """A modular diffusers guider: another guider's prediction, ``+ factor c(h - nu) grad h``.

    ``pipe.update_components(guider=DiscriminatorGuidance(discriminator, pipe.scheduler))``. The factor is that of
    :func:`refine_ext.wrap_scheduler`, for what the scheduler's model predicts. A guider is not shown x_t: this one
    takes it from the denoiser's own input, by a hook that the pipeline sets through ``prepare_models`` and removes
    through ``cleanup_models``. Of an input with more channels or tokens than the prediction, the first are x_t.

    Pipelines that change the guider's result (Qwen-Image rescales it), hand it denoised predictions (LTX-2), a list
    (Z-Image) or leave hooks out (Ideogram 4) are for :func:`refine_ext.wrap_scheduler`, which guides any of them.

    Args:
        discriminator: ``(x, sigma, **extra) -> h[B]`` for x = x_0 + sigma eps, or a :class:`Guide`, on the pipeline's
            device.
        scheduler: the pipeline's own, of the classes that wrap_scheduler takes: it knows the noise levels.
        weight: w, a number, a ``[B]`` tensor, or a function of the ``[B]`` noise levels; times the Guide's own.
        guider: the guider whose prediction is refined. None: the conditional prediction alone.
        latent_scale: what the pipeline multiplied latents by, if the discriminator knows the unscaled ones.
        discriminator_extra: keyword arguments for the discriminator: a dict, or a function from the timestep to one.
        start, stop: the part of the steps that is guided, as fractions. The inner guider has its own.
        enabled: False: as the inner guider would.
        options: of :class:`Guide`: kind, divergence, shift, schedule, sigma_min, sigma_max, dtype, check.

    ``save_pretrained`` saves the settings and the inner guider;
    ``from_pretrained(path, discriminator=..., scheduler=...)`` is given again what no file can hold.

    Raises:
        ImportError: no diffusers.
        TypeError: a guider that is none, a scheduler that is not supported.
        ValueError: what wrap_scheduler and :class:`Guide` refuse; in a step, a denoiser's input that was not seen or
            does not fit, a scheduler that is not the pipeline's.

    Source: Kim et al. 2022, eq. 8.

    >>> import refine_ext as rx
    >>> from diffusers import ClassifierFreeGuidance, DDIMScheduler
    >>> guider = rx.DiscriminatorGuidance(lambda x, s: x.sum(1), DDIMScheduler(), guider=ClassifierFreeGuidance(3.0))
    >>> guider.num_conditions
    2
    """

    def __init__(
        self,
        discriminator: Guide | Callable[..., Tensor],
        scheduler: Any,
        weight: PerSample = 1.0,
        *,
        guider: BaseGuidance | None = None,
        latent_scale: float = 1.0,
        discriminator_extra: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        **options: Any,
    ) -> None:
        if guider is None:
            guider = diffusers.ClassifierFreeGuidance(guidance_scale=1.0)
        if not isinstance(guider, BaseGuidance):
            raise TypeError(f"DiscriminatorGuidance: guider must be one of diffusers', got {type(guider).__name__}")
        if type(guider).__name__ == "LTX2Guidance":
            raise TypeError("DiscriminatorGuidance: LTX2Guidance works on denoised predictions; use wrap_scheduler")
        self._input_predictions = guider._input_predictions
        super().__init__(start, stop, enabled)
        self.guider = guider
        self.scheduler = scheduler
        self.family = scheduler_family("DiscriminatorGuidance", scheduler)
        self.latent_scale = positive("DiscriminatorGuidance", "latent_scale", latent_scale)
        self.discriminator_extra = discriminator_extra
        self.guide, self.weight = guide_and_weight(discriminator, weight, options)
        self._sample: Tensor | None = None
        self._hook: Any = None
        self._last_index: tuple[int, int] | None = None
        self._watch = Watch(
            self,
            "DiscriminatorGuidance: a guider was never asked for a prediction, so nothing was guided; does the "
            "pipeline have a guider? pipe.update_components(guider=...) sets it",
        )
        settings = {
            "weight": weight,
            "latent_scale": latent_scale,
            "start": start,
            "stop": stop,
            "enabled": enabled,
            **options,
        }
        plain = {name: value for name, value in settings.items() if isinstance(value, _PLAIN)}
        self._given = {name: value for name, value in settings.items() if name not in plain}
        self._given |= {"discriminator": discriminator, "scheduler": scheduler}
        self.register_to_config(
            **plain,
            given_again=sorted(self._given),
            guider={
                "_class_name": type(guider).__name__,
                # Of the private items, _use_default_values would make an argument given by position its default.
                **{name: value for name, value in guider.config.items() if not name.startswith("_")},
            },
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A guider of saved settings, with the discriminator, the scheduler and any changes as keyword arguments."""
        missing = [name for name in config.get("given_again", ()) if name not in kwargs]
        if missing:
            raise ValueError(f"DiscriminatorGuidance: {', '.join(missing)} cannot be saved: give them again")
        settings = {k: v for k, v in config.items() if not k.startswith("_") and k != "given_again"}
        inner = settings.pop("guider", None)
        if "guider" not in kwargs and inner is not None:
            settings["guider"] = getattr(diffusers, inner["_class_name"]).from_config(dict(inner))
        made = cls(**{**settings, **kwargs})
        return (made, {}) if return_unused_kwargs else made

    def new(self, **kwargs: Any) -> DiscriminatorGuidance:
        """A copy with some settings changed."""
        self._watch.ran = True  # the copy is watched instead
        kept = {"discriminator_extra": self.discriminator_extra, "guider": copy.deepcopy(self.guider), **self._given}
        return self.from_config(self.config, **{**kept, **kwargs})

    def disable(self) -> None:
        super().disable()
        self.guider.disable()

    def enable(self) -> None:
        super().enable()
        self.guider.enable()

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self.guider.set_state(step, num_inference_steps, timestep)
        self._sample = None

    def prepare_inputs(self, data: Any) -> Any:
        return self.guider.prepare_inputs(data)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> Any:
        return self.guider.prepare_inputs_from_block_state(data, input_fields)

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        self.guider.prepare_models(denoiser)
        self._hook = denoiser.register_forward_pre_hook(self._see, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._hook.remove()
        self.guider.cleanup_models(denoiser)
        super().cleanup_models(denoiser)

    def _see(self, denoiser: nn.Module, args: tuple, kwargs: dict) -> None:
        self._sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))

    @property
    def is_conditional(self) -> bool:
        return self.guider.is_conditional

    @property
    def num_conditions(self) -> int:
        return self.guider.num_conditions

    def _guides_now(self) -> bool:
        if not self._enabled or self._num_inference_steps is None:
            return self._enabled
        first, last = (int(part * self._num_inference_steps) for part in (self._start, self._stop))
        return first <= self._step < last

    def forward(self, *args: Any, **predictions: Tensor) -> Any:
        self._watch.ran = True
        output = self.guider.forward(*args, **predictions)
        if self._guides_now():
            output = type(output)(**{**output, "pred": self._refined(output.pred)})
        if self._step == len(self.scheduler.timesteps) - 1:
            self.guide.finish()
        return output

    def _refined(self, prediction: Tensor) -> Tensor:
        x = _like(self._sample, prediction)
        if self._step == int(self._start * (self._num_inference_steps or 0)):
            check_range("DiscriminatorGuidance", self.guide, self.scheduler, self.family, self.latent_scale)
        alpha, sigma, norm = noise_levels(self.scheduler, self.family, self._timestep)
        self._check_scheduler()
        extra = self.discriminator_extra
        return refined_prediction(
            "DiscriminatorGuidance",
            self.guide,
            prediction,
            x,
            sigma / norm,
            parametrization=parametrization("DiscriminatorGuidance", self.scheduler),
            alpha=alpha / norm,
            latent_scale=self.latent_scale,
            weight=self.weight,
            extra=extra(self._timestep) if callable(extra) else extra,
        )

    def _check_scheduler(self) -> None:
        """A scheduler that stands still while the pipeline takes steps is not the pipeline's, and its levels are wrong.

        Those that are asked by timestep have no index, and need none."""
        index = getattr(self.scheduler, "step_index", None)
        if index is None:
            return
        if self._last_index is not None and self._last_index[0] < self._step and self._last_index[1] == index:
            raise ValueError(
                "DiscriminatorGuidance: its scheduler takes no steps; give it the one that the pipeline uses, "
                "after any change of pipe.scheduler"
            )
        self._last_index = (self._step, index)


def _like(sample: Any, prediction: Tensor) -> Tensor:
    """x_t: the leading channels or tokens of the denoiser's input."""
    if not isinstance(sample, Tensor):
        got = "nothing" if sample is None else f"a {type(sample).__name__}"
        raise ValueError(
            f"DiscriminatorGuidance: expected a tensor as the denoiser's first input, saw {got}; "
            "guide this pipeline by wrap_scheduler"
        )
    if sample.shape == prediction.shape:
        return sample
    rest = sample.shape[:1] + sample.shape[2:] == prediction.shape[:1] + prediction.shape[2:]
    if not (sample.dim() == prediction.dim() > 1 and rest and sample.shape[1] > prediction.shape[1]):
        raise ValueError(
            f"DiscriminatorGuidance: the denoiser's input {list(sample.shape)} does not fit its prediction "
            f"{list(prediction.shape)}; guide this pipeline by wrap_scheduler"
        )
    return sample[:, : prediction.shape[1]]
