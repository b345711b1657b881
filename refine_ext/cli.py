"""The command `refine-ext`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .cli_bound import bound
from .cli_rademacher import rademacher
from .console import EXIT_REFUSED, AutoOrNumber, Size, reporting_errors, terminate

if TYPE_CHECKING:
    from .io import RowSource
    from .pipeline import Refined, RefineOptions


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="refine-ext")
def main() -> None:
    """Refine any generative model from its samples."""


main.add_command(bound)
main.add_command(rademacher)


@main.command()
@click.option("--real", required=True, metavar="FILE", help="Real samples [n, ...].")
@click.option("--generated", required=True, metavar="FILE", help="Generated samples [m, ...].")
@click.option("--out", required=True, metavar="FILE", help="Where the refined samples go.")
@click.option("--divergence", default="kl", show_default=True, help="f-divergence of the refinement.")
@click.option(
    "--objective",
    type=click.Choice(["tight", "loose", "logistic"]),
    default="tight",
    show_default=True,
    help="What the discriminator is trained with.",
)
@click.option(
    "--model",
    type=click.Choice(["mlp", "linear"]),
    default="mlp",
    show_default=True,
    help="Discriminator: a network, or a linear one on random Fourier features.",
)
@click.option(
    "--method",
    type=click.Choice(["resample", "rejection", "metropolis", "weights"]),
    default="resample",
    show_default=True,
    help="How rows are drawn; `weights` writes the weights [m] instead.",
)
@click.option("--num", type=click.IntRange(min=1), help="Rows to draw. [default: as many as generated]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--temperature",
    type=AutoOrNumber(0.0, 1.0),
    default="auto",
    help="Strength of the refinement; `auto` chooses it on held-out samples. [default: auto]",
)
@click.option("--discriminator", metavar="FILE", help="Use this saved discriminator; train nothing.")
@click.option("--save-discriminator", metavar="FILE", help="Save the discriminator (.safetensors).")
@click.option("--held-out", metavar="FILE", help="Real samples to judge by. [default: a fifth of --real]")
@click.option("--report", metavar="PNG", help="Draw a picture; the figures go beside it as .json.")
@click.option(
    "--certificate",
    is_flag=True,
    help="Bound how far the sample can be from the data, by the held-out real samples: they must be unknown to the "
    "generator and the discriminator.",
)
@click.option(
    "--norm-bound",
    type=AutoOrNumber(0.0, math.inf, open_below=True),
    default="auto",
    help="Of --certificate: size B of the class of functions; `auto` takes the one that proves the most. "
    "[default: auto]",
)
@click.option(
    "--delta",
    type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Of --certificate: the chance that it does not hold.",
)
@click.option(
    "--deviation",
    type=click.Choice(["rademacher", "direct"]),
    default="rademacher",
    show_default=True,
    help="Of --certificate: how far the real samples are from the data at most, by the class's Rademacher complexity "
    "or, about three times tighter, directly. Choose without looking at the result of either.",
)
@click.option("--memory", type=Size(), default="1GiB", show_default=True, help="Most memory the data may use.")
@click.option(
    "--train-rows",
    type=click.IntRange(min=40),
    default=50_000,
    show_default=True,
    help="Most rows of each kind to train on, a random subset.",
)
@click.option("--device", help="Where to train and score, e.g. cuda. [default: cpu]")
@click.option("--force", is_flag=True, help="Write a sample even where reweighting cannot help.")
@click.option("--quiet", is_flag=True, help="Print errors and refusals only; no progress bars.")
@reporting_errors("a smaller --memory or --train-rows")
def refine(
    real: str,
    generated: str,
    out: str,
    discriminator: str | None,
    save_discriminator: str | None,
    held_out: str | None,
    report: str | None,
    quiet: bool,
    **choices: Any,
) -> None:
    """Draw a refined sample from generated ones, guided by real ones.

    Files are .npy, .npz, .pt or .safetensors, with FILE:KEY for one array of several. They may be
    larger than memory: they are read in blocks. The refined rows keep the order of the generated
    file. Exits with 3, writing no sample, where reweighting cannot help.
    """
    from .io import open_rows
    from .output import check_output
    from .pipeline import RefineOptions, check_pair
    from .pipeline import refine as run_refine
    from .pipeline import write as write_refined
    from .summary import describe_rows, memory_used, summary, written_line

    say = (lambda text: None) if quiet else click.echo
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        libraries = _load_libraries(report)
        options = RefineOptions(progress=not quiet and sys.stderr.isatty(), **choices)
        sources = open_rows(real), open_rows(generated)
        judges = open_rows(held_out) if held_out else None
        check_pair(*sources)
        _check_outputs(out, report, save_discriminator, sources, options)
        check_output(*_announced_output(out, sources[1], options))
        for name, source in zip(("real", "generated"), sources, strict=True):
            say(f"{name:<12} {describe_rows(source)}")
        loaded = _load_discriminator(discriminator, options.device)
        started = time.perf_counter()
        refined = run_refine(sources[0], sources[1], options, loaded, judges)
        say(summary(refined))
        if save_discriminator:
            refined.discriminator.save(save_discriminator)
            say(f"{'saved':<12} {save_discriminator}")
        allowed = refined.refinable or options.force
        if allowed:
            write_refined(refined, sources[1], out, options)
        memory = memory_used(options, libraries)
        facts = {"seconds": time.perf_counter() - started, "memory": memory}
        if report:
            _write_report(refined, options, Path(report), {**facts, "real": real, "out": out})
            say(f"{'report':<12} {report}, {Path(report).with_suffix('.json')}")
        if not allowed:
            click.echo(f"refused: {refined.verdict}; {out} was not written", err=True)
            sys.exit(EXIT_REFUSED)
        say(written_line(refined, out))
        say(f"{'memory':<12} {memory['text']}")
    finally:
        signal.signal(signal.SIGTERM, previous)


def _load_libraries(report: str | None) -> float:
    """Import what the job needs, and return the memory it took in MiB: --memory counts from
    there."""
    import torch  # noqa: F401

    from . import fit  # noqa: F401
    from .summary import peak_memory

    if importlib.util.find_spec("sklearn") is not None:
        import sklearn.model_selection
        import sklearn.svm  # noqa: F401
    if report is not None:
        from .report import new_figure

        new_figure(1, 1, "")
    return peak_memory()


def _announced_output(out: str, generated: RowSource, options: RefineOptions) -> tuple[str, str, int]:
    """What `check_output` needs to know before the job: the output's place, dtype and likely
    size."""
    if options.method == "weights":
        return out, "float64", 8 * len(generated)
    # how many rows rejection keeps is only known afterwards
    rows = 0 if options.method == "rejection" else options.num or len(generated)
    return out, generated.element, rows * generated.row_bytes


def _check_outputs(
    out: str,
    report: str | None,
    save: str | None,
    sources: tuple[RowSource, ...],
    options: RefineOptions,
) -> None:
    from .io import split_key
    from .output import check_output

    path = split_key(out)[0]
    for source in sources:
        if path.exists() and path.samefile(split_key(source.label)[0]):
            raise ValueError(f"{path}: is an input too; write to another file")
    for other, suffix in ((report, ".png"), (save, ".safetensors")):
        if other is not None:
            if Path(other).suffix.lower() != suffix:
                raise ValueError(f"{other}: must end in {suffix}")
            check_output(Path(other))


def _load_discriminator(path: str | None, device: str | None) -> Any:
    if path is None:
        return None
    from .discriminator import Discriminator

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    return Discriminator.load(path, device=device)


def _write_report(refined: Refined, options: RefineOptions, path: Path, facts: dict[str, Any]) -> None:
    from dataclasses import asdict

    from .report import draw_refined, save_figure, save_json

    title = f"Refined by {options.divergence} at temperature {refined.temperature:.2f}"
    save_figure(draw_refined(refined, title if refined.refinable else "Refused"), path)
    save_json({**facts, "options": asdict(options), **refined.to_dict()}, path.with_suffix(".json"))


@main.command()
@click.option(
    "--task",
    type=click.Choice(["digits", "diffusion", "latent"]),
    default="digits",
    show_default=True,
    help="Reweight a faulty generator, guide a small diffusion, or refine a GAN, a VAE and a flow in latent space.",
)
@click.option("--out", default="refine-ext-demo", show_default=True, metavar="DIR", help="Where results go.")
@click.option("--seeds", type=click.IntRange(min=1), show_default="5 of digits, else 3", help="Repetitions.")
@click.option(
    "--model",
    type=click.Choice(["linear", "mlp"]),
    default="linear",
    show_default=True,
    help="Discriminator of --task digits.",
)
@click.option("--quick", is_flag=True, help="At most two seeds, and less of everything.")
@reporting_errors("--quick")
def demo(task: str, out: str, seeds: int | None, model: str, quick: bool) -> None:
    """Refine generators of handwritten digits, judged on held-out digits."""
    from .demo import require_extras

    require_extras()
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: exists and is not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    # The networks of a diffusion take a minute a seed to train.
    seeds = seeds or (5 if task == "digits" else 3)
    seeds = min(seeds, 2) if quick else seeds
    if task == "digits":
        closing = _demo_digits(folder, seeds, model, quick)
    else:
        closing = _demo_of_networks(folder, seeds, task, quick)
    picture, facts = _DEMO_FILES[task]
    click.echo(f"\n{folder / picture}, {facts}; {time.perf_counter() - started:.0f} s")
    for line in closing:
        click.echo(line)


_DEMO_FILES = {
    "digits": ("demo.png", "demo.json"),
    "diffusion": ("demo_diffusion.png", "report.json"),
    "latent": ("demo_latent.png", "report.json"),
}
# What --quick leaves of the training and of the samples of the tasks that train generators.
_QUICK_EFFORT = 0.1


def _demo_digits(folder: Path, seeds: int, model: str, quick: bool) -> list[str]:
    """Run the task; the lines to end with."""
    from .demo import run_demo, write_samples
    from .demo_figure import draw_demo
    from .pipeline import RefineOptions
    from .report import save_figure, save_json

    options = RefineOptions(progress=False, model=model, num=1000)
    result = run_demo(seeds, number=1500 if quick else 3000, options=options, announce=click.echo)
    _echo_table(result.table())
    click.echo(
        "\n`perfect weights` know every fault; recall counts blends and noise as coverage, so even they lower it."
    )
    click.echo(f"A second generator was refused: {result.hopeless.verdict}.")
    save_figure(draw_demo(result), folder / "demo.png")
    save_json(result.to_dict(), folder / "demo.json")
    write_samples(result, folder)
    return [
        f"The same on files: refine-ext refine --real {folder / 'digits.npy'} "
        f"--generated {folder / 'generated.npy'} --out refined.npy --model {model}"
    ]


def _demo_of_networks(folder: Path, seeds: int, task: str, quick: bool) -> list[str]:
    """Run a task that trains its own generators; the lines to end with."""
    module = importlib.import_module(f".demo_{task}", __package__)
    report = module.run(
        folder, seeds=seeds, seed=0, progress=sys.stderr.isatty(), effort=_QUICK_EFFORT if quick else 1.0
    )
    _echo_table(module.table(report))
    worse = report["not_improved"]
    return [f"Not better on average: {'; '.join(worse)}."] if worse else []


def _echo_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
    click.echo("")
    for row in rows:
        click.echo("".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reporting_errors()
def doctor(as_json: bool) -> None:
    """Say what was built, what runs, and whether CUDA loads."""
    from .doctor import describe, diagnose

    facts = diagnose()
    click.echo(json.dumps(facts, indent=2, default=str) if as_json else describe(facts))
