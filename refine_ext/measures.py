"""Two-sample measures that judge generated samples against real ones nobody trained on.

None of them is what a discriminator is trained with: energy distance and maximum mean discrepancy
with permutation
p-values, nearest-neighbour precision and recall, and the cross-validated AUC of an off-the-shelf
classifier.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# name -> (title, what is better)
TITLES: Mapping[str, tuple[str, str]] = {
    "auc": ("two-sample AUC", "0.5 is best"),
    "energy_distance": ("energy distance", "lower is better"),
    "mmd2": ("MMD²", "lower is better"),
    "precision": ("precision", "higher is better"),
    "recall": ("recall", "higher is better"),
}


@dataclass(frozen=True)
class TwoSample:
    """How far generated samples are from real ones.

    `auc` is None where scikit-learn is missing, or where there are fewer than 5 different samples. Standard errors
    count copies of one sample as one; that of the precision is over generated samples like these, with the real
    ones as they are, that of the recall the other way round.
    """

    auc: float | None
    energy_distance: float
    energy_p: float
    mmd2: float
    mmd_p: float
    precision: float
    recall: float
    n_real: int
    n_generated: int
    auc_stderr: float | None = None
    precision_stderr: float | None = None
    recall_stderr: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def _samples(x: ArrayLike, name: str, function: str) -> Array:
    array = np.asarray(x, dtype=np.float64)
    if array.ndim == 0 or array.shape[0] < 2 or array.size == 0:
        raise ValueError(f"{function}: {name} must hold at least 2 samples [n, ...], got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{function}: {name} holds NaN or infinite values; samples must be finite")
    return array.reshape(array.shape[0], -1)


def _pair(real: ArrayLike, generated: ArrayLike, function: str) -> tuple[Array, Array]:
    x, y = _samples(real, "real", function), _samples(generated, "generated", function)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{function}: real has {x.shape[1]} features, generated {y.shape[1]}; they must agree")
    return x, y


def distances(x: Array, y: Array | None = None) -> Array:
    """Euclidean distances ‖xᵢ − yⱼ‖, float64 [n, m]; y = x where it is left out, with an exactly
    zero diagonal."""
    # the expansion ‖x‖² + ‖y‖² − 2xy cancels where the data sit far from the origin: centre them
    # first
    centre = x.mean(axis=0)
    a = x - centre
    b = a if y is None else y - centre
    squares = np.einsum("ij,ij->i", a, a)[:, None] + np.einsum("ij,ij->i", b, b)[None, :]
    squares -= 2.0 * (a @ b.T)
    np.maximum(squares, 0.0, out=squares)
    if y is None:
        np.fill_diagonal(squares, 0.0)
    return np.sqrt(squares, out=squares)


def _between_minus_within(kernel: Array, first: NDArray[np.float64], unbiased: bool) -> Array:
    """2 E k(x,y) − E k(x,x′) − E k(y,y′) for each 0/1 row of `first` [splits, N], which names the x
    of a split.

    The diagonal of `kernel` must be zero; the unbiased form leaves it out of the averages.
    """
    n = kernel.shape[0]
    m_x = first.sum(axis=1)
    m_y = n - m_x
    rows = kernel.sum(axis=1)
    within_x = np.einsum("kn,kn->k", first @ kernel, first)
    cross = first @ rows - within_x
    within_y = rows.sum() - within_x - 2.0 * cross
    drop = 1.0 if unbiased else 0.0
    return 2.0 * cross / (m_x * m_y) - within_x / (m_x * (m_x - drop)) - within_y / (m_y * (m_y - drop))


def permutation_test(
    kernel: Array, n_first: int, *, permutations: int = 500, seed: int = 0, unbiased: bool = True
) -> tuple[float, float]:
    """Statistic T = 2 E k(x,y) − E k(x,x′) − E k(y,y′) and its permutation p-value (1 + #{T_π ≥ T})
    / (1 + permutations).

    Args:
        kernel: symmetric float64 [N, N] with zero diagonal over the pooled samples: distances, or
        minus a kernel.
        n_first: how many of the first rows are x.
        permutations: relabelled splits drawn; the smallest p-value possible is 1 / (1 +
        permutations).
        seed: of NumPy's generator.
        unbiased: U-statistic (0 on average where the distributions agree) or V-statistic (never
        negative).

    Returns:
        (T, p).

    Source: Gretton et al. 2012, "A kernel two-sample test", section 2 and Lemma 6; Székely and
    Rizzo 2013, section 2.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(60, 2))
        >>> permutation_test(distances(x), 30, permutations=99)[1] > 0.01
        True
    """
    n = kernel.shape[0]
    if kernel.shape != (n, n) or not 2 <= n_first <= n - 2:
        raise ValueError(
            f"permutation_test: kernel must be [N, N] with 2 <= n_first <= N - 2, got {list(kernel.shape)}, {n_first}"
        )
    labels = np.zeros(n)
    labels[:n_first] = 1.0
    observed = float(_between_minus_within(kernel, labels[None], unbiased)[0])
    generator = np.random.default_rng(seed)
    splits = generator.permuted(np.tile(labels, (permutations, 1)), axis=1)
    drawn = _between_minus_within(kernel, splits, unbiased)
    # relabelling the same values gives the same sum up to rounding: count it as a tie
    tolerance = 1e-12 * float(np.abs(kernel).mean() or 1.0)
    return observed, float(1 + np.count_nonzero(drawn >= observed - tolerance)) / (1 + permutations)


def energy_distance(real: ArrayLike, generated: ArrayLike, *, unbiased: bool = True) -> float:
    """Energy distance D² = 2 E‖X − Y‖ − E‖X − X′‖ − E‖Y − Y′‖, zero only between equal
    distributions.

    Args:
        real, generated: samples [n, ...] and [m, ...], flattened; in the units of the data.
        unbiased: leave the pairs of a sample with itself out (0 on average for equal distributions,
        possibly
            negative); False gives the form whose square root `scipy.stats.energy_distance` returns
            in one dimension.

    Raises:
        ValueError: fewer than 2 samples, non-finite values, feature counts that differ.

    Source: Székely and Rizzo 2013, "Energy statistics", equation 1.

    Example:
        >>> energy_distance([[0.0], [1.0]], [[0.0], [1.0]], unbiased=False)
        0.0
    """
    x, y = _pair(real, generated, "energy_distance")
    pooled = distances(np.concatenate([x, y]))
    labels = np.zeros((1, len(pooled)))
    labels[0, : len(x)] = 1.0
    return float(_between_minus_within(pooled, labels, unbiased)[0])


def gaussian_mmd2(
    real: ArrayLike, generated: ArrayLike, *, bandwidth: float | None = None, unbiased: bool = True
) -> float:
    """Squared maximum mean discrepancy E k(x,x′) + E k(y,y′) − 2 E k(x,y), k = exp(−‖x − y‖²/(2
    bandwidth²)).

    Args:
        real, generated: samples [n, ...] and [m, ...], flattened.
        bandwidth: in the units of the data; the median distance among the real samples where it is
        left out.
        unbiased: leave the pairs of a sample with itself out.

    Raises:
        ValueError: fewer than 2 samples, non-finite values, feature counts that differ, bandwidth
        <= 0.

    Source: Gretton et al. 2012, equation 3 (unbiased) and 5 (biased).

    Example:
        >>> same = gaussian_mmd2([[0.0], [1.0]], [[0.0], [1.0]], bandwidth=1.0, unbiased=False)
        >>> abs(same) < 1e-12
        True
    """
    x, y = _pair(real, generated, "gaussian_mmd2")
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"gaussian_mmd2: bandwidth must be positive, got {bandwidth}")
    pooled = distances(np.concatenate([x, y]))
    kernel = _minus_gaussian(pooled, bandwidth or _median_distance(pooled[: len(x), : len(x)]))
    labels = np.zeros((1, len(pooled)))
    labels[0, : len(x)] = 1.0
    if not unbiased:
        np.fill_diagonal(kernel, -1.0)
    return float(_between_minus_within(kernel, labels, unbiased)[0])


def _minus_gaussian(distance: Array, bandwidth: float) -> Array:
    kernel = -np.exp(-0.5 * (distance / bandwidth) ** 2)
    np.fill_diagonal(kernel, 0.0)
    return kernel


def _median_distance(within: Array) -> float:
    positive = within[np.triu_indices(len(within), 1)]
    positive = positive[positive > 0]
    return float(np.median(positive)) if positive.size else 1.0


def precision_recall(real: ArrayLike, generated: ArrayLike, *, neighbours: int = 3) -> tuple[float, float]:
    """Precision: share of generated samples inside the real manifold; recall: share of real ones
    inside the generated.

    A manifold is the union of balls round its samples, each reaching to the k-th nearest neighbour
    in the same sample.

    Args:
        real, generated: samples [n, ...] and [m, ...], flattened.
        neighbours: k.

    Returns:
        (precision, recall), both in [0, 1].

    Raises:
        ValueError: not more samples than neighbours, non-finite values, feature counts that differ.

    Source: Kynkäänniemi et al. 2019, "Improved precision and recall metric", equations 1 and 2 (k =
    3).

    Example:
        >>> x = [[float(i)] for i in range(8)]
        >>> precision_recall(x, x)
        (1.0, 1.0)
    """
    x, y = _pair(real, generated, "precision_recall")
    if neighbours < 1 or min(len(x), len(y)) <= neighbours:
        raise ValueError(
            f"precision_recall: needs more samples than neighbours, got {len(x)} real, "
            f"{len(y)} generated, neighbours {neighbours}"
        )
    inside, covered = _manifolds(distances(np.concatenate([x, y])), len(x), neighbours)
    return float(inside.mean()), float(covered.mean())


def _manifolds(pooled: Array, n_real: int, neighbours: int) -> tuple[Array, Array]:
    # 1 or 0: which generated samples lie in the real ones' manifold, and which real ones in the generated ones'
    # column 0 of a sorted row is the sample itself, so the k-th neighbour stands at k
    real, generated = pooled[:n_real, :n_real], pooled[n_real:, n_real:]
    real_radius = np.partition(real, neighbours, axis=1)[:, neighbours]
    generated_radius = np.partition(generated, neighbours, axis=1)[:, neighbours]
    cross = pooled[:n_real, n_real:]
    inside: Array = np.any(cross <= real_radius[:, None], axis=0).astype(np.float64)
    covered: Array = np.any(cross <= generated_radius[None, :], axis=1).astype(np.float64)
    return inside, covered


def _variance_of_mean(values: Array, groups: NDArray[np.int64] | None = None) -> float:
    """Of values [n] of which those of one group come together; infinite of one group."""
    sums = values - values.mean()
    if groups is not None:
        own, place = np.unique(groups, return_inverse=True)
        sums = np.zeros(len(own))
        np.add.at(sums, place, values - values.mean())
    n = len(sums)
    return float((sums**2).sum()) / len(values) ** 2 * n / (n - 1) if n > 1 else math.inf


def classifier_auc(
    real: ArrayLike,
    generated: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    folds: int = 5,
    seed: int = 0,
) -> tuple[float, float]:
    """Cross-validated AUC of an RBF support-vector machine told to tell real from generated: 0.5 if
    it cannot. And its standard error.

    Args:
        real, generated: samples [n, ...] and [m, ...], flattened and standardised.
        groups: one integer per generated sample; equal numbers (copies of one sample) are kept in
            one fold, so that no classifier recognises a copy it was trained on.
        folds: of the stratified cross-validation; the AUC is the mean over the folds.
        seed: of the split.

    Returns:
        (AUC, standard error). The error is that of held-out samples like these, given the classifiers of the folds,
        which add up to a quarter to it where the AUC is near 0.5. With V_i the share of generated samples that real
        sample i outscores, and W_g the sum over the m_g copies of generated sample g, of G, of the shares of real
        ones that outscore them, a fold's is
        √(Σ(V_i − AUC)² / (n(n − 1)) + G Σ(W_g − m_g AUC)² / ((G − 1) m²)).

    Raises:
        ValueError: fewer samples than folds, non-finite values, feature counts that differ.
        ModuleNotFoundError: scikit-learn is missing.

    Source: Lopez-Paz and Oquab 2017, "Revisiting classifier two-sample tests"; the error: DeLong et al. 1988,
    "Comparing the areas under two or more correlated receiver operating characteristic curves", and for copies
    Obuchowski 1997, "Nonparametric analysis of clustered ROC curve data".

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2))
        >>> classifier_auc(x, x + 9.0)
        (1.0, 0.0)
    """
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    x, y = _pair(real, generated, "classifier_auc")
    if min(len(x), len(y)) < folds:
        raise ValueError(f"classifier_auc: needs at least {folds} samples of each kind, got {len(x)} and {len(y)}")
    samples = np.concatenate([x, y])
    labels = np.repeat([1, 0], [len(x), len(y)])
    copies = np.arange(len(y)) if groups is None else np.asarray(groups)
    if copies.shape != (len(y),):
        raise ValueError(
            f"classifier_auc: groups must be [{len(y)}], one per generated sample, got {list(copies.shape)}"
        )
    _, copies = np.unique(copies, return_inverse=True)
    group = np.concatenate([np.arange(len(x)), len(x) + copies])
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    scores = []
    for train, test in splitter.split(samples, labels, group):
        if len(np.unique(labels[test])) < 2 or len(np.unique(labels[train])) < 2:
            continue  # a fold filled by the copies of one sample
        model = make_pipeline(StandardScaler(), SVC(gamma="scale"))
        model.fit(samples[train], labels[train])
        score, is_real = model.decision_function(samples[test]), labels[test] == 1
        scores.append(_auc_and_variance(score[is_real], score[~is_real], group[test][~is_real]))
    if not scores:
        raise ValueError("classifier_auc: the generated samples are copies of too few samples")
    values, variances = np.array(scores).T
    return float(values.mean()), float(np.sqrt(variances.sum()) / len(scores))


def _auc_and_variance(real: Array, generated: Array, groups: NDArray[np.int64]) -> tuple[float, float]:
    wins = np.sign(real[:, None] - generated[None, :]) / 2 + 0.5
    variance = _variance_of_mean(wins.mean(axis=1)) + _variance_of_mean(wins.mean(axis=0), groups)
    return float(wins.mean()), variance


def two_sample(
    real: ArrayLike,
    generated: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    permutations: int = 500,
    neighbours: int = 3,
    seed: int = 0,
) -> TwoSample:
    """All measures at once; the arguments are those of the single ones.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(80, 2))
        >>> two_sample(x[:40], x[40:]).n_real
        40
    """
    x, y = _pair(real, generated, "two_sample")
    pooled = distances(np.concatenate([x, y]))
    n = len(x)
    energy, energy_p = permutation_test(pooled, n, permutations=permutations, seed=seed)
    # the bandwidth is the real sample's alone, so that two generated samples are measured with one
    # ruler
    kernel = _minus_gaussian(pooled, _median_distance(pooled[:n, :n]))
    mmd2, mmd_p = permutation_test(kernel, n, permutations=permutations, seed=seed)
    inside, covered = _manifolds(pooled, n, min(neighbours, n - 1, len(y) - 1))
    auc = auc_stderr = None
    copies = None if groups is None else np.asarray(groups)
    distinct = len(y) if copies is None else len(np.unique(copies))
    if importlib.util.find_spec("sklearn") is not None and min(n, distinct) >= 5:
        auc, auc_stderr = classifier_auc(x, y, groups=groups, seed=seed)
    return TwoSample(
        auc,
        energy,
        energy_p,
        mmd2,
        mmd_p,
        float(inside.mean()),
        float(covered.mean()),
        n,
        len(y),
        auc_stderr,
        math.sqrt(_variance_of_mean(inside, copies)),
        math.sqrt(_variance_of_mean(covered)),
    )
