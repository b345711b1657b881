"""Writes from the committed results: the tables of the README and docs/measured.md, the plots, results/README.md.

    python benchmarks/report.py

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`; one whose results do not exist yet is empty
there.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import gate_results
import ledger
import report_bounds
import report_certificate
import report_common
import report_demos
import report_headline
import report_kernels
import report_log_mixture
import report_rademacher
import report_vae
import roofline
from report_common import ROOT, complete, load, measured

PAGES = (ROOT / "README.md", ROOT / "docs" / "measured.md")
CPU_RESULTS = ("density_ratio_cpu", "variational_bound_cpu", "resampling_cpu", "guidance_cpu")
TABLES = {
    "headline": report_headline.headline,
    "density_ratio": report_kernels.density_ratio,
    "variational_bound": report_kernels.variational_bound,
    "resampling": report_kernels.resampling,
    "guidance": report_kernels.guidance,
    "rademacher": report_rademacher.rademacher,
    "log_mixture": report_log_mixture.log_mixture,
    "gaussian_kl": report_log_mixture.gaussian_kl,
    "gpu": report_kernels.gpu,
    "demo_digits": report_demos.demo_digits,
    "demo_diffusion": report_demos.demo_diffusion,
    "demo_latent": report_demos.demo_latent,
    "guided_mixture": report_demos.guided_mixture,
    "certificate": report_certificate.certificate,
    "swiss_roll": report_bounds.swiss_roll,
    "vae_digits": report_vae.vae_digits,
}


def render(text: str) -> str:
    """`text` with every table made anew."""

    def table(match: re.Match[str]) -> str:
        content = TABLES[match.group(2)]()
        return "\n".join(filter(None, (match.group(1), content, match.group(3))))

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", table, text, flags=re.S)


class Plot(NamedTuple):
    rows: list[dict[str, Any]]
    title: str
    limit: float | None  # bytes a second of a large copy


def _streams(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose bandwidth means something, each labelled by what has several sizes."""
    kept = []
    for row in rows:
        if (
            row.get("threads", 1) == 1
            and row["op"] not in ("metropolis", "sample_edm")
            and row.get("num", row["n"]) == row["n"]
        ):
            dtype = "" if row["dtype"] == "float32" else f" {row['dtype']}"
            kept.append({**row, "variant": row.get("method", row["variant"]) + dtype})
    return kept


def plots() -> dict[str, Plot]:
    """The plots that the committed results allow, by their names in docs/."""
    found: dict[str, Plot] = {}
    documents = [d for name in CPU_RESULTS if (d := load(name))]
    if rows := _streams([row for document in documents for row in measured(document)]):
        facts = documents[0]["facts"]
        title = f"{facts['cpu']} ({facts['simd']}), one thread, {report_common.commit(facts)}"
        found["roofline_cpu"] = Plot(rows, title, documents[0].get("limits", {}).get("copy_bytes_per_second"))
    runs = [run for run in gate_results.load(report_common.RESULTS) if gate_results.rows(run)]
    if runs:
        facts = runs[-1]["facts"]
        rows = _streams([complete("", row) for row in gate_results.rows(runs[-1])])
        limits = [
            s["limits"] for name, s in runs[-1]["sections"].items() if name.startswith("bench_") and s.get("limits")
        ]
        title = f"{facts.get('gpu', {}).get('name')}, {report_common.commit(facts)}"
        found["roofline_gpu"] = Plot(rows, title, max((x["copy_bytes_per_second"] for x in limits), default=None))
    return found


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text()))
    (report_common.RESULTS / "README.md").write_text(ledger.render(gate_results.load(report_common.RESULTS)))
    for name, plot in plots().items():
        roofline.draw(plot.rows, plot.title, plot.limit, ROOT / "docs" / f"{name}.png")
    if result := load("certificate"):
        report_certificate.draw(result, ROOT / "docs" / "certificate.png")
    if result := load("swiss_roll"):
        report_bounds.draw(result, ROOT / "docs" / "swiss_roll_time.png")
        report_bounds.draw_samples(result, ROOT / "docs" / "swiss_roll_samples.png")
    if result := load("vae_digits"):
        report_vae.draw(result, ROOT / "docs" / "vae_digits.png")


if __name__ == "__main__":
    main()
