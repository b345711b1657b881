"""What `refine-ext refine` prints about its job."""

from __future__ import annotations

import importlib.util
from typing import Any

from .io import RowSource
from .measures import TITLES
from .pipeline import Refined, RefineOptions

# measure -> where its permutation p-value stands
_P_VALUES = {"energy_distance": "energy_p", "mmd2": "mmd_p"}


def describe_rows(source: RowSource) -> str:
    """Size, dtype and place of a source."""
    shape = "×".join(map(str, source.shape[1:])) or "1"
    return f"{len(source)} rows of {shape} {source.element}, {source.label}"


def peak_memory() -> float:
    """The most memory this process ever had resident, MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_used(options: RefineOptions, libraries: float) -> dict[str, Any]:
    """The peak, split into libraries (what was resident before any data were read) and data."""
    peak, allowed = peak_memory(), options.memory / 2**20
    text = (
        f"peak {peak:.0f} MiB: {libraries:.0f} MiB of libraries and "
        f"{peak - libraries:.0f} MiB of data, of at most {allowed:.0f} MiB (--memory)"
    )
    return {"peak_mib": peak, "libraries_mib": libraries, "allowed_mib": allowed, "text": text}


def summary(refined: Refined) -> str:
    """Fit, gain, weights and held-out measures, one line each."""
    lines = []
    fit = refined.fit
    if fit:
        what = f"{fit['model']}, {fit['divergence']}, {fit['objective']} objective"
        lines.append(f"{'fit':<12} {what}")
    gain = ""
    # where the supports do not meet, the gain is only as finite as the network
    if refined.refinable and refined.gain is not None and refined.gain_full is not None:
        gain = (
            f", held-out gain {refined.gain[0]:+.3f} ± {refined.gain[1]:.3f} nats a sample "
            f"(at full strength {refined.gain_full[0]:+.3f} ± {refined.gain_full[1]:.3f})"
        )
    lines.append(f"{'temperature':<12} {refined.temperature:.2f}{gain}")
    count = len(refined.log_ratio)
    lines.append(
        f"{'weights':<12} {refined.ess:.0f} effective samples of {count} "
        f"({refined.ess / count:.0%}), largest weight {refined.max_weight:.2g}, "
        f"k-hat {refined.khat:.2f}"
    )
    lines += _measure_lines(refined)
    if refined.certificate is not None:
        lines += refined.certificate.lines()
    if refined.verdict and refined.refinable:
        lines.append(f"{'verdict':<12} {refined.verdict}")
    lines += [f"{'note':<12} {note}" for note in refined.notes]
    return "\n".join(lines)


def _measure_lines(refined: Refined) -> list[str]:
    if refined.before is None or refined.after is None:
        return []
    from .report import measured

    before, after = refined.before, refined.after
    lines = [f"held-out     {'':<18}{'generated':>11}{'refined':>11}   ({before.n_real} real samples)"]
    for name in measured(before, after):
        title, direction = TITLES[name]
        values = [getattr(sample, name) for sample in (before, after)]
        extra = ""
        if name in _P_VALUES:
            p = [getattr(sample, _P_VALUES[name]) for sample in (before, after)]
            extra = f"; permutation p {p[0]:.3f} -> {p[1]:.3f}"
        errors = [getattr(sample, f"{name}_stderr", None) for sample in (before, after)]
        if None not in errors:
            extra = f"; standard error {errors[0]:.3f} -> {errors[1]:.3f}"
        row = "".join(f"{value:>11.4g}" for value in values)
        lines.append(f"{'':<13}{title:<18}{row}   {direction}{extra}")
    if importlib.util.find_spec("sklearn") is None:
        lines.append(f"{'':<13}(two-sample AUC needs scikit-learn: pip install 'refine-ext[demo]')")
    return lines


def written_line(refined: Refined, out: str) -> str:
    """What was written where."""
    if refined.indices is None:
        return f"{'wrote':<12} {out}: {len(refined.weights)} weights that sum to 1, float64"
    facts = refined.to_dict()
    return f"{'wrote':<12} {out}: {facts['rows']} rows, {facts['distinct_rows']} of them distinct"
