"""Builds the CUDA kernels for the host and talks to the process that runs them (see cuda_on_cpu.h)."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
COMPILER = shutil.which("g++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-fno-omit-frame-pointer"]
FLAGS += ["-DREFINE_EXT_CUDA_ON_CPU", f"-I{HERE}", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-ffp-contract=off"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
RUNTIME_FLAGS = {"address": "-DCUDA_ON_CPU_ASAN", "thread": "-DCUDA_ON_CPU_TSAN"}


def _kernels(program: str, sanitizer: str) -> list[Path]:
    """The sources of csrc/cuda that a program links."""
    if program == "planted_bugs":
        return []
    if program == "resampling_main":
        return [CUDA / "resampling.cu"]
    kernels = sorted(CUDA.glob("density_ratio*.cu"))
    if sanitizer == "address":
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


def _sources_hash() -> str:
    digest = hashlib.sha256(repr((FLAGS, SANITIZERS)).encode())
    sources = [*HERE.iterdir(), *CUDA.iterdir(), *(CUDA.parent / "math").iterdir()]
    for path in sorted(p for p in sources if p.suffix in {".h", ".cuh", ".cu", ".cpp"}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(program: str, sanitizer: str) -> Path:
    """The path of `program`.cpp compiled with the emulation; built once per state of the sources."""
    assert COMPILER is not None
    folder = Path(tempfile.gettempdir()) / f"refine_ext_cuda_on_cpu_{os.getuid()}_{_sources_hash()}"
    folder.mkdir(exist_ok=True)
    target = folder / f"{program}_{sanitizer}"
    with open(folder / f"{sanitizer}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        flags = [COMPILER, *FLAGS, *SANITIZERS[sanitizer]]
        # The runtime is not instrumented: it is what tells the sanitizer about fibers.
        commands = {HERE / "runtime.cpp": [COMPILER, *FLAGS, RUNTIME_FLAGS[sanitizer]]}
        for source in [HERE / f"{program}.cpp", *_kernels(program, sanitizer)]:
            commands[source] = flags
        objects = {source: folder / f"{sanitizer}_{source.stem}.o" for source in commands}
        jobs = []
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            # The long ones first.
            for source in sorted(commands, key=lambda source: "float" not in source.stem):
                compile_one = [*commands[source], "-x", "c++", "-c", str(source)]
                jobs.append(pool.submit(_make, compile_one, objects[source]))
        for job in jobs:
            job.result()
        _make([COMPILER, *SANITIZERS[sanitizer], *map(str, objects.values())], target)
    return target


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
