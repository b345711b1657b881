"""What every test shares: reproducible random numbers, hypothesis without wall-clock limits, marks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Worker processes of pytest-xdist and the machine's other users share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings

import refine_ext  # noqa: F401 — registers the ops

sys.path.insert(0, str(Path(__file__).parent / "cuda_on_cpu"))

import emulator

# Derandomised: a failure is the same failure for everybody; REFINE_EXT_HYPOTHESIS=random explores new examples.
settings.register_profile(
    "fixed",
    deadline=None,
    max_examples=40,
    derandomize=True,
    # All examples of a test run on the one device that its fixture has set up.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("random", parent=settings.get_profile("fixed"), derandomize=False, max_examples=400)
settings.load_profile(os.environ.get("REFINE_EXT_HYPOTHESIS", "fixed"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marks = config.getoption("-m") or ""
    no_cuda = pytest.mark.skip(reason="needs a CUDA device")
    on_demand = pytest.mark.skip(reason="takes minutes; run with -m slow")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(no_cuda)
        if item.get_closest_marker("slow") and "slow" not in marks:
            item.add_marker(on_demand)


@pytest.fixture(autouse=True, scope="session")
def _outside_the_checkout(tmp_path_factory):
    """`python -c` and `-m` put the working directory first: from the checkout they would import its unbuilt sources."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "cuda_on_cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def kernels(request):
    """Which kernels the ops run: the CPU's; CUDA's through the CUDA ops, on the CPU (cuda_on_cpu/); CUDA's on a GPU."""
    if request.param != "cuda_on_cpu":
        yield request.param
        return
    if not emulator.AVAILABLE:
        pytest.skip("needs g++ on Linux")
    with emulator.replace_cpu_ops():
        yield request.param


@pytest.fixture
def device(kernels):
    """The device that a test's tensors are made on, by default too: the same test runs for every kind of kernels."""
    device = torch.device("cuda" if kernels == "cuda" else "cpu")
    with device:
        yield device


@pytest.fixture
def threads():
    """Sets the number of threads of torch, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
