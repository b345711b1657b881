"""The compiled CUDA kernels keep the budgets that stand above them in csrc/cuda; checked without a GPU.

Needs a build with CUDA for sm_80 and sm_90, the disassemblers (`cuobjdump` and `nvdisasm` from a CUDA toolkit, or
`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`) and the header cuda_occupancy.h (`nvidia-cuda-runtime`).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cuda_binary
from cuda_binary import SOURCES, Kernel, Source, declared
from cuda_budgets import Budget

TOOLS = (cuda_binary.CUOBJDUMP, cuda_binary.NVDISASM, cuda_binary.INCLUDE)
pytestmark = [
    pytest.mark.skipif(not cuda_binary.LIBRARY.exists(), reason="this build has no CUDA library"),
    pytest.mark.skipif(None in TOOLS, reason="needs cuobjdump, nvdisasm and cuda_occupancy.h"),
]


@pytest.fixture(params=cuda_binary.ARCHITECTURES)
def compiled(request) -> list[Kernel]:
    return cuda_binary.kernels(request.param) or pytest.skip(f"not built for {request.param}")


def test_budgets(compiled):
    violations = [text for kernel in compiled for text in Budget(kernel.source).violations(kernel)]
    assert not violations, "\n".join(violations)


def test_budgets_are_tight():
    """A limit is near what some kernel has, so that a change for the worse does not fit below it."""
    every = [kernel for architecture in cuda_binary.ARCHITECTURES for kernel in cuda_binary.kernels(architecture)]
    loose = []
    for source in declared().values():
        mine = [kernel for kernel in every if kernel.source.name == source.name]
        assert mine, f"{source.name} is declared and not compiled"
        loose += Budget(source).looseness(mine)
    assert not loose, "\n".join(loose)


def test_every_kernel_has_a_budget():
    for source in declared().values():
        assert {"registers", "occupancy"} <= set(Budget(source).limits), f"{source.name} has no budget"
        if any(limit.value for limit in Budget(source).limits.get("local", [])):
            assert "local memory" in source.comment, f"{source.name}: the comment does not say why it has local memory"


def test_every_budget_has_a_kernel():
    for path in SOURCES.iterdir():
        written = len(re.findall(r"^// budget:", path.read_text(), re.MULTILINE))
        read = [source.name for source in declared().values() if source.file == path and source.budget]
        assert written == len(read), f"{path.name}: {written} budgets, of which {read} stand above a kernel"


def source_of(budget: str) -> Source:
    scan = declared()["scan_kernel"]
    return scan._replace(budget=budget)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("registers 64, warps 8", "unknown word 'warps'"),
        ("registers 64, occupancy", "not understood from here on: 'occupancy'"),
        ("registers 64 (float64 128", "not understood"),
    ],
)
def test_the_grammar_is_strict(budget, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Budget(source_of(budget))


def test_a_budget_can_fail(compiled):
    """The checks see a limit below, one far above, one for no kernel, and missing local memory or inputs."""
    (scan,) = [kernel for kernel in compiled if kernel.source.name == "scan_kernel" and kernel.words == ["float32"]]
    exact = ", ".join(Budget(scan.source).rewritten([scan]))
    assert not Budget(source_of(exact)).violations(scan)
    assert not Budget(source_of(exact)).looseness([scan])

    def found(budget: str) -> str:
        broken = Budget(source_of(budget))
        return "\n".join(broken.violations(scan) + broken.looseness([scan]))

    registers = -(-scan.registers // 8) * 8
    smaller = exact.replace(f"registers {registers}", f"registers {registers - 8}")
    name = f"scan_kernel (float32) on {scan.architecture}"
    assert f"{name}: registers {registers}, may have at most {registers - 8}" in found(smaller)
    assert "the nearest has" in found(exact.replace(f"registers {registers}", f"registers {registers + 8}"))
    assert "may have at least 100" in found(re.sub(r"occupancy \d+", "occupancy 100", exact))
    assert "is for no kernel" in found(exact.replace(f"registers {registers}", f"registers {registers} (power 8)"))
    assert "unlike its budget's inputs" in found(re.sub(r"inputs \d", "inputs 0", exact))
    assert "instructions/sample" in found(re.sub(r"instructions/sample \d+", "instructions/sample 1", exact))


def test_no_atomics(compiled):
    """Results are the same bits on every run: the order of every sum is fixed."""
    assert not [str(kernel) for kernel in compiled if kernel.count(r"ATOM|RED\b")]


def test_products_of_parts(compiled):
    """Six products of bfloat16 parts for one of float32, matrices loaded once, nothing in local memory between."""
    for name in ("mixture_product_kernel", "mixture_product_sums_kernel"):
        mine = [kernel for kernel in compiled if kernel.source.name == name]
        assert mine
        for kernel in mine:
            assert kernel.count(r"HMMA\.16816\.F32\.BF16") == kernel.count(r"[A-Z]*MMA") == 6 * 32, str(kernel)
            assert kernel.count(r"LDSM\.16\.") == 36, str(kernel)
            opcodes = [opcode for opcode, _ in kernel.instructions]
            places = [i for i, opcode in enumerate(opcodes) if re.match(r"HMMA|LDSM", opcode)]
            between = opcodes[places[0] : places[-1]]
            assert not [opcode for opcode in between if re.match(r"LDL|STL", opcode)], str(kernel)


def test_products_of_bytes(compiled):
    """Sums of signs are the tensor cores' alone: no other product of theirs, and Hopper's not one at a time."""
    kinds = {"sums_kernel": (r"IMMA\.16832\.U8\.[SU]8", 32), "hopper_sums_kernel": (r"IGMMA\.64x64x32\.U8\.[SU]8", 8)}
    for name, (product, least) in kinds.items():
        for kernel in (kernel for kernel in compiled if kernel.source.name == name):
            products = kernel.count(product)
            assert products == kernel.count(r"[A-Z]*MMA") and products >= least, f"{kernel}: {products} products"
            if name == "hopper_sums_kernel":
                # One wait for each batch of four: ptxas adds more where it cannot let products overlap.
                assert kernel.count(r"WARPGROUP\.DEPBAR") == products / 4, f"{kernel}: products are made one by one"


def test_products_by_warpgroups(compiled):
    """Hopper's six products of two steps each, without a wait but the slice's own."""
    for kernel in (kernel for kernel in compiled if kernel.source.name == "hopper_mixture_kernel"):
        assert kernel.count(r"HGMMA\.64x128x16\.F32\.BF16") == kernel.count(r"[A-Z]*MMA") == 12
        assert kernel.count(r"WARPGROUP\.DEPBAR") == 1, f"{kernel}: products are made one by one"
