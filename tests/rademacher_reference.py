"""Rademacher sums once more, in NumPy and from the definitions of csrc/math/rademacher.h: nothing of the kernels."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from guidance_reference import box_muller

SIGN, MULTIPLIER = 5, 6  # what the counters hold in their lowest byte
MASK = np.uint64(0xFFFFFFFF)
BLOCK = 1024
LARGEST, MAGNITUDE, NORM = range(3)


def philox(counter, key, rounds: int = 10) -> list[np.ndarray]:
    """Philox4x32 on arrays of 32-bit words held in uint64."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k0, k1 = (int(word) for word in key)
    for _ in range(rounds):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            b & MASK,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            a & MASK,
        ]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def words(blocks: np.ndarray, draw: int, seed: int, stream: int) -> np.ndarray:
    """[blocks, 4] words of a draw's sequence."""
    blocks = blocks.astype(np.uint64)
    fixed = [np.full_like(blocks, c) for c in (draw % 2**32, stream | draw >> 32 << 8)]
    counter = [blocks & MASK, blocks >> np.uint64(32), *fixed]
    return np.stack(philox(counter, (seed % 2**32, (seed >> 32) % 2**32)), axis=1)


def signs(n: int, draws: int, first_draw: int, seed: int, first_row: int = 0) -> np.ndarray:
    """[draws, n] of +-1 as int64."""
    blocks = np.arange(first_row // 128, first_row // 128 + (n + 127) // 128)
    bits = [
        (words(blocks, first_draw + k, seed, SIGN)[:, :, None] >> np.arange(32, dtype=np.uint64) & np.uint64(1))
        .reshape(-1)[:n]
        .astype(np.int64)
        for k in range(draws)
    ]
    return 2 * np.stack(bits) - 1


def normals(n: int, draws: int, first_draw: int, seed: int, first_row: int = 0) -> np.ndarray:
    blocks = np.arange(first_row // 4, first_row // 4 + (n + 3) // 4)
    rows = []
    for k in range(draws):
        w = words(blocks, first_draw + k, seed, MULTIPLIER).T
        rows.append(np.stack([*box_muller(w[0], w[1]), *box_muller(w[2], w[3])], axis=1).reshape(-1)[:n])
    return np.stack(rows)


def fixed_point(values: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers of so many bits and the power of two that returns them, column by column."""
    peak = np.abs(values).max(0)
    fine = np.isfinite(peak) & (peak > 0)
    exponent = np.where(fine, np.frexp(np.where(fine, peak, 1.0))[1] - 1, 0)
    shift = np.where(fine, np.minimum(bits - 1 - exponent, 1022), 0)
    limit = (np.int64(1) << bits) - 1
    integers = np.clip(np.rint(np.ldexp(np.where(fine, values, 0.0), shift)).astype(np.int64), -limit, limit)
    return integers, np.where(np.isfinite(peak), np.where(peak > 0, np.ldexp(1.0, -shift), 0.0), np.nan)


def add_sums(sums: np.ndarray, outputs: torch.Tensor, sign: np.ndarray, digits: int = 3) -> np.ndarray:
    """sums [draws, m] += sign [draws, n] @ outputs [n, m] as the kernels define it, to the bit."""
    values = outputs.detach().cpu().double().numpy()
    for row in range(0, len(values), BLOCK):
        part, own = values[row : row + BLOCK], sign[:, row : row + BLOCK]
        rows, m = part.shape
        if outputs.dtype == torch.float64:
            bits = np.full(m, 52)
        else:
            certain = 21 if rows > 512 else 22 if rows > 256 else 23
            coarse, _ = fixed_point(part, np.full(m, certain))
            room = np.abs(coarse).sum(0) + rows
            bits = np.full(m, certain)
            while (more := (bits < 23) & (2 * room < 2**31)).any():
                bits, room = bits + more, room * (1 + more)
            bits = np.minimum(bits, 8 * digits - 1)
        integers, back = fixed_point(part, bits)
        with np.errstate(over="ignore"):
            sums = sums + (own @ integers).astype(np.float64) * back
    return sums


def suprema(outputs: torch.Tensor, sign: np.ndarray, supremum: int, digits: int = 3):
    """Suprema, indices and largest magnitudes, to the bit."""
    n, m = outputs.shape
    sums = add_sums(np.zeros((len(sign), m)), outputs, sign, digits)
    largest = np.abs(outputs.detach().cpu().double().numpy()).max(0)
    if supremum == NORM:
        lanes = np.zeros((len(sign), 16))
        for j in range(m):
            lanes[:, j % 16] += sums[:, j] ** 2
        square = np.zeros(len(sign))
        for lane in lanes.T:
            square = square + lane
        return np.sqrt(square) / n, np.full(len(sign), -1), largest
    size = np.abs(sums) if supremum == MAGNITUDE else sums
    index = np.where(np.isnan(size).any(1), np.isnan(size).argmax(1), np.nan_to_num(size, nan=-np.inf).argmax(1))
    chosen = np.take_along_axis(sums, index[:, None], 1)[:, 0]
    value = np.take_along_axis(size, index[:, None], 1)[:, 0]
    return value / n, np.where(chosen < 0, -1 - index, index), largest


def all_signs(n: int) -> np.ndarray:
    """[2^n, n], every sign vector once."""
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n)))


def float_suprema(sign: np.ndarray, outputs: np.ndarray, supremum: int) -> np.ndarray:
    """Suprema in plain float64."""
    sums = sign @ np.asarray(outputs, dtype=np.float64)
    if supremum == NORM:
        return np.sqrt((sums**2).sum(1)) / len(outputs)
    return (np.abs(sums) if supremum == MAGNITUDE else sums).max(1) / len(outputs)
