"""The norm bound that proves the most: its optimum, its balance, its rules, and its files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import refine_ext as rx


def samples(n: int = 4000, fakes: int = 400, shift: float = 0.5, width: int = 4, seed: int = 0):
    """Features in [-1, 1]."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) / math.sqrt(width)
    real = np.tanh(rng.normal(shift, 1.0, (n, width)) @ mixing)
    return real, np.tanh(rng.normal(0.0, 1.2, (fakes, width)) @ mixing)


def suggest(real, fake, divergence="kl", **options):
    return rx.suggest_norm_bound(real, fake, divergence, **{"draws": 32, "feature_bound": 2.0, **options})


@pytest.mark.parametrize("hull", [False, True])
@pytest.mark.parametrize("divergence", ["kl", "jensen_shannon", "pearson_chi2", "gan", "alpha:0.5"])
def test_no_other_bound_proves_more(divergence, hull):
    """The suggested B against 60 others; the search promises 1 % of the maximum."""
    real, fake = samples()
    found = suggest(real, fake, divergence, hull=hull)
    assert found.rule == "certificate" and found.certificate.certified_improvement > 0
    grid = [found.norm_bound * 1.12**k for k in range(-30, 31)]
    others = suggest(real, fake, divergence, hull=hull, bounds=grid)
    best = max(point["certified_improvement"] for point in others.curve)
    assert found.certificate.certified_improvement >= 0.99 * best
    assert others.certificate.certified_improvement == best
    # At the optimum the refined sample is as near to the real one as that is proven to be to the data.
    unit_ipm = found.certificate.ipm_refined / found.norm_bound
    assert unit_ipm == pytest.approx(found.deviation, rel=0.2)
    assert found.deviation * found.norm_bound == pytest.approx(found.certificate.deviation_term, rel=1e-12)


def test_the_curve_is_concave_and_the_misfit_falls():
    found = suggest(*samples())
    bounds, gains, misfit = (
        np.array([p[k] for p in found.curve]) for k in ("norm_bound", "certified_improvement", "unit_ipm")
    )
    assert (np.diff(bounds) > 0).all() and (np.diff(misfit) <= 1e-9).all()
    secants = np.diff(gains) / np.diff(bounds)
    assert (np.diff(secants) <= 1e-6).all()
    assert found.certificate.to_dict() == rx.refinement_certificate(
        *samples(), norm_bound=found.norm_bound, draws=32, feature_bound=2.0
    ).to_dict() | {
        # Started elsewhere, the solver arrives at another point within its gap.
        k: found.certificate.to_dict()[k]
        for k in (
            "bound_refined", "bound_by_duality", "gain", "certified_improvement", "ipm_refined", "divergence_value",
            "dual_value", "duality_gap", "ess", "shift", "iterations",
        )
    }  # fmt: skip


def test_features_in_other_units_give_the_bound_in_theirs():
    real, fake = samples()
    found, scaled = suggest(real, fake), suggest(10 * real, 10 * fake, feature_bound=20.0)
    assert scaled.norm_bound == pytest.approx(found.norm_bound / 10, rel=1e-9)
    assert scaled.certificate.certified_improvement == pytest.approx(found.certificate.certified_improvement, rel=1e-6)


def test_the_rules():
    """Much data proves an improvement; little data leaves the complexity to go by; equal samples leave nothing."""
    little = suggest(*samples(n=150))
    assert little.rule == "complexity" and little.certificate.certified_improvement <= 0
    assert "nothing is proven" in str(little)
    noise = 2 * float(little.certificate.complexity) / little.norm_bound
    assert little.certificate.ipm_refined / little.norm_bound == pytest.approx(noise, rel=0.2)
    real, _ = samples(n=300)
    nothing = suggest(real[:150], real[150:])
    assert nothing.rule == "smallest" and "refine nothing" in nothing.reason
    assert nothing.certificate.divergence_value < 1e-4 and nothing.certificate.ess > 149


def test_supports_that_do_not_meet_end_the_search():
    """No weights bring the generated sample near: the misfit never falls to the deviation, and B has a ceiling."""
    found = suggest(np.linspace(0.8, 1.0, 4000)[:, None], np.linspace(-1, 0, 50)[:, None])
    assert found.rule == "unreachable" and "weights cannot" in str(found)
    misfits = [point["unit_ipm"] for point in found.curve]
    assert min(misfits) == pytest.approx(0.9, abs=1e-3)  # all weight on the generated sample at 0
    near = [point["norm_bound"] for point in found.curve if point["unit_ipm"] <= 1.05 * min(misfits)]
    assert found.norm_bound == near[0] < found.curve[-1]["norm_bound"]


def test_text_json_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = suggest(*samples(n=150))
    assert json.loads(json.dumps(found.to_dict()))["curve"] == found.curve
    assert str(found.certificate) in str(found) and found.reason in str(found)
    found.save(tmp_path / "search.json")
    assert json.loads((tmp_path / "search.json").read_text())["norm_bound"] == found.norm_bound
    found.plot(tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"plot: path must end in \.png"):
        found.plot(tmp_path / "x.pdf")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"bounds": []}, ValueError, "suggest_norm_bound: bounds must hold at least one number"),
        ({"bounds": [1.0, -2.0]}, ValueError, "bounds must be positive and finite, got -2.0"),
        ({"bounds": ["a"]}, TypeError, "bounds must be a number, got str"),
        ({"delta": 2.0}, ValueError, r"suggest_norm_bound: delta must be in \(0, 1\)"),
        ({"divergence": "nothing"}, ValueError, "suggest_norm_bound: divergence must be one of"),
        ({"feature_bound": 0.01}, ValueError, "feature_bound must be at least"),
        ({"real": np.ones((1, 4))}, ValueError, "suggest_norm_bound: real must have at least 2 samples"),
    ],
)
def test_bad_input_is_named(change, error, words):
    real, fake = samples(n=30)
    with pytest.raises(error, match=words):
        rx.suggest_norm_bound(**{"real": real, "fake": fake, **change})
