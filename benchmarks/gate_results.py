"""What a gate run's JSON is: written by gpu_gate.py, read by report.py and ledger.py."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
STATUSES = ("passed", "failed", "timeout", "not available", "not run")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
MOST_FAILURES = 40
MOST_CHARACTERS = 9000  # of the printed summary: what a caller may see is the end of the output


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"not a gate result: {message}")


def validate(document: dict[str, Any]) -> None:
    """Raises ValueError unless `document` is what the readers of a gate's result rely on."""
    require(document.get("gate") == FORMAT, f"format must be {FORMAT}, got {document.get('gate')!r}")
    require(document.get("device") in ("cpu", "cuda"), f"device {document.get('device')!r}")
    for key in ("date", "commit", "torch", "cpu"):
        require(bool(document.get("facts", {}).get(key)), f"facts lack {key}")
    for key in ("kernels", "ops"):
        require(bool(document.get("sources", {}).get(key)), f"sources lack {key}")
    require(bool(document.get("sections")), "no sections")
    for name, section in document["sections"].items():
        require(section.get("status") in STATUSES, f"section {name} has status {section.get('status')!r}")
        require(isinstance(section.get("seconds"), float | int), f"section {name} has no seconds")
        if name.startswith("bench_"):
            for row in section.get("rows", ()):
                require("op" in row and ("error" in row or {"time", "bytes", "n"} <= row.keys()), f"{name}: row {row}")


def rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """All benchmark rows that hold a measurement."""
    sections = [s for name, s in document["sections"].items() if name.startswith("bench_")]
    return [row for section in sections for row in section.get("rows", ()) if "time" in row]


def merged(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs by date, those of one state of the sources as one: a second call does what the first had no time for."""
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    for document in sorted(documents, key=lambda document: document["facts"]["date"]):
        key = (document["facts"]["commit"], repr(document["sources"]))
        run = runs.setdefault(key, {**document, "sections": {}})
        run["sections"] |= {n: s for n, s in document["sections"].items() if s["status"] != "not run"}
    return list(runs.values())


def load(folder: Path) -> list[dict[str, Any]]:
    """The committed runs on a GPU, gate_*.json, oldest first."""
    documents = []
    for path in sorted(folder.glob("gate_*.json")):
        document = json.loads(path.read_text())
        try:
            validate(document)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        if document["device"] == "cuda":
            documents.append(document)
    return merged(documents)


@dataclass
class TestResults:
    """pytest's results: counts, each test function's, and the failures' messages."""

    __test__ = False  # not a test class, though tests import it

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    functions: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    skip_reasons: Counter[str] = field(default_factory=Counter)

    @classmethod
    def read(cls, path: Path) -> TestResults:
        """What pytest_results.py wrote, however far it came; the last line may be cut short."""
        result = cls()
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                result._add(json.loads(line))
        return result

    def _add(self, test: dict[str, Any]) -> None:
        outcome, seconds = test["outcome"], test["seconds"]
        setattr(self, outcome, getattr(self, outcome) + 1)
        name = test["test"].partition("[")[0]
        function = self.functions.setdefault(name, {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        function[outcome] += 1
        function["seconds"] = round(function["seconds"] + seconds, 3)
        if outcome == "failed" and len(self.failures) < MOST_FAILURES:
            self.failures.append({key: test[key] for key in ("test", "message", "text")})
        if outcome == "skipped":
            self.skip_reasons[test["reason"]] += 1

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "skip_reasons": dict(self.skip_reasons)}


def device_seconds(row: dict[str, Any], name: str) -> float:
    """Of a contender's call: without the host's part where a graph was replayed."""
    time = row["time"]
    return time.get(f"{name}_graph", {}).get("seconds") or time[name]["seconds"]


def _row_line(row: dict[str, Any]) -> str:
    label = f"{row['op']} {row['variant']} {row['dtype']} {'x'.join(map(str, row['shape']))}"
    call, device = row["time"]["refine_ext"]["seconds"], device_seconds(row, "refine_ext")
    text = f"{label[:58]:58} {call * 1e6:9.1f} {device * 1e6:9.1f} {row['copy_fraction']:5.0%}"
    for name in ("eager", "compile"):
        other = row["time"].get(name, {}).get("seconds")
        text += f" {other / call:7.1f}" if other else f" {'':7}"
    return text


def _section_lines(name: str, section: dict[str, Any]) -> list[str]:
    """A section's status, and what explains one that did not pass, a few lines at most."""
    notes = [section.get("reason", ""), section.get("summary", "")]
    if "passed" in section:
        notes.append(f"{section['passed']} passed, {section['failed']} failed, {section['skipped']} skipped")
    broken = [row for row in section.get("rows", ()) if "error" in row]
    if broken:
        notes.append(f"{len(broken)} rows failed")
    details = [f"{failure['test'][:100]}: {failure['message']}" for failure in section.get("failures", ())]
    details += [f"{row['op']} {row['variant']}: {row['error']}" for row in broken]
    details = details[:5] or section.get("tail", "").splitlines()[-5:]
    first = f"{name:24} {section['status']:14} {section['seconds']:7.1f}  {'; '.join(filter(None, notes))}"
    return [first, *(f"  {detail[:200]}" for detail in details)]


def summary_table(document: dict[str, Any]) -> str:
    """What to read first: sections, failures, then the largest sizes' rows as far as they fit."""
    lines = ["", f"{'section':24} {'status':14} {'seconds':>7}"]
    for name, section in document["sections"].items():
        lines += _section_lines(name, section)
    head = f"{'':58} {'us a call':>9} {'device':>9} {'copy':>5} {'eager x':>7} {'compile':>7}"
    body = [_row_line(row) for row in sorted(rows(document), key=lambda row: -row["n"])]
    room = MOST_CHARACTERS - sum(len(line) + 1 for line in (*lines, head))
    while body and sum(len(line) + 1 for line in body) > room:
        body.pop()
    return "\n".join([*lines, head, *body] if body else lines)
