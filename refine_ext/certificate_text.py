"""A refined certificate as a table, with what it says in words."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .certificate_result import RefinementCertificate

_WIDTH = 100


def table(certificate: RefinementCertificate) -> str:
    """Both bounds term by term, the refinement's gains, and what they mean."""
    c = certificate
    lines = [
        f"refined certificate, holds with probability {c.probability:g} over the draw of {c.n} real samples",
        f"class    {class_in_words(c)}; |h| at most {c.function_bound:.4g}"
        + ("" if c.function_bound_known else ", the largest seen"),
        f"refined  {c.num_fake} generated samples by {c.divergence}, {c.ess:.0f} of them effective",
        "",
        f"{'':<34}{'generated':>12}{'refined':>12}",
    ]
    rows: list[tuple[str, float, float, str]] = [
        ("IPM to the real sample", c.ipm_unrefined, c.ipm_refined, ""),
        *((name, value, value, remark) for name, value, remark in _deviation_rows(c)),
        ("IPM to the data, at most", c.bound_unrefined, c.bound_refined, f"gain {c.gain:.4g}"),
    ]
    for name, before, after, remark in rows:
        lines.append(f"{name:<34}{before:>12.4g}{after:>12.4g}" + (f"   {remark}" if remark else ""))
    excess = c.divergence_value - c.divergence_at_one
    lines += [
        "",
        f"{'gain that proves the refined sample nearer':<46}{2 * c.deviation_term:>12.4g}, "
        + ("exceeded: it is nearer" if c.proven_nearer else "not exceeded: the gain proves nothing"),
        f"{'divergence of refined from generated':<46}{excess:>12.4g} nats, the gain is at least this less the gap",
        f"{'duality gap of the solver':<46}{c.duality_gap:>12.2g} nats",
        f"{'improvement of the dual objective, at least':<46}{c.certified_improvement:>12.4g} nats on unseen data"
        + ("" if c.certified_improvement > 0 else ": nothing is proven"),
        "",
    ]
    says = (
        f"No function of this class tells the data's distribution from the weighted generated sample by more than "
        f"{c.bound_refined:.4g}, and from the unweighted one by more than {c.bound_unrefined:.4g}. This is about the "
        f"sample, not about other draws of its generator, and about this class, not about other functions; it needs a "
        f"class chosen without these real samples."
    )
    lines += textwrap.wrap(says, _WIDTH)
    for note in c.notes:
        lines += textwrap.wrap(f"note: {note}", _WIDTH, subsequent_indent="      ")
    return "\n".join(lines)


def _deviation_rows(c: RefinementCertificate) -> list[tuple[str, float, str]]:
    """What bounds the real sample's own distance from the data: name, value, remark."""
    if c.deviation == "direct":
        return [
            ("direct deviation bound", c.direct_term, f"M (1 + sqrt(2 log(1/d))) / sqrt(n), d = {c.confidence_delta:g}")
        ]
    return [
        ("2 x Rademacher complexity", c.complexity_term, f"upper limit, {c.complexity.draws} draws"),
        ("confidence, 6M sqrt(log(2/d')/2n)", c.confidence_term, f"d' = {c.confidence_delta:g}"),
    ]


def class_in_words(certificate: RefinementCertificate) -> str:
    """The class of functions in one phrase."""
    count = len(certificate.discriminator_weight)
    if certificate.hull:
        return f"hull of +-{certificate.norm_bound:.4g} times {count} discriminators"
    return f"<w, phi> with norm(w) at most {certificate.norm_bound:.4g} on {count} features"
