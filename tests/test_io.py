"""Files of samples: every format both ways against the formats' own libraries, bad files, and
nothing half-written."""

from __future__ import annotations

import errno
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from refine_ext.io import ELEMENTS, ArrayRows, open_rows, split_key, storage_dtype
from refine_ext.output import RowWriter, check_output, create_rows

ROWS = 37
NUMPY_ELEMENTS = [e for e in ELEMENTS if e != "bfloat16"]
TORCH_ELEMENTS = [e for e in ELEMENTS if not e.startswith("uint") or e == "uint8"]


def array(element: str, shape: tuple[int, ...] = (ROWS, 3, 2)) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 2 if element == "bool" else 100, size=shape)
    return values.astype(element)


def tensor(element: str, shape: tuple[int, ...] = (ROWS, 3, 2)) -> torch.Tensor:
    return torch.from_numpy(array("int64", shape)).to(getattr(torch, element))


def everything(source) -> np.ndarray:
    return source.take(np.arange(len(source)), 64)


def leftovers(folder) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


@pytest.mark.parametrize("element", NUMPY_ELEMENTS)
@pytest.mark.parametrize("kind", ["npy", "npz", "npz-compressed"])
def test_reads_what_numpy_wrote(tmp_path, element, kind):
    expected = array(element)
    path = tmp_path / f"x.{kind[:3]}"
    if kind == "npy":
        np.save(path, expected)
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(path, other=np.ones(2), x=expected)
    source = open_rows(path if kind == "npy" else f"{path}:x")
    assert (source.shape, source.element) == (expected.shape, element)
    np.testing.assert_array_equal(everything(source), expected.astype(np.float64))
    np.testing.assert_array_equal(source.read(5, 9).ravel(), expected[5:9].view(np.uint8).ravel())


@pytest.mark.parametrize("element", TORCH_ELEMENTS)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_reads_what_torch_wrote(tmp_path, element, suffix):
    expected, path = tensor(element), tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        save_file({"x": expected}, path)
    else:
        torch.save(expected, path)
    source = open_rows(path)
    assert (source.shape, source.element) == (tuple(expected.shape), element)
    np.testing.assert_array_equal(everything(source), expected.double().numpy())


@pytest.mark.parametrize("element", [*NUMPY_ELEMENTS, "bfloat16"])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_other_libraries_read_what_is_written(tmp_path, element, suffix):
    if element == "bfloat16":
        if suffix in (".npy", ".npz"):
            pytest.skip("NumPy has no bfloat16")
        bits = tensor(element).view(torch.uint16).numpy()
    else:
        bits = array(element)
    path, source = tmp_path / f"y{suffix}", ArrayRows(bits, element=element)
    with create_rows(path, source.shape, element) as writer:
        for _, raw in source.blocks(100):
            writer.write(raw)
    if suffix == ".npy":
        got = np.load(path)
    elif suffix == ".npz":
        got = np.load(path)["samples"]
    else:
        loaded = torch.load(path, weights_only=True) if suffix == ".pt" else load_file(path)["samples"]
        assert str(loaded.dtype) == f"torch.{element}"
        got = (loaded.view(torch.uint16) if element == "bfloat16" else loaded).numpy()
    assert got.dtype == bits.dtype
    np.testing.assert_array_equal(got, bits)
    np.testing.assert_array_equal(everything(open_rows(path)), everything(source))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_keys_name_the_array_written_and_read(tmp_path, suffix):
    source = ArrayRows(array("float32"))
    with create_rows(f"{tmp_path / 'y'}{suffix}:mine", source.shape, "float32") as writer:
        writer.write(source.read(0, ROWS))
    again = open_rows(f"{tmp_path / 'y'}{suffix}:mine")
    np.testing.assert_array_equal(everything(again), everything(source))


def test_same_content_gives_the_same_bytes(tmp_path):
    source = ArrayRows(array("float32"))
    for suffix in (".npy", ".npz", ".pt", ".safetensors"):
        written = []
        for name in ("a", "b"):
            with create_rows(tmp_path / f"{name}{suffix}", source.shape, "float32") as writer:
                writer.write(source.read(0, ROWS))
            written.append((tmp_path / f"{name}{suffix}").read_bytes())
        assert written[0] == written[1]


def test_unusual_layouts(tmp_path):
    expected = array("float32", (ROWS, 5))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(expected))
    np.save(tmp_path / "big.npy", expected.astype(">f4"))
    torch.save(torch.from_numpy(expected.T.copy()).T, tmp_path / "transposed.pt")
    torch.save(torch.from_numpy(np.tile(expected, (2, 1)))[ROWS:], tmp_path / "view.pt")
    old = tmp_path / "old.pt"
    torch.save({"x": torch.from_numpy(expected)}, old, _use_new_zipfile_serialization=False)
    bits = torch.from_numpy(expected).T.contiguous().T.to(torch.bfloat16)
    torch.save(bits, tmp_path / "bfloat16.pt")
    names = ("fortran.npy", "big.npy", "transposed.pt", "view.pt", "old.pt", "bfloat16.pt")
    for name in names:
        source = open_rows(tmp_path / name)
        np.testing.assert_array_equal(everything(source), expected, err_msg=name)
        assert source.read(0, 2).shape == (2, source.row_bytes)


def test_wide_types_keep_their_digits(tmp_path):
    np.save(tmp_path / "x.npy", np.full((3, 1), 2**24 + 1, dtype=np.int64))
    values = everything(open_rows(tmp_path / "x.npy"))
    assert values.dtype == np.float64
    assert values[0, 0] == 2**24 + 1


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    picks=st.lists(st.integers(0, 59), max_size=200),
    block=st.integers(1, 500),
)
def test_selected_rows_are_the_indexed_ones(rows, picks, block):
    values = np.arange(rows * 3, dtype=np.int16).reshape(rows, 3)
    index = np.sort(np.array([p % rows for p in picks], dtype=np.int64))
    blocks = list(ArrayRows(values).select(index, block))
    limit = max(1, block // 6)
    assert all(len(raw) <= limit for raw in blocks)
    got = np.concatenate(blocks) if blocks else np.empty((0, 6), np.uint8)
    np.testing.assert_array_equal(got.view(np.int16), values[index])


def test_selection_passes_a_compressed_array_once(tmp_path):
    expected = array("float32", (500, 4))
    np.savez_compressed(tmp_path / "x.npz", x=expected)
    source = open_rows(tmp_path / "x.npz")
    index = np.sort(np.random.default_rng(0).integers(0, 500, size=300))
    np.testing.assert_array_equal(source.take(index, 80), expected[index])
    np.testing.assert_array_equal(source.take(index[:7], 80), expected[index[:7]])  # steps back


def test_split_key(tmp_path):
    assert split_key("a/b.npz:k") == (type(tmp_path)("a/b.npz"), "k")
    assert split_key("a:b.npy")[1] is None
    odd = tmp_path / "x.npy:y"
    odd.write_bytes(b"")
    assert split_key(odd) == (odd, None)
    with pytest.raises(ValueError, match="key after the colon is empty"):
        split_key("x.npz:")


def _bad_files(folder):
    good = np.ones((ROWS, 4), dtype=np.float32)
    np.save(folder / "good.npy", good)
    np.savez(folder / "two.npz", a=good, b=good)
    np.savez_compressed(folder / "cut.npz", a=np.random.default_rng(0).random((500, 50)))
    torch.save(torch.ones(ROWS, 4), folder / "good.pt")
    save_file({"a": torch.ones(ROWS, 4)}, folder / "good.safetensors")
    for name in ("good.npy", "cut.npz", "good.pt", "good.safetensors"):
        data = (folder / name).read_bytes()
        (folder / f"short-{name}").write_bytes(data[: len(data) * 2 // 3])
    (folder / "empty.npy").write_bytes(b"")
    (folder / "text.npy").write_text("1.0 2.0 3.0\n4.0 5.0 6.0\n")
    (folder / "text.pt").write_text("1.0 2.0 3.0\n4.0 5.0 6.0\n")
    (folder / "text.safetensors").write_text("1.0 2.0 3.0\n4.0 5.0 6.0\n")
    (folder / "pickle.pt").write_bytes(pickle.dumps({"x": good}))
    torch.save({"x": np.float64}, folder / "code.pt")
    np.save(folder / "object.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    np.save(folder / "names.npy", np.array(["a", "b"]))
    np.save(folder / "complex.npy", good.astype(np.complex64))
    np.save(folder / "scalar.npy", np.float32(1.0))
    np.save(folder / "norows.npy", np.ones((0, 4)))
    torch.save({"n": 3}, folder / "no-tensors.pt")
    torch.save(torch.eye(3).to_sparse(), folder / "sparse.pt")
    (folder / "folder.npy").mkdir()


BAD = [
    ("missing.npy", "no such file"),
    ("folder.npy", "not a file"),
    ("good.csv", "unknown file type '.csv'; allowed: .npy"),
    ("empty.npy", r"the file is empty \(0 bytes\)"),
    ("short-good.npy", "truncated: 720 bytes promised, the file has 480"),
    ("short-cut.npz", "not a readable .npz archive"),
    ("short-good.pt", "not a readable torch file"),
    ("short-good.safetensors", "not a readable .safetensors file"),
    ("text.npy", "not a readable .npy array"),
    ("text.pt", "pickled Python objects or is no torch file"),
    ("text.safetensors", "not a readable .safetensors file"),
    ("pickle.pt", "pickled Python objects"),
    ("code.pt", "pickled Python objects"),
    ("object.npy", "pickled Python objects, refused because loading them can run code"),
    ("names.npy", "dtype str.* is not supported; allowed: float64"),
    ("complex.npy", "dtype complex64 is not supported"),
    ("scalar.npy", "is a single number"),
    ("norows.npy", r"is empty, shape \[0, 4\]"),
    ("good.npy:key", "an .npy file holds one array and takes no key"),
    ("good.pt:key", "holds no dict of tensors; it takes no key, got 'key'"),
    ("two.npz", r"holds 2 arrays \(a, b\); choose one: .*two.npz:KEY"),
    ("two.npz:c", "no array named 'c'; it holds: a, b"),
    ("good.safetensors:c", "no array named 'c'; it holds: a"),
    ("no-tensors.pt", "holds no arrays"),
    ("sparse.pt", "holds torch.sparse_coo; allowed: a dense tensor"),
]


@pytest.mark.parametrize(("name", "message"), BAD, ids=[name for name, _ in BAD])
def test_bad_files_are_refused_in_one_line(tmp_path, name, message):
    _bad_files(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        open_rows(tmp_path / name)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(tmp_path))


def test_values_that_are_not_finite_are_counted(tmp_path):
    values = np.ones((10, 2), dtype=np.float16)
    values[3, 1], values[4, 0] = np.nan, np.inf
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(ValueError, match=r"x.npy: 2 of 20 values read are NaN or infinite"):
        everything(open_rows(tmp_path / "x.npy"))


def test_a_file_cut_while_open_is_an_error_not_a_crash(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.ones((1000, 8)))
    source = open_rows(path)
    os.truncate(path, 30_000)
    with pytest.raises(ValueError, match="truncated at row"):
        everything(source)


def test_damaged_compressed_data_are_an_error(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).random((400, 50)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.npz:x: cannot be decompressed"):
        everything(open_rows(path))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, suffix, failure):
    path = tmp_path / f"y{suffix}"
    path.write_bytes(b"precious")
    source = ArrayRows(array("float32"))
    with pytest.raises(type(failure)), create_rows(path, source.shape, "float32") as writer:
        writer.write(source.read(0, 5))
        raise failure
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_a_full_disk_names_the_file(tmp_path, suffix, monkeypatch):
    def full(self, raw):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RowWriter, "write", full)
    source = ArrayRows(array("float32"))
    with (
        pytest.raises(OSError, match=f"y{suffix}: cannot be written: No space left") as caught,
        create_rows(tmp_path / f"y{suffix}", source.shape, "float32") as writer,
    ):
        writer.write(source.read(0, 5))
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_too_few_rows_are_never_published(tmp_path):
    source = ArrayRows(array("float32"))
    with (
        pytest.raises(RuntimeError, match="5 rows written, 37 announced"),
        create_rows(tmp_path / "y.npy", source.shape, "float32") as writer,
    ):
        writer.write(source.read(0, 5))
    assert os.listdir(tmp_path) == []


def test_written_files_have_the_usual_permissions(tmp_path):
    source = ArrayRows(array("float32"))
    with create_rows(tmp_path / "y.npy", source.shape, "float32") as writer:
        writer.write(source.read(0, ROWS))
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "y.npy").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("name", "element", "size", "message"),
    [
        ("no/y.npy", "float32", 0, "the folder .*no does not exist"),
        ("y.npy:key", "float32", 0, "takes no key"),
        ("y.csv", "float32", 0, "unknown file type '.csv'"),
        ("y.npy", "bfloat16", 0, "NumPy files cannot hold bfloat16"),
        ("y.npy", "float32", 2**62, "no space: .* MiB needed, .* MiB free"),
        (".", None, 0, "exists and is not a plain file"),
    ],
)
def test_outputs_are_checked_before_any_work(tmp_path, name, element, size, message):
    with pytest.raises(ValueError, match=message):
        check_output(tmp_path / name, element, size)


def test_element_table_agrees_with_numpy_and_torch():
    for element in ELEMENTS:
        assert storage_dtype(element).itemsize == getattr(torch, element).itemsize
