"""fit_discriminator and Discriminator: known ratios, the overfit guard, files, bad input."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from refine_ext.discriminator import Discriminator
from refine_ext.fit import fit_discriminator
from refine_ext.overfit_guard import auc, choose_temperature, refinement_gain


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small problems: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussians(n: int, *, shift: float = 0.8, width: int = 2, seed: int = 0):
    """Real N(shift e_1, I), generated N(0, I): log r(x) = shift x_1 - shift^2 / 2."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(n, width, generator=generator)
    real[:, 0] += shift
    fake = torch.randn(n, width, generator=generator)
    return real, fake


def fit(real, fake, **options):
    return fit_discriminator(real, fake, **{"progress": False, "max_epochs": 40, **options})


class Small(nn.Module):
    """A caller's own network, with dropout, for images of 2 x 3."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1)
        )

    def forward(self, x):
        return self.layers(x)


# --- the learned ratio -------------------------------------------------------------------------

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
    disc = fit(
        real, fake, model=model, objective=objective, divergence=divergence, features=features
    )
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


# --- the overfit guard -------------------------------------------------------------------------


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


# --- hopeless cases ----------------------------------------------------------------------------


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


# --- determinism -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "linear", "own"])
def test_equal_seeds_give_equal_bits(model):
    real, fake = gaussians(200, width=6)
    if model == "own":
        real, fake = real.reshape(-1, 2, 3), fake.reshape(-1, 2, 3)
        chosen = Small()
    else:
        chosen = model
    one, two, other = (fit(real, fake, model=chosen, max_epochs=5, seed=s) for s in (3, 3, 4))
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )
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


# --- scoring -----------------------------------------------------------------------------------


def test_log_ratio_does_not_depend_on_batches_or_container():
    real, fake = gaussians(300)
    disc = fit(real, fake, model="linear", features=32)
    whole = disc.log_ratio(fake)
    torch.testing.assert_close(disc.log_ratio(fake, batch_size=7), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(disc.log_ratio(fake.numpy()), whole, rtol=1e-12, atol=1e-12)
    assert disc.log_ratio(fake[:0]).shape == (0,)


def test_memory_map_is_scored(tmp_path):
    real, fake = gaussians(300)
    disc = fit(real, fake, max_epochs=5)
    np.save(tmp_path / "x.npy", fake.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    torch.testing.assert_close(disc.log_ratio(mapped, batch_size=50), disc.log_ratio(fake))


def test_nan_sample_gives_nan_for_itself_only():
    real, fake = gaussians(200)
    disc = fit(real, fake, max_epochs=5)
    x = fake[:4].clone()
    x[2, 0] = float("nan")
    for temperature in (1.0, 0.0):
        disc.temperature = temperature
        assert torch.isnan(disc.log_ratio(x)).tolist() == [False, False, True, False]


def test_gradient_reaches_the_sample():
    """d log r_tau / dx = tau * 0.8 e_1 for the Gaussian pair; the learned one points that way."""
    real, fake = gaussians(2000)
    disc = fit(real, fake)
    x = fake[:500].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(disc.log_ratio(x).sum(), x)
    mean = gradient.mean(0) / disc.temperature
    assert float(mean[0]) == pytest.approx(0.8, abs=0.3)
    assert abs(float(mean[1])) < 0.2


def test_large_offsets_and_uint8_are_standardised():
    real, fake = gaussians(600)
    plain = fit(real.double(), fake.double(), max_epochs=5)
    moved = fit(real.double() + 1e7, fake.double() + 1e7, max_epochs=5)
    assert moved.report.gain == pytest.approx(plain.report.gain, abs=1e-3)
    bytes_real = (real * 20 + 100).clamp(0, 255).to(torch.uint8)
    bytes_fake = (fake * 20 + 100).clamp(0, 255).to(torch.uint8)
    assert fit(bytes_real, bytes_fake.numpy()).report.gain > 0.15


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "linear", "own", "features"])
def test_saved_and_loaded_outputs_are_bit_equal(model, tmp_path):
    real, fake = gaussians(200, width=6)
    options, again = {"model": model}, {}
    if model == "own":
        real, fake = real.reshape(-1, 2, 3), fake.reshape(-1, 2, 3)
        options, again = {"model": Small()}, {"model": Small()}
    if model == "features":
        options, again = {"model": "linear", "features": torch.tanh}, {"features": torch.tanh}
    disc = fit(real, fake, max_epochs=5, divergence="jensen_shannon", **options)
    disc.save(tmp_path / "d.safetensors")
    loaded = Discriminator.load(tmp_path / "d.safetensors", **again)
    assert torch.equal(loaded(real), disc(real))
    assert torch.equal(loaded.log_ratio(real), disc.log_ratio(real))
    assert loaded.calibration == disc.calibration
    assert loaded.report.to_dict() == disc.report.to_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]
    if again:
        with pytest.raises(ValueError, match="of your own"):
            Discriminator.load(tmp_path / "d.safetensors")


def test_report_is_json():
    real, fake = gaussians(100)
    report = fit(real, fake, max_epochs=2).report
    again = type(report).from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert again.to_dict() == report.to_dict()
    assert (again.gain, again.shape, again.verdict) == (report.gain, report.shape, report.verdict)


def write_pickle(path, disc):
    path.write_bytes(pickle.dumps({"weights": [1.0]}))


def write_torch(path, disc):
    torch.save(disc.state_dict(), path)


def write_numpy(path, disc):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def write_truncated(path, disc):
    disc.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def write_header_only(path, disc):
    disc.save(path)
    path.write_bytes(path.read_bytes()[:20])


def write_empty(path, disc):
    path.write_bytes(b"")


def write_text(path, disc):
    path.write_text("not a model at all, but a text")


def write_foreign(path, disc):
    save_file({"x": torch.zeros(2)}, path)


def write_damaged(path, disc):
    from safetensors import safe_open

    disc.save(path)
    with safe_open(str(path), "pt") as file:
        metadata = {**file.metadata(), "calibration": "{}"}
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (write_pickle, "a Python pickle, refused"),
        (write_torch, "zip archive .* refused"),
        (write_numpy, "NumPy .npy file"),
        (write_truncated, "truncated or not a safetensors file"),
        (write_header_only, "truncated or not a safetensors file"),
        (write_empty, r"\(0 bytes\) is truncated"),
        (write_text, "not a safetensors file"),
        (write_foreign, "not one written by Discriminator.save"),
        (write_damaged, "damaged configuration"),
    ],
)
def test_other_files_are_refused_in_one_line(write, words, tmp_path):
    real, fake = gaussians(60)
    path = tmp_path / "file"
    write(path, fit(real, fake, max_epochs=1))
    with pytest.raises(ValueError, match=words) as error:
        Discriminator.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_wrong_module_and_missing_file(tmp_path):
    real, fake = gaussians(100, width=6)
    disc = fit(real.reshape(-1, 2, 3), fake.reshape(-1, 2, 3), model=Small(), max_epochs=1)
    disc.save(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="do not fit the model") as error:
        Discriminator.load(tmp_path / "d.safetensors", model=nn.Linear(3, 1))
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        Discriminator.load(tmp_path / "absent.safetensors")


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    real, fake = gaussians(60)
    disc = fit(real, fake, max_epochs=1)
    path = tmp_path / "d.safetensors"
    disc.save(path)
    old = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refine_ext.discriminator.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        disc.save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


# --- bad input ---------------------------------------------------------------------------------

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
