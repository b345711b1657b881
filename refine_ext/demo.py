"""The demonstration: handwritten digits from a faulty generator, refined and judged on held-out
digits.

Half of scikit-learn's digits is what the generator and the discriminator may see; the other half
judges. The generator
fails in ways that happen: it draws the classes in wrong proportions, blends two digits, and adds
noise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .demo_summary import as_text, mean_and_error
from .io import ArrayRows
from .measures import TITLES, TwoSample, distances, two_sample
from .output import create_rows
from .pipeline import Refined, RefineOptions, refine
from .threads import at_most_threads

KINDS = ("clean", "blend", "noisy")
INSTALL = "pip install 'refine-ext[demo]'"
_BLENDS, _NOISY, _NOISE = 0.2, 0.15, 2.5  # shares of the samples, pixel levels out of 16
_REACH = 0.3  # how far a sample may lie from a training digit towards its neighbour
LEVELS = 16


def require_extras() -> None:
    """Raise, naming the command that installs them, where scikit-learn or matplotlib is missing."""
    missing = [
        package
        for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise ModuleNotFoundError(f"the demo needs {' and '.join(missing)}: {INSTALL}")


@dataclass(frozen=True)
class Digits:
    """Digits [n, 8, 8] with values 0 … 16 and their labels, split in two halves."""

    train: np.ndarray
    train_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray


def load_digits(seed: int) -> Digits:
    """scikit-learn's 1797 digits in two random halves."""
    from sklearn.datasets import load_digits as load

    data = load()
    images, labels = data.images.astype(np.float32), data.target
    order = np.random.default_rng(seed).permutation(len(images))
    train, held = order[: len(order) // 2], order[len(order) // 2 :]
    return Digits(images[train], labels[train], images[held], labels[held])


@dataclass(frozen=True)
class Generated:
    """Samples of the faulty generator, with what it did: `kind` indexes KINDS, `labels` the digit
    meant."""

    images: np.ndarray
    kind: np.ndarray
    labels: np.ndarray
    proportions: np.ndarray


def faulty_generator(digits: Digits, number: int, seed: int) -> Generated:
    """Digits between training digits of one class, in wrong proportions, a share of them blended or
    noisy.

    A clean sample lies between a training digit and one of its five nearest neighbours of the same
    class (Chawla et al.
    2002, SMOTE), rounded to the 17 grey levels, so that it can be as good as a real digit.
    """
    generator = np.random.default_rng([seed, 1])
    proportions = np.linspace(0.3, 1.7, 10)[generator.permutation(10)] / 10.0
    labels = generator.choice(10, size=number, p=proportions)

    def draw(wanted: np.ndarray) -> np.ndarray:
        out = np.empty((number, 8, 8))
        for label in range(10):
            pool = digits.train[digits.train_labels == label]
            rows = np.flatnonzero(wanted == label)
            near = np.argsort(distances(pool.reshape(len(pool), -1).astype(np.float64)), axis=1)
            first = generator.integers(len(pool), size=len(rows))
            second = near[first, generator.integers(1, 6, size=len(rows))]
            step = generator.uniform(0.0, _REACH, size=(len(rows), 1, 1))
            out[rows] = pool[first] + step * (pool[second] - pool[first])
        return out

    images, others = draw(labels), draw((labels + generator.integers(1, 10, number)) % 10)
    kind = generator.choice(3, size=number, p=[1 - _BLENDS - _NOISY, _BLENDS, _NOISY])
    images[kind == 1] = 0.5 * (images + others)[kind == 1]
    images[kind == 2] += generator.normal(0.0, _NOISE, size=(np.count_nonzero(kind == 2), 8, 8))
    images = np.clip(np.round(images), 0, LEVELS).astype(np.float32)
    return Generated(images, kind, labels, proportions)


def mixture_generator(digits: Digits, number: int, seed: int) -> np.ndarray:
    """A generator no reweighting can save: a Gaussian mixture in PCA space, clipped to the pixel
    range.

    It looks like digits, but its pixels are never exactly the 17 grey levels that all real pixels
    have.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    flat = digits.train.reshape(len(digits.train), -1).astype(np.float64)
    pca = PCA(20, random_state=seed).fit(flat)
    mixture = GaussianMixture(10, covariance_type="diag", random_state=seed).fit(pca.transform(flat))
    drawn, _ = mixture.sample(number)
    images = np.clip(pca.inverse_transform(drawn), 0.0, LEVELS)
    return np.random.default_rng(seed).permutation(images).reshape(-1, 8, 8).astype(np.float32)


@dataclass
class SeedResult:
    """One seed of the demonstration."""

    seed: int
    digits: Digits
    generated: Generated
    refined: Refined
    full_strength: TwoSample
    oracle: TwoSample

    def shares(self) -> dict[str, list[float]]:
        """Shares of clean, blended and noisy samples, before and after."""
        rows = self.refined.indices
        assert rows is not None
        return {
            "before": list(np.bincount(self.generated.kind, minlength=3) / len(self.generated.kind)),
            "after": list(np.bincount(self.generated.kind[rows], minlength=3) / len(rows)),
        }

    def class_proportions(self) -> dict[str, list[float]]:
        """How often each digit was meant, among clean samples; and how often it is real."""
        kind, labels, rows = self.generated.kind, self.generated.labels, self.refined.indices
        assert rows is not None
        groups = {
            "real": self.digits.held_out_labels,
            "before": labels[kind == 0],
            "after": labels[rows][kind[rows] == 0],
        }
        return {k: list(np.bincount(v, minlength=10) / len(v)) for k, v in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            **self.refined.to_dict(),
            "after_full_strength": self.full_strength.to_dict(),
            "after_oracle": self.oracle.to_dict(),
            "shares_of_clean_blend_noisy": self.shares(),
            "class_proportions": self.class_proportions(),
        }


@dataclass
class DemoResult:
    """All seeds, and the generator that was refused."""

    seeds: list[SeedResult]
    hopeless: Refined
    hopeless_images: np.ndarray

    def column(self, which: str, name: str) -> list[float]:
        """One measure over the seeds; `which` is "before", "after", "full_strength" or "oracle"."""
        holders: list[Any] = [s if hasattr(s, which) else s.refined for s in self.seeds]
        return [getattr(getattr(holder, which), name) for holder in holders]

    def table(self) -> list[tuple[str, ...]]:
        """Rows of text: a measure, then mean ± standard error of each column."""
        rows: list[tuple[str, ...]] = [("held-out measure", *(title for _, title in COLUMNS), "")]
        for name, (title, direction) in TITLES.items():
            cells = [as_text(self.column(which, name)) for which, _ in COLUMNS]
            rows.append((title, *cells, direction))
        return rows

    def to_dict(self) -> dict[str, Any]:
        summary = {name: {which: mean_and_error(self.column(which, name)) for which, _ in COLUMNS} for name in TITLES}
        improved = {
            name: sum(
                after < before
                for before, after in zip(self.column("before", name), self.column("after", name), strict=True)
            )
            for name in ("auc", "energy_distance", "mmd2")
        }
        return {
            "summary": summary,
            "seeds_improved": improved,
            "seeds": [s.to_dict() for s in self.seeds],
            "refused": {
                "generator": "Gaussian mixture in PCA space, clipped",
                "refinable": self.hopeless.refinable,
                "verdict": self.hopeless.verdict,
                "fit": self.hopeless.fit,
            },
        }


COLUMNS = (
    ("before", "generated"),
    ("after", "refined"),
    ("full_strength", "unguarded"),
    ("oracle", "perfect weights"),
)


def run_seed(seed: int, number: int, options: RefineOptions) -> SeedResult:
    """Generate, refine, and judge by the held-out half."""
    with at_most_threads(1):  # 64 features: threads only get in each other's way
        return _run_seed(seed, number, options)


def _run_seed(seed: int, number: int, options: RefineOptions) -> SeedResult:
    digits = load_digits(seed)
    generated = faulty_generator(digits, number, seed)
    sources = [
        ArrayRows(images, name)
        for images, name in (
            (digits.train, "digits"),
            (generated.images, "generated"),
            (digits.held_out, "held-out digits"),
        )
    ]
    options = replace(options, seed=seed)
    refined = refine(sources[0], sources[1], options, held_out=sources[2])
    guarded = refined.discriminator.temperature
    unguarded = refine(
        sources[0],
        sources[1],
        replace(options, temperature=1.0, force=True),
        refined.discriminator,
        sources[2],
    )
    refined.discriminator.temperature = guarded
    assert unguarded.after is not None
    oracle = _oracle(digits, generated, seed, options.judge_rows)
    return SeedResult(seed, digits, generated, refined, unguarded.after, oracle)


def _oracle(digits: Digits, generated: Generated, seed: int, judge_rows: int) -> TwoSample:
    """What weights that know every fault reach: no blends, no noise, true class proportions."""
    import torch

    from .resampling import resample

    true = np.bincount(digits.train_labels, minlength=10) / len(digits.train_labels)
    weights = (generated.kind == 0) * (true / generated.proportions)[generated.labels]
    size = min(judge_rows, len(digits.held_out))
    rows = resample(torch.from_numpy(weights), size, seed=seed).numpy()
    return two_sample(digits.held_out[:size], generated.images[rows], groups=rows, seed=seed)


def write_samples(result: DemoResult, folder: Path) -> None:
    """The first seed's arrays as files: digits.npy, generated.npy, refined.npy and held_out.npy."""
    first = result.seeds[0]
    rows = first.refined.indices
    assert rows is not None
    arrays = {
        "digits": first.digits.train,
        "held_out": first.digits.held_out,
        "generated": first.generated.images,
        "refined": first.generated.images[rows],
    }
    for name, array in arrays.items():
        source = ArrayRows(array, name)
        with create_rows(folder / f"{name}.npy", source.shape, source.element) as writer:
            writer.write(source.read(0, len(source)))


def run_demo(
    seeds: int = 5,
    *,
    number: int = 3000,
    options: RefineOptions | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> DemoResult:
    """The whole demonstration.

    Args:
        seeds: how many independent repetitions (split, generator and fit).
        number: generated samples in each.
        options: of the refine jobs; the seed is set by the repetition.
        announce: called with a line of text when a repetition is done.

    Returns:
        `DemoResult`.

    Raises:
        ModuleNotFoundError: scikit-learn or matplotlib is missing.

    Example:
        >>> run_demo(1, number=400).hopeless.refinable  # doctest: +SKIP
        False
    """
    require_extras()
    options = options or RefineOptions(progress=False, num=1000, model="linear")
    results = []
    for seed in range(seeds):
        result = run_seed(seed, number, options)
        results.append(result)
        before, after = result.refined.before, result.refined.after
        assert before is not None and after is not None
        announce(
            f"seed {seed}: AUC {before.auc:.3f} -> {after.auc:.3f}, "
            f"energy distance {before.energy_distance:.3f} -> {after.energy_distance:.3f}, "
            f"temperature {result.refined.temperature:.2f}, "
            f"{result.refined.ess:.0f} effective of {number}"
        )
    digits = results[0].digits
    images = mixture_generator(digits, number, seed=0)
    with at_most_threads(1):
        hopeless = refine(
            ArrayRows(digits.train, "digits"),
            ArrayRows(images, "mixture"),
            replace(options, seed=0),
            held_out=ArrayRows(digits.held_out, "held-out digits"),
        )
    return DemoResult(results, hopeless, images)
