"""Guided steps against float64: every dtype and mix, layout, coefficient and seed, and what they refuse."""

from __future__ import annotations

import itertools
import math

import guidance_reference as reference
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_density_ratio_ops import shifted_by

import refine_ext as rx
from refine_ext.guidance import guidance_factor, guided_score, guided_step

# Half the distance of neighbours, relative: what one rounding costs.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
MIXES = [
    *((dtype, (dtype, dtype)) for dtype in ROUNDING),
    (torch.float64, (torch.float32, torch.float64)),
    (torch.float64, (torch.float32, torch.float32)),
    (torch.float32, (torch.bfloat16, torch.float32)),
    (torch.float32, (torch.float16, torch.bfloat16)),
]


def assert_is_step(got, x, terms, coefficients, factor=None, seed=None, step=0):
    noise = None if seed is None else reference.normal(tuple(x.shape), seed, step)
    want, size = reference.step(x, terms, coefficients, factor, noise)
    assert got.dtype == x.dtype and got.shape == x.shape and got.is_contiguous()
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Each coefficient, product and sum rounded once, a normal number to 1.2e-6 (4e-15 in float64); then the store.
    eps = (2 * len(terms) + 4) * ROUNDING[arithmetic]
    noisy = 0.0 if noise is None else (4e-15 if arithmetic == torch.float64 else 1.2e-6)
    limit = eps * size + noisy * np.abs(np.asarray(coefficients, dtype=np.float64)).max()
    limit = limit + ROUNDING[x.dtype] * np.abs(want) + (2.0**-25 if x.dtype == torch.float16 else 1e-38)
    error = np.abs(got.detach().cpu().double().numpy() - want)
    assert (error <= limit).all(), (error - limit).max()


def case(shape, state, terms):
    x = torch.randn(shape, dtype=torch.float64).to(state)
    return x, [torch.randn(shape, dtype=torch.float64).to(dtype) for dtype in terms]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("state", "terms"), MIXES, ids=str)
def test_dtypes(state, terms, noisy, device):
    for shape in ((3, 7), (2, 3, 5, 8), (2, 4099), (70_001,)):
        x, u = case(shape, state, terms)
        c = [0.9, -0.3, 0.25, 0.5][: 4 if noisy else 3]
        seed = 17 if noisy and shape[0] < 9 else None
        c = c if seed else c[:3]
        assert_is_step(guided_step(x, u, c, seed=seed, step=2), x, u, c, seed=seed, step=2)


@pytest.mark.parametrize("count", range(8))
def test_numbers_of_terms(count, device):
    x, u = case((3, 150), torch.float32, [torch.float32] * count)
    c = [0.5, *(0.1 * k - 0.25 for k in range(count))]
    assert_is_step(guided_step(x, u, c), x, u, c)
    assert_is_step(guided_step(x, u, [*c, 0.7], seed=3), x, u, [*c, 0.7], seed=3)


@pytest.mark.parametrize("state", ROUNDING, ids=str)
def test_coefficients_of_each_sample(state, device):
    """A table, rows of a larger one, one row for all, and a factor."""
    x, u = case((5, 333), state, [state, state])
    tables = torch.randn(4, 5, 6, dtype=torch.float64)
    table, factor = tables[2, :, 1:5], torch.rand(5, dtype=torch.float64)
    host, f = table.cpu().numpy(), factor.cpu().numpy()
    assert_is_step(guided_step(x, u, table, factor=factor, seed=9, step=4), x, u, host, f, 9, 4)
    assert_is_step(guided_step(x, u, table[:, :3]), x, u, host[:, :3])
    assert_is_step(guided_step(x, u, table[3], seed=2), x, u, host[3], None, 2)
    assert_is_step(guided_step(x, u, table[3:4], seed=2), x, u, host[3:4], None, 2)
    # Columns apart in memory.
    across = table.t().contiguous().t()
    assert torch.equal(guided_step(x, u, across, seed=1), guided_step(x, u, table, seed=1))
    assert_is_step(guided_step(x, u, [1.0, 0.5, 2.0], factor=factor), x, u, [1.0, 0.5, 2.0], f)
    # float32 coefficients are widened.
    single = table.float()
    assert torch.equal(guided_step(x, u, single, seed=1), guided_step(x, u, single.double(), seed=1))


def test_seeds_of_each_sample(device):
    x, u = case((4, 90), torch.float32, [torch.float32])
    seeds = torch.tensor([3, -1, 2**62, 3])
    got = guided_step(x, u, [1.0, 0.5, 2.0], seed=seeds, step=7)
    assert_is_step(got, x, u, [1.0, 0.5, 2.0], seed=seeds, step=7)
    for b in range(4):
        alone = guided_step(x[b : b + 1], [u[0][b : b + 1]], [1.0, 0.5, 2.0], seed=seeds[b : b + 1], step=7)
        assert torch.equal(alone[0], got[b])
    # A seed of no dimension is one for the batch.
    one = guided_step(x, u, [1.0, 0.5, 2.0], seed=torch.tensor(11))
    assert torch.equal(one, guided_step(x, u, [1.0, 0.5, 2.0], seed=11))


def test_noise_is_that_of_philox_normal(device):
    x, u = case((2, 3, 30), torch.float64, [torch.float64])
    z = rx.philox_normal(x.shape, 5, step=6, dtype=torch.float64)
    got = guided_step(x, u, [0.0, 0.0, 1.0], seed=5, step=6)
    assert torch.equal(got, z)


def test_no_seed_draws_one(device):
    x = torch.zeros(2, 40)
    torch.manual_seed(5)
    first, second = guided_step(x, [], [0.0, 1.0]), guided_step(x, [], [0.0, 1.0])
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    torch.manual_seed(5)
    assert torch.equal(first, guided_step(x, [], [0.0, 1.0]))


@pytest.mark.parametrize("state", ROUNDING, ids=str)
@pytest.mark.parametrize("n", [5, 64, 300])
def test_a_coefficient_of_zero_leaves_its_tensor_out(state, n, device):
    """Whatever it holds: NaN and infinities, in some samples or in all."""
    x, u = case((3, n), state, [state, state])
    bad = torch.full_like(x, math.nan)
    bad[:, ::2] = math.inf
    for k, noisy in itertools.product(range(3), (False, True)):
        c = [0.5, -0.25, 2.0, 0.125][: 4 if noisy else 3]
        c[k] = 0.0
        seed = 4 if noisy else None
        clean, spoilt = [x, *u], [x, *u]
        spoilt[k] = bad
        want = guided_step(clean[0], clean[1:], c, seed=seed)
        assert torch.equal(guided_step(spoilt[0], spoilt[1:], c, seed=seed), want)
        assert_is_step(want, x, u, c, seed=seed)
    # One sample without its last term: a factor of zero, and an infinite factor of a coefficient of zero.
    factor = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    spoilt = u[1].clone()
    spoilt[1] = math.nan
    got = guided_step(x, [u[0], spoilt], [1.0, 0.5, 2.0], factor=factor)
    assert_is_step(got, x, u, [1.0, 0.5, 2.0], factor.cpu().numpy())
    got = guided_step(x, [u[0], bad], [1.0, 0.5, 0.0], factor=factor * math.inf)
    assert_is_step(got, x, u, [1.0, 0.5, 0.0])


def test_nan_and_infinity_pass(device):
    x, u = case((3, 70), torch.float32, [torch.float32])
    x[0, 3], u[0][1, 69] = math.nan, math.inf
    got = guided_step(x, u, [1.0, 0.5])
    assert got[0, 3].isnan() and got[1, 69] == math.inf
    assert got.isfinite().sum() == got.numel() - 2
    assert guided_step(x, u, [1.0, math.nan])[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_results_are_float32_results_rounded(dtype, device):
    """Bit for bit, on every number there is: many results lie halfway between two, overflow, or are NaN."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(4, -1)
    for c in ([1.0], [1.0, 2.0**-8], [1.0, -(2.0**-11)], [0.75, 0.5], [1.0, 2.0**-8, 0.0625]):
        u = [x] if len(c) > 1 else []
        seed = 3 if len(c) > 2 else None
        got = guided_step(x, u, c, seed=seed)
        want = guided_step(x.float(), [t.float() for t in u], c, seed=seed).to(dtype)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), c


@pytest.mark.parametrize("state", ROUNDING, ids=str)
@pytest.mark.parametrize("n", [5, 400])
def test_a_coefficient_of_nan_whatever_its_bits(state, n, device):
    """All of them set: rounding the last ones up would make a number of it."""
    x = torch.ones(2, n, dtype=state)
    table = torch.tensor([2**63 - 1, -1], dtype=torch.int64).view(torch.float64)
    for c in (table, table[:1]):
        got = guided_step(x, [x] if len(c) > 1 else [], c)
        assert got.isnan().all()


@pytest.mark.parametrize("state", ROUNDING, ids=str)
@pytest.mark.parametrize("n", [1, 3, 15, 63, 64, 65, 200, 12_288])
def test_layouts(state, n, device):
    """In place, over a term, misaligned by any element, strided samples, strided elements, a broadcast sample."""
    x, (u, v) = case((3, n), state, (state, state))
    c = [0.75, -0.5, 0.25, 0.5]
    want = guided_step(x, [u, v], c, seed=3)
    for offset in (0, 1, 3):
        out = shifted_by(1, torch.full_like(x, math.nan))
        moved = [shifted_by(offset, t) for t in (x, u, v)]
        assert guided_step(moved[0], moved[1:], c, seed=3, out=out) is out
        assert torch.equal(out, want)
        assert torch.equal(guided_step(moved[0], moved[1:], c, seed=3, out=moved[0]), want)
        assert torch.equal(moved[0], want)
    target = v.clone()
    assert torch.equal(guided_step(x, [u, target], c, seed=3, out=target), want)
    wide = torch.cat([u, x, v], 1)
    parts = wide[:, n : 2 * n], [wide[:, :n], wide[:, 2 * n :]]
    assert torch.equal(guided_step(*parts, c, seed=3), want)
    # An output that is not contiguous is written too, over its input as well.
    guided_step(*parts, c, seed=3, out=parts[0])
    assert torch.equal(wide[:, n : 2 * n], want) and torch.equal(wide[:, :n], u)
    apart = torch.stack([x, u, v], -1)
    assert torch.equal(guided_step(apart[..., 0], [apart[..., 1], apart[..., 2]], c, seed=3), want)
    same = guided_step(x[:1].expand(3, n), [u, v], c, seed=3)
    assert torch.equal(same, guided_step(x[:1].expand(3, n).contiguous(), [u, v], c, seed=3))


@given(
    batch=st.integers(0, 4),
    shape=st.lists(st.integers(0, 9), max_size=3),
    order=st.randoms(use_true_random=False),
    noisy=st.booleans(),
)
def test_any_shape_and_strides(batch, shape, order, noisy, device):
    tensors = []
    for _ in range(3):
        axes = list(range(1 + len(shape)))
        order.shuffle(axes)
        sizes = [batch, *shape]
        stored = torch.randn([sizes[a] for a in axes], dtype=torch.float64)
        tensors.append(stored.permute([axes.index(a) for a in range(len(axes))]))
    x, *u = tensors
    c = [0.5, 2.0, -1.0, 0.25] if noisy else [0.5, 2.0, -1.0]
    assert_is_step(guided_step(x, u, c, seed=1 if noisy else None), x, u, c, seed=1 if noisy else None)


def test_the_batch_does_not_matter(device):
    x, u = case((7, 1000), torch.float32, [torch.float32])
    whole = guided_step(x, u, [1.0, 0.5, 0.25], seed=3)
    for size in (1, 2, 6):
        assert torch.equal(guided_step(x[:size], [u[0][:size]], [1.0, 0.5, 0.25], seed=3), whole[:size])
        # The tails of samples are made as their middles are.
        part = guided_step(x[:, : 100 * size], [u[0][:, : 100 * size]], [1.0, 0.5, 0.25], seed=3)
        assert torch.equal(part, whole[:, : 100 * size])


@pytest.mark.kernels("cpu")
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_threads_do_not_matter(dtype, threads, device):
    """Also where the output is large enough to be written past the caches."""
    x, u = case((3, 1_100_003) if dtype != torch.float64 else (3, 400_000), dtype, [dtype])
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(guided_step(x, u, [1.0, 0.5, 0.25], seed=3))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(results[0][:, :500], guided_step(x[:, :500], [u[0][:, :500]], [1.0, 0.5, 0.25], seed=3))
    aligned = x[:, :400_000].contiguous()
    assert torch.equal(
        guided_step(aligned, [], [1.0, 0.25], seed=3)[2, -99:],
        guided_step(x[:, :400_000], [], [1.0, 0.25], seed=3)[2, -99:],
    )


def test_many_short_samples(device):
    x, u = case((3001, 2), torch.float32, [torch.float32])
    factor = torch.rand(3001, dtype=torch.float64)
    got = guided_step(x, u, [0.9, 0.5, 0.25], factor=factor, seed=3)
    assert_is_step(got, x, u, [0.9, 0.5, 0.25], factor.cpu().numpy(), 3)


def test_guided_score_is_its_formula(device):
    prediction, (gradient,) = case((4, 3, 11), torch.float64, [torch.float64])
    h = torch.tensor([-1.0, 0.0, 0.5, 30.0], dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 2.0, 9.0], dtype=torch.float64)
    alpha = torch.tensor([1.0, 0.8, 0.5, 0.1], dtype=torch.float64)
    gradient[3] = math.nan  # its level is outside
    scale = {"score": 1.0, "noise": -sigma, "denoised": sigma**2 / alpha, "velocity": -sigma / alpha}
    for name, expected in scale.items():
        got = guided_score(
            prediction,
            h,
            gradient,
            kind="logit",
            weight=1.5,
            sigma=sigma,
            alpha=alpha,
            parametrization=name,
            sigma_max=5.0,
        )
        size = (1.5 * expected * torch.ones(4, dtype=torch.float64)).reshape(4, 1, 1)
        want = torch.where(
            torch.tensor([True, True, True, False]).reshape(4, 1, 1), prediction + size * gradient, prediction
        )
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
        out = prediction.clone()
        assert (
            guided_score(
                out,
                h,
                gradient,
                kind="logit",
                weight=1.5,
                sigma=sigma,
                alpha=alpha,
                parametrization=name,
                sigma_max=5.0,
                out=out,
            )
            is out
        )
        assert torch.equal(out, got)
    assert torch.equal(guided_score(prediction, h, gradient, divergence="gan", weight=0.0), prediction)


X = torch.zeros(2, 3)
ERRORS = [
    (lambda: guided_step([1.0], [], [1.0]), TypeError, "x must be a torch.Tensor, got list"),
    (lambda: guided_step(X.int(), [], [1.0]), TypeError, "x must be float64, float32, float16 or bfloat16"),
    (lambda: guided_step(X.to_sparse(), [], [1.0]), TypeError, "x must be a dense tensor"),
    (lambda: guided_step(torch.tensor(1.0), [], [1.0]), ValueError, "x must have a batch dimension"),
    (lambda: guided_step(X, [X[:1]], [1.0, 1.0]), ValueError, r"terms\[0\] must have the shape of x, .*got \[1, 3\]"),
    (lambda: guided_step(X, [X, X.double()], [1.0, 1.0, 1.0]), ValueError, r"terms\[1\] is float64, .* float32"),
    (lambda: guided_step(X.half(), [X.bfloat16()], [1.0, 1.0]), ValueError, "is bfloat16, which does not go with"),
    (lambda: guided_step(X.half(), [X], [1.0, 1.0]), ValueError, "is float32, which .* a state of float16"),
    (lambda: guided_step(X, [X] * 8, [1.0] * 9), ValueError, "at most 7 terms are supported, got 8"),
    (lambda: guided_step(X, [X], [1.0]), ValueError, r"coefficients must be 2 numbers \(of x, the 1 terms\), got 1"),
    (lambda: guided_step(X, [X], [1.0] * 4), ValueError, "coefficients must be 2 numbers"),
    (lambda: guided_step(X, [X], [torch.ones(())] * 2), TypeError, "coefficients must be numbers or one tensor"),
    (lambda: guided_step(X, [X], torch.ones(3, 2)), ValueError, r"coefficients must have shape \[2\] or \[2, 2\]"),
    (lambda: guided_step(X, [X], torch.ones(())), ValueError, "coefficients must have one or two dimensions"),
    (lambda: guided_step(X, [X], [1.0, 1.0], factor=torch.ones(3)), ValueError, r"must have shape \[2\], got \[3\]"),
    (lambda: guided_step(X, [X], [1.0, 1.0], factor=2.0), TypeError, "factor must be a tensor, got float"),
    (lambda: guided_step(X, [], [1.0], factor=torch.ones(2)), ValueError, "factor multiplies the last term"),
    (lambda: guided_step(X, [], [1.0, 1.0], seed=torch.tensor([[1], [2]])), ValueError, r"shape \[2\], got \[2, 1\]"),
    (lambda: guided_step(X, [], [1.0, 1.0], seed="a"), TypeError, "seed must be an int or an int64 tensor, got str"),
    (lambda: guided_step(X, [], [1.0, 1.0], step=2**32), ValueError, "step must be between 0 and"),
    (lambda: guided_step(X, [], [1.0], out=X[:1]), ValueError, r"out must be like x, \[2, 3\] torch.float32"),
    (lambda: guided_step(X, [], [1.0], out=X.double()), ValueError, "out must be like x"),
    (lambda: guided_step(X, [], [1.0], out=[X]), ValueError, "out must be like x, .*, got list"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), ERRORS)
@pytest.mark.kernels("cpu", "cuda_on_cpu")
def test_errors(call, error, text, device):
    with pytest.raises(error, match=text) as caught:
        call()
    assert str(caught.value).startswith("guided_step: ")


def test_outputs_that_overlap_an_input(device):
    memory = torch.zeros(40)
    x, out = memory[:20].view(2, 10), memory[10:30].view(2, 10)
    with pytest.raises(ValueError, match="guided_step: out overlaps an input"):
        guided_step(x, [], [1.0], out=out)
    with pytest.raises(ValueError, match="guided_step: out overlaps an input"):
        guided_step(torch.zeros(2, 10), [x], [1.0, 1.0], out=out)
    guided_step(x, [], [1.0], out=memory[20:].view(2, 10))
    table = memory.double()
    with pytest.raises(ValueError, match="guided_step: out overlaps an input"):
        guided_step(torch.zeros(2, 5, dtype=torch.float64), [], table[:1], out=table[:10].view(2, 5))


def test_outputs_and_gradients_do_not_go_together(device):
    x = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="out= is not differentiable"):
        guided_step(x, [], [1.0], out=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="out= is not differentiable"):
        guided_step(torch.zeros(2, 3), [], [1.0], out=x)
    with torch.no_grad():
        guided_step(x, [], [2.0], out=x)


def test_autocast_leaves_the_arguments(device):
    x, u = torch.randn(2, 9), torch.randn(2, 9).bfloat16()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        got = guided_step(x, [u], [1.0, 0.5])
        factor = guidance_factor(torch.zeros(2, dtype=torch.bfloat16), kind="logit")
    assert got.dtype == torch.float32 and torch.equal(got, guided_step(x, [u], [1.0, 0.5]))
    assert factor.dtype == torch.float64


def test_inference_mode(device):
    with torch.inference_mode():
        x = torch.randn(2, 9)
        got = guided_step(x, [x], [1.0, 0.5, 1.0], seed=3)
        assert guided_step(x, [x], [1.0, 0.5], out=x) is x
    assert got.is_inference()
