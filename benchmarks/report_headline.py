"""The README's short table: of each capability one row of the committed results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from report_common import duration, load, measured, times
from report_demos import mean_and_error
from report_log_mixture import OTHERS
from report_rademacher import what

Row = dict[str, Any]


class Kernel(NamedTuple):
    """A row of a result on one thread, and the forms of torch beside ours, `written` as most users write it."""

    result: str
    title: str
    shown: Callable[[Row], bool]
    size: Callable[[Row], str]
    written: str
    forms: dict[str, str]  # torch's, and their names in the table


def _ratio(divergence: str) -> Callable[[Row], bool]:
    return lambda row: row.get("divergence") == row["variant"] == divergence and row["n"] == 10**7


def _samples(row: Row) -> str:
    return f"{row['n']:,}"


_EAGER_OR_COMPILED = {"eager": "eager", "compile": "torch.compile"}
KERNELS = (
    Kernel("density_ratio_cpu", "density ratio, `kl`", _ratio("kl"), _samples, "eager", _EAGER_OR_COMPILED),
    Kernel(
        "density_ratio_cpu",
        "density ratio, `jensen_shannon`, which solves for its normaliser",
        _ratio("jensen_shannon"),
        _samples,
        "eager",
        _EAGER_OR_COMPILED,
    ),
    Kernel(
        "variational_bound_cpu",
        "`logistic_loss` and its gradients",
        lambda row: row["variant"] == "logistic_loss step" and row["n"] == 10**6,
        lambda row: f"2 × {row['n']:,}",
        "eager",
        _EAGER_OR_COMPILED,
    ),
    Kernel(
        "resampling_cpu",
        "`resample`, multinomial",
        lambda row: row["variant"].startswith("multinomial") and row["n"] == row["num"] == 10**6,
        lambda row: f"{row['num']:,} of {row['n']:,}",
        "torch.multinomial",
        {"torch.multinomial": "`torch.multinomial`", "searchsorted": "`searchsorted`"},
    ),
    *(
        Kernel(
            "guidance_cpu",
            f"guided step {variant}",
            lambda row, variant=variant: (
                (row["op"], row["variant"], row["dtype"]) == ("guided_step", variant, "float32")
                and row["shape"] == [64, 12288]
            ),
            lambda row: " × ".join(map(str, row["shape"])),
            "eager",
            {**_EAGER_OR_COMPILED, "eager_inplace": "in place"},
        )
        for variant in ("with noise", "without noise")
    ),
    Kernel(
        "rademacher_cpu",
        "`rademacher`",
        lambda row: (
            (what(row), row["shape"], row["draws"], row["dtype"]) == ("rademacher", [10_000, 1024], 1024, "float32")
        ),
        lambda row: "{:,} × {:,}, {:,} draws".format(*row["shape"], row["draws"]),
        "user",
        {
            "user": "eager",
            "compile": "torch.compile",
            "mm": "given signs",
            "mm medium": "given signs, 'medium'",
            "mm bfloat16": "given signs, bfloat16",
        },
    ),
    *(
        Kernel(
            "log_mixture_cpu",
            f"`log_mixture` in {d} dimensions",
            lambda row, d=d: (row["what"], row["regime"], row["d"]) == ("value", "dense", d) and row["m"] >= 2000,
            lambda row: f"{row['m']:,} × {row['centers']:,}",
            "cdist",
            {name: title for name, title in OTHERS.items() if name not in ("keops", "sklearn")},
        )
        for d in (2, 784)
    ),
    Kernel(
        "gaussian_kl_cpu",
        "`gaussian_kl`",
        lambda row: (row["what"], row["dtype"], row["shape"]) == ("divergence", "float32", [131_072, 64]),
        lambda row: "{:,} × {:,}".format(*row["shape"]),
        "eager",
        {**_EAGER_OR_COMPILED, "distributions": "`torch.distributions`"},
    ),
)
DEMOS = {
    "demo_digits": ("faulty generator, reweighted", "after"),
    "demo_diffusion": ("small diffusion, guided", "after"),
    "demo_latent": ("latent flow of a {}", "flow_kl"),
}


def _kernel(kernel: Kernel, row: Row) -> str:
    seconds = {name: time["seconds"] for name, time in row["time"].items() if "seconds" in time}
    slower = {
        form: seconds[form] / seconds["refine_ext_inplace" if form == "eager_inplace" else "refine_ext"]
        for form in kernel.forms
        if form in seconds
    }
    best = min(slower, key=slower.__getitem__)
    cells = (
        kernel.title,
        kernel.size(row),
        duration(seconds["refine_ext"]),
        times(slower[kernel.written]),
        f"{times(slower[best])} ({kernel.forms[best]})",
    )
    return f"| {' | '.join(cells)} |"


def _demos() -> Iterator[str]:
    for name, (title, refined) in DEMOS.items():
        if result := load(name):
            summary = result["summary"]
            for model, measures in summary.items() if name == "demo_latent" else [("", summary)]:
                energy = measures["energy_distance"]
                cells = " | ".join(mean_and_error(energy[stage]) for stage in ("before", refined))
                yield f"| {title.format(model)} | {cells} | {len(result['rows'])} |"


def headline() -> str:
    rows: list[str] = []
    machines: dict[str, None] = {}
    for kernel in KERNELS:
        if document := load(kernel.result):
            facts = document["facts"]
            found = [row for row in measured(document) if row["threads"] == 1 and kernel.shown(row)]
            rows += [_kernel(kernel, row) for row in found]
            machines[f"{facts['cpu']} ({facts['simd']}), torch {facts['torch']}"] = None
    lines = []
    if rows:
        lines += [
            "| one CPU thread, float32 | size | time | torch, as usually written | its best form |",
            "|---|---|---|---|---|",
            *rows,
            "\nHow many times longer torch takes, in interleaved runs; its best form is the fastest of those measured, "
            f"in-place against in-place; `given signs` leaves out making them. {'; '.join(machines)}.",
        ]
    if demos := list(_demos()):
        lines += [
            "",
            "| energy distance to held-out real digits, ± standard error | generated | refined | seeds |",
            "|---|---|---|---|",
            *demos,
        ]
    return "\n".join(lines)
