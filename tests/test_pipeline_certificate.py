"""`refine-ext refine --certificate`: the written sample's bound, taken again from the files, and against the truth."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fitting import Small, one_thread  # noqa: F401

import refine_ext as rx
from refine_ext.cli import main
from refine_ext.io import ArrayRows
from refine_ext.pipeline import RefineOptions, refine
from refine_ext.pipeline_certificate import _UnitFeatures, certify_job


def draw(seed: int, n: int, generated: bool = False) -> np.ndarray:
    """N(0, I) in the plane; generated: two fifths of it moved by 2."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    if generated:
        x[rng.random(n) < 0.4, 0] += 2.0
    return x.astype(np.float32)


REAL, FAKE, HELD = draw(0, 600), draw(1, 800, generated=True), draw(2, 500)


@pytest.fixture(scope="module")
def discriminators() -> dict[str, rx.Discriminator]:
    shared = {"progress": False, "max_epochs": 8}
    return {
        "linear": rx.fit_discriminator(REAL, FAKE, model="linear", features=64, **shared),
        "mlp": rx.fit_discriminator(REAL, FAKE, hidden=(32, 16), **shared),
    }


def job(discriminator, held=HELD, **options):
    options = RefineOptions(**{"progress": False, "certificate": True, "norm_bound": 2.0, "judge_rows": 40, **options})
    return refine(ArrayRows(REAL), ArrayRows(FAKE), options, discriminator, ArrayRows(held))


@pytest.mark.parametrize("method", ["resample", "rejection", "weights"])
def test_the_ipms_are_those_of_the_files(discriminators, method):
    """Random Fourier features evaluated at once, in NumPy: means over all rows of the three samples."""
    disc = discriminators["linear"]
    refined = job(disc, method=method)
    found = refined.certificate
    real, fake = (disc.features(x).numpy() for x in (HELD, FAKE))
    weights = refined.weights if method == "weights" else np.bincount(refined.indices, minlength=len(FAKE))
    means = {"generated": fake.mean(0), "written": weights @ fake / weights.sum()}
    for name, mean in means.items():
        assert found.samples[name] == pytest.approx(2.0 * np.linalg.norm(real.mean(0) - mean), abs=1e-12)
        assert found.bound(name) == pytest.approx(found.samples[name] + found.certificate.deviation_term, rel=1e-15)
    assert found.samples["written"] < found.samples["generated"]
    own = rx.refinement_certificate(real, fake, norm_bound=2.0, feature_bound=1.0)
    assert found.samples["certificate's own"] == pytest.approx(own.ipm_refined, abs=1e-7)
    assert found.certificate.confidence_term == own.confidence_term
    # The job shuffles the rows, which so get other signs: 1024 draws are within a few hundredths.
    assert found.certificate.complexity_term == pytest.approx(own.complexity_term, rel=0.05)
    assert found.search is None and refined.to_dict()["certificate"]["search"] is None


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_the_bounds_hold_for_a_population(discriminators, model):
    """40,000 more real rows, whose mean features are within 0.02 of P's: far less than the bounds leave open."""
    disc = discriminators[model]
    refined = job(disc, norm_bound=None)
    found = refined.certificate
    assert found.search is not None and found.certificate.function_bound == pytest.approx(found.certificate.norm_bound)
    population = draw(9, 40_000)
    if model == "linear":
        phi = {name: disc.features(x) for name, x in (("p", population), ("written", FAKE[refined.indices]))}
        truth = found.certificate.norm_bound * float((phi["p"].mean(0) - phi["written"].mean(0)).norm())
        assert truth <= found.bound("written")
    # The held-out rows against the population: the deviation that both terms are for.
    features = _UnitFeatures(disc, FAKE, batch_rows=1024)
    deviation = features(population).mean(0) - found.certificate.mean_real
    assert found.certificate.norm_bound * float(deviation.norm()) <= found.certificate.deviation_term
    assert float(features(population).norm(dim=1).max()) <= 1 + 1e-6


def test_blocks_change_nothing(discriminators):
    refined = job(discriminators["mlp"])
    options = RefineOptions(certificate=True, norm_bound=2.0, progress=False)
    fixed = {"indices": refined.indices, "weights": None}
    one, many = (
        certify_job(discriminators["mlp"], HELD, ArrayRows(FAKE), options, **fixed, block_rows=rows, batch_rows=rows)
        for rows in (7, 1000)
    )
    for name in one.samples:
        # float32 layers of other batch sizes sum in another order
        assert one.samples[name] == pytest.approx(many.samples[name], rel=1e-4)


def test_memory_bounds_the_rows_whose_features_are_held(discriminators, monkeypatch):
    disc, held = discriminators["linear"], []
    plain = disc.features
    monkeypatch.setattr(disc, "features", lambda x, **options: held.append(len(x)) or plain(x, **options))
    options = RefineOptions(certificate=True, norm_bound=2.0, progress=False, memory=100 * 128 * 64)
    found = certify_job(
        disc, HELD, ArrayRows(FAKE), options, indices=np.arange(5), weights=None, block_rows=10**6, batch_rows=50
    )
    assert max(held) == 100 and found.certificate.n == found.certificate.num_fake == 100
    means = [plain(x).mean(0) for x in (HELD[:100], FAKE, FAKE[:5])]
    ipms = [2.0 * float((means[0] - mean).norm()) for mean in means[1:]]
    assert [found.samples["generated"], found.samples["written"]] == pytest.approx(ipms, abs=1e-12)


def test_a_refused_job_certifies_what_was_generated(discriminators):
    far = FAKE + np.float32(40)
    options = RefineOptions(progress=False, certificate=True)
    refined = refine(ArrayRows(REAL), ArrayRows(far), options, discriminators["linear"], ArrayRows(HELD))
    assert not refined.refinable and refined.indices is None
    assert list(refined.certificate.samples) == ["generated", "certificate's own"]


@pytest.mark.parametrize("deviation", ["rademacher", "direct"])
def test_what_is_proven_nearer(discriminators, deviation):
    """Samples that are nearer by just more and just less than both deviations."""
    found = job(discriminators["linear"], deviation=deviation).certificate
    margin = 2 * found.certificate.deviation_term
    assert found.certificate.deviation == deviation
    for factor, proven in ((1.01, True), (0.99, False)):
        found.samples = {"generated": 1.5 * margin, "written": (1.5 - factor) * margin}
        assert found.proven_nearer("written") is proven and not found.proven_nearer("generated")
        assert found.to_dict()["samples"]["written"]["proven_nearer"] is proven
        line = next(line for line in found.lines() if "proven nearer" in line)
        assert (": written;" if proven else ": nothing;") in line and f"{margin:.3g} less" in line


def test_an_unknown_deviation_is_refused_before_the_fit():
    with pytest.raises(ValueError, match="refine: deviation must be one of rademacher, direct, got 'other'"):
        refine(ArrayRows(REAL), ArrayRows(FAKE), RefineOptions(deviation="other"))


def test_what_it_cannot_certify(discriminators):
    disc = rx.fit_discriminator(
        torch.randn(60, 2, 3), torch.randn(60, 2, 3), model=Small(), progress=False, max_epochs=1
    )
    with pytest.raises(ValueError, match=r"Discriminator\.features: only model='mlp' and 'linear' .* this is Small"):
        disc.features(torch.zeros(1, 2, 3))
    few = refine(
        ArrayRows(REAL[:60]),
        ArrayRows(FAKE),
        RefineOptions(progress=False, certificate=True),
        discriminators["linear"],
    )
    assert few.certificate is None and any("too few" in note and "certificate" in note for note in few.notes)


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_features_are_what_the_output_is_linear_in(discriminators, model):
    disc = discriminators[model]
    phi = disc.features(HELD, batch_size=37)
    if model == "linear":
        output = phi @ disc.network.weight + disc.network.intercept
    else:
        output = disc.network.layers[-1](phi).squeeze(1)
    torch.testing.assert_close(output.detach(), disc(torch.tensor(HELD)).detach(), rtol=1e-5, atol=1e-6)
    assert disc.features(HELD[:0]).shape == (0, phi.shape[1])
    with pytest.raises(ValueError, match=r"Discriminator\.features: x must be \[n, 2\] as trained, got \[4, 3\]"):
        disc.features(np.zeros((4, 3)))


def test_the_command(discriminators, tmp_path):
    pytest.importorskip("matplotlib")
    for name, values in (("real", REAL), ("fake", FAKE), ("held", HELD)):
        np.save(tmp_path / f"{name}.npy", values)
    discriminators["linear"].save(tmp_path / "d.safetensors")

    def run(*more: object):
        inputs = {"real": "real.npy", "generated": "fake.npy", "discriminator": "d.safetensors", "out": "y.npy"}
        arguments = [part for name, file in inputs.items() for part in (f"--{name}", tmp_path / file)]
        return CliRunner().invoke(main, ["refine", *map(str, [*arguments, *more])])

    result = run("--certificate", "--held-out", tmp_path / "held.npy", "--delta", "0.1", "--report", tmp_path / "r.png")
    assert result.exit_code == 0, result.output
    assert "probability 0.9 over 500 held-out real rows" in result.output
    facts = json.loads((tmp_path / "r.json").read_text())["certificate"]
    assert set(facts["samples"]) == {"generated", "written", "certificate's own"}
    assert facts["certificate"]["probability"] == pytest.approx(0.9)
    assert facts["search"]["reason"] in result.output
    for sample in facts["samples"].values():
        assert f"{sample['bound']:.4g}" in result.output
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"

    plain = run("--report", tmp_path / "r.png")
    assert "certificate" not in plain.output
    assert json.loads((tmp_path / "r.json").read_text())["certificate"] is None
    unknown = run("--certificate", "--norm-bound", "0.5")
    assert unknown.exit_code == 0 and "norm bound 0.5" in unknown.output
    assert " confidence)" in unknown.output and "direct deviation bound" not in unknown.output
    assert "may have been trained on the rows that judge it" in unknown.output

    direct = run("--certificate", "--deviation", "direct", "--norm-bound", "0.5", "--report", tmp_path / "d.png")
    assert direct.exit_code == 0 and "direct deviation bound" in direct.output, direct.output
    made = json.loads((tmp_path / "d.json").read_text())
    facts = made["certificate"]["certificate"]
    assert made["options"]["deviation"] == facts["deviation"] == "direct" and facts["complexity_term"] == 0
    rate = (1 + math.sqrt(2 * math.log(20))) / math.sqrt(facts["n"])
    assert facts["deviation_term"] == facts["direct_term"] == pytest.approx(0.5 * rate, rel=1e-12)
    assert " confidence)" not in direct.output and f"{2 * facts['deviation_term']:.3g} less" in direct.output
    assert run("--certificate", "--deviation", "other").exit_code == 2

    for wrong in (["--norm-bound", "0"], ["--norm-bound", "inf"], ["--norm-bound", "x"], ["--delta", "0"]):
        assert run("--certificate", *wrong).exit_code == 2
    assert run("--temperature", "1.5").exit_code == 2
    assert Path(tmp_path / "y.npy").exists()
