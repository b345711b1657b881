"""Draws in parts and rows in blocks: the bits of one call; adaptive draws; what an estimate says of itself."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rademacher import CLASSES, DTYPES, classes

import refine_ext as rx


def same(a: rx.Estimate, b: rx.Estimate) -> bool:
    index = a.index is b.index or torch.equal(a.index, b.index)
    facts = [(e.n, e.draws, e.ranges, e.seed, e.bound, e.family) for e in (a, b)]
    return torch.equal(a.suprema, b.suprema) and torch.equal(a.mean, b.mean) and index and facts[0] == facts[1]


# ---- Parts of draws.


@classes
def test_merged_parts_are_one_run(function, supremum):
    x = torch.randn(300, 20)
    whole = function(x, 100, 7)
    first, middle, last = (function(x, k, 7, first_draw=at) for at, k in ((0, 30), (30, 1), (31, 69)))
    assert same(first.merge(middle).merge(last), whole)
    assert same(last.merge(first).merge(middle), whole)  # in the draws' order, whatever the parts'
    assert same(pickle.loads(pickle.dumps(last)).merge(first.merge(middle)), whole)


def test_parts_with_a_gap_are_kept_apart():
    x = torch.randn(300, 20)
    parts = rx.rademacher(x, 10, 7, first_draw=50).merge(rx.rademacher(x, 20, 7))
    assert parts.ranges == ((0, 20), (50, 10)) and parts.draws == 30
    assert torch.equal(parts.suprema[20:], rx.rademacher(x, 60, 7).suprema[50:])
    filled = parts.merge(rx.rademacher(x, 30, 7, first_draw=20))
    assert same(filled, rx.rademacher(x, 60, 7))


def test_gradients_pass_a_merge():
    x = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    merged = rx.rademacher(x, 8, 1).merge(rx.rademacher(x, 8, 1, first_draw=8))
    (got,) = torch.autograd.grad(merged.mean, x)
    (want,) = torch.autograd.grad(rx.rademacher(x, 16, 1).mean, x)
    assert torch.allclose(got, want, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda x: rx.rademacher(x, 10, 7, first_draw=9), "draws 9 to 9 are in both; give first_draw="),
        (lambda x: rx.rademacher(x, 4, 7, first_draw=2), "draws 2 to 5 are in both"),
        (lambda x: rx.rademacher(x, 10, 8, first_draw=10), "one seed, got 7 and 8"),
        (lambda x: rx.rademacher(x[:50], 10, 7, first_draw=10), "one n, got 60 and 50"),
        (lambda x: rx.rademacher(2 * x, 10, 7, first_draw=10), "one bound, got"),
        (lambda x: rx.rademacher(x, 10, 7, first_draw=10, absolute=False), "one family, got ±f and f"),
        (lambda x: rx.rademacher(x, 10, 7, first_draw=10, distribution="normal"), "one distribution"),
        (lambda x: rx.rademacher(x[:9], "all"), "all sign vectors are already in"),
    ],
)
def test_parts_that_do_not_fit_are_refused(other, message):
    x = torch.randn(60, 4)
    with pytest.raises(ValueError, match=rf"Estimate\.merge: .*{message}"):
        rx.rademacher(x, 10, 7).merge(other(x))
    with pytest.raises(TypeError, match=r"Estimate\.merge: other must be an Estimate, got float"):
        rx.rademacher(x, 10, 7).merge(1.0)


# ---- Blocks of rows.


@classes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1024, 3), (2500, 37)])
def test_blocks_give_the_bits_of_the_whole(function, supremum, dtype, n, m):
    x = torch.randn(n, m).to(dtype)
    whole = function(x, 30, 3)
    few = 16 * m * 7  # bytes for the sums of seven draws: five readings
    for source in (lambda: x.split(700), list(x.split(1500)), lambda: iter([x[:1], x[1:]] if n > 1 else [x])):
        assert same(function(source, 30, 3, memory=few), whole)
        assert same(function(source, 30, 3), whole)
    assert same(function(iter(x.split(999)), 30, 3), whole)  # an iterator, in one reading


@settings(max_examples=20)
@given(data=st.data(), n=st.integers(1, 4000))
def test_any_blocks(data, n):
    cuts = sorted(data.draw(st.lists(st.integers(1, n), max_size=12)))
    x = torch.arange(n * 3, dtype=torch.float32).sin().reshape(n, 3)
    blocks = [part for part in x.tensor_split(cuts) if len(part)]
    assert same(rx.rademacher(blocks, 6, 3), rx.rademacher(x, 6, 3))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("element", ["float64", "float32", "float16", ">f4"])
def test_maps_of_files(tmp_path, order, element):
    x = np.asarray(np.random.default_rng(0).normal(size=(3000, 12)).astype(element), order=order)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    whole = rx.rademacher(torch.from_numpy(x.astype(x.dtype.newbyteorder("="))), 20, 3)
    assert same(rx.rademacher(mapped, 20, 3), whole)  # fits into the memory: read at once
    assert same(rx.rademacher(mapped, 20, 3, memory=60_000), whole)
    assert same(rx.rademacher(x, 20, 3), whole)
    assert same(rx.rademacher(np.asarray(mapped), 20, 3), whole)


def test_a_loader_is_a_source_of_blocks():
    x = torch.randn(2500, 5)
    loader = torch.utils.data.DataLoader(x, batch_size=300)
    assert same(rx.rademacher_linear(loader, 2.0, 20, 3, memory=2000), rx.rademacher_linear(x, 2.0, 20, 3))


def test_one_function_in_blocks():
    x = torch.randn(2500)
    assert same(rx.rademacher(x.split(600), 20, 3), rx.rademacher(x, 20, 3))
    assert same(rx.rademacher(x[:, None], 20, 3), rx.rademacher(x, 20, 3))


def test_draws_in_blocks_until_the_error_is_small():
    x = torch.randn(2500, 5)
    assert same(rx.rademacher(lambda: x.split(900), 20, 3, stderr=1e-3), rx.rademacher(x, 20, 3, stderr=1e-3))


def changing():
    """A function that returns a block less every time."""
    blocks = [torch.ones(2000, 2)] * 5

    def read():
        blocks.pop()
        return list(blocks)

    return read


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (iter([torch.ones(9, 100)]), {"memory": 16000}, ValueError, r"is an iterator.*2 readings; give a function"),
        (iter([torch.ones(9, 1)]), {"stderr": 0.1}, ValueError, r"with stderr= the outputs are read again"),
        ([torch.ones(9, 2), torch.ones(9, 3)], {}, ValueError, r"alike, got \[rows, 3\].*after \[rows, 2\]"),
        ([torch.ones(9, 2), torch.ones(9, 2).double()], {}, ValueError, r"alike, got .*float64.*after .*float32"),
        ([], {}, ValueError, r"must not be empty, got no row blocks"),
        ([torch.ones(0, 2)], {}, ValueError, r"a block of outputs must not be empty, got shape \[0, 2\]"),
        ([torch.ones(2, 2, 2)], {}, ValueError, r"a block of outputs must be \[rows, m\], got shape \[2, 2, 2\]"),
        ([[1.0, 2.0]], {}, TypeError, r"a block of outputs must be a NumPy array or a torch tensor, got list"),
        ([np.ones((2, 2), dtype=complex)], {}, TypeError, r"a block of outputs must be floating .*complex"),
        (lambda: 3, {}, TypeError, r"the function outputs must return an iterable of row blocks, got int"),
        (3, {}, TypeError, r"outputs must be a tensor, a NumPy array, row blocks.*got int"),
        (changing(), {"memory": 32}, ValueError, r"had 8000 rows when first read and 6000 when read again"),
        ([torch.ones(9, 2, requires_grad=True)], {}, ValueError, r"requires gradients, which row blocks have not"),
        ([torch.ones(9, 2)], {"precision": 2}, ValueError, r"precision must be 3 where outputs come in blocks, got 2"),
        ([torch.ones(9, 2)], {"draws": "all"}, TypeError, r"draws='all' takes outputs in a tensor"),
    ],
)
def test_blocks_that_cannot_be_used(source, options, error, message):
    with pytest.raises(error, match=f"rademacher: .*{message}"):
        rx.rademacher(source, **{"draws": 20, "seed": 0, **options})


def test_nan_in_a_block_is_found_where_it_is():
    x = torch.randn(3000, 5)
    x[2100, 3], x[2900, 3], x[2500, 4] = torch.nan, torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"rademacher: outputs must be finite, got nan in column 3, row 2100; nan_po"):
        rx.rademacher(x.split(512), 10, 0)
    with pytest.raises(ValueError, match=r"rademacher: outputs must be finite, got nan in column 3, row 2100; nan_po"):
        rx.rademacher(x, 10, 0)
    with pytest.raises(ValueError, match=r"rademacher_linear: features must be finite, got inf in column 0, row 2500"):
        rx.rademacher_linear(x[:, 4:5].expand(-1, 5).split(700), 1.0, 10, 0)
    for source in (x, x.split(512)):
        lost = rx.rademacher(source, 10, 0, nan_policy="propagate")
        assert lost.suprema.isnan().all() and math.isnan(float(lost)) and math.isnan(lost.upper())


# ---- Until the error is small.


@classes
def test_draws_double_until_the_error_is_small(function, supremum):
    x = torch.randn(300, 6)
    first = function(x, 16, 5)
    estimate = function(x, 16, 5, stderr=first.stderr / 4)
    doublings = math.log2(estimate.draws / 16)
    assert estimate.stderr <= first.stderr / 4 and doublings == round(doublings) >= 2
    once = function(x, estimate.draws, 5)
    assert same(estimate, once)
    before = function(x, estimate.draws // 2, 5)
    assert before.stderr > first.stderr / 4
    # The l-th look gets delta / (l (l + 1)).
    looks = doublings + 1
    assert math.isclose(estimate.upper(0.1), once.upper(0.1 / (looks * (looks + 1))), rel_tol=1e-12)
    assert estimate.upper(0.1) > once.upper(0.1)


def test_the_most_draws_end_it_with_a_warning():
    x = torch.randn(300, 6)
    with pytest.warns(UserWarning, match=r"rademacher: the standard error is .* after 40 draws, 1e-09 was asked for"):
        estimate = rx.rademacher(x, 16, 5, stderr=1e-9, max_draws=40)
    assert same(estimate, rx.rademacher(x, 40, 5))


# ---- What an estimate says.


def test_statistics():
    x = torch.randn(100, 5)
    estimate = rx.rademacher(x, 50, 2)
    values = estimate.suprema.numpy()
    assert math.isclose(float(estimate), values.mean(), rel_tol=1e-14)
    assert math.isclose(estimate.stderr, values.std(ddof=1) / math.sqrt(50), rel_tol=1e-12)
    assert estimate.mean.shape == () and estimate.mean.dtype == torch.float64
    assert estimate.bound == float(x.abs().max())
    single = rx.rademacher(x, 1, 2)
    assert math.isnan(single.stderr) and single.to_dict()["stderr"] is None


@pytest.mark.parametrize("name", CLASSES)
def test_as_json_and_as_text(name):
    estimate = CLASSES[name][0](torch.randn(100, 5), 50, 2)
    facts = json.loads(json.dumps(estimate.to_dict(0.1), allow_nan=False))
    assert facts["mean"] == float(estimate) and facts["upper"] == estimate.upper(0.1) and facts["delta"] == 0.1
    assert (facts["n"], facts["draws"], facts["effective_draws"], facts["draw_ranges"]) == (100, 50, 50, [[0, 50]])
    assert "upper" not in estimate.to_dict()
    text = str(estimate)
    assert text.startswith(f"{float(estimate):.6g} ± {estimate.stderr:.2g} (") and text.endswith("n = 100)")
    assert repr(estimate) == f"Estimate({text})"


def test_lower_estimates_give_no_upper_limit():
    lower = rx.Estimate(torch.rand(5), 10, ((0, 5),), 0, "network", kind="lower")
    assert "lower estimate" in str(lower)
    with pytest.raises(ValueError, match=r"Estimate\.upper: the suprema of network are lower estimates"):
        lower.upper(0.1)
    unknown = rx.Estimate(torch.rand(5), 10, ((0, 5),), 0, "mine")
    with pytest.raises(ValueError, match=r"Estimate\.upper: no bound of \|f\| is known for mine; give bound="):
        unknown.upper(0.1)
    for delta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"Estimate\.upper: delta must be between 0 and 1"):
            rx.rademacher(torch.ones(5, 1), 4, 0).upper(delta)


# ---- Where reading a number would wait for a device.


def test_a_check_that_waits_runs_at_the_first_number_that_is_read():
    def refuse():
        runs.append(1)
        raise ValueError("rademacher: outputs must be finite")

    readings = (
        float,
        str,
        repr,
        lambda e: e.stderr,
        lambda e: e.bound,
        lambda e: e.upper(),
        lambda e: e.to_dict(),
        lambda e: e.merge(e),
    )
    for read in readings:
        runs: list[int] = []
        estimate = rx.Estimate(torch.rand(4), 10, ((0, 4),), 0, "f", largest=torch.ones(3), pending=refuse)
        assert estimate.mean.shape == () and estimate.draws == 4 and not runs
        with pytest.raises(ValueError, match="must be finite"):
            read(estimate)
    passed = rx.Estimate(torch.rand(4), 10, ((0, 4),), 0, "f", largest=1.0, pending=lambda: runs.append(2))
    runs = []
    assert float(passed) == passed.mean and passed.stderr > 0 and runs == [2]


def test_shapes_without_values():
    estimate = rx.rademacher(torch.empty(100, 4, device="meta"), 20, 0)
    assert estimate.suprema.shape == (20,) and estimate.mean.device.type == "meta"
    assert estimate.pending is not None
    assert rx.rademacher(torch.empty(100, 4, device="meta"), 20, 0, nan_policy="propagate").pending is None


@pytest.mark.cuda
@classes
def test_a_device_gives_the_bits_of_the_cpu_and_checks_at_the_first_reading(function, supremum):
    x = torch.randn(2500, 20)
    assert torch.equal(function(x.cuda(), 50, 3).suprema.cpu(), function(x, 50, 3).suprema)
    streamed = function([part.cuda() for part in x.split(600)], 50, 3)
    assert torch.equal(streamed.suprema.cpu(), function(x, 50, 3).suprema)
    x[7, 3] = torch.nan
    late = function(x.cuda(), 50, 3)
    assert late.mean.isnan()
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity in column 3"):
        float(late)
