"""fit_discriminator: known ratios, determinism, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fitting import Small, fit, gaussians, one_thread  # noqa: F401
from torch import nn

from refine_ext.fit import fit_discriminator
from refine_ext.overfit_guard import refinement_gain

CASES = [
    ("mlp", "tight", "kl"),
    ("mlp", "logistic", "kl"),
    ("mlp", "loose", "kl"),
    ("mlp", "loose", "jensen_shannon"),
    ("mlp", "tight", "squared_hellinger"),
    ("mlp", "tight", "pearson_chi2"),
    ("linear", "tight", "kl"),
    ("linear", "logistic", "kl"),
    ("linear", "tight", "jensen_shannon"),
    ("linear", "tight", "alpha:0.5"),
]


@pytest.mark.parametrize(("model", "objective", "divergence"), CASES)
def test_gaussian_log_ratio_is_learned(model, objective, divergence):
    real, fake = gaussians(2000)
    features = 64 if model == "linear" else 512
    disc = fit(real, fake, model=model, objective=objective, divergence=divergence, features=features)
    x_real, x_fake = gaussians(4000, seed=1)
    disc.temperature = 1.0
    x = torch.cat([x_real, x_fake])
    truth = 0.8 * x[:, 0] - 0.32
    learned = disc.log_ratio(x)
    assert np.corrcoef(truth, learned)[0, 1] > 0.9
    assert float((learned - truth).square().mean().sqrt()) < 0.4
    # E_P log r <= KL(P || Q) = 0.32 nats for any normalised r, and close to it for a good one.
    gain, error = refinement_gain(learned[:4000], learned[4000:])
    assert 0.32 - 0.1 < gain < 0.32 + 3 * error


def test_heldout_bound_stays_below_the_true_divergence():
    """Held-out samples make the tight objective an unbiased-to-first-order lower bound."""
    real, fake = gaussians(2000, seed=3)
    report = fit(real, fake).report
    assert report.heldout_bound <= 0.32 + 3 * report.gain_full_stderr
    assert report.heldout_bound == pytest.approx(report.gain_full, abs=0.02)
    assert report.refinable and "nats" in report.verdict
    assert report.real_samples == {"train": 1500, "stop": 250, "calibrate": 250}


def test_weights_average_one_over_new_generated_samples():
    real, fake = gaussians(4000)
    disc = fit(real, fake)
    _, fresh = gaussians(4000, seed=9)
    for temperature in (disc.temperature, 0.5, 1.0):
        disc.temperature = temperature
        assert float(disc.log_ratio(fresh).double().exp().mean()) == pytest.approx(1.0, abs=0.15)


def test_linear_solution_is_certified_and_inside_its_ball():
    real, fake = gaussians(300)
    disc = fit(real, fake, model="linear", norm_bound=2.0, features=64)
    solver = disc.report.solver
    assert solver["converged"] and 0.0 <= solver["gap"] <= 1e-7
    assert solver["norm_bound"] == 2.0
    assert float(disc.network.weight.norm()) == pytest.approx(2.0, rel=1e-9)


def test_caller_features_and_module():
    real, fake = gaussians(600)
    disc = fit(real, fake, model="linear", features=lambda x: x.numpy() ** 2)
    assert disc.architecture.given_features and disc.network.weight.shape == (2,)
    real, fake = gaussians(600, width=6)
    module = Small()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    disc = fit(real.reshape(-1, 2, 3), fake.reshape(-1, 2, 3), model=module, weight_decay=0.0)
    assert disc.log_ratio(real[:5].reshape(-1, 2, 3)).shape == (5,)
    assert disc.report.gain > 0.1
    # A copy was trained.
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("model", ["mlp", "linear", "own"])
def test_equal_seeds_give_equal_bits(model):
    real, fake = gaussians(200, width=6)
    if model == "own":
        real, fake = real.reshape(-1, 2, 3), fake.reshape(-1, 2, 3)
        chosen = Small()
    else:
        chosen = model
    one, two, other = (fit(real, fake, model=chosen, max_epochs=5, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert one.calibration == two.calibration
    assert not torch.equal(one(real), other(real))


@pytest.mark.parametrize("model", ["mlp", "linear"])
def test_global_generators_and_inputs_are_untouched(model):
    real, fake = gaussians(100)
    copies = real.clone(), fake.clone()
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 (the legacy global state is what is checked)
    before = torch.get_rng_state()
    legacy = np.random.get_state()[1].copy()  # noqa: NPY002
    disc = fit(real, fake, model=model, max_epochs=3)
    disc.log_ratio(real)
    assert torch.equal(before, torch.get_rng_state())
    assert (legacy == np.random.get_state()[1]).all()  # noqa: NPY002
    assert torch.equal(copies[0], real) and torch.equal(copies[1], fake)


GOOD = gaussians(50)


def spoiled(value: float, count: int) -> torch.Tensor:
    x = GOOD[0].clone()
    x.view(-1)[:count] = value
    return x


@pytest.mark.parametrize(
    ("real", "fake", "options", "error", "words"),
    [
        (torch.zeros(0, 2), GOOD[1], {}, ValueError, "real is empty"),
        (GOOD[0], torch.zeros(50, 0), {}, ValueError, "fake is empty"),
        (GOOD[0][:9], GOOD[1], {}, ValueError, "real has 9 samples, at least 10"),
        (spoiled(float("nan"), 3), GOOD[1], {}, ValueError, "real has 3 NaN or infinite .* of 100"),
        (GOOD[1], spoiled(float("inf"), 1), {}, ValueError, "fake has 1 NaN or infinite"),
        (GOOD[0], torch.zeros(50, 3), {}, ValueError, r"\[2\] and \[3\] per sample"),
        (torch.ones(50, 2), torch.ones(50, 2), {}, ValueError, "constant"),
        (GOOD[0].long(), GOOD[1], {}, TypeError, "real must be floating or uint8.*int64"),
        (GOOD[0], GOOD[1].numpy().astype(complex), {}, TypeError, "fake .* complex128"),
        (GOOD[0].tolist(), GOOD[1], {}, TypeError, "NumPy array or a torch tensor, got list"),
        (torch.tensor(1.0), GOOD[1], {}, ValueError, "0-dim"),
        (*GOOD, {"model": "forest"}, ValueError, "'mlp', 'linear' or a torch.nn.Module"),
        (*GOOD, {"model": 3}, TypeError, "got int"),
        (
            *GOOD,
            {"divergence": "wasserstein"},
            ValueError,
            "divergence must be one of .*'wasserstein'",
        ),
        (*GOOD, {"divergence": 2}, TypeError, "divergence must be a string"),
        (*GOOD, {"objective": "hinge"}, ValueError, "tight, loose, logistic, got 'hinge'"),
        (*GOOD, {"validation_fraction": 1.0}, ValueError, r"validation_fraction must be in \(0, 1"),
        (*GOOD, {"validation_fraction": 0.99}, ValueError, "leaves 0 to train on"),
        (*GOOD, {"max_epochs": 0}, ValueError, "max_epochs must be in"),
        (*GOOD, {"learning_rate": -1.0}, ValueError, "learning_rate must be in"),
        (*GOOD, {"dropout": 1.0}, ValueError, "dropout must be in"),
        (*GOOD, {"batch_size": "big"}, TypeError, "batch_size must be a number, got str"),
        (*GOOD, {"seed": 0.5}, TypeError, "seed must be an integer"),
        (*GOOD, {"features": 7, "model": "linear"}, ValueError, "features must be even"),
        (*GOOD, {"norm_bound": 0.0}, ValueError, "norm_bound must be in"),
        (*GOOD, {"hidden": (0,)}, ValueError, "hidden must hold positive integers"),
        (*GOOD, {"learning_rate": 1e30}, ValueError, "lower learning_rate"),
    ],
)
def test_bad_input_is_named_in_one_line(real, fake, options, error, words):
    with pytest.raises(error, match=words) as caught:
        fit(real, fake, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("fit_discriminator: ")


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.level.expand(len(x))


def test_bad_models_and_features_are_named():
    with pytest.raises(ValueError, match="output is constant"):
        fit(*GOOD, model=Flat(), max_epochs=2)
    with pytest.raises(ValueError, match=r"model must return \[\d+\]"):
        fit(*GOOD, model=nn.Linear(2, 3), max_epochs=2)
    with pytest.raises(ValueError, match="no parameter"):
        fit(*GOOD, model=nn.Flatten())
    with pytest.raises(ValueError, match="features must map a batch"):
        fit(*GOOD, model="linear", features=lambda x: x.sum())
    with pytest.raises(ValueError, match="features has 2 NaN or infinite"):
        fit(
            torch.cat([GOOD[0][:49], torch.full((1, 2), 1e30)]),
            GOOD[1],
            model="linear",
            features=lambda x: torch.where(x > 1e29, math.inf, x),
            seed=2,
        )
    with pytest.raises(ValueError, match="features are constant"):
        fit(*GOOD, model="linear", features=torch.ones_like)
    with pytest.raises(ValueError, match=r"x must be \[n, 2\] as trained, got \[4, 3\]"):
        fit(*GOOD, max_epochs=1).log_ratio(torch.zeros(4, 3))


def test_progress_can_be_turned_off(capsys):
    fit_discriminator(*GOOD, max_epochs=2, progress=False)
    assert capsys.readouterr().err == ""
    fit_discriminator(*GOOD, max_epochs=2, progress=True)
    assert "discriminator" in capsys.readouterr().err
