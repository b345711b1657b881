"""Guided steps and their noise once more, in NumPy's float64 and from the definitions: nothing of the kernels."""

from __future__ import annotations

import numpy as np
import torch

NOISE = 4  # what the noise's counters hold in their lowest byte
MASK = np.uint64(0xFFFFFFFF)


def philox(counter: list[np.ndarray], key0: int, key1: int) -> list[np.ndarray]:
    """Philox4x32-10 on arrays of 32-bit words held in uint64."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(key0),
            b & MASK,
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(key1),
            a & MASK,
        )
        key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def box_muller(radius: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius, angle = np.asarray(radius, dtype=np.float64), np.asarray(angle, dtype=np.float64)
    # log u as log(1 - (1 - u)) where u is near 1.
    log_u = np.where(radius < 2**31, np.log((radius + 0.5) / 2**32), np.log1p(-(2**32 - radius - 0.5) / 2**32))
    r, t = np.sqrt(-2 * log_u), 2 * np.pi * (angle / 2**32)
    return r * np.cos(t), r * np.sin(t)


def normal_row(n: int, seed: int, step: int = 0, row: int = 0) -> np.ndarray:
    """n numbers of a sample."""
    blocks = np.arange((n + 3) // 4, dtype=np.uint64)
    constant = [np.full_like(blocks, c) for c in (step, row % 2**32, NOISE | (row >> 32) << 8)]
    w = philox([blocks, *constant], seed % 2**32, (seed >> 32) % 2**32)
    return np.stack([*box_muller(w[0], w[1]), *box_muller(w[2], w[3])], axis=1).reshape(-1)[:n]


def normal(shape: tuple[int, ...], seed: int | torch.Tensor, step: int = 0) -> np.ndarray:
    n = int(np.prod(shape[1:]))
    seeds = seed.tolist() if isinstance(seed, torch.Tensor) and seed.dim() else None
    rows = (
        [normal_row(n, int(seed), step, b) for b in range(shape[0])]
        if seeds is None
        else [normal_row(n, s, step) for s in seeds]
    )
    return np.stack(rows).reshape(shape) if rows else np.zeros(shape)


def step(x, terms, coefficients, factor=None, noise=None) -> tuple[np.ndarray, np.ndarray]:
    """x' in float64, and the sum of the sizes of what is added, for tolerances. `noise`: an array."""
    tensors = [x, *terms, *([] if noise is None else [noise])]
    table = np.asarray(coefficients, dtype=np.float64)
    table = np.broadcast_to(table, (len(x), len(tensors)))
    value, size = np.zeros(x.shape), np.zeros(x.shape)
    for k, tensor in enumerate(tensors):
        u = tensor if isinstance(tensor, np.ndarray) else tensor.detach().cpu().double().numpy()
        c = table[:, k] * (1 if factor is None or k != len(terms) else np.where(table[:, k] == 0, 0, factor))
        c = c.reshape(-1, *[1] * (x.dim() - 1))
        part = np.where(c == 0, 0.0, c * np.where(c == 0, 0.0, u))
        value, size = value + part, size + np.abs(part)
    return value, size
