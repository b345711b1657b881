"""Gradients of density ratios and bounds: numerical first and second derivatives, identities, functional transforms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from reference import CLIPPED, FAMILIES, NAMED, numpy_of, outputs, score_factor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

import refine_ext as rx

pytestmark = pytest.mark.usefixtures("device")
every_family = pytest.mark.parametrize("name", FAMILIES)


def inputs(name: str, *shape: int) -> torch.Tensor:
    h = outputs(name, shape)
    if name in CLIPPED:
        # Differences must not step over the clipping point, nor come near it, where log r is vertical.
        h = 0.1 * h.abs() + 0.5
    if name == "alpha:0.999":
        h = torch.randn(shape, dtype=torch.float64)  # r = (1 − h/1000)^−1000 would overflow near its edge
    return h.requires_grad_()


# The steep families near their edge: differences of 1e-6 there are off by 1e-6 times a large second derivative.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


@every_family
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_density_ratio(name, weighted, given):
    h = inputs(name, 7)
    w = torch.rand(7, dtype=torch.float64) + 0.1 if weighted else None
    shift = 0.2 if given else None

    def everything(h):
        r = rx.density_ratio(h, name, base_weights=w, shift=shift)
        return r.log_ratio, r.ratio, r.log_normalizer if given else r.shift

    assert gradcheck(everything, (h,), **TOLERANCE)
    assert gradgradcheck(everything, (h,), **TOLERANCE)


@pytest.mark.parametrize("name", [*NAMED, "alpha:0.3", "alpha:3"])
def test_groups_and_layouts(name):
    h = inputs(name, 3, 4)
    w = torch.rand(3, dtype=torch.float64) + 0.1

    def everything(h):
        r = rx.density_ratio(h.t(), name, dim=1, base_weights=w)
        return r.log_ratio, r.shift

    assert gradcheck(everything, (h,), **TOLERANCE)
    assert gradgradcheck(everything, (h,), **TOLERANCE)


@every_family
@pytest.mark.parametrize("tight", [False, True])
def test_variational_bound(name, tight):
    real, fake = inputs(name, 5), inputs(name, 6)
    assert gradcheck(lambda a, b: rx.variational_bound(a, b, name, tight=tight), (real, fake), **TOLERANCE)
    assert gradgradcheck(lambda a, b: rx.variational_bound(a, b, name, tight=tight), (real, fake), **TOLERANCE)


@every_family
@pytest.mark.parametrize("tight", [False, True])
def test_variational_bound_of_logits(name, tight):
    real = torch.randn(5, dtype=torch.float64, requires_grad=True)
    fake = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def bound(a, b):
        return rx.variational_bound(a, b, name, tight=tight, kind="logit")

    assert gradcheck(bound, (real, fake), **TOLERANCE)
    assert gradgradcheck(bound, (real, fake), **TOLERANCE)


def test_logistic_loss():
    real = torch.randn(5, dtype=torch.float64, requires_grad=True)
    fake = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(rx.logistic_loss, (real, fake))
    assert gradgradcheck(rx.logistic_loss, (real, fake))


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_identities(name, dtype):
    """Without differences: rows of the Jacobian from the implicit function theorem, in either precision."""
    eps = 1e-11 if dtype == torch.float64 else 2e-4
    h = outputs(name, 200, dtype).requires_grad_()
    result = rx.density_ratio(h, name)
    c = torch.tensor(score_factor(name, numpy_of(result.log_ratio)).astype(np.float64))
    c[result.log_ratio == -math.inf] = 0
    r = result.ratio.detach().double()
    share = (r * c).nan_to_num(0) / (r * c).nansum()
    (of_shift,) = torch.autograd.grad(result.shift, h, retain_graph=True)
    torch.testing.assert_close(of_shift.double(), share, rtol=eps, atol=eps / 100)
    # The mean ratio is one whatever h: the normaliser does not move, and an offset of h moves no ratio.
    assert float(of_shift.double().sum()) == pytest.approx(1, abs=eps)
    kept = int(result.log_ratio.argmax())
    (of_one,) = torch.autograd.grad(result.log_ratio[kept], h)
    want = -c[kept] * share
    want[kept] += c[kept]
    torch.testing.assert_close(of_one.double(), want, rtol=eps, atol=eps * float(c[kept]) / 10)
    assert abs(float(of_one.double().sum())) <= eps * float(of_one.double().abs().sum())


@pytest.mark.parametrize("name", CLIPPED)
def test_clipped_samples_pass_nothing_on(name):
    h = torch.tensor([-50.0, -1e30, -math.inf, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    result = rx.density_ratio(h, name)
    assert (result.ratio[:3] == 0).all()
    (of_ratio,) = torch.autograd.grad(result.ratio[3] + result.shift, h, create_graph=True)
    assert (of_ratio[:3] == 0).all() and torch.isfinite(of_ratio).all()
    (second,) = torch.autograd.grad(of_ratio[3], h)
    assert torch.isfinite(second).all()
    (of_weights,) = torch.autograd.grad((rx.density_ratio(h, name).weights ** 2).sum(), h)
    assert torch.isfinite(of_weights).all()


@every_family
def test_excluded_samples_pass_nothing_on(name):
    h = outputs(name, 6).requires_grad_()
    w = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    result = rx.density_ratio(h, name, base_weights=w)
    (gradient,) = torch.autograd.grad(result.shift + result.weights.square().sum(), h)
    assert (gradient[[1, 3]] == 0).all() and (gradient[[0, 2, 4, 5]] != 0).any()
    # Also where such a sample lies outside the domain at the shift of the others, and its own log r is NaN.
    h = torch.tensor([9.0, 0.0, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    result = rx.density_ratio(h, name, base_weights=torch.tensor([0.0, 1.0, 2.0, 1.0]))
    assert result.weights[0] == 0 and float(result.weights.sum()) == pytest.approx(1)
    (gradient,) = torch.autograd.grad(result.shift + result.weights.square().sum(), h)
    assert gradient[0] == 0 and torch.isfinite(gradient).all()
    alone = h.detach()[1:].requires_grad_()
    result = rx.density_ratio(alone, name, base_weights=torch.tensor([1.0, 2.0, 1.0]))
    (want,) = torch.autograd.grad(result.shift + result.weights.square().sum(), alone)
    torch.testing.assert_close(gradient[1:], want)


def test_minus_infinity_among_tracked_outputs():
    for name in FAMILIES:
        h = outputs(name, 6)
        h[2] = -math.inf
        h.requires_grad_()
        result = rx.density_ratio(h, name)
        (gradient,) = torch.autograd.grad(result.shift, h)
        assert torch.isfinite(gradient).all(), name
        assert float(gradient[2]) == 0


def test_statistics_without_a_gradient_have_none():
    """An error for who differentiates them, not a gradient of zero."""
    result = rx.density_ratio(torch.randn(100, dtype=torch.float64, requires_grad=True), "gan")
    assert result.shift.requires_grad and result.weights.requires_grad
    for attribute in ("ess", "max_weight", "khat"):
        assert not getattr(result, attribute).requires_grad
    torch.testing.assert_close(result.ess, 1 / result.weights.detach().square().sum())


def test_log_normalizer_of_a_solved_shift_does_not_move():
    h = torch.randn(8, dtype=torch.float64, requires_grad=True)
    value = rx.density_ratio(h, "jensen_shannon").log_normalizer
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, h)
        torch.testing.assert_close(gradient, torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-10)


def test_what_is_not_differentiable_says_so():
    h = torch.randn(5, requires_grad=True)
    for arguments in ({"output": "ratio"}, {"out": torch.empty(5)}):
        with pytest.raises(ValueError, match=r"density_ratio: out= and output='ratio' are not differentiable"):
            rx.density_ratio(h, **arguments)
        with torch.no_grad():
            rx.density_ratio(h, **arguments)
        rx.density_ratio(h.detach(), **arguments)
    # Weights and a given shift are constants.
    w = torch.rand(5, requires_grad=True)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    result = rx.density_ratio(h, "kl", base_weights=w, shift=shift)
    assert torch.autograd.grad(result.log_ratio.sum(), [w, shift], allow_unused=True) == (None, None)


def test_inference_mode():
    h = torch.randn(5)
    with torch.inference_mode():
        result = rx.density_ratio(h, "gan")
        bound = rx.variational_bound(h, h, "gan")
        assert result.log_ratio.is_inference() and bound.is_inference()
    assert torch.equal(result.log_ratio, rx.density_ratio(h, "gan").log_ratio)


@pytest.mark.parametrize("name", [*NAMED, "alpha:0.3"])
@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
def test_vmap_equals_a_loop(name, in_dim, assert_same):
    h = outputs(name, (3, 4, 5))
    size = h.shape[in_dim]
    for dim in (None, 0, 1):

        def one(h, dim=dim):
            r = rx.density_ratio(h, name, dim=dim)
            return r.log_ratio, r.shift, r.ess, r.weights

        batched = vmap(one, in_dims=in_dim)(h)
        for index in range(size):
            for got, want in zip(batched, one(h.select(in_dim, index)), strict=True):
                assert_same(got[index], want)


@pytest.mark.parametrize("w_dim", [None, 0, 1])
@pytest.mark.parametrize("shift_dim", [None, 0])
@pytest.mark.parametrize("h_dim", [None, 0, 1])
@pytest.mark.parametrize("grouped", [False, True])
def test_vmap_of_weights_and_shifts(h_dim, w_dim, shift_dim, grouped):
    if h_dim is None and w_dim is None and shift_dim is None:
        pytest.skip("nothing to map over")
    # As many groups as examples, so that one could be taken for the other.
    size = 3
    h = torch.randn(*((3, 4) if grouped else (4,)), *((size,) if h_dim is not None else ()), dtype=torch.float64)
    w = torch.rand(4, *((size,) if w_dim is not None else ()), dtype=torch.float64) + 0.1
    h = h if h_dim is None else h.movedim(-1, h_dim)
    w = w if w_dim is None else w.movedim(-1, w_dim)
    shift = torch.linspace(0.1, 1, size, dtype=torch.float64) if shift_dim == 0 else torch.tensor(0.3).double()

    def one(h, w, shift):
        r = rx.density_ratio(h, "kl", dim=-1, base_weights=w, shift=shift)
        return r.log_ratio, r.log_normalizer, r.ess, r.weights

    batched = vmap(one, in_dims=(h_dim, w_dim, shift_dim))(h, w, shift)
    for index in range(size):
        arguments = (
            h if h_dim is None else h.select(h_dim, index),
            w if w_dim is None else w.select(w_dim, index),
            shift if shift_dim is None else shift[index],
        )
        for got, want in zip(batched, one(*arguments), strict=True):
            torch.testing.assert_close(got[index], want, rtol=1e-14, atol=1e-14)


def test_vmap_of_bounds():
    real, fake = torch.randn(3, 5), torch.randn(3, 7)
    for arguments in ({}, {"tight": False}, {"kind": "logit"}, {"kind": "logit", "tight": False}):
        for in_dims in ((0, 0), (0, None), (None, 0)):
            a = real if in_dims[0] == 0 else real[0]
            b = fake if in_dims[1] == 0 else fake[0]
            got = vmap(lambda a, b, arguments=arguments: rx.variational_bound(a, b, "kl", **arguments), in_dims)(a, b)
            want = [
                rx.variational_bound(a[i] if a.dim() > 1 else a, b[i] if b.dim() > 1 else b, "kl", **arguments)
                for i in range(3)
            ]
            torch.testing.assert_close(got, torch.stack(want))
    got = vmap(rx.logistic_loss, in_dims=(0, 0))(real, fake)
    torch.testing.assert_close(got, torch.stack([rx.logistic_loss(a, b) for a, b in zip(real, fake, strict=True)]))


@pytest.mark.parametrize("name", NAMED)
def test_jacobians_and_hessians(name):
    """By torch.autograd.functional, batched with vmap and one row at a time."""
    from torch.autograd.functional import hessian, jacobian

    h, real = inputs(name, 6).detach(), inputs(name, 4).detach()

    def log_ratio(h):
        return rx.density_ratio(h, name).log_ratio

    def bound(h):
        return rx.variational_bound(real, h, name)

    one = jacobian(log_ratio, h)
    torch.testing.assert_close(jacobian(log_ratio, h, vectorize=True), one)
    second = hessian(bound, h)
    torch.testing.assert_close(hessian(bound, h, vectorize=True), second)
    # −r/n differentiated: the Jacobian of the ratios.
    torch.testing.assert_close(second, -log_ratio(h).exp().unsqueeze(1) * one / 6)
    assert float(second.abs().max()) > 0


def test_forward_mode_is_refused():
    """Registered ops drop a tangent silently; that would be a derivative of zero."""
    h = torch.randn(5)
    with pytest.raises(NotImplementedError, match=r"^density_ratio: h has a forward-mode tangent"):
        torch.func.jvp(lambda h: rx.density_ratio(h, "gan").log_ratio, (h,), (torch.ones(5),))
    with pytest.raises(NotImplementedError, match=r"^variational_bound: h_real has a forward-mode tangent"):
        torch.func.jacfwd(lambda h: rx.variational_bound(h, h * 2, "kl"))(h)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(h, torch.ones(5))
        with pytest.raises(NotImplementedError, match=r"^variational_bound: h_fake has a forward-mode"):
            rx.variational_bound(h, dual)
        with pytest.raises(NotImplementedError, match=r"^logistic_loss: logit_real has a forward-mode"):
            rx.logistic_loss(dual, h)
        rx.density_ratio(h)


def test_autocast_computes_in_float32(device):
    network = torch.nn.Linear(3, 1)
    x = torch.randn(50, 3)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        h = network(x).squeeze(-1)
        assert h.dtype == torch.bfloat16
        result = rx.density_ratio(h, "jensen_shannon")
        bound = rx.variational_bound(h, h + 1, "kl")
        logits = rx.variational_bound(h, h, "kl", kind="logit")
        loss = rx.logistic_loss(h, h)
    assert result.log_ratio.dtype == bound.dtype == logits.dtype == loss.dtype == torch.float32
    assert abs(float(result.ratio.double().mean()) - 1) <= 1e-6
    want = rx.density_ratio(h.detach().float(), "jensen_shannon")
    torch.testing.assert_close(result.log_ratio, want.log_ratio, rtol=0, atol=0)
    (bound + loss + result.shift).backward()
    assert network.weight.grad.dtype == torch.float32 and torch.isfinite(network.weight.grad).all()
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        assert rx.density_ratio(h.detach(), "jensen_shannon").log_ratio.dtype == torch.float32


def test_float16_gradients():
    for dtype in (torch.float16, torch.bfloat16):
        h = torch.randn(300).to(dtype).requires_grad_()
        bound = rx.variational_bound(h, h, "gan", kind="logit") + rx.density_ratio(h, "gan").shift
        (gradient,) = torch.autograd.grad(bound, h)
        assert gradient.dtype == dtype
        x = h.detach().double().requires_grad_()
        (want,) = torch.autograd.grad(
            rx.variational_bound(x, x, "gan", kind="logit") + rx.density_ratio(x, "gan").shift, x
        )
        # Two paths meet in h, each rounded to the format before and after.
        torch.testing.assert_close(gradient.double(), want, rtol=8 * torch.finfo(dtype).eps, atol=1e-4)


def test_training_moves_to_the_log_ratio():
    """Maximising the bound over free outputs on two points reaches f'(p/q)."""
    for name in ("kl", "jensen_shannon", "squared_hellinger"):
        logit = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logit], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure(name=name, logit=logit, optimizer=optimizer):
            optimizer.zero_grad()
            real, fake = logit[[0, 1, 1, 1]], logit[[0, 0, 0, 1]]
            loss = -rx.variational_bound(real, fake, name, kind="logit", tight=False)
            loss.backward()
            return loss

        optimizer.step(closure)
        torch.testing.assert_close(
            logit.detach(), torch.tensor([math.log(1 / 3), math.log(3)], dtype=torch.float64), rtol=1e-5, atol=1e-5
        )
