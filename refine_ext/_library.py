"""Loads the compiled libraries: `_C` and with it the CPU ops, then the CUDA kernels where torch has CUDA."""

from __future__ import annotations

import functools
from pathlib import Path

import torch  # before _C, whose libraries need torch's

from . import _C

_CUDA_LIBRARY = Path(__file__).with_name("librefine_ext_cuda.so")


@functools.cache
def cuda_status() -> tuple[bool, str]:
    """Whether the CUDA kernels are loaded, and if not, why."""
    if not _C.build_info()["cuda"] or not _CUDA_LIBRARY.exists():
        return False, "this build of refine-ext has no CUDA library (no nvcc when it was built, or REFINE_EXT_CUDA=OFF)"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} is a CPU build; install a CUDA build of torch"
    try:
        torch.ops.load_library(str(_CUDA_LIBRARY))
    except OSError as error:
        return False, f"loading {_CUDA_LIBRARY.name} failed: {error.__cause__ or error}"
    # No question to the driver: it would end the use of CUDA in processes forked from this one.
    return True, "loaded"


def require_device(function: str, argument: str, tensor: torch.Tensor) -> None:
    """Raises where `tensor`'s device has no kernels, saying why."""
    kind = tensor.device.type
    if kind == "cpu" or kind == "meta":
        return
    if kind != "cuda":
        raise ValueError(f"{function}: {argument} is on {kind}; supported devices are cpu and cuda")
    loaded, reason = cuda_status()
    if not loaded:
        raise ValueError(f"{function}: {argument} is on cuda, but the CUDA kernels are not there: {reason}")


cuda_status()
