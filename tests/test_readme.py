"""The README's Python example runs as it stands, and its names and figures are those of the package."""

import json
import re
from pathlib import Path

import gate_results
import ledger
import numpy as np
import pytest
import report
import roofline
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_three_line_example_runs():
    example = re.search(r"^```python\n(.*?)^```", README, re.M | re.S).group(1)
    generator = np.random.default_rng(0)
    real = generator.normal(0.5, 1.0, (600, 2)).astype("float32")
    fake = torch.from_numpy(generator.normal(0.0, 1.0, (800, 2)).astype("float32"))
    names = {"real": real, "fake": fake}
    exec(compile(example, "README.md", "exec"), names)
    refined = names["refined"]
    assert refined.shape == fake.shape
    # P is Q moved by 0.5: refining must move the samples' mean towards it, by far more than its standard error.
    assert refined.mean() > fake.mean() + 0.2


def test_tables_plots_and_ledger_come_from_committed_results():
    """`python benchmarks/report.py` would change nothing: a new kernel, a changed one or a new result was reported."""
    assert report.render(README) == README
    assert ledger.render(gate_results.load(report.RESULTS)) == (report.RESULTS / "README.md").read_text()
    drawn = {path.stem: roofline.source_of(path) for path in (ROOT / "docs").glob("roofline_*.png")}
    assert drawn == {name: roofline.fingerprint(plot.rows) for name, plot in report.plots().items()}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")))
def test_results_name_their_machine_and_commit(path):
    facts = json.loads(path.read_text())["facts"]
    for key in ("date", "commit", "torch", "cpu"):
        assert facts[key]
