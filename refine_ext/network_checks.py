"""What a sampler asks of a network that it is handed: logits that are logits, the same function at every call."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

# Autograd's names of what makes probabilities, and of what leaves them probabilities.
_PROBABILITIES = ("SigmoidBackward0", "SoftmaxBackward0")
_RESHAPING = ("View", "Reshape", "Squeeze", "Unsqueeze", "Select", "Slice", "Alias", "ToCopy", "Clamp", "Clone")
_ENOUGH_TO_TELL = 16


def refuse_probability_layer(function: str, discriminator: Any) -> None:
    """Raise where the last layer of a discriminator of kind "logit" makes probabilities."""
    last = discriminator
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    if isinstance(last, (nn.Sigmoid, nn.Softmax)):
        raise _probabilities(function, f"ends in {type(last).__name__}")


def refuse_probabilities(function: str, h: Tensor) -> None:
    """Raise where the outputs of a discriminator of kind "logit" are those of a sigmoid; h with its graph."""
    if (made := _made_by(h)) in _PROBABILITIES:
        raise _probabilities(function, f"returns a {made.removesuffix('Backward0').lower()}")


def warn_of_unit_interval(function: str, h: Tensor, stacklevel: int) -> None:
    """Warn where many outputs of a discriminator of kind "logit" all lie in [0, 1]; waits for the device."""
    if h.numel() >= _ENOUGH_TO_TELL and bool(((h > 0) & (h < 1)).all()) and float(h.mean()) > 0.1:
        warnings.warn(
            f"{function}: all {h.numel()} outputs of the discriminator are between 0 and 1; are they probabilities? "
            "Logits are needed",
            stacklevel=stacklevel + 1,
        )


def warn_of_training(function: str, argument: str, network: Any, stacklevel: int) -> None:
    """Warn where a network is in a mode in which its output is random or depends on the batch."""
    for module in network.modules() if isinstance(network, nn.Module) else ():
        if module.training and isinstance(module, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)):
            warnings.warn(
                f"{function}: {argument} is in training mode and has {type(module).__name__}, which makes its output "
                "random or dependent on the batch; call its eval()",
                stacklevel=stacklevel + 1,
            )
            return


def one_output_each(function: str, argument: str, h: Any, batch: int) -> Tensor:
    """The outputs ``[B]`` of a network, which may be ``[B, 1]``.

    Raises:
        TypeError: no tensor; ValueError: any other shape.
    """
    if not isinstance(h, Tensor):
        raise TypeError(f"{function}: {argument} must return a tensor of [{batch}] outputs, got {type(h).__name__}")
    if h.shape not in ((batch,), (batch, 1)):
        raise ValueError(f"{function}: {argument} must return [{batch}] or [{batch}, 1], got {list(h.shape)}")
    return h.reshape(batch)


class FirstBad:
    """The lowest place (a step, a noise level) at which something was bad, kept on the device: noting does not wait."""

    def __init__(self) -> None:
        self._place: Tensor | None = None  # +inf for none

    def note(self, bad: Tensor, place: Tensor | float) -> None:
        first = torch.where(bad, place, math.inf).amin()
        self._place = first if self._place is None else torch.minimum(first, self._place)

    def take(self) -> float | None:
        """That place, once, or None; waits for the device. None while a CUDA graph is captured, which cannot wait."""
        if self._place is None or (self._place.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        place, self._place = float(self._place), None
        return place if math.isfinite(place) else None


def _made_by(h: Tensor) -> str:
    """The name of the operation that computed the values, behind those that only reshape or convert them."""
    node = h.grad_fn
    while node is not None and node.name().startswith(_RESHAPING) and node.next_functions:
        node = node.next_functions[0][0]
    return "" if node is None else node.name()


def _probabilities(function: str, found: str) -> ValueError:
    return ValueError(
        f"{function}: discriminator {found}: these are probabilities, logits are needed: the output before that layer, "
        "or torch.logit of it, clipped as you choose (check=False if they are logits)"
    )
