"""What the tables share: the committed results, and how their figures are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from traffic import traffic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def complete(benchmark: str, row: dict[str, Any]) -> dict[str, Any]:
    """A measured row, with what rows were written without before they had to be told from others' rows."""
    known = {"op": benchmark, "variant": row.get("divergence"), "dtype": "float32", **row}
    known["itemsize"] = ITEMSIZE[known["dtype"]]
    if "bytes" not in row:
        known["bytes"] = traffic(benchmark, row["n"], known["itemsize"], known["variant"]).streamed
    return known


def measured(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [complete(document["benchmark"], row) for row in document["rows"] if "time" in row]


def times(value: float) -> str:
    return f"{value:.0f}×" if value >= 10 else f"{value:.1f}×"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} µs"


def slower(row: dict[str, Any], name: str, ours: float) -> str:
    seconds = row["time"].get(name, {}).get("seconds")
    return times(seconds / ours) if seconds else "–"


def machine(facts: dict[str, Any]) -> str:
    return f"{facts['cpu']} ({facts['simd']}), {versions(facts)}"


def versions(facts: dict[str, Any]) -> str:
    return f"torch {facts['torch']}, {commit(facts)}"


def commit(facts: dict[str, Any]) -> str:
    return f"commit {facts['commit']}, {facts['date']}"
