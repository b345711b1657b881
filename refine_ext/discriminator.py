"""A trained discriminator: outputs, calibrated log-ratios, and its file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import discriminator_file
from ._library import usable_device
from .calibration import Calibration, FitReport, log_ratio_at_full_strength
from .networks import MLP, Features, LinearOnFeatures, RandomFourierFeatures, batch_output
from .samples import as_tensor


@dataclass
class Architecture:
    """What is needed to build the network again before its weights are read."""

    model: str
    shape: tuple[int, ...]
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    features: int = 0
    given_features: bool = False

    def build(self, *, model: nn.Module | None = None, features: Features | None = None):
        """The network with arbitrary weights.

        Raises:
            ValueError: the caller's module or features are needed and were not given.
        """
        width = math.prod(self.shape)
        if self.model == "mlp":
            return MLP(width, self.hidden, self.dropout)
        if self.model == "linear" and self.given_features:
            if features is None:
                raise ValueError(
                    "Discriminator.load: the file holds weights on features of your own; "
                    "give the same function as load(path, features=function)"
                )
            return LinearOnFeatures(features, self.features)
        if self.model == "linear":
            return LinearOnFeatures(RandomFourierFeatures(width, self.features), self.features)
        if model is None:
            raise ValueError(
                f"Discriminator.load: the file holds a module of your own ({self.model}); "
                "give one of the same architecture as load(path, model=module)"
            )
        return model


class Discriminator(nn.Module):
    """A network ``h`` with what turns its output into a calibrated, tempered log density ratio.

    ``log r_tau(x) = tau log r(x) - log E_fake[r^tau]``, ``r = (f*)'(h(x) - nu)`` for a variational
    output, ``log r = h(x) - nu`` for a logit. ``nu`` and the expectation come from generated
    samples held out of training, tau from :func:`refine_ext.fit_discriminator`'s guard.

    Attributes:
        kind: "variational" or "logit".
        divergence: the f-divergence's name.
        shift: ``nu``.
        temperature: ``tau``; may be set to any number in [0, 1].
        report: the :class:`FitReport` of the fit, or None.
        reference: ``[m]`` float64 full-strength log-ratios of held-out generated samples.

    Source: Husain, De Bortoli and Nock 2026 (refined model).

    >>> import torch, refine_ext as rx
    >>> disc = rx.fit_discriminator(torch.randn(60, 2) + 1, torch.randn(60, 2), progress=False)
    >>> (disc.kind, disc.log_ratio(torch.zeros(3, 2)).shape)
    ('variational', torch.Size([3]))
    """

    reference: Tensor

    def __init__(
        self,
        network: nn.Module,
        architecture: Architecture,
        calibration: Calibration,
        *,
        reference: Tensor,
        report: FitReport | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.architecture = architecture
        self.calibration = calibration
        self.report = report
        self.register_buffer("reference", reference.detach().double().clone())

    @property
    def kind(self) -> str:
        """ "variational" or "logit"."""
        return self.calibration.kind

    @property
    def divergence(self) -> str:
        """The f-divergence's name."""
        return self.calibration.divergence

    @property
    def shift(self) -> float:
        """The fixed shift ``nu``."""
        return self.calibration.shift

    @property
    def temperature(self) -> float:
        """The guard's ``tau``; setting it changes :meth:`log_ratio`."""
        return self.calibration.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"Discriminator: temperature must be in [0, 1], got {value}")
        self.calibration.temperature = float(value)

    @property
    def log_normalizer(self) -> float:
        """``log E_fake[r^tau]`` over the reference samples."""
        tempered = self.temperature * self.reference
        return float(torch.logsumexp(tempered, 0)) - math.log(len(self.reference))

    def forward(self, x: Tensor) -> Tensor:
        """The raw output ``[n]`` for a batch ``[n, ...]``."""
        return batch_output(self.network, x)

    def log_ratio(self, x: Any, *, batch_size: int | None = None) -> Tensor:
        """Normalised, tempered log density ratio of each sample.

        Args:
            x: ``[n, ...]`` array or tensor with the trained trailing shape, floating or uint8.
                Arrays are read in batches, so a memory map is never loaded as a whole. Gradients
                flow to a tensor that requires them (then in one batch).
            batch_size: samples a batch; by default what keeps a batch near 16 MB.

        Returns:
            ``[n]`` log-ratios on the discriminator's device, NaN where the sample has one.

        Raises:
            TypeError: not an array or tensor, or an unsupported dtype.
            ValueError: the trailing shape is not the trained one.
        """
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            self._check_shape("Discriminator.log_ratio", x)
            return self._tempered(self(x.to(self.reference.device)))
        parts = self._in_batches("Discriminator.log_ratio", x, batch_size, lambda block: self._tempered(self(block)))
        return torch.cat(parts) if parts else self.reference.new_zeros(0)

    def features(self, x: Any, *, batch_size: int | None = None) -> Tensor:
        """What the network's last, linear layer sees: random Fourier features, or the last hidden layer.

        Args:
            x: ``[n, ...]`` array or tensor with the trained trailing shape, floating or uint8; read in batches.
            batch_size: samples a batch; by default what keeps a batch near 16 MB.

        Returns:
            ``[n, d]`` on the discriminator's device, without a gradient.

        Raises:
            TypeError: not an array or tensor, or an unsupported dtype.
            ValueError: a module of the caller's own; a trailing shape that is not the trained one.
        """
        name = "Discriminator.features"
        if not isinstance(self.network, (MLP, LinearOnFeatures)):
            raise ValueError(
                f"{name}: only model='mlp' and 'linear' have features known to us, this is {self.architecture.model}; "
                "evaluate your module's own"
            )
        parts = self._in_batches(name, x, batch_size, self.network.features)
        return (
            torch.cat(parts) if parts else self.network.features(self.reference.new_zeros(0, *self.architecture.shape))
        )

    def _check_shape(self, name: str, x: Any) -> None:
        shape = tuple(x.shape[1:]) if hasattr(x, "shape") else None
        if shape == () and self.architecture.shape == (1,):
            shape = (1,)
        if shape is None:
            as_tensor(x, function=name, argument="x")
        elif shape != self.architecture.shape:
            raise ValueError(
                f"{name}: x must be [n, {', '.join(map(str, self.architecture.shape))}] as trained, got {list(x.shape)}"
            )

    def _in_batches(
        self, name: str, x: Any, batch_size: int | None, function: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """The function of each batch of samples, in evaluation mode and without gradients."""
        self._check_shape(name, x)
        if batch_size is None:
            batch_size = max(1, (4 << 20) // max(1, math.prod(self.architecture.shape)))
        elif batch_size < 1:
            raise ValueError(f"{name}: batch_size must be at least 1, got {batch_size}")
        if len(x) == 0:
            as_tensor(x, function=name, argument="x")
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return [
                    function(
                        as_tensor(x[start : start + batch_size], function=name, argument="x").to(self.reference.device)
                    )
                    for start in range(0, len(x), batch_size)
                ]
        finally:
            self.train(training)

    def _tempered(self, output: Tensor) -> Tensor:
        if self.temperature == 0.0:
            # Not 0 * log r: that is NaN where r = 0.
            return torch.where(torch.isnan(output), output, torch.zeros_like(output))
        full = log_ratio_at_full_strength(output, self.calibration)
        return self.temperature * full - self.log_normalizer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and configuration to a safetensors file, whole or not at all.

        Args:
            path: the file; replaced if it exists. ``model="mlp"`` and ``"linear"`` are rebuilt
                from it alone; a module or features of your own are given again to :meth:`load`.

        Raises:
            OSError: the file cannot be written; an older file is then left as it was.
        """
        discriminator_file.write(
            self,
            path,
            {
                "architecture": asdict(self.architecture),
                "calibration": asdict(self.calibration),
                "report": self.report.to_dict() if self.report else None,
            },
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        features: Features | None = None,
        device: str | torch.device | None = None,
    ) -> Discriminator:
        """Read what :meth:`save` wrote.

        Args:
            path: the safetensors file.
            model: for a file of a module of your own, one of the same architecture; the weights
                are loaded into it.
            features: for ``model="linear"`` on features of your own, the same function.
            device: where to put it; the CPU by default.

        Returns:
            The discriminator in evaluation mode, with outputs bit-equal to the saved one's.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a pickle, another foreign file, a truncated one, a module that does not
                fit the weights, or a device that cannot be used.
        """
        where = usable_device("Discriminator.load", device or "cpu")
        tensors, configuration = discriminator_file.read("Discriminator", path)
        try:
            architecture_values = configuration["architecture"]
            for name in ("shape", "hidden"):
                architecture_values[name] = tuple(architecture_values[name])
            architecture = Architecture(**architecture_values)
            calibration = Calibration(**configuration["calibration"])
            report = FitReport.from_dict(configuration["report"]) if configuration["report"] else None
            reference = tensors["reference"]
        except (KeyError, TypeError) as error:
            raise discriminator_file.damaged("Discriminator", path, error) from None
        network = architecture.build(model=model, features=features)
        result = cls(network, architecture, calibration, reference=reference, report=report)
        discriminator_file.load_weights(result, tensors, path)
        return result.to(where).eval()
