"""A pytest plugin that writes each test's outcome as it is known, a JSON line each: `-p pytest_results --results FILE`.

Unlike a JUnit file, which pytest writes last, it keeps what a killed or crashed run had found out.
"""

from __future__ import annotations

import json

import pytest

_CHARACTERS = 1500  # of a failure's text, the end


class Recorder:
    def __init__(self, path: str) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test's call decides; its setup and teardown only count where they fail or skip.
        if report.when != "call" and report.outcome == "passed":
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            line["text"] = report.longreprtext[-_CHARACTERS:]
            line["message"] = str(crash.message if crash else line["text"].strip().rpartition("\n")[2])[:500]
        elif report.outcome == "skipped":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
            line["reason"] = str(reason).removeprefix("Skipped: ")[:200]
        with open(self._path, "a") as results:
            results.write(json.dumps(line) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", help="file for the outcomes")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--results")
    if path and not hasattr(config, "workerinput"):  # xdist's workers report to the main process
        config.pluginmanager.register(Recorder(path))
