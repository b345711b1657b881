"""What the bound of a diffusion knows at one T: its terms, how certain each is, as a table and JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .diffusion_scores import Term
from .results import JSONResult


@dataclass(eq=False, repr=False)
class DiffusionBound(JSONResult):
    """Every term of ``A + sqrt2 R B + sqrt2 R C + L_sm`` at one T, in nats. Made by `diffusion_bound`.

    A `Term` is (value, stderr), the standard error that of the Monte Carlo alone; a term without any has 0.

    Attributes:
        time: T.
        mutual_information: -A, ``(1/m) sum_i KL(E_T(x_i) || (1/m) sum_j E_T(x_j))``, between 0 and log m.
        leave_one_out: the same with each sample's own E_T(x_i) left out of its mixture. In expectation over the
            training set the mutual information of a fresh sample and its noised state is between the two (Poole et al.
            2019); NaN for a single sample.
        prior_gap: B, ``(1/m) sum_i sqrt(KL(E_T(x_i) || prior))``, in closed form.
        generator: C, ``sqrt((T - t_0) L^2 / (2 m N) sum_k beta(t_k))``; None without a model.
        score_matching: L_sm; None without a model.
        score_norm: L; None without a model. As the largest of noisy means it errs upwards.
        sub_gaussian: R.
        m, d: how many samples, of how many numbers.
        draws, seed: of the noise of A.
        schedule: the forward process, as `ForwardProcess.to_dict`.
        steps, model_draws, parametrization: of the model's terms; None without a model.
        kl, kl_variance, kl_leave_one_out, prior_kl_root: `[m]` float64, the samples' parts of A with their Monte-Carlo
            variance, of the leave-one-out estimate, and of B.
    """

    time: float
    mutual_information: Term
    leave_one_out: Term
    prior_gap: Term
    generator: Term | None
    score_matching: Term | None
    score_norm: Term | None
    sub_gaussian: float
    m: int
    d: int
    draws: int
    seed: int
    schedule: dict[str, Any]
    steps: int | None = None
    model_draws: int | None = None
    parametrization: str | None = None
    kl: Tensor = field(default_factory=lambda: torch.empty(0))
    kl_variance: Tensor = field(default_factory=lambda: torch.empty(0))
    kl_leave_one_out: Tensor = field(default_factory=lambda: torch.empty(0))
    prior_kl_root: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def complete(self) -> bool:
        """Whether the model's terms C and L_sm are there; without them `bound` is of the data terms only."""
        return self.generator is not None

    @property
    def data_terms(self) -> Term:
        """``A + sqrt2 R B``."""
        value = math.sqrt(2) * self.sub_gaussian * self.prior_gap.value - self.mutual_information.value
        return Term(value, self.mutual_information.stderr)

    @property
    def bound(self) -> Term:
        """``A + sqrt2 R B + sqrt2 R C + L_sm``; without a model the data terms alone."""
        if self.generator is None or self.score_matching is None:
            return self.data_terms
        factor = math.sqrt(2) * self.sub_gaussian
        value = self.data_terms.value + factor * self.generator.value + self.score_matching.value
        errors = (self.data_terms.stderr, factor * self.generator.stderr, self.score_matching.stderr)
        return Term(value, math.hypot(*errors))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, without the parts of single samples; each term as {value, stderr}."""
        terms = (
            "bound", "data_terms", "mutual_information", "leave_one_out", "prior_gap", "generator", "score_matching",
            "score_norm",
        )  # fmt: skip
        facts = ("sub_gaussian", "m", "d", "draws", "seed", "schedule", "steps", "model_draws", "parametrization")
        found = {name: getattr(self, name) for name in terms}
        return {
            "time": self.time,
            "complete": self.complete,
            **{name: None if term is None else _plain(term) for name, term in found.items()},
            **{name: getattr(self, name) for name in facts},
        }

    def __str__(self) -> str:
        lines = [f"T = {self.time:g}, {self.schedule['name']} schedule, m = {self.m}, d = {self.d}, nats"]
        lines.append(f"A      {Term(-self.mutual_information.value, self.mutual_information.stderr)}")
        lines.append(f"B      {self.prior_gap}")
        if self.complete:
            lines += [f"C      {self.generator}", f"L_sm   {self.score_matching}"]
            total = f"A + √2 R (B + C) + L_sm, R = {self.sub_gaussian:g}"
        else:
            total = f"A + √2 R B, R = {self.sub_gaussian:g}; without a model C and L_sm are left out"
        return "\n".join([*lines, f"bound  {self.bound}  ({total})"])

    def __repr__(self) -> str:
        return f"DiffusionBound(time={self.time:g}, bound={self.bound}, complete={self.complete})"


def _plain(term: Term) -> dict[str, float]:
    return {"value": term.value, "stderr": term.stderr}
