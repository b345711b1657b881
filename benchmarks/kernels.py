"""The CUDA kernels and ops in the sources, each with a hash of everything that it is compiled from.

A gate run records these hashes; a kernel is verified by that run for as long as its hash stays. No history is asked:
it may be missing where the tree was copied or cloned shallowly. Comments and white space do not count.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(")
OP = re.compile(r'm\.impl\(\s*"(\w+)"')
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


class Source(NamedTuple):
    file: str  # where it is defined, from the root
    hash: str


def _included(path: Path, seen: set[Path]) -> set[Path]:
    """`path` and all files of ours that it includes; others, such as a stand-in that only some builds have, are not."""
    if path in seen or not path.exists():
        return seen
    seen.add(path)
    for name in INCLUDE.findall(path.read_text()):
        _included((path.parent / name).resolve(), seen)
    return seen


def _hash(paths: set[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        text = " ".join(COMMENT.sub(" ", path.read_text()).split())
        digest.update(f"{path.relative_to(root)}\n{text}\n".encode())
    return digest.hexdigest()[:16]


def kernels(root: Path = ROOT) -> dict[str, Source]:
    """Every `__global__` function of csrc/cuda, with the hash of its file and what that includes."""
    found: dict[str, Source] = {}
    for path in sorted((root / "csrc" / "cuda").resolve().glob("*.cu*")):
        for name in KERNEL.findall(COMMENT.sub(" ", path.read_text())):
            if name in found:
                raise ValueError(f"two kernels are called {name}: {found[name].file} and {path.name}")
            found[name] = Source(str(path.relative_to(root.resolve())), _hash(_included(path, set()), root.resolve()))
    return found


def ops(root: Path = ROOT) -> dict[str, Source]:
    """Every op with a CUDA implementation; its hash covers the launchers of its family too (family_cuda.cpp calls what
    family*.cu defines)."""
    found: dict[str, Source] = {}
    base = root.resolve()
    for path in sorted((base / "csrc" / "ops").glob("*_cuda.cpp")):
        family = path.name.removesuffix("_cuda.cpp")
        files = _included(path, set())
        for source in (base / "csrc" / "cuda").glob(f"{family}*.cu"):
            _included(source, files)
        for name in OP.findall(COMMENT.sub(" ", path.read_text())):
            found[name] = Source(str(path.relative_to(base)), _hash(files, base))
    return found


def record(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """The hashes, for a gate's result."""
    return {
        "kernels": {name: source.hash for name, source in kernels(root).items()},
        "ops": {name: source.hash for name, source in ops(root).items()},
    }


def base_name(symbol: str) -> str:
    """A kernel's name as the source has it: `void refine_ext::cuda::scan_kernel<float, false>(…)` is `scan_kernel`."""
    before = re.sub(r"\(anonymous namespace\)", "", symbol)
    before = re.split(r"[<(]", before, maxsplit=1)[0]
    return before.split()[-1].rpartition("::")[2] if before.split() else symbol
