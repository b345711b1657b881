"""What a refined certificate knows: the terms of its bounds, the refined weights, the bounds of other samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .complexity_estimate import Estimate
from .density_ratio import density_ratio
from .results import PicturedResult
from .samples import as_tensor, count_nonfinite

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(eq=False, repr=False)
class RefinementCertificate(PicturedResult):
    """A bound on IPM_H(P, refined sample) and every term of it. Made by `refinement_certificate`.

    `plot` draws the terms of both bounds.

    Attributes:
        ipm_unrefined: B ‖E_real φ − E_fake φ‖, the IPM between the real sample and the generated one.
        ipm_refined: the same with the refined weights.
        divergence_value: D_f of the refined sample from the generated one, the average of f(r), nats.
        divergence_at_one: f(1), the value where nothing is refined: 0, except −2 log 2 for `gan`.
        dual_value: the maximum that the solver reached; divergence_value + ipm_refined − duality_gap.
        duality_gap: proven bound on how far dual_value is below the true maximum.
        complexity: `Estimate` of the empirical Rademacher complexity of H on the real sample.
        deviation: "rademacher" or "direct": which terms bound sup_{h in H} |E_P h − E_real h|; the others are 0.
        complexity_term: of "rademacher", twice the upper limit of the complexity, monte_carlo_term included.
        monte_carlo_term: the part of complexity_term that more draws would take away.
        confidence_term: of "rademacher", 6 M sqrt(log(2 / confidence_delta) / (2n)).
        direct_term: of "direct", M (1 + sqrt(2 log(1 / confidence_delta))) / sqrt(n).
        confidence_delta, monte_carlo_delta: the chance that the real samples or the draws of signs make the terms fail;
            their sum is 1 − probability.
        probability: with which all bounds of this certificate hold together. One of the other deviation is another
            event: both hold with probability 2 · probability − 1.
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
        iterations: of the solver.
        mean_real: `[d]` float64 average of the real sample's features.
        notes: what to mind.
    """

    ipm_unrefined: float
    ipm_refined: float
    divergence_value: float
    divergence_at_one: float
    dual_value: float
    duality_gap: float
    deviation: str
    complexity: Estimate
    complexity_term: float
    monte_carlo_term: float
    confidence_term: float
    direct_term: float
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
        """complexity_term + confidence_term + direct_term: how far E_P h and E_real h can be apart, for all h of H."""
        return self.complexity_term + self.confidence_term + self.direct_term

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
        """bound_unrefined − bound_refined, at least D_f − f(1) − duality_gap.

        It is never far below 0 and proves nothing: the refined sample is fitted to the real one. Of a model that is
        P itself, refined by 100 real samples, 374 of 400 samples came out further from P, each with a positive gain
        (`mixture, perfect model` of benchmarks/results/certificate.json). See `proven_nearer`.
        """
        return self.ipm_unrefined - self.ipm_refined

    @property
    def proven_nearer(self) -> bool:
        """gain > 2 deviation_term: IPM_H(P, refined sample) < IPM_H(P, generated sample), on the bounds' own event.

        There |E_P h − E_real h| <= deviation_term for all h of H, so that by the triangle inequality
        IPM_H(P, refined) <= ipm_refined + deviation_term and IPM_H(P, generated) >= ipm_unrefined − deviation_term;
        the first is below the second where the gain is more than both deviations. False: nothing is proven.
        """
        return self.gain > 2 * self.deviation_term

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
        phi = matrix("RefinementCertificate.outputs", "features", features, len(self.discriminator_weight))
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
        return self.norm_bound * dual_norm(self.mean_real - mean_features.to(self.mean_real), self.hull)

    def _average(self, features: Any, weights: Any) -> Tensor:
        name = "RefinementCertificate.bound_of"
        phi = matrix(name, "features", features, len(self.mean_real)).double()
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
            "bound_refined", "bound_unrefined", "bound_by_duality", "gain", "proven_nearer", "certified_improvement",
            "ipm_refined", "ipm_unrefined", "deviation", "deviation_term", "complexity_term", "monte_carlo_term",
            "confidence_term", "direct_term",
            "divergence_value", "divergence_at_one", "dual_value", "duality_gap", "probability", "confidence_delta",
            "monte_carlo_delta", "n", "num_fake", "ess", "norm_bound", "function_bound", "function_bound_known",
            "trivial_bound", "divergence", "hull", "shift", "converged", "iterations", "notes",
        )  # fmt: skip
        facts = {name: getattr(self, name) for name in names}
        return {**facts, "features": len(self.discriminator_weight), "complexity": self.complexity.to_dict()}

    def _draw(self) -> Figure:
        from .certificate_figure import draw_certificate

        return draw_certificate(self)

    def __str__(self) -> str:
        from .certificate_text import table

        return table(self)

    def __repr__(self) -> str:
        bounds = f"bound_refined={self.bound_refined:.6g}, bound_unrefined={self.bound_unrefined:.6g}"
        return f"RefinementCertificate({bounds}, probability={self.probability:g})"


def matrix(function: str, argument: str, x: Any, width: int | None = None) -> Tensor:
    tensor = as_tensor(x, function=function, argument=argument)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"{function}: {argument} must be [samples, features], got {list(tensor.shape)}")
    if width is not None and tensor.shape[1] != width:
        raise ValueError(f"{function}: {argument} must have {width} features a sample, got {tensor.shape[1]}")
    bad = count_nonfinite(tensor)
    if bad:
        raise ValueError(f"{function}: {argument} has {bad} NaN or infinite values; only finite values are allowed")
    return tensor


def dual_norm(difference: Tensor, hull: bool) -> float:
    """sup over the class with B = 1 of <w, difference>."""
    return float(difference.abs().amax() if hull else difference.norm())
