"""What a result says about where it came from; needs neither torch nor the package."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def output_of(*command: str, cwd: Path | None = None) -> str:
    """What a command prints; empty where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str:
    """REFINE_EXT_COMMIT where the tree was copied without its history, else what git says."""
    given = os.environ.get("REFINE_EXT_COMMIT")
    return given or output_of("git", "describe", "--always", "--dirty", cwd=ROOT) or "unknown"


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on the path or where the toolkit is installed."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")


def gpu() -> dict[str, str]:
    """Name, driver, memory and clocks of the first GPU; empty where there is none."""
    keys = (
        "name",
        "driver_version",
        "compute_cap",
        "memory.total",
        "clocks.max.sm",
        "clocks.max.memory",
        "power.limit",
    )
    line = output_of("nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader").partition("\n")[0]
    return dict(zip(keys, line.split(", "), strict=False)) if line else {}


@functools.cache
def facts() -> dict[str, Any]:
    """Machine, commit and date."""
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
    }
    if card := gpu():
        result["gpu"] = card
    if nvcc := cuda_tool("nvcc"):
        result["nvcc"] = output_of(nvcc, "--version").partition("release ")[2].partition(",")[0]
    return result
