"""Builds the CUDA kernels for the host and talks to the process that runs them (see cuda_on_cpu.h)."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CUDA = CSRC / "cuda"
COMPILER = shutil.which("g++")
AVAILABLE = COMPILER is not None and sys.platform == "linux"
FLAGS = ["-std=c++20", "-fno-strict-aliasing", "-DREFINE_EXT_CUDA_ON_CPU", f"-I{HERE}"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"]
# What a build is for: the op library, which tests load, or a program under a sanitizer.
KINDS = {
    "ops": ["-O1", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"],
    "address": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=thread"],
}
# The runtime is not instrumented: it is what tells the sanitizer about fibers.
RUNTIME = {
    "ops": KINDS["ops"],
    "address": ["-O1", "-g1", "-DCUDA_ON_CPU_ASAN"],
    "thread": ["-O1", "-g1", "-DCUDA_ON_CPU_TSAN"],
}


def _kernels(program: str, kind: str) -> list[Path]:
    """The sources of csrc/cuda that a program links."""
    if program in {"planted_bugs", "primitives_main"}:
        return []
    if program == "resampling_main":
        return [CUDA / "resampling.cu"]
    kernels = sorted(CUDA.glob("density_ratio*.cu"))
    if kind == "address":
        return kernels
    # The race check instruments every access; one storage type is enough for it.
    others = [kernel for kernel in kernels if "16" not in kernel.stem and "64" not in kernel.stem]
    return [HERE / "float32_only.cpp", *others]


def _make(command: list[str], target: Path) -> None:
    """Runs `command`, which writes `target`; one that is there already was finished, perhaps by an earlier session."""
    if target.exists():
        return
    unfinished = target.with_suffix(".unfinished")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    os.replace(unfinished, target)


@functools.cache
def _folder() -> Path:
    """Where this state of the sources is built."""
    digest = hashlib.sha256(repr((FLAGS, KINDS, RUNTIME, str(_torch()))).encode())
    sources = [path for folder in (HERE, CUDA, CSRC / "math", CSRC / "ops") for path in folder.iterdir()]
    for path in sorted(p for p in sources if p.suffix in {".h", ".cuh", ".cu", ".cpp"}):
        digest.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"refine_ext_cuda_on_cpu_{os.getuid()}_{digest.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    return folder


def _torch() -> Path:
    return Path(torch.__file__).parent


def _build(target: str, kind: str, sources: list[Path], options: Sequence[str] = (), link: Sequence[str] = ()) -> Path:
    """Compiles and links `sources` and the runtime; built once per state of the sources."""
    assert COMPILER is not None
    built = _folder() / target
    with open(_folder() / f"{kind}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if built.exists():
            return built
        commands = {source: [COMPILER, *FLAGS, *KINDS[kind], *options] for source in sources}
        commands[HERE / "runtime.cpp"] = [COMPILER, *FLAGS, *RUNTIME[kind]]
        objects = {source: _folder() / f"{kind}_{source.stem}.o" for source in commands}
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            # The long ones first.
            jobs = [
                pool.submit(_make, [*commands[source], "-x", "c++", "-c", str(source)], objects[source])
                for source in sorted(commands, key=lambda source: "float" not in source.stem)
            ]
        for job in jobs:
            job.result()
        _make([COMPILER, *KINDS[kind], *map(str, objects.values()), *link], built)
    return built


def build(program: str, sanitizer: str) -> Path:
    """The path of `program`.cpp compiled with the emulation and a sanitizer, "address" or "thread"."""
    return _build(f"{program}_{sanitizer}", sanitizer, [HERE / f"{program}.cpp", *_kernels(program, sanitizer)])


@functools.cache
def load_ops() -> Path:
    """Registers torch.ops.refine_ext_on_cpu, the CUDA ops with their kernels run on the CPU; returns the library."""
    sources = [*CUDA.glob("*.cu"), *(CSRC / "ops").glob("*_cuda.cpp"), CSRC / "ops" / "library.cpp"]
    include, lib = _torch() / "include", _torch() / "lib"
    link = ["-shared", "-Wl,--no-as-needed", str(lib / "libtorch.so"), str(lib / "libtorch_cpu.so")]
    library = _build("ops.so", "ops", sorted(sources), ["-isystem", str(include)], [*link, f"-Wl,-rpath,{lib}"])
    torch.ops.load_library(str(library))
    return library


@functools.cache
def _op_names() -> list[str]:
    load_ops()
    names = [schema.name.partition("::") for schema in torch._C._jit_get_all_schemas()]
    return [name for namespace, _, name in names if namespace == "refine_ext_on_cpu"]


@contextmanager
def replace_cpu_ops() -> Iterator[None]:
    """Within, torch.ops.refine_ext runs the CUDA ops on CPU tensors."""
    library = torch.library.Library("refine_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name in _op_names():
            library.impl(name, getattr(torch.ops.refine_ext_on_cpu, name).default, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def kernels_of(binary: Path) -> dict[int, str]:
    """The kernels compiled into a binary: their offsets and names, template arguments included."""
    names = subprocess.run(["nm", "-C", "--defined-only", str(binary)], capture_output=True, text=True, check=True)
    found = {}
    for line in names.stdout.splitlines():
        address, kind, name = line.split(" ", 2)
        kernel = re.search(r"refine_ext::cuda::(\w+)[<(]", name)
        if kind in "tTwW" and kernel and kernel[1] in kernel_names() and "[clone" not in name:
            found[int(address, 16)] = name
    return found


@functools.cache
def kernel_names() -> dict[str, str]:
    """Every __global__ function of csrc/cuda, and its file."""
    pattern = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(")
    names = {}
    for path in sorted([*CUDA.glob("*.cuh"), *CUDA.glob("*.cu")]):
        text = path.read_text()
        found = pattern.findall(text)
        assert len(found) == text.count("__global__"), f"{path.name} declares a kernel in a way not understood here"
        names.update(dict.fromkeys(found, path.name))
    return names


def launched(record: Path, binary: Path) -> set[str]:
    """Names of the kernels in a record that cuda_on_cpu_write_launched wrote."""
    kernels = kernels_of(binary)
    return {kernels[int(line, 16)] for line in record.read_text().split()}


def environment(**settings: str) -> dict[str, str]:
    """Settings for a run; a report of a sanitizer ends the process with an error."""
    return {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
        **settings,
    }


class Answer(NamedTuple):
    out: np.ndarray
    stats: np.ndarray
    values: np.ndarray


OPS = ["ratio", "bound", "bound_backward", "backward", "output", "slope", "dual_bound"]
STORAGE = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
OUTPUT = {"none": 0, "log_ratio": 1, "ratio": 2}


def encode(values: np.ndarray, storage: str) -> np.ndarray:
    """As stored: bfloat16 as its 16 bits, rounded to nearest even."""
    if storage != "bfloat16":
        return np.ascontiguousarray(values, dtype=storage)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def decode(stored: np.ndarray, storage: str) -> np.ndarray:
    """What is stored, in float64."""
    if storage == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


class Process:
    """A program of this folder: requests on its standard input, arrays on its standard output."""

    def __init__(self, program: Path, **settings: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 — open as long as the process
        self._process = subprocess.Popen(
            [str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment(**settings),
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.returncode == 0, self._report()

    def _report(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[:6000].decode(errors="replace")

    def _receive(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) != size:
            self._process.wait()
            raise AssertionError(f"the emulation stopped:\n{self._report()}")
        return data

    def ask(self, request: bytes, arrays: Sequence[np.ndarray | None], answers: int) -> list[bytes]:
        """Sends a request and its arrays, each after its size; returns so many arrays' bytes."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request)
            for array in arrays:
                data = b"" if array is None else np.ascontiguousarray(array).tobytes()
                self._process.stdin.write(struct.pack("<q", len(data)) + data)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(f"the emulation stopped:\n{self._report()}") from None
        return [self._receive(struct.unpack("<q", self._receive(8))[0]) for _ in range(answers)]


class Emulator(Process):
    """Runs the density-ratio kernels, one request at a time."""

    def call(
        self,
        op: str,
        storage: str,
        divergence: int,
        h: np.ndarray,
        *,
        alpha: float = 0.0,
        weights: np.ndarray | None = None,
        shift: np.ndarray | None = None,
        other: np.ndarray | None = None,
        stats: np.ndarray | None = None,
        grad_stats: np.ndarray | None = None,
        output: str = "log_ratio",
        fixed: bool = False,
        flag: bool = False,
        wide: bool = False,
        in_place: bool = False,
        misaligned: int = 0,
        out_misaligned: int | None = None,
    ) -> Answer:
        """One request; h is [rows, n] of stored values, results come back stored as well."""
        rows, n = h.shape
        real_n = other.shape[-1] if other is not None and op in {"bound", "dual_bound"} else 0
        request = struct.pack(
            "<6qd9q",
            *(OPS.index(op), STORAGE[storage], rows, n, real_n, divergence),
            alpha,
            *(OUTPUT[output], fixed, shift is not None and shift.size > 1),
            n if weights is not None and weights.ndim == 2 else 0,
            *(flag, wide, in_place, misaligned),
            misaligned if out_misaligned is None else out_misaligned,
        )
        parts = self.ask(request, (h, weights, shift, other, stats, grad_stats), answers=3)
        return Answer(
            np.frombuffer(parts[0], dtype=h.dtype).reshape(h.shape),
            np.frombuffer(parts[1], dtype=np.float64).reshape(-1, 8),
            np.frombuffer(parts[2], dtype=np.float64 if wide else np.float32),
        )
