"""Discriminator: scoring, gradients, files."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from fitting import Small, fit, gaussians, one_thread  # noqa: F401
from safetensors.torch import save_file
from torch import nn

from refine_ext.discriminator import Discriminator


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

    monkeypatch.setattr("refine_ext.discriminator_file.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        disc.save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]
