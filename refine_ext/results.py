"""What results have in common: themselves as JSON, as a picture, and the average over samples."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


class JSONResult(ABC):
    """A result that can be kept as JSON."""

    __slots__ = ()

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON, whole or not at all.

        Raises:
            ValueError: a name that does not end in .json, or a folder that does not exist.
        """
        from .output import output_path
        from .report import save_json

        where = output_path(f"{type(self).__name__}.save", path, ".json")
        save_json(self.to_dict(), where)


class PicturedResult(JSONResult):
    """A result that can be drawn, too."""

    __slots__ = ()

    @abstractmethod
    def _draw(self) -> Figure:
        """The picture."""

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw it as PNG, whole or not at all.

        Raises:
            ValueError: a name that does not end in .png, or a folder that does not exist.
            ModuleNotFoundError: matplotlib is missing.
        """
        from .output import output_path
        from .report import save_figure

        where = output_path(f"{type(self).__name__}.plot", path, ".png")
        save_figure(self._draw(), where)


class SampleValues:
    """A result with a number for each sample, `values` ``[n]`` float64."""

    __slots__ = ()
    values: Tensor

    @property
    def mean(self) -> float:
        """Over the samples."""
        return float(self.values.mean())

    @property
    def stderr(self) -> float:
        """Of the mean, by how the samples differ; NaN of a single sample."""
        n = len(self.values)
        return float(self.values.std()) / math.sqrt(n) if n > 1 else math.nan
