"""The bar of a long calculation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_MANY = ("row", "sample")  # units that come in thousands, counted as 12.3k


def progress_bar(title: str, total: int | None, progress: bool | None, unit: str = "row") -> tqdm[Any]:
    """Shown where it takes over a second; `progress` None: on a terminal."""
    from tqdm import tqdm

    hidden = None if progress is None else not progress
    return tqdm(total=total, desc=title, unit=unit, unit_scale=unit in _MANY, delay=1.0, disable=hidden)
