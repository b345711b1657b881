"""The README's Python example runs as it stands, and its names and figures are those of the package."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import gate_results
import ledger
import numpy as np
import pytest
import report
import roofline
import torch

import refine_ext as rx

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def test_three_line_example_runs():
    example = EXAMPLES[0]
    generator = np.random.default_rng(0)
    real = generator.normal(0.5, 1.0, (600, 2)).astype("float32")
    fake = torch.from_numpy(generator.normal(0.0, 1.0, (800, 2)).astype("float32"))
    names = {"real": real, "fake": fake}
    exec(compile(example, "README.md", "exec"), names)
    refined = names["refined"]
    assert refined.shape == fake.shape
    # P is Q moved by 0.5: refining must move the samples' mean towards it, by far more than its standard error.
    assert refined.mean() > fake.mean() + 0.2


def test_guidance_example_runs():
    diffusers = pytest.importorskip("diffusers")
    random = torch.Generator().manual_seed(0)
    real, fake, noise = (
        torch.randn(n, 2, generator=random) + shift for n, shift in ((300, 1.0), (300, 0.0), (200, 0.0))
    )
    names = {
        "rx": rx,
        "real": real,
        "fake": fake,
        "noise": noise,
        "z": noise,
        "generator": lambda z: 1.0 * z,
        "net": lambda x, sigma: x / (1 + sigma[:, None] ** 2),
        "pipe": SimpleNamespace(scheduler=diffusers.DDIMScheduler()),
    }
    plain = rx.sample_edm(names["net"], noise)
    exec(compile(EXAMPLES[1], "README.md", "exec"), names)
    # The data are the model moved by one in each coordinate; half of that is far beyond the error of 200 samples.
    assert (names["samples"] - plain).mean() > 0.5
    assert (names["z"] - noise).mean() > 0.2
    scheduler = names["pipe"].scheduler
    assert isinstance(scheduler, diffusers.DDIMScheduler)
    x = noise[:8].double()
    level = torch.ones(8, dtype=torch.float64)
    assert (names["net"](x, level) - x / 2).mean() > 0.1
    scheduler.set_timesteps(2)
    assert scheduler.step(torch.zeros(8, 2), scheduler.timesteps[0], noise[:8]).prev_sample.isfinite().all()


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
