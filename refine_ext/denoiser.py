"""Denoisers refined by a discriminator: the calling conventions of k-diffusion, EDM and ComfyUI."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .arguments import positive
from .guidance import guided_step
from .guide import Guide, PerSample

# What the discriminator takes besides (x, sigma): names of the host's arguments, a function of them, or fixed ones.
Selection = Sequence[str] | Callable[[Mapping[str, Any]], Mapping[str, Any]] | Mapping[str, Any]


def guide_and_weight(
    discriminator: Guide | Callable[..., Tensor], weight: PerSample, options: Mapping[str, Any]
) -> tuple[Guide, float | Tensor]:
    """The guide of an adapter and the weight beside its own: a function of the noise levels is the guide's to call."""
    if callable(weight):
        return Guide.of(discriminator, weight=weight, **options), 1.0
    return Guide.of(discriminator, **options), weight


def refined_prediction(
    function: str,
    guide: Guide,
    prediction: Tensor,
    x: Tensor,
    sigma: float | Tensor,
    *,
    parametrization: str,
    alpha: float | Tensor = 1.0,
    latent_scale: float = 1.0,
    weight: float | Tensor = 1.0,
    extra: Mapping[str, Any] | None = None,
) -> Tensor:
    """prediction + factor * gradient, at x = alpha x_0 + sigma eps, where the discriminator knows x_0 / latent_scale.

    A latent that the host multiplied by s is, for the discriminator, a signal of alpha s. The factors of a denoised
    prediction and of a velocity are 1 / alpha of the host's own alpha, hence the weight.
    """
    if prediction.shape != x.shape:
        raise ValueError(
            f"{function}: the model's prediction must have the shape of its input, {list(x.shape)}, "
            f"got {list(prediction.shape)}"
        )
    signal = alpha * latent_scale
    if (
        isinstance(sigma, float)
        and isinstance(signal, float)
        and not guide.covers(sigma / signal if signal else math.inf)
    ):
        return prediction  # known without the device: the discriminator need not run
    output = guide(x, sigma, alpha=signal, **(extra or {}))
    if parametrization != "noise":
        weight = weight * latent_scale
    factor = guide.factor(output.h, sigma, parametrization=parametrization, alpha=signal, weight=weight)
    return guided_step(prediction, [output.gradient.to(prediction.dtype)], [1.0, 1.0], factor=factor)


def _select(selection: Selection, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    if callable(selection):
        return selection(arguments)
    if isinstance(selection, Mapping):
        return selection
    return {name: arguments[name] for name in selection if name in arguments}


def _check_selection(function: str, selection: Selection) -> Selection:
    if not callable(selection) and (isinstance(selection, str) or not all(isinstance(name, str) for name in selection)):
        raise TypeError(
            f"{function}: discriminator_extra must be names of arguments, a function or a dict, got {selection!r}"
        )
    return selection


class RefinedDenoiser(nn.Module):
    """A denoiser guided by a discriminator: ``D'(x; sigma) = D(x; sigma) + w sigma^2 c(h - nu) grad h``.

    Called as k-diffusion calls a model, ``model(x, sigma, **extra)``, and as EDM and EDM2 call a network,
    ``net(x, sigma, class_labels, **extra)``; so it goes wherever the denoiser went. What it does not have itself
    (sigma_min, sigma_max, round_sigma, img_resolution, label_dim, ...) is the denoiser's.

    Args:
        net: ``(x, sigma, **extra) -> denoised``, x = x_0 + sigma eps of ``[B, ...]``; of a tuple the first is refined.
        discriminator: ``(x, sigma, **extra) -> h[B]``, or a :class:`Guide`.
        weight: w, a number, a ``[B]`` tensor, or a function of the ``[B]`` noise levels; times the Guide's own.
        discriminator_extra: keyword arguments for the discriminator: the names of those of a call (class_labels among
            them) that it gets too, or a function from the dict of all of them to the dict it gets, or that dict.
        options: of :class:`Guide`: kind, divergence, shift, schedule, sigma_min, sigma_max, dtype, check. On CUDA its
            ``guide.finish()``, after a run, says whether the discriminator made NaN.

    Returns (forward):
        The refined denoised x_0, in the denoiser's dtype; sigma may be a number, 0-dim, ``[B]`` or ``[B, 1, 1, 1]``.

    Raises:
        TypeError: a net that cannot be called, discriminator_extra that is none of these.
        ValueError: a denoised x_0 of another shape than x; everything :class:`Guide` refuses.

    Source: Kim et al. 2022, eq. 8, for a denoiser (Karras et al. 2022, eq. 3).

    >>> import torch, refine_ext as rx
    >>> net = rx.RefinedDenoiser(lambda x, sigma: x / (1 + sigma**2), lambda x, sigma: x.sum(1))
    >>> net(torch.ones(1, 2), torch.tensor(1.0))  # 1/2 + sigma^2
    tensor([[1.5000, 1.5000]])
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        discriminator: Guide | Callable[..., Tensor],
        weight: PerSample = 1.0,
        *,
        discriminator_extra: Selection = (),
        **options: Any,
    ) -> None:
        super().__init__()
        if not callable(net):
            raise TypeError(f"RefinedDenoiser: net must be callable as (x, sigma), got {type(net).__name__}")
        self.net = net
        self.guide, self.weight = guide_and_weight(discriminator, weight, options)
        # A submodule, if it is a module: it moves to the device that this one moves to.
        self.discriminator = self.guide.discriminator
        self.discriminator_extra = _check_selection("RefinedDenoiser", discriminator_extra)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "net":  # not there yet, while it is copied
                raise
            return getattr(self.net, name)

    def forward(self, x: Tensor, sigma: float | Tensor, class_labels: Tensor | None = None, **extra: Any) -> Any:
        # Networks without classes do not know the argument.
        if class_labels is not None:
            extra["class_labels"] = class_labels
        output = self.net(x, sigma, **extra)
        denoised, others = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        chosen = _select(self.discriminator_extra, extra)
        refined = refined_prediction(
            "RefinedDenoiser",
            self.guide,
            denoised,
            x,
            sigma,
            parametrization="denoised",
            weight=self.weight,
            extra=chosen,
        )
        return refined if others is None else (refined, *others)


def post_cfg(
    discriminator: Guide | Callable[..., Tensor],
    weight: PerSample = 1.0,
    *,
    flow: bool = False,
    latent_scale: float = 1.0,
    discriminator_extra: Selection = (),
    **options: Any,
) -> Callable[[Mapping[str, Any]], Tensor]:
    """A ComfyUI post-CFG function: ``denoised' = denoised + w (sigma^2 / alpha) c(h - nu) grad h``.

    ``model.set_model_sampler_post_cfg_function(post_cfg(discriminator))`` guides every sampler of ComfyUI. alpha is 1,
    or ``1 - sigma`` for flow matching.

    Args:
        discriminator: ``(x, sigma, **extra) -> h[B]`` for x = x_0 + sigma eps, or a :class:`Guide`.
        weight: w, a number, a ``[B]`` tensor, or a function of the ``[B]`` noise levels; times the Guide's own.
        flow: the model is one of flow matching (SD3, Flux), x = (1 - sigma) x_0 + sigma eps.
        latent_scale: what the VAE's latents were multiplied by for the model (0.18215 for SD1), if the discriminator
            knows the unscaled ones.
        discriminator_extra: keyword arguments for the discriminator: the names of items of the function's dict, or a
            function from that dict to the dict it gets, or that one.
        options: of :class:`Guide`: kind, divergence, shift, schedule, sigma_min, sigma_max, dtype, check.

    Returns:
        A function from the dict with "denoised", "sigma", "input" (and whatever else) to the refined denoised.

    Raises:
        TypeError, ValueError: what is wrong with an argument; the function's own: a dict without these items.

    Source: Kim et al. 2022, eq. 8.

    >>> import torch, refine_ext as rx
    >>> refine = rx.post_cfg(lambda x, sigma: x.sum(1), weight=0.5)
    >>> refine({"denoised": torch.zeros(1, 2), "sigma": torch.tensor([2.0]), "input": torch.ones(1, 2)})
    tensor([[2., 2.]])
    """
    guide, w = guide_and_weight(discriminator, weight, options)
    latent_scale = positive("post_cfg", "latent_scale", latent_scale)
    _check_selection("post_cfg", discriminator_extra)

    def refine(args: Mapping[str, Any]) -> Tensor:
        missing = [name for name in ("denoised", "sigma", "input") if name not in args]
        if missing:
            raise ValueError(f"post_cfg: args must have denoised, sigma and input, got no {', '.join(missing)}")
        return refined_prediction(
            "post_cfg",
            guide,
            args["denoised"],
            args["input"],
            args["sigma"],
            parametrization="denoised",
            alpha=1.0 - args["sigma"] if flow else 1.0,
            latent_scale=latent_scale,
            weight=w,
            extra=_select(discriminator_extra, args),
        )

    return refine
