"""torch.func's transforms of the functions that registered ops are called by, against autograd's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import refine_ext as rx

_CENTERS = torch.linspace(-2, 2, 15, dtype=torch.float64).reshape(5, 3).sin()
_POINTS = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3).cos()


def _mixture(x: Tensor) -> Tensor:
    return rx.log_mixture(x, _CENTERS, 0.7).sin().sum()


def _mixture_and_mean(x: Tensor) -> Tensor:
    value, mean = rx.log_mixture(x, _CENTERS, 0.7, return_mean=True)
    return value.sum() + (mean**2).sum()


def _mixture_of_centers(centers: Tensor) -> Tensor:
    scale = centers[:, 0].exp()
    return rx.log_mixture(_POINTS, centers, scale, weights=centers[:, 1].exp()).sin().sum()


# Of one tensor [4, 3], a number: each reaches another op, or its gradients by other arguments.
FUNCTIONS = {
    "variational_bound": lambda h: rx.variational_bound(h[0], h[1:], "jensen_shannon", kind="logit"),
    "variational_bound loose": lambda h: rx.variational_bound(h[0], h[1:], "kl", tight=False),
    "logistic_loss": lambda h: rx.logistic_loss(h[:2], h[2:]),
    "log-ratio": lambda h: rx.density_ratio(h, "squared_hellinger", kind="logit", dim=-1).log_ratio.sin().sum(),
    "shift": lambda h: rx.density_ratio(h, "kl").shift.sum(),
    "log_mixture": _mixture,
    "log_mixture, mean": _mixture_and_mean,
    "log_mixture, centers": _mixture_of_centers,
    "gaussian_kl": lambda x: rx.gaussian_kl(x[:2], x[2:], x[2:].sin(), x[:2].cos()).sin().sum(),
    "importance_log_weights": lambda x: rx.importance_log_weights(x[None, :2], x[2:], x[:2].cos()).sin().sum(),
}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, dtype=torch.float64)


def autograd(function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


# The same kernels on the same numbers; sums over examples may take another order.
def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_gradients(function, x):
    expected = autograd(function, x)
    assert float(expected.abs().max()) > 1e-3
    gradient, value = torch.func.grad_and_value(function)(x)
    assert_same(gradient, expected)
    assert_same(value, function(x))
    _, pullback = torch.func.vjp(function, x)
    assert_same(pullback(torch.tensor(2.0, dtype=torch.float64))[0], 2 * expected)


def test_second_derivatives(function, x):
    expected = hessian(function, x)
    assert float(expected.abs().max()) > 1e-3
    assert_same(torch.func.jacrev(torch.func.grad(function))(x), expected)


def test_jacobians(x):
    def several(x: Tensor) -> Tensor:
        return torch.cat([rx.log_mixture(x, _CENTERS, 0.7), rx.density_ratio(x[0], "gan", kind="logit").log_ratio])

    assert_same(torch.func.jacrev(several)(x), jacobian(several, x))


def test_gradients_of_examples(function, x):
    batch = torch.stack([x, x.flip(0), x.sin()])
    expected = torch.stack([autograd(function, each) for each in batch])
    assert_same(torch.func.vmap(torch.func.grad(function))(batch), expected)
    # The other way round: the gradient passes the rule of vmap.
    assert_same(torch.func.grad(lambda b: torch.func.vmap(function)(b).sum())(batch), expected)


def test_what_a_transform_does_not_differentiate(function, x):
    constant = function(x)
    scaled = torch.func.grad(lambda scale: scale * function(x))
    assert_same(scaled(torch.tensor(3.0, dtype=torch.float64)), constant)
    # Nor is the graph outside lost.
    assert_same(
        autograd(lambda x: scaled(torch.tensor(3.0, dtype=torch.float64)) + function(x), x), autograd(function, x)
    )


def test_training_of_a_functional_module():
    network, loss = torch.nn.Linear(3, 1), rx.logistic_loss
    real, fake = torch.randn(20, 3), torch.randn(20, 3) + 1
    parameters = dict(network.named_parameters())

    def objective(parameters: dict[str, Tensor]) -> Tensor:
        return loss(*(torch.func.functional_call(network, parameters, (each,)) for each in (real, fake)))

    gradient = torch.func.grad(objective)(parameters)
    loss(network(real), network(fake)).backward()
    for name, parameter in network.named_parameters():
        # Float32 sums of 20 terms.
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_comes_before_the_gradient(dtype):
    """What the op is given under autocast is float32, and its gradient is not rounded on the way."""
    network = torch.nn.Linear(3, 1)
    real, fake = torch.randn(20, 3), torch.randn(20, 3)
    with torch.autocast("cpu", dtype=dtype):
        h_real, h_fake = network(real), network(fake)
        loss = rx.variational_bound(h_real, h_fake, "jensen_shannon", kind="logit")
    assert h_fake.dtype == dtype and loss.dtype == torch.float32
    leaves = [h.detach().float().requires_grad_() for h in (h_real, h_fake)]
    expected = torch.autograd.grad(rx.variational_bound(*leaves, "jensen_shannon", kind="logit"), leaves)
    for got, each in zip(torch.autograd.grad(loss, (h_real, h_fake)), expected, strict=True):
        torch.testing.assert_close(got, each.to(dtype), rtol=0, atol=0)
