"""Another library's array: what DLPack's protocol shows of it."""

from __future__ import annotations

from typing import Any


class Exchanged:
    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()
