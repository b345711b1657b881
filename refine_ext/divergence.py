"""Names of the f-divergences, and what the kernels need to know of each."""

from __future__ import annotations

import functools
import math

import torch

from . import _C

_CODES = _C.divergence_codes()
_LOGIT = _CODES.pop("logit")
KINDS = ("variational", "logit")


def divergences() -> tuple[str, ...]:
    """Names that every `divergence` argument takes; `alpha` stands for `alpha:<a>`, e.g. ``"alpha:0.5"``.

    >>> import refine_ext as rx
    >>> rx.divergences()[:3]
    ('kl', 'reverse_kl', 'jensen_shannon')
    """
    return tuple(_CODES)


def parse_divergence(function: str, name: str, kind: str = "variational") -> tuple[int, float]:
    """Code and alpha of a divergence name; kind "logit" gives the code of a plain log-ratio."""
    if torch.compiler.is_compiling():  # it warns of every cache it looks through
        return _parse(function, name, kind)
    try:
        return _parse_once(function, name, kind)
    except TypeError:  # not hashable, and so not a string
        return _parse(function, name, kind)


def _parse(function: str, name: str, kind: str) -> tuple[int, float]:
    if not isinstance(name, str):
        raise TypeError(f"{function}: divergence must be a string, got {type(name).__name__}")
    if kind not in KINDS:
        raise ValueError(f"{function}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    base, colon, parameter = name.partition(":")
    code, alpha = _CODES.get(base), 0.0
    if code is None or (base == "alpha") != bool(colon):
        allowed = ", ".join(n if n != "alpha" else "alpha:<a>" for n in _CODES)
        raise ValueError(f"{function}: divergence must be one of {allowed}, got {name!r}")
    if colon:
        try:
            alpha = float(parameter)
        except ValueError:
            alpha = math.nan
        if not math.isfinite(alpha) or alpha in (0.0, 1.0):
            raise ValueError(
                f"{function}: alpha must be a finite number other than 0 (that is reverse_kl) "
                f"and 1 (that is kl), got {name!r}"
            )
    return (_LOGIT, 0.0) if kind == "logit" else (code, alpha)


_parse_once = functools.lru_cache(maxsize=256)(_parse)
