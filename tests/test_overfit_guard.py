"""The temperature, the held-out gain, and the verdict on hopeless cases."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from fitting import fit, gaussians, one_thread  # noqa: F401
from torch import nn

from refine_ext.discriminator import Discriminator
from refine_ext.overfit_guard import auc, choose_temperature, judge, refinement_gain


def overtrained(seed: int) -> Discriminator:
    real, fake = gaussians(90, shift=0.5, width=20, seed=seed)
    return fit(
        real,
        fake,
        patience=10**6,
        max_epochs=60,
        dropout=0.0,
        weight_decay=0.0,
        seed=seed,
        caution=1.0,
        model=Memoriser(),
    )


class Memoriser(nn.Module):
    """A network whose held-out objective cannot stop it: it steps far in its first epoch."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(20, 400)
        self.last = nn.Linear(400, 1)
        for layer in (self.first, self.last):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def test_guard_turns_a_loss_into_no_loss():
    """Overtrained discriminators make refinement worse than none; guarded ones do not."""
    full, guarded = [], []
    for seed in range(4):
        report = overtrained(seed).report
        full.append(report.gain_full)
        guarded.append(report.gain)
        assert report.gain >= 0.0
        assert report.temperature < 1.0
    assert max(full) < 0.0
    assert min(guarded) >= 0.0


def test_guarded_refinement_is_no_worse_on_fresh_data():
    """The temperature was chosen on the calibration part; judge it on data nobody saw."""
    gains = []
    for seed in range(4):
        disc = overtrained(seed)
        real, fake = gaussians(3000, shift=0.5, width=20, seed=100 + seed)
        gains.append(refinement_gain(disc.log_ratio(real), disc.log_ratio(fake))[0])
        disc.temperature = 1.0
        full = refinement_gain(disc.log_ratio(real), disc.log_ratio(fake))[0]
        assert full < -0.5
    assert np.mean(gains) > -0.01 and min(gains) > -0.05


def test_temperature_zero_is_the_unrefined_model():
    real, fake = gaussians(200)
    disc = fit(real, fake)
    disc.temperature = 0.0
    assert torch.equal(disc.log_ratio(fake), torch.zeros(200))
    with pytest.raises(ValueError, match=r"temperature must be in \[0, 1\], got 1.5"):
        disc.temperature = 1.5


def test_equal_distributions_have_nothing_to_gain():
    temperatures = []
    for seed in range(3):
        real, fake = gaussians(400, shift=0.0, seed=seed)
        report = fit(real, fake, seed=seed).report
        assert report.refinable
        assert report.gain < 0.05
        temperatures.append(report.temperature)
        if report.temperature == 0.0:
            assert "nothing to gain" in report.verdict
    assert 0.0 in temperatures


def test_gain_is_zero_at_zero_concave_and_has_the_right_error():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(500, generator=generator, dtype=torch.float64) + 0.5
    fake = torch.randn(700, generator=generator, dtype=torch.float64) - 0.5
    taus = np.linspace(0, 1, 21)
    gains = np.array([refinement_gain(real, fake, t)[0] for t in taus])
    assert gains[0] == 0.0
    assert (np.diff(gains, 2) < 1e-12).all()
    expected = 0.7 * float(real.mean()) - math.log(float(torch.exp(0.7 * fake).mean()))
    assert refinement_gain(real, fake, 0.7)[0] == pytest.approx(expected, abs=1e-12)
    # The stated standard error against the spread over fresh draws.
    draws = []
    for _ in range(300):
        a = torch.randn(500, generator=generator, dtype=torch.float64) + 0.5
        b = torch.randn(700, generator=generator, dtype=torch.float64) - 0.5
        draws.append(refinement_gain(a, b, 0.7)[0])
    assert refinement_gain(real, fake, 0.7)[1] == pytest.approx(np.std(draws), rel=0.2)


def test_temperature_is_cautious():
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(200, generator=generator) + 0.6
    fake = torch.randn(200, generator=generator)
    chosen = [choose_temperature(real, fake, caution=c) for c in (0.0, 1.0, 3.0, 30.0)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > chosen[1] > 0.0 == chosen[3]


def test_auc_against_the_pair_count():
    generator = torch.Generator().manual_seed(2)
    real = torch.randint(0, 6, (40,), generator=generator).double()
    fake = torch.randint(0, 5, (30,), generator=generator).double()
    weights = torch.rand(30, generator=generator, dtype=torch.float64)
    pairs = (real[:, None] > fake).double() + 0.5 * (real[:, None] == fake)
    assert auc(real, fake) == pytest.approx(float(pairs.mean()), abs=1e-12)
    expected = float((pairs * weights).sum() / (len(real) * weights.sum()))
    assert auc(real, fake, weights) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("objective", ["tight", "logistic"])
@pytest.mark.parametrize("model", ["mlp", "linear"])
def test_disjoint_supports_are_reported_in_words(objective, model):
    """Pictures whose background is exactly 0, against ones with faint noise everywhere."""
    generator = torch.Generator().manual_seed(0)

    def pictures(n):
        ink = torch.rand(n, 16, generator=generator)
        return ink * (torch.rand(n, 16, generator=generator) < 0.3)

    real, fake = pictures(1000), pictures(1000)
    fake = fake + 0.15 + 0.1 * torch.rand(1000, 16, generator=generator)
    report = fit(real, fake, objective=objective, model=model).report
    assert not report.refinable
    assert report.auc > 0.95
    assert "reweighting cannot help" in report.verdict
    assert "latent refinement or guidance" in report.verdict


@pytest.mark.parametrize(
    ("change", "refinable", "words"),
    [
        ({}, True, "gains 0.200"),
        ({"khat": 0.9}, True, "k-hat 0.90 > 0.7"),
        ({"khat": math.nan}, True, "gains 0.200"),
        ({"auc_reweighted": 0.99}, False, "never hit the data's support"),
        ({"ess": 2.0, "khat": 1.2}, False, "collapse to 2.0 .* k-hat 1.20"),
        ({"temperature": 0.0}, True, "nothing to gain"),
        ({"temperature": 0.0, "auc": 0.97}, False, "no temperature gives weights"),
    ],
)
def test_verdicts(change, refinable, words):
    measured = {
        "temperature": 0.8,
        "gain": 0.2,
        "gain_stderr": 0.05,
        "gain_full": 0.1,
        "auc": 0.7,
        "auc_reweighted": 0.5,
        "ess": 80.0,
        "fakes": 100,
        "khat": 0.3,
    }
    answer, verdict = judge(**{**measured, **change})
    assert answer is refinable
    assert re.search(words, verdict)
    assert answer or "latent refinement or guidance" in verdict


def test_training_stops_once_told_apart_for_good():
    """The bound of separated samples grows with every epoch; patience still ends it."""
    real, fake = gaussians(200)
    report = fit(real, fake + 50.0, max_epochs=500, patience=5).report
    assert report.epochs < 50
    assert report.auc == 1.0 and not report.refinable


def test_rare_overlap_is_refinable():
    """One generated sample in ten is good: AUC is high, and reweighting still works."""
    real, _ = gaussians(1500, shift=0.0)
    good, bad = gaussians(3000, shift=0.0, seed=5)
    bad[300:] += 8.0
    fake = torch.cat([good[:300], bad[300:]])
    report = fit(real, fake).report
    assert report.auc > 0.9
    assert report.auc_reweighted < 0.7
    assert report.refinable
    assert report.gain == pytest.approx(math.log(10), abs=0.4)
