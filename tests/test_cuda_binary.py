"""What nvcc made of the CUDA kernels, read from the library: registers, local memory, 16-byte accesses, atomics.

The budgets behind the comments in csrc/cuda, checked without a GPU. Needs a build with CUDA and the disassemblers
(`cuobjdump` and `nvdisasm` from a CUDA toolkit, or `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

import refine_ext

LIBRARY = Path(refine_ext.__file__).with_name("librefine_ext_cuda.so")
ARCHITECTURES = ("sm_80", "sm_90")
FORMS = [
    "exponential",
    "reciprocal",
    "inverse_square",
    "inverse_sqrt",
    "linear",
    "power",
    "logistic",
    "lambert",
]
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def tool(name: str) -> str | None:
    """A disassembler on the path, or from its package on PyPI."""
    if found := shutil.which(name):
        return found
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name == name]
    return str(paths[0]) if paths else None


CUOBJDUMP, NVDISASM = tool("cuobjdump"), tool("nvdisasm")
pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason="this build has no CUDA library"),
    pytest.mark.skipif(CUOBJDUMP is None or NVDISASM is None, reason="needs cuobjdump and nvdisasm"),
]


class Kernel(NamedTuple):
    name: str  # as C++ writes it, without namespaces and parameters
    registers: int
    stack: int
    opcodes: list[str]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes)


def dump(*arguments: str) -> str:
    assert CUOBJDUMP is not None and NVDISASM is not None
    path = os.pathsep.join([str(Path(NVDISASM).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        [CUOBJDUMP, *arguments, str(LIBRARY)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    ).stdout


def readable(mangled: list[str]) -> list[str]:
    """C++ names; forms by name instead of number."""
    filtered = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = filtered.stdout.replace("refine_ext::cuda::", "").replace("refine_ext::", "").split("\n")
    names = [re.sub(r"\(Form\)(\d)", lambda match: FORMS[int(match[1])], name) for name in names]
    return [re.sub(r"^void |\(.*", "", name.replace("(Output)", "output ")) for name in names]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request) -> list[Kernel]:
    architecture = request.param
    usage = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+)", dump("-res-usage", "-arch", architecture))
    if not usage:
        pytest.skip(f"not built for {architecture}")
    code = {}
    for part in re.split(r"\n\s*Function : ", dump("-sass", "-arch", architecture))[1:]:
        code[part.split("\n", 1)[0].strip()] = INSTRUCTION.findall(part)
    names = readable([name for name, _, _ in usage])
    return [
        Kernel(name, int(registers), int(stack), code[mangled])
        for name, (mangled, registers, stack) in zip(names, usage, strict=True)
    ]


STREAMING = (
    "scan_kernel",
    "evaluate_kernel",
    "write_kernel",
    "real_sum_kernel",
    "dual_output_kernel",
    "dual_slope_kernel",
    "dual_sum_kernel",
    "bound_backward_kernel",
    "backward_sums_kernel",
    "backward_kernel",
)


def streaming(kernels: list[Kernel]) -> list[Kernel]:
    found = [kernel for kernel in kernels if kernel.name.split("<")[0] in STREAMING]
    assert {kernel.name.split("<")[0] for kernel in found} == set(STREAMING)
    return found


def budget(kernel: Kernel) -> int:
    """As kResidentBlocks: 4, 3 or 2 blocks of 256 threads on a multiprocessor."""
    if "double" in kernel.name or "power, " in kernel.name:
        return 128
    wide = ("lambert", "Half", "BFloat16", "backward_sums")
    return 80 if any(word in kernel.name for word in wide) else 64


def test_registers(kernels):
    over = [(kernel.name, kernel.registers) for kernel in streaming(kernels) if kernel.registers > budget(kernel)]
    assert not over
    assert max(kernel.registers for kernel in kernels) <= 128


def test_no_local_memory(kernels):
    """No arrays indexed at run time, no spills but a value or two that are parked outside the loop."""
    spilling = [(kernel.name, kernel.stack, kernel.count("LDL|STL")) for kernel in streaming(kernels) if kernel.stack]
    assert not [entry for entry in spilling if entry[1] > 16 or entry[2] > 8], spilling


def test_packs_of_16_bytes(kernels):
    for kernel in streaming(kernels):
        assert kernel.count(r"LDG\.E\.128") >= 1, kernel.name
        writes = ("write_kernel", "dual_output", "dual_slope", "bound_backward", "backward_kernel")
        if kernel.name.startswith(writes) and "output 0" not in kernel.name:
            assert kernel.count(r"STG\.E\.128") >= 1, kernel.name


def test_no_atomics(kernels):
    """Results are the same bits on every run: the order of every sum is fixed."""
    family = ("density_ratio", "guess", "settle", "finish", *STREAMING)
    ours = [kernel for kernel in kernels if kernel.name.startswith(family)]
    assert ours
    assert not [kernel.name for kernel in ours if kernel.count(r"ATOM|RED\b")]


def test_exponentials_use_the_special_function_unit(kernels):
    """kl reads at the speed of memory only if every e^x of its two packs in flight is one MUFU.EX2."""
    (scan,) = [kernel for kernel in kernels if kernel.name == "scan_kernel<float, false, true>"]
    assert scan.count(r"MUFU\.EX2") >= 8
