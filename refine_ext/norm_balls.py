"""Balls of a network's layers: which parameters are one layer's, and the nearest point inside its ball."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]
Projection = Callable[[Parameters], Parameters]
Constraint = Literal["frobenius", "spectral"]


class Layer(NamedTuple):
    """A submodule that owns trainable parameters: its name, their names, and the radius of its ball."""

    name: str
    parameters: tuple[str, ...]
    radius: float


def trainable(function: str, module: nn.Module) -> Parameters:
    """The parameters that require gradients, by name; one that several layers share is there once.

    Raises:
        TypeError: no module, or parameters that are not float64 or float32.
        ValueError: no such parameters, or some that have no shape yet.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{function}: module must be a torch.nn.Module, got {type(module).__name__}")
    found: Parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(f"{function}: module must have a parameter that requires gradients, {_kind(module)} has none")
    for name, p in found.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"{function}: module's {name} has no shape yet; call the module once")
        if p.dtype not in (torch.float64, torch.float32):
            raise TypeError(f"{function}: module's {name} must be float64 or float32, got {p.dtype}")
    return found


def layers_of(function: str, module: nn.Module, parameters: Parameters, norm_bound: float | Sequence[float]):
    """The layers in the module's order, each with its radius."""
    owned = {}
    for prefix, owner in module.named_modules():
        names = tuple(name for name, _ in owner.named_parameters(prefix, recurse=False) if name in parameters)
        if names:
            owned[prefix] = names
    radii = radii_of(function, norm_bound, list(owned))
    return [Layer(name, names, radius) for (name, names), radius in zip(owned.items(), radii, strict=True)]


def radii_of(function: str, norm_bound: float | Sequence[float], layers: Sequence[str]) -> list[float]:
    """One radius a layer, of a number or of one for each."""
    if isinstance(norm_bound, (str, bool)):
        raise TypeError(f"{function}: norm_bound must be a number or one for each layer, got {norm_bound!r}")
    try:
        radii = [float(norm_bound)] * len(layers)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        try:
            radii = [float(each) for each in norm_bound]  # type: ignore[union-attr]
        except (TypeError, ValueError):
            raise TypeError(
                f"{function}: norm_bound must be a number or one for each layer, got {type(norm_bound).__name__}"
            ) from None
    if len(radii) != len(layers):
        raise ValueError(f"{function}: norm_bound must have one entry for each of {list(layers)}, got {len(radii)}")
    if not all(0.0 < radius < math.inf for radius in radii):
        raise ValueError(f"{function}: norm_bound must be positive and finite, got {norm_bound}")
    return radii


def projection_of(
    function: str, constraint: Constraint | Projection, module: nn.Module, layers: Sequence[Layer]
) -> Projection:
    """From stacked parameters ``[draws, ...]`` to the nearest ones inside every layer's ball.

    Raises:
        TypeError, ValueError: a constraint that is no name or function; a layer without a spectral norm.
    """
    if callable(constraint):
        return lambda stacked: _own(function, torch.func.vmap(constraint), stacked)
    if constraint == "frobenius":
        return lambda stacked: _each(layers, stacked, _into_frobenius_ball, matrices=False)
    if constraint != "spectral":
        raise ValueError(f"{function}: constraint must be 'frobenius', 'spectral' or a function, got {constraint!r}")
    for layer in layers:
        owner = module.get_submodule(layer.name)
        if not isinstance(owner, nn.Linear):
            raise ValueError(
                f"{function}: constraint 'spectral' knows nn.Linear only, layer {layer.name!r} is {_kind(owner)}; use "
                "'frobenius', or give a projection of your own"
            )
    return lambda stacked: _each(layers, stacked, _into_spectral_ball, matrices=True)


def _own(function: str, projection: Projection, stacked: Parameters) -> Parameters:
    """What the caller's projection makes, if it is one of the same parameters."""
    projected = projection(stacked)
    if not isinstance(projected, dict) or projected.keys() != stacked.keys():
        got = list(projected) if isinstance(projected, dict) else type(projected).__name__
        raise ValueError(f"{function}: constraint must return a dict of {list(stacked)}, got {got}")
    for name, p in projected.items():
        if p.shape != stacked[name].shape or p.dtype != stacked[name].dtype:
            raise ValueError(
                f"{function}: constraint must leave {name} {list(stacked[name].shape[1:])} {stacked[name].dtype}, got "
                f"{list(p.shape[1:])} {p.dtype}"
            )
    return projected


def _each(
    layers: Sequence[Layer], stacked: Parameters, into_ball: Callable[[Tensor, float], Tensor], *, matrices: bool
) -> Parameters:
    """A layer's parameters side by side: as the matrices [W b] of nn.Linear, or as vectors; inside its ball."""
    projected: Parameters = {}
    for layer in layers:
        parts = [stacked[name] for name in layer.parameters]
        flat = [part.reshape(len(part), part.shape[1] if matrices else 1, -1) for part in parts]
        inside = into_ball(torch.cat(flat, 2), layer.radius)
        pieces = inside.split([part.shape[2] for part in flat], 2)
        projected |= {n: piece.reshape(p.shape) for n, piece, p in zip(layer.parameters, pieces, parts, strict=True)}
    return projected


def _into_frobenius_ball(matrices: Tensor, radius: float) -> Tensor:
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    return matrices * (radius / norms).clamp(max=1.0)


def _into_spectral_ball(matrices: Tensor, radius: float) -> Tensor:
    """The singular values cut at the radius, the nearest point in the Frobenius norm.

    By the smaller Gram matrix A'A = V L V': A V min(1, radius / sqrt L) V', where only eigenvalues above the
    radius' square matter, of which squaring loses nothing. Several times cheaper than singular vectors.
    """
    transposed = matrices.shape[1] < matrices.shape[2]
    tall = matrices.mT if transposed else matrices
    values, vectors = torch.linalg.eigh(tall.mT @ tall)
    cut = (radius / values.clamp(min=radius * radius).sqrt())[:, None, :]
    inside = tall @ ((vectors * cut) @ vectors.mT)
    return inside.mT if transposed else inside


def _kind(module: nn.Module) -> str:
    return type(module).__name__
