"""Pictures of a refined certificate: the terms of its bounds, and what it proves at each norm bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .certificate_text import class_in_words
from .report import AFTER, BEFORE, REAL, bare, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .certificate_result import RefinementCertificate
    from .norm_bound_search import NormBoundSearch
    from .pipeline_certificate import JobCertificate

_COMPLEXITY, _CONFIDENCE = "#8a8d91", "#c4c7ca"
_LABELLED = 0.06  # of the longest bar: a shorter piece has no room for its number


def draw_terms(axes: Axes, certificate: RefinementCertificate, samples: Mapping[str, float]) -> None:
    """A bar for each sample: its IPM to the real sample and the terms of the deviation, which add up.

    Args:
        samples: IPM to the real sample by name; the first is the unrefined one.
    """
    c = certificate
    longest = max(samples.values()) + c.deviation_term
    deviation = (
        [(c.direct_term, _COMPLEXITY, "white", "direct deviation bound")]
        if c.deviation == "direct"
        else [
            (c.complexity_term, _COMPLEXITY, "white", "2 × Rademacher complexity"),
            (c.confidence_term, _CONFIDENCE, "black", "confidence term"),
        ]
    )
    for row, ipm in enumerate(samples.values()):
        left = 0.0
        pieces = [(ipm, BEFORE if row == 0 else AFTER, "white", "IPM to the real sample"), *deviation]
        for width, colour, ink, label in pieces:
            axes.barh(row, width, 0.6, left=left, color=colour, label=label if row == 0 else None)
            if width > _LABELLED * longest:
                axes.text(left + width / 2, row, f"{width:.3g}", ha="center", va="center", color=ink, fontsize=9)
            left += width
        axes.text(left + 0.01 * longest, row, f"{left:.3g}", va="center", fontweight="bold")
    axes.set_yticks(range(len(samples)), list(samples))
    axes.invert_yaxis()
    caption = f"IPM to the data, at most (probability {c.probability:g})"
    right = 1.12 * longest
    if c.trivial_bound < 1.5 * longest:
        axes.axvline(c.trivial_bound, color=REAL, linewidth=1, linestyle="--")
        caption += "; dashed: what holds in any case"
        right = max(right, 1.05 * c.trivial_bound)
    axes.set_xlim(0, right)
    axes.set_xlabel(caption)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
    bare(axes)


def _own_samples(certificate: RefinementCertificate) -> dict[str, float]:
    return {"generated": certificate.ipm_unrefined, "refined": certificate.ipm_refined}


def draw_certificate(certificate: RefinementCertificate) -> Figure:
    """The terms of both bounds."""
    figure = new_figure(9.5, 3.4, f"Refined by {certificate.divergence}: {class_in_words(certificate)}")
    draw_terms(figure.add_subplot(), certificate, _own_samples(certificate))
    return figure


def draw_curve(improvement: Axes, misfit: Axes, search: NormBoundSearch) -> None:
    """Over B: what is proven, in nats; and the refined sample's IPM in the class with B = 1 beside its target."""
    curve: Any = {name: [point[name] for point in search.curve] for name in search.curve[0]}
    bounds = curve["norm_bound"]
    improvement.plot(bounds, curve["certified_improvement"], "o-", color=AFTER, markersize=4)
    improvement.axhline(0.0, color="0.6", linewidth=0.8, linestyle=":")
    low, high = min(0.0, search.certificate.certified_improvement), max(0.0, *curve["certified_improvement"])
    # A B far too large would leave nothing to see of the others.
    span = max(high - low, 1e-3)
    improvement.set_ylim(
        max(min(0.0, *curve["certified_improvement"]), low - 1.5 * span) - 0.1 * span, high + 0.2 * span
    )
    improvement.set_ylabel("proven improvement (nats)")
    misfit.plot(bounds, curve["unit_ipm"], "o-", color=AFTER, markersize=4, label="refined to real sample")
    target = "2 × Rademacher complexity" if search.rule == "complexity" else "real sample to data, at most"
    misfit.axhline(search.deviation, color=REAL, linewidth=1, linestyle="--", label=target)
    misfit.set_ylabel("IPM of the class with B = 1")
    misfit.set_ylim(bottom=0.0)
    misfit.legend(frameon=False, fontsize=9)
    for axes in (improvement, misfit):
        axes.axvline(search.norm_bound, color=BEFORE, linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("norm bound B")
        bare(axes)


def draw_search(search: NormBoundSearch) -> Figure:
    """The terms at the chosen norm bound, and the curves it was chosen by."""
    figure = new_figure(11, 6.4, f"Norm bound {search.norm_bound:.3g} for {search.certificate.divergence}")
    parts: Any = figure.subfigures(2, 1, height_ratios=[0.8, 1.0])
    upper, lower = parts
    draw_terms(upper.add_subplot(), search.certificate, _own_samples(search.certificate))
    left, right = lower.subplots(1, 2)
    draw_curve(left, right, search)
    return figure


def draw_job(figure: Any, job: JobCertificate) -> None:
    """The certificate's row of a refine job's picture."""
    grid = figure.add_gridspec(1, 3, width_ratios=[2.0, 1.0, 1.0])
    terms = figure.add_subplot(grid[0, 0] if job.search is not None else grid[0, :])
    draw_terms(terms, job.certificate, job.samples)
    if job.search is not None:
        draw_curve(figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[0, 2]), job.search)
