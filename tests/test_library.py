"""What is said where the CUDA kernels cannot run, on every kind of machine that has not got them."""

from __future__ import annotations

import types
import warnings

import pytest
import torch

import refine_ext as rx
from refine_ext import _library, doctor

BUILD = {
    **_library._C.build_info(),
    "cuda": True,
    "cuda_absent": "",
    "cuda_version": "13.0.88",
    "cuda_architectures": ["75-real", "80-real", "90-real", "120"],
}


class Machine:
    """A machine with a GPU on which everything works; tests break one thing at a time through its seams."""

    def __init__(self, monkeypatch, tmp_path):
        self.patch = monkeypatch
        self.loaded: list[str] = []
        library = tmp_path / "librefine_ext_cuda.so"
        library.touch()
        monkeypatch.setattr(_library, "_CUDA_LIBRARY", library)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.ops, "load_library", self.loaded.append)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self.build()
        self.driver((13, 0))
        self.devices((9, 0))

    def build(self, **facts):
        self.patch.setattr(_library, "_C", types.SimpleNamespace(build_info=lambda: {**BUILD, **facts}))
        self.forget()

    def driver(self, version: tuple[int, int] | None):
        self.patch.setattr(_library, "driver_version", lambda: version)
        self.forget()

    def devices(self, *capabilities: tuple[int, int], warning: str = ""):
        self.patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        self.patch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU-{i}")
        self.patch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])

        def is_available() -> bool:
            if warning:
                warnings.warn(warning, stacklevel=1)
            return bool(capabilities)

        self.patch.setattr(torch.cuda, "is_available", is_available)
        self.forget()

    def forget(self):
        _library.cuda_status.cache_clear()
        _library._problem.cache_clear()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path)
    yield machine
    machine.forget()
    monkeypatch.undo()
    machine.forget()


class OnCuda:
    def __init__(self, index: int | None = 0):
        self.device = torch.device("cuda", index) if index is not None else torch.device("cuda")


def runs() -> bool:
    """Whether the kernels are loaded and a device can run them."""
    return doctor.diagnose()["cuda_status"] == "loaded"


def refusal(index: int = 0) -> str:
    """What a function says to a CUDA tensor."""
    with pytest.raises(ValueError) as caught:
        _library.require_device("density_ratio", "h", OnCuda(index))
    text = str(caught.value)
    before = "density_ratio: h is on cuda, but the CUDA kernels cannot run: "
    assert text.startswith(before)
    return text[len(before) :]


def test_a_machine_that_has_everything(machine):
    assert runs()
    assert len(machine.loaded) == 1
    _library.require_device("density_ratio", "h", OnCuda())
    assert _library.usable_device("fit_discriminator", "cuda:0") == torch.device("cuda:0")
    (device,) = doctor.diagnose()["cuda_devices"]
    assert device == {"index": 0, "usable": True, "problem": "", "name": "GPU-0", "capability": "9.0"}


def test_built_without_cuda_says_why_it_was(machine):
    machine.build(cuda=False, cuda_absent="/opt/nvcc is of CUDA 11.8; CUDA 12.8 or newer is needed")
    assert refusal() == (
        "this build of refine-ext has no CUDA library: /opt/nvcc is of CUDA 11.8; CUDA 12.8 or newer is needed"
    )
    assert not machine.loaded
    assert _library.cuda_status() == (False, refusal())


def test_the_library_is_missing(machine):
    _library._CUDA_LIBRARY.unlink()
    assert "librefine_ext_cuda.so is missing" in refusal()


def test_torch_for_the_cpu(machine):
    machine.patch.setattr(torch.version, "cuda", None)
    assert refusal() == f"torch {torch.__version__} is a CPU build; install a CUDA build of torch"
    assert not machine.loaded


@pytest.mark.parametrize(
    ("built", "driver", "needs"),
    [
        ("13.0.88", (12, 4), "13.0 (driver 580 or newer)"),
        ("13.2.10", (12, 9), "13.0 (driver 580 or newer)"),
        ("12.8.61", (12, 2), "12.4 (driver 550 or newer)"),
        ("12.8.61", (11, 8), "12.4 (driver 550 or newer)"),
        ("14.1.0", (13, 0), "14.0"),
    ],
)
def test_a_driver_too_old_for_the_build(machine, built, driver, needs):
    machine.build(cuda_version=built)
    machine.driver(driver)
    version = "{}.{}".format(*driver)
    assert refusal() == f"the driver supports CUDA {version}, this build of refine-ext needs {needs}"
    # Not loaded: a kernel registered with such a driver would fail at its first launch instead.
    assert not machine.loaded and not _library.cuda_status()[0]


@pytest.mark.parametrize(("built", "driver"), [("13.2.10", (13, 0)), ("13.0.88", (14, 1)), ("12.9.8", (12, 4))])
def test_a_driver_of_the_same_major_version_or_newer_will_do(machine, built, driver):
    machine.build(cuda_version=built)
    machine.driver(driver)
    assert runs()


def test_the_library_does_not_load(machine):
    def fail(path):
        raise OSError("undefined symbol: aoti_torch_get_current_cuda_stream")

    machine.patch.setattr(torch.ops, "load_library", fail)
    assert refusal() == ("loading librefine_ext_cuda.so failed: undefined symbol: aoti_torch_get_current_cuda_stream")


def test_no_driver(machine):
    machine.driver(None)
    machine.devices()
    assert "there is no NVIDIA driver" in refusal()
    # The kernels are registered all the same: tracing for a device that is elsewhere needs them.
    facts = doctor.diagnose()
    assert facts["cuda_loaded"] and facts["cuda_status"].startswith("loaded, but there is no NVIDIA driver")


def test_a_driver_too_old_for_torch(machine):
    machine.build(cuda_version="12.8.61")
    machine.driver((12, 8))
    machine.devices()
    assert refusal() == f"the driver supports CUDA 12.8, torch {torch.__version__} needs 13.0"


def test_devices_hidden_from_the_process(machine):
    machine.devices()
    machine.patch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert refusal() == "torch finds no device with CUDA_VISIBLE_DEVICES='-1'"


def test_what_torch_warns_of_is_passed_on(machine):
    machine.devices(warning="CUDA initialization: CUDA unknown error\nand more")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal() == "torch finds no device: CUDA initialization: CUDA unknown error"


def test_a_gpu_older_than_the_build(machine):
    machine.devices((7, 0))
    assert refusal() == (
        "GPU-0 has compute capability 7.0, this build is for 75-real, 80-real, 90-real, 120; "
        "build for it with REFINE_EXT_CUDA_ARCHITECTURES=70"
    )
    (device,) = doctor.diagnose()["cuda_devices"]
    assert device["problem"] == refusal() and not device["usable"]
    assert f"GPU-0 (7.0), not usable: {refusal()}" in doctor.describe(doctor.diagnose())


def test_each_device_by_itself(machine):
    machine.devices((6, 1), (8, 6))
    assert refusal(0).startswith("GPU-0 has compute capability 6.1")
    _library.require_device("density_ratio", "h", OnCuda(1))
    assert refusal(2) == "there is no device 2, torch finds 2"
    assert runs()


def test_a_gpu_newer_than_the_build_runs_its_ptx(machine):
    machine.devices((12, 1))
    assert runs()
    machine.build(cuda_version="13.1.0")
    machine.devices((13, 0))
    assert refusal() == (
        "GPU-0 has compute capability 13.0, this build is for 75-real, 80-real, 90-real, 120; "
        "its PTX needs a driver for CUDA 13.1, this one supports 13.0"
    )
    machine.driver((13, 1))
    assert runs()


def test_a_device_that_does_not_start(machine):
    def fail(index):
        raise RuntimeError("CUDA error: device busy\nCompile with TORCH_USE_CUDA_DSA")

    machine.patch.setattr(torch.cuda, "get_device_name", fail)
    assert refusal() == "device 0 does not start: CUDA error: device busy"
    (device,) = doctor.diagnose()["cuda_devices"]
    assert device["name"] == "unknown" and device["problem"] == refusal()


@pytest.mark.parametrize(
    ("capability", "architectures", "ptx", "answer"),
    [
        ((8, 0), "80-real", False, True),
        ((8, 9), "80-real", False, True),  # machine code runs on later minor versions
        ((8, 0), "86-real", True, False),  # not on earlier ones
        ((9, 0), "80-real", True, False),  # nor on another major version
        ((9, 0), "80", True, True),  # PTX does
        ((9, 0), "80", False, False),  # with a driver that knows it
        ((8, 0), "80-virtual", False, False),
        ((8, 0), "80-virtual", True, True),
        ((7, 5), "80", True, False),
        ((9, 0), "90a-real", False, True),
        ((10, 0), "90a", True, False),  # no other device than that
        ((10, 3), "100f", False, True),  # a family
        ((11, 0), "100f", True, False),
        ((12, 1), "75-real 120-real", False, True),
    ],
)
def test_which_code_runs_where(capability, architectures, ptx, answer):
    assert _library.runs_on(capability, architectures.split(), ptx=ptx) is answer


def test_a_named_device_that_cannot_be_used_says_so(machine):
    machine.driver((12, 4))
    data = torch.randn(40, 2)
    with pytest.raises(ValueError, match=r"^fit_discriminator: device is cuda, but CUDA cannot be used: the driver"):
        rx.fit_discriminator(data, data, device="cuda")
    with pytest.raises(ValueError, match=r"^Discriminator.load: device is cuda:1, but CUDA .*device='cpu' works$"):
        rx.Discriminator.load("none.safetensors", device="cuda:1")


@pytest.mark.parametrize("device", ["meta", "xpu", "banana", "cuda:-2"])
def test_a_name_that_is_no_device_of_ours(device):
    with pytest.raises(ValueError, match=rf"^fit: device is '{device}'; supported devices are cpu and cuda$"):
        _library.usable_device("fit", device)


def test_the_driver_is_asked_by_its_own_interface(monkeypatch):
    class Driver:
        def __init__(self, status, number):
            self.status, self.number = status, number

        def cuDriverGetVersion(self, pointer):
            pointer._obj.value = self.number
            return self.status

    def answer(status, number):
        monkeypatch.setattr(_library.ctypes, "CDLL", lambda name: Driver(status, number))
        return _library.driver_version()

    assert answer(0, 12040) == (12, 4)
    assert answer(0, 13000) == (13, 0)
    assert answer(34, 0) is None  # the stub library of a toolkit

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(_library.ctypes, "CDLL", absent)
    assert _library.driver_version() is None


@pytest.mark.cuda
def test_this_gpu_is_usable():
    devices = doctor.diagnose()["cuda_devices"]
    assert runs() and devices and all(device["usable"] for device in devices)
    assert _library.driver_version() >= (12, 4)
