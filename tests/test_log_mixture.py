"""log_mixture as users call it: shapes, streams, weights, what is left out, errors."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

import refine_ext as rx


def reference(x, centers, scale, log_weights, exclude=None, normalized=False):
    """Float64 log-sum-exp over all pairs, with its weights, in NumPy; scale [N, d]."""
    x, y, s = (np.asarray(t, dtype=np.float64) for t in (x, centers, scale))
    terms = log_weights - 0.5 * (((x[:, None] - y) / s) ** 2).sum(2)
    if normalized:
        terms = terms - np.log(s).sum(1) - 0.5 * y.shape[1] * math.log(2 * math.pi)
    if exclude is not None:
        terms[np.arange(len(y)) == exclude[:, None]] = -np.inf
    value = logsumexp(terms, axis=1)
    return value, np.exp(terms - value[:, None])


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(13, 6)), rng.normal(size=(17, 6))


KINDS = {"number": (), "center": (17,), "dimension": (1, 6), "both": (17, 6)}


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", ["none", "weights", "log_weights"])
def test_every_kind_of_scale_and_weight(data, kind, weighted, normalized):
    x, y = data
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.5, 2.0, KINDS[kind])
    weights = rng.uniform(0.1, 1.0, 17)
    full = np.broadcast_to(scale[:, None] if kind == "center" else scale, (17, 6))
    options = {"none": {}, "weights": {"weights": weights}, "log_weights": {"log_weights": np.log(weights)}}[weighted]
    log_weights = -math.log(17) if weighted == "none" else np.log(weights)
    value, p = reference(x, y, full, log_weights, normalized=normalized)
    r = rx.log_mixture(
        x, y, torch.from_numpy(np.asarray(scale)), normalized=normalized, return_mean=True, return_stats=True, **options
    )
    # float64 on both sides: sums of 17 terms, a few hundred ulp at most
    np.testing.assert_allclose(r.value, value, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(r.mean, p @ y, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(r.top_weight, p.max(1), rtol=1e-12)
    np.testing.assert_allclose(r.effective_centers, 1 / (p**2).sum(1), rtol=1e-12)
    assert r.top_index.tolist() == p.argmax(1).tolist()


def test_leave_one_out_is_the_mixture_of_the_others(data):
    _, y = data
    both = rx.log_mixture(y, y, 0.7, leave_one_out=True, return_mean=True)
    for i in range(len(y)):
        others = np.delete(y, i, axis=0)
        value, mean = rx.log_mixture(y[i : i + 1], others, 0.7, return_mean=True)
        torch.testing.assert_close(both[0][i : i + 1], value, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(both[1][i : i + 1], mean, rtol=1e-12, atol=1e-13)
    index = torch.tensor([3, -1] + [0] * 15)
    mixed = rx.log_mixture(y, y, 0.7, leave_one_out=index)
    torch.testing.assert_close(mixed[1], rx.log_mixture(y, y, 0.7)[1], rtol=1e-13, atol=0)
    value, _ = reference(y, y, np.full((17, 6), 0.7), -math.log(16), exclude=np.array([3, -5] + [0] * 15))
    torch.testing.assert_close(mixed[0], torch.tensor(value[0]), rtol=1e-13, atol=0)


def test_images_and_numbers_keep_their_shapes():
    x, centers = torch.randn(4, 5, 3, 2, 2), torch.randn(6, 3, 2, 2)
    value, mean = rx.log_mixture(x, centers, torch.rand(6, 3, 2, 2) + 0.5, return_mean=True)
    assert value.shape == (4, 5) and mean.shape == x.shape
    value, mean = rx.log_mixture(torch.randn(3, 4), torch.randn(6), 1.0, return_mean=True)
    assert value.shape == mean.shape == (3, 4)
    assert rx.log_mixture(torch.randn(0, 2), torch.randn(6, 2), 1.0).shape == (0,)


def test_one_left_out_of_one_has_no_weight():
    r = rx.log_mixture(
        torch.zeros(1, 2), torch.zeros(1, 2), 1.0, leave_one_out=True, return_mean=True, return_stats=True
    )
    assert r.value.item() == -math.inf and r.mean.isnan().all() and r.top_index.item() == -1


@pytest.mark.parametrize("sizes", [(17,), (1, 15, 1), (4, 0, 13)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_stream_is_the_whole(data, sizes, weighted):
    x, y = (torch.from_numpy(t) for t in data)
    weights = torch.rand(17, dtype=torch.float64) if weighted else None
    exclude = torch.tensor([0, 16, -1] + [5] * 10)
    options = dict(return_mean=True, return_stats=True, leave_one_out=exclude, normalized=True)
    whole = rx.log_mixture(x, y, 0.6, weights, **options)
    streamed = rx.log_mixture(x, lambda: iter(y.split(list(sizes))), 0.6, weights, **options)
    for a, b in zip(whole, streamed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)  # another order of the same float64 sums


def test_a_memory_map_is_streamed(tmp_path, data, monkeypatch):
    x, y = data
    np.save(tmp_path / "y.npy", y)
    mapped = np.load(tmp_path / "y.npy", mmap_mode="r")
    monkeypatch.setattr("refine_ext.mixture_stream._BLOCK_BYTES", 5 * 6 * 8)
    torch.testing.assert_close(rx.log_mixture(x, mapped, 0.6), rx.log_mixture(x, y, 0.6), rtol=1e-13, atol=1e-13)


def test_the_gradient_through_a_stream_is_the_whole_ones(data):
    x, y = (torch.from_numpy(t) for t in data)
    grads = []
    for centers in (y, y.split(5)):
        leaf = x.clone().requires_grad_()
        (rx.log_mixture(leaf, centers, 0.6) * torch.arange(13)).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


def test_gradients_reach_scale_and_weights():
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64).requires_grad_()
    each = torch.rand(5, dtype=torch.float64).add(0.5).requires_grad_()
    for s in (scale, each):
        assert torch.autograd.gradcheck(lambda s, w: rx.log_mixture(x, y, s, w), (s, weights))
        assert torch.autograd.gradcheck(lambda s, w: rx.log_mixture(x, y, s, w, normalized=True), (s, weights))


def test_float64_values_of_float32_data():
    x = 40 * torch.randn(5, 64)
    value = rx.log_mixture(x, torch.zeros(1, 64), 1.0, dtype=torch.float64)
    assert value.dtype == torch.float64
    # float32 squares and their sum of 64: 1e-6 of the value
    torch.testing.assert_close(value, -0.5 * x.double().square().sum(1), rtol=1e-6, atol=0)


X, Y = torch.zeros(3, 2), torch.zeros(4, 2)
NAN = torch.tensor([[0.0, 0.0], [0.0, math.nan], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rx.log_mixture(X, Y, 0.0), ValueError, "scale must be positive and finite, got 0.0"),
        (
            lambda: rx.log_mixture(X, Y, torch.tensor([1.0, -1, 1, 1])),
            ValueError,
            "scale must be positive, got -1 at 1",
        ),
        (lambda: rx.log_mixture(X, Y, torch.tensor(math.nan)), ValueError, "scale must be positive, got nan at 0"),
        (
            lambda: rx.log_mixture(X, Y, torch.tensor([[1.0, 2], [3, math.nan], [1, 1], [-1, 1]])),
            ValueError,
            "scale must be positive, got nan at 3",
        ),
        (lambda: rx.log_mixture(X, Y, np.float32(-2)), ValueError, "scale must be positive and finite, got -2.0"),
        (lambda: rx.log_mixture(X, Y, True), TypeError, "scale must be a number or a tensor, got bool"),
        (lambda: rx.log_mixture(X, Y, torch.ones(3)), ValueError, r"scale must be a number, \[4\] or \[4, 2\]"),
        (lambda: rx.log_mixture(X, Y, "1"), TypeError, "scale must be a number or a tensor, got str"),
        (lambda: rx.log_mixture(X, torch.zeros(4, 3), 1.0), ValueError, r"x must be \[..., 3\] as the centers are"),
        (lambda: rx.log_mixture(X, Y[:0], 1.0), ValueError, "centers must not be empty"),
        (lambda: rx.log_mixture(NAN, Y, 1.0), ValueError, "x has NaN in row 1$"),
        (lambda: rx.log_mixture(X, NAN, 1.0), ValueError, "centers has NaN in row 1$"),
        (lambda: rx.log_mixture(X, iter([Y, NAN]), 1.0), ValueError, "centers has NaN in row 1$"),
        (lambda: rx.log_mixture(X, Y, 1.0, -torch.ones(4)), ValueError, "weights must not be negative, got -1 at 0"),
        (
            lambda: rx.log_mixture(X, Y, 1.0, torch.tensor([1, math.nan, 1, 1])),
            ValueError,
            "weights must not be negative, got nan at 1",
        ),
        (
            lambda: rx.log_mixture(X, Y, 1.0, log_weights=torch.tensor([0, 0, math.nan, 0])),
            ValueError,
            "log_weights has NaN in row 2$",
        ),
        (lambda: rx.log_mixture(X, Y, 1.0, torch.ones(3)), ValueError, r"weights must be \[4\]"),
        (lambda: rx.log_mixture(X, Y, 1.0, torch.ones(4), log_weights=torch.ones(4)), ValueError, "not both"),
        (lambda: rx.log_mixture(X, Y, 1.0, leave_one_out=True), ValueError, "as many x as centers, got 3 and 4"),
        (
            lambda: rx.log_mixture(X, Y, 1.0, leave_one_out=torch.tensor([0, 4, 0])),
            ValueError,
            "between -1 and 3, got 0 to 4",
        ),
        (
            lambda: rx.log_mixture(X, Y, 1.0, leave_one_out=torch.zeros(3)),
            TypeError,
            "an int64 tensor, got torch.float32",
        ),
        (lambda: rx.log_mixture(X, Y, 1.0, dtype=torch.float16), ValueError, "dtype must be"),
        (lambda: rx.log_mixture(X, Y, 1.0, nan_policy="omit"), ValueError, "nan_policy must be raise or propagate"),
        (lambda: rx.log_mixture(X.int(), Y, 1.0), TypeError, "x must be float64, float32, float16 or bfloat16"),
        (lambda: rx.log_mixture(X, 3, 1.0), TypeError, "centers must be a tensor, a NumPy array, blocks"),
        (lambda: rx.log_mixture(X, iter([]), 1.0), ValueError, "centers must not be empty, got no blocks"),
        (
            lambda: rx.log_mixture(X, iter([Y, torch.zeros(2, 3)]), 1.0),
            ValueError,
            r"blocks of centers must be \[n, 2\]",
        ),
        (lambda: rx.log_mixture(X, iter([Y]), torch.ones(4)), ValueError, "streamed centers take one scale"),
        (lambda: rx.log_mixture(X, iter([Y]), 1.0, torch.ones(5)), ValueError, "one for each centre, got 5 for 4"),
        (
            lambda: rx.log_mixture(X, iter([Y]), torch.ones((), requires_grad=True)),
            ValueError,
            "gradients by x only",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match="log_mixture: .*" + message):
        call()


def test_infinities_are_no_nan():
    assert rx.log_mixture(torch.tensor([math.inf, 0.0]), torch.tensor([1.0]), 1.0).tolist() == [-math.inf, -0.5]


def test_nan_may_be_let_through():
    value = rx.log_mixture(NAN, Y, 1.0, nan_policy="propagate")
    assert value.isnan().tolist() == [False, True, False]


def test_under_vmap_and_compile():
    x, y = torch.randn(5, 3, 2), torch.randn(4, 2)
    whole = rx.log_mixture(x, y, 0.7)
    torch.testing.assert_close(torch.func.vmap(lambda each: rx.log_mixture(each, y, 0.7))(x), whole)
    compiled = torch.compile(lambda x, y: rx.log_mixture(x, y, 0.7), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rx.log_mixture(x, y, 0.7), whole)
