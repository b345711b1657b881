"""`refine-ext bound` on real files: formats, networks of every kind, PNG and JSON, interruptions, errors."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

import refine_ext as rx
from refine_ext.diffusion_bounds import BoundProblem

TIMES = [0.1, 0.3, 0.6]
GIVEN = ("--times", "0.1,0.3,0.6", "--draws", 4, "--steps", 5, "--model-draws", 3, "--sub-gaussian", 0.5)
OPTIONS = dict(draws=4, steps=5, model_draws=3, sub_gaussian=0.5)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x, t):
        return self.linear(torch.cat([x, t.unsqueeze(1)], 1))


@pytest.fixture(scope="module")
def values() -> torch.Tensor:
    return torch.randn(25, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, values, network) -> Path:
    path = tmp_path_factory.mktemp("bound")
    np.save(path / "x.npy", values.numpy())
    np.savez(path / "x.npz", other=np.ones(3), x=values.double().numpy())
    save_file({"x": values}, path / "x.safetensors")
    np.save(path / "images.npy", (torch.arange(6 * 9).reshape(6, 3, 3) % 11).to(torch.uint8).numpy())
    spoilt = values.clone()
    spoilt[7, 1] = torch.nan
    np.save(path / "nan.npy", spoilt.numpy())
    np.save(path / "one.npy", values[:1].numpy())
    np.save(path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    torch.jit.script(network).save(path / "net.pt")
    rows = torch.export.Dim("rows", min=2, max=100_000)
    example = (torch.randn(4, 2), torch.rand(4))
    program = torch.export.export(network, example, dynamic_shapes=({0: rows}, {0: rows}))
    torch.export.save(program, path / "net.pt2")
    torch.save(network, path / "pickle.pt")
    (path / "pickle.pt2").write_bytes((path / "pickle.pt").read_bytes())
    _spoil_archive(path / "net.pt2", path / "poisoned.pt2")
    (path / "my_bound_models.py").write_text(
        "import torch\n\n\ndef score(x, t):\n    return -x\n\n\nclass Net(torch.nn.Module):\n    pass\n\n\nnumber = 3\n"
    )
    return path


def _spoil_archive(path: Path, target: Path) -> None:
    """The same network with its weights marked as pickles, which torch.export.load would run."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("_weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
                assert b"true" in content
            archive.writestr(name, content)


def run(data: object, *arguments: object) -> Result:
    return command_line.run("bound", "--data", data, *arguments)


def figures(data: object, *arguments: object) -> dict:
    return command_line.figures(Path(str(data)).parent, "bound", "--data", data, *arguments)


def expected(selection: rx.TimeSelection) -> dict:
    return json.loads(json.dumps(selection.to_dict()))


@pytest.mark.parametrize("name", ["x.npy", "x.npz:x", "x.safetensors"])
def test_the_data_terms_alone(folder, values, name):
    facts = figures(folder / name, *GIVEN, "--seed", 3)
    data = values.double() if "npz" in name else values
    want = expected(rx.select_diffusion_time(data, TIMES, seed=3, **OPTIONS))
    assert {key: facts[key] for key in want} == want and facts["model"] is None and not facts["complete"]


@pytest.mark.parametrize("kind", ["net.pt", "net.pt2", "my_bound_models:score"])
def test_networks_of_every_kind(folder, values, network, kind, monkeypatch):
    monkeypatch.chdir(folder)
    spec = kind if ":" in kind else folder / kind
    facts = figures(folder / "x.npy", *GIVEN, "--model", spec, "--parametrization", "noise", "--time-scale", 10)
    model = (lambda x, t: -x) if ":" in kind else network.eval()
    want = expected(rx.select_diffusion_time(values, TIMES, model, parametrization="noise", time_scale=10.0, **OPTIONS))
    assert facts["complete"]
    for got, exact in zip(facts["curve"], want["curve"], strict=True):
        # A compiled or exported matrix product may sum in another order.
        for name in ("score_matching", "generator"):
            assert got[name]["value"] == pytest.approx(exact[name]["value"], rel=1e-5)
        assert got["mutual_information"] == exact["mutual_information"]


def test_schedules_their_constants_and_ranges_of_times(folder, values):
    facts = figures(
        folder / "x.npy", "--schedule", "edm", "--constant", "sigma_max=9", "--constant", "sigma_min=0.5",
        "--times", "0.5:9:4", "--draws", 2,
    )  # fmt: skip
    process = rx.forward_process("edm", sigma_min=0.5, sigma_max=9.0)
    times = [0.5 + 8.5 * k / 3 for k in range(3)] + [9.0]
    want = expected(rx.select_diffusion_time(values, times, schedule=process, draws=2))
    assert facts["curve"] == want["curve"] and facts["curve"][0]["schedule"]["sigma_min"] == 0.5


def test_images_keep_their_shape(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "shapes.py").write_text("def model(x, t):\n    assert x.shape[1:] == (3, 3)\n    return -x\n")
    facts = figures(folder / "images.npy", *GIVEN, "--model", "shapes:model")
    assert facts["curve"][0]["d"] == 9 and facts["complete"]


def test_table_picture_and_quiet(folder):
    result = run(folder / "x.npy", *GIVEN, "--plot", folder / "t.png")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{'data':<12} 25 rows of 2 float32, {folder}/x.npy"
    assert lines[1].startswith("T = ") and sum(line.endswith("<") for line in lines) == 1
    assert lines[-1] == f"{'wrote':<12} {folder}/t.png" and "no model" in result.stdout
    assert (folder / "t.png").read_bytes().startswith(b"\x89PNG")
    assert run(folder / "x.npy", *GIVEN, "--quiet").stdout == ""


def test_an_interrupted_command_goes_on(folder, tmp_path, monkeypatch):
    kept, calls, at = tmp_path / "kept.safetensors", [], BoundProblem.at

    def interrupted(self, time, advance):
        calls.append(time)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return at(self, time, advance)

    monkeypatch.setattr(BoundProblem, "at", interrupted)
    command = (folder / "x.npy", *GIVEN, "--checkpoint", kept)
    result = run(*command, "--json", tmp_path / "out.json")
    assert result.exit_code == 130 and f"finished T are in {kept}; the same command goes on" in result.stderr
    assert os.listdir(tmp_path) == ["kept.safetensors"]
    result = run(*command, "--json", tmp_path / "out.json")
    assert result.exit_code == 0 and calls == [*TIMES, TIMES[2]]
    whole = figures(folder / "x.npy", *GIVEN)
    assert json.loads((tmp_path / "out.json").read_text())["curve"] == whole["curve"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("none.npy", (), "none.npy: no such file"),
        ("pickled.npy", (), "holds pickled Python objects, refused because loading them can run code"),
        ("nan.npy", (), "select_diffusion_time: data has NaN or infinite values in row 7;"),
        ("one.npy", (), "data has 1 sample, at least 2 are needed"),
        ("x.npy", ("--times", "0.2,3"), "times must be in the range of the vp schedule, 1e-05 to 2, got 3"),
        ("x.npy", ("--constant", "beta_min=30"), "vp needs 0 < beta_min < beta_max"),
        ("x.npy", ("--schedule", "ve", "--constant", "beta_max=3"), "ve has the constants sigma_min, sigma_max"),
        ("x.npy", ("--model", "{folder}/none.pt"), "none.pt: no such file"),
        ("x.npy", ("--model", "{folder}/pickle.pt"), "pickled modules are refused because loading them can run code"),
        ("x.npy", ("--model", "{folder}/pickle.pt2"), "is no torch.export file of this format"),
        ("x.npy", ("--model", "{folder}/poisoned.pt2"), "holds pickled Python objects, refused"),
        ("x.npy", ("--model", "{folder}/x.npy"), "is neither a model file (.pt2, .pt, .pth, .ts) nor package.module"),
        ("x.npy", ("--model", "no_such_module:score"), "there is no module no_such_module"),
        ("x.npy", ("--model", "my_bound_models:nothing"), "my_bound_models has no nothing"),
        ("x.npy", ("--model", "my_bound_models:Net"), "is a class; the network itself, or a function, is needed"),
        ("x.npy", ("--model", "my_bound_models:number"), "is int; the network itself"),
        ("x.npy", ("--plot", "{folder}/t.pdf"), "bound: path must end in .png"),
        ("x.npy", ("--json", "/no/such/folder/x.json"), "the folder /no/such/folder does not exist"),
        ("x.npy", ("--device", "abacus"), "bound: device is 'abacus'; supported devices are cpu and cuda"),
        ("x.npy", ("--checkpoint", "{folder}/x.npy"), "is not a readable checkpoint"),
    ],
)
def test_errors_in_one_line(folder, name, arguments, message, monkeypatch):
    monkeypatch.chdir(folder)
    result = run(folder / name, *(str(a).format(folder=folder) for a in arguments))
    assert result.exit_code == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.output


def test_wrong_choices_are_explained(folder):
    for arguments, message in (
        (("--times", "soon"), "'soon' is neither numbers such as 0.2,0.5,1 nor FROM:TO:COUNT"),
        (("--times", "0:1:1"), "has a count below 2"),
        (("--constant", "beta_max"), "'beta_max' is not NAME=VALUE"),
        (("--schedule", "cosine"), "'cosine' is not one of"),
        (("--draws", 1), "1 is not in the range x>=2"),
    ):
        result = run(folder / "x.npy", *arguments)
        assert result.exit_code == 2 and message in result.stderr
