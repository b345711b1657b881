"""Which kernels each op launches and how long each takes: one profiled call of every benchmark's case on a GPU.

    python benchmarks/profile_kernels.py --device cuda --out kernels.json

The times are those of one call among others, a lead for where an op's time goes; the benchmarks' are the figures.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from common import OURS, Case, failure, generator, parser, save
from kernels import base_name, kernels
from torch.profiler import ProfilerActivity, profile

LARGEST = 10**7  # samples: larger cases launch the same kernels


def kernel_times(case: Case, device: str) -> dict[str, dict[str, float]]:
    """Launches and seconds on the device of each kernel in one call, after a warm-up. Empty on a CPU."""
    inputs = case.inputs(generator(device))
    run = case.contenders[OURS]
    run(inputs)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as session:
        run(inputs)
        if device == "cuda":
            torch.cuda.synchronize()
    times: dict[str, dict[str, float]] = {}
    for event in session.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = times.setdefault(base_name(event.name), {"launches": 0, "seconds": 0.0})
            entry["launches"] += 1
            entry["seconds"] += event.time_range.elapsed_us() / 1e6
    return times


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    device = arguments.device
    known = kernels()
    rows: list[dict[str, Any]] = []
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        module = importlib.import_module(path.stem)
        for case in module.cases(device, arguments.quick) if hasattr(module, "cases") else ():
            if case.n > LARGEST:
                continue
            row: dict[str, Any]
            try:
                times = kernel_times(case, device)
            except Exception as error:
                traceback.print_exc()
                row = failure(case, error)
            else:
                row = {"op": case.op, "variant": case.variant, "n": case.n, "shape": list(case.shape)}
                row["kernels"] = {name: time for name, time in times.items() if name in known}
                row["others"] = {name: time for name, time in times.items() if name not in known}
            rows.append(row)
            save(arguments.out, "kernels", rows, device)
    launched = {name for row in rows for name in row.get("kernels", {})}
    for name in known:
        seconds = [row["kernels"][name]["seconds"] for row in rows if name in row.get("kernels", {})]
        print(f"{name:28} {len(seconds):3} cases" + (f"   up to {max(seconds) * 1e6:.0f} us a call" if seconds else ""))
    print(f"{len(launched)} of {len(known)} kernels were launched")
    if any("error" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
