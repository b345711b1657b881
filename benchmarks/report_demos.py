"""What the demonstrations and the mixture of known truth measured, as tables."""

from __future__ import annotations

from report_common import load, versions

DEMO_MEASURES = {
    "auc": "two-sample AUC (0.5 is best)",
    "energy_distance": "energy distance",
    "mmd2": "MMD²",
    "precision": "precision",
    "recall": "recall",
}


def mean_and_error(value: dict[str, float]) -> str:
    return f"{value['mean']:.3g} ± {value['stderr']:.1g}"


def _demo_table(name: str, columns: dict[str, str], about: str) -> str:
    """A demonstration's measures, one column for each stage of the summary, over all seeds."""
    result = load(name)
    if result is None:
        return ""
    facts, names = result["facts"], DEMO_MEASURES
    lines = [
        f"| on held-out real digits | {' | '.join(columns.values())} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for key, title in names.items():
        values = [result["summary"][key][stage] for stage in columns]
        lines.append(f"| {title} | " + " | ".join(map(mean_and_error, values)) + " |")
    counts = {
        names[key].partition(" (")[0]: count if isinstance(count, int) else count["after"]
        for key, count in result["improved"].items()
    }
    lines.append(
        f"\n{len(result['rows'])} seeds, mean ± standard error; seeds improved: "
        f"{', '.join(f'{title} {count}' for title, count in counts.items())}. {about}"
        f"{versions(facts)}."
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
    result = load("demo_diffusion")
    if result is None:
        return ""
    about = f"{result['seconds']['cpu']:.0f} CPU seconds in all on {result['facts']['cpu']}, "
    return _demo_table("demo_diffusion", result["columns"], about)


def demo_latent() -> str:
    result = load("demo_latent")
    if result is None:
        return ""
    columns = {"before": "generated", "flow_kl": "flow, KL", "flow_js": "flow, JS", "langevin": "Langevin"}
    lines = [
        f"| | on held-out real digits | {' | '.join(columns.values())} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for model, measures in result["summary"].items():
        for key, title in DEMO_MEASURES.items():
            cells = " | ".join(mean_and_error(measures[key][column]) for column in columns)
            lines.append(f"| {model if key == 'auc' else ''} | {title} | {cells} |")
    worse = "; ".join(result["not_improved"])
    facts = result["facts"]
    lines.append(
        f"\n{len(result['rows'])} seeds, mean ± standard error. Not better on average: {worse or 'none'}. "
        f"{result['seconds']['cpu']:.0f} CPU seconds in all on {facts['cpu']}, {versions(facts)}."
    )
    return "\n".join(lines)


def guided_mixture() -> str:
    result = load("guided_mixture")
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
                cells = " | ".join(map(mean_and_error, values))
                lines.append(f"| {dimensions}, {sampler} | {title} | {cells} |")
    worst = max(max(rows.values()) for rows in result["largest_difference_by_divergence"].values())
    facts = result["facts"]
    lines.append(
        f"\n{result['seeds']} seeds, mean ± standard error. With the exact ratio the outputs of every divergence "
        f"guide alike: samples differ by at most {worst:.0e}. {versions(facts)}."
    )
    return "\n".join(lines)
