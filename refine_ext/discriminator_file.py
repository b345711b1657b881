"""The file of a discriminator: safetensors, with what is needed to build the network again as metadata."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .output import replacing

_VERSION = "1"
_MAGIC = {
    b"\x80": "a Python pickle",
    b"PK": "a zip archive such as torch.save or numpy.savez writes",
    b"\x93NUMPY": "a NumPy .npy file",
}


def write(module: nn.Module, path: str | os.PathLike[str], configuration: Mapping[str, Any]) -> None:
    """Weights and JSON configuration of a module, whole or not at all; the format is named after its class.

    Raises:
        OSError: the file cannot be written; an older file is then left as it was.
    """
    name = type(module).__name__
    metadata = {"format": _format(name), "version": _VERSION}
    metadata |= {key: json.dumps(_jsonable(value)) for key, value in configuration.items()}
    # Clones: safetensors refuses tensors that share memory, such as tied weights.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
    try:
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{name}.save: cannot write {path}: {error}") from error


def read(name: str, path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and configuration that :func:`write` wrote for a class of this name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a pickle, another foreign file, a truncated or damaged one.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys()) if metadata.get("format") == _format(name) else []
            tensors = {key: file.get_tensor(key) for key in names}
    except SafetensorError as error:
        raise ValueError(f"{name}.load: {_refusal(name, Path(path), str(error))}") from None
    if metadata.pop("format", None) != _format(name):
        raise ValueError(f"{name}.load: {path} is a safetensors file but not one written by {name}.save")
    if metadata["version"] != _VERSION:
        raise ValueError(f"{name}.load: {path} has format version {metadata['version']}, this package reads {_VERSION}")
    try:
        return tensors, {key: _numbers(json.loads(value)) for key, value in metadata.items()}
    except json.JSONDecodeError as error:
        raise damaged(name, path, error) from None


def damaged(name: str, path: str | os.PathLike[str], error: Exception) -> ValueError:
    """The error of a configuration that does not say what it should."""
    return ValueError(f"{name}.load: {path} has a damaged configuration: {error!r}")


def load_weights(module: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Put the weights into a module.

    Raises:
        ValueError: they do not fit.
    """
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        name = type(module).__name__
        raise ValueError(f"{name}.load: the weights of {path} do not fit the model: {reason}") from None


def _format(name: str) -> str:
    return "refine_ext." + "".join(f"_{c.lower()}" if c.isupper() else c for c in name).removeprefix("_")


def _jsonable(value: Any) -> Any:
    """JSON has no infinities; they are written as strings that float() reads."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return float(value) if value in ("inf", "-inf", "nan") else value


def _refusal(name: str, path: Path, reason: str) -> str:
    # Only after safetensors refused it: a sound file's first byte, a length, may look like these.
    with path.open("rb") as file:
        head = file.read(8)
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return (
                f"{path} is {what}, refused because such files can run code when read; "
                f"use a file written by {name}.save (safetensors)"
            )
    size = path.stat().st_size
    return f"{path} ({size} bytes) is truncated or not a safetensors file: {reason}"
