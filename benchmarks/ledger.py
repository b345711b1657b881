"""benchmarks/results/README.md: at which commit a GPU last verified and measured every CUDA kernel and op."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gate_results
import kernels
from kernels import ROOT, Source

Run = dict[str, Any]

HEAD = """\
# Results

JSON files written by the benchmarks beside this folder, each with machine, versions, commit and date. From them
`python benchmarks/report.py` makes the tables of the README and of `docs/measured.md`, the plots and this page; a test
compares.

## What a GPU has said about the CUDA kernels

`benchmarks/gpu_gate.sh OUT` runs everything below on a GPU; its `gate.json`, committed here as `gate_<commit>.json`,
fills these tables. A kernel or op counts as tested at a commit where the whole of `pytest -m cuda` passed, as checked
where all four tools of compute-sanitizer found nothing, as measured where a profile, or a benchmark, saw it run.
*Changed since*: its file, or one that it includes, is another now; for an op the files of its family that launch the
kernels too. Comments do not count, and neither do compiler options.

Without a GPU all of them compile for sm_80 and sm_90, their sources run on the CPU under address, undefined-behaviour
and race checking (`tests/cuda_on_cpu`), and their machine code is read (`tests/test_cuda_binary.py`).
"""


def _passed(run: Run, *names: str) -> bool:
    return all(run["sections"].get(name, {}).get("status") == "passed" for name in names)


def tested(run: Run, name: str) -> bool:
    return _passed(run, "tests")


def checked(run: Run, name: str) -> bool:
    return _passed(run, *gate_results.SANITIZERS)


def kernel_measured(run: Run, name: str) -> bool:
    rows = run["sections"].get("kernels", {}).get("rows", ())
    return any(name in row.get("kernels", ()) for row in rows)


def op_measured(run: Run, name: str) -> bool:
    """A row of an op times it with a new output and with a given one, where it has both."""
    return any(row["op"] == name.removesuffix("_out") for row in gate_results.rows(run))


def _last(runs: list[Run], kind: str, name: str, source: Source, holds: Callable[[Run, str], bool]) -> str:
    """The last commit at which `holds` was seen: of these very sources if there is one, else of earlier ones."""
    seen = [run for run in runs if name in run["sources"][kind] and holds(run, name)]
    same = [run for run in seen if run["sources"][kind][name] == source.hash]
    if same:
        return f"`{same[-1]['facts']['commit']}`"
    return f"`{seen[-1]['facts']['commit']}`, changed since" if seen else "never"


def _table(runs: list[Run], kind: str, found: dict[str, Source], measured: Callable[[Run, str], bool]) -> list[str]:
    lines = [f"| {kind[:-1]} | in | `pytest -m cuda` | compute-sanitizer | measured |", "|---|---|---|---|---|"]
    current = 0
    for name, source in found.items():
        cells = [_last(runs, kind, name, source, holds) for holds in (tested, checked, measured)]
        current += all(cell != "never" and "changed" not in cell for cell in cells[:2])
        lines.append(f"| `{name}` | `{source.file}` | " + " | ".join(cells) + " |")
    return [f"{current} of {len(found)} {kind} are tested and checked as they are now.", "", *lines]


def _run_line(run: Run) -> str:
    facts = run["facts"]
    states = ", ".join(f"{name} {section['status']}" for name, section in run["sections"].items())
    card = facts.get("gpu", {})
    device = f"{card.get('name', 'unknown GPU')}, driver {card.get('driver_version', 'unknown')}"
    return f"- `{facts['commit']}`, {facts['date']}: {device}, torch {facts['torch']}. {states}."


def render(runs: list[Run], root: Path = ROOT) -> str:
    lines = ["### Kernels", "", *_table(runs, "kernels", kernels.kernels(root), kernel_measured)]
    lines += ["", "### Ops", "", *_table(runs, "ops", kernels.ops(root), op_measured)]
    lines += ["", "### Runs", "", *([_run_line(run) for run in runs] or ["None yet."])]
    return HEAD + "\n" + "\n".join(lines) + "\n"
