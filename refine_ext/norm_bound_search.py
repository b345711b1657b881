"""The norm bound B of the class, chosen by what its certificate proves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from .arguments import positive
from .certificate import CertificateProblem, certificate_problem
from .certificate_result import RefinementCertificate, dual_norm
from .results import PicturedResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOUBLINGS = 12
_BISECTIONS = 40
# Of the lowest misfit: how near to it the norm bound goes where the search ends at no balance.
_NEAR = 1.05
RULES = {
    "certificate": "the most improvement that is proven for the data",
    "complexity": "nothing is proven; the most improvement beyond what the class's complexity alone would fake",
    "unreachable": "no weights of the generated sample come near enough to the real one to be balanced by what is not "
    "proven; more B brings it no nearer. Latent refinement or guidance can move samples, weights cannot",
    "smallest": "the difference between the samples is within what the class's complexity would fake: refine nothing",
}


@dataclass(eq=False)
class NormBoundSearch(PicturedResult):
    """A norm bound and why it was chosen. Made by `suggest_norm_bound`.

    `plot` draws the terms at B and the curve over B.

    Attributes:
        norm_bound: B.
        certificate: the `RefinementCertificate` at B.
        rule: "certificate", "complexity", "unreachable" or "smallest": see `suggest_norm_bound`.
        reason: the rule in words.
        deviation: of the class with B = 1, what the rule balances its IPM with: the certificate's deviation_term / B,
            or 2 R_n alone where the rule is "complexity".
        curve: one dict for each B that was tried, ascending: norm_bound; certified_improvement (nats);
            dual_value; unit_ipm and unit_bound, of the refined sample in the class with B = 1; ess.
    """

    norm_bound: float
    certificate: RefinementCertificate
    rule: str
    deviation: float
    curve: list[dict[str, float]]

    @property
    def reason(self) -> str:
        return RULES[self.rule]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "norm_bound": self.norm_bound,
            "rule": self.rule,
            "reason": self.reason,
            "deviation": self.deviation,
            "curve": self.curve,
            "certificate": self.certificate.to_dict(),
        }

    def _draw(self) -> Figure:
        from .certificate_figure import draw_search

        return draw_search(self)

    def __str__(self) -> str:
        return f"norm bound {self.norm_bound:.4g}: {self.reason}\n\n{self.certificate}"


def suggest_norm_bound(
    real: Any,
    fake: Any,
    divergence: str = "kl",
    *,
    bounds: Sequence[float] | None = None,
    feature_bound: float | None = None,
    delta: float = 0.05,
    draws: int | Literal["all"] = 1024,
    seed: int = 0,
    hull: bool = False,
    deviation: Literal["rademacher", "direct"] = "rademacher",
    tolerance: float = 1e-7,
    progress: bool = False,
) -> NormBoundSearch:
    r"""The norm bound B whose certificate proves the most: the maximiser of

    ``certified_improvement(B) = dual value(B) - f(1) - B deviation``, ``deviation = 2 R_n(H_1) + 6 M_1 sqrt(...)``, or
    ``M_1 (1 + sqrt(2 log(1/delta))) / sqrt(n)`` with ``deviation="direct"``,

    in nats: a lower bound, with probability 1 − delta, of how much closer to P the refined density ratio is than the
    unrefined one, in the Bregman divergence of f (`kl`: of the gain in log-likelihood on unseen data).

    IPM_H itself cannot choose B: measured by the functions of H_B it is proportional to B, and measured by a fixed
    class, that of B = 1, the refined sample's IPM to the real one falls as B grows, down to where the weights follow
    every accident of the real sample. Nats have one scale for all B. The dual value is concave in B with slope
    ``IPM_{H_1}(real, refined)`` (envelope theorem), so that the best B is where the refined sample comes as near to
    the real sample as the real sample is proven to be to P, ``IPM_{H_1}(real, refined) = deviation``, and no nearer.

    No price is paid for the choice: the deviation is that of H_1, and the one event it holds on carries the
    certificates of all B, whatever they were chosen by.

    Args:
        bounds: the B to try. Left out, B is doubled from 1 / feature_bound, then searched for between two of them.
        real, fake, divergence, feature_bound, delta, draws, seed, hull, deviation, tolerance: as
            `refinement_certificate`.
        progress: show a progress bar.

    Returns:
        `NormBoundSearch`: norm_bound, its certificate, the curve, and the rule that was followed: "certificate" as
        above; where no B has a positive certified improvement, "complexity": the same with 2 R_n alone as the
        deviation, which holds on average rather than with probability 1 − delta, and is what the class would gain by
        fitting noise; where that is not positive either, "smallest": the smallest B tried, next to no refinement.
        "unreachable": the refined sample's IPM never falls to the deviation, because the generated sample does not
        reach the data; then the smallest B that brings it within 5 % of the lowest IPM found.

    Raises:
        TypeError, ValueError: as `refinement_certificate`; ValueError for bounds that are empty or not positive.

    Source: Husain, De Bortoli and Nock 2026, whose certificate is maximised; the balance of misfit and noise is
    Morozov's (1966) discrepancy principle.

    >>> import torch, refine_ext as rx
    >>> search = rx.suggest_norm_bound(torch.ones(40000, 1), torch.arange(2.0)[:, None], feature_bound=1.0)
    >>> search.rule, round(search.deviation, 2)  # the refined sample's, 1 / (1 + e^B), is that near B = 3
    ('certificate', 0.05)
    """
    name = "suggest_norm_bound"
    problem = certificate_problem(
        name, real, fake, divergence, feature_bound, delta, draws, seed, hull, deviation, tolerance
    )
    grid = None if bounds is None else sorted(positive(name, "bounds", b) for b in bounds)
    if grid is not None and not grid:
        raise ValueError(f"{name}: bounds must hold at least one number")
    search = _Search(problem, progress)
    whole, noise, reached = search.deviation, search.noise, True
    if grid is not None:
        for bound in grid:
            search.at(bound)
    else:
        unrefined = dual_norm(problem.real.mean(0) - problem.fake.mean(0), problem.hull)
        first = 1.0 / problem.feature_bound
        if unrefined <= noise:
            search.at(1e-3 * first)
        else:
            reached = search.balance(first, whole if unrefined > whole else noise)
    search.bar.close()
    found = [search.found[bound] for bound in sorted(search.found)]
    rule, best = _choose(found, whole, noise) if reached else ("unreachable", _nearest(found))
    balanced = noise if rule == "complexity" else whole
    return NormBoundSearch(best.norm_bound, best, rule, balanced, [_point(c) for c in found])


def _choose(found: list[RefinementCertificate], whole: float, noise: float) -> tuple[str, RefinementCertificate]:
    for rule, deviation in (("certificate", whole), ("complexity", noise)):
        best = max(found, key=partial(_improvement, deviation=deviation))
        if _improvement(best, deviation) > 0.0:
            return rule, best
    return "smallest", found[0]


def _nearest(found: list[RefinementCertificate]) -> RefinementCertificate:
    misfits = [c.ipm_refined / c.norm_bound for c in found]
    return next(c for c, misfit in zip(found, misfits, strict=True) if misfit <= _NEAR * min(misfits))


def _improvement(certificate: RefinementCertificate, deviation: float) -> float:
    return certificate.dual_value - certificate.divergence_at_one - certificate.norm_bound * deviation


def _point(certificate: RefinementCertificate) -> dict[str, float]:
    return {
        "norm_bound": certificate.norm_bound,
        "certified_improvement": certificate.certified_improvement,
        "dual_value": certificate.dual_value,
        "unit_ipm": certificate.ipm_refined / certificate.norm_bound,
        "unit_bound": certificate.bound_refined / certificate.norm_bound,
        "ess": certificate.ess,
    }


class _Search:
    """The certificates found so far, each started from the one of the next smaller B."""

    def __init__(self, problem: CertificateProblem, progress: bool) -> None:
        from tqdm import tqdm

        self.problem = problem
        self.found: dict[float, RefinementCertificate] = {}
        self.bar = tqdm(desc="norm bound", unit="solve", disable=not progress)
        unit = problem.deviation_terms(1.0)
        self.deviation = unit["complexity_term"] + unit["confidence_term"] + unit["direct_term"]
        # With a delta near 1 the direct deviation can be the smaller one.
        self.noise = min(2 * float(problem.complexity), self.deviation)

    def at(self, bound: float) -> RefinementCertificate:
        if bound not in self.found:
            below = max((b for b in self.found if b < bound), default=None)
            start = None if below is None else self.found[below].discriminator_weight
            self.found[bound] = self.problem.certify(bound, start)
            self.bar.update(1)
        return self.found[bound]

    def misfit(self, bound: float) -> float:
        return self.at(bound).ipm_refined / bound

    def balance(self, first: float, deviation: float) -> bool:
        """Search for the B at which the misfit is the deviation; it falls as B grows. False if it never gets there."""
        high = first
        for _ in range(_DOUBLINGS):
            if self.misfit(high) <= deviation:
                break
            high *= 2.0
        else:
            return False
        below = [b for b in self.found if b < high]
        low = max(below, default=0.0)
        for _ in range(_BISECTIONS):
            # The improvement is concave in B with slope misfit - deviation, which bounds what is left to gain.
            best = max(self.found.values(), key=lambda c: _improvement(c, deviation))
            left = (high - low) * max(0.0, self.misfit(low) - deviation if low else math.inf)
            if left <= 0.01 * max(_improvement(best, deviation), 1e-12) or high - low <= 1e-3 * high:
                break
            middle = math.sqrt(low * high) if low else 0.25 * high
            if self.misfit(middle) > deviation:
                low = middle
            else:
                high = middle
        return True
