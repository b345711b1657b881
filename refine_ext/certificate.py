"""The refined certificate: how far a refined sample can be from the data's distribution, as a discriminator sees it."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _C
from .arguments import check_seed, whole
from .complexity_estimate import Estimate
from .density_ratio import density_ratio
from .divergence import parse_divergence
from .hull_dual import solve_hull_dual
from .linear_dual import LinearDual, solve_linear_dual
from .rademacher import rademacher, rademacher_linear
from .samples import as_tensor, count_nonfinite

# Of delta, for the Monte-Carlo error of the complexity: its width is some hundredth of the confidence term's, and both
# grow with the logarithm of what they are given.
MONTE_CARLO_SHARE = 0.1


@dataclass(eq=False, repr=False)
class RefinementCertificate:
    """A bound on IPM_H(P, refined sample) and every term of it. Made by `refinement_certificate`.

    Attributes:
        ipm_unrefined: B ‖E_real φ − E_fake φ‖, the IPM between the real sample and the generated one.
        ipm_refined: the same with the refined weights.
        divergence_value: D_f of the refined sample from the generated one, the average of f(r), nats.
        divergence_at_one: f(1), the value where nothing is refined: 0, except −2 log 2 for `gan`.
        dual_value: the maximum that the solver reached; divergence_value + ipm_refined − duality_gap.
        duality_gap: proven bound on how far dual_value is below the true maximum.
        complexity: `Estimate` of the empirical Rademacher complexity of H on the real sample.
        complexity_term: twice the upper limit of the complexity, monte_carlo_term included.
        monte_carlo_term: the part of complexity_term that more draws would take away.
        confidence_term: 6 M sqrt(log(2 / confidence_delta) / (2n)).
        confidence_delta, monte_carlo_delta: the chance that each of the two may fail; their sum is 1 − probability.
        probability: with which all bounds hold together.
        n, num_fake: numbers of real and of generated samples.
        norm_bound: B.
        function_bound: M, the largest |h(x)| over the class.
        function_bound_known: whether M was given; else it is the largest seen.
        trivial_bound: M + the largest |h| over the generated samples; what holds without any calculation.
        divergence: the f-divergence's name.
        hull: whether H is the hull of discriminators' outputs; else it is linear in features.
        weights: `[num_fake]` float64 refined weights, sum 1.
        ess: effective sample size of the weights.
        shift: ν*; the refined density ratio is (f*)'(h* − ν*).
        discriminator_weight: `[d]` float64, w of h* = <w, φ>, or the coefficients of the hull.
        converged: whether the solver reached its tolerance. The bounds hold where it did not.
        notes: what to mind.
    """

    ipm_unrefined: float
    ipm_refined: float
    divergence_value: float
    divergence_at_one: float
    dual_value: float
    duality_gap: float
    complexity: Estimate
    complexity_term: float
    monte_carlo_term: float
    confidence_term: float
    confidence_delta: float
    monte_carlo_delta: float
    probability: float
    n: int
    num_fake: int
    norm_bound: float
    function_bound: float
    function_bound_known: bool
    trivial_bound: float
    divergence: str
    hull: bool
    weights: Tensor
    ess: float
    shift: float
    discriminator_weight: Tensor
    converged: bool
    iterations: int
    mean_real: Tensor
    notes: list[str] = field(default_factory=list)

    @property
    def deviation_term(self) -> float:
        """complexity_term + confidence_term: how far E_P h and E_real h can be apart, for all h of H at once."""
        return self.complexity_term + self.confidence_term

    @property
    def bound_refined(self) -> float:
        """IPM_H(P, refined sample) is at most this."""
        return self.ipm_refined + self.deviation_term

    @property
    def bound_unrefined(self) -> float:
        """IPM_H(P, generated sample) is at most this."""
        return self.ipm_unrefined + self.deviation_term

    @property
    def bound_by_duality(self) -> float:
        """ipm_unrefined − (D_f − f(1)) + duality_gap + deviation_term: the duality's bound on bound_refined."""
        paid = self.divergence_value - self.divergence_at_one
        return self.ipm_unrefined - paid + self.duality_gap + self.deviation_term

    @property
    def gain(self) -> float:
        """bound_unrefined − bound_refined, at least D_f − f(1) − duality_gap."""
        return self.ipm_unrefined - self.ipm_refined

    @property
    def certified_improvement(self) -> float:
        """dual_value − f(1) − deviation_term, nats: E_P of the dual objective at h* is at least this above that at 0.

        For `kl`, E_P log(refined / generated density): what the refinement gains in log-likelihood on unseen data.
        For any f, how much closer the refined density ratio is to P's in f's Bregman divergence. Not positive:
        this many real samples prove no improvement.
        """
        return self.dual_value - self.divergence_at_one - self.deviation_term

    def outputs(self, features: Any) -> Tensor:
        """h* at features `[k, d]` (outputs `[k, m]` for a hull): `[k]` float64."""
        phi = _matrix("RefinementCertificate.outputs", "features", features, len(self.discriminator_weight))
        return phi.double() @ self.discriminator_weight.to(phi.device)

    def log_ratio(self, features: Any) -> Tensor:
        """log of the refined density ratio (f*)'(h* − ν*) at features `[k, d]`: `[k]` float64."""
        return density_ratio(self.outputs(features), self.divergence, shift=self.shift).log_ratio

    def bound_of(self, features: Any, weights: Any = None) -> float:
        """The bound for another sample, at features `[k, d]`, with weights `[k]` or equal ones.

        It holds together with the certificate's own, however the sample was made: one event carries all.
        """
        return self.ipm_to(self._average(features, weights)) + self.deviation_term

    def ipm_to(self, mean_features: Tensor) -> float:
        """IPM_H of the real sample and a sample whose features average to `[d]`."""
        return self.norm_bound * _dual_norm(self.mean_real - mean_features.to(self.mean_real), self.hull)

    def _average(self, features: Any, weights: Any) -> Tensor:
        name = "RefinementCertificate.bound_of"
        phi = _matrix(name, "features", features, len(self.mean_real)).double()
        if weights is None:
            return phi.mean(0)
        w = torch.as_tensor(weights, dtype=torch.float64, device=phi.device)
        if w.shape != phi.shape[:1]:
            raise ValueError(f"{name}: weights must be [{len(phi)}], one per sample, got {list(w.shape)}")
        if bool((w < 0).any()) or not 0.0 < float(w.sum()) < math.inf:
            raise ValueError(f"{name}: weights must be non-negative with a positive, finite sum")
        return w @ phi / w.sum()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vectors, as plain numbers, for JSON."""
        names = (
            "bound_refined", "bound_unrefined", "bound_by_duality", "gain", "certified_improvement",
            "ipm_refined", "ipm_unrefined", "complexity_term", "monte_carlo_term", "confidence_term", "deviation_term",
            "divergence_value", "divergence_at_one", "dual_value", "duality_gap", "probability", "confidence_delta",
            "monte_carlo_delta", "n", "num_fake", "ess", "norm_bound", "function_bound", "function_bound_known",
            "trivial_bound", "divergence", "hull", "shift", "converged", "iterations", "notes",
        )  # fmt: skip
        facts = {name: getattr(self, name) for name in names}
        return {**facts, "features": len(self.discriminator_weight), "complexity": self.complexity.to_dict()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON, whole or not at all.

        Raises:
            ValueError: a name that does not end in .json, or a folder that does not exist.
        """
        from .report import save_json

        save_json(self.to_dict(), _output_path("RefinementCertificate.save", path, ".json"))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the terms of both bounds as PNG.

        Raises:
            ValueError: a name that does not end in .png, or a folder that does not exist.
            ModuleNotFoundError: matplotlib is missing.
        """
        from .certificate_figure import draw_certificate
        from .report import save_figure

        save_figure(draw_certificate(self), _output_path("RefinementCertificate.plot", path, ".png"))

    def __str__(self) -> str:
        from .certificate_text import table

        return table(self)

    def __repr__(self) -> str:
        bounds = f"bound_refined={self.bound_refined:.6g}, bound_unrefined={self.bound_unrefined:.6g}"
        return f"RefinementCertificate({bounds}, probability={self.probability:g})"


def refinement_certificate(
    real: Any,
    fake: Any,
    divergence: str = "kl",
    *,
    norm_bound: float = 1.0,
    feature_bound: float | None = None,
    delta: float = 0.05,
    draws: int = 1024,
    seed: int = 0,
    hull: bool = False,
    tolerance: float = 1e-7,
) -> RefinementCertificate:
    r"""Refine the generated sample within a class H of discriminators, and bound how far the result is from the data.

    With probability at least 1 − delta over the n real samples drawn from P (and the random signs),

    ``IPM_H(P, refined) <= IPM_H(real, refined) + 2 R_n(H) + 6 M sqrt(log(2/delta') / (2n))``, and
    ``IPM_H(real, refined) <= IPM_H(real, fake) - (D_f(refined || fake) - f(1)) + duality gap``,

    ``IPM_H(P, Q) = sup_{h in H} E_P h - E_Q h``. H is linear in the features, ``{<w, phi(x)>, ||w||_2 <= B}``,
    or with ``hull=True`` the convex hull of ``+-B h_1 .. +-B h_m``; then ``real`` and ``fake`` hold the outputs h_j.
    In both the maximum over H is exact: ``refined`` weighs the generated samples by ``(f*)'(h* - nu*)`` at the
    maximiser h* of the dual objective.

    What it says: no function of H tells P from the weighted generated sample by more than ``bound_refined``. The
    model is that sample. A generator's other draws are as close only up to its own sampling error, about
    B sup‖φ‖ / sqrt(ess), which is not in the bound; functions outside H are not bounded at all.

    What it needs: real samples that are independent draws from P, and a class (features, B's unit ball, M) that was
    chosen without looking at them: for features that were trained, other real samples. The generated sample, the
    divergence and B may depend on the real samples in any way: the probability is that of one event,
    ``sup_{h in H_1} |E_P h - E_real h| <= deviation_term / B``, which involves neither, and from it follow the bounds
    of all weights of all samples at once, for every B.

    delta is split: a tenth, ``monte_carlo_delta``, for the upper limit of R_n from its Monte-Carlo estimate (McDiarmid
    over the signs), the rest, ``confidence_delta`` = delta', for the samples.

    Args:
        real: ``[n, d]`` features of real samples (``[n, m]`` outputs), floating; array or tensor.
        fake: ``[N, d]`` features of generated samples (``[N, m]`` outputs).
        divergence: one of `divergences()`; for ``alpha:<a>`` any a other than 0 and 1.
        norm_bound: B > 0, in units of output per unit of feature.
        feature_bound: sup ‖φ(x)‖_2 over all x that P can give (sup max_j |h_j(x)| for a hull), so that M is B times
            it. Left out, the largest seen, and the certificate then holds as far as no unseen real sample is larger.
        delta: in (0, 1).
        draws: of the Rademacher complexity.
        seed: of the draws.
        hull: whether the columns are discriminators whose hull is the class.
        tolerance: relative duality gap that the solver reaches.

    Returns:
        `RefinementCertificate`: every term, both bounds, the refined weights, h*.

    Raises:
        TypeError: an argument of a type or dtype that is not supported.
        ValueError: fewer than 2 real samples or no generated one, values that are not finite, shapes or devices that
            differ, a number out of its range, an unknown divergence, a feature_bound that a real sample exceeds.

    Warns:
        RuntimeWarning: the solver did not reach the tolerance. The bounds count its gap and hold all the same.

    Source: Husain, De Bortoli and Nock 2026, duality and the refined model; Mohri, Rostamizadeh and Talwalkar 2018,
    Theorem 3.3, for functions with values in [−M, M].

    >>> import torch, refine_ext as rx
    >>> cert = rx.refinement_certificate(torch.ones(400, 1), torch.arange(2.0)[:, None], norm_bound=2.0)
    >>> round(cert.ipm_unrefined, 4), round(cert.ipm_refined, 4)  # 2 (1 - 1/2), 2 (1 - e^2 / (1 + e^2))
    (1.0, 0.2384)
    """
    problem = certificate_problem(
        "refinement_certificate", real, fake, divergence, feature_bound, delta, draws, seed, hull, tolerance
    )
    result = problem.certify(positive("refinement_certificate", "norm_bound", norm_bound))
    if not result.converged:
        warnings.warn(f"refinement_certificate: {result.notes[0]}", RuntimeWarning, stacklevel=2)
    return result


@dataclass
class CertificateProblem:
    """What the certificates of all norm bounds share: the samples, and the complexity of the class with B = 1."""

    real: Tensor
    fake: Tensor
    divergence: str
    hull: bool
    feature_bound: float
    feature_bound_known: bool
    largest_fake: float
    delta: float
    complexity: Estimate
    tolerance: float

    def certify(self, norm_bound: float, initial: Tensor | None = None) -> RefinementCertificate:
        """Solve for this B, from the solution of another one if given, and put the terms together."""
        solve = solve_hull_dual if self.hull else solve_linear_dual
        solved = solve(
            self.real, self.fake, self.divergence, norm_bound=norm_bound, tolerance=self.tolerance, initial=initial
        )
        ratio = density_ratio(self.fake @ solved.weight, self.divergence)
        mean_real = self.real.mean(0)
        mean_refined = ratio.weights @ self.fake
        unrefined, refined = (
            norm_bound * _dual_norm(mean_real - mean, self.hull) for mean in (self.fake.mean(0), mean_refined)
        )
        certificate = RefinementCertificate(
            ipm_unrefined=unrefined,
            ipm_refined=refined,
            divergence_value=_generator(self.divergence, ratio.ratio),
            divergence_at_one=_generator(self.divergence, torch.ones(1, dtype=torch.float64)),
            dual_value=solved.value,
            duality_gap=solved.gap,
            **self.deviation(norm_bound),
            probability=1.0 - self.delta,
            n=len(self.real),
            num_fake=len(self.fake),
            norm_bound=norm_bound,
            function_bound=norm_bound * self.feature_bound,
            function_bound_known=self.feature_bound_known,
            trivial_bound=norm_bound * (self.feature_bound + self.largest_fake),
            divergence=self.divergence,
            hull=self.hull,
            weights=ratio.weights,
            ess=float(ratio.ess),
            shift=float(ratio.shift),
            discriminator_weight=solved.weight,
            converged=solved.converged,
            iterations=solved.iterations,
            mean_real=mean_real,
        )
        certificate.notes = _notes(certificate, solved)
        return certificate

    def deviation(self, norm_bound: float) -> dict[str, Any]:
        """The terms that bound sup_{h in H} |E_P h - E_real h|, by the names of the certificate."""
        complexity = _scaled(self.complexity, norm_bound)
        monte_carlo = MONTE_CARLO_SHARE * self.delta
        upper = complexity.upper(monte_carlo)
        width = math.sqrt(math.log(2 / (self.delta - monte_carlo)) / (2 * len(self.real)))
        return {
            "complexity": complexity,
            "complexity_term": 2 * upper,
            "monte_carlo_term": 2 * (upper - float(complexity)),
            "confidence_term": 6 * norm_bound * self.feature_bound * width,
            "confidence_delta": self.delta - monte_carlo,
            "monte_carlo_delta": monte_carlo,
        }


def certificate_problem(
    function: str,
    real: Any,
    fake: Any,
    divergence: str,
    feature_bound: float | None,
    delta: float,
    draws: int,
    seed: int,
    hull: bool,
    tolerance: float,
) -> CertificateProblem:
    """The arguments of `refinement_certificate`, checked, with the complexity of the class of B = 1."""
    parse_divergence(function, divergence)
    if not isinstance(hull, (bool, np.bool_)):
        raise TypeError(f"{function}: hull must be True or False, got {type(hull).__name__}")
    positive(function, "tolerance", tolerance)
    if positive(function, "delta", delta) >= 1.0:
        raise ValueError(f"{function}: delta must be in (0, 1), got {delta}")
    check_seed(function, seed)
    given = _matrix(function, "real", real)
    generated = _matrix(function, "fake", fake, given.shape[1])
    if len(given) < 2:
        raise ValueError(f"{function}: real must have at least 2 samples, got {len(given)}")
    if given.device != generated.device:
        raise ValueError(f"{function}: real is on {given.device}, fake is on {generated.device}")
    order = math.inf if hull else 2
    largest_real, largest_fake = (
        float(torch.linalg.vector_norm(x, order, dim=1, dtype=torch.float64).max()) for x in (given, generated)
    )
    known = feature_bound is not None
    if known and positive(function, "feature_bound", feature_bound) < largest_real * (1 - 1e-6):
        what = "|h_j|" if hull else "norm"
        raise ValueError(
            f"{function}: feature_bound must be at least the largest {what} of a real sample, {largest_real:.6g}, "
            f"got {feature_bound:.6g}"
        )
    whole(function, "draws", draws, 1)
    complexity = (rademacher if hull else rademacher_linear)(given, draws=draws, seed=seed)
    return CertificateProblem(
        real=given.double(),
        fake=generated.double(),
        divergence=divergence,
        hull=bool(hull),
        feature_bound=float(feature_bound) if feature_bound is not None else max(largest_real, largest_fake),
        feature_bound_known=known,
        largest_fake=largest_fake,
        delta=float(delta),
        complexity=complexity,
        tolerance=float(tolerance),
    )


def positive(function: str, argument: str, value: Any) -> float:
    """A finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{function}: {argument} must be a number, got {type(value).__name__}")
    if not 0.0 < value < math.inf:
        raise ValueError(f"{function}: {argument} must be positive and finite, got {value}")
    return float(value)


def _matrix(function: str, argument: str, x: Any, width: int | None = None) -> Tensor:
    tensor = as_tensor(x, function=function, argument=argument)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"{function}: {argument} must be [samples, features], got {list(tensor.shape)}")
    if width is not None and tensor.shape[1] != width:
        raise ValueError(f"{function}: {argument} must have {width} features a sample, got {tensor.shape[1]}")
    bad = count_nonfinite(tensor)
    if bad:
        raise ValueError(f"{function}: {argument} has {bad} NaN or infinite values; only finite values are allowed")
    return tensor


def _dual_norm(difference: Tensor, hull: bool) -> float:
    """sup over the class with B = 1 of <w, difference>."""
    return float(difference.abs().amax() if hull else difference.norm())


def _generator(divergence: str, ratio: Tensor) -> float:
    """The average of f(r)."""
    code, alpha = parse_divergence("refinement_certificate", divergence)
    return float(np.mean(_C.generator(code, alpha, ratio.cpu().numpy())))


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    """The complexity of the class times a factor."""
    return replace(estimate, suprema=estimate.suprema * factor, largest=estimate.bound * factor, given_bound=None)


def _notes(certificate: RefinementCertificate, solved: LinearDual) -> list[str]:
    notes = []
    if not solved.converged:
        notes.append(
            f"the solver stopped after {solved.iterations} steps at a duality gap of {solved.gap:.2g} nats; "
            "the bounds hold all the same, a better refinement exists"
        )
    if certificate.bound_refined >= certificate.trivial_bound:
        notes.append(
            f"the bound is vacuous: no function of the class can tell two samples apart by more than "
            f"{certificate.trivial_bound:.4g}; more real samples are needed"
        )
    if not certificate.function_bound_known:
        notes.append(
            f"M = {certificate.function_bound:.4g} is the largest |h| seen, not known beforehand: the certificate "
            "holds as far as no unseen real sample exceeds it (feature_bound= gives a known one)"
        )
    return notes


def _output_path(function: str, path: str | os.PathLike[str], suffix: str) -> Path:
    from .output import check_output

    where = Path(path)
    if where.suffix.lower() != suffix:
        raise ValueError(f"{function}: path must end in {suffix}, got {str(path)!r}")
    check_output(where)
    return where
