"""The refined certificate: identities, inequalities, closed forms, the truth of its bounds, and its words."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from dual_reference import FAMILIES, generator, reference_value, scipy_optimize

import refine_ext as rx
from refine_ext import certificate
from refine_ext.certificate import MONTE_CARLO_SHARE

CLASSES = [False, True]


def problem(seed: int, width: int = 5, n: int = 80, fakes: int = 120, shift: float = 0.4):
    """Bounded features of real and generated samples that overlap."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) / math.sqrt(width)
    real = np.tanh(rng.normal(shift, 1.0, (n, width)) @ mixing)
    return real, np.tanh(rng.normal(0.0, 1.2, (fakes, width)) @ mixing)


def certify(real, fake, divergence="kl", **options):
    return rx.refinement_certificate(real, fake, divergence, **{"draws": 32, **options})


def dual_norm(x: np.ndarray, hull: bool) -> float:
    return float(np.abs(x).max() if hull else np.sqrt((x * x).sum()))


@pytest.mark.parametrize("hull", CLASSES)
@pytest.mark.parametrize("divergence", FAMILIES)
def test_identities_and_inequalities(divergence, hull):
    """Everything recomputed from the refined weights alone, in NumPy."""
    f = generator(divergence)
    for seed, bound in itertools.product(range(4), (0.3, 2.0, 10.0)):
        real, fake = problem(seed)
        c = certify(real, fake, divergence, norm_bound=bound, hull=hull, feature_bound=4.0, tolerance=1e-9)
        assert c.converged
        w = c.weights.numpy()
        assert w.sum() == pytest.approx(1.0, abs=1e-12) and (w >= 0).all()
        r = len(fake) * w
        assert c.divergence_value == pytest.approx(f(r).mean(), abs=1e-9)
        assert c.divergence_at_one == pytest.approx(float(f(np.ones(1))[0]), abs=1e-15)
        before, after = (bound * dual_norm(real.mean(0) - x, hull) for x in (fake.mean(0), w @ fake))
        assert (c.ipm_unrefined, c.ipm_refined) == (pytest.approx(before, abs=1e-12), pytest.approx(after, abs=1e-9))
        # Duality: the primal at the refined sample is the dual and its gap; at any other it is no smaller.
        assert c.dual_value == pytest.approx(c.divergence_value + c.ipm_refined - c.duality_gap, abs=1e-7)
        h = c.discriminator_weight.numpy()
        assert c.dual_value == pytest.approx(reference_value(h, real, fake, divergence), abs=1e-7)
        assert c.dual_value <= before + c.divergence_at_one + 1e-9
        rng = np.random.default_rng(seed)
        for concentration in (0.3, 3.0, 300.0):
            other = rng.dirichlet(np.full(len(fake), concentration)) + 1e-9
            other /= other.sum()
            primal = f(len(fake) * other).mean() + bound * dual_norm(real.mean(0) - other @ fake, hull)
            assert primal >= c.dual_value - 1e-9
        paid = c.divergence_value - c.divergence_at_one
        assert paid >= -1e-12
        assert c.gain >= paid - c.duality_gap - 1e-9
        assert c.ipm_refined <= before - paid + c.duality_gap + 1e-9
        # The bounds are sums of their terms.
        terms = c.complexity_term + c.confidence_term
        assert c.bound_refined == pytest.approx(c.ipm_refined + terms, rel=1e-15)
        assert c.bound_unrefined == pytest.approx(c.ipm_unrefined + terms, rel=1e-15)
        assert c.bound_refined <= c.bound_by_duality + 1e-9 <= c.bound_unrefined + c.duality_gap + 2e-9
        assert c.certified_improvement == pytest.approx(c.dual_value - c.divergence_at_one - terms, abs=1e-12)
        assert 0 < c.monte_carlo_term < c.complexity_term


@pytest.mark.parametrize("hull", CLASSES)
def test_the_terms_are_the_formulas(hull):
    real, fake = problem(0, n=300)
    c = certify(real, fake, norm_bound=2.5, feature_bound=3.0, delta=0.04, hull=hull, draws=256, seed=7)
    size = np.abs(real).max() if hull else np.sqrt((real**2).sum(1)).max()
    assert c.function_bound == 7.5 and c.function_bound_known
    assert c.probability == 0.96 and c.confidence_delta + c.monte_carlo_delta == pytest.approx(0.04, rel=1e-15)
    assert c.monte_carlo_delta == pytest.approx(0.04 * MONTE_CARLO_SHARE, rel=1e-15)
    assert c.confidence_term == pytest.approx(6 * 7.5 * math.sqrt(math.log(2 / c.confidence_delta) / 600), rel=1e-12)
    width = 2.5 * size * math.sqrt(2 * math.log(1 / c.monte_carlo_delta) / (300 * 256))
    assert c.monte_carlo_term == pytest.approx(2 * width, rel=1e-12)
    estimate = (rx.rademacher if hull else rx.rademacher_linear)(torch.tensor(real), draws=256, seed=7)
    assert c.complexity_term == pytest.approx(2 * (2.5 * float(estimate) + width), rel=1e-12)
    assert float(c.complexity) == pytest.approx(2.5 * float(estimate), rel=1e-12)
    assert c.complexity.upper(c.monte_carlo_delta) == pytest.approx(c.complexity_term / 2, rel=1e-12)
    unknown = certify(real, fake, norm_bound=2.5, hull=hull)
    largest = max((np.abs(x).max() if hull else np.sqrt((x**2).sum(1)).max()) for x in (real, fake))
    assert unknown.function_bound == pytest.approx(2.5 * largest, rel=1e-12) and not unknown.function_bound_known
    assert any("largest |h| seen" in note for note in unknown.notes)


@pytest.mark.parametrize("hull", CLASSES)
def test_the_complexity_is_that_of_all_sign_vectors(hull):
    """2^12 sign vectors enumerated: the estimate is within its error, its upper limit above."""
    real, fake = problem(1, n=12)
    c = certify(real, fake, norm_bound=3.0, hull=hull, draws=4096)
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=12)))
    exact = 3.0 * np.mean([dual_norm(s, hull) for s in signs @ real / 12])
    assert abs(float(c.complexity) - exact) < 5 * c.complexity.stderr
    assert exact <= c.complexity_term / 2
    every = certify(real, fake, norm_bound=3.0, hull=hull, draws="all")
    assert every.complexity_term / 2 == pytest.approx(exact, rel=1e-12) and every.monte_carlo_term == 0


@pytest.mark.parametrize("hull", CLASSES)
@pytest.mark.parametrize("divergence", FAMILIES)
def test_two_points_in_closed_form(divergence, hull):
    """A generated sample at -1 and 1: min over its share p at 1 of D_f + B |a - (2p - 1)|, by a scalar search."""
    f = generator(divergence)
    mean_real = 0.55
    real, fake = np.full((4, 1), mean_real), np.array([[-1.0], [1.0]])
    for bound in (0.1, 0.6, 3.0):

        def primal(p, bound=bound):
            with np.errstate(all="ignore"):
                return 0.5 * (f(2 * p) + f(2 * (1 - p))) + bound * abs(mean_real - (2 * p - 1))

        target = (1 + mean_real) / 2
        found = scipy_optimize.minimize_scalar(primal, bounds=(0.5, target), method="bounded", options={"xatol": 1e-12})
        share, value = (target, primal(target)) if primal(target) <= found.fun else (found.x, found.fun)
        c = certify(real, fake, divergence, norm_bound=bound, hull=hull, tolerance=1e-11)
        assert c.dual_value == pytest.approx(value, abs=1e-8)
        # The search brackets the share to 1e-12, but sees it through a value that is flat to 1e-16: 1e-8.
        assert float(c.weights[1]) == pytest.approx(share, abs=2e-6)
        assert c.ipm_refined == pytest.approx(bound * abs(mean_real - (2 * share - 1)), abs=1e-5 * max(1.0, bound))


@pytest.mark.parametrize("hull", CLASSES)
def test_gaussians_are_tilted_exponentially(hull):
    """Q = N(0, 1), P with mean a, h = w x, `kl`: Q-hat = N(w, 1), w = min(B, a); D = w^2/2, IPM = B (a - w)."""
    quantiles = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)[:, None]
    real = quantiles[::20] + 0.8
    mean = float(real.mean())
    for bound in (0.3, 0.5, 2.0):
        c = certify(real, quantiles, norm_bound=bound, hull=hull)
        w = min(bound, mean)
        # The quantiles end at 4.7 standard deviations; what e^{wx} has beyond is below 1e-4 of its moments.
        assert float(c.discriminator_weight[0]) == pytest.approx(w, abs=1e-3)
        assert c.divergence_value == pytest.approx(w * w / 2, abs=1e-3)
        assert c.ipm_unrefined == pytest.approx(bound * mean, rel=1e-9)
        assert c.ipm_refined == pytest.approx(bound * (mean - w), abs=2e-3)
        assert float(c.log_ratio(torch.ones(1, 1))) == pytest.approx(w - w * w / 2, abs=1e-3)


@pytest.mark.parametrize("hull", CLASSES)
@pytest.mark.parametrize("divergence", ["kl", "jensen_shannon", "pearson_chi2", "gan"])
def test_monotone_in_the_norm_bound(divergence, hull):
    """D_f and the dual value rise with B, the dual value concavely; the unit class's IPM falls: its slope."""
    real, fake = problem(3)
    bounds = [0.1 * 1.6**k for k in range(12)]
    found = [certify(real, fake, divergence, norm_bound=b, hull=hull, tolerance=1e-10, draws=1) for b in bounds]
    for low, high in itertools.pairwise(found):
        assert high.divergence_value >= low.divergence_value - 1e-8
        slopes = [c.ipm_refined / c.norm_bound for c in (low, high)]
        assert slopes[1] <= slopes[0] + 1e-8
        secant = (high.dual_value - low.dual_value) / (high.norm_bound - low.norm_bound)
        assert slopes[1] - 1e-7 <= secant <= slopes[0] + 1e-7


@pytest.mark.parametrize("divergence", FAMILIES)
def test_the_dual_objective_is_the_gain_in_bregman_divergence(divergence):
    """P = weights on the generated points: E_Q[B_f(r, 1)] - E_Q[B_f(r, refined r)] = the objective at h* under P."""
    real, fake = problem(4)
    c = certify(real, fake, divergence, norm_bound=0.2, tolerance=1e-9)
    f = generator(divergence)
    ratio = np.random.default_rng(0).dirichlet(np.full(len(fake), 3.0)) * len(fake)
    refined = c.weights.numpy() * len(fake)
    h = c.outputs(fake).numpy()
    assert (refined > 0).all()
    slope = h - c.shift  # f'(refined ratio)
    bregman = (f(ratio) - f(refined) - slope * (ratio - refined)).mean()
    at_one = (f(ratio) - f(np.ones_like(ratio))).mean()
    under_p = ratio / len(fake) @ h - (real.mean(0) @ c.discriminator_weight.numpy() - c.dual_value)
    assert at_one - bregman == pytest.approx(under_p - c.divergence_at_one, abs=1e-9)
    if divergence == "kl":
        assert under_p == pytest.approx(float((ratio * np.log(refined)).mean()), abs=1e-10)


@pytest.mark.parametrize("hull", CLASSES)
def test_the_bounds_hold_for_a_population(hull):
    """P is uniform on 4000 points: its IPM is exact. The sample's own IPM, which the bound adds to, does fail."""
    rng = np.random.default_rng(5)
    mixing = rng.normal(size=(6, 6)) / 2
    population = np.tanh(rng.normal(0.3, 1.0, (4000, 6)) @ mixing)
    fake = np.tanh(rng.normal(0.0, 1.2, (300, 6)) @ mixing)
    largest = np.abs(population).max() if hull else np.sqrt((population**2).sum(1)).max()
    too_low = 0
    for repetition in range(60):
        real = population[rng.integers(4000, size=100)]
        c = certify(real, fake, norm_bound=2.0, feature_bound=float(largest), hull=hull, seed=repetition)
        weights = c.weights.numpy()
        truth = [2.0 * dual_norm(population.mean(0) - x, hull) for x in (weights @ fake, fake.mean(0))]
        assert truth[0] <= c.bound_refined and truth[1] <= c.bound_unrefined
        too_low += truth[0] > c.ipm_refined
        # Another sample's bound, from the same certificate.
        assert 2.0 * dual_norm(population.mean(0) - fake[:40].mean(0), hull) <= c.bound_of(fake[:40])
        under_p = c.dual_value + (population.mean(0) - real.mean(0)) @ c.discriminator_weight.numpy()
        assert under_p - c.divergence_at_one >= c.certified_improvement
    assert too_low > 30


def test_bound_of_other_weights():
    real, fake = problem(6)
    c = certify(real, fake, norm_bound=2.0)
    assert c.bound_of(fake, c.weights) == pytest.approx(c.bound_refined, rel=1e-12)
    assert c.bound_of(fake, 7 * c.weights) == pytest.approx(c.bound_refined, rel=1e-12)
    assert c.bound_of(fake) == pytest.approx(c.bound_unrefined, rel=1e-12)
    assert c.bound_of(real) == pytest.approx(c.deviation_term, rel=1e-12)
    with pytest.raises(ValueError, match=r"bound_of: weights must be \[120\]"):
        c.bound_of(fake, np.ones(3))
    with pytest.raises(ValueError, match="non-negative"):
        c.bound_of(fake, -np.ones(120))
    with pytest.raises(ValueError, match="features must have 5 features a sample, got 2"):
        c.bound_of(np.ones((3, 2)))


@pytest.mark.parametrize("divergence", ["kl", "pearson_chi2", "squared_hellinger"])
def test_the_discriminator_gives_the_weights_again(divergence):
    real, fake = problem(7)
    c = certify(real, fake, divergence, norm_bound=2.0)
    torch.testing.assert_close(c.log_ratio(fake).exp() / len(fake), c.weights, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(c.outputs(fake), torch.tensor(fake) @ c.discriminator_weight)
    assert c.ess == pytest.approx(float(1 / c.weights.square().sum()), rel=1e-10)


def test_types_of_samples():
    real, fake = problem(8)
    reference = certify(real, fake)
    single = certify(real.astype(np.float32), torch.tensor(fake, dtype=torch.float32))
    assert single.bound_refined == pytest.approx(reference.bound_refined, rel=1e-5)
    half = certify(torch.tensor(real).bfloat16(), torch.tensor(fake).bfloat16())
    assert half.bound_refined == pytest.approx(reference.bound_refined, rel=0.02)
    strided = certify(np.asfortranarray(real)[::2], fake[::-1])
    assert strided.bound_refined == pytest.approx(certify(real[::2].copy(), fake).bound_refined, rel=1e-9)


def test_it_says_what_to_mind(monkeypatch):
    real, fake = problem(9, n=10)
    vacuous = certify(real, fake)
    assert vacuous.bound_refined > vacuous.trivial_bound
    assert any("vacuous" in note for note in vacuous.notes) and "vacuous" in str(vacuous)
    real, fake = problem(9, n=100_000)
    clear = certify(real, fake, norm_bound=1.0, feature_bound=math.sqrt(5), draws=1)
    assert clear.notes == [] and clear.bound_refined < clear.trivial_bound
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best = certify(*problem(9), norm_bound=5.0)
    monkeypatch.setattr(certificate, "solve_linear_dual", partial(certificate.solve_linear_dual, max_iterations=1))
    with pytest.warns(RuntimeWarning, match="stopped after 1 steps .* the bounds hold all the same"):
        stopped = certify(*problem(9), norm_bound=5.0)
    assert not stopped.converged and "stopped after" in str(stopped)
    assert stopped.dual_value < best.dual_value <= stopped.dual_value + stopped.duality_gap
    # Still an average over weights of the generated sample, and still within the duality's bound with its gap.
    assert stopped.bound_refined <= stopped.bound_by_duality + 1e-9


@pytest.mark.parametrize("hull", CLASSES)
def test_text_json_and_picture(tmp_path, hull):
    pytest.importorskip("matplotlib")
    c = certify(*problem(10), "gan", hull=hull, norm_bound=1.5)
    text = str(c)
    for number in (c.bound_refined, c.bound_unrefined, c.ipm_refined, c.ipm_unrefined, c.confidence_term):
        assert f"{number:.4g}" in text
    assert "probability 0.95" in text and ("hull" in text) == hull
    c.save(tmp_path / "c.json")
    read = json.loads((tmp_path / "c.json").read_text())
    facts = c.to_dict()
    assert read == json.loads(json.dumps(facts)) and read["bound_refined"] == c.bound_refined
    assert read["complexity"]["mean"] == float(c.complexity)
    c.plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"save: path must end in \.json"):
        c.save(tmp_path / "c.txt")
    with pytest.raises(ValueError, match=r"plot: path must end in \.png"):
        c.plot(tmp_path / "c.jpg")
    with pytest.raises(ValueError, match="does not exist"):
        c.save(tmp_path / "nowhere" / "c.json")


def test_seeds_decide_everything():
    real, fake = problem(11)
    first, again, other = (certify(real, fake, seed=s) for s in (1, 1, 2))
    assert first.to_dict() == again.to_dict()
    assert first.complexity_term != other.complexity_term and first.ipm_refined == other.ipm_refined


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"norm_bound": 0.0}, ValueError, "norm_bound must be positive and finite, got 0.0"),
        ({"norm_bound": math.inf}, ValueError, "norm_bound must be positive and finite"),
        ({"norm_bound": "2"}, TypeError, "norm_bound must be a number, got str"),
        ({"delta": 0.0}, ValueError, "delta must be positive"),
        ({"delta": 1.0}, ValueError, r"delta must be in \(0, 1\), got 1.0"),
        ({"feature_bound": 0.1}, ValueError, "feature_bound must be at least the largest norm of a real sample"),
        ({"feature_bound": 0.1, "hull": True}, ValueError, r"at least the largest \|h_j\| of a real sample"),
        ({"feature_bound": -1.0}, ValueError, "feature_bound must be positive"),
        ({"divergence": "wasserstein"}, ValueError, "refinement_certificate: divergence must be one of"),
        ({"draws": 0}, ValueError, "draws must be at least 1"),
        ({"draws": 1.5}, TypeError, "draws must be an int"),
        ({"seed": "a"}, TypeError, "seed must be an int"),
        ({"hull": 1}, TypeError, "hull must be True or False, got int"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be positive"),
        ({"real": [[1.0]]}, TypeError, "real must be a NumPy array or a torch tensor, got list"),
        ({"real": np.ones((3, 2), dtype=int)}, TypeError, "real must be floating or uint8"),
        ({"real": np.ones((1, 5))}, ValueError, "real must have at least 2 samples, got 1"),
        ({"real": np.ones((4, 5, 2))}, ValueError, r"real must be \[samples, features\], got \[4, 5, 2\]"),
        ({"fake": np.ones((0, 5))}, ValueError, r"fake must be \[samples, features\], got \[0, 5\]"),
        ({"fake": np.ones((4, 3))}, ValueError, "fake must have 5 features a sample, got 3"),
        ({"real": np.full((4, 5), np.nan)}, ValueError, "real has 20 NaN or infinite values"),
        ({"fake": np.full((4, 5), np.inf)}, ValueError, "fake has 20 NaN or infinite values"),
    ],
)
def test_bad_input_is_named(change, error, words):
    real, fake = problem(0)
    with pytest.raises(error, match=words):
        rx.refinement_certificate(**{"real": real, "fake": fake, **change})
