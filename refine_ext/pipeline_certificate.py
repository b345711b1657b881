"""The certificate of a refine job: how far its sample can be from the data, by real rows that no fit has seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .io import RowSource
from .judging import random_rows, take

if TYPE_CHECKING:
    from torch import Tensor

    from .certificate_result import RefinementCertificate
    from .discriminator import Discriminator
    from .norm_bound_search import NormBoundSearch
    from .pipeline import RefineOptions

# Rows of each kind that the class's own refinement is solved on: its cost grows with them, and its bound with the real
# ones only.
_MOST_ROWS = 10_000
# Features of the larger of the default discriminators, and bytes a feature that the solver needs at its peak.
_USUAL_FEATURES, _BYTES_PER_FEATURE = 512, 128


@dataclass
class JobCertificate:
    """What a refine job is certified for.

    Attributes:
        certificate: the class, the terms, and the refinement that the class itself would choose, on a subset of the
            generated rows.
        search: how the norm bound was chosen; None where it was given.
        samples: IPM to the held-out real rows of: "generated", all rows; "written", the job's own refined sample
            (or its weights); "certificate's own", the certificate's refinement.
        features: what the class is linear in, in words.
        notes: what to mind, besides the certificate's own.
    """

    certificate: RefinementCertificate
    search: NormBoundSearch | None
    samples: dict[str, float]
    features: str
    notes: list[str] = field(default_factory=list)

    def bound(self, name: str) -> float:
        """What IPM_H(P, this sample) is at most; all of them hold at once."""
        return self.samples[name] + self.certificate.deviation_term

    def proven_nearer(self, name: str) -> bool:
        """Whether this sample is proven nearer to P than all generated rows: see `RefinementCertificate`."""
        return self.samples["generated"] - self.samples[name] > 2 * self.certificate.deviation_term

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "class": self.features,
            "samples": {
                name: {"ipm": ipm, "bound": self.bound(name), "proven_nearer": self.proven_nearer(name)}
                for name, ipm in self.samples.items()
            },
            "deviation_term": self.certificate.deviation_term,
            "certificate": self.certificate.to_dict(),
            "search": None
            if self.search is None
            else {k: v for k, v in self.search.to_dict().items() if k != "certificate"},
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """A few lines for the job's summary."""
        c = self.certificate
        added = f"{c.complexity_term:.3g} complexity + {c.confidence_term:.3g} confidence"
        if c.deviation == "direct":
            added = f"{c.direct_term:.3g}, direct deviation bound"
        proven = [name for name in self.samples if self.proven_nearer(name)]
        lines = [
            f"{'certificate':<12} with probability {c.probability:g} over {c.n} held-out real rows; linear in "
            f"{self.features}, norm bound {c.norm_bound:.3g}, |h| at most {c.function_bound:.3g}",
            f"{'':<13}{'':<18}{'on real rows':>13}{'on the data':>13}   (the data's distribution: at most, + {added})",
        ]
        lines += [f"{'':<13}{name:<18}{ipm:>13.4g}{self.bound(name):>13.4g}" for name, ipm in self.samples.items()]
        lines.append(
            f"{'':<13}proven nearer to the data than `generated`: {', '.join(proven) or 'nothing'}; that takes "
            f"{2 * c.deviation_term:.3g} less on the real rows"
        )
        if self.search is not None:
            lines.append(f"{'':<13}norm bound: {self.search.reason}")
        return lines + [f"{'note':<12} {note}" for note in [*c.notes, *self.notes]]


class _UnitFeatures:
    """A discriminator's features with norms of at most 1, so that the class's M is known: it is B.

    Random Fourier features are that already. Others lose their mean over generated rows, which no function of the
    class needs to tell samples apart, and are shortened to the median of the rest's norms, of which they are
    given in units: the longest of them would leave the others next to no part of the class. All of it is settled
    without the held-out rows.
    """

    def __init__(self, discriminator: Discriminator, generated: np.ndarray, batch_rows: int) -> None:
        from .networks import MLP

        self.discriminator, self.batch_rows = discriminator, batch_rows
        self.centre: Tensor | None = None
        width = discriminator.features(generated[:1]).shape[1]
        if getattr(discriminator.network, "random_features", None) is not None:
            self.name = f"{width} random Fourier features"
            return
        where = "of the last hidden layer" if isinstance(discriminator.network, MLP) else "that were given"
        self.name = f"{width} features {where}, centred and cut to norm 1"
        phi = self._plain(generated)
        self.centre = phi.mean(0)
        self.median = float((phi - self.centre).norm(dim=1).median()) or 1.0

    def _plain(self, x: np.ndarray) -> Tensor:
        return self.discriminator.features(x, batch_size=self.batch_rows).cpu().double()

    def __call__(self, x: np.ndarray) -> Tensor:
        phi = self._plain(x)
        if self.centre is None:
            return phi
        phi = (phi - self.centre) / self.median
        return phi / phi.norm(dim=1, keepdim=True).clamp_min(1.0)


def certificate_rows(options: RefineOptions, features: int = _USUAL_FEATURES) -> int:
    """Rows of each kind whose features the memory bound has room for."""
    return max(2, min(_MOST_ROWS, options.memory // (_BYTES_PER_FEATURE * features)))


def certify_job(
    discriminator: Discriminator,
    real: np.ndarray,
    generated: RowSource,
    options: RefineOptions,
    *,
    indices: np.ndarray | None,
    weights: np.ndarray | None,
    block_rows: int,
    batch_rows: int,
) -> JobCertificate:
    """Certify the sample a job writes, within the class linear in its discriminator's features.

    The IPM of a sample needs only its mean features: those of all generated and of all written rows are taken in one
    more pass over the generated file.

    Args:
        real: held-out rows [n, ...], unseen by generator and discriminator.
        indices: ascending rows that are written; None if none are.
        weights: [N] weights that are written instead; None if none are.
    """
    import torch

    from .certificate import refinement_certificate
    from .norm_bound_search import suggest_norm_bound

    width = discriminator.features(real[:1]).shape[1]
    most = certificate_rows(options, width)
    rows = random_rows(np.random.default_rng(options.seed), len(generated), most)
    subset = take(generated, np.sort(rows), block_rows)
    features = _UnitFeatures(discriminator, subset, batch_rows)
    shared: dict[str, Any] = {
        "feature_bound": 1.0,
        "delta": options.delta,
        "seed": options.seed,
        "deviation": options.deviation,
    }
    arguments = (features(real[:most]), features(subset), options.divergence)
    search = None
    if options.norm_bound is None:
        search = suggest_norm_bound(*arguments, **shared, progress=options.progress)
        certificate = search.certificate
    else:
        certificate = refinement_certificate(*arguments, norm_bound=options.norm_bound, **shared)

    counts = np.ones((1, len(generated)))
    if indices is not None:
        counts = np.stack([counts[0], np.bincount(indices, minlength=len(generated))])
    elif weights is not None:
        counts = np.stack([counts[0], weights])
    sums = torch.zeros(len(counts), width, dtype=torch.float64)
    # A row's features can take far more memory than the row.
    for start, block in generated.blocks(min(block_rows, most) * generated.row_bytes):
        phi = features(generated.decode(block))
        sums += torch.from_numpy(counts[:, start : start + len(phi)]) @ phi
    means = sums / torch.from_numpy(counts.sum(axis=1, keepdims=True))
    samples = {name: certificate.ipm_to(mean) for name, mean in zip(("generated", "written"), means, strict=False)}
    samples["certificate's own"] = certificate.ipm_refined
    return JobCertificate(certificate, search, samples, features.name)
