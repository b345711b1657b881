"""Numbers as arguments: what is taken, and what is said of the others."""

import math

import numpy as np
import pytest
import torch

from refine_ext.arguments import not_negative, positive, whole


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2)])
def test_numbers(value):
    for check in (positive, not_negative):
        assert type(check("f", "a", value)) is float and check("f", "a", value) == 2.0
    assert not_negative("f", "a", 0) == 0.0


@pytest.mark.parametrize(
    ("check", "value", "error", "message"),
    [
        (positive, 0, ValueError, "f: a must be positive and finite, got 0"),
        (positive, -1.5, ValueError, "f: a must be positive and finite, got -1.5"),
        (positive, math.inf, ValueError, "f: a must be positive and finite, got inf"),
        (positive, math.nan, ValueError, "f: a must be positive and finite, got nan"),
        (not_negative, -1e-9, ValueError, "f: a must be finite and not negative, got -1e-09"),
        (not_negative, math.nan, ValueError, "f: a must be finite and not negative, got nan"),
        (not_negative, math.inf, ValueError, "f: a must be finite and not negative, got inf"),
        (positive, True, TypeError, "f: a must be a number, got bool"),
        (positive, "1", TypeError, "f: a must be a number, got str"),
        (not_negative, torch.tensor(1.0), TypeError, "f: a must be a number, got Tensor"),
        (positive, 1j, TypeError, "f: a must be a number, got complex"),
    ],
)
def test_what_is_refused(check, value, error, message):
    with pytest.raises(error) as raised:
        check("f", "a", value)
    assert str(raised.value) == message


def test_counts():
    assert whole("f", "n", np.int64(3), 1) == 3
    for value, error in ((0, ValueError), (1.0, TypeError), (True, TypeError), (torch.tensor(3), TypeError)):
        with pytest.raises(error, match="f: n must be"):
            whole("f", "n", value, 1)
