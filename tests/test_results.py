"""What every result has: itself as JSON, as a picture, averages over samples."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import refine_ext as rx
from refine_ext.results import JSONResult, PicturedResult, SampleValues


@dataclass(frozen=True, slots=True)
class Found(JSONResult):
    value: float

    def to_dict(self):
        return {"value": self.value}


class Drawn(PicturedResult):
    drawn = 0

    def to_dict(self):
        return {}

    def _draw(self):
        from refine_ext.report import new_figure

        self.drawn += 1
        return new_figure(2, 1, "a picture")


class Numbers(SampleValues):
    def __init__(self, *values):
        self.values = torch.tensor(values, dtype=torch.float64)


def test_json(tmp_path):
    Found(0.25).save(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == {"value": 0.25}
    Found(math.inf).save(tmp_path / "found.json")  # what was there is replaced; JSON has no infinity
    assert json.loads((tmp_path / "found.json").read_text()) == {"value": None}
    assert not hasattr(Found(1.0), "__dict__")  # slots stay slots
    with pytest.raises(ValueError, match=r"^Found\.save: path must end in \.json, got '.*found\.txt'$"):
        Found(1.0).save(tmp_path / "found.txt")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        Found(1.0).save(tmp_path / "nowhere" / "found.json")
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = Drawn()
    with pytest.raises(ValueError, match=r"^Drawn\.plot: path must end in \.png, got '.*x\.pdf'$"):
        found.plot(tmp_path / "x.pdf")
    assert found.drawn == 0  # the name is looked at before any work
    found.plot(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG" and found.drawn == 1


def test_averages():
    values = [1.0, 2.0, 4.0, 9.0]
    found = Numbers(*values)
    assert found.mean == 4.0
    assert found.stderr == pytest.approx(np.std(values, ddof=1) / 2)
    assert Numbers(3.0).mean == 3.0 and math.isnan(Numbers(3.0).stderr)


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("DiffusionBound", False), ("LogLikelihood", False), ("MemorizationScore", True), ("NormBoundSearch", True),
        ("RefinementCertificate", True), ("TimeSelection", True), ("VAEBound", True),
    ],
)  # fmt: skip
def test_results_have_no_ways_of_their_own(name, picture):
    kind = getattr(rx, name)
    assert kind.__name__ == name and kind.save is JSONResult.save
    assert hasattr(kind, "plot") == picture and (not picture or kind.plot is PicturedResult.plot)
