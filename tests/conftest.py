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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
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


# Which kernels the ops run: the CPU's; CUDA's through the CUDA ops, on the CPU (cuda_on_cpu/); CUDA's on a GPU.
KERNELS = {"cpu": "cpu", "cuda_on_cpu": "cuda_on_cpu", "cuda": pytest.param("cuda", marks=pytest.mark.cuda)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernels" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("kernels")
        metafunc.parametrize("kernels", [KERNELS[k] for k in (only.args if only else KERNELS)], indirect=True)


@pytest.fixture
def kernels(request):
    """A test that takes this, or `device`, runs once for each of KERNELS, or for those that its mark names."""
    if request.param != "cuda_on_cpu":
        yield request.param
        return
    if not emulator.AVAILABLE:
        pytest.skip("needs g++ on Linux")
    with emulator.replace_cpu_ops():
        yield request.param


@pytest.fixture
def device(kernels):
    """The device that a test's tensors are made on, by default too."""
    if kernels != "cuda":
        yield torch.device("cpu")
        return
    with torch.device("cuda") as device:
        yield device


# How far results may be apart that differ in the order of their sums: a rounding of what is stored, or what the search
# for the shift leaves open.
SAME = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.fixture
def assert_same(kernels):
    """Compares results that should not depend on layout or company, with infinities and NaN in the same places.

    Bit for bit on the CPU. The CUDA kernels' sums are in a fixed order too, but which one depends on the row's
    alignment and on the number of rows.
    """

    def compare(got: torch.Tensor, want: torch.Tensor, what: object = "") -> None:
        allowed = 0.0 if kernels == "cpu" else SAME.get(want.dtype, 0.0)
        torch.testing.assert_close(
            got, want, rtol=allowed, atol=allowed, equal_nan=True, msg=lambda text: f"{what}: {text}"
        )

    return compare


@pytest.fixture
def threads():
    """Sets the number of threads of torch, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
