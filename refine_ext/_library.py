"""Loads the compiled libraries: `_C` and with it the CPU ops, then the CUDA kernels where torch has CUDA.

Importing asks the driver for its version and nothing else. Counting the devices would initialise CUDA, and a process
that is forked afterwards could not use it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import warnings
from pathlib import Path

import torch  # before _C, whose libraries need torch's

from . import _C

_CUDA_LIBRARY = Path(__file__).with_name("librefine_ext_cuda.so")
# By the major version of the toolkit: the oldest driver, and the CUDA version that it reports. Within a major version
# newer toolkits run on older drivers, but code that nvcc compressed for size is unpacked by CUDA 12.4's and newer ones.
_OLDEST_DRIVER = {12: ("550", (12, 4)), 13: ("580", (13, 0))}


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver supports, None without a driver. Does not initialise CUDA."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def visible_devices() -> tuple[int, str]:
    """How many devices torch can use, and what it warned of while counting. Initialises the driver."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, "; ".join(str(warning.message).splitlines()[0] for warning in caught)


@functools.cache
def cuda_status() -> tuple[bool, str]:
    """Loads the CUDA kernels: whether they are there, and if not, why. Does not initialise CUDA."""
    build = _C.build_info()
    if not build["cuda"]:
        return False, f"this build of refine-ext has no CUDA library: {build['cuda_absent']}"
    if not _CUDA_LIBRARY.exists():
        return False, f"{_CUDA_LIBRARY} is missing; reinstall refine-ext"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} is a CPU build; install a CUDA build of torch"
    if problem := _driver_problem(_version(build["cuda_version"]), driver_version()):
        return False, problem
    try:
        torch.ops.load_library(str(_CUDA_LIBRARY))
    except OSError as error:
        return False, f"loading {_CUDA_LIBRARY.name} failed: {error.__cause__ or error}"
    return True, "loaded"


def device_problem(index: int | None = None) -> str:
    """Why the loaded kernels cannot run on a CUDA device (any, or the one with this index), empty where they can."""
    count, warned = visible_devices()
    if count == 0:
        return _no_device(warned)
    if index is not None and index >= count:
        return f"there is no device {index}, torch finds {count}"
    problems = [_capability_problem(i) for i in (range(count) if index is None else [index])]
    return "" if "" in problems else problems[0]


def require_device(function: str, argument: str, tensor: torch.Tensor) -> None:
    """Raises where `tensor`'s device has no kernels, saying why."""
    kind = tensor.device.type
    # While torch.compile or torch.export traces, the tensors are fake and need no device.
    if kind == "cpu" or kind == "meta" or torch.compiler.is_compiling():
        return
    if kind != "cuda":
        raise ValueError(f"{function}: {argument} is on {kind}; supported devices are cpu and cuda")
    if problem := _problem(tensor.device.index):
        raise ValueError(f"{function}: {argument} is on cuda, but the CUDA kernels cannot run: {problem}")


def usable_device(function: str, device: str | torch.device) -> torch.device:
    """The device that the caller named; raises where nothing can run on it, saying why."""
    try:
        where = torch.device(device)
    except RuntimeError:
        where = None
    if where is None or where.type not in ("cpu", "cuda"):
        raise ValueError(f"{function}: device is {str(device)!r}; supported devices are cpu and cuda")
    if where.type == "cuda" and (problem := _problem(where.index)):
        raise ValueError(f"{function}: device is {where}, but CUDA cannot be used: {problem}. device='cpu' works")
    return where


@functools.cache
def _problem(index: int | None) -> str:
    loaded, reason = cuda_status()
    return device_problem(index) if loaded else reason


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def version_text(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)


def _driver_problem(built: tuple[int, int], driver: tuple[int, int] | None) -> str:
    name, oldest = _OLDEST_DRIVER.get(built[0], ("", (built[0], 0)))
    if driver is None or driver >= oldest:
        return ""
    needs = f"{version_text(oldest)} (driver {name} or newer)" if name else version_text(oldest)
    return f"the driver supports CUDA {version_text(driver)}, this build of refine-ext needs {needs}"


def _no_device(warned: str) -> str:
    driver, visible = driver_version(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver is None:
        return "there is no NVIDIA driver (libcuda.so.1 was not found or does not work)"
    if torch.version.cuda and driver[0] < _version(torch.version.cuda)[0]:
        return f"the driver supports CUDA {version_text(driver)}, torch {torch.__version__} needs {torch.version.cuda}"
    if visible is not None:
        return f"torch finds no device with CUDA_VISIBLE_DEVICES={visible!r}"
    return f"torch finds no device{': ' + warned if warned else ''}"


def _capability_problem(index: int) -> str:
    try:
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    except RuntimeError as error:
        return f"device {index} does not start: {str(error).splitlines()[0]}"
    build, driver = _C.build_info(), driver_version()
    architectures, built = build["cuda_architectures"], _version(build["cuda_version"])
    if runs_on(capability, architectures, ptx=driver is None or driver >= built):
        return ""
    has = f"{name} has compute capability {version_text(capability)}, this build is for {', '.join(architectures)}"
    if driver is not None and runs_on(capability, architectures, ptx=True):
        return f"{has}; its PTX needs a driver for CUDA {version_text(built)}, this one supports {version_text(driver)}"
    return f"{has}; build for it with REFINE_EXT_CUDA_ARCHITECTURES={capability[0]}{capability[1]}"


def runs_on(capability: tuple[int, int], architectures: list[str], ptx: bool) -> bool:
    """Whether code for `architectures`, named as CMake does, runs on a device; `ptx`: the driver can compile it.

    Machine code runs on the same major version from its minor version on, PTX on everything newer; `a` marks code for
    one device only, `f` code for one major version.
    """
    for architecture in architectures:
        number, suffix, kind = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", architecture).groups()  # type: ignore[union-attr]
        built = (int(number) // 10, int(number) % 10)
        same = capability == built if suffix == "a" else capability[0] == built[0] and capability >= built
        newer = same if suffix else capability >= built
        if (kind != "-virtual" and same) or (kind != "-real" and ptx and newer):
            return True
    return False


cuda_status()
