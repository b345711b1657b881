"""What the repetitions of a demonstration come to: means, standard errors, and by how much a measure improved."""

from __future__ import annotations

import numpy as np

_HIGHER_IS_BETTER = ("precision", "recall")


def mean_and_error(values: list[float]) -> dict[str, float | None]:
    """The mean and its standard error, None of a single value."""
    return {"mean": float(np.mean(values)), "stderr": _standard_error(values)}


def as_text(values: list[float]) -> str:
    """Mean ± standard error."""
    error = _standard_error(values)
    scale = 3 if max(map(abs, values)) > 0.01 else 5
    return f"{np.mean(values):.{scale}f}" + ("" if error is None else f" ± {error:.{scale}f}")


def gains(measure: str, before: list[float], after: list[float]) -> np.ndarray:
    """By how much each repetition improved; an AUC improves towards 0.5."""
    first, second = np.array(before), np.array(after)
    if measure == "auc":
        return np.abs(first - 0.5) - np.abs(second - 0.5)
    return second - first if measure in _HIGHER_IS_BETTER else first - second


def _standard_error(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
