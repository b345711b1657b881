"""Calls of registered ops: past the Python autograd layer where nothing needs it, and errors in the caller's name."""

from __future__ import annotations

from typing import Any

import torch

_ERROR = "refine_ext: "


def called(function: str, op: Any, tracked: bool, *arguments: Any, **out: Any) -> Any:
    """``op(*arguments, **out)``; `tracked`: an argument needs gradients, and grad mode is on.

    Raises:
        ValueError: what the op refuses, by the function that the user called.
    """
    try:
        if tracked or torch.compiler.is_compiling():
            return op(*arguments, **out)
        # The Python autograd layer costs several times the kernel at small sizes.
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments, **out)
    except RuntimeError as error:
        message = str(error)
        at = message.find(_ERROR)
        if at < 0:
            raise
        reason = message[at + len(_ERROR) :].partition(": ")[2].splitlines()[0]
        raise ValueError(f"{function}: {reason}") from None
