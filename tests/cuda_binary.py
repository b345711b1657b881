"""What nvcc made of the CUDA kernels, read from the library by NVIDIA's disassemblers."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import refine_ext

LIBRARY = Path(refine_ext.__file__).with_name("librefine_ext_cuda.so")
SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
# Threads and bytes of shared memory of a multiprocessor. sm_90 comprises what is compiled for sm_90a.
ARCHITECTURES = {"sm_80": (2048, 167936), "sm_90": (2048, 233472)}
FORMS = ["exponential", "reciprocal", "inverse_square", "inverse_sqrt", "linear", "power", "logistic", "lambert"]
OUTPUTS = ["none", "log_ratio", "ratio"]
STORAGE = {"float": "float32", "double": "float64", "Half": "float16", "BFloat16": "bfloat16"}
LANES = {"float32": 4, "float64": 2, "float16": 8, "bfloat16": 8}


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


def include_folder() -> Path | None:
    """Where cuda_occupancy.h is: beside nvcc, in the usual place, or in the package nvidia-cuda-runtime."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parents[1] / "include")
    for package in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        folders += [Path(str(file.locate())).parent for file in files if file.name == "cuda_occupancy.h"]
    return next((folder for folder in folders if (folder / "cuda_occupancy.h").exists()), None)


CUOBJDUMP, NVDISASM, INCLUDE = tool("cuobjdump"), tool("nvdisasm"), include_folder()


@cache
def calculator() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "occupancy.so"
        source = Path(__file__).with_name("cuda_occupancy.cpp")
        subprocess.run(["g++", "-O1", "-shared", "-fPIC", f"-I{INCLUDE}", str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


# ---- the sources


class Source(NamedTuple):
    """A kernel as csrc/cuda declares it."""

    name: str
    file: Path
    parameters: list[tuple[str, str]]  # kind and name of each template parameter
    threads: str  # of a block: a number, or the template parameter that says it
    comment: str  # above its budget
    budget: str  # what follows "// budget:", "" if there is none
    span: tuple[int, int]  # where the budget stands in the file


# An argument may be a call or a template: two levels of brackets.
KERNEL = re.compile(
    r"(?P<comment>(?:^//[^\n]*\n)*)(?:^template <(?P<parameters>[^{};]*?)>\n)?"
    r"^__global__ void\s+__launch_bounds__\((?P<threads>\w+)[^()]*\)\s+(?P<name>\w+)\(",
    re.MULTILINE,
)


def declared() -> dict[str, Source]:
    text = {path: path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cu", ".cuh")}
    constants = dict(re.findall(r"constexpr int (\w+) = (\w+);", "\n".join(text.values())))
    kernels = {}
    for path, content in text.items():
        assert content.count("__global__") == len(KERNEL.findall(content)), f"{path.name}: a kernel is not understood"
        for match in KERNEL.finditer(content):
            threads = match["threads"]
            parameters = [tuple(part.split()[-2:]) for part in (match["parameters"] or "").split(",") if part.strip()]
            comment, _, budget = match["comment"].partition("// budget:")
            while not threads.isdigit() and threads not in dict(map(reversed, parameters)):
                threads = constants[threads]
            kernels[match["name"]] = Source(
                match["name"],
                path,
                parameters,
                threads,
                comment,
                re.sub(r"\n// *", " ", budget).strip(),
                (match.start("comment") + len(comment), match.end("comment")),
            )
    return kernels


# ---- the library


class Loop(NamedTuple):
    """One trip of an innermost loop that reads packs of 16 bytes."""

    opcodes: list[str]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes)


LOAD, STORE = r"LDG\.E\.128", r"STG\.E\.128"


def _snake_case(constant: str) -> str:
    return re.sub(r"(?<!^)([A-Z])", r"_\1", constant.removeprefix("k")).lower()


class Kernel:
    def __init__(self, source: Source, architecture: str, arguments: list[str], usage: dict[str, int], code: str):
        self.source, self.architecture = source, architecture
        self.words = self._words(arguments)
        given = {name: value for (_, name), value in zip(source.parameters, arguments, strict=True)}
        self.threads = int(given.get(source.threads, source.threads))
        self.registers, self.local = usage["REG"], usage["STACK"] + usage["LOCAL"]
        # From sm_90 on the count includes what the system reserves.
        self.shared = usage["SHARED"] - (1024 if architecture >= "sm_90" and usage["SHARED"] else 0)
        self.code = code

    def _words(self, arguments: list[str]) -> list[str]:
        """Template arguments as budgets name them: a storage type, a form, an output, a flag that is set."""
        words = []
        for (kind, name), value in zip(self.source.parameters, arguments, strict=True):
            if kind == "bool":
                words += [_snake_case(name)] * (value == "true")
            elif kind in ("Form", "Output"):
                words.append((FORMS if kind == "Form" else OUTPUTS)[int(value[-1])])
            elif kind == "int":
                words.append(f"{_snake_case(name)}={value}")
            elif name == "T":
                words += [STORAGE[value], *["16-bit"] * ("16" in STORAGE[value])]
            else:
                words.append(f"{name}={STORAGE[value]}")
        return words

    def __str__(self) -> str:
        words = [word for word in self.words if word != "16-bit"]
        return f"{self.source.name} ({' '.join(words)}) on {self.architecture}".replace("() ", "")

    @cached_property
    def instructions(self) -> list[tuple[str, str]]:
        """Opcode and operands; a label is an instruction without an opcode."""
        found = re.findall(r"^(?:(\.L_x_\d+):|\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);)", self.code, re.M)
        return [(opcode, label or operands) for label, opcode, operands in found]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode, _ in self.instructions)

    @cached_property
    def loops(self) -> list[Loop]:
        labels = {operands: i for i, (opcode, operands) in enumerate(self.instructions) if not opcode}
        bodies = []
        for i, (opcode, operands) in enumerate(self.instructions):
            if not opcode.startswith("BRA"):
                continue
            target = labels.get("".join(re.findall(r"\.L_x_\d+", operands)), i)
            if target < i:
                body = [name for name, _ in self.instructions[target : i + 1] if name]
                if any(re.match(LOAD, name) for name in body):
                    bodies.append((target, i, body))
        inner = [
            body
            for start, end, body in bodies
            if not any((start, end) != (s, e) and start <= s and e <= end for s, e, _ in bodies)
        ]
        return [Loop(body) for body in inner]

    @property
    def occupancy(self) -> int:
        limits = ARCHITECTURES[self.architecture]
        major, minor = divmod(int(self.architecture[3:]), 10)
        blocks = calculator().blocks_of(major, minor, *limits, self.registers, self.shared, self.threads)
        assert blocks >= 0, "the calculator refuses these properties"
        return 100 * blocks * self.threads // limits[0]

    def per_sample(self, loop: Loop, pattern: str, inputs: int) -> float:
        lanes = next(LANES[word] for word in self.words if word in LANES)
        return loop.count(pattern) * inputs / (loop.count(LOAD) * lanes)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@cache
def kernels(architecture: str) -> list[Kernel]:
    """Everything compiled for an architecture; none if it was not built."""
    assert CUOBJDUMP is not None and NVDISASM is not None
    usage = {
        name: {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", values)}
        for name, values in re.findall(
            r"Function (\S+?):\s+([^\n]*)", _run(CUOBJDUMP, "-res-usage", "-arch", architecture, str(LIBRARY))
        )
    }
    if not usage:
        return []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([CUOBJDUMP, "-xelf", architecture, str(LIBRARY)], check=True, capture_output=True, cwd=folder)
        cubins = sorted(Path(folder).iterdir(), key=lambda path: -path.stat().st_size)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            texts = list(pool.map(lambda path: _run(NVDISASM, "-c", "-raw", "-ndf", str(path)), cubins))
    code = {}
    for text in texts:
        for part in text.split("//--------------------- .text.")[1:]:
            code[part.split(None, 1)[0]] = part
    sources = declared()
    found = []
    readable = subprocess.run(["c++filt"], input="\n".join(usage), capture_output=True, text=True, check=True).stdout
    for mangled, name in zip(usage, readable.split("\n"), strict=False):
        match = re.fullmatch(r"(?:void )?refine_ext::cuda::(\w+)(?:<(.*?)>)?\(.*", name.replace("(refine_ext::", "("))
        assert match and match[1] in sources, f"no source of {name}"
        arguments = re.sub(r"\(\w+\)(\d)|refine_ext::cuda::", r"\1", match[2] or "").split(", ")
        source = sources[match[1]]
        found.append(Kernel(source, architecture, arguments if match[2] else [], usage[mangled], code[mangled]))
    return found
