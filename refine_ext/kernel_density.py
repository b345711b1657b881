"""A Gaussian kernel density estimate with scikit-learn's interface, on the fused log-mixture."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .arguments import positive
from .log_mixture import log_mixture
from .mixture_arguments import as_array_tensor


class KernelDensity:
    """``log p(x) = log sum_i w_i N(x; x_i, h^2 I)``, exact: no tree, no tolerances.

    Args:
        bandwidth: h > 0, or "scott" (``n^(-1/(d + 4))``) or "silverman" (``(n (d + 2) / 4)^(-1/(d + 4))``).

    Attributes:
        bandwidth_: h, once fitted.

    Source: Parzen 1962; the methods are those of sklearn.neighbors.KernelDensity with kernel="gaussian", whose
    score_samples this equals to 1e-5.

    >>> import numpy as np
    >>> KernelDensity(bandwidth=0.5).fit(np.array([[0.0], [1.0]])).score_samples(np.array([[0.0]])).round(4)
    array([-0.792])
    """

    def __init__(self, bandwidth: float | Literal["scott", "silverman"] = 1.0) -> None:
        if isinstance(bandwidth, str):
            if bandwidth not in ("scott", "silverman"):
                raise ValueError(f"KernelDensity: bandwidth must be a number, scott or silverman, got {bandwidth!r}")
        else:
            positive("KernelDensity", "bandwidth", bandwidth)
        self.bandwidth = bandwidth
        self.bandwidth_: float
        self._samples: Tensor | None = None
        self._weights: Tensor | None = None

    def fit(self, X: Any, y: None = None, sample_weight: Any = None) -> KernelDensity:
        """Keeps the samples `[n, d]`, and their weights `[n]`, which need not sum to one.

        Raises:
            TypeError: not floating arrays or tensors; ValueError: shapes, no samples, weights that are negative or 0.
        """
        samples = _matrix("KernelDensity.fit", X)
        n, d = samples.shape
        if n == 0:
            raise ValueError(f"KernelDensity.fit: X must not be empty, got shape {list(samples.shape)}")
        weights = None
        if sample_weight is not None:
            weights = as_array_tensor("KernelDensity.fit", "sample_weight", sample_weight).double()
            total = float(weights.sum())
            if weights.shape != (n,) or bool((weights < 0).any()) or not 0.0 < total < math.inf:
                raise ValueError(
                    f"KernelDensity.fit: sample_weight must be [{n}], not negative and not all 0, "
                    f"got shape {list(weights.shape)} with sum {total:g}"
                )
            weights = weights / total
        if isinstance(self.bandwidth, str):
            factor = 1.0 if self.bandwidth == "scott" else (d + 2) / 4
            self.bandwidth_ = (n * factor) ** (-1 / (d + 4))
        else:
            self.bandwidth_ = float(self.bandwidth)
        self._samples, self._weights = samples, weights
        return self

    def score_samples(self, X: Any) -> Any:
        """``[m]`` float64 log-densities at ``X [m, d]``: a NumPy array for one, else a tensor with its gradient.

        Raises:
            RuntimeError: before `fit`; ValueError: another d, NaN.
        """
        if self._samples is None:
            raise RuntimeError("KernelDensity.score_samples: call fit first")
        x = _matrix("KernelDensity.score_samples", X)
        if x.shape[1] != self._samples.shape[1]:
            raise ValueError(
                f"KernelDensity.score_samples: X must be [m, {self._samples.shape[1]}] as in fit, got {list(x.shape)}"
            )
        value = log_mixture(
            x, self._samples, self.bandwidth_, self._weights, normalized=True, dtype=torch.float64, nan_policy="raise"
        )
        assert isinstance(value, Tensor)
        return value.numpy() if isinstance(X, np.ndarray) else value

    def score(self, X: Any, y: None = None) -> float:
        """The sum of `score_samples`."""
        values = self.score_samples(X)
        return float(values.detach().sum() if isinstance(values, Tensor) else values.sum())


def _matrix(function: str, X: Any) -> Tensor:
    x = as_array_tensor(function, "X", X, may_be_empty=True)
    if x.dim() != 2:
        raise ValueError(f"{function}: X must be [n, d], got {list(x.shape)}")
    return x
