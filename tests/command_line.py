"""What tests of the commands share: runs here and in a child, the figures written, files larger than memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from refine_ext.cli import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def figures(folder: Path, *arguments: object) -> dict:
    """What the command writes with --json."""
    target = folder / "out.json"
    result = run(*arguments, "--json", target)
    assert result.exit_code == 0, result.output
    return json.loads(target.read_text())


def run_child(script: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def sparse_rows(
    path: Path, rows: int, features: int, every: int, changed: Callable[[np.ndarray, int], np.ndarray]
) -> None:
    """float64 rows as a sparse .npy: of so many rows one is `changed(random numbers, row)`, the others are holes, which
    read as zeros."""
    block = np.random.default_rng(0).normal(size=features)
    with open(path, "wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (rows, features)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        file.truncate(start + rows * features * 8)
        for row in range(0, rows, every):
            file.seek(start + row * features * 8)
            file.write(changed(block, row).tobytes())
