"""What on a GPU would wait for it, seen on the CPU."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counts what would wait for a device: values read into Python, shapes that depend on values."""

    waiting = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().partition("::")[2].partition(".")[0] in self.waiting:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))
