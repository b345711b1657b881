"""Philox4x32-10: known answers, an independent implementation, and the same bits from every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import resampling_reference as reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from refine_ext import _C

# Random123's kat_vectors for philox4x32, 10 rounds.
KNOWN_ANSWERS = (
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
word = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    assert tuple(_C.philox(counter, key)) == answer
    assert tuple(reference.philox(counter, key)) == answer


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_any_counter(counter, key):
    assert list(_C.philox(counter, key)) == reference.philox(counter, key)


PROBE = """
import torch, refine_ext as rx
g = torch.Generator().manual_seed(1)
w = torch.rand(20011, generator=g) ** 8
l = torch.randn(20011, generator=g).to(torch.bfloat16)
out = [rx.resample(w, 30011, m, seed=2**63 + 5, offset=7) for m in
       ("multinomial", "stratified", "systematic", "residual")]
out += [rx.resample(l, 1001, seed=3, log=True), rx.resample(w, 100, "multinomial", seed=4)]
out += [rx.rejection(l, seed=5, offset=3).keep.long(), rx.metropolis(l, 501, chains=3, seed=6).flatten()]
print(hash(tuple(torch.cat(out).tolist())))
"""


def test_every_instruction_set_draws_the_same():
    levels = _C.build_info()["simd_compiled"]
    digests = {}
    for level in levels:
        environment = dict(os.environ, REFINE_EXT_SIMD=level)
        done = subprocess.run(
            [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True
        )
        digests[level] = done.stdout.strip()
    assert len(set(digests.values())) == 1, digests


def test_numbers_are_uniform():
    """Top and bottom bits alike: 16 bits of 2^17 draws against a uniform law, chi-square p above 1e-4."""
    from scipy.stats import chisquare

    import refine_ext as rx

    for bits in (8, 12):
        drawn = rx.resample(torch.ones(2**bits), 2**17, "multinomial", seed=9)
        assert chisquare(torch.bincount(drawn, minlength=2**bits).numpy()).pvalue > 1e-4
