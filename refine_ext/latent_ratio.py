"""The log density ratio of a generator's samples as a function of their latents, with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .density_ratio import density_ratio
from .divergence import KINDS, parse_divergence
from .network_checks import (
    FirstBad,
    one_output_each,
    refuse_probabilities,
    refuse_probability_layer,
    warn_of_training,
    warn_of_unit_interval,
)


class Evaluation(NamedTuple):
    """At latents z: samples x = G(z), ``log_ratio`` [B] = log r(x), and its gradient in z, shaped as z.

    x and the gradient are empty where they were not asked for.
    """

    x: Tensor
    log_ratio: Tensor
    gradient: Tensor


class LatentRatio:
    """z -> log r(G(z)) and its gradient, in batches of ``batch_size`` latents, for a discriminator of any kind.

    Args:
        function: whose errors these are.
        generator: latents ``[B, ...]`` to samples ``[B, ...]``.
        discriminator: a :class:`refine_ext.Discriminator`, whose calibrated ``log_ratio`` is used, or any callable
            ``x -> h[B]`` or ``[B, 1]``.
        kind, divergence, shift: how h is read, as in :func:`refine_ext.density_ratio`.
        batch_size: latents that go through the networks at once; None for all.
        check: look at the values of the first batch for probabilities.
    """

    def __init__(
        self,
        function: str,
        generator: Callable[[Tensor], Tensor],
        discriminator: Callable[[Tensor], Tensor],
        *,
        kind: str | None,
        divergence: str,
        shift: float | Tensor | None,
        batch_size: int | None,
        check: bool,
    ) -> None:
        for argument, value in (("generator", generator), ("discriminator", discriminator)):
            if not callable(value):
                raise TypeError(f"{function}: {argument} must be callable, got {type(value).__name__}")
            warn_of_training(function, argument, value, stacklevel=3)
        self.function = function
        self.generator = generator
        self.discriminator = discriminator
        self.batch_size = batch_size
        self.calibrated = callable(getattr(discriminator, "log_ratio", None))
        if self.calibrated and not (kind is None and shift is None):
            raise ValueError(
                f"{function}: kind and shift must be left out for a discriminator with a log_ratio of its own, which "
                f"knows them; got kind={kind!r}, shift={shift!r}"
            )
        self.kind = kind if kind is not None else getattr(discriminator, "kind", "logit")
        if self.kind not in KINDS:
            raise ValueError(f"{function}: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        self.divergence = divergence
        parse_divergence(function, divergence, self.kind)
        self.shift = shift if shift is not None else getattr(discriminator, "shift", 0.0)
        if not isinstance(self.shift, (int, float, Tensor)) or (isinstance(self.shift, Tensor) and self.shift.dim()):
            raise TypeError(f"{function}: shift must be a number or a 0-dim tensor, got {type(self.shift).__name__}")
        self.unchecked = check and not self.calibrated and self.kind == "logit"
        if self.unchecked:
            refuse_probability_layer(function, discriminator)
        self.bad = FirstBad()  # by step

    def __call__(self, z: Tensor, step: int, *, gradient: bool = True, keep_samples: bool = True) -> Evaluation:
        """log r(G(z)), with its gradient and with the samples if these are wanted. Works under ``no_grad``.

        Raises:
            TypeError, ValueError: a network's output is no tensor, of a wrong shape, without a gradient or NaN.
        """
        samples, ratios, outputs, slopes = [], [], [], []
        for rows in z.split(self.batch_size) if self.batch_size else (z,):
            x, log_ratio, h, slope = self._batch(rows, gradient)
            samples.append(x if keep_samples else x[:0])
            ratios.append(log_ratio)
            outputs.append(h)
            slopes.append(slope)
        if self.unchecked:
            self.unchecked = False
            warn_of_unit_interval(self.function, torch.cat(outputs), stacklevel=3)
        result = Evaluation(torch.cat(samples), torch.cat(ratios), torch.cat(slopes))
        self._look(result, step)
        return result

    def finish(self) -> None:
        """Raise if any step so far had NaN or an infinite gradient; waits for the device.

        Raises:
            ValueError: names the first such step.
        """
        if (step := self.bad.take()) is not None:
            cause = (
                "the discriminator or the generator returns NaN, or an output outside the domain of f*"
                if step == 0
                else "the steps may be too large"
            )
            raise ValueError(
                f"{self.function}: log r(G(z)) is NaN or its gradient infinite at step {step:.0f}: {cause}"
            )

    def _look(self, result: Evaluation, step: int) -> None:
        bad = result.log_ratio.isnan().any() | ~result.gradient.isfinite().all()
        self.bad.note(bad, float(step))
        if not bad.is_cuda:
            self.finish()

    def _batch(self, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = z.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            x = self._sample(z)
            h = self._output(x)
            if self.unchecked:
                refuse_probabilities(self.function, h)
            log_ratio = self._log_ratio(h)
        slope = self._gradient(log_ratio, x, z) if gradient else z[:0]
        return x.detach(), log_ratio.detach(), h.detach(), slope

    def _sample(self, z: Tensor) -> Tensor:
        x = self.generator(z)
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.function}: generator must return a tensor, got {type(x).__name__}")
        if x.dim() == 0 or x.shape[0] != z.shape[0]:
            raise ValueError(
                f"{self.function}: generator must return [{z.shape[0]}, ...] for {z.shape[0]} latents, "
                f"got {list(x.shape)}"
            )
        if z.requires_grad and not x.requires_grad:
            raise self._no_gradient("generator", "latents", x)
        return x

    def _output(self, x: Tensor) -> Tensor:
        h = self.discriminator.log_ratio(x) if self.calibrated else self.discriminator(x)  # type: ignore[attr-defined]
        h = one_output_each(self.function, "discriminator", h, x.shape[0])
        if x.requires_grad and not h.requires_grad:
            raise self._no_gradient("discriminator", "samples", h)
        return h

    def _log_ratio(self, h: Tensor) -> Tensor:
        if self.calibrated:
            return h
        if self.kind == "logit":
            return h - self.shift
        # One group a sample: another one's NaN is not its own.
        ratio = density_ratio(h.unsqueeze(1), self.divergence, dim=1, shift=self._shifts(h), nan_policy="propagate")
        return ratio.log_ratio.squeeze(1)

    def _shifts(self, h: Tensor) -> Tensor:
        if isinstance(self.shift, Tensor):
            return self.shift.to(device=h.device, dtype=torch.float64).expand(h.shape)
        return torch.full(h.shape, float(self.shift), dtype=torch.float64, device=h.device)

    def _gradient(self, log_ratio: Tensor, x: Tensor, z: Tensor) -> Tensor:
        ones = torch.ones_like(log_ratio)
        slope, reached = torch.autograd.grad(log_ratio, (z, x), ones, allow_unused=True)
        if reached is None:
            raise self._no_gradient("discriminator", "samples", log_ratio)
        if slope is None:
            raise self._no_gradient("generator", "latents", x)
        return slope

    def _no_gradient(self, argument: str, inputs: str, output: Tensor) -> ValueError:
        cause = "is it computed under no_grad, detached, or made of indices?"
        if not output.is_floating_point():
            cause = f"it is {output.dtype}"
        return ValueError(f"{self.function}: {argument}'s output has no gradient in its {inputs}; {cause}")
