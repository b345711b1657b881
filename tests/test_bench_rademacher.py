"""The benchmark of Rademacher complexities: every contender computes the same, and the table says what it took."""

from __future__ import annotations

import bench_rademacher
import common
import pytest
import report
import report_common
import report_rademacher
import torch
import torch_rademacher
from quick_bench import measured

LIMITS = {"float32_flops_per_second": 2e11}


@pytest.fixture(scope="module")
def rows():
    return measured(bench_rademacher)


def test_contenders_agree():
    """On the same signs, up to the roundings of bfloat16: 2^-8 of each value and of each sum."""
    for norm in (False, True):
        case = bench_rademacher.supremum_case((50, 6, 40), norm=norm)
        inputs = case.inputs(common.generator("cpu"))
        ours = case.contenders["refine_ext_op"](inputs).mean()
        for name in ("mm", "mm medium", "mm bfloat16"):
            torch.testing.assert_close(case.contenders[name](inputs).double(), ours, rtol=0.02, atol=0.0)
        mean = float(case.contenders["refine_ext"](inputs).mean)
        assert mean == pytest.approx(float(ours))
        # Signs of its own: 40 draws' standard error is about 0.06 of the mean.
        assert float(case.contenders["user"](inputs)) == pytest.approx(mean, rel=0.4)


def test_rows(rows):
    for row in rows:
        assert all("seconds" in time for time in row["time"].values()), row
        assert row.get("relative_error", {"refine_ext": 0.0})["refine_ext"] <= 1e-6
    assert [row["what"] for row in rows] == list(report_rademacher.WHAT)


def test_table(rows):
    document = {"rows": rows, "facts": common.facts(), "limits": LIMITS}
    text = report_rademacher.table(document)
    lines = [line for line in text.splitlines() if line.startswith("| ") and "n × m" not in line]
    assert len(lines) == len(rows)
    cells = [cell.strip() for cell in lines[0].split("|")]
    ours = rows[0]["time"]["refine_ext"]["seconds"]
    assert cells[2] == "64 × 8, 32" and float(cells[4]) == round(64 * 8 * 32 / ours / 1e9)
    assert cells[5] == report_common.slower(rows[0], "user", ours)
    assert "does 100 G/s here" in text and "rademacher" in report.TABLES


def test_precision_is_put_back():
    before = torch.get_float32_matmul_precision()
    seen = torch_rademacher.at_precision(
        "medium", lambda: torch.tensor(torch.get_float32_matmul_precision() == "medium")
    )()
    assert seen and torch.get_float32_matmul_precision() == before
