"""Fit a discriminator of noisy samples at all noise levels of a diffusion, and say how far to trust it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._library import usable_device
from .calibration import check_outputs, ratio_can_vanish
from .density_ratio import density_ratio
from .diffusion_discriminator import (
    DiffusionDiscriminator,
    DiffusionFitReport,
    TimeArchitecture,
    TimeCalibration,
)
from .divergence import parse_divergence
from .fit import check_range, check_training, output_kind, show_epoch, split
from .guide import VPSchedule
from .overfit_guard import auc, choose_temperature, refinement_gain
from .samples import as_column, check_samples
from .time_networks import TimeConvNet, TimeMLP
from .training import Objective, Parts, Schedule, isolated_rng, train_network

_FUNCTION = "fit_diffusion_discriminator"
# Levels at which the training is stopped and the shift and temperature are set. Log-ratios change over factors of two
# or so in sigma; these are a factor of 1.6 apart over the default range of three decades.
_LEVELS = 16
_STOPPING_LEVELS = 8
# The default range, in standard deviations of the real samples.
_LOWEST, _HIGHEST = 0.02, 20.0


def fit_diffusion_discriminator(
    real: Any,
    fake: Any,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    schedule: VPSchedule | None = None,
    model: nn.Module | None = None,
    objective: str = "logistic",
    divergence: str = "kl",
    real_labels: Any = None,
    fake_labels: Any = None,
    validation_fraction: float = 0.25,
    max_epochs: int = 200,
    patience: int = 20,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    hidden: tuple[int, ...] = (256, 256),
    channels: int = 32,
    dropout: float = 0.1,
    caution: float = 1.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> DiffusionDiscriminator:
    r"""Learn ``log r(x, sigma)``, the log density ratio of real to generated samples with noise of level sigma on both.

    ``logistic``: minimise ``E_sigma [ E_real softplus(-l(x_0 + sigma eps, sigma)) + E_fake softplus(l(..)) ]``
    ``tight``, ``loose``: maximise the bounds of :func:`refine_ext.fit_discriminator` for pairs ``(x, sigma)``

    Real and generated samples of a batch have the same levels and noise of their own. As sigma has one distribution
    for both, the ratio of the pairs ``(x, sigma)`` is the ratio at each level, and their divergence is the average
    over the levels: one objective trains all of them. Levels are drawn with density proportional to ``g^2 / sigma^2``
    in time (Kim et al. 2022); as ``g^2 dt = d sigma^2``, for VP as for VE that is uniform in log sigma.

    Half of the held-out samples stop the training early, always with the same noise. The other half sets, at 16
    levels, the shift and a temperature tau in [0, 1]: the one of the highest held-out gain in nats over the level and
    its neighbours (:func:`refine_ext.fit_discriminator`), or 0 where no gain exceeds ``caution`` standard errors.
    Where the discriminator has learned noise, the guidance fades out.

    Args:
        real, fake: ``[n, ...]`` and ``[m, ...]`` arrays or tensors with equal trailing shapes, floating or uint8
            (taken as floats without scaling), at least 10 samples each, as the diffusion sees them at sigma = 0.
        sigma_min, sigma_max: range of noise levels, in the units of the data; by default 0.02 and 20 standard
            deviations of ``real``, or the times of ``schedule``. Guidance outside the range is none.
        schedule: a :class:`VPSchedule` if ``model`` takes ``(mu x, tau)``; the result takes ``(x, sigma)`` all the
            same, and the default network needs none but for the range.
        model: a module ``(x, sigma, **extra) -> [B]`` or ``[B, 1]``, of which a copy is trained. None: a residual
            convolutional network for ``[C, H, W]`` with sides from 8 to 64, an MLP for every other shape.
        objective: "logistic", "tight" or "loose".
        divergence: the f-divergence's name; with "logistic" only the held-out objective is of it.
        real_labels, fake_labels: class numbers ``[n]`` and ``[m]`` or one-hot rows of a conditional model, both or
            none; the network then takes ``class_labels``.
        validation_fraction: share of each set held out of training, in (0, 1).
        max_epochs, patience: most epochs, and epochs without a better held-out objective.
        batch_size: real samples a batch, and as many generated ones.
        learning_rate, weight_decay: AdamW's.
        hidden, channels, dropout: widths of the MLP's layers, channels of the convolutional network's first layer (a
            multiple of 8), and dropout probability.
        caution: standard errors that the gain at a level must exceed for any guidance there.
        seed: of the split, the initial weights, the batches, the noise and dropout. Equal seeds give equal weights on
            one machine; the global generators are left as they were.
        device: where to train; by default where a tensor ``real`` is, the CPU for arrays.
        progress: show a progress bar.

    Returns:
        The discriminator, a guide for every sampler and adapter, with ``report`` saying what was measured on
        held-out samples at each level.

    Raises:
        TypeError: an argument of a type or dtype that is not supported.
        ValueError: samples that are empty, too few, not finite, constant or of different shapes; labels of another
            length; a range that is empty or not positive; a constant model output; an unknown name or a number out
            of its range; a device that cannot be used.

    Source: Kim et al. 2022, eq. 4 and section 3; Husain, De Bortoli and Nock 2026 for f-divergences.

    >>> disc = fit_diffusion_discriminator(torch.randn(80, 2) + 1, torch.randn(80, 2), max_epochs=2, progress=False)
    >>> disc(torch.zeros(3, 2), torch.full((3,), 0.5)).shape
    torch.Size([3])
    """
    check_training(_FUNCTION, locals())
    parse_divergence(_FUNCTION, divergence)
    from tqdm import tqdm

    started = time.perf_counter()
    x_real, x_fake = check_samples(real, fake, function=_FUNCTION)
    labels = _labels(real_labels, fake_labels, (len(x_real), len(x_fake)))
    where = usable_device(_FUNCTION, device) if device is not None else x_real.device
    low, high = _range(sigma_min, sigma_max, schedule, x_real)
    goal = Objective(objective, divergence, output_kind(model or "mlp", objective, divergence))
    generator = torch.Generator().manual_seed(seed)
    indices = torch.arange(len(x_real)), torch.arange(len(x_fake))
    parts_real, parts_fake = (split(x, validation_fraction, generator, function=_FUNCTION) for x in indices)
    with isolated_rng(seed, where):
        network, architecture = _network(
            model,
            [x_real[parts_real.train.to(x_real.device)], x_fake[parts_fake.train.to(x_fake.device)]],
            labels,
            hidden,
            channels,
            dropout,
        )
        vanishes = goal.kind == "variational" and ratio_can_vanish(divergence)
        # Fewer samples could not have shown that a region is empty of data.
        floor = -math.log(len(parts_fake.train)) if vanishes else -math.inf
        calibration = TimeCalibration(goal.kind, divergence, floor, low, high, schedule if model else None)
        result = DiffusionDiscriminator(network, architecture, calibration, levels=_LEVELS).to(where)
        size = max(batch_size, 512)
        reals = Noisy(result, x_real, labels[0], parts_real, where, size, seed)
        fakes = Noisy(result, x_fake, labels[1], parts_fake, where, size, seed + 1)
        stopping = torch.linspace(math.log(low), math.log(high), 2 * _STOPPING_LEVELS + 1)[1::2].exp()
        with tqdm(total=max_epochs, desc="discriminator", disable=not progress) as bar:
            trained = train_network(
                network,
                (len(parts_real.train), len(parts_fake.train)),
                batch=lambda *rows: _batch(result, reals.take(rows[0]), fakes.take(rows[1])),
                heldout=lambda: (reals.stopping(stopping), fakes.stopping(stopping)),
                objective=goal,
                schedule=Schedule(max_epochs, patience, batch_size, learning_rate, weight_decay),
                generator=generator,
                progress=lambda bound, best: show_epoch(bar, bound, best),
                function=_FUNCTION,
            )
    measured = _calibrate(result, reals, fakes, caution=caution)
    result.report = DiffusionFitReport(
        model=architecture.model,
        divergence=divergence,
        objective=objective,
        kind=goal.kind,
        seed=seed,
        shape=architecture.shape,
        real_samples=parts_real.sizes(),
        fake_samples=parts_fake.sizes(),
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        stopping_bound=trained.bound,
        seconds=time.perf_counter() - started,
        **measured,
    )
    return result.eval()


@dataclass
class Noisy:
    """One sample set, split, that gets noise before the network sees it."""

    discriminator: DiffusionDiscriminator
    x: Tensor
    labels: Tensor | None
    parts: Parts
    device: torch.device
    rows: int
    seed: int

    def take(self, rows: Tensor, *, part: str = "train") -> tuple[Tensor, dict[str, Tensor]]:
        """Clean samples on the training device, and the network's further arguments."""
        rows = getattr(self.parts, part)[rows]
        labels = self.labels
        extra = {} if labels is None else {"class_labels": labels[rows.to(labels.device)].to(self.device)}
        return self.x[rows.to(self.x.device)].to(self.device), extra

    def stopping(self, levels: Tensor) -> Tensor:
        """Outputs on the part that stops the training, at all levels."""
        return self.outputs("stop", levels).flatten()

    @torch.no_grad()
    def outputs(self, part: str, levels: Tensor) -> Tensor:
        """``[levels, n]`` outputs on a held-out part, with noise that depends on the seed alone."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.stack([torch.cat(list(self._level(part, float(level), generator))) for level in levels])

    def _level(self, part: str, level: float, generator: torch.Generator) -> Iterator[Tensor]:
        for rows in torch.arange(len(getattr(self.parts, part))).split(self.rows):
            x, extra = self.take(rows, part=part)
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            sigma = torch.full((len(x),), level, dtype=torch.float64, device=x.device)
            yield self.discriminator.output(x + level * noise, sigma, **extra)


def _batch(
    result: DiffusionDiscriminator, real: tuple[Tensor, dict[str, Tensor]], fake: tuple[Tensor, dict[str, Tensor]]
) -> Tensor:
    """Outputs on real and generated samples diffused to the same levels, one in each of equal strata of log sigma."""
    clean = torch.cat([real[0], fake[0]])
    half = len(real[0])
    place = (torch.arange(half, device=clean.device) + torch.rand(half, device=clean.device)) / half
    low, high = math.log(result.sigma_min), math.log(result.sigma_max)
    sigma = (low + (high - low) * place).exp().repeat(2)
    extra = {name: torch.cat([real[1][name], fake[1][name]]) for name in real[1]}
    noise = torch.randn_like(clean) * as_column(sigma.to(clean.dtype), clean)
    return result.output(clean + noise, sigma, **extra)


def _calibrate(result: DiffusionDiscriminator, reals: Noisy, fakes: Noisy, *, caution: float) -> dict[str, Any]:
    """Set shift, cap and temperature at every level, and return the measured fields of the report."""
    levels = result.levels.exp().cpu()
    real, fake = reals.outputs("calibrate", levels), fakes.outputs("calibrate", levels)
    check_outputs(torch.cat([real.flatten(), fake.flatten()]).double(), function=_FUNCTION)
    kind, divergence = result.calibration.kind, result.divergence
    result.shifts.copy_(density_ratio(fake.double(), divergence, kind=kind, dim=1).shift)
    result.output_max.copy_(fake.double().amax(1))

    def log_ratio(outputs: Tensor) -> Tensor:
        sigma = result.levels.exp()[:, None].expand_as(outputs)
        return result.log_ratio(outputs.double().flatten(), sigma.flatten()).reshape(outputs.shape)

    log_real, log_fake = log_ratio(real), log_ratio(fake)
    table = []
    for k in range(len(levels)):
        near = slice(max(0, k - 1), k + 2)
        # Caution decides whether there is guidance at a level, not how much: guidance has no weights that collapse.
        earned = choose_temperature(log_real[near], log_fake[near], caution=caution) > 0.0
        tau = choose_temperature(log_real[near], log_fake[near], caution=0.0) if earned else 0.0
        result.temperature[k] = tau
        gain_full, gain_full_stderr = refinement_gain(log_real[k], log_fake[k])
        gain, gain_stderr = refinement_gain(log_real[k], log_fake[k], tau)
        table.append(
            {
                "sigma": float(levels[k]),
                "auc": auc(real[k], fake[k]),
                "gain_full": gain_full,
                "gain_full_stderr": gain_full_stderr,
                "temperature": tau,
                "gain": gain,
                "gain_stderr": gain_stderr,
            }
        )
    strength = result.temperature[:, None]
    gain, gain_stderr = refinement_gain(strength * log_real, strength * log_fake)
    gain_full, gain_full_stderr = refinement_gain(log_real, log_fake)
    return {
        "levels": table,
        "gain": gain,
        "gain_stderr": gain_stderr,
        "gain_full": gain_full,
        "gain_full_stderr": gain_full_stderr,
        "verdict": _verdict(table, gain, gain_stderr),
    }


def _verdict(table: list[dict[str, float]], gain: float, stderr: float) -> str:
    used = [row for row in table if row["temperature"] > 0.0]
    if not used:
        return (
            "nothing to gain: at no noise level does a temperature improve the held-out estimate beyond its standard "
            "error, so there is no guidance and the model stays as it is"
        )
    best = max(used, key=lambda row: row["gain"])
    return (
        f"guidance gains {gain:.3f} +- {stderr:.3f} nats per held-out sample on average over the noise levels, most at "
        f"sigma = {best['sigma']:.3g} ({best['gain']:.3f} nats, held-out AUC {best['auc']:.3f}); "
        f"used at {len(used)} of {len(table)} levels"
    )


def _network(
    model: nn.Module | None,
    train: list[Tensor],
    labels: tuple[Tensor | None, Tensor | None],
    hidden: tuple[int, ...],
    channels: int,
    dropout: float,
) -> tuple[nn.Module, TimeArchitecture]:
    shape = tuple(train[0].shape[1:])
    if model is not None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{_FUNCTION}: model must be a torch.nn.Module or None, got {type(model).__name__}")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"{_FUNCTION}: model has no parameter that requires a gradient")
        return copy.deepcopy(model), TimeArchitecture(type(model).__name__, shape)
    classes = max((_classes(y) for y in labels if y is not None), default=0)
    if len(shape) == 3 and all(8 <= side <= 64 for side in shape[1:]):
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 8 or channels % 8:
            raise ValueError(f"{_FUNCTION}: channels must be a multiple of 8, got {channels}")
        image = TimeConvNet(shape, channels, dropout, classes)
        image.scale.fit(train)
        return image, TimeArchitecture("convolutional", shape, (), channels, dropout, classes)
    vector = TimeMLP(math.prod(shape), hidden, dropout, classes)
    vector.scale.fit([x.flatten(1) for x in train])
    return vector, TimeArchitecture("mlp", shape, tuple(hidden), 0, dropout, classes)


def _classes(labels: Tensor) -> int:
    return labels.shape[1] if labels.dim() == 2 else int(labels.max()) + 1


def _labels(real: Any, fake: Any, counts: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Both as tensors, or neither."""
    if (real is None) != (fake is None):
        missing = "real_labels" if real is None else "fake_labels"
        raise ValueError(f"{_FUNCTION}: {missing} is missing; give real_labels and fake_labels, or neither")
    if real is None:
        return None, None
    pair = []
    for name, value, count in (("real_labels", real, counts[0]), ("fake_labels", fake, counts[1])):
        try:
            labels = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{_FUNCTION}: {name} must be an array or a tensor, got {type(value).__name__}") from error
        if labels.dim() not in (1, 2) or len(labels) != count:
            raise ValueError(
                f"{_FUNCTION}: {name} must be [{count}] class numbers or [{count}, classes] rows, one for each sample, "
                f"got {list(labels.shape)}"
            )
        if labels.dim() == 1 and (labels.is_floating_point() or labels.is_complex() or int(labels.min()) < 0):
            raise ValueError(
                f"{_FUNCTION}: {name} must be class numbers from 0 on, got {labels.dtype} or a negative one"
            )
        pair.append(labels)
    if pair[0].shape[1:] != pair[1].shape[1:]:
        shapes = f"{list(pair[0].shape)} and {list(pair[1].shape)}"
        raise ValueError(f"{_FUNCTION}: real_labels and fake_labels must be of one kind, got {shapes}")
    return pair[0], pair[1]


def _range(
    sigma_min: float | None, sigma_max: float | None, schedule: VPSchedule | None, real: Tensor
) -> tuple[float, float]:
    if schedule is not None and not isinstance(schedule, VPSchedule):
        raise TypeError(f"{_FUNCTION}: schedule must be a VPSchedule or None, got {type(schedule).__name__}")
    if schedule is not None:
        low, high = schedule.sigma(schedule.time_min), schedule.sigma(schedule.time_max)
    else:
        dims = [0, *range(2, real.dim())]
        deviation = float(real.double().var(dims, correction=0).mean().sqrt())
        low, high = _LOWEST * deviation, _HIGHEST * deviation
    values: dict[str, Any] = {
        "sigma_min": low if sigma_min is None else sigma_min,
        "sigma_max": high if sigma_max is None else sigma_max,
    }
    for name in values:
        check_range(_FUNCTION, values, name, 0.0, math.inf, open_below=True, open_above=True)
    low, high = values["sigma_min"], values["sigma_max"]
    if not low < high:
        raise ValueError(f"{_FUNCTION}: sigma_min must be below sigma_max, got {low:g} and {high:g}")
    return float(low), float(high)
