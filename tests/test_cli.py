"""`refine-ext refine` and `doctor` on real files: formats, determinism, limits, refusals, and
errors in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from command_line import run, run_child, sparse_rows
from safetensors.torch import load_file, save_file

import refine_ext as rx
from refine_ext.output import RowWriter

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Jobs this small lose more to waking threads up than they gain, most of all on a busy
    machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def samples() -> tuple[np.ndarray, np.ndarray]:
    """Real N(0, I₂); generated: the same for 60 %, shifted by 2 for the rest."""
    generator = np.random.default_rng(0)
    real = generator.normal(size=(600, 2))
    generated = generator.normal(size=(800, 2))
    generated[generator.random(800) < 0.4, 0] += 2.0
    return real.astype(np.float32), generated.astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, samples) -> Path:
    """The samples as files, and a discriminator trained once."""
    path = tmp_path_factory.mktemp("cli")
    np.save(path / "real.npy", samples[0])
    np.save(path / "fake.npy", samples[1])
    disc = rx.fit_discriminator(*samples, model="linear", features=64, progress=False)
    disc.save(path / "d.safetensors")
    return path


def refine(folder: Path, out: object, *more: object) -> Result:
    """A run with the module's discriminator: what is tested is the job, not the fit."""
    inputs = ["--real", folder / "real.npy", "--generated", folder / "fake.npy"]
    chosen = [] if "--model" in more else ["--discriminator", folder / "d.safetensors"]
    return run("refine", *inputs, *chosen, "--out", out, *more)


def rows_in(values: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Index in `pool` of each row, which must be there bit for bit."""
    places = {row.tobytes(): i for i, row in enumerate(pool)}
    return np.array([places[row.tobytes()] for row in values])


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_the_main_job_moves_the_sample_to_the_data(folder, tmp_path, samples, model):
    out = tmp_path / "refined.npy"
    result = refine(folder, out, "--model", model, "--seed", 3)
    assert result.exit_code == 0, result.output
    refined = np.load(out)
    assert (refined.dtype, refined.shape) == (np.float32, (800, 2))
    index = rows_in(refined, samples[1])
    assert (np.diff(index) >= 0).all()  # the order of the generated file
    # the truth is 0; what the guard holds back is left
    assert abs(refined[:, 0].mean()) < 0.65 * samples[1][:, 0].mean()
    for text in (
        "held-out gain",
        "two-sample AUC",
        "; standard error 0.",
        "energy distance",
        "effective samples",
        "peak",
    ):
        assert text in result.output


@pytest.mark.parametrize(
    ("source", "element"),
    [("fake.npz:x", "float16"), ("fake.pt", "bfloat16"), ("fake.safetensors:x", "uint8")],
)
@pytest.mark.parametrize("out", ["y.npy", "y.npz", "y.pt", "y.safetensors:mine"])
def test_formats_and_dtypes(folder, tmp_path, samples, source, element, out):
    values = torch.from_numpy(samples[1] * (20 if element == "uint8" else 1)).abs()
    values = values.to(getattr(torch, element))
    if source.startswith("fake.npz"):
        np.savez(tmp_path / "fake.npz", other=np.ones(3), x=values.numpy())
    elif source == "fake.pt":
        torch.save(values, tmp_path / "fake.pt")
    else:
        save_file({"x": values, "other": torch.ones(2)}, tmp_path / "fake.safetensors")
    result = run(
        "refine", "--real", folder / "real.npy", "--generated", tmp_path / source,
        "--discriminator", folder / "d.safetensors", "--num", 50, "--force",
        "--out", tmp_path / out,
    )  # fmt: skip
    if element == "bfloat16" and out in ("y.npy", "y.npz"):
        assert result.exit_code == 1
        assert "cannot hold bfloat16; write .pt or .safetensors" in result.stderr
        return
    assert result.exit_code == 0, result.output
    if out == "y.npy":
        got = torch.from_numpy(np.load(tmp_path / out))
    elif out == "y.npz":
        got = torch.from_numpy(np.load(tmp_path / out)["samples"])
    elif out == "y.pt":
        got = torch.load(tmp_path / out, weights_only=True)
    else:
        got = load_file(tmp_path / "y.safetensors")["mine"]
    assert (got.dtype, tuple(got.shape)) == (values.dtype, (50, 2))
    rows_in(got.view(torch.uint8).numpy(), values.view(torch.uint8).numpy())


def test_the_seed_decides_everything(folder, tmp_path):
    options = ("--model", "linear", "--num", 300, "--train-rows", 150)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert refine(folder, tmp_path / f"{name}.npy", *options, "--seed", seed).exit_code == 0
    a, b, c = ((tmp_path / f"{name}.npy").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_weights_are_the_discriminators(folder, tmp_path, samples):
    out = tmp_path / "w.npy"
    assert refine(folder, out, "--method", "weights").exit_code == 0
    weights = np.load(out)
    assert (weights.dtype, weights.shape) == (np.float64, (800,))
    disc = rx.Discriminator.load(folder / "d.safetensors")
    expected = torch.softmax(disc.log_ratio(samples[1]).double(), 0).numpy()
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)


def test_resampled_counts_follow_the_weights(folder, tmp_path, samples):
    assert refine(folder, tmp_path / "w.npy", "--method", "weights").exit_code == 0
    assert refine(folder, tmp_path / "y.npy", "--num", 5000).exit_code == 0
    counts = np.bincount(rows_in(np.load(tmp_path / "y.npy"), samples[1]), minlength=800)
    # systematic resampling: within one of the expectation
    assert np.abs(counts - 5000 * np.load(tmp_path / "w.npy")).max() < 1.001


def test_rejection_draws_no_row_twice(folder, tmp_path, samples):
    assert refine(folder, tmp_path / "y.npy", "--method", "rejection").exit_code == 0
    accepted = rows_in(np.load(tmp_path / "y.npy"), samples[1])
    assert 20 < len(accepted) < 800
    assert (np.diff(accepted) > 0).all()
    few = refine(folder, tmp_path / "few.npy", "--method", "rejection", "--num", 10)
    assert few.exit_code == 0
    chosen = rows_in(np.load(tmp_path / "few.npy"), samples[1])
    assert len(chosen) == 10
    assert set(chosen) <= set(accepted)
    many = refine(folder, tmp_path / "many.npy", "--method", "rejection", "--num", 800)
    assert many.exit_code == 1
    assert "of 800 rows, --num asks for 800; generate more, or use --method" in many.stderr


def test_metropolis_moves_the_sample_too(folder, tmp_path, samples):
    result = refine(folder, tmp_path / "y.npy", "--method", "metropolis", "--num", 1000)
    assert result.exit_code == 0, result.output
    refined = np.load(tmp_path / "y.npy")
    assert refined.shape == (1000, 2)
    assert abs(refined[:, 0].mean()) < 0.65 * samples[1][:, 0].mean()


def test_a_saved_discriminator_gives_the_same_sample(folder, tmp_path):
    first = refine(
        folder, tmp_path / "a.npy", "--model", "linear", "--save-discriminator",
        tmp_path / "s.safetensors",
    )  # fmt: skip
    assert first.exit_code == 0, first.output
    assert refine(
        folder, tmp_path / "b.npy", "--discriminator", tmp_path / "s.safetensors"
    ).exit_code == 0  # fmt: skip
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_temperature_zero_changes_nothing(folder, tmp_path):
    result = refine(folder, tmp_path / "w.npy", "--method", "weights", "--temperature", 0)
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(np.load(tmp_path / "w.npy"), 1 / 800, rtol=1e-12)
    assert "temperature  0.00" in result.output


def test_given_rows_judge(folder, tmp_path, samples):
    held = np.random.default_rng(9).normal(size=(150, 2)).astype(np.float32)
    np.save(tmp_path / "held.npy", held)
    result = refine(folder, tmp_path / "y.npy", "--held-out", tmp_path / "held.npy")
    assert result.exit_code == 0, result.output
    assert "(150 real samples)" in result.output
    assert "may have been trained on the rows that judge" not in result.output
    assert "may have been trained on the rows" in refine(folder, tmp_path / "z.npy").output


def test_a_report_is_a_picture_and_its_figures(folder, tmp_path):
    result = refine(folder, tmp_path / "y.npy", "--report", tmp_path / "report.png", "--num", 200)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["rows"] == 200
    assert facts["before"]["energy_distance"] > facts["after"]["energy_distance"]
    assert facts["gain"][0] > 0
    assert facts["options"]["memory"] == 2**30


def _hopeless(folder: Path) -> tuple[Path, Path]:
    generator = np.random.default_rng(0)
    np.save(folder / "lattice.npy", generator.normal(size=(500, 3)))
    np.save(folder / "far.npy", generator.normal(size=(500, 3)) + 40.0)
    return folder / "lattice.npy", folder / "far.npy"


def test_a_hopeless_case_is_refused_in_words(tmp_path):
    real, far = _hopeless(tmp_path)
    command = ["refine", "--real", real, "--generated", far, "--out", tmp_path / "y.npy"]
    command += ["--model", "linear", "--report", tmp_path / "r.png"]
    result = run(*command)
    assert result.exit_code == 3
    assert "refused: reweighting cannot help" in result.stderr
    assert "latent refinement or guidance" in result.stderr
    assert "was not written" in result.stderr
    assert not (tmp_path / "y.npy").exists()
    assert json.loads((tmp_path / "r.json").read_text())["refinable"] is False
    forced = run(*command, "--force", "--num", 10)
    assert forced.exit_code == 0, forced.output
    assert np.load(tmp_path / "y.npy").shape == (10, 3)


def _bad_inputs(folder: Path) -> None:
    good = np.random.default_rng(0).normal(size=(200, 2))
    np.save(folder / "good.npy", good)
    np.save(folder / "wide.npy", np.ones((200, 3)))
    np.save(folder / "few.npy", good[:10])
    np.save(folder / "constant.npy", np.ones((200, 2)))
    np.save(folder / "complex.npy", good.astype(complex))
    np.save(folder / "empty.npy", good[:0])
    np.save(folder / "object.npy", np.array([{}] * 50), allow_pickle=True)
    nan = good.copy()
    nan[7, 1] = np.nan
    np.save(folder / "nan.npy", nan)
    (folder / "cut.npy").write_bytes((folder / "good.npy").read_bytes()[:500])
    (folder / "text.safetensors").write_text("hello")


BAD = [
    (["--generated", "nope.npy"], "nope.npy: no such file"),
    (["--generated", "wide.npy"], "wide.npy: has 3 features a row, shape [3]; "),
    (["--generated", "few.npy"], "few.npy: has 10 rows; at least 40 are needed"),
    (["--real", "constant.npy"], "refine: the real rows are constant, every value is 1"),
    (["--generated", "constant.npy"], "refine: the generated rows are constant"),
    (["--generated", "complex.npy"], "dtype complex128 is not supported; allowed: float64"),
    (["--generated", "empty.npy"], "empty.npy: is empty, shape [0, 2]"),
    (["--generated", "object.npy"], "object.npy: holds pickled Python objects"),
    (["--generated", "nan.npy"], "nan.npy: 1 of "),
    (["--real", "nan.npy"], "NaN or infinite; samples must be finite"),
    (["--generated", "cut.npy"], "cut.npy: truncated: 3328 bytes promised, the file has 500"),
    (["--generated", "text.safetensors"], "not a readable .safetensors file"),
    (["--out", "y.csv"], "y.csv: unknown file type '.csv'; allowed: .npy"),
    (["--out", "no/y.npy"], "no/y.npy: the folder no does not exist"),
    (["--out", "good.npy"], "good.npy: is an input too; write to another file"),
    (["--out", "/proc/y.npy"], "/proc/y.npy: cannot write into /proc"),
    (["--report", "r.jpg"], "r.jpg: must end in .png"),
    (["--save-discriminator", "d.pt"], "d.pt: must end in .safetensors"),
    (["--discriminator", "nope.safetensors"], "nope.safetensors: no such file"),
    (["--discriminator", "text.safetensors"], "text.safetensors"),
    (["--divergence", "kullback"], "kullback"),
    (["--memory", "10KiB"], "--memory 0 MiB is too small to weigh 200 generated rows"),
    (["--held-out", "wide.npy"], "they must agree"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[" ".join(c) for c, _ in BAD])
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, change, message):
    _bad_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    options = {
        "--real": "good.npy", "--generated": "good.npy", "--out": "y.npy", "--model": "linear",
    }  # fmt: skip
    options[change[0]] = change[1]
    result = run("refine", *[part for pair in options.items() for part in pair])
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "1.5"), ("--memory", "lots"), ("--method", "magic"), ("--num", "0")],
)
def test_bad_options_are_usage_errors(folder, tmp_path, option, value):
    result = refine(folder, tmp_path / "y.npy", option, value)
    assert result.exit_code == 2
    assert option in result.stderr
    assert value in result.stderr


def test_debug_shows_the_traceback(tmp_path):
    arguments = ["refine", "--real", "nope.npy", "--generated", "nope.npy", "--out", "y.npy"]
    assert isinstance(run(*arguments, "--debug").exception, ValueError)
    assert isinstance(run(*arguments).exception, SystemExit)


def test_quiet_says_nothing(folder, tmp_path):
    result = refine(folder, tmp_path / "y.npy", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_termination_leaves_nothing(folder, tmp_path, monkeypatch):
    def terminated(self, raw):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RowWriter, "write", terminated)
    previous = signal.getsignal(signal.SIGTERM)
    assert refine(folder, tmp_path / "y.npy").exit_code == 143
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is previous


@pytest.mark.parametrize("suffix", ["npz", "pt"])
def test_a_full_disk_leaves_nothing(folder, tmp_path, suffix):
    script = """
        import resource, sys
        from refine_ext.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        main(sys.argv[1:])
    """
    done = run_child(
        script, "refine", "--real", folder / "real.npy", "--generated", folder / "fake.npy",
        "--discriminator", folder / "d.safetensors", "--out", tmp_path / f"y.{suffix}",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/y.{suffix}: cannot be written: File too large\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("method", ["resample", "weights"])
def test_an_array_larger_than_the_memory_limit_is_streamed(tmp_path, method):
    rows, features, limit = 100_000, 512, 300
    for name, count in (("fake.npy", rows), ("real.npy", 4000)):
        sparse_rows(tmp_path / name, count, features, 8, np.roll)
    script = """
        import resource, sys
        import numpy as np
        from refine_ext.cli import _load_libraries, main
        _load_libraries(None)
        status = open("/proc/self/status").read()
        used = int(status.split("VmData:")[1].split()[0]) * 1024
        limit = used + int(sys.argv.pop()) * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            np.load(sys.argv[1])
            sys.exit("the limit does not bind: the whole array could be loaded")
        except MemoryError:
            pass
        main(sys.argv[2:])
    """
    assert rows * features * 8 > limit * 2**20
    done = run_child(
        script, tmp_path / "fake.npy", "refine", "--real", tmp_path / "real.npy",
        "--generated", tmp_path / "fake.npy", "--out", tmp_path / "y.npy", "--model", "mlp",
        "--memory", "128MiB", "--method", method, "--force", limit,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = (rows,) if method == "weights" else (rows, features)
    assert np.load(tmp_path / "y.npy", mmap_mode="r").shape == expected
    memory = done.stdout.strip().splitlines()[-1]
    assert "of at most 128 MiB (--memory)" in memory
    used = int(memory.split(" MiB of data")[0].split()[-1])
    assert used <= 128, memory


def test_doctor_names_the_build(tmp_path):
    facts = json.loads(run("doctor", "--json").output)
    assert facts["refine_ext"] == rx.__version__
    assert facts["torch"] == torch.__version__
    assert isinstance(facts["cuda_loaded"], bool)
    text = run("doctor").output
    assert facts["build"]["simd_level"] in text
    assert facts["cuda_status"] in text


def test_the_command_stands_on_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "refine_ext", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == f"refine-ext, version {rx.__version__}"
    listed = run("--help").output
    for name in ("refine", "demo", "doctor"):
        assert name in listed
        assert run(name, "--help").exit_code == 0


def test_import_stays_light():
    script = """
        import sys, torch
        before = set(sys.modules)
        import refine_ext
        heavy = {"click", "tqdm", "sklearn", "scipy", "matplotlib"} & (set(sys.modules) - before)
        sys.exit(", ".join(heavy) or 0)
    """
    done = run_child(script)
    assert done.returncode == 0, f"import refine_ext also imports {done.stderr}"
