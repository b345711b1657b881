"""Writes the README's tables from the committed results: python benchmarks/report.py

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _times(value: float) -> str:
    return f"{value:.0f}×" if value >= 10 else f"{value:.1f}×"


def density_ratio() -> str:
    result = _load("density_ratio_cpu")
    facts = result["facts"]
    rows = [r for r in result["rows"] if r["n"] == 10**7 and r["threads"] == 1]
    lines = [
        "| divergence | time | of copy bandwidth | torch eager | eager float64 | torch.compile "
        "| mean ratio − 1 | eager's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = {name: t["seconds"] for name, t in row["time"].items()}
        ours = seconds["refine_ext"]
        moved = (12 if row["divergence"] == "kl" else 16) / 8
        slower = [_times(seconds[name] / ours) for name in ("eager", "eager_float64", "compile")]
        errors = row["mean_error"]
        lines.append(
            f"| `{row['divergence']}` | {ours * 1e3:.1f} ms | {moved * seconds['copy'] / ours:.0%} | "
            + " | ".join(slower)
            + f" | {errors['refine_ext']:+.0e} | {errors['eager']:+.0e} |"
        )
    lines.append(
        f"\n10⁷ float32 outputs, one thread, warm output, {facts['cpu']} ({facts['simd']}), "
        f"torch {facts['torch']}, commit {facts['commit']}, {facts['date']}. How many times longer torch takes. "
        "A shared machine: within one interleaved run, and varying by tens of percent between runs."
    )
    return "\n".join(lines)


def demo_digits() -> str:
    result = _load("demo_digits")
    facts = result["facts"]
    names = {
        "auc": "two-sample AUC (0.5 is best)",
        "energy_distance": "energy distance",
        "mmd2": "MMD²",
        "precision": "precision",
        "recall": "recall",
    }
    lines = [
        "| on held-out real digits | generated | refined | without the guard | weights that know every fault |",
        "|---|---|---|---|---|",
    ]
    for key, name in names.items():
        values = [result["summary"][key][stage] for stage in ("before", "after", "full_strength", "oracle")]
        lines.append(f"| {name} | " + " | ".join(f"{v['mean']:.3g} ± {v['stderr']:.1g}" for v in values) + " |")
    seeds = len(result["rows"])
    improved = ", ".join(f"{names[key].partition(' (')[0]} {count}" for key, count in result["improved"].items())
    lines.append(
        f"\n{seeds} seeds, mean ± standard error; seeds improved: {improved}. torch {facts['torch']}, "
        f"commit {facts['commit']}, {facts['date']}."
    )
    return "\n".join(lines)


TABLES = {"density_ratio": density_ratio, "demo_digits": demo_digits}


def render(text: str) -> str:
    """`text` with every table made anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match.group(1)}\n{TABLES[match.group(2)]()}\n{match.group(3)}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", table, text, flags=re.S)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
