"""`refine-ext rademacher` on real files: formats, files larger than memory, JSON, interruptions, errors in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

import refine_ext as rx


@pytest.fixture(scope="module")
def values() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(3000, 12)).astype(np.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, values) -> Path:
    path = tmp_path_factory.mktemp("rademacher")
    np.save(path / "D.npy", values.numpy())
    np.save(path / "fortran.npy", np.asfortranarray(values.numpy()))
    np.savez(path / "D.npz", other=np.ones(3), D=values.numpy())
    np.savez_compressed(path / "packed.npz", D=values.numpy())
    torch.save({"D": values, "half": values.bfloat16()}, path / "D.pt")
    save_file({"D": values, "wide": values.reshape(3000, 3, 4).clone()}, path / "D.safetensors")
    np.save(path / "whole.npy", (values * 10).round().to(torch.int16).numpy())
    return path


def run(outputs: object, *arguments: object) -> Result:
    return command_line.run("rademacher", "--outputs", outputs, *arguments)


def figures(outputs: object, *arguments: object) -> dict:
    return command_line.figures(Path(str(outputs)).parent, "rademacher", "--outputs", outputs, *arguments)


def expected(estimate: rx.Estimate, delta: float = 0.05) -> dict:
    return json.loads(json.dumps(estimate.to_dict(delta)))


@pytest.mark.parametrize(
    "name",
    ["D.npy", "fortran.npy", "D.npz:D", "packed.npz", "D.pt:D", "D.safetensors:D", "D.safetensors:wide"],
)
@pytest.mark.parametrize("memory", ["1GiB", "300k"])
def test_every_format_read_at_once_or_in_blocks(folder, values, name, memory):
    facts = figures(folder / name, "--draws", 200, "--seed", 3, "--memory", memory)
    want = expected(rx.rademacher(values, 200, 3))
    assert {key: facts[key] for key in want} == want
    assert facts["dtype"] == "float32" and facts["class"] == "finite" and facts["norm_bound"] is None


def test_other_dtypes(folder, values):
    for memory in ("1GiB", "300k"):
        half = figures(folder / "D.pt:half", "--draws", 50, "--memory", memory)
        assert half["mean"] == float(rx.rademacher(values.bfloat16(), 50, 0)) and half["dtype"] == "bfloat16"
        whole = figures(folder / "whole.npy", "--draws", 50, "--memory", memory)
        assert whole["mean"] == float(rx.rademacher((values * 10).round(), 50, 0)) and whole["dtype"] == "int16"


def test_options_reach_the_estimate(folder, values):
    path = folder / "D.npy"
    one_sided = figures(path, "--one-sided", "--draws", 60, "--first-draw", 9, "--bound", 7, "--delta", 0.2)
    want = rx.rademacher(values, 60, 0, absolute=False, first_draw=9, bound=7.0)
    assert one_sided["upper"] == want.upper(0.2) and one_sided["draw_ranges"] == [[9, 60]]
    linear = figures(path, "--class", "linear", "--norm-bound", 2.5, "--draws", 60)
    assert linear["mean"] == float(rx.rademacher_linear(values, 2.5, 60, 0)) and linear["norm_bound"] == 2.5
    assert figures(path, "--class", "l1", "--draws", 60)["mean"] == float(rx.rademacher_l1(values, 1.0, 60, 0))
    normal = figures(path, "--distribution", "normal", "--draws", 60)
    assert normal["mean"] == float(rx.rademacher(values, 60, 0, distribution="normal"))
    finer = figures(path, "--draws", 16, "--stderr", 1e-3)
    assert finer["stderr"] <= 1e-3 and finer["draws"] > 16
    np.save(folder / "few.npy", values[:6].numpy())
    exact = figures(folder / "few.npy", "--draws", "all")
    assert exact["draws"] == 64 and exact["mean"] == float(rx.rademacher(values[:6], "all")) == exact["upper"]


def test_the_table(folder, values):
    estimate = rx.rademacher(values, 1024, 0)
    result = run(folder / "D.npy")
    lines = {line[:12].strip(): line[13:] for line in result.stdout.splitlines()}
    assert lines["outputs"] == f"3000 rows of 12 float32, {folder}/D.npy"
    assert lines["complexity"] == str(estimate)
    assert lines["upper limit"] == (
        f"{estimate.upper(0.05):.6g} with probability 0.95, for |f| <= {estimate.bound:.6g}"
    )
    assert lines["draws"] == "1024 from number 0 of seed 0"
    np.save(folder / "few.npy", values[:3].numpy())
    assert "8 of them different: `--draws all`" in run(folder / "few.npy").stdout
    assert run(folder / "D.npy", "--quiet").stdout == ""


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("none.npy", (), "none.npy: no such file"),
        ("D.npz", (), "holds 2 arrays (other, D); choose one"),
        ("pickled.npy", (), "holds pickled Python objects, refused because loading them can run code"),
        ("nan.npy", (), "rademacher: outputs must be finite, got nan in column 5, row 2222"),
        ("nan.npy", ("--memory", "300k"), "rademacher: outputs must be finite, got nan in column 5, row 2222"),
        ("D.npy", ("--memory", "100k"), "1024 rows, which are summed at once, take 0.0 MiB; --memory must be four"),
        ("D.npy", ("--bound", 0.1), "rademacher: bound must be finite and at least the largest"),
        ("D.npy", ("--draws", "all"), "rademacher: draws='all' takes at most 20 samples, got 3000"),
        ("D.npy", ("--delta", 1.5), "--delta must be between 0 and 1, got 1.5"),
        ("D.npy", ("--norm-bound", 2), "--norm-bound is for --class linear and l1"),
        ("D.npy", ("--class", "l1", "--norm-bound", 0), "rademacher_l1: norm_bound must be positive and finite"),
        ("D.npy", ("--class", "l1", "--one-sided"), "--one-sided is for --class finite"),
        ("D.npy", ("--json", "/no/such/folder/x.json"), "the folder /no/such/folder does not exist"),
        ("D.npz:D", ("--json", "{folder}/D.npz"), "D.npz: is the input; write to another file"),
        ("D.npy", ("--device", "abacus"), "rademacher: device is 'abacus'; supported devices are cpu and cuda"),
    ],
)
def test_errors_in_one_line(folder, values, name, arguments, message):
    if name == "pickled.npy":
        np.save(folder / name, np.array([{}], dtype=object), allow_pickle=True)
    if name == "nan.npy":
        spoilt = values.numpy().copy()
        spoilt[2222, 5] = spoilt[2223, 5] = np.nan
        np.save(folder / name, spoilt)
    result = run(folder / name, *(str(a).format(folder=folder) for a in arguments))
    assert result.exit_code == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.output


def test_wrong_choices_are_explained(folder):
    for arguments, message in (
        (("--draws", "many"), "'many' is neither `all` nor a positive number"),
        (("--draws", 0), "'0' is neither `all` nor a positive number"),
        (("--class", "deep"), "'deep' is not one of 'finite', 'linear', 'l1'"),
    ):
        result = run(folder / "D.npy", *arguments)
        assert result.exit_code == 2 and message in result.stderr


def test_a_file_larger_than_the_memory_limit_is_streamed(tmp_path):
    rows, features, limit, memory = 60_000, 320, 100, 12
    command_line.sparse_rows(tmp_path / "D.npy", rows, features, 64, lambda block, row: block * (1 + row % 3))
    assert rows * features * 8 > limit * 2**20
    script = """
        import resource, sys
        import numpy as np
        from refine_ext import rademacher
        from refine_ext.cli import main
        from refine_ext import rademacher_stream, report, io
        rademacher(np.ones((2000, 700)), 8, 0)  # the buffers that a thread keeps
        status = open("/proc/self/status").read()
        limit = int(status.split("VmData:")[1].split()[0]) * 1024 + int(sys.argv.pop()) * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            np.load(sys.argv[1])
            sys.exit("the limit does not bind: the whole array could be loaded")
        except MemoryError:
            pass
        main(["rademacher", "--outputs", *sys.argv[1:]])
    """
    # 12 MiB hold the sums of 2457 draws: two readings.
    done = command_line.run_child(
        script, tmp_path / "D.npy", "--draws", 3000, "--memory", f"{memory}MiB",
        "--json", tmp_path / "out.json", limit, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "out.json").read_text())
    filled = np.load(tmp_path / "D.npy", mmap_mode="r")[::64]
    # Columns are multiples of one: the sum of its signs times the largest column.
    assert facts["n"] == rows and facts["draws"] == 3000
    norm = np.sqrt((np.asarray(filled) ** 2).sum(0)).max()
    assert abs(facts["mean"] - np.sqrt(2 / np.pi) * norm / rows) < 4 * facts["stderr"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_leaves_no_half_file(tmp_path, number, code):
    np.save(tmp_path / "D.npy", np.ones((4096, 256), dtype=np.float32))
    command = [sys.executable, "-m", "refine_ext", "rademacher", "--outputs", tmp_path / "D.npy", "--memory", "5MiB"]
    with subprocess.Popen(
        [*map(str, command), "--draws", "10000000", "--json", str(tmp_path / "out.json")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A suite that runs detached has SIGINT ignored, which its children would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as job:  # fmt: skip
        maps = Path(f"/proc/{job.pid}/fd")
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:  # until it reads
            if any(os.path.realpath(link).endswith("D.npy") for link in maps.iterdir()):
                break
            time.sleep(0.05)
        time.sleep(0.3)
        job.send_signal(number)
        _, error = job.communicate(timeout=100)
    assert job.returncode == code, error
    assert "Traceback" not in error
    assert sorted(os.listdir(tmp_path)) == ["D.npy"]
