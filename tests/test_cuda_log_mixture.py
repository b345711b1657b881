"""The CUDA kernels of the log-mixture: every path through them against the CPU's float64.

What the ops compute is compared with references, on every device, in test_log_mixture_ops.py. Here: dimensions that
have kernels of their own and those that share one, several chunks and blocks of everything (the emulation's are
small), chunks that have blocks of their own and chunks that do not, references that must be raised, exponents of
millions, what the compute type cannot hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import emulator
import log_mixture_reference
import pytest
import torch
from torch import Tensor

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
X, CENTERS, SCALE, LOG_WEIGHTS = 1, 2, 4, 8
cpu = torch.ops.refine_ext
everywhere = pytest.mark.parametrize(
    "where", ["cuda_on_cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sanitizer])]
)
sanitized = pytest.mark.sanitized
# Roundings of float32 to 1e-7, some of exponents of a few tens; a rounding of a stored gradient.
TOLERANCE = {f64: 1e-11, f32: 2e-5, f16: 2e-5, bf16: 2e-5}
STORED = {f64: 1e-11, f32: 2e-5, f16: 2e-3, bf16: 1e-2}


def run(where: str, op: str, *arguments):
    if where == "cuda":
        arguments = tuple(a.cuda() if isinstance(a, Tensor) else a for a in arguments)
        ops = cpu
    elif emulator.AVAILABLE:
        emulator.load_ops()
        ops = torch.ops.refine_ext_on_cpu
    else:
        pytest.skip("needs g++ on Linux")
    return [x.cpu() for x in getattr(ops, op)(*arguments)]


def problem(m: int, n: int, d: int, dtype: torch.dtype, kind: str, weighted: bool, exclude: bool, width: float = 0.7):
    compute = f64 if dtype == f64 else f32
    shape = {"shared": (), "per_center": (n,), "per_dimension": (n, d)}[kind]
    scale = width * d**0.5 * (0.75 + 0.5 * torch.rand(shape, dtype=f64))
    log_weights = torch.randn(n, dtype=f64).to(compute) if weighted else None
    left_out = torch.randint(-1, n, (m,)) if exclude else None
    x, centers = (torch.randn(rows, d, dtype=f64).to(dtype) for rows in (m, n))
    return x, centers, scale.to(compute), log_weights, left_out


def widened(inputs):
    return [t.double() if t is not None and t.is_floating_point() else t for t in inputs]


def assert_near(got: Tensor, want: Tensor, tolerance: float, what: object) -> None:
    """Against the largest of the results; infinities and NaN in the same places."""
    got, want = got.double(), want.double()
    finite = want.isfinite()
    assert torch.equal(got.nan_to_num()[~finite], want.nan_to_num()[~finite]), what
    assert torch.equal(got.isnan(), want.isnan()), what
    if finite.any():
        off = (got - want)[finite].abs().max() / want[finite].abs().max().clamp(min=1e-30)
        assert off <= tolerance, f"{what}: {off:.3g}"


def check(where: str, inputs, *, mean: bool = True, stats: bool = True, wanted: int = 15) -> None:
    dtype, what = inputs[0].dtype, [t if t is None else tuple(t.shape) for t in inputs]
    want = cpu.log_mixture(*widened(inputs), mean, stats)
    got = run(where, "log_mixture", *inputs, mean, stats)
    for name, one, other in zip(("value", "mean", "stats"), got, want, strict=False):
        assert_near(one, other, TOLERANCE[dtype], (name, what))
    assert torch.equal(got[3], want[3]), what
    if wanted == 0:
        return
    grad = torch.randn(len(inputs[0]), dtype=f64)
    grads = run(where, "log_mixture_backward", grad, got[0], *inputs, wanted)
    wants = cpu.log_mixture_backward(grad, want[0], *widened(inputs), wanted)
    for bit, one, other in zip((X, CENTERS, SCALE, LOG_WEIGHTS), grads, wants, strict=True):
        tolerance = (STORED if bit in (X, CENTERS) else TOLERANCE)[dtype]
        if wanted & bit:
            assert_near(one, other, tolerance, ("gradient", bit, what))


@everywhere
@pytest.mark.parametrize("kind", ["shared", "per_center", "per_dimension"])
@pytest.mark.parametrize("d", [1, 2, pytest.param(3, marks=sanitized), 4, pytest.param(19, marks=sanitized)])
def test_every_kernel(where, d, kind):
    """Less than a tile, tiles that are not full, several chunks, with blocks of their own."""
    for m, n, weighted, mean, stats in (
        (3, 70, False, False, False),
        (130, 5, True, True, False),
        (9, 600, True, False, True),
        (9, 70, False, True, False),
        (5, 70, True, False, False),
    ):
        wanted = 15 if n > 5 else X
        check(where, problem(m, n, d, f32, kind, weighted, weighted), mean=mean, stats=stats, wanted=wanted)


@everywhere
@pytest.mark.parametrize("dtype", [f64, f16, bf16], ids=str)
@pytest.mark.sanitized
def test_dtypes(where, dtype):
    for d, kind in ((2, "shared"), (19, "per_center"), (3, "per_dimension")):
        check(where, problem(70, 150, d, dtype, kind, True, True))


@everywhere
@pytest.mark.parametrize("d", [2, 6])
def test_all_chunks_in_one_block(where, d, monkeypatch):
    """As where there are rows enough; a row has the bits that it has alone, its chunks in blocks of their own."""
    monkeypatch.setenv("CUDA_ON_CPU_MULTIPROCESSORS", "1")
    inputs = problem(300, 1100, d, f32, "shared", False, True)
    check(where, inputs)
    x, centers, scale, log_weights, exclude = inputs
    alone = x[7:8], centers, scale, log_weights, exclude[7:8]
    for one, other in zip(
        run(where, "log_mixture", *alone, True, True), run(where, "log_mixture", *inputs, True, True), strict=True
    ):
        assert torch.equal(one[0], other[7])
    grad, value = torch.randn(300, dtype=f64), run(where, "log_mixture", *inputs, False, False)[0]
    (one, *_), (other, *_) = (
        run(where, "log_mixture_backward", grad[rows], value[rows], x[rows], *inputs[1:4], exclude[rows], X)
        for rows in (slice(7, 8), slice(None))
    )
    assert torch.equal(one[0], other[7])


@everywhere
@pytest.mark.parametrize("d", [2, 6])
def test_references_are_raised(where, d):
    """Each centre is far nearer than those before; then all over again, beyond what float32 rounds to one power."""
    for scale in (1.0, 2.0**-10, 2.0**-18):
        steps = torch.arange(600, dtype=f32)
        centers = ((600 - steps) / 8)[:, None] * torch.ones(d) / d**0.5
        x = torch.stack([torch.zeros(d), centers[500], centers[3] + 2.0**-12, torch.full((d,), 100.0)])
        inputs = x, centers, torch.tensor(scale), None, None
        value, mean, stats, top = run(where, "log_mixture", *inputs, True, True)
        want = cpu.log_mixture(*widened(inputs), True, True)
        # An exponent's own rounding, relative, is all that its value may be off.
        assert ((value - want[0]).abs() <= 1e-6 * want[0].abs() + 1e-6).all()
        assert torch.equal(top, want[3]) and not stats.isnan().any()
        assert_near(mean, want[1], 1e-4, "mean")


@contextmanager
def instructions(where: str, hopper: bool) -> Iterator[None]:
    """Within, products are Hopper's own instructions, which are taken only where they are asked for; or are not."""
    if hopper and where == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    with pytest.MonkeyPatch.context() as patch, emulator.launches(where) as launched:
        patch.setenv("REFINE_EXT_WGMMA", str(int(hopper)))
        yield
    assert any("hopper_mixture_kernel" in name for name in launched) == hopper
    assert any("mixture_product_kernel" in name for name in launched) != hopper


either_instructions = pytest.mark.parametrize("hopper", [False, True], ids=["mma", "wgmma"])


@everywhere
@either_instructions
@pytest.mark.sanitized
def test_few_products(where, hopper):
    """More pieces than wait in shared memory: places are used again."""
    inputs = problem(3, 260, 97 if hopper else 64, f32, "shared", False, True)
    with instructions(where, hopper):
        check(where, inputs, mean=False, stats=False, wanted=0 if hopper else 15)
    if not hopper:
        check(where, problem(3, 130, 64, f32, "per_center", False, True), stats=False, wanted=0)


@everywhere
@either_instructions
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_products(where, hopper, offset, monkeypatch):
    """Of many dimensions values alone are products: tiles that are not full, every option, far from the origin.

    A narrow scale, rows far away and such that are not finite are done from differences; a row knows by itself.
    """
    with instructions(where, hopper):
        for multiprocessors, m, n, d, kind, width in (
            (1, 130, 600, 70, "per_center", 0.7),
            (2, 5, 1100, 64, "shared", 0.7),
            (2, 9, 40, 97, "shared", 0.02),
        ):
            monkeypatch.setenv("CUDA_ON_CPU_MULTIPROCESSORS", str(multiprocessors))
            x, centers, scale, log_weights, exclude = problem(m, n, d, f32, kind, kind == "shared", True, width)
            inputs = x + offset, centers + offset, scale, log_weights, exclude
            want = cpu.log_mixture(*widened(inputs), False, False)[0]
            got = run(where, "log_mixture", *inputs, False, False)[0]
            # Errors of q are up to 2^-21 of the norms, or some roundings of it where these are too large.
            assert ((got - want).abs() <= 1e-5 * want.abs().clamp(min=1)).all()
            # Nor were they NaN, which float64's arithmetic would have made good.
            assert ((got - want).abs() > 1e-12 * want.abs()).double().mean() > 0.75
            inputs[0][0], inputs[0][1, 3], inputs[0][2] = 1e4, math.nan, 3e25
            other = run(where, "log_mixture", *inputs, False, False)[0]
            assert torch.equal(other[3:], got[3:]) and other[1].isnan()
            far = cpu.log_mixture(*widened(inputs), False, False)[0][[0, 2]]
            assert ((other[[0, 2]] - far).abs() <= 1e-5 * far.abs()).all()
            alone = inputs[0][4:5], *inputs[1:4], exclude[4:5]
            assert torch.equal(run(where, "log_mixture", *alone, False, False)[0], got[4:5])


@everywhere
@either_instructions
def test_every_product_of_parts_counts(where, hopper):
    """Parts as large as they come, of one sign in all dimensions: a row is at a centre, and each product is needed.

    v is 1 + m + l with m = 2^-8 - 2^-15 and l = 2^-17: without m m, or h l, |x - y|^2 is 2^-15, or 2^-16, of the norm
    off. The slope makes the most that a norm may count for, kProductTolerance: that is 1.6e-4, or 8e-5, of the value.
    """
    d, v = 64, 1 + 2.0**-8 - 2.0**-15 + 2.0**-17
    assert torch.tensor(v, dtype=f32).item() == v
    signs = torch.randint(2, (150, d)).float() * 2 - 1
    centers = v * torch.cat([signs, -signs])  # around the origin
    inputs = centers[:9].clone(), centers, torch.tensor((d / 2 / 5.1) ** 0.5), None, None
    with instructions(where, hopper):
        got = run(where, "log_mixture", *inputs, False, False)[0]
    assert ((got - cpu.log_mixture(*widened(inputs), False, False)[0]).abs() <= 1e-5).all()


@everywhere
@pytest.mark.parametrize(("d", "offset"), [(64, 0.0), (97, 1e3), (160, 0.0)])
def test_means_of_products(where, d, offset):
    """Of many dimensions means are sums of products: to float32's accuracy of the data's width, wherever they are.

    With a few weights that no distance changes, other ones for rows that leave out another centre, and with one, so
    that the sums' error is all there is: less than 2^-20 of the sum of their absolute terms, and a rounding of what is
    stored. Some centres are far away, and have no weight.
    """
    x, centers, scale, log_weights, _ = problem(130, 300, d, f32, "per_center", True, False)
    check(where, (x, centers, scale, log_weights, torch.randint(-1, 300, (130,))), stats=False, wanted=0)
    x, centers = x + offset, centers + offset
    middle = centers.double().mean(0)

    def assert_summed(got: Tensor, p: Tensor) -> None:
        want, size = p @ centers.double(), p @ (centers.double() - middle).abs()
        # The offset is about the middle.
        assert ((got - want).abs() <= 2.0**-20 * (size + 0.2) + 2.0**-24 * want.abs()).all()

    log_weights, exclude = -0.5 * torch.arange(300.0), torch.arange(130) % 12
    few = log_weights.double().expand(130, 300).scatter(1, exclude[:, None], -math.inf).softmax(1)
    assert_summed(run(where, "log_mixture", x, centers, torch.tensor(1e6), log_weights, exclude, True, False)[1], few)
    far = torch.cat([centers, torch.tensor([[1e30], [math.inf], [-1e6]]).expand(3, d)])
    one = torch.nn.functional.one_hot(torch.cdist(x.double(), centers.double()).argmin(1), 300).double()
    assert_summed(run(where, "log_mixture", x, far, torch.tensor(1e-3), None, None, True, False)[1], one)


def gradients(where: str, inputs, grad: Tensor, wanted: int = 15) -> list[Tensor]:
    value = run(where, "log_mixture", *inputs, False, False)[0]
    return run(where, "log_mixture_backward", grad, value, *inputs, wanted)


@everywhere
@pytest.mark.parametrize(
    ("n", "d", "kind", "offset"),
    [(130, 64, "per_center", 0.0), (300, 64, "shared", 1e3), (130, 160, "per_center", 1e3)],
)
def test_gradients_of_products(where, n, d, kind, offset):
    """Of many dimensions gradients are sums of products: of all at once and one by one, with rows that do not count.

    Of several tiles in a block of weights, and of several blocks.
    """
    x, centers, scale, log_weights, exclude = problem(n, n, d, f32, kind, True, True)
    x, centers = x + offset, centers + offset
    grad = torch.randn(n, dtype=f64)
    x[3, 5], grad[3], grad[4] = math.nan, 0, 0
    centers[7, 1] = math.inf
    inputs = x, centers, scale, log_weights, exclude
    value = cpu.log_mixture(*widened(inputs), False, False)[0]
    wants = cpu.log_mixture_backward(grad, value, *widened(inputs), 15)
    grads = gradients(where, inputs, grad)
    for bit, one, want in zip((X, CENTERS, SCALE, LOG_WEIGHTS), grads, wants, strict=True):
        assert_near(one, want, TOLERANCE[f32], ("gradient", bit))
    for bit in (X, CENTERS) if n == 130 and d == 64 else ():
        assert torch.equal(gradients(where, inputs, grad, bit)[bit.bit_length() - 1], grads[bit.bit_length() - 1])
    alone = x[9:10], centers, scale, log_weights, exclude[9:10]
    assert torch.equal(gradients(where, alone, grad[9:10], X)[0][0], grads[0][9])


@everywhere
@pytest.mark.parametrize("kind", ["shared", "per_center"])
def test_gradients_of_narrow_scales(where, kind):
    """Beside a scale much less than the data's width products would be too coarse: then gradients are differences.

    So they are where a centre is far away; it has no weight, and the others' gradients are the same but for rounding.
    Sums of products are off by 2^-21 of the width of 4, sums of differences by a few roundings of the scale.
    """
    x, centers, scale, *_ = problem(20, 40, 64, f32, kind, False, False, 0.005)
    x = centers[torch.arange(20) * 2] + scale.mean() * torch.randn(20, 64)
    grad = torch.randn(20, dtype=f64)
    for width, tolerance in ((1.0, 1e-6), (50.0, 1e-5)):
        inputs = x, centers, scale * width, None, None
        value = cpu.log_mixture(*widened(inputs), False, False)[0]
        wants = cpu.log_mixture_backward(grad, value, *widened(inputs), 15)
        got = gradients(where, inputs, grad)
        for one, want in zip(got[:3], wants, strict=False):
            assert_near(one, want, tolerance, (kind, width))
        far = torch.cat([centers, torch.full((1, 64), 1e6)])
        scales = torch.cat([inputs[2], inputs[2][:1]]) if kind == "per_center" else inputs[2]
        other = gradients(where, (x, far, scales, None, None), grad)
        assert_near(other[0], wants[0], tolerance, (kind, width, "far"))
        assert torch.equal(other[0], got[0]) == (width == 1.0)


@everywhere
@pytest.mark.parametrize("dtype", [f64, f32, bf16], ids=str)
@pytest.mark.sanitized
def test_what_float32_cannot_hold(where, dtype):
    """Scales whose squares overflow, differences that do, rows without a centre, rows with NaN and gradient zero."""
    compute = f64 if dtype == f64 else f32
    for d in (2, 7):
        x, centers, *_ = problem(6, 40, d, dtype, "shared", False, False)
        x[0], centers[0] = 1e30, 1.5e30
        exclude = torch.tensor([-1, 3, 9, -1, -1, 5])
        check(where, (x, centers, torch.tensor(1e-25, dtype=compute), None, exclude), wanted=LOG_WEIGHTS)
        wide = torch.tensor(1e25, dtype=compute)
        value, mean, *_ = run(where, "log_mixture", x[1:], centers[1:], wide, None, None, True, False)
        assert_near(value, torch.full((5,), math.log(39), dtype=f64), 1e-6, "value")
        assert_near(mean, centers[1:].double().mean(0).expand(5, d), 1e-5, "mean")
    for d in (2, 7):
        x, centers, scale, *_ = problem(5, 1, d, dtype, "shared", False, False)
        x[4, 1] = math.nan
        inputs = x, centers, scale, None, torch.tensor([-1, 0, -1, 0, -1])
        value, mean, stats, top = run(where, "log_mixture", *inputs, True, True)
        assert (value[[1, 3]] == -math.inf).all() and value[4].isnan() and value[[0, 2]].isfinite().all()
        assert top.tolist()[:4] == [0, -1, 0, -1] and (stats[[0, 2]] == 1).all()
        assert mean[[1, 3, 4]].isnan().all() and stats[[1, 3, 4]].isnan().all()
        grad = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.0], dtype=f64)
        grads = run(where, "log_mixture_backward", grad, value, *inputs, 15)
        assert not any(g.isnan().any() for g in grads)
        assert (grads[0][[1, 3, 4]] == 0).all() and grads[3].item() == pytest.approx(3, rel=1e-6)


@everywhere
def test_extreme_gradients(where):
    """The nearest centre has all of a row, in float64's arithmetic where float32's squares overflow."""
    for d, kind in ((3, "shared"), (3, "per_center"), (130, "per_dimension")):
        x, centers, scale, *_ = problem(4, 9, d, f32, kind, False, False)
        inputs = x, centers, torch.full_like(scale, 1e-16), None, None
        check(where, inputs, wanted=X | CENTERS)  # a scale's is beyond float32
        exact = x.clone(), x.clone(), torch.full_like(scale, 1e-25)[:4] if scale.dim() else torch.tensor(1e-25)
        check(where, (*exact, None, None))


def check_peaked(where: str, inputs) -> None:
    x, _, scale, *_ = inputs
    value = run(where, "log_mixture", *inputs, False, False)[0]
    grad = 0.5 + torch.rand(len(x), dtype=f64)
    got = run(where, "log_mixture_backward", grad, value, *inputs, 15)
    want = log_mixture_reference.gradients(log_mixture_reference.reference(*inputs), grad, scale)
    for name, one in zip(log_mixture_reference.NAMES, got, strict=True):
        tolerance = 3e-6 if one.dtype == f32 else STORED[x.dtype]
        assert_near(one, torch.as_tensor(want[name].want.astype(float)).reshape(one.shape), tolerance, name)


@everywhere
@pytest.mark.parametrize(
    ("d", "kind", "dtype"),
    [(d, kind, f32) for d in (3, 16, 64, 300) for kind in ("shared", "per_center")]
    + [(784, "shared", f32), (100, "per_center", bf16)],
)
def test_peaked_gradients(where, d, kind, dtype):
    """Most of a row's weight is one centre's, up to hundreds of nats away: the rounding of exponents must cancel.

    Where the value is made as the weights are, an exponent is rounded only when the row's reference is off it already,
    below 2^6 then: half a unit in its last place is 2^-19 ln 2 = 1.3e-6 of a weight. As much again for log-weights of
    up to 2^4, ex2 and the sums. A value that is 1e-6 of itself off is 1e-4 of a weight at hundreds of nats.
    """
    n, s = 104, 0.5  # so wide that the forward takes products from 64 dimensions on
    log_weights, exclude = None, None
    scale = torch.tensor(s)
    if kind == "per_center":
        scale = s * (0.9 + 0.2 * torch.rand(n))
        log_weights = 2 * torch.randn(n) - 4
        exclude = torch.where(torch.arange(n) % 3 == 0, -1, (torch.arange(n) + 7) % n)
    centers = torch.randn(n, d).to(dtype)
    x = (0.95 * centers.float() + s * torch.randn(n, d)).to(dtype)
    check_peaked(where, (x, centers, scale, log_weights, exclude))


@everywhere
@pytest.mark.parametrize("kind", ["shared", "per_center"])
@pytest.mark.parametrize("d", [3, 4, 16])
def test_far_weighted_gradients(where, d, kind):
    """Rows 200 nats away from their centres, these farther apart: a log-weight's sum with a value is not rounded.

    It would be by 2^-16 ln 2 = 1e-5.
    """
    n = 104
    centers = 20 * torch.randn(n, d)
    scale = torch.tensor(0.05) if kind == "shared" else 0.05 * (0.95 + 0.1 * torch.rand(n))
    check_peaked(where, (centers + d**-0.5, centers, scale, 2 * torch.randn(n) - 4, None))


@everywhere
@pytest.mark.parametrize("dtype", [f64, f32], ids=str)
@pytest.mark.parametrize("d", [2, pytest.param(6, marks=sanitized), 66])
def test_a_row_at_infinity_has_no_weight(where, d, dtype):
    """Nor a part in any gradient but its own, which is zero."""
    x, centers, scale, *_ = problem(40, 30, d, dtype, "shared", False, False)
    x[3, 1], x[7, 1] = math.inf, -math.inf
    check(where, (x, centers, scale, None, None))


@everywhere
@pytest.mark.parametrize("dtype", [f64, f32], ids=str)
@pytest.mark.parametrize("d", [2, pytest.param(6, marks=sanitized), 66])
def test_a_center_at_infinity_has_no_weight(where, d, dtype):
    """Nor a part in any mean or gradient but its own, which is zero; not even of a row that is there too."""
    for kind in ("shared", "per_center", "per_dimension"):
        x, centers, scale, log_weights, exclude = problem(40, 30, d, dtype, kind, True, True)
        centers[0, 0], centers[7, 1], centers[29] = math.inf, -math.inf, math.inf
        exclude[:3] = torch.tensor([0, 7, -1])
        check(where, (x, centers, scale, log_weights, exclude))
        x[2, 1], x[5] = -math.inf, math.inf
        check(where, (x, centers, scale, None, exclude))


@everywhere
@pytest.mark.parametrize("d", [2, 6, 66])
def test_a_center_of_nan_makes_nan(where, d):
    """In the places where it does on the CPU: all that it counts for."""
    x, centers, scale, log_weights, exclude = problem(40, 30, d, f32, "shared", True, True)
    centers[4, 1], exclude[:3] = math.nan, torch.tensor([4, -1, 3])
    value, mean, stats, _ = run(where, "log_mixture", x, centers, scale, log_weights, exclude, True, True)
    want = cpu.log_mixture(x, centers, scale, log_weights, exclude, True, True)
    for one, other in zip((value, mean, stats), want, strict=False):
        assert torch.equal(one.isnan(), other.isnan())
    grad = torch.randn(40, dtype=f64)
    grads = run(where, "log_mixture_backward", grad, value, x, centers, scale, log_weights, exclude, 15)
    wants = cpu.log_mixture_backward(grad, want[0], x, centers, scale, log_weights, exclude, 15)
    for one, other in zip(grads, wants, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@everywhere
def test_nothing(where):
    for d in (2, 6, 66):
        x, centers, scale, *_ = problem(0, 7, d, f32, "shared", False, False)
        value, mean, stats, top = run(where, "log_mixture", x, centers, scale, None, None, True, True)
        assert [len(t) for t in (value, mean, stats, top)] == [0] * 4
        grads = run(where, "log_mixture_backward", value, value, x, centers, scale, None, None, 15)
        assert grads[0].numel() == 0 and all((g == 0).all() for g in grads[1:]) and grads[1].shape == (7, d)


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_the_order_of_blocks_does_not_matter(order, monkeypatch):
    for d, n in ((2, 600), (6, 600), (66, 260)):
        inputs = problem(150, n, d, f32, "shared", True, True)
        grad = torch.randn(150, dtype=f64)

        def results(inputs=inputs, grad=grad):
            got = run("cuda_on_cpu", "log_mixture", *inputs, True, True)
            return [*got, *run("cuda_on_cpu", "log_mixture_backward", grad, got[0], *inputs, 15)]

        monkeypatch.delenv("CUDA_ON_CPU_ORDER", raising=False)
        want = results()
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        for one, other in zip(results(), want, strict=True):
            assert torch.equal(one, other)


@pytest.mark.cuda
def test_large():
    """Beyond the limits on blocks and chunks that a GPU has."""
    for m, n, d, mean in (
        (40_000, 5000, 2, True),
        (3, 200_000, 3, False),
        (5000, 9000, 20, True),
        (5000, 9000, 100, True),
        (5000, 5000, 400, False),
    ):
        x, centers, scale, *_ = problem(m, n, d, f32, "shared", False, False)
        got = run("cuda", "log_mixture", x, centers, scale, None, None, mean, False)
        rows = torch.randint(m, (50,))
        want = cpu.log_mixture(x[rows].double(), centers.double(), scale.double(), None, None, mean, False)
        assert_near(got[0][rows], want[0], 1e-5, "value")
        if mean:
            assert_near(got[1][rows], want[1], 2e-5, "mean")
        if d < 64:
            continue
        grad = torch.randn(m, dtype=f64)
        grads = run("cuda", "log_mixture_backward", grad, got[0], x, centers, scale, None, None, 15)
        inputs = x.double(), centers.double(), scale.double(), None, None
        value = cpu.log_mixture(*inputs, False, False)[0]
        for one, other in zip(grads, cpu.log_mixture_backward(grad, value, *inputs, 15), strict=True):
            assert_near(one, other, 2e-5, "gradient")
