"""The definitions of csrc/math/resampling.h in Python integers and fractions: slow, exact, and nothing shared."""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate

CHUNK = 4096
RESAMPLE, REJECTION, METROPOLIS = 1, 2, 3
MASK = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 as the paper's pseudo-code has it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def block(seed, sequence, stream, index):
    """Low and high 64 bits of a block."""
    index %= 1 << 64
    counter = (index & MASK, index >> 32, sequence & MASK, stream | (sequence >> 32) << 8)
    w = philox(counter, (seed & MASK, seed >> 32 & MASK))
    return w[0] | w[1] << 32, w[2] | w[3] << 32


def number(seed, index, row=0, stream=RESAMPLE):
    return block(seed, row, stream, index >> 1)[index & 1]


def round_half_even(value: Fraction) -> int:
    return round(value)


def cumulative(weights) -> list[int]:
    """C_i of finite non-negative floats."""
    weights = [Fraction(float(w)) for w in weights]
    chunks = []
    for at in range(0, len(weights), CHUNK):
        part = weights[at : at + CHUNK]
        exponent = math.frexp(float(max(part)))[1] if max(part) else 0
        scale = Fraction(2) ** (50 - exponent)
        chunks.append((exponent, [round_half_even(w * scale) for w in part]))
    return align(chunks)


def align(chunks) -> list[int]:
    def shift(value, k):
        return value << k if k >= 0 else value >> -k

    sums = [(e, sum(masses)) for e, masses in chunks]
    unit = max(e + s.bit_length() for e, s in sums if s) + len(sums).bit_length() - 62
    total = sum(shift(s, e - unit) for e, s in sums)
    unit -= 61 - total.bit_length()
    result, base = [], 0
    for (exponent, masses), (_, chunk_sum) in zip(chunks, sums, strict=True):
        result += [base + shift(c, exponent - unit) for c in accumulate(masses)]
        base += shift(chunk_sum, exponent - unit)
    assert result[-1] == base and 1 << 60 <= base < 1 << 62
    return result


def owners(boundaries, positions):
    return [bisect_right(boundaries, t) for t in positions]


def resample(boundaries, num, method, seed, offset=0, row=0):
    if num == 0:
        return []
    total = boundaries[-1]

    def mulhi(k, upper):
        return number(seed, offset + k, row) * upper >> 64

    if method == "multinomial":
        return owners(boundaries, [mulhi(j, total) for j in range(num)])
    if method == "systematic":
        start = mulhi(0, total)
        return owners(boundaries, [(j * total + start) // num for j in range(num)])
    if method == "stratified":
        low = [j * total // num for j in range(num + 1)]
        positions = [low[j] + mulhi(j, low[j + 1] - low[j]) for j in range(num)]
        return owners(boundaries, positions)
    masses = [b - a for a, b in zip([0, *boundaries], boundaries, strict=False)]
    copies = [m * num // total for m in masses]
    certain = [i for i, c in enumerate(copies) for _ in range(c)]
    rest = num - len(certain)
    if rest == 0:
        return certain
    shift = max(0, (total * rest).bit_length() - 62)
    left = [c * num - total * f >> shift for c, f in zip(boundaries, accumulate(copies), strict=True)]
    return certain + owners(left, [mulhi(j, left[-1]) for j in range(rest)])
