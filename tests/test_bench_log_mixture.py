"""The benchmarks of log-mixtures and Gaussians: every contender computes the same, the tables say what it took."""

from __future__ import annotations

import bench_gaussian_kl
import bench_log_mixture
import common
import pytest
import report
import report_common
import report_log_mixture
import torch
import torch_gaussian_kl
import torch_log_mixture
from quick_bench import measured

LIMITS = {"float32_flops_per_second": 2e11}
MORE = {"torch_exp_per_second": 1e9, "one_dimension_pairs_per_second": 4e9}


@pytest.fixture(scope="module")
def rows():
    return measured(bench_log_mixture)


@pytest.fixture(scope="module")
def gaussian_rows():
    return measured(bench_gaussian_kl)


def test_forms_agree():
    """In float64, where no form loses more than a few digits."""
    x, y, s = (
        torch.randn(30, 5, dtype=torch.float64),
        torch.randn(40, 5, dtype=torch.float64),
        torch.tensor(0.7).double(),
    )
    want = bench_log_mixture.reference(x, y, s)
    for name in ("by_cdist", "by_exact_cdist", "by_matmul", "by_attention"):
        torch.testing.assert_close(getattr(torch_log_mixture, name)(x, y, s), want, rtol=1e-11, atol=1e-11)
    value, mean = torch_log_mixture.posterior_mean(x, y, s)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(mean, ((x[:, None] - y) / s).square().sum(2).mul(-0.5).softmax(1) @ y)


@pytest.mark.parametrize("regime", ["dense", "peaked"])
def test_contenders_agree(regime):
    """The libraries too, on what the benchmark gives them; scikit-learn's trees to its own tolerance."""
    case = bench_log_mixture.forward_case((40, 50, 2), regime)
    inputs = case.inputs(common.generator("cpu"))
    want = bench_log_mixture.reference(inputs["x"], inputs["y"], inputs["s"])
    forms = {**case.contenders, "sklearn": bench_log_mixture._once(bench_log_mixture._sklearn)}
    for name, form in forms.items():
        torch.testing.assert_close(form(inputs).double(), want, rtol=1e-4, atol=2e-3, msg=name)


def test_rows(rows):
    for row in rows:
        assert all("seconds" in time for time in row["time"].values()), row
        assert row["worst_error"]["refine_ext"] <= 1e-5
    assert [row["what"] for row in rows] == list(report_log_mixture.WHAT)
    # What the differences are taken for: data far from the origin lose nothing.
    assert rows[0]["offset_error"]["refine_ext"] <= 1e-5 < rows[0]["offset_error"]["matmul"]


def test_gaussian_forms_agree():
    m, v, m0, v0, z = torch.randn(5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(torch_gaussian_kl.to_standard(m, v), torch_gaussian_kl.by_distributions(m, v))
    want = torch_gaussian_kl.by_distributions(m, v, m0, v0)
    torch.testing.assert_close(torch_gaussian_kl.between(m, v, m0, v0), want)
    want = torch_gaussian_kl.log_weights_by_distributions(z, m, v)
    torch.testing.assert_close(torch_gaussian_kl.log_weights(z, m, v), want)


def test_gaussian_rows(gaussian_rows):
    for row in gaussian_rows:
        assert all("seconds" in time for time in row["time"].values()), row
        assert row.get("relative_error", {"refine_ext": 0.0})["refine_ext"] <= 1e-6
        if small := row.get("small_error"):
            assert small["refine_ext"] <= 2e-6 < small["eager"]
    assert {row["op"] for row in gaussian_rows} == {
        f"{op}{backward}" for op in ("gaussian_kl", "importance_log_weights") for backward in ("", "_backward")
    }


def test_tables(rows, gaussian_rows):
    text = report_log_mixture.table({"rows": rows, "facts": common.facts(), "limits": LIMITS, "more_limits": MORE})
    lines = [line for line in text.splitlines() if line.startswith("| ") and "M × N" not in line]
    assert len(lines) == len(rows)
    cells = [cell.strip() for cell in lines[0].split("|")]
    ours = rows[0]["time"]["refine_ext"]["seconds"]
    assert cells[1].startswith("L, dense") and cells[2] == "40 × 30, 3"
    assert cells[4] == f"{40 * 30 / ours / 1e9:.2g}" and cells[5] == f"{40 * 30 * 3 / ours / 1e11:.0%}"
    assert cells[6] == report_common.slower(rows[0], "cdist", ours)
    assert "100 G/s here" in text and "4.0 G/s" in text
    assert report_log_mixture.best(rows[0]) in report_log_mixture.OTHERS
    text = report_log_mixture.gaussian_table({"rows": gaussian_rows, "facts": common.facts()})
    assert len([line for line in text.splitlines() if line.startswith("| ") and "| size" not in line]) == len(
        gaussian_rows
    )
    assert {"log_mixture", "gaussian_kl"} <= set(report.TABLES)


def test_limits():
    threads = torch.get_num_threads()
    found = bench_log_mixture.exp_limits("cpu", quick=True)
    assert set(found) == set(MORE) and all(value > 0 for value in found.values())
    assert torch.get_num_threads() == threads
