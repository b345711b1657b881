"""What this installation is: build, SIMD level, threads, and whether CUDA loads."""

from __future__ import annotations

from typing import Any


def diagnose() -> dict[str, Any]:
    """Facts about the installed package and the machine, as plain values.

    Returns:
        A dict of strings, numbers, lists and booleans, in the order they are worth reading.

    Example:
        >>> "torch" in diagnose()
        True
    """
    import platform

    import torch

    from . import _C, __version__
    from ._library import cuda_status, device_problem, driver_version, version_text, visible_devices

    build = dict(_C.build_info())
    loaded, status = cuda_status()
    if loaded and (problem := device_problem()):
        status = f"loaded, but {problem}"
    driver = driver_version()
    return {
        "refine_ext": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "none (CPU build)",
        "threads": torch.get_num_threads(),
        "cuda_driver": "none" if driver is None else version_text(driver),
        "cuda_loaded": loaded,
        "cuda_status": status,
        "cuda_devices": [_device(i, device_problem(i)) for i in range(visible_devices()[0])],
        "build": build,
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts of `diagnose` as aligned lines."""
    build = facts["build"]
    rows = [
        ("refine_ext", facts["refine_ext"]),
        ("python", f"{facts['python']} on {facts['machine']}"),
        ("torch", f"{facts['torch']}, CUDA {facts['torch_cuda']}"),
        ("threads", facts["threads"]),
        ("SIMD level", f"{build.get('simd_level')} of {_text(build.get('simd_compiled'))}"),
        ("CUDA built", _cuda_built(build)),
        ("CUDA driver", facts["cuda_driver"] if facts["cuda_driver"] == "none" else f"CUDA {facts['cuda_driver']}"),
        ("CUDA kernels", facts["cuda_status"] if facts["cuda_loaded"] else f"not loaded: {facts['cuda_status']}"),
        ("CUDA devices", _text([_described(device) for device in facts["cuda_devices"]])),
    ]
    shown = {"version", "simd_level", "simd_compiled", "cuda", "cuda_absent", "cuda_architectures", "cuda_version"}
    rows += [(key.replace("_", " "), _text(build[key])) for key in build if key not in shown]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _device(index: int, problem: str) -> dict[str, Any]:
    import torch

    from ._library import version_text

    facts: dict[str, Any] = {"index": index, "usable": not problem, "problem": problem}
    try:
        facts["name"] = torch.cuda.get_device_name(index)
        facts["capability"] = version_text(torch.cuda.get_device_capability(index))
    except RuntimeError:  # a device that does not start: `problem` says so
        facts["name"], facts["capability"] = "unknown", "unknown"
    return facts


def _described(device: dict[str, Any]) -> str:
    text = f"{device['name']} ({device['capability']})"
    return f"{text}, not usable: {device['problem']}" if device["problem"] else text


def _cuda_built(build: dict[str, Any]) -> str:
    if not build.get("cuda"):
        return f"no: {build.get('cuda_absent')}"
    architectures = _text(build.get("cuda_architectures"))
    return f"yes, CUDA {build.get('cuda_version')}, architectures {architectures}"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
