"""Arrays and tensors as users hold them: what is taken, over which memory, and which rows an error names."""

import numpy as np
import pytest
import torch
from exchanged import Exchanged

import refine_ext as rx
from refine_ext.samples import array_tensor, as_tensor, check_finite_rows, rows_text

NAMES = {"function": "f", "argument": "x"}


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda a: Exchanged(torch.from_numpy(a))])
def test_memory_is_shared(kind):
    array = np.arange(6.0).reshape(3, 2)
    tensor = array_tensor(kind(array), **NAMES)
    array[1, 0] = -7
    assert tensor.tolist() == array.tolist()


@pytest.mark.parametrize(
    "change",
    [lambda a: a[::-1], lambda a: a.astype(">f8"), lambda a: a.astype(np.float16), np.asfortranarray,
     lambda a: np.lib.stride_tricks.as_strided(a, writeable=False)],
    ids=["backwards", "big-endian", "float16", "columns", "read-only"],
)  # fmt: skip
def test_numpy_as_it_comes(change):
    array = change(np.arange(6.0).reshape(3, 2))
    assert array_tensor(array, **NAMES).tolist() == array.tolist()
    assert as_tensor(array, **NAMES).dtype == (torch.float32 if array.dtype == np.float16 else torch.float64)
    expected = rx.log_mixture(torch.tensor(array.astype(np.float64)), torch.zeros(1, 2, dtype=torch.float64), 1.0)
    for centers in (np.zeros((1, 2)), [np.zeros((1, 2))]):
        torch.testing.assert_close(rx.log_mixture(array, centers, 1.0, dtype=torch.float64), expected)


def test_bytes_are_numbers():
    array = np.array([[0, 255], [3, 4]], dtype=np.uint8)
    for x in (array, torch.from_numpy(array), Exchanged(torch.from_numpy(array))):
        assert as_tensor(x, **NAMES).dtype == torch.float32
        value = rx.log_mixture(x, x, 100.0)
        torch.testing.assert_close(value, rx.log_mixture(array.astype(np.float32), array.astype(np.float32), 100.0))
        torch.testing.assert_close(rx.log_mixture(x, [x], 100.0), value)


def test_numbers_are_a_column_and_gradients_stay_where_they_are_wanted():
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    assert as_tensor(leaf, **NAMES).shape == (2, 1) and not as_tensor(leaf, **NAMES).requires_grad
    assert array_tensor(leaf, **NAMES) is leaf


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0], TypeError, "f: x must be a NumPy array or a torch tensor, got list"),
        (np.array([1, 2]), TypeError, "f: x must be floating or uint8, got a NumPy int64 array"),
        (torch.tensor([1, 2]), TypeError, "f: x must be floating or uint8, got torch.int64"),
        (torch.tensor(1.0), ValueError, r"f: x must be \[n, ...\], got a 0-dim value"),
        (np.array(1.0), ValueError, r"f: x must be \[n, ...\], got a 0-dim value"),
    ],
)
def test_what_is_refused(value, error, message):
    with pytest.raises(error, match=message):
        as_tensor(value, **NAMES)


def test_rows_that_are_not_finite_are_named(monkeypatch):
    monkeypatch.setattr("refine_ext.samples._BLOCK_ELEMENTS", 8)  # blocks of four rows
    x = torch.zeros(11, 2)
    check_finite_rows(x, **NAMES)
    # finite, though the sum of the row is not
    check_finite_rows(torch.full((3, 2), 1.7e308, dtype=torch.float64), **NAMES)
    x[5, 1], x[6] = torch.nan, torch.tensor([torch.inf, -torch.inf])
    with pytest.raises(ValueError, match="f: x has NaN or infinite values in rows 5, 6; only finite values are"):
        check_finite_rows(x, **NAMES)
    assert rows_text(torch.ones(9, dtype=torch.bool), 100) == "rows 100, 101, 102, 103, 104 and 4 more"
    assert rows_text(torch.tensor([False, True])) == "row 1"
