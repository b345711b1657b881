"""fit_diffusion_discriminator: known ratios at every noise level, the guard, determinism, files, bad input."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
import torch
from fitting import gaussians, one_thread  # noqa: F401
from torch import nn

from refine_ext import DiffusionDiscriminator, Guide, VPSchedule, fit_diffusion_discriminator
from refine_ext.overfit_guard import choose_temperature, refinement_gain
from refine_ext.time_networks import NoisyStandardise, TimeConvNet, TimeMLP


def fit(real, fake, **options):
    return fit_diffusion_discriminator(real, fake, **{"progress": False, "max_epochs": 30, **options})


def images(n: int, seed: int = 0):
    """8 x 8 images of one brightness each, real ones brighter."""
    generator = torch.Generator().manual_seed(seed)
    fake = torch.randn(n, 1, 1, 1, generator=generator).expand(n, 1, 8, 8)
    return fake + 0.5, fake


def truth(x: torch.Tensor, sigma: float, shift: float = 0.8) -> torch.Tensor:
    """log N(x; shift e_1, 1 + sigma^2) / N(x; 0, 1 + sigma^2)."""
    return (shift * x[:, 0] - 0.5 * shift**2) / (1 + sigma**2)


CASES = ["logistic kl", "tight kl", "tight jensen_shannon"]


@pytest.fixture(scope="module")
def fitted(one_thread):  # noqa: F811
    @functools.cache
    def discriminator(case: str) -> DiffusionDiscriminator:
        objective, divergence = case.split()
        return fit(*gaussians(2000), objective=objective, divergence=divergence, sigma_max=8.0, max_epochs=25)

    return discriminator


@pytest.mark.parametrize("case", CASES)
def test_the_ratio_is_learned_at_every_level(fitted, case):
    disc = fitted(case)
    new_real, new_fake = gaussians(2000, seed=7)
    generator = torch.Generator().manual_seed(0)
    for sigma in (0.05, 0.7, 3.0):
        x = torch.cat([new_real, new_fake])
        x = x + sigma * torch.randn(x.shape, generator=generator)
        levels = torch.full((len(x),), sigma)
        with torch.no_grad():
            full = disc.log_ratio(disc.output(x, levels), levels)
            tempered = disc(x, levels)
        exact = truth(x, sigma)
        # What the fit adds to this linear function is the noise of 1500 samples, measured at up to 0.4 of its spread.
        assert float((full - exact).std()) < 0.5 * float(exact.std())
        assert np.corrcoef(exact, full)[0, 1] > 0.9
        torch.testing.assert_close(tempered, (disc._at(disc.temperature, levels) * full).float())
        # The refined model is normalised at every level: the shift was solved on 250 other samples.
        assert float(full[2000:].double().exp().mean()) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("case", CASES)
def test_it_guides_towards_the_real_samples(fitted, case):
    """The gradient that a Guide takes is the score's difference, shift / (1 + sigma^2) along e_1, tempered."""
    disc = fitted(case)
    guide = Guide(disc)
    assert (guide.kind, guide.sigma_min, guide.sigma_max) == ("logit", disc.sigma_min, 8.0)
    x = gaussians(500, seed=3)[1]
    for sigma in (0.1, 1.0):
        output = guide(x, sigma)
        scale = guide.factor(output.h, sigma)
        assert scale.tolist() == [1.0] * 500
        mean = output.gradient.mean(0) / disc._at(disc.temperature, torch.tensor([sigma]))
        assert float(mean[0]) == pytest.approx(0.8 / (1 + sigma**2), rel=0.25)
        assert abs(float(mean[1])) < 0.17  # four standard errors of a slope fitted to 2 x 1500 samples
    assert guide.factor(output.h, 9.0).tolist() == [0.0] * 500
    # Samplers carry float64 states; the network keeps its float32.
    h = disc(x.double(), torch.ones(500, dtype=torch.float64))
    torch.testing.assert_close(h, output.h, atol=1e-5, rtol=1e-4)


def test_equal_samples_get_no_guidance():
    real, fake = gaussians(600, shift=0.0)
    disc = fit(real, fake, caution=2.0)
    assert float(disc.temperature.max()) == 0.0
    assert "nothing to gain" in disc.report.verdict
    with torch.no_grad():
        assert float(disc(real, torch.full((600,), 0.3)).abs().max()) == 0.0


def test_the_guard_weakens_a_discriminator_that_learned_noise():
    """40 samples in 20 dimensions, no regularisation, and no early stop: told apart in training only."""
    real, fake = gaussians(60, shift=0.5, width=20)
    disc = fit(real, fake, max_epochs=100, patience=100, dropout=0.0, weight_decay=0.0, validation_fraction=0.5)
    assert disc.report.gain >= disc.report.gain_full
    used = [row for row in disc.report.levels if row["temperature"] > 0]
    assert len(used) < len(disc.report.levels)


def test_report_and_temperatures_are_the_heldout_measurements():
    real, fake = gaussians(800)
    report = fit(real, fake, sigma_min=0.1, sigma_max=10.0).report
    sigmas = [row["sigma"] for row in report.levels]
    np.testing.assert_allclose(sigmas, np.geomspace(0.1, 10.0, 16))
    assert report.real_samples == {"train": 600, "stop": 100, "calibrate": 100}
    # The noise hides the difference: 0.8 apart at sigma = 0.1, 0.08 standard deviations at 10.
    assert report.levels[0]["auc"] > 0.6 > report.levels[-1]["auc"]
    assert report.levels[0]["gain_full"] > 0.1 > abs(report.levels[-1]["gain_full"])
    assert json.loads(json.dumps(report.to_dict()))["verdict"] == report.verdict


def test_gain_over_levels_is_the_mean_of_the_gains_with_clustered_errors():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(3, 200, generator=generator, dtype=torch.float64) + 0.3
    fake = torch.randn(3, 150, generator=generator, dtype=torch.float64)
    gains = [refinement_gain(a, b, 0.7) for a, b in zip(real, fake, strict=True)]
    gain, error = refinement_gain(real, fake, 0.7)
    assert gain == pytest.approx(np.mean([g for g, _ in gains]), rel=1e-12)
    # Independent levels: errors add in quadrature, up to what 200 samples know of a variance.
    assert error == pytest.approx(math.sqrt(sum(e**2 for _, e in gains)) / 3, rel=0.15)
    # The same level three times says no more than once.
    once, thrice = refinement_gain(real[0], fake[0]), refinement_gain(real[:1].repeat(3, 1), fake[:1].repeat(3, 1))
    assert thrice == pytest.approx(once, rel=1e-12)
    assert choose_temperature(real, fake) > 0


def test_images_and_classes():
    real, fake = images(300)
    labels = torch.arange(300) % 3
    disc = fit(
        real + 0.2 * labels.reshape(-1, 1, 1, 1),
        fake,
        real_labels=labels,
        fake_labels=labels,
        channels=8,
        max_epochs=6,
        learning_rate=3e-3,
        sigma_max=3.0,
    )
    assert isinstance(disc.network, TimeConvNet)
    assert disc.architecture.classes == 3
    x, sigma = torch.zeros(3, 1, 8, 8), torch.full((3,), 0.2)
    by_class = disc.output(x, sigma, class_labels=torch.arange(3))
    assert len(set(by_class.tolist())) == 3
    torch.testing.assert_close(by_class, disc.output(x, sigma, class_labels=torch.eye(3)))
    with pytest.raises(ValueError, match="class_labels must be as trained, with them"):
        disc(x, sigma)
    bright = torch.stack([torch.full((1, 8, 8), v) for v in (-1.0, 1.5)])
    low, high = disc.output(bright, sigma[:2], class_labels=torch.tensor([1, 1])).tolist()
    assert high > low


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 12), (2, 64, 64)])
def test_the_convolutional_network_takes_sizes_from_8_to_64(shape):
    network = TimeConvNet(shape, 8)
    assert network(torch.randn(2, *shape), torch.tensor([0.1, 5.0])).shape == (2,)
    assert network.last[-1].in_features <= 16 * 32


def test_networks_see_unit_variance_at_every_level():
    generator = torch.Generator().manual_seed(0)
    x = 3.0 + torch.randn(4000, 2, generator=generator) * torch.tensor([2.0, 0.5])
    scale = NoisyStandardise((2,))
    scale.fit([x, x])
    for level in (0.01, 1.0, 50.0):
        noisy = x + level * torch.randn(x.shape, generator=generator)
        z, gain = scale(noisy, torch.full((4000,), level))
        torch.testing.assert_close(z.std(0), torch.ones(2), atol=0.05, rtol=0)
        assert float(gain[0]) == pytest.approx(1 / math.sqrt(1 + level**2 / 2.125), rel=0.05)


class Plain(nn.Module):
    """A caller's network; remembers the inputs it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 1)
        self.__dict__["seen"] = []

    def forward(self, x, time):
        self.seen.append((x.detach(), time.detach()))
        return self.last(x)


def test_a_network_in_the_space_of_a_vp_diffusion():
    real, fake = gaussians(200)
    schedule = VPSchedule()
    disc = fit(real, fake, model=Plain(), schedule=schedule, max_epochs=3, dropout=0.0)
    assert disc.sigma_min == pytest.approx(float(schedule.sigma(torch.tensor(0.01, dtype=torch.float64))))
    assert disc.sigma_max == pytest.approx(math.sqrt(math.expm1(10.05)), rel=1e-6)
    disc.network.__dict__["seen"] = []
    x, sigma = torch.randn(4, 2), torch.tensor([0.1, 1.0, 5.0, 50.0])
    disc(x, sigma)
    state, time = disc.network.seen[0]
    torch.testing.assert_close(state, x / torch.sqrt(1 + sigma**2)[:, None])
    torch.testing.assert_close(0.5 * (0.1 * time + 9.95 * time**2), 0.5 * torch.log1p(sigma**2), rtol=1e-4, atol=1e-6)


def test_equal_seeds_give_equal_bits_and_leave_the_generators():
    real, fake = gaussians(200)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (fit(real, fake, max_epochs=4, seed=s) for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    sigma = torch.full((200,), 0.3)
    assert not torch.equal(one(real, sigma), other(real, sigma))


@pytest.mark.parametrize("kind", ["mlp", "convolutional", "own"])
def test_files_bring_back_equal_bits(tmp_path, kind):
    real, fake = images(60) if kind == "convolutional" else gaussians(60)
    model = Plain() if kind == "own" else None
    options = {"objective": "tight", "divergence": "jensen_shannon"} if kind == "mlp" else {}
    if kind == "own":
        options["schedule"] = VPSchedule(0.2, 15.0)
    disc = fit(real, fake, model=model, channels=8, max_epochs=2, **options)
    path = tmp_path / "disc.safetensors"
    disc.save(path)
    loaded = DiffusionDiscriminator.load(path, model=Plain() if kind == "own" else None)
    sigma = torch.full((len(real),), 0.4)
    assert torch.equal(disc(real, sigma), loaded(real, sigma))
    assert loaded.calibration == disc.calibration
    assert loaded.report.to_dict() == disc.report.to_dict()
    if kind == "own":
        with pytest.raises(ValueError, match=r"module of your own \(Plain\)"):
            DiffusionDiscriminator.load(path)
        with pytest.raises(ValueError, match=r"DiffusionDiscriminator.load: the weights of .* do not fit"):
            DiffusionDiscriminator.load(path, model=nn.Linear(3, 1))


def test_foreign_files_are_named(tmp_path):
    pickle = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(2)}, pickle)
    with pytest.raises(ValueError, match=r"DiffusionDiscriminator.load: .* zip archive .* can run code"):
        DiffusionDiscriminator.load(pickle)
    with pytest.raises(FileNotFoundError):
        DiffusionDiscriminator.load(tmp_path / "none")
    import refine_ext as rx

    rx.fit_discriminator(*gaussians(40), max_epochs=1, progress=False).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"not one written by DiffusionDiscriminator\.save"):
        DiffusionDiscriminator.load(tmp_path / "other.safetensors")


def test_a_guided_step_compiles_whole():
    disc = fit(*gaussians(100), max_epochs=2)
    disc.temperature.fill_(1.0)
    guide = Guide(disc)

    def step(x, sigma):
        output = guide(x, sigma)
        return output.h, output.gradient

    x, sigma = torch.randn(5, 2), torch.full((5,), 0.5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(x, sigma), step(x, sigma), strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-6, rtol=1e-5)


GOOD = gaussians(50)


@pytest.mark.parametrize(
    ("real", "fake", "options", "error", "words"),
    [
        (torch.zeros(0, 2), GOOD[1], {}, ValueError, "real is empty"),
        (GOOD[0], torch.zeros(50, 3), {}, ValueError, r"\[2\] and \[3\] per sample"),
        (GOOD[0], GOOD[1].index_fill(0, torch.tensor([3]), math.nan), {}, ValueError, "fake has 2 NaN"),
        (*GOOD, {"sigma_min": 0.0}, ValueError, r"sigma_min must be in \(0, inf\), got 0"),
        (*GOOD, {"sigma_min": 2.0, "sigma_max": 1.0}, ValueError, "sigma_min must be below sigma_max, got 2 and 1"),
        (*GOOD, {"sigma_max": math.inf}, ValueError, r"sigma_max must be in \(0, inf\)"),
        (*GOOD, {"sigma_max": "high"}, TypeError, "sigma_max must be a number, got str"),
        (*GOOD, {"schedule": "vp"}, TypeError, "schedule must be a VPSchedule or None, got str"),
        (*GOOD, {"model": "mlp"}, TypeError, "model must be a torch.nn.Module or None, got str"),
        (*GOOD, {"model": nn.Flatten()}, ValueError, "no parameter"),
        (*GOOD, {"objective": "hinge"}, ValueError, "tight, loose, logistic, got 'hinge'"),
        (*GOOD, {"divergence": "tv"}, ValueError, "divergence must be one of"),
        (*GOOD, {"real_labels": torch.zeros(50).long()}, ValueError, "fake_labels is missing"),
        (*GOOD, {"real_labels": torch.zeros(49).long(), "fake_labels": torch.zeros(50).long()}, ValueError,
         r"real_labels must be \[50\] class numbers .* got \[49\]"),
        (*GOOD, {"real_labels": torch.zeros(50), "fake_labels": torch.zeros(50)}, ValueError, "class numbers from 0"),
        (*GOOD, {"real_labels": torch.eye(50), "fake_labels": torch.zeros(50).long()}, ValueError, "of one kind"),
        (*GOOD, {"real_labels": "abc", "fake_labels": "abc"}, TypeError, "real_labels must be an array"),
        (*GOOD, {"max_epochs": 0}, ValueError, "max_epochs must be in"),
        (*GOOD, {"hidden": (0,)}, ValueError, "hidden must hold positive integers"),
        (*images(20), {"channels": 12}, ValueError, "channels must be a multiple of 8, got 12"),
        (*GOOD, {"seed": 0.5}, TypeError, "seed must be an integer"),
        (*GOOD, {"learning_rate": 1e30}, ValueError, "lower learning_rate"),
        (*GOOD, {"validation_fraction": 0.99}, ValueError, "leaves 0 to train on"),
    ],
)  # fmt: skip
def test_bad_input_is_named_in_one_line(real, fake, options, error, words):
    with pytest.raises(error, match=words) as caught:
        fit(real, fake, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("fit_diffusion_discriminator: ")


def test_wrong_states_and_models_are_named():
    disc = fit(*GOOD, max_epochs=1)
    assert isinstance(disc.network, TimeMLP)
    with pytest.raises(ValueError, match=r"x must be \[B, 2\] as trained, got \[4, 3\]"):
        disc(torch.zeros(4, 3), torch.ones(4))

    class Wide(Plain):
        def forward(self, x, time):
            return self.last(x).expand(-1, 3)

    with pytest.raises(ValueError, match=r"model must return \[\d+\]"):
        fit(*GOOD, model=Wide(), max_epochs=1)
