"""How a refined sample is judged: on real rows that took no part in the fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .io import RowSource
from .measures import TwoSample, two_sample

MINIMUM_JUDGED = 20
_SHOWN = 64


@dataclass
class Samples:
    """The few rows a report shows, each [k, ...]; `after` is None for a refused job."""

    real: np.ndarray
    before: np.ndarray
    after: np.ndarray | None
    highest: np.ndarray
    lowest: np.ndarray


@dataclass(frozen=True)
class Evidence:
    """Held-out gains, (nats per real row, standard error), and what they say."""

    gain: tuple[float, float]
    gain_full: tuple[float, float]
    refinable: bool
    verdict: str


def random_rows(generator: np.random.Generator, total: int, wanted: int) -> np.ndarray:
    """`wanted` distinct rows in random order (the first of them are a random subset themselves)."""
    return generator.choice(total, size=min(wanted, total), replace=False, shuffle=True)


def take(source: RowSource, rows: np.ndarray, block_rows: int) -> np.ndarray:
    """Rows in any order: read ascending, then put in the order asked for."""
    order = np.argsort(rows, kind="stable")
    out = np.empty((len(rows), *source.shape[1:]), dtype=source.decoded_dtype)
    out[order] = source.take(rows[order], block_rows * source.row_bytes)
    return out


def measure_gain(real_log_ratio: np.ndarray, fake_log_ratio: np.ndarray, tau: float) -> Evidence:
    """Gain and verdict from log-ratios at temperature tau > 0 of held-out real and of all generated
    rows."""
    import torch

    from .density_ratio import density_ratio
    from .overfit_guard import auc, judge, refinement_gain

    # log r at temperature tau is tau·log r up to a constant, and the gain does not see constants
    real, fake = (torch.from_numpy(x / tau) for x in (real_log_ratio, fake_log_ratio))
    gain, gain_full = refinement_gain(real, fake, tau), refinement_gain(real, fake)
    ratio = density_ratio(tau * fake, kind="logit")
    refinable, verdict = judge(
        temperature=tau,
        gain=gain[0],
        gain_stderr=gain[1],
        gain_full=gain_full[0],
        auc=auc(real, fake),
        auc_reweighted=auc(real, fake, torch.softmax(fake, 0)),
        ess=float(ratio.ess),
        fakes=len(fake),
        khat=float(ratio.khat),
    )
    return Evidence(gain, gain_full, refinable, verdict)


def judge_samples(
    real: np.ndarray,
    generated: RowSource,
    weights: np.ndarray,
    indices: np.ndarray | None,
    *,
    block_rows: int,
    generator: np.random.Generator,
    seed: int,
) -> tuple[TwoSample, TwoSample, Samples]:
    """Measures of the generated and of the refined rows against held-out real ones, at equal sample
    sizes.

    Args:
        real: held-out rows [m, ...].
        generated: where both samples come from.
        weights: float64 [n], of the generated rows.
        indices: the refined rows; None judges what the weights would draw.
        block_rows: rows read at once.
        generator, seed: of the subsets, the permutations and the classifier's folds.
    """
    import torch

    from .resampling import resample

    size = min(len(real), len(generated))
    if indices is None:
        chosen = resample(torch.from_numpy(weights), size, method="systematic", seed=seed)
        after_rows = generator.permutation(chosen.numpy())
    else:
        size = min(size, len(indices))
        after_rows = indices[random_rows(generator, len(indices), size)]
    before_rows = random_rows(generator, len(generated), size)
    samples = show_samples(real[:size], generated, weights, before_rows, after_rows, block_rows)
    assert samples.after is not None
    before, after = (
        two_sample(real[:size], sample, groups=rows, seed=seed)
        for sample, rows in ((samples.before, before_rows), (samples.after, after_rows))
    )
    return before, after, samples


def show_samples(
    real: np.ndarray,
    generated: RowSource,
    weights: np.ndarray,
    before_rows: np.ndarray,
    after_rows: np.ndarray | None,
    block_rows: int,
) -> Samples:
    """Fetch the rows a report shows: these, and those of the highest and lowest weights."""
    order = np.argsort(weights, kind="stable")
    before, highest, lowest = (
        take(generated, rows, block_rows) for rows in (before_rows, order[::-1][:_SHOWN], order[:_SHOWN])
    )
    after = None if after_rows is None else take(generated, after_rows, block_rows)
    return Samples(real, before, after, highest, lowest)
