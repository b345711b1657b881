"""What the benchmarks of kernels measured, as tables."""

from __future__ import annotations

from typing import Any

import gate_results
import report_common
from report_common import ITEMSIZE, duration, load, machine, measured, slower, times, versions

# What is shown of a GPU run, at the largest size that was measured.
SHOWN_ON_GPU = {
    "density_ratio": ("kl", "reverse_kl", "jensen_shannon", "gan", "pearson_chi2", "neyman_chi2", "squared_hellinger",
                      "jeffreys", "alpha:0.3"),
    "density_ratio_backward": ("kl", "jensen_shannon"),
    "variational_bound": ("kl", "jensen_shannon", "pearson_chi2", "kl step"),
    "dual_bound": ("logistic_loss", "logistic_loss step"),
    "resample": ("multinomial", "stratified", "systematic", "residual"),
    "rejection": ("rejection",),
    "guided_step": ("with noise", "without noise", "normals"),
}  # fmt: skip


def density_ratio() -> str:
    result = load("density_ratio_cpu")
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
        slower = [times(seconds[name] / ours) for name in ("eager", "eager_float64", "compile")]
        errors = row["mean_error"]
        lines.append(
            f"| `{row['divergence']}` | {ours * 1e3:.1f} ms | {moved * seconds['copy'] / ours:.0%} | "
            + " | ".join(slower)
            + f" | {errors['refine_ext']:+.0e} | {errors['eager']:+.0e} |"
        )
    lines.append(
        f"\n10⁷ float32 outputs, one thread, warm output, {machine(result['facts'])}. How many times longer torch "
        "takes. A shared machine: within one interleaved run, and varying by tens of percent between runs."
    )
    small = result["calls"]["small_call"]
    lines.append(
        f"A call on 64 elements takes {duration(small['refine_ext']['seconds'])}, eager torch "
        f"{duration(small['eager']['seconds'])}, `torch.softmax` {duration(small['softmax']['seconds'])}."
    )
    lines.append("\n![Bandwidth of every family against a copy](roofline_cpu.png)")
    return "\n".join(lines)


def resampling() -> str:
    result = load("resampling_cpu")
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
        others = [slower(row, other, ours) for other in ("searchsorted", own, numpy)]
        lines.append(
            f"| {draws:,} {name} | {row['n']:,} | {duration(ours)} | {f'{limit / ours:.0%}' if limit else '–'} | "
            + " | ".join(others)
            + " |"
        )
    lines.append(
        f"\nfloat32 weights, one thread, {machine(result['facts'])}. How many times longer the others take. "
        "The memory limit: two sums over the weights and a fill of the result. Metropolis: torch and NumPy step all "
        "chains at once."
    )
    return "\n".join(lines)


def variational_bound() -> str:
    result = load("variational_bound_cpu")
    if result is None:
        return ""
    lines = ["| objective | outputs of each kind | time | torch eager | torch.compile |", "|---|---|---|---|---|"]
    for row in measured(result):
        name, _, kind = row["variant"].partition(" ")
        if kind != "step" or row["dtype"] != "float32":
            continue
        ours = row["time"]["refine_ext"]["seconds"]
        title = f"`{name}`" if row["op"] == "dual_bound" else f"`variational_bound`, `{name}`"
        others = [slower(row, other, ours) for other in ("eager", "compile")]
        lines.append(f"| {title} | {row['n']:,} | {ours * 1e6:,.0f} µs | " + " | ".join(others) + " |")
    lines.append(
        f"\nThe value and the gradients by all outputs, through autograd: float32, one thread, "
        f"{machine(result['facts'])}. How many times longer torch takes; its eager tight bounds search for the shift "
        "as its density ratios do."
    )
    return "\n".join(lines)


def _share(row: dict[str, Any], part: str, whole: str) -> str:
    return f"{row['time'][part]['seconds'] / row['time'][whole]['seconds']:.1%}"


def _of_copy(row: dict[str, Any], ours: str, copy: str) -> str:
    """Bandwidth of ours over a copy's."""
    if not {ours, copy} <= row["time"].keys():
        return "–"
    copied = 2 * row["n"] * ITEMSIZE[row["dtype"]]
    return f"{row['bytes'] / copied * row['time'][copy]['seconds'] / row['time'][ours]['seconds']:.0%}"


def guidance() -> str:
    result = load("guidance_cpu")
    if result is None:
        return ""
    rows = measured(result)
    size = "x".join(map(str, next(row for row in rows if row["op"] == "guided_step")["shape"]))
    lines = [
        f"| step of {size.replace('x', ' × ')} | threads | time | in place | of copy bandwidth | of a copy into a new "
        "tensor | into a given tensor, of copy bandwidth | torch eager | in-place eager, to ours in place "
        "| torch.compile |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["op"] != "guided_step" or "x".join(map(str, row["shape"])) != size:
            continue
        ours = row["time"]["refine_ext"]["seconds"]
        normals = row["variant"] == "normals"
        in_place = ours if normals else row["time"]["refine_ext_inplace"]["seconds"]
        name = f"{row['variant']}, {row['dtype']}" + (f": {row['n'] / ours / 1e9:.2f} G/s" if normals else "")
        lines.append(
            f"| {name} | {row['threads']} | {duration(ours)} | {duration(in_place)} | {row['copy_fraction']:.0%} | "
            f"{_of_copy(row, 'refine_ext', 'copy_new')} | {_of_copy(row, 'refine_ext_out', 'copy')} | "
            f"{slower(row, 'eager', ours)} | {slower(row, 'eager_inplace', in_place)} | "
            f"{slower(row, 'compile', ours)} |"
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
            f"| {row['network']} of {' × '.join(map(str, row['shape']))}, {row['steps']} steps | {duration(ours)} | "
            f"{duration(row['time']['networks']['seconds'])} | {_share(row, 'refine_ext_free', 'refine_ext')} | "
            f"{slower(row, 'edm loop', ours)} | {_share(row, 'edm loop free', 'edm loop')} | "
            f"{slower(row, k_diffusion, float32)} | {_share(row, f'{k_diffusion} free', k_diffusion)} |"
        )
    lines.append(
        f"\n{machine(result['facts'])}. How many times longer torch takes. Arithmetic: the same trajectory on "
        "networks that return at once, over the whole; autograd's own part of a discriminator's call is in it. "
        "k-diffusion's state is float32, and compared with ours in float32."
    )
    return "\n".join(lines)


def gpu() -> str:
    runs = [run for run in gate_results.load(report_common.RESULTS) if gate_results.rows(run)]
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
                    f"| `{op}` {variant} | {row['n']:,} | {duration(ours)} | {row['copy_fraction']:.0%} | "
                    f"{row['copy_fraction'] * row['bytes_once'] / row['bytes']:.0%} | "
                    f"{slower(row, eager, ours)} | {slower(row, 'compile', ours)} |"
                )
    card = facts.get("gpu", {})
    lines.append(
        f"\n{card.get('name')}, driver {card.get('driver_version')}, {versions(facts)}; "
        "float32, inputs beyond the L2. Of copy bandwidth: the bytes of `benchmarks/traffic.py` over "
        "those of copying as many samples in the same run; then with no sample read twice. How many times longer torch "
        "takes."
    )
    lines.append("\n![Bandwidth of every op against a copy](roofline_gpu.png)")
    return "\n".join(lines)
