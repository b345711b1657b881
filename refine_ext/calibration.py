"""From outputs on held-out samples to a calibrated log-ratio, and to what is worth reporting."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .density_ratio import density_ratio
from .overfit_guard import auc, choose_temperature, judge, refinement_gain
from .training import Kind, Objective


@dataclass
class Calibration:
    """How an output becomes a log-ratio.

    Attributes:
        kind: "variational" or "logit".
        divergence: its name.
        shift: solved on held-out generated samples.
        temperature: tau of the overfit guard.
        output_max: outputs above it are read as it (truncated ratios, Ionides 2008): the largest
            seen on held-out samples; where ``f*`` has a bounded domain, on generated ones, since
            the shift keeps only those inside it.
        log_floor: ``log e`` of the defensive mixture ``r <- (1 - e) r + e``, -inf for none.
    """

    kind: Kind
    divergence: str
    shift: float
    temperature: float = 1.0
    output_max: float = math.inf
    log_floor: float = -math.inf


def log_ratio_at_full_strength(output: Tensor, calibration: Calibration) -> Tensor:
    """log r at temperature 1, per output, with the calibration's fixed shift; NaN for NaN."""
    # The kernel takes the outputs as one group, which a single NaN would make NaN as a whole.
    missing = output.isnan()
    capped = output.masked_fill(missing, -math.inf).clamp_max(calibration.output_max)
    result = density_ratio(
        capped,
        calibration.divergence,
        kind=calibration.kind,
        shift=calibration.shift,
        nan_policy="propagate",
    ).log_ratio.masked_fill(missing, math.nan)
    if calibration.log_floor == -math.inf:
        return result
    kept = result + math.log1p(-math.exp(calibration.log_floor))
    return torch.logaddexp(kept, torch.full_like(kept, calibration.log_floor))


@dataclass
class FitReport:
    """What a fit measured on samples that took no part in it; gains are in nats per sample."""

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
    heldout_bound: float
    auc: float
    auc_reweighted: float
    gain_full: float
    gain_full_stderr: float
    temperature: float
    gain: float
    gain_stderr: float
    ess_full: float
    ess: float
    max_weight: float
    khat: float
    refinable: bool
    verdict: str
    solver: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that ``json.dumps`` accepts (non-finite numbers become ``None``)."""
        return {key: plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FitReport:
        """The inverse of :meth:`to_dict`."""
        known: dict[str, Any] = {k: math.nan if v is None else v for k, v in values.items()}
        return cls(**{**known, "shape": tuple(known["shape"])})


def plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def has_bounded_domain(divergence: str) -> bool:
    """Whether f* is infinite above some point, that is f'(infinity) is finite."""
    if divergence.startswith("alpha:"):
        return float(divergence.removeprefix("alpha:")) < 1.0
    return divergence not in ("kl", "pearson_chi2", "jeffreys")


def ratio_can_vanish(divergence: str) -> bool:
    """Whether a finite output can give r = 0, that is f'(0) is finite."""
    if divergence.startswith("alpha:"):
        return float(divergence.removeprefix("alpha:")) > 1.0
    return divergence == "pearson_chi2"


def check_outputs(outputs: Tensor, *, function: str) -> None:
    """A trained model's held-out outputs are finite and differ.

    Raises:
        ValueError: they do not.
    """
    bad = int((~torch.isfinite(outputs)).sum())
    if bad:
        raise ValueError(
            f"{function}: the trained model gave {bad} NaN or infinite outputs on "
            f"{len(outputs)} held-out samples; lower learning_rate"
        )
    if bool((outputs == outputs[0]).all()):
        raise ValueError(
            f"{function}: the trained model's output is constant, {float(outputs[0]):g} "
            f"on all {len(outputs)} held-out samples; it cannot tell real from fake"
        )


def calibrate(
    real: Tensor,
    fake: Tensor,
    objective: Objective,
    *,
    fakes_trained_on: int,
    caution: float,
) -> tuple[Calibration, Tensor]:
    """Shift and temperature from outputs on samples that took no part in training or stopping.

    Args:
        real, fake: ``[n]`` and ``[m]`` outputs.
        objective: says how to read them.
        fakes_trained_on: the number of generated samples trained on; its inverse is the share
            of the unrefined model mixed in where a family can put r = 0, since fewer samples
            could not have shown that a region is empty of data.
        caution: standard errors subtracted when the temperature is chosen.

    Returns:
        The calibration, and the full-strength log-ratios of ``fake``.

    Raises:
        ValueError: outputs that are constant or not finite.
    """
    everything = torch.cat([real, fake]).double()
    check_outputs(everything, function="fit_discriminator")
    kind, divergence = objective.kind, objective.divergence
    shift = float(density_ratio(fake.double(), divergence, kind=kind).shift)
    calibration = Calibration(kind, divergence, shift)
    bounded = kind == "variational" and has_bounded_domain(divergence)
    calibration.output_max = float(fake.max() if bounded else everything.max())
    if kind == "variational" and ratio_can_vanish(divergence):
        calibration.log_floor = -math.log(fakes_trained_on)
    log_real = log_ratio_at_full_strength(real.double(), calibration)
    log_fake = log_ratio_at_full_strength(fake.double(), calibration)
    calibration.temperature = choose_temperature(log_real, log_fake, caution=caution)
    return calibration, log_fake


def assess(real: Tensor, fake: Tensor, calibration: Calibration, objective: Objective) -> dict[str, Any]:
    """The measured fields of :class:`FitReport`, from outputs on the calibration samples."""
    log_real = log_ratio_at_full_strength(real.double(), calibration)
    log_fake = log_ratio_at_full_strength(fake.double(), calibration)
    tau = calibration.temperature
    gain_full, gain_full_stderr = refinement_gain(log_real, log_fake, 1.0)
    gain, gain_stderr = refinement_gain(log_real, log_fake, tau)
    full = density_ratio(log_fake, kind="logit")
    guarded = density_ratio(tau * log_fake, kind="logit")
    values: dict[str, Any] = {
        # On raw outputs: the cap of the log-ratios would tie what it cuts.
        "auc": auc(real, fake),
        "auc_reweighted": auc(real, fake, full.weights),
        "temperature": tau,
        "gain": gain,
        "gain_stderr": gain_stderr,
        "gain_full": gain_full,
        "ess": float(guarded.ess),
        "khat": float(guarded.khat),
    }
    refinable, verdict = judge(fakes=len(log_fake), **values)
    return {
        **values,
        "heldout_bound": objective.heldout(real, fake),
        "gain_full_stderr": gain_full_stderr,
        "ess_full": float(full.ess),
        "max_weight": float(guarded.max_weight),
        "refinable": refinable,
        "verdict": verdict,
    }
