"""One wheel, several torches: built against one, it loads in fresh environments with others, its CUDA kernels included
where that torch is a CUDA build, whether or not there is a GPU. Installs gigabytes, hence slow.

REFINE_EXT_WHEEL names the wheel (for this Python, with CUDA kernels); without it one is built.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# PyPI has a CUDA 13 build of it.
CUDA_TORCH = "2.11.0"
# With the oldest that is supported and the one that wheels are built against.
TORCHES = ("2.10.0", CUDA_TORCH, "2.13.0")
pytestmark = pytest.mark.slow

PROBE = r"""
import json, warnings
import torch
import refine_ext as rx
from refine_ext import _library

facts = {"initialised_by_import": torch.cuda.is_initialized(), "loaded": _library.cuda_status()[0]}
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("refine_ext::")]
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
facts["kernels"] = {key: [name for name in names if has_kernel(name, key)] for key in ("CPU", "CUDA")}
facts["ops"] = names

h = torch.randn(1000, dtype=torch.float64, requires_grad=True)
ratio = rx.density_ratio(h, "kl")
log_mean = h.logsumexp(0) - torch.tensor(1000.0, dtype=torch.float64).log()
facts["ratio_error"] = (ratio.log_ratio - (h - log_mean)).abs().max().item()
# Donsker and Varadhan: E_P h - log E_Q e^h.
facts["bound_error"] = (rx.variational_bound(h + 1, h, "kl", tight=True) - (h.mean() + 1 - log_mean)).abs().item()
(ratio.log_ratio ** 2).sum().backward()
facts["gradient"] = bool(h.grad.isfinite().all())
facts["index"] = sorted(rx.resample(ratio.weights.detach(), num=50, seed=0).tolist())

try:
    rx.fit_discriminator(h.detach()[:, None], h.detach()[:, None] + 1, device="cuda", progress=False)
except ValueError as error:
    facts["refusal"] = str(error)

if facts["loaded"]:
    # A program for a GPU can be exported where there is none.
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Refine(torch.nn.Module):
        def forward(self, h):
            ratio = rx.density_ratio(h, "gan")
            return ratio.log_ratio, rx.resample(ratio.weights, num=10, seed=0)

    with FakeTensorMode():
        exported = torch.export.export(Refine(), (torch.empty(1000, device="cuda"),))
    facts["exported"] = [str(node.target) for node in exported.graph.nodes if "refine_ext" in str(node.target)]

facts["available"] = torch.cuda.is_available()
print(json.dumps(facts))
"""


def run(*command: object, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if given := os.environ.get("REFINE_EXT_WHEEL"):
        path = Path(given)
        assert path.is_file(), f"REFINE_EXT_WHEEL: {path} is not a file"
        return path
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "-w", folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module", params=TORCHES)
def installed(request, wheel, tmp_path_factory):
    """The binaries of a fresh environment with the wheel and one torch."""
    folder = tmp_path_factory.mktemp(f"torch-{request.param}")
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "pip", "install", f"torch=={request.param}", wheel)
    yield folder / "bin"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def facts(installed):
    return json.loads(run(installed / "python", "-c", PROBE, cwd=installed))


@pytest.fixture(scope="module")
def diagnosis(installed):
    return json.loads(run(installed / "refine-ext", "doctor", "--json", cwd=installed))


def test_cpu_calls_work(facts):
    # n eps for a sum of n = 1000 terms near 1, twice: ours and the reference's.
    assert facts["ratio_error"] < 2 * 1000 * 2.0**-52
    assert facts["bound_error"] < 2 * 1000 * 2.0**-52
    assert facts["gradient"]
    assert len(facts["index"]) == 50 and 0 <= facts["index"][0] <= facts["index"][-1] < 1000


def test_every_op_has_its_kernels(facts, diagnosis):
    assert len(facts["ops"]) >= 10
    assert sorted(facts["kernels"]["CPU"]) == sorted(facts["ops"])
    if diagnosis["torch"].startswith(CUDA_TORCH):  # or no environment would have loaded the CUDA library.
        assert diagnosis["torch_cuda"].startswith("13") and diagnosis["build"]["cuda"]
    if diagnosis["build"]["cuda"] and "none" not in diagnosis["torch_cuda"]:
        assert facts["loaded"]
        assert sorted(facts["kernels"]["CUDA"]) == sorted(facts["ops"])
        assert {"refine_ext.density_ratio.default", "refine_ext.resample.default"} <= set(facts["exported"])
    else:
        assert not facts["loaded"] and not facts["kernels"]["CUDA"]


def test_importing_does_not_initialise_cuda(facts):
    assert facts["initialised_by_import"] is False


def test_cuda_without_a_device_is_refused_with_the_reason(facts, diagnosis):
    if facts["available"]:
        pytest.skip("this machine has a GPU")
    before = "fit_discriminator: device is cuda, but CUDA cannot be used: "
    assert facts["refusal"].startswith(before)
    reason = facts["refusal"][len(before) :].removesuffix(". device='cpu' works")
    assert reason in diagnosis["cuda_status"]
    if facts["loaded"]:
        assert "driver" in reason or "no device" in reason


def test_doctor(facts, diagnosis, installed):
    assert diagnosis["cuda_loaded"] is facts["loaded"]
    assert diagnosis["cuda_status"] in run(installed / "refine-ext", "doctor", cwd=installed)
    if not facts["available"]:
        assert diagnosis["cuda_devices"] == []


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("version", [12040, 13000])
def test_the_driver_decides_whether_the_kernels_are_loaded(installed, facts, diagnosis, tmp_path, version):
    """A library in the driver's place that knows its version and no more."""
    if not facts["loaded"] or facts["available"] or not diagnosis["build"]["cuda_version"].startswith("13"):
        pytest.skip("needs a CUDA torch, CUDA 13 kernels and no GPU")
    source = tmp_path / "driver.c"
    source.write_text(f"int cuDriverGetVersion(int* version) {{ *version = {version}; return 0; }}")
    run("cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    answer = json.loads(run(installed / "refine-ext", "doctor", "--json", cwd=installed, env=environment))
    assert answer["cuda_driver"] == f"{version // 1000}.{version % 1000 // 10}"
    assert answer["cuda_loaded"] is (version == 13000)
    if version == 12040:
        needs = "this build of refine-ext needs 13.0 (driver 580 or newer)"
        assert answer["cuda_status"] == f"the driver supports CUDA 12.4, {needs}"
    else:
        assert answer["cuda_status"].startswith("loaded, but torch finds no device")
