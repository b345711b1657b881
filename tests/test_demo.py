"""The demonstration: its generator has the faults it claims, and refining it helps on held-out
digits."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from refine_ext import demo
from refine_ext.cli import main
from refine_ext.demo import DemoResult, faulty_generator, load_digits, mixture_generator, run_demo
from refine_ext.measures import distances
from refine_ext.pipeline import RefineOptions
from refine_ext.report import as_images, save_json

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def result() -> DemoResult:
    options = RefineOptions(progress=False, model="linear", num=700, train_rows=900)
    return run_demo(2, number=1500, options=options)


def test_the_halves_share_no_digit():
    digits = load_digits(0)
    assert len(digits.train) + len(digits.held_out) == 1797
    between = distances(digits.train.reshape(-1, 64), digits.held_out.reshape(-1, 64))
    assert between.min() > 0


def test_the_generator_has_the_faults_it_claims():
    digits = load_digits(0)
    generated = faulty_generator(digits, 4000, 0)
    assert set(np.unique(generated.images)) <= set(range(17))
    shares = np.bincount(generated.kind) / 4000
    np.testing.assert_allclose(shares, [0.65, 0.2, 0.15], atol=0.03)
    drawn = np.bincount(generated.labels, minlength=10) / 4000
    np.testing.assert_allclose(drawn, generated.proportions, atol=0.025)
    assert drawn.max() > 3 * drawn.min()
    # clean samples stay near a training digit, the faulty ones do not
    near = distances(generated.images.reshape(-1, 64), digits.train.reshape(-1, 64)).min(axis=1)
    clean, blend, noisy = (np.median(near[generated.kind == kind]) for kind in range(3))
    assert clean < 0.5 * min(blend, noisy)


def test_the_generators_are_seeded():
    digits = load_digits(1)
    for make in (
        lambda s: faulty_generator(digits, 50, s).images,
        lambda s: mixture_generator(digits, 50, s),
    ):
        assert (make(3) == make(3)).all()
        assert (make(3) != make(4)).any()


def test_the_mixture_misses_the_grey_levels():
    images = mixture_generator(load_digits(0), 200, 0)
    assert images.min() >= 0
    assert images.max() <= 16
    inside = images[(images > 0) & (images < 16)]
    assert (inside != np.round(inside)).mean() > 0.99


@pytest.mark.parametrize("name", ["auc", "energy_distance", "mmd2"])
def test_refinement_improves_every_seed(result, name):
    for before, after in zip(result.column("before", name), result.column("after", name), strict=True):
        assert after < before


def test_refinement_improves_precision_and_removes_noise(result):
    assert np.mean(result.column("after", "precision")) > np.mean(result.column("before", "precision"))
    for seed in result.seeds:
        shares = seed.shares()
        assert shares["after"][2] < 0.75 * shares["before"][2]
        assert shares["after"][0] > shares["before"][0]


def test_class_proportions_come_closer(result):
    for seed in result.seeds:
        found = {k: np.array(v) for k, v in seed.class_proportions().items()}
        error = {k: np.abs(found[k] - found["real"]).sum() for k in ("before", "after")}
        assert error["after"] < 0.8 * error["before"]


def test_weights_that_know_every_fault_are_at_least_as_good(result):
    for name in ("auc", "energy_distance"):
        assert np.mean(result.column("oracle", name)) < np.mean(result.column("before", name))


def test_the_mixture_is_refused(result):
    assert not result.hopeless.refinable
    assert result.hopeless.indices is None
    assert "latent refinement or guidance" in result.hopeless.verdict


def test_results_as_json(result, tmp_path):
    save_json(result.to_dict(), tmp_path / "demo.json")
    facts = json.loads((tmp_path / "demo.json").read_text())
    assert facts["seeds_improved"] == {"auc": 2, "energy_distance": 2, "mmd2": 2}
    assert facts["summary"]["auc"]["after"]["mean"] == pytest.approx(
        np.mean([s["after"]["auc"] for s in facts["seeds"]])
    )
    assert facts["refused"]["refinable"] is False


def test_the_command(tmp_path, monkeypatch):
    out = tmp_path / "demo"
    done = CliRunner().invoke(main, ["demo", "--quick", "--seeds", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert (out / "demo.png").read_bytes().startswith(PNG)
    assert json.loads((out / "demo.json").read_text())["seeds"][0]["seed"] == 0
    assert np.load(out / "generated.npy").shape == (1500, 8, 8)
    assert np.load(out / "refined.npy").shape == (1000, 8, 8)
    for text in ("two-sample AUC", "energy distance", "refused", "perfect weights", "demo.png"):
        assert text in done.output


def test_missing_extras_name_the_pip_command(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "sklearn" else real(name))
    done = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "d")])
    assert done.exit_code == 1
    assert done.stderr == ("error: the demo needs scikit-learn: pip install 'refine-ext[demo]'\n")
    assert not (tmp_path / "d").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "d").write_text("")
    done = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "d")])
    assert done.exit_code == 1
    assert done.stderr == f"error: {tmp_path / 'd'}: exists and is not a folder\n"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 64), (5, 8, 8)),
        ((5, 8, 6), (5, 8, 6)),
        ((5, 1, 9, 8), (5, 9, 8)),
        ((5, 3, 9, 8), (5, 9, 8, 3)),
        ((5, 9, 8, 3), (5, 9, 8, 3)),
        ((5, 9, 8, 1), (5, 9, 8)),
        ((5, 2), None),
        ((5, 25), None),
        ((5, 65), None),
        ((5, 4, 4, 4, 4), None),
    ],
)
def test_which_shapes_are_images(shape, expected):
    images = as_images(np.zeros(shape, dtype=np.float32))
    assert (None if images is None else images.shape) == expected
