"""The quick cases of a benchmark, measured for next to no time: what tests of its tables look at."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import common
import pytest
import torch


def measured(bench: ModuleType) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(common.BUDGET, "cpu", 0.02)
        found = [common.measure(case, "cpu") for case in bench.cases("cpu", quick=True)]
    torch.set_num_threads(threads)
    return found
