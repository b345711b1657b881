"""What bench_log_mixture.py and bench_gaussian_kl.py measured, as tables."""

from __future__ import annotations

from typing import Any

from report_common import load, machine, slower

OTHERS = {
    "cdist": "cdist",
    "matmul": "matmul",
    "matmul medium": "matmul, 'medium'",
    "compile": "compiled matmul",
    "compile medium": "the same, 'medium'",
    "compile differences": "compiled differences",
    "attention": "attention",
    "keops": "KeOps",
    "sklearn": "scikit-learn",
}
GAUSSIAN_OTHERS = {"eager": "eager", "compile": "compiled", "distributions": "`torch.distributions`"}
WHAT = {"value": "L", "mean": "L and mean", "score": "L and gradient by x", "gradients": "L and gradients"}


def best(row: dict[str, Any]) -> str | None:
    """The fastest form of torch."""
    found = {
        name: row["time"][name]["seconds"]
        for name in OTHERS
        if name not in ("keops", "sklearn") and "seconds" in row["time"].get(name, {})
    }
    return min(found, key=found.__getitem__) if found else None


def pairs(row: dict[str, Any]) -> float:
    return row["m"] * row["centers"] / row["time"]["refine_ext"]["seconds"]


def _took(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def _error(row: dict[str, Any], kind: str, name: str | None) -> str:
    value = row.get(kind, {}).get(name)
    return "–" if value is None else f"{value:.0e}"


def _notes(row: dict[str, Any]) -> list[str]:
    return [
        *([row["dtype"]] if row["dtype"] != "float32" else []),
        *([f"{row['threads']} threads"] if row.get("threads", 1) > 1 else []),
        *([row["simd"]] if row["simd"] != "avx512" else []),
    ]


def fma_share(row: dict[str, Any], multiply_adds: float) -> float:
    """Of what a matrix product takes for as many pairs: d multiply-adds each, on every thread of the row."""
    return pairs(row) * row["d"] / (multiply_adds * row.get("threads", 1))


def _line(row: dict[str, Any], limits: dict[str, float]) -> str:
    ours = row["time"]["refine_ext"]["seconds"]
    share = fma_share(row, limits["float32_flops_per_second"] / 2)
    cells = [
        ", ".join([WHAT[row["what"]], row["regime"], *_notes(row)]),
        f"{row['m']:,} × {row['centers']:,}, {row['d']}",
        _took(ours),
        f"{pairs(row) / 1e9:.2g}",
        f"{share:.0%}",
        *(slower(row, name, ours) for name in OTHERS),
        _error(row, "worst_error", "refine_ext"),
        _error(row, "offset_error", "refine_ext"),
        _error(row, "offset_error", "matmul"),
    ]
    return f"| {' | '.join(cells)} |"


def table(document: dict[str, Any]) -> str:
    rows = [row for row in document["rows"] if "time" in row]
    limits, more = document["limits"], document["more_limits"]
    product = limits["float32_flops_per_second"] / 2e9
    exp, one = more["torch_exp_per_second"] / 1e9, more["one_dimension_pairs_per_second"] / 1e9
    others = " | ".join(OTHERS.values())
    return "\n".join(
        [
            f"| | M × N, d | time | G pairs/s | of a matrix product's rate | {others} | error | moved by 1000 | "
            "`matmul` moved |",
            f"|---|---|---|---|---|{'---|' * len(OTHERS)}---|---|---|",
            *(_line(row, limits) for row in rows),
            f"\nfloat32 and one thread unless said, {machine(document['facts'])}. `dense`: most centres count; "
            "`peaked`: draws of a diffusion next to their own centre. How many times longer the others take; gradients "
            "are of samples, centres and scale. The matrix product's rate: d multiply-adds for each pair, "
            f"{product:.0f} G/s here; torch makes {exp:.1f} G/s exponentials in cache, pairs of one dimension run at "
            f"{one:.1f} G/s. Errors: the worst row's, against float64, relative where L is above one; of gradients, "
            "against the largest.",
        ]
    )


def _gaussian_line(row: dict[str, Any]) -> str:
    ours = row["time"]["refine_ext"]["seconds"]
    cells = [
        ", ".join([row["what"], *_notes(row)]),
        " × ".join(f"{size:,}" for size in row["shape"]),
        _took(ours),
        f"{row['copy_fraction']:.0%}",
        *(slower(row, name, ours) for name in GAUSSIAN_OTHERS),
        _error(row, "relative_error", "refine_ext"),
        _error(row, "small_error", "refine_ext"),
        _error(row, "small_error", "eager"),
    ]
    return f"| {' | '.join(cells)} |"


def gaussian_table(document: dict[str, Any]) -> str:
    rows = [row for row in document["rows"] if "time" in row]
    return "\n".join(
        [
            f"| | size | time | of a copy's bandwidth | {' | '.join(GAUSSIAN_OTHERS.values())} | error | small "
            "divergences | eager |",
            f"|---|---|---|---|{'---|' * len(GAUSSIAN_OTHERS)}---|---|---|",
            *map(_gaussian_line, rows),
            f"\nfloat32 and one thread unless said, {machine(document['facts'])}. How many times longer torch takes; "
            "gradients are a call with its backward. Errors: the worst row's, relative, against float64; of small "
            "divergences, of about 1e-8 a dimension, ours and the usual form's.",
        ]
    )


def log_mixture() -> str:
    result = load("log_mixture_cpu")
    return table(result) if result else ""


def gaussian_kl() -> str:
    result = load("gaussian_kl_cpu")
    return gaussian_table(result) if result else ""
