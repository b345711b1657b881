"""The certificate of `deviation="direct"`: its formula, how often it fails, what it proves, its words and errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import binom

import refine_ext as rx

DELTA, REPETITIONS = 0.05, 400
# If a repetition fails with probability DELTA, more than this many of them fail with probability below 1e-6: 44 of 400.
MOST_VIOLATIONS = int(binom.isf(1e-6, REPETITIONS, DELTA))
FREQUENCIES = np.random.default_rng(99).normal(size=(8, 2))


def certify(real, fake, **options):
    return rx.refinement_certificate(real, fake, **{"draws": 8, "deviation": "direct", "feature_bound": 1.0, **options})


def waves(x: np.ndarray) -> np.ndarray:
    """cos and sin of 8 frequencies in the plane, of norm 1."""
    angles = x @ FREQUENCIES.T
    return np.concatenate([np.cos(angles), np.sin(angles)], 1) / math.sqrt(len(FREQUENCIES))


def gaussian(rng: np.random.Generator, n: int, mean: float = 0.0) -> np.ndarray:
    return waves(rng.normal([mean, 0.0], 1.0, (n, 2)))


def mean_gaussian(mean: float = 0.0) -> np.ndarray:
    """E of `gaussian`, by the characteristic function."""
    decay, phase = np.exp(-(FREQUENCIES**2).sum(1) / 2), FREQUENCIES[:, 0] * mean
    return np.concatenate([decay * np.cos(phase), decay * np.sin(phase)]) / math.sqrt(len(FREQUENCIES))


def signs(width: int):
    """Random signs, scaled to norm 1: of all features of at most that norm, those with the largest variance."""
    return lambda rng, n: rng.choice([-1.0, 1.0], (n, width)) / math.sqrt(width)


DATA = {"gaussian": (gaussian, mean_gaussian()), "sign": (signs(1), np.zeros(1)), "signs": (signs(16), np.zeros(16))}


@pytest.mark.parametrize(
    ("n", "norm_bound", "feature_bound", "delta", "expected"),
    [
        (100, 2.5, 3.0, math.exp(-2), 2.25),  # 7.5 (1 + 2) / 10
        (25, 0.5, 4.0, math.exp(-8), 2.0),  # 2 (1 + 4) / 5
        (400, 1.0, 1.0, math.exp(-0.5), 0.1),  # (1 + 1) / 20
    ],
)
def test_hand_values(n, norm_bound, feature_bound, delta, expected):
    real = np.random.default_rng(0).uniform(-0.5, 0.5, (n, 3))
    options = {"norm_bound": norm_bound, "feature_bound": feature_bound, "delta": delta}
    c = certify(real, real[:20] / 2, **options)
    assert c.deviation == "direct" and c.direct_term == c.deviation_term == pytest.approx(expected, rel=1e-14)
    assert c.complexity_term == c.monte_carlo_term == c.confidence_term == c.monte_carlo_delta == 0
    assert c.confidence_delta == delta and c.probability == 1 - delta
    assert c.bound_refined == c.ipm_refined + c.direct_term and c.bound_unrefined == c.ipm_unrefined + c.direct_term
    other = certify(real, real[:20] / 2, deviation="rademacher", **options)
    assert other.deviation == "rademacher" and other.direct_term == 0
    assert other.deviation_term == other.complexity_term + other.confidence_term > c.deviation_term
    # The refinement is the same, and the complexity is still reported.
    assert c.ipm_refined == other.ipm_refined and float(c.complexity) == float(other.complexity) > 0


@pytest.mark.parametrize("name", DATA)
def test_it_fails_no_more_often_than_delta(name):
    """Too small constants do: without its second term, or with differences of kappa / n and no first term."""
    draw, mean = DATA[name]
    n, bound = 60, 2.0
    fake = draw(np.random.default_rng(1), 30)
    violated = dict.fromkeys(("direct", "mean", "halved"), 0)
    for repetition in range(REPETITIONS):
        real = draw(np.random.default_rng([2, repetition]), n)
        deviation = bound * float(np.linalg.norm(real.mean(0) - mean))
        c = certify(real, fake, norm_bound=bound, delta=DELTA, draws=1, tolerance=1e-4)
        violated["direct"] += deviation > c.deviation_term
        violated["mean"] += deviation > bound / math.sqrt(n)
        violated["halved"] += deviation > bound * math.sqrt(math.log(1 / DELTA) / (2 * n))
        if deviation <= c.deviation_term:
            for weights, most in ((c.weights.numpy(), c.bound_refined), (np.full(30, 1 / 30), c.bound_unrefined)):
                assert bound * np.linalg.norm(mean - weights @ fake) <= most
    assert violated["direct"] <= MOST_VIOLATIONS
    if name == "sign":  # one dimension has the heaviest tail: P(|N(0, 1)| > 1) = 0.32 and P(|N(0, 1)| > 1.22) = 0.22
        assert violated["mean"] > MOST_VIOLATIONS and violated["halved"] > MOST_VIOLATIONS
    elif name == "signs":
        assert violated["mean"] > MOST_VIOLATIONS


def test_it_is_always_the_tighter_one():
    rng = np.random.default_rng(3)
    for _ in range(40):
        n, width, delta = int(rng.integers(2, 400)), int(rng.integers(1, 9)), float(rng.uniform(0.001, 0.999))
        real, fake = rng.normal(size=(n, width)) * rng.exponential(), rng.normal(size=(20, width))
        largest = max(np.linalg.norm(x, axis=1).max() for x in (real, fake))
        options = {"delta": delta, "feature_bound": float(largest * rng.uniform(1, 3)), "tolerance": 1e-3}
        direct, rademacher = (certify(real, fake, deviation=d, **options) for d in ("direct", "rademacher"))
        assert direct.deviation_term < rademacher.deviation_term
        assert direct.certified_improvement > rademacher.certified_improvement
    assert "largest |h| seen" in str(certify(real, fake, feature_bound=None))


def test_what_is_proven_nearer_is_nearer():
    """Generated samples at other distances: some proven, and of those none further from the data than before."""
    proven, truths = [], []
    for repetition in range(60):
        rng = np.random.default_rng([4, repetition])
        real, fake = gaussian(rng, 1500), gaussian(rng, 200, mean=0.02 * repetition)
        c = certify(real, fake, norm_bound=5.0, tolerance=1e-5)
        assert c.proven_nearer == (c.ipm_unrefined - c.ipm_refined > 2 * c.deviation_term)
        unrefined, refined = (np.linalg.norm(mean_gaussian() - x) for x in (fake.mean(0), np.asarray(c.weights) @ fake))
        proven.append(c.proven_nearer)
        truths.append(refined < unrefined)
        assert ("exceeded: it is nearer" in str(c)) == c.proven_nearer
        assert ("not exceeded: the gain proves nothing" in str(c)) != c.proven_nearer
    assert 15 <= sum(proven) <= 45 and all(truth for truth, sure in zip(truths, proven, strict=True) if sure)


def test_a_gain_proves_nothing():
    """The model is P itself, and refining it on 100 samples makes most samples worse; every gain is positive."""
    worse = 0
    for repetition in range(60):
        rng = np.random.default_rng([5, repetition])
        real, fake = gaussian(rng, 100), gaussian(rng, 1000)
        c = certify(real, fake, norm_bound=3.0, tolerance=1e-5)
        assert c.gain > 0 and not c.proven_nearer
        worse += np.linalg.norm(mean_gaussian() - c.weights.numpy() @ fake) > np.linalg.norm(
            mean_gaussian() - fake.mean(0)
        )
    assert worse > 45


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_the_threshold_is_both_deviations(factor):
    """Two points: the real sample at 0 is reached exactly, so that the gain is the IPM of the generated one."""
    n = 10_000
    deviation = (1 + math.sqrt(2 * math.log(1 / DELTA))) / math.sqrt(n)
    fake = np.array([[-0.5], [0.5 + 4 * deviation * factor]])  # mean 2 deviation factor
    c = certify(np.zeros((n, 1)), fake, norm_bound=100.0, tolerance=1e-10)
    assert c.gain == pytest.approx(200 * deviation * factor, rel=1e-5)
    assert c.proven_nearer == (factor > 1) == c.to_dict()["proven_nearer"]


def test_the_norm_bound_that_proves_the_most():
    rng = np.random.default_rng(6)
    real, fake = gaussian(rng, 1500), gaussian(rng, 300, mean=0.5)
    options = {"feature_bound": 1.0, "draws": 32}
    found = rx.suggest_norm_bound(real, fake, deviation="direct", **options)
    assert found.deviation == pytest.approx((1 + math.sqrt(2 * math.log(20))) / math.sqrt(1500), rel=1e-12)
    assert found.rule == "certificate" and found.certificate.deviation == "direct"
    assert found.certificate.ipm_refined / found.norm_bound == pytest.approx(found.deviation, rel=0.2)
    grid = [found.norm_bound * 1.12**k for k in range(-20, 21)]
    others = rx.suggest_norm_bound(real, fake, deviation="direct", bounds=grid, **options)
    assert found.certificate.certified_improvement >= 0.99 * others.certificate.certified_improvement > 0
    # The same samples leave the paper's certificate nothing to prove.
    paper = rx.suggest_norm_bound(real, fake, **options)
    assert paper.rule == "complexity" and paper.certificate.certified_improvement <= 0


def test_a_direct_deviation_below_the_complexity():
    """delta = 0.9: 1.46 / sqrt(n) for random signs, whose complexity term is 2 / sqrt(n)."""
    real = signs(64)(np.random.default_rng(7), 400)
    for shift in (1.0, 1.9, 3.0):
        # Two points whose mean is shift / sqrt(n) from the real sample's, which lies between them.
        fake = real.mean(0) + shift / math.sqrt(400 * 64) + np.array([[0.1], [-0.1]])
        found = rx.suggest_norm_bound(real, fake, deviation="direct", delta=0.9, feature_bound=1.0, draws=64)
        assert found.deviation < 2 * float(found.certificate.complexity) / found.norm_bound
        assert found.rule == ("smallest" if shift < 1.4 else "certificate")
        if found.rule == "certificate":  # and the search went on to the balance
            assert found.certificate.ipm_refined / found.norm_bound == pytest.approx(found.deviation, rel=0.2)


def test_text_json_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from refine_ext.certificate_figure import draw_certificate

    rng = np.random.default_rng(9)
    real, fake = gaussian(rng, 200), gaussian(rng, 100, mean=0.5)
    for deviation, others in (("direct", "rademacher"), ("rademacher", "direct")):
        c = certify(real, fake, deviation=deviation)
        words = {"direct": ["direct deviation bound"], "rademacher": ["2 x Rademacher complexity", "confidence, 6M"]}
        text = str(c)
        assert all(w in text for w in words[deviation]) and not any(w in text for w in words[others])
        assert f"{2 * c.deviation_term:.4g}, not exceeded" in text
        c.save(tmp_path / "c.json")
        facts = json.loads((tmp_path / "c.json").read_text())
        assert facts["deviation"] == deviation and facts["direct_term"] == c.direct_term
        terms = facts["complexity_term"] + facts["confidence_term"] + facts["direct_term"]
        assert facts["deviation_term"] == terms and facts["proven_nearer"] is False
        (axes,) = draw_certificate(c).axes
        legend = [entry.get_text() for entry in axes.get_legend().get_texts()]
        drawn = (
            ["direct deviation bound"] if deviation == "direct" else ["2 × Rademacher complexity", "confidence term"]
        )
        assert legend == ["IPM to the real sample", *drawn]
        ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
        assert max(ends) == pytest.approx(c.bound_unrefined, rel=1e-12)


@pytest.mark.parametrize("call", [rx.refinement_certificate, rx.suggest_norm_bound])
def test_bad_input_is_named(call):
    real = np.random.default_rng(10).normal(size=(20, 3))
    name = call.__name__
    with pytest.raises(ValueError, match=f"{name}: deviation='direct' is for the linear class .* only 'rademacher'"):
        call(real, real, hull=True, deviation="direct")
    for wrong in ("Direct", None, 1):
        with pytest.raises(ValueError, match=f"{name}: deviation must be one of rademacher, direct, got {wrong!r}"):
            call(real, real, deviation=wrong)
