"""The command `refine-ext rademacher`."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import Draws, Size, reporting_errors, terminate

if TYPE_CHECKING:
    from torch import Tensor

    from .complexity_estimate import Estimate
    from .io import RowSource

_CLASSES = ("finite", "linear", "l1")


@click.command()
@click.option("--outputs", required=True, metavar="FILE", help="Outputs or features [n, m], one sample in each row.")
@click.option(
    "--class",
    "family",
    type=click.Choice(_CLASSES),
    default="finite",
    show_default=True,
    help="finite: the columns are the functions; linear, l1: <w, row> with the 2-norm or the 1-norm of w bounded.",
)
@click.option("--norm-bound", type=float, help="Of --class linear and l1. [default: 1]")
@click.option("--one-sided", is_flag=True, help="--class finite without the negatives of the functions.")
@click.option("--draws", type=Draws(), default=1024, show_default=True, help="Sign vectors; `all` 2^n of n <= 20.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--first-draw", type=click.IntRange(min=0), default=0, show_default=True, help="Number of the first draw."
)
@click.option("--stderr", type=float, help="Double the draws until the standard error is so small.")
@click.option("--max-draws", type=click.IntRange(min=1), help="Most draws of --stderr. [default: 1048576]")
@click.option(
    "--distribution",
    type=click.Choice(["rademacher", "normal"]),
    default="rademacher",
    show_default=True,
    help="Signs, or normal multipliers: the Gaussian complexity.",
)
@click.option("--bound", type=float, help="Largest |f(x)| there can be. [default: the largest seen]")
@click.option("--delta", type=float, default=0.05, show_default=True, help="The upper limit fails with at most this.")
@click.option("--memory", type=Size(), default="1GiB", show_default=True, help="Most memory the data may use.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute, e.g. cuda.")
@click.option("--json", "json_path", metavar="FILE", help="Write the figures there too.")
@click.option("--quiet", is_flag=True, help="Print errors only; no progress bar.")
@reporting_errors("a smaller --memory")
def rademacher(
    outputs: str,
    family: str,
    norm_bound: float | None,
    one_sided: bool,
    delta: float,
    memory: int,
    device: str,
    json_path: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Rademacher complexity of functions from their outputs on n samples.

    The file is .npy, .npz, .pt or .safetensors, with FILE:KEY for one array of several; rows of several dimensions are
    flattened. It may be larger than memory: it is read in blocks, and again for every group of draws whose sums fit
    into --memory.
    """
    from ._library import usable_device
    from .io import open_rows, split_key
    from .output import check_output
    from .report import save_json
    from .summary import describe_rows, peak_memory

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        if not 0.0 < delta < 1.0:
            raise ValueError(f"--delta must be between 0 and 1, got {delta}")
        if family == "finite" and norm_bound is not None:
            raise ValueError("--norm-bound is for --class linear and l1")
        if family != "finite" and one_sided:
            raise ValueError("--one-sided is for --class finite")
        source = open_rows(outputs)
        if json_path is not None:
            check_output(Path(json_path))
            if Path(json_path).exists() and Path(json_path).samefile(split_key(outputs)[0]):
                raise ValueError(f"{json_path}: is the input; write to another file")
        where = usable_device("rademacher", device)
        started, before = time.perf_counter(), peak_memory()
        options |= {"memory": memory, "progress": not quiet and sys.stderr.isatty()}
        estimate = _function(family, norm_bound, one_sided)(_values(source, where, memory), **options)
        facts = {
            "outputs": outputs,
            "shape": list(source.shape),
            "dtype": source.element,
            "class": family,
            "norm_bound": norm_bound if norm_bound is not None or family == "finite" else 1.0,
            **estimate.to_dict(delta),
            "seconds": time.perf_counter() - started,
            "peak_mib": peak_memory(),
        }
        if not quiet:
            click.echo(f"{'outputs':<12} {describe_rows(source)}")
            click.echo(_table(estimate, delta))
            data = peak_memory() - before
            click.echo(
                f"{'took':<12} {facts['seconds']:.1f} s, {data:.0f} MiB of data beside {before:.0f} of libraries"
            )
        if json_path is not None:
            save_json(facts, Path(json_path))
            if not quiet:
                click.echo(f"{'wrote':<12} {json_path}")
    finally:
        signal.signal(signal.SIGTERM, previous)


def _function(family: str, norm_bound: float | None, one_sided: bool) -> Callable[..., Estimate]:
    from functools import partial

    from .rademacher import rademacher, rademacher_l1, rademacher_linear

    if family == "finite":
        return partial(rademacher, absolute=not one_sided)
    norm_bound = 1.0 if norm_bound is None else norm_bound
    return partial(rademacher_linear if family == "linear" else rademacher_l1, norm_bound=norm_bound)


def _values(source: RowSource, device: Any, memory: int) -> Tensor | Callable[[], Iterator[Tensor]]:
    """All rows where they take no more than half of the memory, else a function that reads them in blocks."""
    from .rademacher_stream import SIGN_BLOCK
    from .samples import stored_tensor

    def blocks(size: int) -> Iterator[Tensor]:
        return (stored_tensor(source, raw).to(device) for _, raw in source.blocks(size))

    if source.row_bytes * len(source) <= memory // 2:
        return next(blocks(source.row_bytes * len(source)))
    least = SIGN_BLOCK * source.row_bytes
    if least > memory // 4:
        raise ValueError(
            f"{source.label}: {SIGN_BLOCK} rows, which are summed at once, take {least / 2**20:.1f} MiB; --memory must "
            "be four times that"
        )
    return lambda: blocks(max(least, memory // 8))


def _table(estimate: Estimate, delta: float) -> str:
    drawn = f"{estimate.draws} from number {estimate.ranges[0][0]} of seed {estimate.seed}"
    rows = [
        ("complexity", f"{estimate}"),
        ("upper limit", f"{estimate.upper(delta):.6g} with probability {1 - delta:g}, for |f| <= {estimate.bound:.6g}"),
        ("draws", "each sign vector once" if estimate.enumerated else drawn),
    ]
    if estimate.effective_draws < estimate.draws:
        rows.append(("", f"{estimate.effective_draws} of them different: `--draws all` takes each once"))
    return "\n".join(f"{title:<12} {text}" for title, text in rows)
