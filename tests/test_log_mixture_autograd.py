"""Gradients of both orders of the log-mixture ops, and what torch's machinery makes of them."""

from __future__ import annotations

import math

import log_mixture_reference as reference
import pytest
import torch
from log_mixture_reference import KINDS, problem

from refine_ext import _ops_log_mixture as registered

ops = torch.ops.refine_ext


def leaves(p, wanted=15):
    """The problem with its first four tensors as leaves, those that `wanted` names requiring a gradient."""
    made = [
        None if t is None else t.detach().clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(p[:4])
    ]
    return p._replace(**dict(zip(reference.NAMES, made, strict=True)))


def tracked(p):
    return [t for t in p[:4] if t is not None and t.requires_grad]


def finite(p):
    """Log-weights that a finite difference can move."""
    return p._replace(log_weights=None if p.log_weights is None else p.log_weights.nan_to_num(neginf=-1.0))


def outputs(p, mean):
    def call(*tensors):
        parts = iter(tensors)
        full = [next(parts) if t is not None and t.requires_grad else t for t in p[:4]]
        value, center, _, _ = ops.log_mixture(*full, p.exclude, mean, False)
        return (value, center) if mean else value

    return call


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, mean, device):
    for weights, exclude, wanted in ((False, False, 15), (True, True, 15), (True, False, 5), (False, True, 1)):
        p = leaves(finite(problem(5, 4, 2, kind, weights=weights, exclude=exclude)), wanted)
        assert torch.autograd.gradcheck(outputs(p, mean), tracked(p))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradgradcheck(kind, mean, device):
    for weights, exclude, wanted in ((True, True, 15), (False, False, 3), (True, False, 12)):
        p = leaves(finite(problem(4, 3, 2, kind, weights=weights, exclude=exclude)), wanted)
        assert torch.autograd.gradgradcheck(outputs(p, mean), tracked(p))


def test_gradient_is_that_of_the_reference(device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        p = leaves(problem(40, 30, 7, "per_dimension", dtype, weights=True, exclude=True))
        value = ops.log_mixture(*p, False, False)[0]
        grad = torch.randn(40, dtype=torch.float64)
        got = torch.autograd.grad(value, tracked(p), grad)
        want = reference.gradients(p.reference, grad, p.scale)
        for name, g in zip(reference.NAMES, got, strict=True):
            want[name].check(g, name)


@pytest.mark.parametrize("kind", KINDS)
def test_second_order_in_float32(kind, device):
    """Hessian products and gradients of the mean, of every choice of inputs, against float64's."""
    for wanted in (1, 2, 4, 8, 5, 11, 15):
        results = []
        for dtype in (torch.float32, torch.float64):
            p = problem(20, 15, 3, kind, torch.float32, weights=True, exclude=True)
            p = leaves(p._replace(**{n: t.to(dtype) for n, t in zip(reference.NAMES, p[:4], strict=True)}), wanted)
            g = torch.Generator().manual_seed(1)
            value, mean, *_ = ops.log_mixture(*p, True, False)

            def drawn(t, g=g):
                return torch.randn(t.shape, generator=g, dtype=torch.float64, device="cpu").to(t)

            first = torch.autograd.grad(
                (value * drawn(value)).sum() + (mean * drawn(mean)).sum(), tracked(p), create_graph=True
            )
            product = sum((f * drawn(f)).sum() for f in first)
            results.append((*first, *torch.autograd.grad(product, tracked(p))))
        for got, want in zip(*results, strict=True):
            assert got.dtype == torch.float32
            # A few hundred roundings, of numbers as large as the largest of the tensor.
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=3e-5 * float(want.detach().abs().max()))


def test_blocks_of_rows(monkeypatch, device):
    """However many rows second derivatives take at once, one at least."""
    p = problem(13, 6, 3, "per_center", weights=True, exclude=True)
    results = []
    for elements in (1, 50, 1 << 22):
        monkeypatch.setattr(registered, "_BLOCK_ELEMENTS", elements)
        q = leaves(finite(p))
        value, mean, *_ = ops.log_mixture(*q, True, False)
        first = torch.autograd.grad(value.square().sum() + mean.square().sum(), tracked(q), create_graph=True)
        results.append((*first, *torch.autograd.grad(sum(f.square().sum() for f in first), tracked(q))))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_no_rows(device):
    p = leaves(problem(0, 4, 2, "per_center"))
    value, mean, *_ = ops.log_mixture(p.x, p.centers, p.scale, None, None, True, False)
    inputs = [p.x, p.centers, p.scale]
    first = torch.autograd.grad(value.sum() + mean.sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(f.square().sum() for f in first), inputs)
    for g in (*first, *second):
        assert (g == 0).all()


def test_rows_without_centers(device):
    """Value -inf is constant: a loss that leaves such rows out has the gradients of the other rows."""
    p = leaves(problem(4, 1, 2, "one")._replace(exclude=torch.tensor([0, -1, 0, -1])), 7)
    value = ops.log_mixture(*p, False, False)[0]
    assert (value[::2] == -math.inf).all()
    first = torch.autograd.grad(value[1::2].sum(), tracked(p), create_graph=True)
    second = torch.autograd.grad(sum(f.square().sum() for f in first), tracked(p))
    for g in (*first, *second):
        assert g.isfinite().all() and (g != 0).any()
    assert (first[0][::2] == 0).all() and (second[0][::2] == 0).all()


# ---- torch's machinery


@pytest.mark.parametrize("kind", ["one", "per_dimension"])
def test_opcheck(kind, device):
    every = kind == "one"
    p = leaves(problem(4, 3, 2, kind, torch.float32 if every else torch.float64, weights=every, exclude=every))
    torch.library.opcheck(ops.log_mixture.default, (*p, every, every))
    value = ops.log_mixture(*p, False, False)[0].detach()
    grad = torch.randn(4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.log_mixture_backward.default, (grad, value, *p, 15 if every else 1))


def test_vmap(device):
    p = problem(12, 5, 3, "one", torch.float32, weights=True)
    x, exclude = p.x.view(3, 4, 3), torch.randint(-1, 5, (3, 4))
    scales, centers = torch.rand(3) + 0.5, torch.randn(3, 5, 3)

    def shared(x, exclude):
        return ops.log_mixture(x, p.centers, p.scale, p.log_weights, exclude, True, True)

    def own(x, centers, scale):
        return ops.log_mixture(x, centers, scale, None, None, True, False)[:2]

    def slope(x, centers, scale):
        value = ops.log_mixture(x, centers, scale, None, None, False, False)[0]
        return ops.log_mixture_backward(torch.ones_like(value), value, x, centers, scale, None, None, 7)[:3]

    for call, arguments in ((shared, (x, exclude)), (own, (x, centers, scales)), (slope, (x, centers, scales))):
        got = torch.vmap(call)(*arguments)
        for i in range(3):
            for a, b in zip(got, call(*(t[i] for t in arguments)), strict=True):
                torch.testing.assert_close(a[i], b)
    got = torch.vmap(lambda e: shared(p.x, e)[0])(torch.tensor([[0] * 12, [-1] * 12]))
    torch.testing.assert_close(got[1], ops.log_mixture(*p, False, False)[0])


def test_autocast(device):
    p = problem(6, 5, 3, "one", torch.float32)
    want = ops.log_mixture(*p, True, True)
    with torch.autocast(device.type, torch.bfloat16):
        got = ops.log_mixture(*p, True, True)
        half = ops.log_mixture(p.x.bfloat16(), p.centers.bfloat16(), *p[2:], True, True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert half[0].dtype == torch.float64 and half[1].dtype == torch.float32


@pytest.mark.kernels("cpu", "cuda")
@pytest.mark.parametrize("mean", [False, True])
def test_compile(mean, device, kernels):
    def loss(x, centers, scale, log_weights):
        value, center, *_ = ops.log_mixture(x, centers, scale, log_weights, None, mean, False)
        return value.mean() + center.square().sum()

    p = leaves(problem(20, 15, 3, "per_center", torch.float32, weights=True))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*p[:4])
    got = torch.autograd.grad(compiled, tracked(p))
    plain = loss(*p[:4])
    torch.testing.assert_close(compiled, plain)
    for a, b in zip(got, torch.autograd.grad(plain, tracked(p)), strict=True):
        torch.testing.assert_close(a, b)
