"""What the bound of a VAE knows: its terms, how certain each is, as a table, JSON and a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .results import PicturedResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TERMS = ("reconstruction", "rate", "mutual_information", "encoder_term", "generator_term", "bound", "earlier_bound")


@dataclass(eq=False, repr=False)
class VAEBound(PicturedResult):
    """A VAE's generalisation bound and every term of it, in nats a sample. Made by :func:`vae_bound`.

    `plot` draws the terms of both bounds.

    Attributes:
        reconstruction: REC = -E log p(x|z).
        rate: RATE = E KL(q(z|x) || N(0, I)).
        mutual_information: MI = E_z KL(p(.|z) || p'(.|z)); None without an auxiliary decoder.
        likelihood_gap: E [log p(x|z) - log p'(x|z)] at the samples themselves, of either sign; None without one.
        rho, num_training: rho and m of the bound.
        stderr: of each term by name, over samples and latents, roots by the delta method.
        monte_carlo_stderr: the part that more latents would take away, the samples given; empty for one draw.
        n, draws, seed: samples, latents a sample, and whose latents they are.
        likelihood, latents: the law of pixels; where the latents of MI are from.
        encoder_information: I_q(x; z), and marginal_divergence: KL(q(z) || N(0, I)); None without `aggregate`.
        per_sample: "reconstruction", "rate" and, with an auxiliary decoder, "mutual_information", ``[n]`` float64.
    """

    reconstruction: float
    rate: float
    mutual_information: float | None
    likelihood_gap: float | None
    rho: float
    num_training: int
    stderr: dict[str, float]
    monte_carlo_stderr: dict[str, float]
    n: int
    draws: int
    seed: int
    likelihood: str
    latents: str
    encoder_information: float | None
    marginal_divergence: float | None
    per_sample: dict[str, Tensor] = field(default_factory=dict)

    @property
    def encoder_term(self) -> float:
        """(1 + rho) sqrt(RATE)."""
        return (1 + self.rho) * math.sqrt(max(0.0, self.rate))

    @property
    def generator_term(self) -> float | None:
        """(1 + rho) sqrt(MI / m); None without an auxiliary decoder."""
        if self.mutual_information is None:
            return None
        return (1 + self.rho) * math.sqrt(max(0.0, self.mutual_information) / self.num_training)

    @property
    def bound(self) -> float | None:
        """REC + encoder_term + generator_term; None without an auxiliary decoder."""
        if self.generator_term is None:
            return None
        return self.reconstruction + self.encoder_term + self.generator_term

    @property
    def earlier_bound(self) -> float:
        """REC + sqrt(RATE), without the generator's term."""
        return self.reconstruction + math.sqrt(max(0.0, self.rate))

    @property
    def elbo(self) -> float:
        """-REC - RATE, the evidence lower bound on E log p(x)."""
        return -self.reconstruction - self.rate

    @classmethod
    def of(
        cls,
        *,
        reconstruction: Tensor,
        rate: Tensor,
        information: Tensor | None,
        gap: Tensor | None,
        within: Tensor | None,
        aggregated: Tensor | None,
        **facts: Any,
    ) -> VAEBound:
        """From ``[n]`` averages over latents, and the ``[3, 3]`` covariance of REC, RATE and MI over latents."""
        n = len(reconstruction)
        columns = [reconstruction, rate, torch.zeros(n, dtype=torch.float64) if information is None else information]
        values = torch.stack(columns)
        split = None if aggregated is None else float(aggregated.mean())
        per_sample = {"reconstruction": reconstruction, "rate": rate}
        if information is not None:
            per_sample["mutual_information"] = information
        result = cls(
            reconstruction=float(reconstruction.mean()),
            rate=float(rate.mean()),
            mutual_information=None if information is None else float(information.mean()),
            likelihood_gap=None if gap is None else float(gap.mean()),
            stderr={},
            monte_carlo_stderr={},
            n=n,
            encoder_information=split,
            marginal_divergence=None if split is None else float(rate.mean()) - split,
            per_sample=per_sample,
            **facts,
        )
        result.stderr = _deviations(result, torch.cov(values) / n)
        if gap is not None:
            result.stderr["likelihood_gap"] = float(gap.std()) / math.sqrt(n)
        if within is not None:
            result.monte_carlo_stderr = _deviations(result, within)
        return result

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples' own values, as plain numbers, for JSON."""
        names = (
            *_TERMS, "elbo", "likelihood_gap", "encoder_information", "marginal_divergence", "rho", "num_training",
            "stderr", "monte_carlo_stderr", "n", "draws", "seed", "likelihood", "latents",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def _draw(self) -> Figure:
        from .report import AFTER, BEFORE, bare, new_figure

        figure = new_figure(9.5, 2.8, f"VAE bound, {self.likelihood} likelihood, {self.n} samples")
        axes = figure.add_subplot()
        pieces = {
            "earlier": [("REC", self.reconstruction, BEFORE), ("√RATE", math.sqrt(max(0.0, self.rate)), AFTER)],
            "bound": [
                ("REC", self.reconstruction, BEFORE),
                (f"{1 + self.rho:g} √RATE", self.encoder_term, AFTER),
                (f"{1 + self.rho:g} √(MI/m)", self.generator_term or 0.0, "#8a8d91"),
            ],
        }
        for row, (name, parts) in enumerate(pieces.items()):
            left = 0.0
            for label, width, colour in parts:
                shown = label if name == "bound" else None
                axes.barh(row, width, 0.6, left=left, color=colour, label=shown)
                left += width
            error = self.stderr.get("bound" if name == "bound" else "earlier_bound", 0.0)
            axes.errorbar(left, row, xerr=error, color="black", capsize=4, linewidth=1)
            axes.annotate(f"{left:.4g}", (left + error, row), xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(2), list(pieces) if self.bound is not None else ["earlier", "bound without MI"])
        axes.margins(x=0.12)
        axes.set_xlabel("nats a sample")
        axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
        bare(axes)
        return figure

    def __str__(self) -> str:
        c = f"{1 + self.rho:g}"
        rows: list[tuple[str, str, float | None]] = [
            ("reconstruction", "REC = -E log p(x|z)", self.reconstruction),
            ("rate", "RATE = E KL(q(z|x) || prior)", self.rate),
            ("mutual_information", "MI = E KL(p || p')", self.mutual_information),
            ("encoder_term", f"{c} sqrt(RATE)", self.encoder_term),
            ("generator_term", f"{c} sqrt(MI / m)", self.generator_term),
            ("bound", "bound", self.bound),
            ("earlier_bound", "earlier, REC + sqrt(RATE)", self.earlier_bound),
        ]
        if self.encoder_information is not None:
            rows += [
                ("", "of RATE: I_q(x; z)", self.encoder_information),
                ("", "of RATE: KL(q(z) || prior)", self.marginal_divergence),
            ]
        lines = [
            f"VAE bound in nats a sample, {self.likelihood} likelihood, {self.n} samples, {self.draws} latents each, "
            f"m = {self.num_training}"
        ]
        for key, name, value in rows:
            if value is None:
                lines.append(f"{name:<32}{'-':>12}   needs an auxiliary decoder")
                continue
            error = f" ± {self.stderr[key]:.2g}" if key in self.stderr else ""
            lines.append(f"{name:<32}{value:>12.6g}{error}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        bound = "None" if self.bound is None else f"{self.bound:.6g}"
        return f"VAEBound(bound={bound}, earlier_bound={self.earlier_bound:.6g}, n={self.n})"


def _deviations(result: VAEBound, covariance: Tensor) -> dict[str, float]:
    """Standard errors of all terms from the covariance of REC, RATE and MI, roots linearised at their value.

    RATE and MI are averages of what is never negative: one that is 0 does not vary.
    """
    c, m = 1 + result.rho, result.num_training
    root = 0.5 / math.sqrt(result.rate) if result.rate > 0 else 0.0
    information = result.mutual_information
    slope = 0.5 * c / math.sqrt(m * information) if information is not None and information > 0 else 0.0
    directions: dict[str, tuple[float, float, float]] = {
        "reconstruction": (1, 0, 0),
        "rate": (0, 1, 0),
        "encoder_term": (0, c * root, 0),
        "earlier_bound": (1, root, 0),
    }
    if information is not None:
        directions |= {
            "mutual_information": (0, 0, 1),
            "generator_term": (0, 0, slope),
            "bound": (1, c * root, slope),
        }
    found = {}
    for name, weights in directions.items():
        w = torch.tensor(weights, dtype=torch.float64)
        found[name] = math.sqrt(max(0.0, float(w @ covariance @ w)))
    return found
