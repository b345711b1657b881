"""Timing and facts that every benchmark shares: contenders run interleaved, only ratios are compared."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import refine_ext as rx
from refine_ext import _C


def interleaved(
    contenders: dict[str, Callable[[], Any]], *, repeats: int = 7, budget: float = 20.0
) -> dict[str, dict[str, float]]:
    """Median, quartiles in seconds per call of each contender, all measured in turns after a warm-up.

    A call shorter than 0.2 ms is repeated within a turn. Turns stop after `repeats`, or once `budget` seconds are spent
    and each contender has three. A contender whose warm-up takes a sixth of the budget is not run again: that counts.
    """
    inner, times = {}, {}
    for name, run in contenders.items():
        start = time.perf_counter()
        run()
        first = time.perf_counter() - start
        if first > budget / 6:
            times[name] = [first]
            continue
        start = time.perf_counter()
        run()
        inner[name] = max(1, min(1000, int(2e-4 / max(time.perf_counter() - start, 1e-7))))
        times[name] = []
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - begin > budget:
            break
        for name, count in inner.items():
            start = time.perf_counter()
            for _ in range(count):
                contenders[name]()
            times[name].append((time.perf_counter() - start) / count)
    result = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        result[name] = {"seconds": median, "low": low, "high": high, "turns": len(values)}
    return result


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def facts() -> dict[str, Any]:
    """Machine, versions, commit and date of a result."""
    info = _C.build_info()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "refine_ext": rx.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": torch.get_num_threads(),
        "simd": info["simd_level"],
        "compiler": info["compiler"],
    }


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--out", type=Path, help="write the results as JSON")
    result.add_argument("--quick", action="store_true", help="few sizes, to see that it runs")
    return result


def save(path: Path | None, name: str, rows: list[dict[str, Any]], **extra: Any) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": name, "facts": facts(), **extra, "rows": rows}
    path.write_text(json.dumps(document, indent=1) + "\n")
