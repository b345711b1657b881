"""What torch must know of the drawing ops beyond their kernels: shapes (fake) and vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library  # noqa: F401  (the ops are registered by then)

ops = torch.ops.refine_ext


@torch.library.register_fake("refine_ext::resample")
def _(weights, num, seed, offset, method, log):
    return weights.new_empty((*weights.shape[:-1], num), dtype=torch.int64)


@torch.library.register_fake("refine_ext::rejection")
def _(log_ratio, log_bound, gamma, epsilon, seed, offset):
    rows = log_ratio.shape[:-1]
    return (
        log_ratio.new_empty(log_ratio.shape, dtype=torch.bool),
        log_ratio.new_empty(rows, dtype=torch.float64),
        log_ratio.new_empty(rows, dtype=torch.int64),
    )


@torch.library.register_fake("refine_ext::metropolis")
def _(log_ratio, num, chains, burn_in, thin, in_order, initial, seed):
    return (
        log_ratio.new_empty((chains, num), dtype=torch.int64),
        log_ratio.new_empty((chains,), dtype=torch.int64),
    )


def _front(x: Any, dim: int | None, size: int) -> Any:
    """x with its batch dimension in front, added where there is none: every example has its own seed, so that
    vmap gives what a loop gives."""
    if not isinstance(x, Tensor):
        return x
    return x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)


def _batch(name: str) -> None:
    op = getattr(ops, name).default

    @torch.library.register_vmap(f"refine_ext::{name}")
    def _(info, in_dims, *args):
        output = op(*(_front(x, d, info.batch_size) for x, d in zip(args, in_dims, strict=True)))
        return output, (0 if isinstance(output, Tensor) else (0,) * len(output))


for _name in ("resample", "rejection"):
    _batch(_name)


@torch.library.register_vmap("refine_ext::metropolis")
def _(info, in_dims, *args):
    # The op's own batch is its chains, which share one table of ratios.
    batched = [_front(x, d, info.batch_size) for x, d in zip(args, in_dims, strict=True)]
    examples = [
        ops.metropolis.default(*(x[i] if isinstance(x, Tensor) else x for x in batched)) for i in range(info.batch_size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*examples, strict=True)), (0, 0)
