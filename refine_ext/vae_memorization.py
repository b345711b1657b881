"""How much a density model memorises of each training sample: its log-density with the sample and without it."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .arguments import whole
from .progress import progress_bar
from .results import PicturedResult, SampleValues
from .samples import as_tensor, check_finite_rows, rows_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FUNCTION = "memorization_score"

# From training samples and a seed to a trained model's log-density of samples.
Fit = Callable[[Tensor, int], Callable[[Tensor], Any]]


@dataclass(eq=False, repr=False)
class MemorizationScore(SampleValues, PicturedResult):
    """M(x_i) of each sample, in nats. Made by :func:`memorization_score`.

    `plot` draws the scores' density, and the log-densities with and without the sample.

    Attributes:
        values: `[n]` float64, with_sample - without_sample.
        mean, stderr: of `values`; the samples share models, so that the error is a lower limit.
        with_sample, without_sample: `[n]` float64, log p(x_i) under models trained with x_i and without it.
        log_density: `[repetitions * folds, n]` float64, of every model.
        held_out: as large, bool: whether the model was trained without the sample.
        folds, repetitions, seed: as they were asked for.
    """

    values: Tensor
    with_sample: Tensor
    without_sample: Tensor
    log_density: Tensor
    held_out: Tensor
    folds: int
    repetitions: int
    seed: int

    def quantile(self, q: float) -> float:
        """The score that a share q of the samples does not exceed."""
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"MemorizationScore.quantile: q must be between 0 and 1, got {q}")
        return float(self.values.quantile(q))

    def highest(self, count: int = 10) -> Tensor:
        """The rows of the most memorised samples, the first first."""
        return self.values.argsort(descending=True)[: whole("MemorizationScore.highest", "count", count, 1)]

    def to_dict(self) -> dict[str, Any]:
        """Averages and quantiles as plain numbers, for JSON."""
        return {
            "mean": self.mean,
            "stderr": self.stderr,
            "median": self.quantile(0.5),
            "quantile_95": self.quantile(0.95),
            "largest": float(self.values.max()),
            "positive": float((self.values > 0).double().mean()),
            "with_sample": float(self.with_sample.mean()),
            "without_sample": float(self.without_sample.mean()),
            "n": len(self.values),
            "folds": self.folds,
            "repetitions": self.repetitions,
            "seed": self.seed,
        }

    def _draw(self) -> Figure:
        from .report import AFTER, BEFORE, REAL, draw_log_ratios, new_figure

        figure = new_figure(9.5, 3.4, f"Memorisation of {len(self.values)} samples")
        left, right = figure.subplots(1, 2)
        draw_log_ratios(left, [("score", self.values.numpy(), REAL)])
        left.set_xlabel("memorisation score (nats)")
        densities = [
            ("trained with the sample", self.with_sample.numpy(), BEFORE),
            ("without", self.without_sample.numpy(), AFTER),
        ]
        draw_log_ratios(right, densities)
        right.set_xlabel("log p(x) (nats)")
        return figure

    def __str__(self) -> str:
        facts = self.to_dict()
        return (
            f"memorisation {facts['mean']:.4g} ± {facts['stderr']:.2g} nats on average (median {facts['median']:.4g}, "
            f"95% {facts['quantile_95']:.4g}, largest {facts['largest']:.4g}), {facts['n']} samples, {self.folds} "
            f"folds, {self.repetitions} repetition{'s' if self.repetitions > 1 else ''}"
        )

    def __repr__(self) -> str:
        return f"MemorizationScore(mean={self.mean:.6g}, n={len(self.values)}, folds={self.folds})"


def memorization_score(
    fit: Fit,
    data: Tensor | np.ndarray,
    *,
    folds: int = 10,
    repetitions: int = 1,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> MemorizationScore:
    """``M(x_i) = log p(x_i | trained with x_i) - log p(x_i | trained without x_i)``, by cross-validation.

    p(x | a training set) is the density averaged over the randomness of training. Each repetition splits the samples
    in `folds` random parts and trains a model on all but one of them, for each; the density with x_i is averaged over
    the models of the other parts, that without over those of its own. ``folds = n`` leaves one out.

    Args:
        fit: from training samples ``[k, ...]`` and a seed to a function that returns log p ``[b]`` of samples
            ``[b, ...]``, of a VAE for instance by :func:`importance_weighted_log_likelihood`.
        data: samples ``[n, ...]``.
        folds: K, from 2 to n.
        repetitions: L; K L models are trained.
        seed: of the splits; models get seeds that follow from it.
        checkpoint: a file ending in .npz that is written, whole, after each model, and continued from where it exists.
        progress: a bar where it takes over a second. None: on a terminal.

    Returns:
        :class:`MemorizationScore`.

    Raises:
        TypeError, ValueError: data or numbers that cannot be; log-densities of the wrong shape or NaN, with the rows;
            a checkpoint of other data or arguments.

    Source: van den Burg and Williams 2021, "On memorization in probabilistic deep generative models", section 3 and
    algorithm 1; after Feldman 2020.

    >>> def fit(x, seed):
    ...     return torch.distributions.Normal(x.mean(), 1.0).log_prob
    >>> memorization_score(lambda x, s: lambda y: fit(x, s)(y)[:, 0], torch.tensor([0.0, 1.0, 8.0]), folds=3).highest(1)
    tensor([2])
    """

    x = as_tensor(data, function=_FUNCTION, argument="data")
    n = len(x)
    if n < 2:
        raise ValueError(f"{_FUNCTION}: data has {n} samples, at least 2 are needed to leave one out")
    check_finite_rows(x, function=_FUNCTION, argument="data")
    if not callable(fit):
        raise TypeError(f"{_FUNCTION}: fit must be a function of samples and a seed, got {type(fit).__name__}")
    folds, repetitions = whole(_FUNCTION, "folds", folds, 2), whole(_FUNCTION, "repetitions", repetitions, 1)
    if folds > n:
        raise ValueError(f"{_FUNCTION}: folds must be at most the {n} samples, got {folds}")
    seed = whole(_FUNCTION, "seed", seed, 0)
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(repetitions * folds, n, dtype=torch.bool)
    for repetition in range(repetitions):
        for fold, part in enumerate(torch.randperm(n, generator=generator).tensor_split(folds)):
            held_out[repetition * folds + fold, part] = True
    seeds = torch.randint(2**31, (len(held_out),), generator=generator).tolist()
    table = _Checkpoint(checkpoint, x, folds, repetitions, seed)
    with progress_bar(_FUNCTION, len(held_out), progress, "model") as bar:
        for index in range(len(held_out)):
            if len(table.rows) <= index:
                log_density = fit(x[~held_out[index]], seeds[index])(x)
                table.add(_checked(log_density, n))
            bar.update()
    log_density = torch.stack(table.rows)
    inside, outside = (_log_mean(log_density, kept) for kept in (~held_out, held_out))
    return MemorizationScore(inside - outside, inside, outside, log_density, held_out, folds, repetitions, seed)


def _log_mean(log_density: Tensor, kept: Tensor) -> Tensor:
    """The log of each column's average density over the models that are kept."""
    return log_density.masked_fill(~kept, -math.inf).logsumexp(0) - kept.sum(0).double().log()


def _checked(log_density: Any, n: int) -> Tensor:
    value = torch.as_tensor(log_density).detach()
    if value.shape != (n,):
        raise ValueError(f"{_FUNCTION}: fit's function must return log p [{n}] of {n} samples, got {list(value.shape)}")
    value = value.double().cpu()
    if bool(value.isnan().any()):
        raise ValueError(f"{_FUNCTION}: fit's function returns NaN in {rows_text(value.isnan())}")
    return value


class _Checkpoint:
    """The log-densities of the models that are trained, in a file where one is given."""

    def __init__(self, path: str | os.PathLike[str] | None, x: Tensor, folds: int, repetitions: int, seed: int) -> None:
        self.path, self.rows = None if path is None else Path(path), []  # type: Path | None, list[Tensor]
        if self.path is None:
            return
        from .output import output_path

        output_path(_FUNCTION, self.path, ".npz")
        digest = hashlib.sha256(x.contiguous().cpu().numpy().tobytes()).hexdigest()
        self.made_for = f"{list(x.shape)} {digest} folds {folds} repetitions {repetitions} seed {seed}"
        if not self.path.exists():
            return
        with np.load(self.path, allow_pickle=False) as file:
            if str(file["made_for"]) != self.made_for:
                raise ValueError(f"{_FUNCTION}: checkpoint {self.path} is of other data, folds, repetitions or seed")
            self.rows = [torch.from_numpy(row) for row in file["log_density"]]

    def add(self, row: Tensor) -> None:
        self.rows.append(row)
        if self.path is None:
            return
        from .output import replacing

        with replacing(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, made_for=np.array(self.made_for), log_density=torch.stack(self.rows).numpy())
