"""The command `refine-ext bound`."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._ops_guidance import PARAMETRIZATIONS
from .console import EXIT_INTERRUPTED, Constant, Times, reporting_errors, terminate
from .forward_process import SCHEDULES

if TYPE_CHECKING:
    from torch import Tensor

    from .io import RowSource


@click.command()
@click.option("--data", required=True, metavar="FILE", help="Training samples [m, ...], scaled as the diffusion's.")
@click.option(
    "--model",
    metavar="MODEL",
    help="The network, called as model(x, t): a torch.export (.pt2) or TorchScript (.pt) file, or package.module:name. "
    "Without one, the terms of the data alone.",
)
@click.option("--schedule", type=click.Choice(SCHEDULES), default="vp", show_default=True)
@click.option(
    "--constant",
    "constants",
    type=Constant(),
    multiple=True,
    help="Of the schedule, e.g. beta_max=20 or sigma_max=80; repeat for more.",
)
@click.option("--times", type=Times(), help="T to try: 0.2,0.5,1 or FROM:TO:COUNT. [default: 20 over the schedule]")
@click.option("--optimize", is_flag=True, help="Search on between the neighbours of the best of --times.")
@click.option("--sub-gaussian", type=float, default=1.0, show_default=True, help="R, of the loss.")
@click.option("--draws", type=click.IntRange(min=2), default=100, show_default=True, help="Noise vectors a sample.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--parametrization",
    type=click.Choice(PARAMETRIZATIONS),
    default="score",
    show_default=True,
    help="What --model returns.",
)
@click.option("--time-scale", type=float, default=1.0, show_default=True, help="--model is given this times t.")
@click.option("--steps", type=click.IntRange(min=1), default=1000, show_default=True, help="N, of the model's terms.")
@click.option(
    "--model-draws",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Evaluations of --model a step, for each of its two terms.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Of calls of --model. [default: by size]")
@click.option(
    "--checkpoint",
    metavar="FILE",
    help="Finished T are kept there (.safetensors): the same command goes on where it was interrupted.",
)
@click.option("--plot", metavar="PNG", help="Draw the curve.")
@click.option("--json", "json_path", metavar="FILE", help="Write the figures.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute, e.g. cuda.")
@click.option("--quiet", is_flag=True, help="Print errors only; no progress bar.")
@reporting_errors("fewer samples, or a smaller --batch-size with --model")
def bound(
    data: str,
    model: str | None,
    schedule: str,
    constants: tuple[tuple[str, float], ...],
    times: list[float] | None,
    checkpoint: str | None,
    plot: str | None,
    json_path: str | None,
    device: str,
    quiet: bool,
    **options: Any,
) -> None:
    """The diffusion time T with the lowest generalisation bound, from training samples.

    A + √2 R B + √2 R C + L_sm over T, after Chen, Zhu and Shkurti 2025: A and B need the samples only, C and L_sm a
    score network. The file is .npy, .npz, .pt or .safetensors, with FILE:KEY for one array of several.
    """
    from ._library import usable_device
    from .diffusion_time import select_diffusion_time
    from .forward_process import forward_process
    from .io import open_rows
    from .model_spec import load_model
    from .output import output_path
    from .report import require_matplotlib
    from .summary import describe_rows, peak_memory

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        source = open_rows(data)
        if plot is not None:
            require_matplotlib()
            output_path("bound", plot, ".png")
        if json_path is not None:
            output_path("bound", json_path, ".json")
        where = usable_device("bound", device)
        network = None if model is None else load_model(model, where)
        process = forward_process(schedule, **dict(constants))
        started = time.perf_counter()
        selection = select_diffusion_time(
            _samples(source, where),
            times,
            network,
            schedule=process,
            checkpoint=checkpoint,
            progress=not quiet and sys.stderr.isatty(),
            **options,
        )
        if not quiet:
            click.echo(f"{'data':<12} {describe_rows(source)}")
            click.echo(str(selection))
            click.echo(f"{'took':<12} {time.perf_counter() - started:.1f} s, {peak_memory():.0f} MiB at most")
        if json_path is not None:
            from .report import save_json

            facts = {"data": data, "model": model, "seconds": time.perf_counter() - started, **selection.to_dict()}
            save_json(facts, Path(json_path))
        if plot is not None:
            selection.plot(plot)
        if not quiet and (written := [path for path in (plot, json_path) if path is not None]):
            click.echo(f"{'wrote':<12} {', '.join(written)}")
    except KeyboardInterrupt:
        if checkpoint is None or not Path(checkpoint).exists():
            raise
        click.echo(f"\ninterrupted: finished T are in {checkpoint}; the same command goes on", err=True)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _samples(source: RowSource, device: Any) -> Tensor:
    from .samples import stored_tensor

    raw = source.read(0, len(source))
    return stored_tensor(source, raw).reshape(source.shape).to(device)
