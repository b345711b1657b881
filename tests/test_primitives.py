"""What the hardware defines: the tensor cores' fragments, matrices from shared memory, Philox's multiplications.

cuda_on_cpu/primitives_main.cpp is compiled with the emulation, under its sanitizers, and with nvcc, for a GPU; both are
compared with NumPy. The emulation and the kernels could share a wrong idea of a layout: only the GPU would tell.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import emulator
import numpy as np
import pytest
import resampling_reference
import torch
from cuda_binary import CUOBJDUMP, NVDISASM

NVCC = shutil.which("nvcc")
SOURCE = Path(emulator.__file__).with_name("primitives_main.cpp")
OPS = ["product", "shared_product", "philox", "unsigned_product", "signed_product"]
OPS += ["group_product", "unsigned_group_product", "signed_group_product"]


def compile_for_gpu(folder: Path, hopper: bool = False) -> Path:
    """With Hopper's own instructions, for it alone."""
    if NVCC is None:
        pytest.skip("needs nvcc")
    target = folder / f"primitives{hopper}"
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (["90a"] if hopper else [80, 90])]
    code += [] if hopper else ["-gencode=arch=compute_90,code=compute_90"]
    command = [NVCC, "-std=c++20", "-O2", "-x", "cu", "--expt-relaxed-constexpr", *code, str(SOURCE), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


@pytest.fixture(scope="module", params=["address", "thread", pytest.param("cuda", marks=pytest.mark.cuda)])
def program(request, tmp_path_factory):
    if request.param == "cuda":
        return compile_for_gpu(tmp_path_factory.mktemp("primitives"))
    if not emulator.AVAILABLE:
        pytest.skip("needs g++ on Linux")
    return emulator.build_program("primitives_main", request.param)


@pytest.fixture(scope="module", params=["address", "thread", pytest.param("cuda", marks=pytest.mark.cuda)])
def hopper_program(request, tmp_path_factory):
    if request.param == "cuda":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a GPU of compute capability 9.0")
        return compile_for_gpu(tmp_path_factory.mktemp("primitives"), hopper=True)
    if not emulator.AVAILABLE:
        pytest.skip("needs g++ on Linux")
    return emulator.build_program("primitives_main", request.param)


def ask(program: Path, op: str, sizes: tuple[int, int, int], a: np.ndarray, b: np.ndarray) -> bytes:
    request = struct.pack("<4q", OPS.index(op), *sizes)
    for array in (a, b):
        data = np.ascontiguousarray(array).tobytes()
        request += struct.pack("<q", len(data)) + data
    done = subprocess.run([str(program)], input=request, capture_output=True, env=emulator.environment())
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, rounded to nearest even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def wide(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def multiply(program: Path, op: str, a: np.ndarray, b: np.ndarray, by_columns: bool) -> np.ndarray:
    shape = a.shape[0], b.shape[1]
    answer = ask(program, op, (*shape, a.shape[1]), a, b.T if by_columns else b)
    return np.frombuffer(answer, dtype=np.float32).reshape(shape).astype(np.float64)


def check_products(program: Path, op: str, sizes: tuple[tuple[int, int, int], ...]) -> None:
    rng = np.random.default_rng(0)
    by_columns = op == "group_product"  # B is stored so
    for m, n, k in sizes:
        # Small integers: every sum is exact, and any element in a wrong place shows.
        a, b = (rng.integers(-99, 99, shape).astype(float) for shape in ((m, k), (k, n)))
        got = multiply(program, op, bfloat16(a), bfloat16(b), by_columns)
        np.testing.assert_array_equal(got, a @ b)
        # Powers of ten: a sum of k products, each step rounded, or cut off, at an ulp of the largest term so far.
        a, b = (bfloat16(rng.normal(size=x.shape) * 10 ** rng.uniform(-3, 3, x.shape)) for x in (a, b))
        got = multiply(program, op, a, b, by_columns)
        a, b = wide(a), wide(b)
        assert (np.abs(got - a @ b) <= (k + 1) * 2.0**-23 * (np.abs(a) @ np.abs(b))).all()


@pytest.mark.parametrize("op", ["product", "shared_product"])
def test_products(program, op):
    check_products(program, op, ((16, 64, 16), (48, 128, 80)))


def test_products_by_warpgroups(hopper_program):
    check_products(hopper_program, "group_product", ((64, 128, 32), (128, 256, 96)))


def check_byte_products(program: Path, op: str, sizes: tuple[tuple[int, int, int], ...]) -> None:
    """Exact, every byte in its place; sums wrap around 2^32 where they must."""
    rng = np.random.default_rng(2)
    for m, n, k in sizes:
        a = rng.integers(0, 256, (m, k), dtype=np.uint8)
        b = rng.integers(0, 256, (n, k), dtype=np.uint8)
        answer = ask(program, op, (m, n, k), a, b)
        values = b.view(np.int8) if op.startswith("signed") else b
        got = np.frombuffer(answer, dtype=np.int32).reshape(m, n)
        np.testing.assert_array_equal(got, a.astype(np.int64) @ values.astype(np.int64).T)


@pytest.mark.parametrize("op", ["unsigned_product", "signed_product"])
def test_byte_products(program, op):
    check_byte_products(program, op, ((16, 8, 32), (48, 24, 96)))


@pytest.mark.parametrize("op", ["unsigned_group_product", "signed_group_product"])
def test_byte_products_by_warpgroups(hopper_program, op):
    check_byte_products(hopper_program, op, ((64, 64, 128), (128, 192, 384)))


def test_philox(program):
    words = np.random.default_rng(1).integers(0, 2**32, (1001, 6), dtype=np.uint32)
    words[0], words[1] = 0, 2**32 - 1
    answer = ask(program, "philox", (len(words), 0, 0), words, np.empty(0))
    want = [resampling_reference.philox(row[:4], row[4:]) for row in words.tolist()]
    assert np.frombuffer(answer, dtype=np.uint32).reshape(-1, 4).tolist() == want


@pytest.mark.skipif(CUOBJDUMP is None or NVDISASM is None, reason="needs cuobjdump and nvdisasm")
def test_machine_code(tmp_path):
    """One tensor-core instruction a product of 16 x 8 x 16, one load for four matrices, no memory of a thread's own."""
    assert CUOBJDUMP is not None and NVDISASM is not None
    program = compile_for_gpu(tmp_path)
    path = os.pathsep.join([str(Path(NVDISASM).parent), os.environ.get("PATH", "")])
    for arch in ("sm_80", "sm_90"):
        command = [CUOBJDUMP, "-arch", arch, "-sass", str(program)]
        dump = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
        ).stdout
        function = re.compile(r"Function : \S*?\d([a-z_]+_kernel)\w*\n(.*?)(?=\n\s*Function :|\Z)", re.DOTALL)
        kernels = dict(function.findall(dump))
        assert kernels.keys() == {
            *("product_kernel", "shared_product_kernel", "philox_kernel", "byte_product_kernel"),
            *("group_product_kernel", "group_byte_product_kernel"),  # empty
        }
        code = kernels["byte_product_kernel"]
        assert len(re.findall(r"IMMA", code)) == len(re.findall(r"IMMA\.16832\.U8\.[US]8", code)) > 0, code
        assert re.findall(r"LDGSTS\.E\.BYPASS\.128", code), code
        for name, tiles, loads in (("product_kernel", 1, 0), ("shared_product_kernel", 2, 2)):
            code = kernels[name]
            products = len(re.findall(r"HMMA\.16816\.F32\.BF16", code))
            assert products and products % tiles == 0, code
            assert len(re.findall(r"HMMA", code)) == products
            assert len(re.findall(r"LDSM\.16\.M(?:T)?88\.4", code)) * tiles == products * loads
            assert not re.findall(r"\b(?:LDL|STL)\b", code)
