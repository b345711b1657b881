"""Calls of registered ops in the name of the function that the user called."""

from __future__ import annotations

from typing import Any

from ._autograd import recorded, unrecorded

_ERROR = "refine_ext: "


def called(function: str, op: Any, tracked: bool, *arguments: Any, **out: Any) -> Any:
    """``op(*arguments, **out)``; `tracked`: an argument needs gradients, and grad mode is on.

    Raises:
        ValueError: what the op refuses, by the function that the user called.
    """
    try:
        if out and tracked:
            return op(*arguments, **out)
        return recorded(op, *arguments) if tracked else unrecorded(op, *arguments, **out)
    except RuntimeError as error:
        message = str(error)
        at = message.find(_ERROR)
        if at < 0:
            raise
        reason = message[at + len(_ERROR) :].partition(": ")[2].splitlines()[0]
        raise ValueError(f"{function}: {reason}") from None
