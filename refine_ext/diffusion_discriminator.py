"""A discriminator of noisy samples: its calibrated log-ratio at every noise level, and its file."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import discriminator_file
from ._library import usable_device
from .calibration import has_bounded_domain, plain
from .density_ratio import density_ratio
from .guide import VPSchedule
from .networks import batch_output
from .samples import as_column
from .time_networks import TimeConvNet, TimeMLP
from .training import Kind

_NAME = "DiffusionDiscriminator"


@dataclass
class TimeArchitecture:
    """What is needed to build the network again before its weights are read."""

    model: str
    shape: tuple[int, ...]
    hidden: tuple[int, ...] = ()
    channels: int = 0
    dropout: float = 0.0
    classes: int = 0

    def build(self, model: nn.Module | None = None) -> nn.Module:
        """The network with arbitrary weights.

        Raises:
            ValueError: the caller's module is needed and was not given.
        """
        if self.model == "mlp":
            return TimeMLP(torch.Size(self.shape).numel(), self.hidden, self.dropout, self.classes)
        if self.model == "convolutional":
            return TimeConvNet(self.shape, self.channels, self.dropout, self.classes)
        if model is None:
            raise ValueError(
                f"{_NAME}.load: the file holds a module of your own ({self.model}); "
                "give one of the same architecture as load(path, model=module)"
            )
        return model


@dataclass
class TimeCalibration:
    """How an output becomes a log-ratio; the numbers that depend on the noise level are the module's buffers.

    Attributes:
        kind: of the network's output, "variational" or "logit".
        divergence: its name.
        log_floor: ``log e`` of the defensive mixture ``r <- (1 - e) r + e``, -inf for none.
        sigma_min, sigma_max: the trained range.
        schedule: of the network's inputs ``(mu x, tau)``; None where they are ``(x, sigma)``.
    """

    kind: Kind
    divergence: str
    log_floor: float
    sigma_min: float
    sigma_max: float
    schedule: VPSchedule | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TimeCalibration:
        """The inverse of ``dataclasses.asdict``."""
        schedule = values["schedule"]
        return cls(**{**values, "schedule": schedule and VPSchedule(**schedule)})


@dataclass
class DiffusionFitReport:
    """What a fit measured on samples that took no part in it; gains are in nats per sample.

    ``levels`` has one entry per noise level: sigma, auc, gain_full, gain_full_stderr, temperature, gain, gain_stderr.
    ``gain`` and ``gain_full`` are their averages, with the guard's temperatures and at full strength.
    """

    model: str
    divergence: str
    objective: str
    kind: str
    seed: int
    shape: tuple[int, ...]
    real_samples: dict[str, int]
    fake_samples: dict[str, int]
    epochs: int
    best_epoch: int
    seconds: float
    stopping_bound: float
    gain_full: float
    gain_full_stderr: float
    gain: float
    gain_stderr: float
    verdict: str
    levels: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that ``json.dumps`` accepts (non-finite numbers become ``None``)."""
        return {key: plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DiffusionFitReport:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**values, "shape": tuple(values["shape"])})


class DiffusionDiscriminator(nn.Module):
    """``h(x, sigma) = tau(sigma) log r(x, sigma)``, r the density ratio of real to generated samples at a noise level.

    x is ``x_0 + sigma eps``. ``log r = l - nu(sigma)`` for a network that returns logits l, and
    ``r = (f*)'(h - nu(sigma))`` for one that returns the variational h. The shift nu and the temperature tau come from
    samples held out of training, at levels between which they are linear in log sigma. Being a logit itself, the
    result is a guide as it is, whatever it was trained with: every adapter and sampler takes it.

    Attributes:
        kind: "logit".
        divergence: the f-divergence that was trained with.
        shift: 0.0: nu is already taken off.
        sigma_min, sigma_max: the trained range; guidance outside it is none.
        temperature: ``[levels]`` buffer of tau; ``disc.temperature.fill_(1.0)`` takes the guard off.
        report: the :class:`DiffusionFitReport` of the fit, or None.

    Source: Kim et al. 2022, section 3; Husain, De Bortoli and Nock 2026 for f-divergences.

    >>> import torch, refine_ext as rx
    >>> disc = rx.fit_diffusion_discriminator(torch.randn(80, 2) + 1, torch.randn(80, 2), max_epochs=2, progress=False)
    >>> disc(torch.zeros(3, 2), torch.full((3,), 0.5)).shape
    torch.Size([3])
    """

    kind = "logit"
    shift = 0.0
    levels: Tensor
    shifts: Tensor
    output_max: Tensor
    temperature: Tensor

    def __init__(
        self,
        network: nn.Module,
        architecture: TimeArchitecture,
        calibration: TimeCalibration,
        *,
        levels: int,
        report: DiffusionFitReport | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.architecture = architecture
        self.calibration = calibration
        self.report = report
        low, high = math.log(calibration.sigma_min), math.log(calibration.sigma_max)
        self.register_buffer("levels", torch.linspace(low, high, levels, dtype=torch.float64))
        self.register_buffer("shifts", torch.zeros(levels, dtype=torch.float64))
        self.register_buffer("output_max", torch.zeros(levels, dtype=torch.float64))
        self.register_buffer("temperature", torch.ones(levels, dtype=torch.float64))

    @property
    def divergence(self) -> str:
        """The f-divergence's name."""
        return self.calibration.divergence

    @property
    def sigma_min(self) -> float:
        """The lowest trained noise level."""
        return self.calibration.sigma_min

    @property
    def sigma_max(self) -> float:
        """The highest trained noise level."""
        return self.calibration.sigma_max

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """Tempered log-ratios ``[B]``, differentiable in x.

        Args:
            x: ``[B, ...]`` states ``x_0 + sigma eps`` of the trained trailing shape, of any floating dtype.
            sigma: ``[B]`` noise levels, or one for all.
            extra: handed to the network; ``class_labels`` where it was trained with them.

        Raises:
            ValueError: the trailing shape is not the trained one.
        """
        if tuple(x.shape[1:]) != self.architecture.shape:
            allowed = ", ".join(map(str, self.architecture.shape))
            raise ValueError(f"{_NAME}: x must be [B, {allowed}] as trained, got {list(x.shape)}")
        sigma = torch.as_tensor(sigma, device=x.device).reshape(-1).expand(len(x))
        log_ratio = self.log_ratio(self.output(x, sigma, **extra), sigma)
        return (self._at(self.temperature, sigma) * log_ratio).to(log_ratio.dtype)

    def output(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """The network's own outputs ``[B]`` on states ``[B, ...]`` at noise levels ``[B]``."""
        # Samplers may carry float64 states; the network keeps its own precision.
        dtype = next((p.dtype for p in self.network.parameters()), x.dtype)
        if self.calibration.schedule is None:
            return batch_output(lambda state: self.network(state, sigma.to(dtype), **extra), x.to(dtype))
        time = self.calibration.schedule.time(sigma.double()).to(dtype)
        scale = as_column(self.calibration.schedule.mu(sigma.double()).to(x.dtype), x)
        return batch_output(lambda state: self.network(state, time, **extra), (x * scale).to(dtype))

    def log_ratio(self, output: Tensor, sigma: Tensor) -> Tensor:
        """log r at full strength of the network's outputs ``[B]`` at noise levels ``[B]``."""
        calibration, shift = self.calibration, self._at(self.shifts, sigma)
        if calibration.kind == "logit":
            return output - shift.to(output.dtype)
        if has_bounded_domain(calibration.divergence):
            # The shift keeps the outputs seen on generated samples inside the domain of f*, and no others.
            output = torch.minimum(output, self._at(self.output_max, sigma).to(output.dtype))
        log_ratio = density_ratio(
            output.reshape(-1, 1), calibration.divergence, dim=1, shift=shift, nan_policy="propagate"
        ).log_ratio.reshape(-1)
        if calibration.log_floor == -torch.inf:
            return log_ratio
        return torch.logaddexp(log_ratio, torch.full_like(log_ratio, calibration.log_floor))

    def _at(self, table: Tensor, sigma: Tensor) -> Tensor:
        """``[B]`` values of a table over the levels, linear in log sigma and constant outside."""
        last = len(self.levels) - 1
        place = (sigma.double().log() - self.levels[0]) * (last / (self.levels[-1] - self.levels[0]))
        place = place.clamp(0, last)
        left = place.floor().clamp(max=last - 1)
        index = left.long()
        return torch.lerp(table[index], table[index + 1], place - left)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and configuration to a safetensors file, whole or not at all.

        Args:
            path: the file; replaced if it exists. The default networks are rebuilt from it alone; a module of your
                own is given again to :meth:`load`.

        Raises:
            OSError: the file cannot be written; an older file is then left as it was.
        """
        configuration = {
            "architecture": asdict(self.architecture),
            "calibration": asdict(self.calibration),
            "report": self.report.to_dict() if self.report else None,
        }
        discriminator_file.write(self, path, configuration)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        device: str | torch.device | None = None,
    ) -> DiffusionDiscriminator:
        """Read what :meth:`save` wrote.

        Args:
            path: the safetensors file.
            model: for a file of a module of your own, one of the same architecture; the weights are loaded into it.
            device: where to put it; the CPU by default.

        Returns:
            The discriminator in evaluation mode, with outputs bit-equal to the saved one's.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a pickle, another foreign file, a truncated one, a module that does not fit the weights, or a
                device that cannot be used.
        """
        where = usable_device(f"{_NAME}.load", device or "cpu")
        tensors, configuration = discriminator_file.read(_NAME, path)
        try:
            values = configuration["architecture"]
            architecture = TimeArchitecture(**{**values, **{k: tuple(values[k]) for k in ("shape", "hidden")}})
            calibration = TimeCalibration.from_dict(configuration["calibration"])
            report = DiffusionFitReport.from_dict(configuration["report"]) if configuration["report"] else None
            levels = len(tensors["levels"])
        except (KeyError, TypeError) as error:
            raise discriminator_file.damaged(_NAME, path, error) from None
        result = cls(architecture.build(model), architecture, calibration, levels=levels, report=report)
        discriminator_file.load_weights(result, tensors, path)
        return result.to(where).eval()
