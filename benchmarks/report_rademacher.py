"""What bench_rademacher.py measured of the Rademacher sums, as a table."""

from __future__ import annotations

from typing import Any

from report_common import load, slower

OTHERS = {
    "user": "randint, mm, max",
    "compile": "the same compiled",
    "mm": "mm of given signs",
    "mm medium": "mm, 'medium'",
    "mm bfloat16": "mm, bfloat16",
}
WHAT = {
    "rademacher": "`rademacher`",
    "rademacher_linear": "`rademacher_linear`",
    "gradient": "`rademacher` and gradient",
    "sums": "sums of a block of rows",
    "signs": "signs alone",
    "normals": "normals alone",
}


def what(row: dict[str, Any]) -> str:
    """What a row measured; the first results tell it by their op."""
    return row.get("what") or {"rademacher_backward": "gradient"}.get(row["op"], row["op"])


def rate(row: dict[str, Any]) -> float:
    """Signed additions a second."""
    return row["n"] * row["draws"] / row["time"]["refine_ext"]["seconds"]


def _line(row: dict[str, Any]) -> str:
    ours = row["time"]["refine_ext"]["seconds"]
    others = [slower(row, name, ours) for name in OTHERS]
    error = row.get("relative_error", {}).get("refine_ext")
    size = f"{row['shape'][0]:,} × {row['shape'][1]:,}" + (f", {row['draws']:,}" if row["draws"] > 1 else "")
    notes = [
        *([row["dtype"]] if row["dtype"] != "float32" else []),
        *([f"{row['threads']} threads"] if row["threads"] > 1 else []),
        *([row["simd"]] if row["simd"] != "avx512" else []),
    ]
    took = f"{ours * 1e3:.1f} ms" if ours >= 1e-3 else f"{ours * 1e6:.0f} µs"
    return (
        f"| {', '.join([WHAT[what(row)], *notes])} | {size} | {took} | {rate(row) / 1e9:.0f} | "
        f"{' | '.join(others)} | {f'{error:.0e}' if error is not None else '–'} |"
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


def rademacher() -> str:
    result = load("rademacher_cpu")
    return table(result) if result else ""
