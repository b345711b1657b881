"""A discriminator as a guide: its output and gradient at a noise level, whatever mode torch is in."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .divergence import KINDS, parse_divergence
from .guidance import guidance_factor

# A batch of logits this large that all lie in [0, 1] is one of probabilities.
_ENOUGH_FOR_PROBABILITIES = 16


def refuse_probability_layer(function: str, discriminator: Callable[..., Tensor]) -> None:
    """Raise if the discriminator is a module whose last layer makes probabilities."""
    last = list(discriminator.modules())[-1] if isinstance(discriminator, nn.Module) else None
    if isinstance(last, (nn.Sigmoid, nn.Softmax)):
        raise ValueError(
            f"{function}: discriminator ends in {type(last).__name__} and so returns probabilities; give its logits "
            "(the output before that layer, or torch.logit of it, clipped as you choose)"
        )


def refuse_probabilities(function: str, h: Tensor) -> None:
    """Raise if a batch of outputs looks like probabilities, warn if it is small; waits for the device."""
    if bool(((h >= 0) & (h <= 1)).all()) and float(h.amax() - h.amin()) > 0:
        message = f"{function}: every output of the discriminator is in [0, 1]: are these probabilities, not logits?"
        if h.numel() >= _ENOUGH_FOR_PROBABILITIES:
            raise ValueError(message + " (check=False if they are logits)")
        warnings.warn(message, stacklevel=5)


@dataclass(frozen=True)
class VPSchedule:
    """The variance-preserving diffusion dx = -beta x / 2 dt + sqrt(beta) dW, beta = beta_min + t (beta_max - beta_min).

    A state x of noise level sigma around its data (x = x_0 + sigma eps) is the state ``mu x`` of this diffusion at
    time ``tau``:

    ``tau = (-beta_min + sqrt(beta_min^2 + 2 (beta_max - beta_min) log(1 + sigma^2))) / (beta_max - beta_min)``,
    ``mu = 1 / sqrt(1 + sigma^2)``.

    Source: Song et al. 2021; Kim et al. 2022, appendix.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def time(self, sigma: Tensor) -> Tensor:
        """tau of the noise level sigma."""
        slope = self.beta_max - self.beta_min
        twice_integral = 2.0 * torch.log1p(sigma.square())
        # The root as a quotient: the difference in the formula above cancels for small sigma.
        return twice_integral / (self.beta_min + torch.sqrt(self.beta_min**2 + slope * twice_integral))

    def sigma(self, time: Tensor) -> Tensor:
        """The noise level of time tau."""
        integral = self.beta_min * time + 0.5 * (self.beta_max - self.beta_min) * time.square()
        return torch.sqrt(torch.expm1(integral))


@dataclass(frozen=True)
class GuideOutput:
    """h ``[B]`` and ``gradient`` = its gradient in x, shaped as x."""

    h: Tensor
    gradient: Tensor


class Guide:
    """What a discriminator adds to the score of a diffusion: ``w c(h - nu) grad h`` (``w grad h`` for a logit).

    Args:
        discriminator: ``(x, sigma, **extra) -> h[B]`` or ``[B, 1]``, differentiable in x. x is ``x_0 + sigma eps``.
        weight: w, a number, a ``[B]`` tensor, or a function of the ``[B]`` noise levels.
        kind, divergence, shift: of the output, as in :func:`refine_ext.density_ratio`; shift may be a function of the
            ``[B]`` noise levels. None: what the discriminator has under that name, else "logit", "kl" and 0.
        schedule: a :class:`VPSchedule` if the discriminator takes ``(mu x, tau)`` instead of ``(x, sigma)``.
        sigma_min, sigma_max: noise levels outside get no guidance. None: the discriminator's own range, if it has one.
        check: look at the values of the first call, and for NaN in every call (on CUDA when :meth:`finish` is called).

    Raises:
        TypeError, ValueError: see :meth:`__call__`.

    Source: Kim et al. 2022, eq. 8; Husain, De Bortoli and Nock 2026 for f-divergences.
    """

    def __init__(
        self,
        discriminator: Callable[..., Tensor],
        *,
        weight: float | Tensor | Callable[[Tensor], Tensor] = 1.0,
        kind: str | None = None,
        divergence: str | None = None,
        shift: float | Tensor | Callable[[Tensor], Tensor] | None = None,
        schedule: VPSchedule | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        check: bool = True,
    ) -> None:
        if not callable(discriminator):
            raise TypeError(f"Guide: discriminator must be callable as (x, sigma), got {type(discriminator).__name__}")
        self.discriminator = discriminator
        self.weight = weight
        self.kind = kind or getattr(discriminator, "kind", "logit")
        self.divergence = divergence or getattr(discriminator, "divergence", "kl")
        if self.kind not in KINDS:
            raise ValueError(f"Guide: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        parse_divergence("Guide", self.divergence, self.kind)
        self.shift = getattr(discriminator, "shift", 0.0) if shift is None else shift
        self.schedule = schedule
        trained = [getattr(discriminator, name, None) for name in ("sigma_min", "sigma_max")]
        self.sigma_min, self.sigma_max = self._range([sigma_min, sigma_max], trained)
        self.check = check
        self.calls = 0
        self._first_bad: Tensor | None = None  # the noise level of the first NaN, on the device; +inf for none
        refuse_probability_layer("Guide", discriminator)

    @staticmethod
    def _range(asked: list[float | None], trained: list[float | None]) -> tuple[float, float]:
        low = asked[0] if asked[0] is not None else trained[0] or 0.0
        high = asked[1] if asked[1] is not None else (math.inf if trained[1] is None else trained[1])
        if not 0.0 <= low < high:
            raise ValueError(f"Guide: need 0 <= sigma_min < sigma_max, got {low} and {high}")
        for name, value, bound, outside in (
            ("sigma_min", asked[0], trained[0], lambda v, b: v < b),
            ("sigma_max", asked[1], trained[1], lambda v, b: v > b),
        ):
            if value is not None and bound is not None and outside(value, bound):
                raise ValueError(f"Guide: {name} = {value:g} is outside the discriminator's training range, {bound:g}")
        return low, high

    @classmethod
    def of(cls, discriminator: Guide | Callable[..., Tensor], **options: Any) -> Guide:
        """The guide itself, or one made of a discriminator."""
        if not isinstance(discriminator, cls):
            return cls(discriminator, **options)
        given = sorted(name for name, value in options.items() if value is not None)
        if given:
            raise ValueError(f"{', '.join(given)}: give these to the Guide, which is already made")
        return discriminator

    def __call__(
        self, x: Tensor, sigma: float | Tensor, *, alpha: float | Tensor = 1.0, **extra: Any
    ) -> GuideOutput:
        """The discriminator's output and its gradient in x, for x = alpha x_0 + sigma eps.

        Works under ``no_grad`` and ``inference_mode``; the result is detached.

        Args:
            x: ``[B, ...]`` states.
            sigma, alpha: noise and signal level, numbers or ``[B]``.
            extra: handed to the discriminator (class labels, prompts).

        Raises:
            ValueError: the output's shape, NaN (with the noise level), no gradient to x, probabilities.
        """
        batch = x.shape[0]
        levels = self._rows(sigma, x), self._rows(alpha, x)
        ratio = levels[0] / levels[1]
        if self.schedule is None:
            scale, time = 1.0 / levels[1], ratio
        else:
            time = self.schedule.time(ratio)
            scale = torch.rsqrt(1.0 + ratio.square()) / levels[1]
        scale = scale.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        time = time.to(x.dtype)

        def output(state: Tensor) -> Tensor:
            h = self.discriminator(state * scale, time, **extra)
            if not isinstance(h, Tensor):
                raise TypeError(f"Guide: discriminator must return a tensor of [{batch}] outputs, got {type(h).__name__}")
            if h.shape not in ((batch,), (batch, 1)):
                raise ValueError(f"Guide: discriminator must return [{batch}] or [{batch}, 1], got {list(h.shape)}")
            return h.reshape(batch)

        if torch.compiler.is_compiling():
            h, pullback = torch.func.vjp(output, x)
            (gradient,) = pullback(torch.ones_like(h))
        else:
            # Inference tensors cannot be saved for a backward pass; their clones, made here, can.
            with torch.inference_mode(False), torch.enable_grad():
                extra = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in extra.items()}
                scale, time, ratio = (v.clone() if v.is_inference() else v for v in (scale, time, ratio))
                state = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
                h = output(state)
                gradient = self._gradient(h, state)
            h = h.detach()
            if self.check:
                self._look(h, gradient, ratio)
        self.calls += 1
        return GuideOutput(h, gradient)

    def factor(
        self,
        h: Tensor,
        sigma: float | Tensor,
        *,
        parametrization: str = "score",
        alpha: float | Tensor = 1.0,
        weight: float | Tensor | None = None,
    ) -> Tensor:
        """``[B]`` factors of the gradient, with the weight, the parametrisation's scale and the range of noise levels."""
        levels, signal = self._rows(sigma, h), self._rows(alpha, h)
        w = self.weight(levels / signal) if callable(self.weight) else self.weight
        return guidance_factor(
            h,
            divergence=self.divergence,
            kind=self.kind,
            shift=self.shift(levels / signal) if callable(self.shift) else self.shift,
            weight=w if weight is None else w * weight,
            sigma=levels,
            alpha=signal,
            parametrization=parametrization,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
        )

    def finish(self) -> None:
        """Raise if the discriminator made NaN since the last call; waits for the device.

        Raises:
            ValueError: names a noise level at which it did.
        """
        bad, self._first_bad = self._first_bad, None
        if bad is not None and math.isfinite(level := bad.item()):
            raise ValueError(f"Guide: discriminator returned NaN, or its gradient was, at sigma = {level:.6g}")

    @staticmethod
    def _rows(level: float | Tensor, like: Tensor) -> Tensor:
        """``[B]`` float64 levels."""
        if isinstance(level, Tensor):
            return level.to(device=like.device, dtype=torch.float64).reshape(-1).expand(like.shape[0])
        return torch.full((like.shape[0],), float(level), dtype=torch.float64, device=like.device)

    @staticmethod
    def _gradient(h: Tensor, state: Tensor) -> Tensor:
        if h.requires_grad:
            (gradient,) = torch.autograd.grad(h.sum(), state, allow_unused=True)
            if gradient is not None:
                return gradient
        raise ValueError("Guide: discriminator's output has no gradient in x; is it computed under no_grad or detached?")

    def _look(self, h: Tensor, gradient: Tensor, ratio: Tensor) -> None:
        inside = (ratio >= self.sigma_min) & (ratio <= self.sigma_max)
        bad = (h.isnan() | gradient.flatten(1).isnan().any(1)) & inside
        first = torch.where(bad, ratio, math.inf).amin()
        if self._first_bad is not None:
            first = torch.minimum(first, self._first_bad)
        self._first_bad = first
        if h.device.type == "cpu":
            self.finish()
        if self.calls == 0:
            refuse_probabilities("Guide", h)
