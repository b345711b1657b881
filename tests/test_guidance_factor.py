"""The factor of a discriminator's gradient against differences of log r, and what torch asks of the guidance ops."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from reference import CLIPPED, FAMILIES, SUPREMUM, log_ratio, slope
from torch.library import opcheck

from refine_ext import _ops_guidance, guided_step
from refine_ext.guidance import PARAMETRIZATIONS, guidance_factor, guided_score

ops = torch.ops.refine_ext
NAN, INF = math.nan, math.inf


def in_domain(name: str, count: int = 40) -> np.ndarray:
    """Outputs from far inside the domain of f* to near its edge, and not where r is clipped to 0."""
    if name in SUPREMUM:
        return SUPREMUM[name] - np.geomspace(1e-6, 30, count)
    return np.linspace(clipped_at(name) + 0.01 if name in CLIPPED else -20.0, 8.0, count)


def clipped_at(name: str) -> float:
    """The output below which r is 0."""
    return -2.0 if name == "pearson_chi2" else -1 / (float(name[6:]) - 1)


def second_derivative(name: str, u):
    return mpmath.diff(lambda v: slope(name, v), u, h=mpmath.mpf(10) ** -30 * u)


@pytest.mark.parametrize("name", FAMILIES)
def test_factor_is_the_derivative_of_the_log_ratio(name, device):
    """Central differences of log (f*)'(h - nu) in extended precision; step chosen by the distance to the edge."""
    t = in_domain(name).astype(np.longdouble)
    edge = np.abs(SUPREMUM[name] - t) if name in SUPREMUM else np.ones_like(t)
    if name in CLIPPED:
        edge = np.minimum(edge, t - clipped_at(name))
    d = 1e-5 * np.minimum(edge, 1)
    want = (log_ratio(name, t + d) - log_ratio(name, t - d)) / (2 * d)
    shift = 0.75
    h = torch.tensor((t + shift).astype(np.float64), device=device)
    got = guidance_factor(h, divergence=name, shift=shift)
    assert got.dtype == torch.float64 and got.shape == h.shape
    # The differences are off by d^2/6 of the third derivative, some 1e-10; near the edge h - nu has lost digits.
    lost = np.asarray(2.0**-52 * (np.abs(t) + shift) / edge, dtype=np.float64)
    np.testing.assert_allclose(got.cpu(), want.astype(np.float64), rtol=1e-8 + 10 * lost.max(), atol=1e-12)
    each = torch.linspace(0.2, 0.9, len(t), dtype=torch.float64)
    moved = guidance_factor(h - shift + each, divergence=name, shift=each)
    np.testing.assert_allclose(moved.cpu(), got.cpu(), rtol=1e-8 + 10 * lost.max())


@pytest.mark.parametrize("name", FAMILIES)
def test_flow_factor_is_u_times_the_second_derivative(name, device):
    """kappa = u f''(u) at u = 1/r, f'' by differences of f' in 120 digits."""
    log_r = np.linspace(-6, 6, 9)
    want = [float(u * second_derivative(name, u)) for u in (mpmath.exp(-mpmath.mpf(x)) for x in log_r)]
    got = guidance_factor(torch.tensor(log_r), divergence=name, kind="logit", flow=True)
    np.testing.assert_allclose(got.cpu(), want, rtol=1e-11)
    # From an output of the dual, r is (f*)' of it.
    outputs = [float(slope(name, mpmath.exp(mpmath.mpf(x)))) for x in log_r]
    got = guidance_factor(torch.tensor(outputs, dtype=torch.float64), divergence=name, flow=True)
    # What rounding h costs grows like the factor where h comes near to the edge of the domain.
    assert (np.abs(got.cpu().numpy() - want) <= np.array(want) * (1e-9 + 2.0**-51 * np.array(want))).all()


def test_flow_factors_of_the_literature(device):
    """Ansari et al.: KL 1, JS r/(1 + r)."""
    log_r = torch.linspace(-700, 700, 29, dtype=torch.float64)
    assert torch.equal(guidance_factor(log_r, kind="logit", flow=True), torch.ones_like(log_r))
    got = guidance_factor(log_r, kind="logit", divergence="jensen_shannon", flow=True)
    torch.testing.assert_close(got, log_r.sigmoid(), rtol=1e-14, atol=0)


def test_a_logit_has_no_factor_of_its_own(device):
    h = torch.tensor([-900.0, 0.0, 1e30, INF, -INF])
    assert torch.equal(guidance_factor(h, kind="logit", divergence="gan"), torch.ones(5, dtype=torch.float64))
    assert guidance_factor(torch.tensor([NAN]), kind="logit").isnan().all()


@pytest.mark.parametrize("kind", ["logit", "variational"])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_scales_and_limits(name, kind, device):
    h = torch.linspace(-3, 2, 6, dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.1, 0.5, 1.0, 5.0, 80.0], dtype=torch.float64)
    alpha = torch.tensor([1.0, 0.9, 0.5, 0.25, 1.0, 1.0], dtype=torch.float64)
    weight = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    c = 1.0  # of KL as of a logit
    scale = {"score": 1.0, "noise": -sigma, "denoised": sigma**2 / alpha, "velocity": -sigma / alpha}[name]
    inside = (sigma / alpha >= 0.1) & (sigma / alpha <= 5.0)
    want = torch.where(inside, weight * scale * c, 0.0)
    options = {"kind": kind, "parametrization": name, "sigma_min": 0.1, "sigma_max": 5.0}
    got = guidance_factor(h, weight=weight, sigma=sigma, alpha=alpha, **options)
    torch.testing.assert_close(got, want, rtol=1e-15, atol=0)
    assert (got[~inside] == 0).all() and inside.sum() == 4  # the limits themselves are inside
    # Tensors of any floating dtype, and numbers.
    one = guidance_factor(h[2:3].float(), weight=2.0, sigma=0.5, alpha=0.5, **options)
    assert torch.equal(one, got[2:3])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        exact = [t[2:4].to(dtype) for t in (weight, sigma, alpha)]
        assert torch.equal(
            guidance_factor(h[2:4].to(dtype), weight=exact[0], sigma=exact[1], alpha=exact[2], **options), got[2:4]
        )
    assert torch.equal(
        guidance_factor(h, weight=weight[2], sigma=sigma[2], alpha=alpha[2:3], **options)[:3], got[2].expand(3)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_does_not_depend_on_its_batch(name, device):
    """Bit for bit, at any place of any batch."""
    h = torch.tensor(in_domain(name, 19))
    weight, sigma, shift = torch.rand(19), torch.rand(19, dtype=torch.float64), torch.rand(19).half()
    for flow in (False, True):
        options = {"divergence": name, "parametrization": "velocity", "flow": flow, "sigma_min": 0.2}
        want = guidance_factor(h, shift=shift, weight=weight, sigma=sigma, **options)
        for size in (1, 3, 8):
            parts = zip(*(t.split(size) for t in (h, shift, weight, sigma)), strict=True)
            got = [guidance_factor(a, shift=b, weight=c, sigma=d, **options) for a, b, c, d in parts]
            assert torch.equal(torch.cat(got).nan_to_num(9.0), want.nan_to_num(9.0))


def test_half_values_are_read_as_they_are(device):
    """Every finite float16 and bfloat16, as the weight of a factor of one."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[values.isfinite()]
        got = guidance_factor(torch.zeros(len(values), dtype=dtype), weight=values)
        assert torch.equal(got, values.double())


def test_zero_whatever_the_output_is(device):
    """Outside the levels, without a weight: exactly zero, though h is NaN, infinite or outside the domain of f*."""
    h = torch.tensor([NAN, INF, -INF, 5.0], dtype=torch.float64)
    for name in ("gan", "pearson_chi2", "jeffreys"):
        assert (guidance_factor(h, divergence=name, weight=0.0) == 0).all()
        assert (guidance_factor(h, divergence=name, sigma=9.0, sigma_max=8.0) == 0).all()
    # NaN in, NaN out: the level's too.
    assert guidance_factor(h[:1], divergence="gan").isnan().all()
    assert guidance_factor(torch.tensor([1.0]), divergence="gan").isnan().all()  # beyond sup dom f*
    sigma = torch.tensor([NAN], dtype=torch.float64)
    assert guidance_factor(torch.zeros(1), kind="logit", sigma=sigma, parametrization="noise").isnan().all()
    # Where r is clipped to zero it does not move with h.
    assert (guidance_factor(torch.tensor([-2.0, -5.0]), divergence="pearson_chi2") == 0).all()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda h: guidance_factor(h, divergence="kl2"), ValueError, "divergence must be one of"),
        (lambda h: guidance_factor(h, kind="ratio"), ValueError, "kind must be one of variational, logit, got 'ratio'"),
        (
            lambda h: guidance_factor(h, parametrization="eps"),
            ValueError,
            "parametrization must be one of score, noise",
        ),
        (
            lambda h: guidance_factor(h, parametrization="noise"),
            ValueError,
            "sigma is needed for every parametrization",
        ),
        (
            lambda h: guidance_factor(h, weight=torch.ones(3)),
            ValueError,
            r"weight must hold one value or 2, .*got shape \[3\]",
        ),
        (lambda h: guidance_factor(h, sigma=torch.ones(2, 2)), ValueError, "sigma must hold one value or 2"),
        (lambda h: guidance_factor(h, alpha="1"), TypeError, "alpha must be a number or a tensor, got str"),
        (lambda h: guidance_factor(h, shift=None), TypeError, "shift must be a number or a tensor, got NoneType"),
        (lambda h: guidance_factor(h, weight=torch.ones(2, dtype=torch.int64)), TypeError, "weight must be float64"),
        (lambda h: guidance_factor(h.long()), TypeError, "h must be float64, float32, float16 or bfloat16"),
        (lambda h: guidance_factor(0.5), TypeError, "h must be a torch.Tensor, got float"),
    ],
)
def test_errors(call, error, text, device):
    with pytest.raises(error, match=text) as caught:
        call(torch.zeros(2))
    assert str(caught.value).startswith("guidance_factor: ")


def test_empty(device):
    assert guidance_factor(torch.zeros(0), kind="logit").shape == (0,)
    assert guided_score(torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 3)).shape == (0, 3)


# ---- gradients


def leaves(*shapes, positive=False):
    return [
        (
            torch.rand(shape, dtype=torch.float64) + 0.1 if positive else torch.randn(shape, dtype=torch.float64)
        ).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("shared", ["each", "row", "vector"])
def test_gradients_of_a_step(shared, noisy, device):
    x, u, v = leaves((3, 2, 2), (3, 2, 2), (3, 2, 2))
    columns = 4 if noisy else 3
    (table,) = leaves({"each": (3, columns), "row": (1, columns), "vector": (columns,)}[shared])
    (factor,) = leaves((3,))

    def call(x, u, v, table, factor):
        return guided_step(x, [u, v], table, factor=factor, seed=3, step=1)

    assert torch.autograd.gradcheck(call, (x, u, v, table, factor))
    assert torch.autograd.gradgradcheck(call, (x, u, v, table, factor))


def test_gradients_of_a_step_with_numbers(device):
    x, u = leaves((4,), (4,))

    def call(x, u):
        return guided_step(x, [u], [0.5, -2.0, 0.3], seed=3)

    assert torch.autograd.gradcheck(call, (x, u))
    assert torch.autograd.gradgradcheck(call, (x, u))
    (gradient,) = torch.autograd.grad(guided_step(x, [u], [0.0, 2.0]).sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_gradients_keep_the_dtypes(device):
    x, u = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5).bfloat16().requires_grad_()
    got = torch.autograd.grad(guided_step(x, [u], [0.5, 0.25]).sum(), (x, u))
    assert got[0].dtype == torch.float32 and got[1].dtype == torch.bfloat16
    assert (got[0] == 0.5).all() and (got[1] == 0.25).all()


def test_a_gradient_that_is_left_out_spoils_nothing(device):
    """NaN in the gradient of a sample without guidance reaches no derivative of h, weight or prediction."""
    prediction, gradient = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
    gradient[1] = NAN
    h, weight = torch.tensor([0.5, NAN], requires_grad=True), torch.tensor([1.0, 1.0], requires_grad=True)
    sigma = torch.tensor([1.0, 9.0])
    got = guided_score(prediction, h, gradient, divergence="jeffreys", weight=weight, sigma=sigma, sigma_max=5.0)
    for derivative in torch.autograd.grad(got.sum(), (prediction, h, weight)):
        assert derivative.isfinite().all()


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("kind", ["variational", "logit"])
@pytest.mark.parametrize(
    "name", ["kl", "reverse_kl", "jensen_shannon", "gan", "pearson_chi2", "jeffreys", "alpha:0.3", "alpha:3"]
)
def test_gradients_of_a_factor(name, kind, flow, device):
    t = {"reverse_kl": -1.0, "gan": -1.0, "alpha:3": 1.0}.get(name, 0.2)
    h = (torch.linspace(-0.3, 0.3, 4, dtype=torch.float64) + t).requires_grad_()
    weight = torch.linspace(0.5, 2.0, 4, dtype=torch.float64).requires_grad_()
    sigma = torch.tensor([0.5, 1.0, 2.0, 9.0], dtype=torch.float64)

    def call(h, weight):
        return guidance_factor(
            h,
            divergence=name,
            kind=kind,
            flow=flow,
            weight=weight,
            shift=0.1,
            sigma=sigma,
            parametrization="denoised",
            sigma_max=5.0,
        )

    assert torch.autograd.gradcheck(call, (h, weight))
    assert torch.autograd.gradgradcheck(call, (h, weight))
    one = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(call(h, one).sum(), one)
    torch.testing.assert_close(gradient, call(h, 1.0).sum().detach(), rtol=1e-12, atol=1e-12)


# ---- registrations


def test_opcheck():
    x, u, v = leaves((3, 5), (3, 5), (3, 5))
    (table, noisy_row), (factor,) = leaves((3, 3), (3,)), leaves((3,))
    seeds = torch.tensor([1, 2, 3])
    opcheck(ops.guided_step.default, (x, [u, v], table, [], factor, None, 0, 0, False))
    opcheck(ops.guided_step.default, (x, [u], noisy_row, [], None, seeds, 0, 5, True))
    opcheck(ops.guided_step.default, (x, [u], None, [1.0, 2.0, 0.5], None, None, 7, 5, True))
    plain = (x.detach(), [u.detach()], None, [1.0, 2.0, 0.5], None, None, 7, 5, True)
    opcheck(ops.guided_step_out.default, plain, {"out": torch.empty(3, 5, dtype=torch.float64)})
    h, weight = leaves((3,), (3,))
    for logit, flow, parametrization in ((False, False, 0), (True, True, 2)):
        values = (h, None, weight, None, None, [0.0, 1.0, 0.5, 1.0, 0.0, INF])
        opcheck(ops.guidance_factor.default, (*values, 0, 0.0, logit, flow, parametrization))


@pytest.mark.kernels("cpu", "cuda")
def test_vmap_is_a_loop(device):
    x, u, factor = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.rand(4, 3, dtype=torch.float64)
    tables = torch.rand(4, 3, 3, dtype=torch.float64)
    for call in (
        lambda x, u, table, f: guided_step(x, [u], table[:, :2], factor=f),
        lambda x, u, table, f: guided_step(x, [u], table[0, :2]),
        lambda x, u, table, f: guided_step(x, [u], [0.5, 0.25], factor=f),
        lambda x, u, table, f: guided_step(x, [u], table, factor=f, seed=3, step=2),
        lambda x, u, table, f: guidance_factor(f, divergence="jeffreys", weight=table[:, 0], shift=table[0, 1]),
    ):
        loop = torch.stack([call(*arguments) for arguments in zip(x, u, tables, factor, strict=True)])
        assert torch.equal(torch.func.vmap(call)(x, u, tables, factor), loop)
        shared = torch.stack([call(one, u[0], tables[0], factor[0]) for one in x])
        batched = torch.func.vmap(call, in_dims=(0, None, None, None))(x, u[0], tables[0], factor[0])
        assert torch.equal(batched.expand_as(shared), shared)


def test_a_compiled_loop_of_steps_is_one_graph():
    """The rows of a table and the number of the step: two graphs, one for the first step and one for any."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def sample(x, u, h, table, seeds, index):
        row = table[index]
        factor = guidance_factor(h, divergence="gan", sigma=row[0], parametrization="noise")
        x = guided_step(x, [u], row, factor=factor, seed=seeds, step=index)
        return guided_step(x, [u], [0.5, 0.5, 0.1], seed=7, step=index)

    x, u, h = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([-1.0, -2.0, -0.5])
    table, seeds = torch.rand(20, 3, dtype=torch.float64), torch.tensor([4, 5, 6])
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for index in range(12):
        got = sample(x, u, h, table, seeds, index)
        assert torch.equal(got, sample._torchdynamo_orig_callable(x, u, h, table, seeds, index))
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]


def test_compiled_in_place():
    @torch.compile(fullgraph=True)
    def step(x, u):
        state = x * 1
        guided_step(state, [u], [0.5, 0.25, 0.1], seed=3, out=state)
        return state * 2

    x, u = torch.randn(3, 5), torch.randn(3, 5)
    kept = x.clone()
    torch.testing.assert_close(step(x, u), 2 * guided_step(x, [u], [0.5, 0.25, 0.1], seed=3))
    assert torch.equal(x, kept)


def test_parametrizations_are_the_kernels():
    """One list, in the order of csrc/math/guidance_problem.h: the kernel refuses the next number."""
    h = torch.zeros(1)
    values = (h, None, None, None, None, [0.0, 1.0, 1.0, 1.0, 0.0, INF], 0, 0.0, True, False)
    for number in range(len(_ops_guidance.PARAMETRIZATIONS)):
        ops.guidance_factor(*values, number)
    with pytest.raises(RuntimeError, match="unknown parametrization code 4"):
        ops.guidance_factor(*values, len(_ops_guidance.PARAMETRIZATIONS))
