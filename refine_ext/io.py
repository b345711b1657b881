"""Arrays of samples on disk, read in bounded blocks. (`output.py` is the other direction.)

A file is named by its path, or by `path:key` where it holds several arrays. Formats go by the
suffix: `.npy`, `.npz`,
`.pt`/`.pth` (loaded with `weights_only=True`) and `.safetensors`. Files that hold pickled objects
are refused.

Blocks are read at a known offset rather than through a mapped page range: the
memory used is then
the block and nothing more, an address-space limit is respected, and a file that is cut short by
somebody else while it is
being read gives an error instead of a bus error.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
import weakref
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")

# name -> (numpy dtype that holds the bits, safetensors code); bfloat16 has no numpy type, its bits
# travel as uint16
ELEMENTS: dict[str, tuple[str, str]] = {
    "float64": ("float64", "F64"),
    "float32": ("float32", "F32"),
    "float16": ("float16", "F16"),
    "bfloat16": ("uint16", "BF16"),
    "int64": ("int64", "I64"),
    "int32": ("int32", "I32"),
    "int16": ("int16", "I16"),
    "int8": ("int8", "I8"),
    "uint64": ("uint64", "U64"),
    "uint32": ("uint32", "U32"),
    "uint16": ("uint16", "U16"),
    "uint8": ("uint8", "U8"),
    "bool": ("bool", "BOOL"),
}
_FROM_CODE = {code: name for name, (_, code) in ELEMENTS.items()}


def storage_dtype(element: str) -> np.dtype[Any]:
    """The numpy dtype whose bits store one element of the named type."""
    return np.dtype(ELEMENTS[element][0])


def split_key(spec: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """`path:key` -> (path, key); a plain path, or one that exists with the colon in its name, has
    no key."""
    text = os.fspath(spec)
    path, colon, key = text.rpartition(":")
    if not colon or Path(path).suffix.lower() not in SUFFIXES or os.path.exists(text):
        return Path(text), None
    if not key:
        raise ValueError(f"{text}: the key after the colon is empty; write FILE:KEY")
    return Path(path), key


def file_format(path: Path) -> str:
    """The format a suffix stands for: "npy", "npz", "pt" or "safetensors"."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown file type {suffix!r}; allowed: {', '.join(SUFFIXES)}")
    return "pt" if suffix == ".pth" else suffix[1:]


class RowSource(ABC):
    """An array [n, ...] on disk (or in memory) whose rows are read in blocks as raw bytes."""

    def __init__(self, label: str, shape: tuple[int, ...], element: str) -> None:
        if element not in ELEMENTS:
            raise ValueError(f"{label}: dtype {element} is not supported; allowed: {', '.join(ELEMENTS)}")
        if not shape:
            raise ValueError(f"{label}: is a single number; samples must have shape [n, ...]")
        if 0 in shape:
            raise ValueError(f"{label}: is empty, shape {list(shape)}; every size must be positive")
        self.label, self.shape, self.element = label, tuple(int(s) for s in shape), element
        self.features = int(np.prod(self.shape[1:], dtype=np.int64))
        self.row_bytes = self.features * storage_dtype(element).itemsize
        # 64- and 32-bit integers and float64 would lose digits in float32
        wide = element in ("float64", "int64", "int32", "uint64", "uint32")
        self.decoded_dtype = np.dtype(np.float64 if wide else np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop as native-endian bytes, uint8 [stop - start, row_bytes]."""

    def decode(self, raw: np.ndarray) -> np.ndarray:
        """Bytes of rows -> float [rows, ...] of `decoded_dtype`; raises where a value is not
        finite."""
        flat = np.ascontiguousarray(raw).view(storage_dtype(self.element))
        if self.element == "bfloat16":
            values = (flat.astype(np.uint32) << 16).view(np.float32)
        else:
            values = flat.astype(self.decoded_dtype)
        bad = values.size - int(np.count_nonzero(np.isfinite(values)))
        if bad:
            raise ValueError(
                f"{self.label}: {bad} of {values.size} values read are NaN or infinite; samples must be finite"
            )
        return values.reshape((-1, *self.shape[1:]))

    def blocks(self, block_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, bytes of the block) over all rows in order, each block at most `block_bytes`
        (or one row)."""
        rows = max(1, block_bytes // max(1, self.row_bytes))
        for start in range(0, len(self), rows):
            yield start, self.read(start, min(start + rows, len(self)))

    def select(self, rows: np.ndarray, block_bytes: int) -> Iterator[np.ndarray]:
        """Bytes of the rows named by ascending indices (repeats allowed), block by block; the file
        is passed once."""
        step = max(1, block_bytes // max(1, self.row_bytes))
        position = 0
        while position < len(rows):
            first = int(rows[position])
            end = int(np.searchsorted(rows, min(first + step, len(self)), side="left"))
            # a block of repeats could exceed the block's size: the output is cut too
            end = min(end, position + step)
            wanted = rows[position:end]
            last = int(wanted[-1])
            if len(wanted) * 8 < last - first + 1:  # sparse: a seek per row beats reading the gap
                yield np.concatenate([self.read(int(row), int(row) + 1) for row in wanted])
            else:
                yield self.read(first, last + 1)[wanted - first]
            position = end

    def take(self, rows: np.ndarray, block_bytes: int) -> np.ndarray:
        """Rows named by ascending indices, decoded: float [len(rows), ...]."""
        out = np.empty((len(rows), *self.shape[1:]), dtype=self.decoded_dtype)
        position = 0
        for raw in self.select(rows, block_bytes):
            out[position : position + len(raw)] = self.decode(raw)
            position += len(raw)
        return out


class FileRegion(RowSource):
    """Rows stored one after the other at a known offset of a file."""

    def __init__(self, path: Path, label: str, offset: int, shape: tuple[int, ...], element: str):
        super().__init__(label, shape, element)
        self._path, self._offset = path, offset
        self._descriptor = -1
        need, have = offset + len(self) * self.row_bytes, os.path.getsize(path)
        if have < need:
            raise ValueError(f"{label}: truncated: {need} bytes promised, the file has {have}")

    def read(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, self.row_bytes), dtype=np.uint8)
        if self._descriptor < 0:  # opened once: on some file systems that costs more than a block
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
        view, done = out.data.cast("B"), 0
        while done < len(view):
            place = self._offset + start * self.row_bytes + done
            got = os.preadv(self._descriptor, [view[done:]], place)
            if not got:
                raise ValueError(f"{self.label}: truncated at row {start + done // self.row_bytes}")
            done += got
        return out


class DeflatedMember(RowSource):
    """A compressed array of an .npz: decompressed in order; a step backwards starts again from the
    front."""

    def __init__(self, path: Path, member: str, label: str, skip: int, shape: Any, element: str):
        super().__init__(label, shape, element)
        self._path, self._member, self._skip = path, member, skip
        self._stream: IO[bytes] | None = None
        self._row = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, self.row_bytes), dtype=np.uint8)
        try:
            if self._stream is None or start < self._row:
                # the stream keeps the archive's file open by itself
                archive = zipfile.ZipFile(self._path)
                self._stream = archive.open(self._member)
                self._row = 0
                self._discard(self._stream, self._skip)
            self._discard(self._stream, (start - self._row) * self.row_bytes)
            view, done = out.data.cast("B"), 0
            while done < len(view):
                chunk = self._stream.read(min(len(view) - done, 1 << 20))
                if not chunk:
                    raise EOFError(f"the data end before row {stop}")
                view[done : done + len(chunk)] = chunk
                done += len(chunk)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            self._stream = None
            raise ValueError(f"{self.label}: cannot be decompressed: {error}") from error
        self._row = stop
        return out

    @staticmethod
    def _discard(stream: IO[bytes], count: int) -> None:
        while count:
            got = len(stream.read(min(count, 1 << 20)))
            if not got:
                raise EOFError("the data end early")
            count -= got


class ArrayRows(RowSource):
    """An array already at hand: in memory, or mapped where its layout (Fortran order, foreign byte
    order) is unusual."""

    def __init__(self, array: np.ndarray, label: str = "array", element: str | None = None) -> None:
        super().__init__(label, array.shape, element or array.dtype.name)
        self._array = array

    def read(self, start: int, stop: int) -> np.ndarray:
        block = np.ascontiguousarray(self._array[start:stop], dtype=storage_dtype(self.element))
        return block.reshape(stop - start, -1).view(np.uint8)


def open_rows(spec: str | os.PathLike[str]) -> RowSource:
    """Open an array of samples on disk without reading it.

    Args:
        spec: `path` or `path:key`, one of `.npy`, `.npz`, `.pt`, `.pth`, `.safetensors`; the array
        has shape [n, ...]
            and a real dtype (float64/32/16, bfloat16, integers, bool).

    Returns:
        A `RowSource`: `shape`, `element` (dtype name), `read`, `blocks`, `select`, `take`.

    Raises:
        ValueError: the file is missing, unreadable, truncated, of a foreign kind, pickled, empty,
        or lacks the key.

    Example:
        >>> import numpy as np, tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "x.npy"); np.save(path, np.eye(3))
        >>> open_rows(path).shape
        (3, 3)
    """
    path, key = split_key(spec)
    kind = file_format(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a file")
    try:
        with open(path, "rb") as file:
            magic = file.read(16)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if not magic:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    if kind == "npy":
        if key is not None:
            raise ValueError(f"{path}: an .npy file holds one array and takes no key, got {key!r}")
        return _open_npy(path)
    if kind == "npz":
        return _open_npz(path, key)
    return _open_pt(path, key, magic) if kind == "pt" else _open_safetensors(path, key)


def _choose(path: Path, names: list[str], key: str | None) -> str:
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    if not names:
        raise ValueError(f"{path}: holds no arrays")
    if key is None:
        if len(names) > 1:
            raise ValueError(f"{path}: holds {len(names)} arrays ({listed}); choose one: {path}:KEY")
        return names[0]
    if key not in names:
        raise ValueError(f"{path}: no array named {key!r}; it holds: {listed}")
    return key


def _npy_header(file: IO[bytes], label: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"format version {version} (arrays with named fields)")
    except (ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{label}: not a readable .npy array: {reason}") from error
    if dtype.hasobject:
        raise ValueError(
            f"{label}: holds pickled Python objects, refused because loading them can run code; "
            "save a plain numeric array"
        )
    return shape, fortran, dtype


def _open_npy(path: Path) -> RowSource:
    label = str(path)
    with open(path, "rb") as file:
        shape, fortran, dtype = _npy_header(file, label)
        offset = file.tell()
    if dtype.isnative and (not fortran or len(shape) < 2):
        return FileRegion(path, label, offset, shape, dtype.name)
    need = offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if os.path.getsize(path) < need:
        raise ValueError(f"{label}: truncated: {need} bytes promised, the file has {os.path.getsize(path)}")
    return ArrayRows(np.load(path, mmap_mode="r", allow_pickle=False), label)


def _open_npz(path: Path, key: str | None) -> RowSource:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
            name = _choose(path, names, key)
            label = f"{path}:{name}"
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as member:
                shape, fortran, dtype = _npy_header(member, label)
                header = member.tell()
            if (fortran and len(shape) > 1) or not dtype.isnative:
                raise ValueError(f"{label}: stored in Fortran or foreign byte order; save it in C order")
            if info.compress_type != zipfile.ZIP_STORED:
                return DeflatedMember(path, info.filename, label, header, shape, dtype.name)
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            # the local header repeats the name and has its own extra field: only it knows where the
            # data start
            name_size, extra_size = struct.unpack("<HH", file.read(4))
        offset = info.header_offset + 30 + name_size + extra_size + header
        return FileRegion(path, label, offset, shape, dtype.name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error, OSError) as error:
        raise ValueError(f"{path}: not a readable .npz archive: {error}") from error


def _open_pt(path: Path, key: str | None, magic: bytes) -> RowSource:
    import pickle

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that torch is going to refuse anyway
            if magic.startswith(b"PK"):
                # under fake tensors only shapes, strides and the offsets of the bytes are loaded
                with FakeTensorMode():
                    content = torch.load(path, weights_only=True)
            else:  # the format of torch < 1.6 cannot be read in parts
                content = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds pickled Python objects or is no torch file; refused because loading "
            "them can run code; save a plain tensor, or a dict of tensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{path}: not a readable torch file (truncated?): {reason}") from error
    tensor, label = _pick_tensor(content, path, key)
    element = str(tensor.dtype).removeprefix("torch.")
    base = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if base is not None and tensor.is_contiguous():
        offset = base + tensor.storage_offset() * tensor.element_size()
        return FileRegion(path, label, offset, tuple(tensor.shape), element)
    if base is not None:  # a transposed or strided view: map it and let torch copy block by block
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        tensor, _ = _pick_tensor(content, path, key)
    tensor = tensor.detach()
    array = (tensor.view(torch.uint16) if element == "bfloat16" else tensor).numpy()
    return ArrayRows(array, label, element)


def _pick_tensor(content: Any, path: Path, key: str | None) -> tuple[Any, str]:
    import torch

    label = str(path)
    if isinstance(content, dict):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
        name = _choose(path, list(tensors), key)
        content, label = tensors[name], f"{path}:{name}"
    elif key is not None:
        raise ValueError(f"{path}: holds no dict of tensors; it takes no key, got {key!r}")
    if not isinstance(content, torch.Tensor) or content.layout != torch.strided:
        kind = content.layout if isinstance(content, torch.Tensor) else type(content).__name__
        raise ValueError(f"{label}: holds {kind}; allowed: a dense tensor or a dict of tensors")
    return content, label


def _open_safetensors(path: Path, key: str | None) -> RowSource:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as archive:  # validates the header against the file
            name = _choose(path, list(archive.keys()), key)
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            entry = json.loads(file.read(size))[name]
    except (SafetensorError, OSError, struct.error) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: not a readable .safetensors file: {reason}") from error
    label, element = f"{path}:{name}", _FROM_CODE.get(entry["dtype"], entry["dtype"])
    return FileRegion(path, label, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), element)
