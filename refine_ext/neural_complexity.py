"""Rademacher complexity of a network class from below: many draws' maximisers trained at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ._ops_rademacher import ops
from .arguments import positive, whole
from .complexity_estimate import Estimate
from .guidance import philox_normal
from .network_checks import FirstBad, one_output_each
from .norm_balls import Constraint, Layer, Parameters, Projection, layers_of, projection_of, trainable
from .progress import progress_bar
from .rademacher_suprema import seed_of
from .samples import as_column, as_tensor, count_nonfinite

_FUNCTION = "rademacher_neural"
_MOMENTUM = 0.9
_MEMORY = 1 << 28
_COPIES = 8  # of a network's parameters: at hand, moved, projected, slopes, momentum, best, and two in passing
_PROBE_ROWS = 64
_FAR = 1e3  # norm bounds from the centre at which searches in named balls start, before they are projected


class _Search(NamedTuple):
    """The problem of every draw: the class, the samples, and how the class is searched."""

    module: nn.Module
    x: Tensor
    layers: list[Layer]
    project: Projection
    named: bool
    absolute: bool
    steps: int
    learning_rate: float
    restarts: int
    rows: int  # through the networks at once


class _Found(NamedTuple):
    """Of each draw the best value seen, and the parameters that have it."""

    value: Tensor
    parameters: Parameters


def rademacher_neural(
    module: nn.Module,
    x: Tensor | np.ndarray,
    draws: int = 64,
    seed: int | None = None,
    *,
    constraint: Constraint | Projection = "frobenius",
    norm_bound: float | Sequence[float] = 1.0,
    absolute: bool = True,
    steps: int = 200,
    learning_rate: float = 1.0,
    restarts: int = 1,
    first_draw: int = 0,
    draws_at_once: int | None = None,
    memory: int = _MEMORY,
    outputs: Tensor | None = None,
    progress: bool | None = None,
) -> Estimate:
    """A lower estimate of the empirical Rademacher complexity of a class of networks,

    ``E_sigma sup_theta |(1/n) sum_i sigma_i f_theta(x_i)|``, theta in the balls of its layers,

    by projected gradient ascent from random starts, all draws at once. The supremum over a network's weights is
    not concave: each draw's value is that of the best network found, so that the mean is below the complexity up
    to the draws' standard error, and how far is not known. `rademacher_norm_bounds` bounds it from above.

    Args:
        module: the network's architecture, ``x[b, ...] -> [b]`` or ``[b, 1]``; its values do not matter, except
            those of buffers and of parameters that do not require gradients, which belong to every network of the
            class. A layer is a submodule that owns trainable parameters. The module is left as it is.
        x: samples ``[n, ...]``, taken to the parameters' dtype and device.
        draws: number of sign vectors, those of `rademacher` for this seed.
        seed: of signs and starts. None: drawn from torch's default generator.
        constraint: "frobenius": weight and bias of a layer are one vector of Euclidean norm at most its norm bound.
            "spectral": the matrix [W b] of an nn.Linear has no singular value above its norm bound; a bias is the
            weight of a further input that is 1. Or a function from one network's parameters (a dict from name to
            tensor) to the nearest allowed ones, run under torch.func.vmap: the class is then its image. Networks lie
            in their balls up to the rounding of their dtype.
        norm_bound: B of the named constraints, one for all layers or one for each, in the module's order.
        absolute: the supremum of the magnitude. Otherwise of the value itself, which is the same where -f is in the
            class with f, as it is if the last layer is linear.
        steps: of the ascent; each is one forward and one backward pass. More steps never lower a value.
        learning_rate: step t moves a layer by learning_rate / sqrt(t + 1) of its norm bound (of a function's
            constraint: of its norm at the start) along the momentum of its normalised gradients.
        restarts: starts of each draw, of which the best one counts.
        first_draw: number of the first draw, so that parts of one run can be merged.
        draws_at_once: draws whose networks, `restarts` of each, are trained together. None: as many as fit into the
            memory. Values do not depend on it beyond the rounding of the network's matrix products.
        memory: bytes that networks and what their backward passes keep may take; where one network's pass takes more,
            samples go through in blocks.
        outputs: a tensor ``[n, draws]`` to fill with the outputs of the networks found. They are a finite class inside
            this one: `rademacher` of them with another seed is a lower estimate whose signs no search has seen.
        progress: a bar where it takes over a second. None: on a terminal.

    Returns:
        An `Estimate` with kind "lower".

    Raises:
        TypeError: a module, samples or options of another type; parameters that are not float64 or float32.
        ValueError: a module without trainable parameters, with other outputs, in a mode that makes them random or
            dependent on the batch, or that cannot run under vmap; a layer without a spectral norm; values that are
            not finite, in `x` or on the way.

    Source: the definition in Bartlett and Mendelson, "Rademacher and Gaussian complexities: risk bounds and
    structural results", JMLR 2002. Any function of the class bounds the supremum from below.

    >>> import torch, refine_ext as rx
    >>> x = torch.eye(4).repeat(9, 1)[:, :2]
    >>> est = rx.rademacher_neural(torch.nn.Linear(2, 1, bias=False), x, draws=8, seed=0)
    >>> abs(float(est) / float(rx.rademacher_linear(x, draws=8, seed=0)) - 1) < 1e-6
    True
    """
    parameters = trainable(_FUNCTION, module)
    x = _samples(x, next(iter(parameters.values())))
    draws, steps = whole(_FUNCTION, "draws", draws, 1), whole(_FUNCTION, "steps", steps, 1)
    restarts, first_draw = whole(_FUNCTION, "restarts", restarts, 1), whole(_FUNCTION, "first_draw", first_draw, 0)
    learning_rate = positive(_FUNCTION, "learning_rate", learning_rate)
    seed, memory = seed_of(_FUNCTION, seed), whole(_FUNCTION, "memory", memory, 1)
    layers = layers_of(_FUNCTION, module, parameters, norm_bound)
    project = projection_of(_FUNCTION, constraint, module, layers)
    _check_outputs(outputs, len(x), draws)
    # Tensors made in inference mode cannot enter a backward pass; what is made here can.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.clone() if x.is_inference() else x
        saved = _probe(module, parameters, x)
        weights = _COPIES * sum(p.nbytes for p in parameters.values())
        at_once = max(1, memory // (restarts * (saved * len(x) + weights))) if draws_at_once is None else draws_at_once
        at_once = min(draws, whole(_FUNCTION, "draws_at_once", at_once, 1))
        rows = max(1, memory // (restarts * saved * at_once))
        named, rate = isinstance(constraint, str), float(learning_rate)
        search = _Search(module, x, layers, project, named, absolute, steps, rate, restarts, rows)
        suprema = _over_draws(search, parameters, seed, (first_draw, draws), at_once, outputs, progress)
    of = f"{constraint} norm <= {norm_bound}" if isinstance(constraint, str) else "constrained"
    return Estimate(suprema, len(x), ((first_draw, draws),), seed, f"{type(module).__name__}, {of}", kind="lower")


def _over_draws(
    search: _Search,
    parameters: Parameters,
    seed: int,
    draws: tuple[int, int],
    at_once: int,
    outputs: Tensor | None,
    progress: bool | None,
) -> Tensor:
    """The best value of each of (first, count) draws, so many at once; fills `outputs`."""
    first, count = draws
    parts = []
    with progress_bar(_FUNCTION, -(-count // at_once) * search.steps, progress, "step") as bar:
        for start in range(0, count, at_once):
            these = range(first + start, first + min(start + at_once, count))
            signs = ops.multipliers(search.x, len(search.x), len(these), 0, these.start, seed, False)
            starts = _starts(search, parameters, seed, these)
            found = _ascend(search, starts, signs.repeat(search.restarts, 1), bar.update)
            value, restart = found.value.view(search.restarts, len(these)).max(0)
            parts.append(value)
            if outputs is not None:
                place = restart * len(these) + torch.arange(len(these), device=restart.device)
                best = {name: p[place] for name, p in found.parameters.items()}
                with torch.no_grad():
                    made = [_networks(search.module, best, x) for x in search.x.split(search.rows)]
                    outputs[:, start : start + len(these)] = torch.cat(made, 1).T
    return torch.cat(parts)


def _ascend(search: _Search, parameters: Parameters, signs: Tensor, update: Callable[[], object]) -> _Found:
    """The best of the first `steps` iterates of each draw, the start among them.

    A layer moves along the momentum of gradients of norm one, by steps that are fractions of its ball: networks
    that are homogeneous in their layers then climb alike whatever their norm bounds are. Steps shrink as 1/sqrt(t),
    whatever `steps` is, so that a longer search begins with the shorter one.
    """
    best = _Found(signs.new_full((len(signs),), -math.inf, dtype=torch.float64), parameters)
    momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
    sizes: dict[str, Tensor] = {}
    for layer in search.layers:
        norm = _norm([parameters[name] for name in layer.parameters])
        sizes |= dict.fromkeys(layer.parameters, torch.where(norm > 0, norm, 1.0))
    bad = FirstBad()
    for step in range(search.steps):
        value, slopes = _value_and_slopes(search, parameters, signs)
        bad.note(~value.isfinite(), step)
        best = _better(_Found(value, parameters), best)
        update()
        moved = {}
        for layer in search.layers:
            norm = _norm([slopes[name] for name in layer.parameters])
            for name in layer.parameters:
                p, slope = parameters[name], slopes[name]
                # A layer without a slope, or whose slope is not finite at a finite value, goes on as it went.
                unit = torch.nan_to_num(slope / as_column(norm, slope), nan=0.0, posinf=0.0, neginf=0.0)
                momentum[name] = _MOMENTUM * momentum[name] + unit
                length = search.learning_rate / math.sqrt(step + 1) * sizes[name]
                moved[name] = p + as_column(length, p) * momentum[name]
        parameters = search.project(moved)
    place = bad.take()
    if place is not None:
        raise ValueError(f"{_FUNCTION}: module returned NaN or infinity at step {int(place)} of the search")
    return best


def _value_and_slopes(search: _Search, parameters: Parameters, signs: Tensor) -> tuple[Tensor, Parameters]:
    """Each draw's (1/n) |sum_i sigma_i f(x_i)| in float64, and the gradients of its n-fold; samples in blocks."""
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    total = torch.zeros(len(signs), dtype=torch.float64, device=signs.device)
    slopes: list[Tensor] = []
    for x, block in zip(search.x.split(search.rows), signs.split(search.rows, 1), strict=True):
        sums = (_networks(search.module, leaves, x).double() * block).sum(1)
        each = torch.autograd.grad(sums.sum(), list(leaves.values()), materialize_grads=True, allow_unused=True)
        slopes = list(each) if not slopes else [a + b for a, b in zip(slopes, each, strict=True)]
        total += sums.detach()
    if search.absolute:
        negative = total < 0
        slopes = [torch.where(as_column(negative, slope), -slope, slope) for slope in slopes]
        total = total.abs()
    return total / len(search.x), dict(zip(leaves, slopes, strict=True))


def _networks(module: nn.Module, parameters: Parameters, x: Tensor) -> Tensor:
    """[draws, b] outputs of networks with stacked parameters on the same samples."""
    return torch.func.vmap(lambda each: torch.func.functional_call(module, each, (x,)).reshape(len(x)))(parameters)


def _starts(search: _Search, parameters: Parameters, seed: int, draws: range) -> Parameters:
    """Normal numbers of each draw's own, [restarts * draws, ...], brought into the class: of balls to their edge."""
    seeds = torch.arange(draws.start, draws.stop, device=search.x.device) + seed  # wraps around, as good a key
    scale = {name: _FAR * layer.radius if search.named else 1.0 for layer in search.layers for name in layer.parameters}
    starts = {}
    for k, (name, p) in enumerate(parameters.items()):
        steps = range(k, search.restarts * len(parameters), len(parameters))
        size = (len(draws), *p.shape)
        numbers = [philox_normal(size, seeds, step=step, dtype=p.dtype, device=p.device) for step in steps]
        starts[name] = scale[name] * torch.cat(numbers)
    return search.project(starts)


def _better(new: _Found, old: _Found) -> _Found:
    take = new.value > old.value
    kept = {name: torch.where(as_column(take, p), p, old.parameters[name]) for name, p in new.parameters.items()}
    return _Found(torch.where(take, new.value, old.value), kept)


def _norm(parts: Sequence[Tensor]) -> Tensor:
    """[draws] Euclidean norms of tensors [draws, ...] taken together."""
    return torch.cat([part.flatten(1) for part in parts], 1).norm(dim=1)


def _samples(x: Tensor | np.ndarray, like: Tensor) -> Tensor:
    x = as_tensor(x, function=_FUNCTION, argument="x")
    if x.numel() == 0:
        raise ValueError(f"{_FUNCTION}: x is empty, shape {list(x.shape)}")
    bad = count_nonfinite(x)
    if bad:
        raise ValueError(
            f"{_FUNCTION}: x has {bad} NaN or infinite values of {x.numel()}; only finite ones are allowed"
        )
    return x.to(device=like.device, dtype=like.dtype)


def _check_outputs(outputs: Tensor | None, n: int, draws: int) -> None:
    if outputs is None:
        return
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        got = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"{_FUNCTION}: outputs must be a floating tensor to fill, got {got}")
    if outputs.shape != (n, draws) or outputs.requires_grad:
        raise ValueError(
            f"{_FUNCTION}: outputs must be [{n}, {draws}] and require no gradients, got {list(outputs.shape)}, "
            f"requires_grad={outputs.requires_grad}"
        )


def _probe(module: nn.Module, parameters: Parameters, x: Tensor) -> int:
    """One call as the search makes them, refused if its outputs are no function of weights and sample alone.

    Returns:
        bytes that a sample leaves for the backward pass of one network.
    """
    for name, each in module.named_modules():
        random = isinstance(each, nn.modules.dropout._DropoutNd) and each.p > 0
        if each.training and (random or isinstance(each, nn.modules.batchnorm._BatchNorm)):
            raise ValueError(
                f"{_FUNCTION}: module's {name or 'itself'} is {type(each).__name__} in training mode, which makes the "
                "output random or dependent on the batch; call its eval()"
            )
    rows = x[:_PROBE_ROWS]
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    own = {p.data_ptr() for p in [*parameters.values(), *buffers.values()]}
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += 0 if tensor.data_ptr() in own else tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        values = torch.func.functional_call(module, {**parameters, **buffers}, (rows,))
    h = one_output_each(_FUNCTION, "module", values, len(rows))
    for name, buffer in buffers.items():
        if not torch.equal(buffer, before[name]):
            raise ValueError(f"{_FUNCTION}: module changes its buffer {name} when it is called; call its eval()")
    if not h.requires_grad:
        raise ValueError(f"{_FUNCTION}: module's output does not depend on its parameters, or hides it from autograd")
    try:
        with torch.no_grad():
            _networks(module, {name: p.detach()[None] for name, p in parameters.items()}, rows)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{_FUNCTION}: module cannot run under torch.func.vmap: {reason}") from error
    return max(1, saved // len(rows))
