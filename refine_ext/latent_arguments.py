"""Arguments of the samplers in latent space: checked, and brought into the form that their loops need."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import check_floating, check_seed, whole
from .divergence import divergences, parse_divergence

Schedule = float | Sequence[float] | Tensor | Callable[[int], float]


def check_start(function: str, z: Tensor, steps: int, seed: int | Tensor | None) -> tuple[Tensor, int, int | Tensor]:
    check_floating(function, "z", z)
    if z.dim() < 2:
        raise ValueError(f"{function}: z must be [B, ...] with at least 2 dimensions, got {list(z.shape)}")
    if seed is None:
        # On the device, where no step has to wait for it.
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=z.device)
    elif isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape not in ((), (z.shape[0],)) or seed.device != z.device:
            raise ValueError(
                f"{function}: seed must be an int, or int64 [{z.shape[0]}] on {z.device}, "
                f"got {seed.dtype} {list(seed.shape)} on {seed.device}"
            )
    else:
        seed = check_seed(function, seed)
    return z.detach(), whole(function, "steps", steps, 1), seed


def schedule_of(
    function: str, argument: str, value: Schedule, steps: int, *, least: float, exclusive: bool = False
) -> list[float]:
    """One number a step, all known before the first one: nothing is read from the device on the way."""
    if isinstance(value, Tensor):
        value = value.detach().tolist()
    if callable(value):
        numbers = [value(k) for k in range(steps)]
    elif isinstance(value, (int, float)):
        numbers = [value] * steps
    else:
        try:
            numbers = list(value)
        except TypeError:
            raise TypeError(
                f"{function}: {argument} must be a number, {steps} numbers or a function of the step, "
                f"got {type(value).__name__}"
            ) from None
        if len(numbers) != steps:
            raise ValueError(
                f"{function}: {argument} must have one number for each of {steps} steps, got {len(numbers)}"
            )
    for k, number in enumerate(numbers):
        if not least <= float(number) < math.inf or (exclusive and number == least):
            bound = "above" if exclusive else "at least"
            raise ValueError(f"{function}: {argument} must be finite and {bound} {least:g}, got {number} at step {k}")
    return [float(number) for number in numbers]


def check_flow(function: str, divergence: str) -> None:
    if divergence == "logD":
        return
    try:
        parse_divergence(function, divergence)
    except ValueError as error:
        if isinstance(divergence, str) and divergence.partition(":")[0] in divergences():
            raise
        raise ValueError(f"{error} (or logD)") from None


def divergence_read_by(function: str, discriminator: Any, divergence: str, kind: str | None) -> str:
    """The divergence that h is read by, which matters to a variational output only."""
    if (kind or getattr(discriminator, "kind", "logit")) != "variational":
        return "kl"
    own = getattr(discriminator, "divergence", divergence)
    if own == "logD":
        raise ValueError(
            f"{function}: a variational output is read by the divergence that the discriminator was trained with, "
            "which logD is not; give the discriminator an attribute divergence"
        )
    return own


def check_batch_size(function: str, batch_size: int | None) -> int | None:
    return None if batch_size is None else whole(function, "batch_size", batch_size, 1)
