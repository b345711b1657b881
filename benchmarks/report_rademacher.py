"""What the README says of the Rademacher sums that bench_rademacher.py measured."""

from __future__ import annotations

from typing import Any

OTHERS = {
    "user": "randint, mm, max",
    "compile": "the same compiled",
    "mm": "mm of given signs",
    "mm medium": "mm, 'medium'",
    "mm bfloat16": "mm, bfloat16",
}
OPS = {
    "rademacher": "`rademacher`",
    "rademacher_linear": "`rademacher_linear`",
    "rademacher_backward": "`rademacher` and gradient",
}


def rate(row: dict[str, Any]) -> float:
    """Signed additions a second."""
    return row["n"] * row["draws"] / row["time"]["refine_ext"]["seconds"]


def _times(value: float) -> str:
    return f"{value:.0f}×" if value >= 10 else f"{value:.1f}×"


def _line(row: dict[str, Any]) -> str:
    time = row["time"]
    ours = time["refine_ext"]["seconds"]
    slower = [_times(time[name]["seconds"] / ours) if "seconds" in time.get(name, {}) else "–" for name in OTHERS]
    error = row.get("relative_error", {}).get("refine_ext")
    n, m = row["shape"]
    notes = [
        *([row["dtype"]] if row["dtype"] != "float32" else []),
        *([f"{row['threads']} threads"] if row["threads"] > 1 else []),
        *([row["simd"]] if row["simd"] != "avx512" else []),
    ]
    took = f"{ours * 1e3:.1f} ms" if ours >= 1e-3 else f"{ours * 1e6:.0f} µs"
    return (
        f"| {', '.join([OPS[row['op']], *notes])} | {n:,} × {m:,}, {row['draws']:,} | {took} | {rate(row) / 1e9:.0f} | "
        f"{' | '.join(slower)} | {f'{error:.0e}' if error is not None else '–'} |"
    )


def table(document: dict[str, Any]) -> str:
    facts = document["facts"]
    rows = [row for row in document["rows"] if "time" in row]
    rows += [row for level in document.get("instruction_sets", {}).values() for row in level if "time" in row]
    peak = document["limits"]["float32_flops_per_second"] / 2e9
    return "\n".join(
        [
            f"| | n × m, draws | time | G/s | {' | '.join(OTHERS.values())} | worst error |",
            f"|---|---|---|---|{'---|' * len(OTHERS)}---|",
            *map(_line, rows),
            f"\nfloat32 and one thread unless said, {facts['cpu']} ({facts['simd']}), torch {facts['torch']}, commit "
            f"{facts['commit']}, {facts['date']}. G/s: n m draws signed additions a second; of fused multiply-adds a "
            f"float32 matrix product does {peak:.0f} G/s here. How many times longer torch takes: the `mm` columns are "
            "handed their signs. Worst error: of any draw, relative, against float64.",
        ]
    )
