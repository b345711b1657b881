"""The refined certificate: how far a refined sample can be from the data's distribution, as a discriminator sees it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from . import _C
from .arguments import check_seed, positive, whole
from .certificate_result import RefinementCertificate, dual_norm, matrix
from .complexity_estimate import Estimate
from .density_ratio import density_ratio
from .divergence import parse_divergence
from .hull_dual import solve_hull_dual
from .linear_dual import LinearDual, solve_linear_dual
from .rademacher import rademacher, rademacher_linear

# Of delta, for the Monte-Carlo error of the complexity: its width is some hundredth of the confidence term's, and both
# grow with the logarithm of what they are given.
MONTE_CARLO_SHARE = 0.1
DEVIATIONS = ("rademacher", "direct")


def refinement_certificate(
    real: Any,
    fake: Any,
    divergence: str = "kl",
    *,
    norm_bound: float = 1.0,
    feature_bound: float | None = None,
    delta: float = 0.05,
    draws: int | Literal["all"] = 1024,
    seed: int = 0,
    hull: bool = False,
    deviation: Literal["rademacher", "direct"] = "rademacher",
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

    For the linear class, ``deviation="direct"`` has in place of both terms ``M (1 + sqrt(2 log(1/delta))) / sqrt(n)``,
    which is always smaller, about a third. There ``sup_h |E_P h - E_real h| = B ‖E_P φ - E_real φ‖``, whose mean is at
    most B sqrt(E‖φ‖² / n) <= M / sqrt(n) (Jensen; independent draws), and which one real sample changes by at most
    2 M / n, so that it exceeds its mean by t with probability at most exp(-n t² / (2 M²)) (McDiarmid). All of delta
    goes to it; the complexity is reported, not used. Each of the two certificates holds with probability 1 − delta,
    both together only with 1 − 2 delta: choose one before looking at the real samples, or halve delta.

    Args:
        real: ``[n, d]`` features of real samples (``[n, m]`` outputs), floating; array or tensor.
        fake: ``[N, d]`` features of generated samples (``[N, m]`` outputs).
        divergence: one of `divergences()`; for ``alpha:<a>`` any a other than 0 and 1.
        norm_bound: B > 0, in units of output per unit of feature.
        feature_bound: sup ‖φ(x)‖_2 over all x that P can give (sup max_j |h_j(x)| for a hull), so that M is B times
            it. Left out, the largest seen, and the certificate then holds as far as no unseen real sample is larger.
        delta: in (0, 1).
        draws: sign vectors of the Rademacher complexity; "all" for all 2^n of few samples, without Monte-Carlo error.
        seed: of the draws.
        hull: whether the columns are discriminators whose hull is the class.
        deviation: "rademacher", or "direct" for the linear class, which is tighter; not by the result of either.
        tolerance: relative duality gap that the solver reaches.

    Returns:
        `RefinementCertificate`: every term, both bounds, the refined weights, h*.

    Raises:
        TypeError: an argument of a type or dtype that is not supported.
        ValueError: fewer than 2 real samples or no generated one, values that are not finite, shapes or devices that
            differ, a number out of its range, an unknown divergence, a feature_bound that a real sample exceeds,
            an unknown deviation, "direct" for a hull.

    Warns:
        RuntimeWarning: the solver did not reach the tolerance. The bounds count its gap and hold all the same.

    Source: Husain, De Bortoli and Nock 2026, duality and the refined model; Mohri, Rostamizadeh and Talwalkar 2018,
    Theorem 3.3, for functions with values in [−M, M]; McDiarmid 1989 for "direct".

    >>> import torch, refine_ext as rx
    >>> cert = rx.refinement_certificate(torch.ones(400, 1), torch.arange(2.0)[:, None], norm_bound=2.0)
    >>> round(cert.ipm_unrefined, 4), round(cert.ipm_refined, 4)  # 2 (1 - 1/2), 2 (1 - e^2 / (1 + e^2))
    (1.0, 0.2384)
    """
    problem = certificate_problem(
        "refinement_certificate", real, fake, divergence, feature_bound, delta, draws, seed, hull, deviation, tolerance
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
    deviation: str
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
            norm_bound * dual_norm(mean_real - mean, self.hull) for mean in (self.fake.mean(0), mean_refined)
        )
        certificate = RefinementCertificate(
            ipm_unrefined=unrefined,
            ipm_refined=refined,
            divergence_value=_generator(self.divergence, ratio.ratio),
            divergence_at_one=_generator(self.divergence, torch.ones(1, dtype=torch.float64)),
            dual_value=solved.value,
            duality_gap=solved.gap,
            deviation=self.deviation,
            **self.deviation_terms(norm_bound),
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

    def deviation_terms(self, norm_bound: float) -> dict[str, Any]:
        """The terms that bound sup_{h in H} |E_P h - E_real h|, by the names of the certificate."""
        complexity = _scaled(self.complexity, norm_bound)
        if self.deviation == "direct":
            width = (1 + math.sqrt(2 * math.log(1 / self.delta))) / math.sqrt(len(self.real))
            return {
                "complexity": complexity,
                "complexity_term": 0.0,
                "monte_carlo_term": 0.0,
                "confidence_term": 0.0,
                "direct_term": norm_bound * self.feature_bound * width,
                "confidence_delta": self.delta,
                "monte_carlo_delta": 0.0,
            }
        monte_carlo = MONTE_CARLO_SHARE * self.delta
        upper = complexity.upper(monte_carlo)
        width = math.sqrt(math.log(2 / (self.delta - monte_carlo)) / (2 * len(self.real)))
        return {
            "complexity": complexity,
            "complexity_term": 2 * upper,
            "monte_carlo_term": 2 * (upper - float(complexity)),
            "confidence_term": 6 * norm_bound * self.feature_bound * width,
            "direct_term": 0.0,
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
    draws: int | Literal["all"],
    seed: int,
    hull: bool,
    deviation: str,
    tolerance: float,
) -> CertificateProblem:
    """The arguments of `refinement_certificate`, checked, with the complexity of the class of B = 1."""
    parse_divergence(function, divergence)
    if not isinstance(hull, (bool, np.bool_)):
        raise TypeError(f"{function}: hull must be True or False, got {type(hull).__name__}")
    check_deviation(function, deviation)
    if deviation == "direct" and hull:
        raise ValueError(
            f"{function}: deviation='direct' is for the linear class (hull=False); with hull=True only 'rademacher'"
        )
    positive(function, "tolerance", tolerance)
    if positive(function, "delta", delta) >= 1.0:
        raise ValueError(f"{function}: delta must be in (0, 1), got {delta}")
    check_seed(function, seed)
    given = matrix(function, "real", real)
    generated = matrix(function, "fake", fake, given.shape[1])
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
    if draws != "all":
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
        deviation=deviation,
        tolerance=float(tolerance),
    )


def check_deviation(function: str, deviation: Any) -> None:
    if deviation not in DEVIATIONS:
        raise ValueError(f"{function}: deviation must be one of {', '.join(DEVIATIONS)}, got {deviation!r}")


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
