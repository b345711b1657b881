"""The gradients of Rademacher sums, and what torch is told of the ops."""

from __future__ import annotations

import pytest
import rademacher_reference as reference
import torch
from rademacher_reference import LARGEST, MAGNITUDE, NORM

ops = torch.ops.refine_ext
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SUPREMA = (LARGEST, MAGNITUDE, NORM)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(dtype, device):
    for n, m, draws in ((1, 1, 1), (130, 7, 50), (300, 700, 600)):
        x = torch.empty(n, m, dtype=dtype)
        index = torch.randint(-m, m, (draws,))
        grad = torch.randn(draws, dtype=torch.float64)
        got = ops.rademacher_backward(grad, index, x, 5, 7)
        column = torch.where(index < 0, -1 - index, index)
        sign = torch.from_numpy(reference.signs(n, draws, 5, 7)).to(grad)
        each = torch.where(index < 0, -grad, grad) / n
        want = torch.zeros(n, m, dtype=torch.float64).index_add_(1, column, sign.T * each)
        assert got.dtype == dtype and got.shape == x.shape
        # `draws` additions of float64, then one rounding to the storage type (float16: or half its least number)
        rounding = {torch.float64: 0.0, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[
            dtype
        ]
        limit = 1e-15 * grad.abs().sum() / n + 1.001 * rounding * want.abs() + 2.0**-25 * (dtype == torch.float16)
        assert ((got.double() - want).abs() <= limit).all()


@pytest.mark.parametrize("supremum", SUPREMA)
def test_gradcheck(supremum):
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)

    def run(outputs):
        return ops.rademacher_suprema(outputs, 12, 0, 3, supremum, 3)[0]

    assert torch.autograd.gradcheck(run, x)
    if supremum != NORM:
        assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("supremum", SUPREMA)
def test_gradient_of_autograd(supremum, device):
    x = torch.randn(300, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(80, dtype=torch.float64)
    (got,) = torch.autograd.grad((ops.rademacher_suprema(x, 80, 0, 3, supremum, 3)[0] * weight).sum(), x)
    sums = torch.from_numpy(reference.signs(300, 80, 0, 3)).to(x) @ x
    each = sums.amax(1) if supremum == LARGEST else sums.abs().amax(1) if supremum == MAGNITUDE else sums.norm(dim=1)
    (want,) = torch.autograd.grad((each / 300 * weight).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


# ---- What torch is told of the ops


@pytest.mark.parametrize("supremum", SUPREMA)
def test_opcheck(supremum, device):
    x = torch.randn(20, 6, requires_grad=True)
    torch.library.opcheck(ops.rademacher_suprema.default, (x, 7, 1, 2, supremum, 3))


def test_opcheck_of_the_others(device):
    x = torch.randn(20, 6)
    torch.library.opcheck(ops.rademacher_sums.default, (torch.zeros(7, 6, dtype=torch.float64), x, 1024, 1, 2))
    grad = torch.randn(7, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.rademacher_backward.default, (grad, torch.randint(-6, 6, (7,)), x, 1, 2))
    for normal in (False, True):
        torch.library.opcheck(ops.multipliers.default, (x, 20, 7, 1024, 1, 2, normal))


def test_vmap():
    x = torch.randn(3, 40, 5)
    got = torch.vmap(lambda each: ops.rademacher_suprema(each, 9, 0, 1, MAGNITUDE, 3))(x)
    for i in range(3):
        want = ops.rademacher_suprema(x[i], 9, 0, 1, MAGNITUDE, 3)
        assert all(torch.equal(part[i], w) for part, w in zip(got, want, strict=True))
    index, grad = torch.randint(-5, 5, (3, 9)), torch.randn(9, dtype=torch.float64)
    got = torch.vmap(lambda i, each: ops.rademacher_backward(grad, i, each, 0, 1))(index, x)
    for i in range(3):
        assert torch.equal(got[i], ops.rademacher_backward(grad, index[i], x[i], 0, 1))


def test_compile():
    def penalty(outputs):
        return ops.rademacher_suprema(outputs, 16, 0, 1, MAGNITUDE, 3)[0].mean()

    x = torch.randn(50, 6, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")(x)
    compiled.backward()
    penalty(y).backward()
    assert torch.equal(compiled, penalty(y)) and torch.equal(x.grad, y.grad)
