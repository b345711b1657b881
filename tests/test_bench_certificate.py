"""The experiment on the certificate: that it can see a violation, counts rightly, continues, and what it has shown."""

from __future__ import annotations

import json
import math
import sys

import bench_certificate as bench
import pytest
import report
import report_certificate
import roofline
from bench_certificate import Records, Setting, repetition, share, summary
from known_truth import PROBLEMS, truth

import refine_ext as rx

SMALL = {"n": 60, "num_fake": 80}
RESULT = report._load("certificate")


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_repetition_obeys_the_theory(problem):
    """Identities and inequalities of every certificate, whatever the samples; 1e-9 is far above rounding."""
    record = repetition(Setting(problem, **SMALL), 0)
    assert record["converged"] and record["duality_error"] <= record["duality_gap"] + 1e-9
    assert record["training"] < record["no_confidence"] < record["bound"] <= record["bound_by_duality"] + 1e-9
    assert record["unrefined_bound"] - record["bound"] == pytest.approx(record["gain"], abs=1e-9)
    # by the triangle inequality through P_n
    assert abs(record["truth"] - record["training"]) <= record["deviation"] + 1e-9
    assert record["truth"] <= record["bound"] and record["certified_improvement"] <= record["improvement"]
    assert 0 < record["effective_share"] <= 1
    assert ("generator" in record) == (truth(problem).nodes is not None)


def test_a_repetition_is_reproducible_and_shares_its_samples():
    """The same samples under every divergence and B, so that settings are compared on them; others in the next."""
    base = Setting("mixture, 2-D, hull", **SMALL)
    first, again, other = repetition(base, 3), repetition(base, 3), repetition(base, 4)
    for record in (first, again, other):
        record.pop("seconds")
    assert first == again
    assert first["deviation"] != other["deviation"]
    for change in ({"norm_bound": 0.5}, {"divergence": "jensen_shannon"}):
        varied = repetition(Setting("mixture, 2-D, hull", **SMALL, **change), 3)
        assert varied["deviation"] == first["deviation"] and varied["truth"] != first["truth"]
        # over B: the unrefined model's does not depend on it
        assert varied["unrefined_bound"] == pytest.approx(first["unrefined_bound"], rel=1e-9)


def test_the_refined_generator_of_another_sample_is_not_the_refined_sample():
    """Of many generated samples both agree, as the sample's average tends to the generator's."""
    few, many = (repetition(Setting("mixture, 2-D", n=100, num_fake=number), 0) for number in (30, 30_000))
    assert abs(few["generator"] - few["truth"]) > 5 * abs(many["generator"] - many["truth"])
    assert many["generator"] == pytest.approx(many["truth"], abs=5 / math.sqrt(30_000))


def test_violations_are_seen_and_counted():
    """A model that is the truth: refinement fits noise, and the truth exceeds nearly every training IPM."""
    setting = Setting("mixture, perfect model", n=50, num_fake=50)
    records = [repetition(setting, index) for index in range(20)]
    row = summary(setting, records)
    assert row["repetitions"] == 20 and row["converged"] == 20
    assert row["violated"]["training"]["count"] >= 15 and row["violated"]["bound"]["count"] == 0
    for record in records[:3]:  # a bound that is wrong three times
        record["bound"] = 0.5 * record["truth"]
    violated = summary(setting, records)["violated"]["bound"]
    assert violated["count"] == 3 and violated["low"] < 0.15 < violated["high"]


def test_what_is_proven_is_what_two_margins_leave():
    setting = Setting("digits, hull", **SMALL)
    record = repetition(setting, 0)
    assert not bench.is_proven(record)
    margin = record["bound"] - record["training"]
    assert bench.is_proven({**record, "gain": 2.01 * margin}) and not bench.is_proven({**record, "gain": 1.99 * margin})
    row = summary(setting, [record, {**record, "gain": 2.01 * margin}])
    assert row["better_where_proven"]["of"] == 1 and row["better_where_gained"]["of"] == 2


def test_the_margin_that_is_needed():
    """Of 40 deviations 1 ... 40 the two largest are one in twenty: 38 is exceeded by them and by no more."""
    record = repetition(Setting("mixture, one function", **SMALL), 0)
    records = [{**record, "deviation": float(size), "bound": record["training"] + 76.0} for size in range(40, 0, -1)]
    row = summary(Setting("mixture, one function", **SMALL), records)
    assert row["deviation_needed"] == 38.0 and row["margin_over_needed"] == pytest.approx(2.0)


def test_intervals():
    """Of none in n, 1 - 0.025^(1/n); of one in two, by hand: x^2 = 0.025 and (1 - x)^2 = 0.025."""
    none = share([False] * 400)
    assert none["low"] == 0.0 and none["high"] == pytest.approx(1 - 0.025 ** (1 / 400), rel=1e-9)
    half = share([True, False])
    assert half["low"] == pytest.approx(1 - math.sqrt(0.975), rel=1e-9)
    assert half["high"] == pytest.approx(math.sqrt(0.975), rel=1e-9)
    assert share([]) == {"count": 0, "of": 0, "low": 0.0, "high": 1.0}


def test_settings_vary_one_thing_at_a_time():
    listed = bench.settings(quick=False)
    assert len(set(listed)) == len(listed)
    for problem in PROBLEMS:
        own = [s for s in listed if s.problem == problem]
        base = Setting(problem)
        assert base in own
        assert all(sum(getattr(s, k) != getattr(base, k) for k in vars(base)) <= 1 for s in own)
        assert {s.norm_bound for s in own} == set(bench.NORM_BOUNDS)
    assert {key: getattr(base, key) for key in report_certificate.BASE} == report_certificate.BASE


def test_records_continue(tmp_path, monkeypatch):
    """A run that is cut short, even within a line, continues to the same numbers; another commit's is refused."""
    path, keys = tmp_path / "c.jsonl", [(Setting("mixture, 2-D", **SMALL), index) for index in range(3)]
    records = Records(path)
    for key in keys:
        records.add(key, repetition(*key))
    whole = path.read_text()
    path.write_text(whole[:-40])
    again = Records(path)
    assert list(again.found) == keys[:2] and path.read_text() == "".join(whole.splitlines(keepends=True)[:3])
    again.add(keys[2], repetition(*keys[2]))
    assert list(Records(path).rows()) == list(records.rows())
    monkeypatch.setattr(bench, "commit", lambda: "another")
    with pytest.raises(ValueError, match=r"c\.jsonl: made with .*, this is another; remove it to begin anew"):
        Records(path)


def test_command_line(tmp_path, monkeypatch, capsys):
    """--quick makes one setting of every problem twice, a table and a picture; once more makes nothing anew."""
    out = tmp_path / "results" / "certificate.json"
    monkeypatch.setattr(sys, "argv", ["bench_certificate.py", "--quick", "--out", str(out)])
    bench.main()
    assert len(capsys.readouterr().out.splitlines()) == len(PROBLEMS)
    document = json.loads(out.read_text())
    assert [row["problem"] for row in document["rows"]] == list(PROBLEMS)
    assert all(row["repetitions"] == 2 for row in document["rows"])
    monkeypatch.setattr(rx, "refinement_certificate", None, raising=False)
    bench.main()
    assert json.loads(out.read_text())["rows"] == document["rows"]


@pytest.mark.skipif(RESULT is None, reason="no committed result")
def test_what_the_committed_run_shows():
    """In every setting: at most delta violated, everything solved, what was proven true; and the weaker bounds fail."""
    rows, delta = RESULT["rows"], RESULT["delta"]
    assert {row["problem"] for row in rows} == set(PROBLEMS)
    for row in rows:
        assert row["violated"]["bound"]["high"] < delta and row["unrefined_violated"]["high"] < delta
        assert row["duality_violated"]["high"] < delta and row["improvement_violated"]["high"] < delta
        for proven in ("better_where_proven", "improved_where_certified"):
            assert row[proven]["count"] == row[proven]["of"]
        assert row["converged"] == row["repetitions"] >= 200
        assert row["largest_duality_excess"] < 1e-7
    one = next(row for row in rows if row["problem"] == "mixture, one function" and row["n"] == 10_000)
    assert one["violated"]["no_confidence"]["low"] > delta
    for proven in report_certificate.PROVEN:
        assert sum(row[proven]["of"] for row in rows) > 0
    assert roofline.source_of(report.ROOT / "docs" / "certificate.png") == roofline.fingerprint(rows)
    assert "| digits, hull |" in report_certificate.table(RESULT)
