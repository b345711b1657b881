"""Rademacher complexity the long way: signs from Philox by the book, sums in float64, sign vectors by counting."""

from __future__ import annotations

import itertools

import numpy as np
from guidance_reference import philox

_SIGN_STREAM = 5


def signs(n: int, draws: int, seed: int, first_draw: int = 0) -> np.ndarray:
    """[draws, n] of +-1: bit i % 128 of block i // 128 of the draw's sequence, 1 for +1."""
    blocks = np.arange(-(-n // 128), dtype=np.uint64)
    rows = []
    for draw in range(first_draw, first_draw + draws):
        third, fourth = np.full_like(blocks, draw % 2**32), np.full_like(blocks, _SIGN_STREAM | draw >> 32 << 8)
        words = philox([blocks, np.zeros_like(blocks), third, fourth], seed % 2**32, seed >> 32)
        bits = np.stack([(word[:, None] >> np.arange(32, dtype=np.uint64)) & np.uint64(1) for word in words], axis=1)
        rows.append(bits.reshape(-1)[:n].astype(np.float64) * 2 - 1)
    return np.array(rows)


def all_signs(n: int) -> np.ndarray:
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n)))


def suprema(sigma: np.ndarray, outputs: np.ndarray, supremum: str) -> np.ndarray:
    """Of each row of sigma: the largest sum, the largest magnitude, or the 2-norm, divided by n."""
    sums = sigma @ np.asarray(outputs, dtype=np.float64)
    if supremum == "norm":
        return np.sqrt((sums**2).sum(1)) / len(outputs)
    return (np.abs(sums) if supremum == "magnitude" else sums).max(1) / len(outputs)
