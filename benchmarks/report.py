"""Writes from the committed results: the README's tables, the plots in docs/, results/README.md.

    python benchmarks/report.py

Each table stands in the README between `<!-- table: NAME -->` and `<!-- end -->`; one whose results do not exist
yet is empty there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import gate_results
import ledger
import report_certificate
import report_rademacher
import roofline
from traffic import traffic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
# What the README shows of a GPU run, at the largest size that was measured.
SHOWN_ON_GPU = {
    "density_ratio": ("kl", "reverse_kl", "jensen_shannon", "gan", "pearson_chi2", "neyman_chi2", "squared_hellinger",
                      "jeffreys", "alpha:0.3"),
    "density_ratio_backward": ("kl", "jensen_shannon"),
    "variational_bound": ("kl", "jensen_shannon", "pearson_chi2", "kl step"),
    "dual_bound": ("logistic_loss",),
    "resample": ("multinomial", "stratified", "systematic", "residual"),
    "rejection": ("rejection",),
    "guided_step": ("with noise", "without noise", "normals"),
}  # fmt: skip


CPU_RESULTS = ("density_ratio_cpu", "variational_bound_cpu", "resampling_cpu", "guidance_cpu")


def _load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _times(value: float) -> str:
    return f"{value:.0f}×" if value >= 10 else f"{value:.1f}×"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} µs"


def _slower(row: dict[str, Any], name: str, ours: float) -> str:
    seconds = row["time"].get(name, {}).get("seconds")
    return _times(seconds / ours) if seconds else "–"


def complete(benchmark: str, row: dict[str, Any]) -> dict[str, Any]:
    """A measured row, with what rows were written without before they had to be told from others' rows."""
    known = {"op": benchmark, "variant": row.get("divergence"), "dtype": "float32", **row}
    known["itemsize"] = ITEMSIZE[known["dtype"]]
    if "bytes" not in row:
        known["bytes"] = traffic(benchmark, row["n"], known["itemsize"], known["variant"]).streamed
    return known


def measured(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [complete(document["benchmark"], row) for row in document["rows"] if "time" in row]


def _machine(facts: dict[str, Any]) -> str:
    return f"{facts['cpu']} ({facts['simd']}), torch {facts['torch']}, commit {facts['commit']}, {facts['date']}"


def density_ratio() -> str:
    result = _load("density_ratio_cpu")
    if result is None:
        return ""
    lines = [
        "| divergence | time | of copy bandwidth | torch eager | eager float64 | torch.compile "
        "| mean ratio − 1 | eager's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in measured(result):
        if row["n"] != 10**7 or row["threads"] != 1 or row["variant"] != row.get("divergence"):
            continue
        seconds = {name: t["seconds"] for name, t in row["time"].items()}
        ours = seconds["refine_ext"]
        moved = row["bytes"] / (2 * row["n"] * row["itemsize"])
        slower = [_times(seconds[name] / ours) for name in ("eager", "eager_float64", "compile")]
        errors = row["mean_error"]
        lines.append(
            f"| `{row['divergence']}` | {ours * 1e3:.1f} ms | {moved * seconds['copy'] / ours:.0%} | "
            + " | ".join(slower)
            + f" | {errors['refine_ext']:+.0e} | {errors['eager']:+.0e} |"
        )
    lines.append(
        f"\n10⁷ float32 outputs, one thread, warm output, {_machine(result['facts'])}. How many times longer torch "
        "takes. A shared machine: within one interleaved run, and varying by tens of percent between runs."
    )
    lines.append("\n![Bandwidth of every family against a copy](docs/roofline_cpu.png)")
    return "\n".join(lines)


def resampling() -> str:
    result = _load("resampling_cpu")
    if result is None:
        return ""
    lines = [
        "| draws | from | time | of the memory limit | cumsum and searchsorted | torch's own | NumPy |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured(result):
        method = row["method"]
        if row["threads"] != 1 or (row["n"] < 10**6 and method != "metropolis"):
            continue
        ours = row["time"]["refine_ext"]["seconds"]
        limit = row["time"].get("limit", {}).get("seconds")
        draws, name = row["num"], f"`{method}`"
        if method == "metropolis":
            draws *= row["chains"]
            name += f", {row['chains']:,} × {row['burn_in'] + row['num']:,} steps"
        numpy = "numpy choice" if method == "multinomial" else "numpy"
        own = "torch.multinomial" if method == "multinomial" else "torch"
        others = [_slower(row, other, ours) for other in ("searchsorted", own, numpy)]
        lines.append(
            f"| {draws:,} {name} | {row['n']:,} | {_duration(ours)} | {f'{limit / ours:.0%}' if limit else '–'} | "
            + " | ".join(others)
            + " |"
        )
    lines.append(
        f"\nfloat32 weights, one thread, {_machine(result['facts'])}. How many times longer the others take. "
        "The memory limit: two sums over the weights and a fill of the result. Metropolis: torch and NumPy step all "
        "chains at once."
    )
    return "\n".join(lines)


def _share(row: dict[str, Any], part: str, whole: str) -> str:
    return f"{row['time'][part]['seconds'] / row['time'][whole]['seconds']:.1%}"


def guidance() -> str:
    result = _load("guidance_cpu")
    if result is None:
        return ""
    rows = measured(result)
    size = "x".join(map(str, next(row for row in rows if row["op"] == "guided_step")["shape"]))
    lines = [
        f"| step of {size.replace('x', ' × ')} | threads | time | in place | of copy bandwidth | torch eager "
        "| in-place eager, to ours in place | torch.compile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["op"] != "guided_step" or "x".join(map(str, row["shape"])) != size:
            continue
        ours = row["time"]["refine_ext"]["seconds"]
        normals = row["variant"] == "normals"
        in_place = ours if normals else row["time"]["refine_ext_inplace"]["seconds"]
        name = f"{row['variant']}, {row['dtype']}" + (f": {row['n'] / ours / 1e9:.2f} G/s" if normals else "")
        lines.append(
            f"| {name} | {row['threads']} | {_duration(ours)} | {_duration(in_place)} | {row['copy_fraction']:.0%} | "
            f"{_slower(row, 'eager', ours)} | {_slower(row, 'eager_inplace', in_place)} | "
            f"{_slower(row, 'compile', ours)} |"
        )
    lines += [
        "",
        "| guided trajectory | time | networks alone | our arithmetic, at most | EDM's loop | its arithmetic "
        "| k-diffusion's loop | its arithmetic |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["op"] == "sample_edm"):
        ours = row["time"]["refine_ext"]["seconds"]
        float32 = row["time"]["refine_ext_float32"]["seconds"]
        k_diffusion = "k-diffusion loop"
        lines.append(
            f"| {row['network']} of {' × '.join(map(str, row['shape']))}, {row['steps']} steps | {_duration(ours)} | "
            f"{_duration(row['time']['networks']['seconds'])} | {_share(row, 'refine_ext_free', 'refine_ext')} | "
            f"{_slower(row, 'edm loop', ours)} | {_share(row, 'edm loop free', 'edm loop')} | "
            f"{_slower(row, k_diffusion, float32)} | {_share(row, f'{k_diffusion} free', k_diffusion)} |"
        )
    lines.append(
        f"\n{_machine(result['facts'])}. How many times longer torch takes. Arithmetic: the same trajectory on "
        "networks that return at once, over the whole; autograd's own part of a discriminator's call is in it. "
        "k-diffusion's state is float32, and compared with ours in float32."
    )
    return "\n".join(lines)


def gpu() -> str:
    runs = [run for run in gate_results.load(RESULTS) if gate_results.rows(run)]
    if not runs:
        return ""
    run = runs[-1]
    facts = run["facts"]
    largest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in gate_results.rows(run):
        variant = row.get("method", row["variant"])
        key = (row["op"], variant)
        shown = row["dtype"] == "float32" and variant in SHOWN_ON_GPU.get(row["op"], ())
        if shown and row.get("num", row["n"]) == row["n"] and row["n"] > largest.get(key, {"n": 0})["n"]:
            largest[key] = row
    lines = [
        "| op | samples | time | of copy bandwidth | every byte counted once | torch eager | torch.compile |",
        "|---|---|---|---|---|---|---|",
    ]
    for op, variants in SHOWN_ON_GPU.items():
        for variant in variants:
            if (op, variant) in largest:
                row = largest[op, variant]
                ours = row["time"]["refine_ext"]["seconds"]
                eager = next((x for x in ("eager", "searchsorted", "torch") if x in row["time"]), "eager")
                lines.append(
                    f"| `{op}` {variant} | {row['n']:,} | {_duration(ours)} | {row['copy_fraction']:.0%} | "
                    f"{row['copy_fraction'] * row['bytes_once'] / row['bytes']:.0%} | "
                    f"{_slower(row, eager, ours)} | {_slower(row, 'compile', ours)} |"
                )
    card = facts.get("gpu", {})
    lines.append(
        f"\n{card.get('name')}, driver {card.get('driver_version')}, torch {facts['torch']}, commit {facts['commit']}, "
        f"{facts['date']}; float32, inputs beyond the L2. Of copy bandwidth: the bytes of `benchmarks/traffic.py` over "
        "those of copying as many samples in the same run; then with no sample read twice. How many times longer torch "
        "takes."
    )
    lines.append("\n![Bandwidth of every op against a copy](docs/roofline_gpu.png)")
    return "\n".join(lines)


DEMO_MEASURES = {
    "auc": "two-sample AUC (0.5 is best)",
    "energy_distance": "energy distance",
    "mmd2": "MMD²",
    "precision": "precision",
    "recall": "recall",
}


def _mean_and_error(value: dict[str, float]) -> str:
    return f"{value['mean']:.3g} ± {value['stderr']:.1g}"


def _demo_table(name: str, columns: dict[str, str], about: str) -> str:
    """A demonstration's measures, one column for each stage of the summary, over all seeds."""
    result = _load(name)
    if result is None:
        return ""
    facts, names = result["facts"], DEMO_MEASURES
    lines = [
        f"| on held-out real digits | {' | '.join(columns.values())} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for key, title in names.items():
        values = [result["summary"][key][stage] for stage in columns]
        lines.append(f"| {title} | " + " | ".join(map(_mean_and_error, values)) + " |")
    counts = {
        names[key].partition(" (")[0]: count if isinstance(count, int) else count["after"]
        for key, count in result["improved"].items()
    }
    lines.append(
        f"\n{len(result['rows'])} seeds, mean ± standard error; seeds improved: "
        f"{', '.join(f'{title} {count}' for title, count in counts.items())}. {about}torch {facts['torch']}, "
        f"commit {facts['commit']}, {facts['date']}."
    )
    return "\n".join(lines)


def demo_digits() -> str:
    columns = {
        "before": "generated",
        "after": "refined",
        "full_strength": "without the guard",
        "oracle": "weights that know every fault",
    }
    return _demo_table("demo_digits", columns, "")


def demo_diffusion() -> str:
    result = _load("demo_diffusion")
    if result is None:
        return ""
    about = f"{result['seconds']['cpu']:.0f} CPU seconds in all on {result['facts']['cpu']}, "
    return _demo_table("demo_diffusion", result["columns"], about)


def demo_latent() -> str:
    result = _load("demo_latent")
    if result is None:
        return ""
    columns = {"before": "generated", "flow_kl": "flow, KL", "flow_js": "flow, JS", "langevin": "Langevin"}
    lines = [
        f"| | on held-out real digits | {' | '.join(columns.values())} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for model, measures in result["summary"].items():
        for key, title in DEMO_MEASURES.items():
            cells = " | ".join(_mean_and_error(measures[key][column]) for column in columns)
            lines.append(f"| {model if key == 'auc' else ''} | {title} | {cells} |")
    worse = "; ".join(result["not_improved"])
    facts = result["facts"]
    lines.append(
        f"\n{len(result['rows'])} seeds, mean ± standard error. Not better on average: {worse or 'none'}. "
        f"{result['seconds']['cpu']:.0f} CPU seconds in all on {facts['cpu']}, torch {facts['torch']}, "
        f"commit {facts['commit']}, {facts['date']}."
    )
    return "\n".join(lines)


def guided_mixture() -> str:
    result = _load("guided_mixture")
    if result is None:
        return ""
    guides = ("none", "exact", "trained")
    found = {(row["dimensions"], row["sampler"], row["guide"]): row for row in result["rows"]}
    lines = [
        "| dimensions, sampler | measure | unguided | exact ratio | trained ratio |",
        "|---|---|---|---|---|",
    ]
    for dimensions, sampler in dict.fromkeys(key[:2] for key in found if key[2] == "exact"):
        for key, title in (("kl", "KL to the truth"), ("energy", "energy distance")):
            values = [found[dimensions, sampler, guide].get(key) for guide in guides]
            if all(values):
                cells = " | ".join(map(_mean_and_error, values))
                lines.append(f"| {dimensions}, {sampler} | {title} | {cells} |")
    worst = max(max(rows.values()) for rows in result["largest_difference_by_divergence"].values())
    facts = result["facts"]
    lines.append(
        f"\n{result['seeds']} seeds, mean ± standard error. With the exact ratio the outputs of every divergence "
        f"guide alike: samples differ by at most {worst:.0e}. torch {facts['torch']}, commit {facts['commit']}, "
        f"{facts['date']}."
    )
    return "\n".join(lines)


def certificate() -> str:
    result = _load("certificate")
    return report_certificate.table(result) if result else ""


def rademacher() -> str:
    result = _load("rademacher_cpu")
    return report_rademacher.table(result) if result else ""


TABLES = {
    "density_ratio": density_ratio,
    "resampling": resampling,
    "guidance": guidance,
    "gpu": gpu,
    "demo_digits": demo_digits,
    "demo_diffusion": demo_diffusion,
    "demo_latent": demo_latent,
    "guided_mixture": guided_mixture,
    "certificate": certificate,
    "rademacher": rademacher,
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
    documents = [d for name in CPU_RESULTS if (d := _load(name))]
    if rows := _streams([row for document in documents for row in measured(document)]):
        facts = documents[0]["facts"]
        title = f"{facts['cpu']} ({facts['simd']}), one thread, commit {facts['commit']}, {facts['date']}"
        found["roofline_cpu"] = Plot(rows, title, documents[0].get("limits", {}).get("copy_bytes_per_second"))
    runs = [run for run in gate_results.load(RESULTS) if gate_results.rows(run)]
    if runs:
        facts = runs[-1]["facts"]
        rows = _streams([complete("", row) for row in gate_results.rows(runs[-1])])
        limits = [
            s["limits"] for name, s in runs[-1]["sections"].items() if name.startswith("bench_") and s.get("limits")
        ]
        title = f"{facts.get('gpu', {}).get('name')}, commit {facts['commit']}, {facts['date']}"
        found["roofline_gpu"] = Plot(rows, title, max((x["copy_bytes_per_second"] for x in limits), default=None))
    return found


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
    (RESULTS / "README.md").write_text(ledger.render(gate_results.load(RESULTS)))
    for name, plot in plots().items():
        roofline.draw(plot.rows, plot.title, plot.limit, ROOT / "docs" / f"{name}.png")
    if result := _load("certificate"):
        report_certificate.draw(result, ROOT / "docs" / "certificate.png")


if __name__ == "__main__":
    main()
