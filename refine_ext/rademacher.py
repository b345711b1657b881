"""Rademacher and Gaussian complexity by Monte Carlo: the exact supremum over a class of functions for each draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
from torch import Tensor

from .arguments import positive
from .complexity_estimate import Estimate
from .rademacher_suprema import LARGEST, MAGNITUDE, MEMORY, NORM, Functions, Options, estimate_complexity

# What does not fit in memory: an iterable of row blocks [rows, m], or a function that returns one.
Blocks = Iterable[Any] | Callable[[], Iterable[Any]]


def rademacher(
    outputs: Tensor | np.ndarray | Blocks,
    draws: int | Literal["all"] = 1024,
    seed: int | None = None,
    *,
    absolute: bool = True,
    distribution: Literal["rademacher", "normal"] = "rademacher",
    stderr: float | None = None,
    max_draws: int | None = None,
    precision: Literal[1, 2, 3] = 3,
    nan_policy: Literal["raise", "propagate"] = "raise",
    first_draw: int = 0,
    bound: float | None = None,
    memory: int = MEMORY,
    progress: bool | None = None,
) -> Estimate:
    """R_n = E_sigma max_j |(1/n) sum_i sigma_i f_j(x_i)|, the empirical Rademacher complexity of m functions.

    The mean over random sign vectors sigma of the exact maximum. The convex hull of the functions (with their
    negatives, where `absolute`) has the same complexity: a linear form is largest at a corner. Draw k of a seed has the
    same signs on every device, in any batch and however samples and draws are split, and signed sums are exact in
    blocks of 1024 samples: equal draws give equal bits, on one thread or many, read from memory or from a file. Nothing
    of size draws x n or draws x m is in memory, unless outputs come in blocks.

    Args:
        outputs: `[n, m]`, f_j(x_i) in row i and column j (`[n]` is one function); float64, float32, float16 or
            bfloat16, CPU or CUDA, or a NumPy array. What does not fit in memory: a NumPy map (read in blocks where
            larger than `memory`), an iterable of blocks `[rows, m]` of tensors or arrays, or a function that returns
            one, which may be read several times.
        draws: K, how many sign vectors; "all": each of the 2^n once, for at most 20 samples and without error.
        seed: of the signs, an int. None: drawn from torch's default generator.
        absolute: the maximum of |.|, over the functions and their negatives; otherwise over the functions.
        distribution: "rademacher": signs. "normal": sigma_i ~ N(0, 1), the Gaussian complexity, by matrix products,
            whose bits depend on how they are split; not inside torch.func and torch.compile.
        stderr: a standard error to reach: the draws are doubled until then, or until `max_draws` (2^20 by default),
            with a warning.
        precision: the values' digits, of 8 bits each, that signed sums take: 3 is float32's accuracy, 1 and 2 are
            faster on a GPU. float64 outputs always have 52 bits.
        nan_policy: "raise" refuses NaN and infinity, naming where it is; on CUDA, where that waits for the device, at
            the first number that is read from the estimate. "propagate" makes the estimate NaN.
        first_draw: the first draw's number: runs of other draws are joined by `Estimate.merge`.
        bound: M >= max |f_j(x_i)|, for `Estimate.upper`. None: the largest seen.
        memory: bytes that blocks and their sums may take, but at least 1024 rows and the sums of one draw. More draws
            are done in several readings of the blocks.
        progress: a bar where it takes over a second. None: on a terminal.

    Returns:
        `Estimate`: mean, stderr, suprema `[K]` float64, argmax `[K]`, bound, upper(delta), merge(other). The mean and
        the suprema are differentiable in a tensor of outputs: sigma_ki / (n K) at the maximiser of draw k.

    Raises:
        TypeError: an argument's type, or a dtype that is not supported.
        ValueError: shapes that are not [n, m], empty outputs, NaN or infinity in them, a `bound` below what was seen,
            numbers out of range, an iterator that would have to be read twice.

    Source: Bartlett and Mendelson 2002; Mohri et al., Foundations of Machine Learning, 2nd edition, section 3.1;
    signs of Salmon, Moraes, Dror and Shaw 2011.

    >>> import torch, refine_ext as rx
    >>> rx.rademacher(torch.tensor([[1.0], [2.0]]), draws="all")  # (3 + 1 + 1 + 3) / 4 / 2
    Estimate(1 (±f, all 4 sign vectors, n = 2))
    """
    functions = Functions("±f", MAGNITUDE) if absolute else Functions("f", LARGEST)
    options = Options(
        draws, seed, distribution, stderr, max_draws, precision, nan_policy, first_draw, bound, memory, progress
    )
    return estimate_complexity("rademacher", "outputs", outputs, functions, options)


def rademacher_linear(
    features: Tensor | np.ndarray | Blocks,
    norm_bound: float = 1.0,
    draws: int | Literal["all"] = 1024,
    seed: int | None = None,
    *,
    distribution: Literal["rademacher", "normal"] = "rademacher",
    stderr: float | None = None,
    max_draws: int | None = None,
    precision: Literal[1, 2, 3] = 3,
    nan_policy: Literal["raise", "propagate"] = "raise",
    first_draw: int = 0,
    bound: float | None = None,
    memory: int = MEMORY,
    progress: bool | None = None,
) -> Estimate:
    """R_n = E_sigma (B/n) ||sum_i sigma_i phi_i||_2, the complexity of {x -> <w, phi(x)>, ||w||_2 <= B}.

    Between B sqrt(sum_i ||phi_i||^2) / (n sqrt(2)) and B sqrt(sum_i ||phi_i||^2) / n.

    Args:
        features: `[n, d]`, phi(x_i) in row i, as the outputs of `rademacher`.
        norm_bound: B.
        bound: M >= max |f(x_i)| = B max_i ||phi_i||_2. None: the largest seen.
        draws, seed and the others: see `rademacher`.

    Returns:
        `Estimate`, without argmax.

    Raises:
        TypeError, ValueError: see `rademacher`; a norm_bound that is not positive and finite.

    Source: Mohri et al., 2nd edition, Theorem 5.10; the lower bound is the Khintchine-Kahane inequality, Latala and
    Oleszkiewicz 1994.

    >>> import torch, refine_ext as rx
    >>> round(float(rx.rademacher_linear(torch.eye(100), norm_bound=2.0, draws=8, seed=0)), 6)  # 2 sqrt(100) / 100
    0.2
    """
    functions = Functions("linear, 2-norm", NORM, positive("rademacher_linear", "norm_bound", norm_bound))
    options = Options(
        draws, seed, distribution, stderr, max_draws, precision, nan_policy, first_draw, bound, memory, progress
    )
    return estimate_complexity("rademacher_linear", "features", features, functions, options)


def rademacher_l1(
    features: Tensor | np.ndarray | Blocks,
    norm_bound: float = 1.0,
    draws: int | Literal["all"] = 1024,
    seed: int | None = None,
    *,
    distribution: Literal["rademacher", "normal"] = "rademacher",
    stderr: float | None = None,
    max_draws: int | None = None,
    precision: Literal[1, 2, 3] = 3,
    nan_policy: Literal["raise", "propagate"] = "raise",
    first_draw: int = 0,
    bound: float | None = None,
    memory: int = MEMORY,
    progress: bool | None = None,
) -> Estimate:
    """R_n = E_sigma (B/n) ||sum_i sigma_i phi_i||_inf, the complexity of {x -> <w, phi(x)>, ||w||_1 <= B}.

    The convex hull of plus and minus B times each feature, hence B times `rademacher` of the features.

    Args:
        features: `[n, d]`, phi(x_i) in row i, as the outputs of `rademacher`.
        norm_bound: B.
        bound: M >= max |f(x_i)| = B max_ij |phi_ij|. None: the largest seen.
        draws, seed and the others: see `rademacher`.

    Returns:
        `Estimate`; its argmax are the features.

    Raises:
        TypeError, ValueError: see `rademacher`; a norm_bound that is not positive and finite.

    Source: Mohri et al., 2nd edition, Theorem 11.15.

    >>> import torch, refine_ext as rx
    >>> round(float(rx.rademacher_l1(torch.eye(100), norm_bound=2.0, draws=8, seed=0)), 6)  # 2 / 100
    0.02
    """
    functions = Functions("linear, 1-norm", MAGNITUDE, positive("rademacher_l1", "norm_bound", norm_bound))
    options = Options(
        draws, seed, distribution, stderr, max_draws, precision, nan_policy, first_draw, bound, memory, progress
    )
    return estimate_complexity("rademacher_l1", "features", features, functions, options)
