"""The demonstration of guidance: its denoiser denoises, and guidance helps on held-out digits."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fitting import one_thread  # noqa: F401

from refine_ext.cli import main
from refine_ext.demo import load_digits
from refine_ext.demo_diffusion import Denoiser, train_denoiser
from refine_ext.demo_summary import gains
from refine_ext.measures import TITLES, TwoSample


def test_the_denoiser_keeps_clean_images_and_forgets_noise():
    net = Denoiser()
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(net(x, torch.full((4,), 1e-4)), x, atol=1e-3, rtol=0)
        # At a high level what comes through is the network's guess, not the state.
        one, other = (net(scale * x, torch.full((4,), 1e4)) for scale in (1.0, 1.0001))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_training_denoises_and_leaves_the_generators():
    digits = torch.from_numpy(load_digits(0).train)[:, None] / 8 - 1
    torch.manual_seed(0)
    before = torch.get_rng_state()
    nets = [train_denoiser(digits, steps, seed=1) for steps in (5, 150, 150)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(nets[1].parameters(), nets[2].parameters(), strict=True))
    noisy = digits + 0.5 * torch.randn(digits.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        errors = [float((net(noisy, torch.full((len(digits),), 0.5)) - digits).square().mean()) for net in nets]
    # Better than shrinking each pixel, which leaves v s^2 / (v + s^2) of a variance v = 0.56 in noise of s = 0.5.
    assert errors[1] < 0.56 * 0.25 / (0.56 + 0.25)
    assert errors[1] < 0.8 * errors[0]


def test_gains_are_positive_where_a_measure_gets_better():
    def outcome(**values):
        return TwoSample(**{"energy_p": 0.1, "mmd_p": 0.1, "n_real": 9, "n_generated": 9, **values})

    before = outcome(auc=0.8, energy_distance=0.3, mmd2=0.2, precision=0.5, recall=0.5)
    after = outcome(auc=0.4, energy_distance=0.4, mmd2=0.1, precision=0.6, recall=0.4)
    gained = {name: gains(name, [getattr(before, name)], [getattr(after, name)]).item() for name in TITLES}
    assert gained == pytest.approx({"auc": 0.2, "energy_distance": -0.1, "mmd2": 0.1, "precision": 0.1, "recall": -0.1})


def test_the_command(tmp_path):
    out = tmp_path / "demo"
    done = CliRunner().invoke(main, ["demo", "--task", "diffusion", "--quick", "--seeds", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert (out / "demo_diffusion.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = json.loads((out / "report.json").read_text())
    for text in ("two-sample AUC", "guided, w = 2", "trained twice as long", "demo_diffusion.png", "report.json"):
        assert text in done.output
    (seed,) = report["seeds"]
    assert seed["fit"]["real_samples"]["train"] > 600
    for name in TITLES:
        assert report["summary"][name]["after"]["mean"] == seed["after"][name]
    # Even this little training of both helps, and the training digits are what cannot be beaten.
    for name in ("energy_distance", "mmd2"):
        assert seed["real"][name] < seed["after"][name] < seed["before"][name]
        assert report["seeds_improved"][name]["after"] == 1
    worse = {name for name in ("precision", "recall") if seed["after"][name] < seed["before"][name]}
    assert {f"guided: {name}" for name in worse} <= set(report["not_improved"])
    assert len(worse) == sum(line.startswith("guided: ") for line in report["not_improved"])
    assert math.isfinite(seed["after"]["auc"])
    assert np.isfinite([row["gain"] for row in seed["fit"]["levels"]]).all()
