"""How many threads a stretch of work may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most_threads(number: int) -> Iterator[None]:
    """Limit torch's threads, and the BLAS NumPy calls where `threadpoolctl` is installed, to
    `number`.

    Operations on a few thousand numbers lose more to waking threads than they gain: on two busy
    cores a fit to 800 points in the plane took 3.6 s with two threads and 0.7 s with one.

    Example:
        >>> import torch
        >>> with at_most_threads(1):
        ...     torch.get_num_threads()
        1
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(number, before))
    try:
        try:
            from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
        except ModuleNotFoundError:
            yield
        else:
            with threadpool_limits(number, user_api="blas"):
                yield
    finally:
        torch.set_num_threads(before)
