"""The gate without a GPU: its rehearsal, its limits, a stand-in for the sanitizer, and what is made of results."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gate_results
import gpu_gate
import kernels
import ledger
import pytest
import report
import report_common
import report_kernels
import roofline

ROOT = Path(__file__).resolve().parent.parent
GATE = str(ROOT / "benchmarks" / "gpu_gate.sh")


def run_gate(out: Path, *arguments: str) -> tuple[int, str, dict]:
    environment = {**os.environ, "PYTHON": sys.executable, "REFINE_EXT_COMMIT": "abc1234"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # what the small tests do not need takes seconds to load
    done = subprocess.run(
        [GATE, str(out), "--rehearse", *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    return done.returncode, done.stdout + done.stderr, json.loads((out / "gate.json").read_text())


def test_a_failing_section_leaves_the_others(tmp_path):
    (tmp_path / "test_tiny.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_bad(n): assert n == 1, 'two is wrong'\n"
        "def test_skipped(): pytest.skip('no such device')\n"
    )
    code, printed, document = run_gate(tmp_path / "out", "--tests", str(tmp_path))
    gate_results.validate(document)
    sections = document["sections"]
    assert code == 1 and "failed: tests" in printed
    tests = sections["tests"]
    assert (tests["status"], tests["passed"], tests["failed"], tests["skipped"]) == ("failed", 2, 1, 1)
    assert "two is wrong" in tests["failures"][0]["text"] and "two is wrong" in printed
    assert tests["skip_reasons"] == {"no such device": 1}
    (function,) = (counts for name, counts in tests["functions"].items() if name.endswith("test_bad"))
    assert (function["passed"], function["failed"]) == (1, 1)
    for name in ("facts", "bench_density_ratio", "bench_resampling", "bench_variational_bound", "kernels"):
        assert sections[name]["status"] == "passed", (name, sections[name])
    assert {sections[name]["status"] for name in ("build", *gate_results.SANITIZERS)} == {"not run"}
    assert document["facts"]["commit"] == "abc1234"
    assert document["sources"] == kernels.record()
    assert {row["op"] for row in gate_results.rows(document)} >= {"density_ratio", "variational_bound", "resample"}
    assert "two is wrong" in (tmp_path / "out" / "gate.log").read_text()


def test_a_time_limit_keeps_the_results_so_far_and_kills_children(tmp_path):
    pid = tmp_path / "pid"
    (tmp_path / "test_slow.py").write_text(
        "import subprocess, sys\n"
        "def test_first(): pass\n"
        "def test_hangs():\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"    open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "    child.wait()\n"
    )
    code, printed, document = run_gate(
        tmp_path / "out", "--tests", str(tmp_path), "--only", "tests", "--limit", "tests=15"
    )
    tests = document["sections"]["tests"]
    assert code == 1 and tests["status"] == "timeout" and 15 <= tests["seconds"] < 30, printed
    assert tests["passed"] == 1
    for _ in range(50):
        if not _runs(int(pid.read_text())):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the test's child outlived the gate")
    assert set(document["sections"]) == {"facts", "build", "tests"}


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.fixture
def gate(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_tiny.py").write_text(
        "import pytest\n@pytest.mark.cuda\n@pytest.mark.sanitizer\ndef test_good(): pass\n"
    )
    result = gpu_gate.Gate(tmp_path, "cuda", True, tmp_path / "tests", dict(gpu_gate.LIMITS), time.monotonic() + 300)
    result.environment = dict(os.environ)
    result.document = {"sections": {}}
    return result


READ = "Invalid __global__ read of size 4 bytes"
PLACE = "at void scan_kernel<float>(int)+0x70"
STAND_IN = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
{before}
while [ "$1" != "{python}" ]; do shift; done
"$@"; code=$?
echo "{summary}"
exit {code}
"""


@pytest.mark.parametrize(
    ("summary", "code", "before", "status"),
    [
        ("========= ERROR SUMMARY: 0 errors", "$code", "", "passed"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "$code", "", "passed"),
        ("========= ERROR SUMMARY: 10 errors", "86", f'echo "========= {READ}\n=========     {PLACE}"', "failed"),
        # Findings must fail the section even where the tool exits as if there were none.
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", "0", "", "failed"),
        ("the tool died", "0", "", "failed"),
        ("", "1", 'echo "========= Error: Device not supported"; exit 1', "not available"),
    ],
)
def test_sanitizer_section(gate, tmp_path, monkeypatch, summary, code, before, status):
    program = tmp_path / "compute-sanitizer"
    program.write_text(STAND_IN.format(before=before, summary=summary, code=code, python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(gpu_gate.machine, "cuda_tool", lambda name: str(program))
    section = gpu_gate.sanitize(gate, "memcheck")
    assert section["status"] == status, section
    if READ in before:
        assert section["reports"] == [f"{READ} {PLACE}"]


def test_sanitizer_section_without_tests_or_tool(gate, monkeypatch):
    monkeypatch.setattr(gpu_gate.machine, "cuda_tool", lambda name: None)
    assert gpu_gate.sanitize(gate, "memcheck")["status"] == "not available"
    (gate.tests / "test_tiny.py").write_text("import pytest\n@pytest.mark.cuda\ndef test_other(): pass\n")
    section, _ = gpu_gate.run_tests(gate, "tests", "tests", [], "cuda and sanitizer", "-p", "no:xdist")
    assert section["status"] == "failed"


def test_broken_build_and_broken_section(gate, monkeypatch):
    def broken(gate):
        raise RuntimeError("a mistake")

    monkeypatch.setitem(gpu_gate.GROUPS, "tests", broken)
    gpu_gate.run_group(gate, "tests")
    assert gate.document["sections"]["tests"]["reason"] == "RuntimeError: a mistake"
    gate.document["sections"]["build"] = {"status": "failed", "seconds": 1.0}
    gpu_gate.run_group(gate, "benchmarks")
    assert gate.document["sections"]["benchmarks"]["status"] == "not run"


# ---- what is made of results


def passed(**more) -> dict:
    return {"status": "passed", "seconds": 1.0, **more}


def row(op: str, variant: str, n: int, **more) -> dict:
    each = {"copy": 2e-12, "refine_ext": 4e-12, "eager": 4e-11}
    time = {name: {"seconds": seconds * n} for name, seconds in each.items()} | {"compile": {"error": "no compiler"}}
    sizes = {"shape": [n], "n": n, "bytes": 12 * n, "bytes_once": 8 * n}
    return {"op": op, "variant": variant, "dtype": "float32", **sizes, "time": time, "copy_fraction": 0.75, **more}


@pytest.fixture
def run() -> dict:
    """A gate's result as if all had passed on a GPU."""
    found = kernels.record()
    facts = {"date": "2026-01-02", "commit": "aaa0001", "torch": "2.11.0+cu130", "cpu": "a CPU"}
    facts["gpu"] = {"name": "a GPU", "driver_version": "580.1"}
    sections = {name: passed() for name in ("facts", "build", "tests", *gate_results.SANITIZERS)}
    rows = [row("density_ratio", family, n) for family in ("kl", "gan") for n in (10**5, 10**7)]
    rows.append(row("resample", "systematic num=10000000", 10**7, method="systematic", num=10**7))
    sections["bench_density_ratio"] = passed(rows=rows, limits={"copy_bytes_per_second": 4e12})
    launched = {name: {"launches": 1, "seconds": 1e-6} for name in found["kernels"] if name != "settle_kernel"}
    sections["kernels"] = passed(rows=[{"op": "density_ratio", "variant": "kl", "n": 1, "kernels": launched}])
    document = {"gate": gate_results.FORMAT, "device": "cuda", "facts": facts, "sources": found, "sections": sections}
    gate_results.validate(document)
    return document


def cells(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    return [cell.strip() for cell in line.split("|")[3:-1]]


def test_ledger_of_a_run_whose_sources_stay(run):
    text = ledger.render([run])
    assert cells(text, "scan_kernel") == ["`aaa0001`"] * 3
    assert cells(text, "settle_kernel") == ["`aaa0001`", "`aaa0001`", "never"]
    assert cells(text, "density_ratio") == cells(text, "density_ratio_out") == ["`aaa0001`"] * 3
    assert cells(text, "rejection") == ["`aaa0001`", "`aaa0001`", "never"]
    count = len(run["sources"]["kernels"])
    assert f"{count} of {count} kernels are tested and checked as they are now." in text


def test_ledger_says_changed_since_and_never(run):
    run["sources"]["kernels"]["scan_kernel"] = "another"
    del run["sources"]["ops"]["resample"]
    run["sections"]["racecheck"]["status"] = "failed"
    text = ledger.render([run])
    assert cells(text, "scan_kernel") == ["`aaa0001`, changed since", "never", "`aaa0001`, changed since"]
    assert cells(text, "write_kernel") == ["`aaa0001`", "never", "`aaa0001`"]
    assert cells(text, "resample") == ["never"] * 3
    run["sections"]["tests"]["status"] = "timeout"
    assert cells(ledger.render([run]), "write_kernel")[0] == "never"


def test_a_second_call_completes_the_first_and_the_last_commit_counts(run, tmp_path):
    first, second, later = run, copy.deepcopy(run), copy.deepcopy(run)
    first["sections"]["tests"] = {"status": "not run", "seconds": 0.0}
    second["sections"] = {"tests": passed()}
    later["facts"] |= {"commit": "bbb0002", "date": "2026-02-01"}
    later["sections"]["tests"]["status"] = "failed"
    rehearsal = {**copy.deepcopy(run), "device": "cpu"}
    for name, document in {"z": first, "y": second, "a": later, "b": rehearsal}.items():
        (tmp_path / f"gate_{name}.json").write_text(json.dumps(document))
    runs = gate_results.load(tmp_path)
    assert [r["facts"]["commit"] for r in runs] == ["aaa0001", "bbb0002"]
    assert cells(ledger.render(runs), "scan_kernel") == ["`aaa0001`", "`bbb0002`", "`bbb0002`"]


def test_summary_fits_what_a_caller_sees(run):
    """However much failed or was measured; the largest sizes stay."""
    failures = [{"test": "t" * 300, "message": "m" * 500, "text": ""}] * 40
    for name in ("tests", *gate_results.SANITIZERS):
        run["sections"][name] |= {"status": "failed", "passed": 0, "failed": 40, "skipped": 0, "failures": failures}
    run["sections"]["build"] |= {"status": "failed", "tail": "a line\n" * 400 + "error: no such header"}
    bench = run["sections"]["bench_density_ratio"]
    bench["rows"] = [row("density_ratio", "kl", 10 + n) for n in range(300)]
    text = gate_results.summary_table(run)
    assert len(text) < 12_000 and "error: no such header" in text
    assert "309" in text and "kl float32 10 " not in text


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(gate=0),
        lambda d: d["facts"].pop("commit"),
        lambda d: d["sections"]["tests"].update(status="fine"),
        lambda d: d["sections"]["bench_density_ratio"]["rows"][0].pop("bytes"),
        lambda d: d.update(sources={}),
    ],
)
def test_damaged_results_are_refused(run, tmp_path, damage):
    damage(run)
    (tmp_path / "gate_x.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"gate_x\.json: not a gate result"):
        gate_results.load(tmp_path)


def test_hashes_follow_what_a_kernel_includes_but_no_comment(tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    before = kernels.record(tmp_path)
    assert before == kernels.record()
    sources = [path for path in (ROOT / "csrc" / "cuda").glob("*.cu*")]
    written = sum(kernels.COMMENT.sub(" ", path.read_text()).count("__global__") for path in sources)
    assert len(before["kernels"]) == written
    header = tmp_path / "csrc" / "cuda" / "density_ratio_dual.cuh"
    header.write_text(header.read_text() + "// a remark\n\n/* another */\n")
    assert kernels.record(tmp_path) == before
    header.write_text(header.read_text() + "inline int added = 0;\n")
    after = kernels.record(tmp_path)
    changed = {name for kind in after for name in after[kind] if after[kind][name] != before[kind][name]}
    assert {"backward_kernel", "density_ratio", "dual_output"} <= changed
    assert not changed & {"scan_kernel", "draw_kernel", "resample"}
    # What every kernel includes.
    header = tmp_path / "csrc" / "cuda" / "launch.h"
    header.write_text(header.read_text() + "inline int more = 0;\n")
    last = kernels.record(tmp_path)
    assert all(last[kind][name] != after[kind][name] for kind in last for name in last[kind])


def test_kernel_names_of_a_profile():
    long = "void refine_ext::cuda::(anonymous namespace)::scan_kernel<float, false, true>(refine_ext::cuda::RowProblem)"
    assert kernels.base_name(long) == "scan_kernel"
    assert kernels.base_name("refine_ext::cuda::unit_kernel(refine_ext::cuda::DrawWorkspace)") == "unit_kernel"


def test_tables_and_plots_of_a_gpu_appear_with_its_results(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report_common, "RESULTS", tmp_path)
    text = "<!-- table: gpu -->\n<!-- end -->\n<!-- table: resampling -->\n<!-- end -->\n"
    assert report.render(text) == text and report.plots() == {}
    (tmp_path / "gate_x.json").write_text(json.dumps(run))
    table = report_kernels.gpu()
    assert "| `density_ratio` kl | 10,000,000 | 40.0 µs | 75% | 50% | 10× | – |" in table
    assert "`resample` systematic | 10,000,000" in table and "a GPU, driver 580.1" in table
    assert report.render(report.render(text)) == report.render(text) != text
    plot = report.plots()["roofline_gpu"]
    assert plot.limit == 4e12 and {r["variant"] for r in plot.rows} == {"kl", "gan", "systematic"}
    roofline.draw(plot.rows, plot.title, plot.limit, tmp_path / "plot.png")
    assert roofline.source_of(tmp_path / "plot.png") == roofline.fingerprint(plot.rows)


def test_table_of_draws_appears_with_its_results(tmp_path, monkeypatch):
    monkeypatch.setattr(report_common, "RESULTS", tmp_path)
    facts = {"cpu": "a CPU", "simd": "avx2", "torch": "2.13.0", "commit": "abc", "date": "2026-01-01"}
    times = {"copy": 0.001, "limit": 0.001, "refine_ext": 0.002, "searchsorted": 0.03, "torch.multinomial": 0.1}
    found = row("resample", "multinomial num=1000000", 10**6, method="multinomial", num=10**6, threads=1)
    found["time"] = {name: {"seconds": seconds} for name, seconds in times.items()}
    document = {"benchmark": "resampling", "facts": facts, "rows": [found]}
    (tmp_path / "resampling_cpu.json").write_text(json.dumps(document))
    assert "| 1,000,000 `multinomial` | 1,000,000 | 2.0 ms | 50% | 15× | 50× | – |" in report_kernels.resampling()
