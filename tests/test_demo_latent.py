"""The demonstration of latent refinement, with little effort: its generators learn, and its report says what it did."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fitting import one_thread  # noqa: F401

from refine_ext import demo_latent
from refine_ext.demo import load_digits
from refine_ext.demo_generators import TRAINING, _Coupling, train_generator
from refine_ext.measures import TITLES, energy_distance

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(load_digits(0).train.reshape(-1, 64) / 16)


# untrained, the flow draws independent pixels of the right mean and deviation
@pytest.mark.parametrize(("name", "share"), [("GAN", 0.6), ("VAE", 0.6), ("normalizing flow", 0.85)])
def test_generators_learn(name, share, images):
    """A tenth of the iterations comes closer to the digits than one iteration does; equal seeds give equal weights."""
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    made = {effort: train_generator(name, images, seed=1, effort=effort) for effort in (1e-9, 0.1)}
    assert torch.equal(torch.random.get_rng_state(), before)
    distance = {effort: energy_distance(images[:400], model.draw(400, seed=5)[1]) for effort, model in made.items()}
    assert distance[0.1] < share * distance[1e-9]
    z, x = made[0.1].draw(50, seed=5)
    assert x.shape == (50, 64) and x.min() >= 0 and x.max() <= 1
    assert torch.equal(x, train_generator(name, images, seed=1, effort=0.1)(z))
    assert not any(p.requires_grad for p in made[0.1].parameters())


def test_couplings_are_inverted_and_know_their_volume():
    torch.manual_seed(0)
    layer = _Coupling(6).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(3, 6, dtype=torch.float64)
    z, volume = layer(x)
    torch.testing.assert_close(layer.inverse(z), x)
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0][0], x[row])
        torch.testing.assert_close(volume[row], torch.linalg.slogdet(jacobian)[1])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "made"
    return demo_latent.run(folder, seeds=2, seed=3, progress=False, effort=0.1), folder


def test_the_report(done):
    report, folder = done
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "demo_latent.png").read_bytes().startswith(PNG)
    assert [row["seed"] for row in report["seeds"]] == [3, 4]
    for model in demo_latent.MODELS:
        rows = [seed[model] for seed in report["seeds"]]
        for measure in TITLES:
            for method in demo_latent.METHODS:
                values = [row[method][measure] for row in rows]
                summary = report["summary"][model][measure][method]
                assert summary["mean"] == pytest.approx(np.mean(values))
                assert summary["stderr"] == pytest.approx(np.std(values, ddof=1) / 2**0.5)
                if method == "before":
                    continue
                sign = -1 if measure in ("precision", "recall") else 1
                target = 0.5 if measure == "auc" else 0.0
                gains = [sign * (abs(r["before"][measure] - target) - abs(r[method][measure] - target)) for r in rows]
                if measure in ("auc", "precision", "recall"):
                    assert report["seeds_improved"][model][measure][method] == sum(g > 0 for g in gains)
                    named = f"{model}, {demo_latent.METHODS[method]}: {TITLES[measure][0]}" in report["not_improved"]
                    assert named == (np.mean(gains) < 0)
        assert all(0 <= row["temperature"] <= 1 and 0 < row["acceptance"] <= 1 for row in rows)
        assert all(row["before"]["n_real"] == row["langevin"]["n_generated"] == 200 for row in rows)


def test_refinement_raises_the_log_ratio_and_a_weak_vae_gets_better(done):
    report, _ = done
    for seed in report["seeds"]:
        for model in demo_latent.MODELS:
            means = seed[model]["log_ratio"]
            assert means["flow_kl"] >= means["before"] and means["langevin"] >= means["before"] - 0.1
        assert seed["VAE"]["flow_kl"]["energy_distance"] < seed["VAE"]["before"]["energy_distance"]


def test_the_table(done):
    rows = demo_latent.table(done[0])
    assert len(rows) == 1 + len(TITLES) * len(demo_latent.MODELS) and len({len(row) for row in rows}) == 1
    assert set(TRAINING) == set(demo_latent.MODELS)
    mean = done[0]["summary"]["GAN"]["auc"]["before"]["mean"]
    assert rows[1][:2] == ("GAN", "two-sample AUC") and rows[1][2].startswith(f"{mean:.3f} ± ")
