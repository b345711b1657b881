"""Builds the CUDA ops and kernels for the host and puts them in the place of the CPU's (see cuda_on_cpu.h)."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.library import Library

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CUDA = CSRC / "cuda"
RUNTIME = [HERE / "runtime.cpp", HERE / "wgmma.cpp"]
COMPILER = "g++"
AVAILABLE = shutil.which(COMPILER) is not None and sys.platform == "linux"
FLAGS = ["-std=c++20", "-fno-strict-aliasing", "-DREFINE_EXT_CUDA_ON_CPU", "-DREFINE_EXT_HOPPER", f"-I{HERE}"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"]
OPS = ["-O1", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Without optimisation, and with checks as calls, the kernels compile three times as fast.
CHECKED = ["-O0", "-g1", "-fno-omit-frame-pointer", "-fPIC", "-fvisibility=hidden"]
CHECKS_AS_CALLS = ["--param", "asan-instrumentation-with-call-threshold=0"]
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"


class Sanitizer(NamedTuple):
    flags: list[str]
    runtime: str  # flag for RUNTIME, which is not instrumented: it tells the sanitizer about fibers
    preload: str  # the sanitizer's own library, for a Python that was built without it
    plain: tuple[str, ...]  # sources whose memory accesses are those of another one, with other types


SANITIZERS = {
    "address": Sanitizer(
        [f"-fsanitize=address,{UNDEFINED}", "-fno-sanitize-recover=all", *CHECKS_AS_CALLS],
        "-DCUDA_ON_CPU_ASAN",
        "libasan.so",
        ("bfloat16",),
    ),
    "thread": Sanitizer(["-fsanitize=thread"], "-DCUDA_ON_CPU_TSAN", "libtsan.so", ("float16", "float64")),
}


def _make(command: list[str], target: Path) -> None:
    """Runs `command`, which writes `target`; one that is there already was finished, perhaps by an earlier run."""
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
    digest = hashlib.sha256(repr((FLAGS, OPS, CHECKED, SANITIZERS, str(_torch()))).encode())
    sources = [path for folder in (HERE, CUDA, CSRC / "math", CSRC / "ops") for path in folder.iterdir()]
    for path in sorted(p for p in sources if p.suffix in {".h", ".cuh", ".cu", ".cpp"}):
        digest.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"refine_ext_cuda_on_cpu_{os.getuid()}_{digest.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    return folder


def _torch() -> Path:
    return Path(torch.__file__).parent


def _compile(sources: dict[Path, list[str]], prefix: str) -> list[str]:
    """Objects of `sources`, each compiled with its flags."""
    objects = {source: _folder() / f"{prefix}_{source.stem}.o" for source in sources}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        # The long ones first.
        jobs = [
            pool.submit(_make, [COMPILER, *FLAGS, *sources[source], "-x", "c++", "-c", str(source)], objects[source])
            for source in sorted(sources, key=lambda source: "float" not in source.stem)
        ]
    for job in jobs:
        job.result()
    return [str(path) for path in objects.values()]


@contextmanager
def _locked() -> Iterator[None]:
    """One process builds, the others wait and find what it built."""
    with open(_folder() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_ops(sanitizer: str = "") -> Path:
    """The CUDA ops and kernels as a library for the CPU; built once per state of the sources."""
    target = _folder() / f"ops{sanitizer}.so"
    with _locked():
        if target.exists():
            return target
        torch_include = ["-isystem", str(_torch() / "include")]
        kernels = set(CUDA.glob("*.cu"))
        checked: dict[Path, list[str]] = {}
        if sanitizer:
            kind = SANITIZERS[sanitizer]
            instrumented = (source for source in kernels if not source.stem.endswith(kind.plain))
            checked = {source: [*CHECKED, *kind.flags] for source in instrumented}
            checked |= {source: [*OPS, kind.runtime] for source in RUNTIME}
        plain = {source: OPS for source in [*kernels, *RUNTIME] if source not in checked}
        for source in [*(CSRC / "ops").glob("*_cuda.cpp"), CSRC / "ops" / "library.cpp"]:
            plain[source] = [*OPS, *torch_include]
        objects = _compile(checked, sanitizer) + _compile(plain, "ops")
        lib = _torch() / "lib"
        libraries = ["-Wl,--no-as-needed", str(lib / "libtorch.so"), str(lib / "libtorch_cpu.so"), f"-Wl,-rpath,{lib}"]
        flags = SANITIZERS[sanitizer].flags if sanitizer else []
        _make([COMPILER, "-shared", *flags, *objects, *libraries], target)
    return target


def build_program(name: str, sanitizer: str) -> Path:
    """`name`.cpp, which needs no kernels but its own, with a sanitizer."""
    target = _folder() / f"{name}_{sanitizer}"
    with _locked():
        if not target.exists():
            kind = SANITIZERS[sanitizer]
            sources = {HERE / f"{name}.cpp": [*CHECKED, *kind.flags]}
            sources |= {source: [*OPS, kind.runtime] for source in RUNTIME}
            _make([COMPILER, *kind.flags, *_compile(sources, sanitizer)], target)
    return target


@functools.cache
def load_ops() -> Path:
    """Registers torch.ops.refine_ext_on_cpu, of the sanitizer that CUDA_ON_CPU_SANITIZER names; returns the library."""
    library = build_ops(os.environ.get("CUDA_ON_CPU_SANITIZER", ""))
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
    overrides = Library("refine_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name in _op_names():
            overrides.impl(name, getattr(torch.ops.refine_ext_on_cpu, name).default, "CPU", allow_override=True)
    try:
        yield
    finally:
        overrides._destroy()


@functools.cache
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
    """Names of the kernels in a record that runtime.cpp wrote."""
    kernels = kernels_of(binary)
    return {kernels[int(line, 16)] for line in record.read_text().split()}


@contextmanager
def launches(where: str) -> Iterator[set[str]]:
    """Names of the kernels that are launched within, on a GPU ("cuda") or here; there when it ends."""
    names: set[str] = set()
    if where == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as session:
            yield names
        names.update(event.name for event in session.events())
        return
    library = load_ops()
    write = ctypes.CDLL(str(library)).cuda_on_cpu_write_launched
    with tempfile.NamedTemporaryFile() as record:
        path = os.fsencode(record.name)
        write(path)
        yield names
        write(path)
        names.update(launched(Path(record.name), library))


def environment(**settings: str) -> dict[str, str]:
    """Settings for a run under a sanitizer, whose report ends the process with an error."""
    return {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
        **settings,
    }


def python_environment(sanitizer: str, **settings: str) -> dict[str, str]:
    """The same for a Python process that loads the sanitized ops."""
    name = SANITIZERS[sanitizer].preload
    path = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return environment(
        LD_PRELOAD=path.stdout.strip(),
        CUDA_ON_CPU_SANITIZER=sanitizer,
        OMP_NUM_THREADS="1",  # torch's own threads are not instrumented
        **settings,
    )
