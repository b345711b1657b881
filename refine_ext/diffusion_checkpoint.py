"""A curve over T on disk: every finished T, whole or not at all, and what it was computed from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .diffusion_bound_result import DiffusionBound
from .diffusion_bounds import BoundProblem
from .diffusion_scores import Term

_FORMAT = "refine_ext.diffusion_curve"
_VERSION = 1
_TERMS = ("mutual_information", "leave_one_out", "prior_gap", "generator", "score_matching", "score_norm")
_PARTS = ("kl", "kl_variance", "kl_leave_one_out", "prior_kl_root")


class Checkpoint:
    """The `DiffusionBound` of every T that is finished, kept in a safetensors file.

    Args:
        path: the file, read if it exists; None keeps nothing.

    Raises:
        ValueError: a file that is no checkpoint, one of other data or arguments (it says which differ), or a place that
            cannot be written.
    """

    def __init__(self, function: str, path: str | os.PathLike[str] | None, problem: BoundProblem) -> None:
        from .output import check_output

        self.path = None if path is None else Path(path)
        self.problem = problem
        self.found: dict[float, DiffusionBound] = {}
        if self.path is None:
            return
        check_output(self.path)
        self.fingerprint = fingerprint(problem)
        if self.path.exists():
            self._read(function, self.path)

    def at(self, time: float, advance: Callable[[int], Any]) -> DiffusionBound:
        """The bound at a T, computed and written down unless it is there already."""
        if time not in self.found:
            self.found[time] = self.problem.at(time, advance)
            self._write()
        return self.found[time]

    def _write(self) -> None:
        if self.path is None:
            return
        from safetensors.torch import save_file

        from .output import replacing

        bounds = list(self.found.values())
        tensors = {name: torch.stack([getattr(bound, name) for bound in bounds]) for name in _PARTS}
        terms = [{name: getattr(bound, name) for name in _TERMS} for bound in bounds]
        # Python's JSON writes floats with all their digits, and reads back its own NaN.
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "fingerprint": json.dumps(self.fingerprint),
            "times": json.dumps([bound.time for bound in bounds]),
            "terms": json.dumps(terms),
        }
        with replacing(self.path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def _read(self, function: str, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT or metadata.get("version") != str(_VERSION):
                    raise ValueError(f"{function}: {path} is no checkpoint that this version wrote; it stays as it is")
                theirs = json.loads(metadata["fingerprint"])
                times, terms = json.loads(metadata["times"]), json.loads(metadata["terms"])
                parts = {name: file.get_tensor(name) for name in _PARTS}
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{function}: {path} is not a readable checkpoint: {reason}; it stays as it is") from None
        if differing := [key for key in self.fingerprint if theirs.get(key) != self.fingerprint[key]]:
            said = "; ".join(f"{key} was {theirs.get(key)}, is {self.fingerprint[key]}" for key in differing)
            raise ValueError(
                f"{function}: {path} was made with other arguments: {said}. Use these, or another checkpoint"
            )
        for k, (time, each) in enumerate(zip(times, terms, strict=True)):
            read = {name: None if value is None else Term(*value) for name, value in each.items()}
            self.found[time] = self.problem.result(time, read, {name: values[k] for name, values in parts.items()})


def fingerprint(problem: BoundProblem) -> dict[str, Any]:
    """What the terms at a T depend on. R, which only weighs them, does not belong to it."""
    model = problem.model
    facts: dict[str, Any] = {
        "data": digest([problem.data]),
        "shape": [len(problem.data), *problem.shape],
        "dtype": str(problem.data.dtype).removeprefix("torch."),
        "schedule": problem.process.to_dict(),
        "draws": problem.draws,
        "seed": problem.seed,
        "model": None,
    }
    if model is not None:
        facts |= {
            "model": _model_name(model.model),
            "steps": problem.steps,
            "model_draws": problem.model_draws,
            "parametrization": model.parametrization,
            "time_scale": float(model.time_scale),
        }
    return json.loads(json.dumps(facts))


def _model_name(model: Any) -> str:
    """A module's weights, by their digest; of a function only its name is known."""
    if isinstance(model, nn.Module):
        return f"{type(model).__name__} {digest(list(model.state_dict().values()))}"
    return str(getattr(model, "__qualname__", type(model).__name__))


def digest(tensors: list[Any]) -> str:
    """16 hexadecimal digits of SHA-256 over the tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            for block in tensor.detach().reshape(-1).split(1 << 24):
                found.update(block.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
