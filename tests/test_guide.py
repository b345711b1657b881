"""A discriminator's output and gradient at a noise level: in every mode of torch, dtype and parametrisation of time."""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack, nullcontext

import pytest
import torch
from edm_reference import dual_output
from torch import nn

import refine_ext as rx

MODES = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


class Network(nn.Module):
    """A smooth discriminator of vectors, with a class label."""

    def __init__(self, features: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.hidden = nn.Linear(features + 1, 16, dtype=dtype)
        self.last = nn.Linear(16, 1, dtype=dtype)

    def forward(self, x, sigma, label=None):
        h = self.last(torch.tanh(self.hidden(torch.cat([x, sigma[:, None].log()], 1))))
        return h if label is None else h + (x * label).sum(1, keepdim=True)


def closed_form(network: Network, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h and its gradient in x in float64, the derivative written out."""
    w, b = network.hidden.weight.double(), network.hidden.bias.double()
    v, c = network.last.weight.double(), network.last.bias.double()
    t = torch.tanh(torch.cat([x.double(), sigma.double()[:, None].log()], 1) @ w.T + b)
    return (t @ v.T + c)[:, 0].detach(), ((1 - t**2) * v @ w[:, :-1]).detach()


def density(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """log N(x; 1, 1 + sigma^2) - log N(x; 0, 2 + sigma^2) per sample: an exact log-ratio at every level."""
    s = sigma[:, None] ** 2
    return (0.5 * x**2 / (2 + s) - 0.5 * (x - 1) ** 2 / (1 + s) + 0.5 * ((2 + s) / (1 + s)).log()).sum(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("autograd", [False, True])
def test_output_and_gradient_in_every_mode(mode, autograd):
    """Exact in float64; nothing is attached to a graph, nothing is written into the parameters or the caller's x."""
    network = Network(dtype=torch.float64)
    label = torch.randn(5, 3, dtype=torch.float64)
    with MODES[mode]():
        x = torch.randn(5, 3, dtype=torch.float64)
        if autograd and mode == "plain":
            x.requires_grad_()
        given = label.clone()
        result = rx.Guide(network)(x, 0.7, label=given)
    h, gradient = closed_form(network, x.detach(), torch.full((5,), 0.7, dtype=torch.float64))
    h, gradient = h + (x.detach() * label).sum(1), gradient + label
    torch.testing.assert_close(result.h, h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.gradient, gradient, rtol=1e-12, atol=1e-12)
    assert not result.h.requires_grad and not result.gradient.requires_grad
    assert all(p.grad is None for p in network.parameters()) and x.grad is None
    assert x.requires_grad == (autograd and mode == "plain")


@pytest.mark.parametrize("sigma", [0.7, torch.tensor(0.7), torch.full((5,), 0.7), torch.full((5, 1), 0.7).double()])
def test_levels_of_every_shape(sigma):
    network, x = Network(), torch.randn(5, 3)
    want = closed_form(network, x, torch.full((5,), 0.7))
    result = rx.Guide(network)(x, sigma)
    # float32 networks of 16 units: a few dozen roundings of numbers about 1
    torch.testing.assert_close(result.h.double(), want[0], rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(result.gradient.double(), want[1], rtol=1e-5, atol=3e-6)


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("inside", DTYPES)
@pytest.mark.parametrize("state", DTYPES)
def test_dtypes_of_state_and_discriminator(state, inside):
    """The discriminator computes in its own dtype; the gradient comes in one that the update takes beside the state."""
    network, x = Network(dtype=inside), torch.randn(6, 3).to(state)
    guide = rx.Guide(network)
    for alpha in (1.0, 0.5):
        result = guide(x, 0.7, alpha=alpha)
        h, gradient = closed_form(network, x.double() / alpha, torch.full((6,), 0.7 / alpha, dtype=torch.float64))
        # a few roundings of the coarser of the two dtypes, in a network of 16 units with values about 1
        close = {"rtol": 0, "atol": 10 * max(torch.finfo(state).eps, torch.finfo(inside).eps)}
        torch.testing.assert_close(result.h.double(), h, **close)
        torch.testing.assert_close(result.gradient.double(), gradient / alpha, **close)
        assert result.h.dtype == inside
        rx.guided_step(x, [result.gradient], [1.0, 0.1], factor=guide.factor(result.h, 0.7, alpha=alpha))


def test_dtype_can_be_asked_for():
    """A function has no parameters to go by."""
    network = Network()
    x = torch.randn(4, 3, dtype=torch.float64)
    result = rx.Guide(lambda x, sigma: network(x, sigma), dtype=torch.float32)(x, 1.0)
    assert result.h.dtype == result.gradient.dtype == torch.float32
    bound = rx.Guide(network.forward)(x, 1.0)
    torch.testing.assert_close(bound.gradient, result.gradient, rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [0.5, torch.linspace(0.3, 1.0, 4, dtype=torch.float64)])
def test_scaled_states(alpha):
    """h(x / alpha, sigma / alpha), and the gradient in x itself."""
    x, sigma = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0.1, 1.0, 5.0, 0.5]).double()
    factor = torch.as_tensor(alpha).expand(4).double()
    leaf = x.clone().requires_grad_()
    want = density(leaf / factor[:, None], sigma / factor)
    result = rx.Guide(density)(x, sigma, alpha=alpha)
    torch.testing.assert_close(result.h, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.gradient, torch.autograd.grad(want.sum(), leaf)[0], rtol=1e-12, atol=1e-12)


def test_vp_schedule_is_the_published_change_of_variables():
    """Against the formulas as they stand in Kim et al. 2022 and Song et al. 2021, and against each other."""
    schedule = rx.VPSchedule()
    sigma = torch.logspace(-3, 2.1, 50, dtype=torch.float64)
    b0, b1 = 0.1, 20.0
    tau = (-b0 + torch.sqrt(b0**2 + 2 * (b1 - b0) * torch.log(1 + sigma**2))) / (b1 - b0)
    # the published difference cancels by b0 / (b1 tau): 1e-16 / tau
    torch.testing.assert_close(schedule.time(sigma), tau, rtol=1e-9, atol=1e-13)
    mu = torch.exp(-0.25 * tau**2 * (b1 - b0) - 0.5 * tau * b0)
    torch.testing.assert_close(schedule.mu(sigma), mu, rtol=1e-12, atol=0)
    for time in (1e-4, 0.01, 0.5, 1.0):
        at = torch.tensor(schedule.sigma(time), dtype=torch.float64)
        assert schedule.time(at).item() == pytest.approx(time, rel=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_discriminator_of_a_vp_diffusion(alpha):
    """One that takes (mu x, tau) guides as the same one restated for (x, sigma) does."""
    schedule = rx.VPSchedule()

    def vp(state, tau):
        sigma = torch.tensor([schedule.sigma(t) for t in tau.tolist()], dtype=torch.float64)
        return density(state * torch.sqrt(1 + sigma**2)[:, None], sigma)

    x, sigma = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0.1, 1.0, 5.0, 30.0]).double() * alpha
    want = rx.Guide(density)(x, sigma, alpha=alpha)
    guide = rx.Guide(vp, schedule=schedule)
    got = guide(x, sigma, alpha=alpha)
    torch.testing.assert_close(got.h, want.h, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got.gradient, want.gradient, rtol=1e-11, atol=1e-11)
    assert guide.sigma_min == schedule.sigma(0.01) and guide.sigma_max == schedule.sigma(1.0)
    assert not guide.covers(0.04) and guide.covers(0.05) and guide.covers(150.0) and not guide.covers(160.0)


def test_range_weight_and_shift_of_each_level():
    """Numbers, tensors and functions of the noise level; silence outside the range, whatever the output there."""
    h = torch.tensor([0.3, -0.2, math.nan, 1.0], dtype=torch.float64)
    sigma = torch.tensor([0.5, 2.0, 0.01, 200.0], dtype=torch.float64)
    guide = rx.Guide(density, weight=lambda s: 1 + s, shift=torch.log, sigma_min=0.1, sigma_max=100.0)
    factor = guide.factor(h, sigma, weight=torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    torch.testing.assert_close(factor, torch.tensor([1.5, 6.0, 0.0, 0.0]).double(), rtol=1e-14, atol=0)
    torch.testing.assert_close(guide.log_ratio(h, sigma)[:2], (h - sigma.log())[:2], rtol=1e-14, atol=0)
    fixed = rx.Guide(density, weight=torch.tensor([1.0, 2.0, 3.0, 4.0]), shift=0.5)
    torch.testing.assert_close(fixed.factor(h, sigma)[[0, 1, 3]], torch.tensor([1.0, 2.0, 4.0]).double())
    torch.testing.assert_close(fixed.log_ratio(h, sigma)[[0, 1, 3]], h[[0, 1, 3]] - 0.5)


def test_pure_noise_gets_no_guidance():
    """At alpha = 0 the level is infinite: the factor is 0, and the update leaves out whatever the gradient is."""
    guide = rx.Guide(density)
    x = torch.randn(3, 2, dtype=torch.float64)
    alpha = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    result = guide(x, 1.0, alpha=alpha)
    for parametrization in ("score", "noise", "denoised", "velocity"):
        factor = guide.factor(result.h, 1.0, alpha=alpha, parametrization=parametrization)
        moved = rx.guided_step(x, [result.gradient], [1.0, 1.0], factor=factor)
        assert factor[0] == 0 and factor[1:].abs().min() > 0 and moved.isfinite().all()
        assert torch.equal(moved[0], x[0])


@pytest.mark.parametrize("name", ["kl", "jensen_shannon", "squared_hellinger", "alpha:0.3", "jeffreys"])
def test_variational_outputs_say_the_same_log_ratio(name):
    """h = f'(r) + nu of the exact ratio: log r comes back, and factor times gradient is the gradient of log r."""

    def variational(x, sigma):
        return dual_output(name, density(x, sigma)) + 0.25

    x = torch.randn(8, 3, dtype=torch.float64)
    exact = rx.Guide(density)(x, 0.5)
    guide = rx.Guide(variational, kind="variational", divergence=name, shift=0.25)
    result = guide(x, 0.5)
    # log r is a few units: f' and its inverse lose digits as r or 1 / r grow, e^3 here
    torch.testing.assert_close(guide.log_ratio(result.h, 0.5), exact.h, rtol=1e-10, atol=1e-11)
    score = guide.factor(result.h, 0.5)[:, None] * result.gradient
    torch.testing.assert_close(score, exact.gradient, rtol=1e-9, atol=1e-11)


def test_what_the_discriminator_says_of_itself():
    network = Network()
    network.kind, network.divergence, network.shift = "variational", "jeffreys", 0.5
    network.sigma_min, network.sigma_max = 0.01, 50.0
    guide = rx.Guide(network)
    assert (guide.kind, guide.divergence, guide.shift) == ("variational", "jeffreys", 0.5)
    assert (guide.sigma_min, guide.sigma_max) == (0.01, 50.0)
    assert rx.Guide(network, kind="logit", sigma_min=0.1).kind == "logit"
    assert rx.Guide.of(guide) is guide and rx.Guide.of(guide, weight=None) is guide


def test_images_in_channels_last():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 25, 1)).double()
    guide = rx.Guide(lambda x, sigma: network(x))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    want, got = guide(x, 1.0), guide(x.to(memory_format=torch.channels_last), 1.0)
    torch.testing.assert_close(got.gradient, want.gradient, rtol=1e-12, atol=1e-14)
    moved = rx.guided_step(x, [got.gradient], [1.0, 0.5], factor=guide.factor(got.h, 1.0))
    torch.testing.assert_close(moved, x + 0.5 * want.gradient, rtol=1e-12, atol=1e-12)


def test_no_samples():
    result = rx.Guide(Network())(torch.empty(0, 3), 1.0)
    assert result.h.shape == (0,) and result.gradient.shape == (0, 3)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_with_a_network_used_before(mode):
    """Autocast's cache may hold copies of the weights made without gradients; the guide must not trip over them."""
    network, x = Network(), torch.randn(5, 3)
    h, gradient = closed_form(network, x, torch.ones(5))
    with ExitStack() as stack:
        stack.enter_context(MODES[mode]())
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        network(x, torch.ones(5))
        result = rx.Guide(network)(x.clone(), 1.0)
    assert result.h.dtype == torch.bfloat16 and result.gradient.dtype == torch.float32
    # bfloat16 has 8 bits, and the network is two layers of values about 1
    torch.testing.assert_close(result.h.double(), h, rtol=0, atol=0.03)
    torch.testing.assert_close(result.gradient.double(), gradient, rtol=0, atol=0.03)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"schedule": rx.VPSchedule(), "check": False}])
def test_compiled_in_one_graph(mode, options):
    torch._dynamo.reset()
    guide = rx.Guide(Network(), **options)
    x, sigma = torch.randn(5, 3), torch.linspace(0.1, 5, 5, dtype=torch.float64)
    want = guide(x, sigma, alpha=0.5)
    calls = guide.calls

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, sigma):
        result = guide(x, sigma, alpha=0.5)
        return result.h, result.gradient

    with MODES[mode]():
        h, gradient = compiled(x, sigma)
        compiled(x + 1, sigma)
    torch.testing.assert_close(h, want.h, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, want.gradient, rtol=1e-6, atol=1e-6)
    assert not h.requires_grad and not gradient.requires_grad and guide.calls == calls


# ---- what is refused, and what is warned of


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: rx.Guide(3), TypeError, "must be callable as .x, sigma., got int"),
        (lambda: rx.Guide(density, kind="probability"), ValueError, "kind must be one of variational, logit, got"),
        (lambda: rx.Guide(density, divergence="total"), ValueError, "divergence must be one of kl"),
        (lambda: rx.Guide(density, sigma_min=2.0, sigma_max=1.0), ValueError, "need 0 <= sigma_min < sigma_max, got 2"),
        (lambda: rx.Guide(density, sigma_min=-1.0), ValueError, "need 0 <= sigma_min"),
        (lambda: rx.Guide(density, schedule="vp"), TypeError, "schedule must be a VPSchedule, got str"),
        (lambda: rx.Guide.of(rx.Guide(density), kind="logit"), ValueError, "kind: give these to the Guide"),
        (lambda: rx.Guide(nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())), ValueError, "ends in Sigmoid: these are prob"),
        (lambda: rx.Guide(density, schedule=rx.VPSchedule(), sigma_max=200.0), ValueError, r"0.0446877 to 152"),
        (lambda: rx.VPSchedule(beta_min=3.0, beta_max=2.0), ValueError, "need 0 < beta_min < beta_max, got 3"),
        (lambda: rx.VPSchedule(time_min=1.0), ValueError, "need 0 <= time_min < time_max, got 1"),
    ],
)
def test_guides_that_are_refused(make, error, said):
    with pytest.raises(error, match=said):
        make()


def test_levels_beyond_the_training_range():
    network = Network()
    network.sigma_min, network.sigma_max = 0.01, 50.0
    with pytest.raises(ValueError, match=r"0.01 and 80, must be .* was trained on, 0.01 to 50"):
        rx.Guide(network, sigma_max=80.0)
    with pytest.raises(ValueError, match=r"0.001 and 50, must be in the range"):
        rx.Guide(network, sigma_min=0.001)


@pytest.mark.parametrize(
    ("discriminator", "error", "said"),
    [
        (lambda x, s: x, ValueError, r"must return \[5\] or \[5, 1\], got \[5, 3\]"),
        (lambda x, s: x.sum(), ValueError, r"must return \[5\] or \[5, 1\], got \[\]"),
        (lambda x, s: (x.sum(1),), TypeError, r"must return a tensor of \[5\] outputs, got tuple"),
        (lambda x, s: x.sum(1).detach(), ValueError, "has no gradient in x"),
        (lambda x, s: torch.zeros(5, requires_grad=True), ValueError, "has no gradient in x"),
        (torch.no_grad()(density), ValueError, "has no gradient in x"),
        (
            lambda x, s: density(x, s).sigmoid(),
            ValueError,
            "returns a sigmoid: these are probabilities",
        ),
        (lambda x, s: x.softmax(1)[:, :1].clamp(1e-5, 1 - 1e-5), ValueError, "returns a softmax"),
        (lambda x, s: density(x, s) * math.nan, ValueError, "returned NaN, or its gradient was, at sigma = 0.7"),
        # the gradient of a square root at 0
        (lambda x, s: (x - x.detach()).square().sum(1).sqrt(), ValueError, "NaN, or its gradient was, at sigma = 0.7"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_outputs_that_are_refused(discriminator, error, said, mode):
    with MODES[mode](), pytest.raises(error, match=said):
        rx.Guide(discriminator)(torch.randn(5, 3), 0.7)


@pytest.mark.parametrize("x", [[1.0], torch.ones(3, dtype=torch.int64), torch.tensor(1.0)])
def test_states_that_are_refused(x):
    with pytest.raises(TypeError, match=r"x must be a floating tensor \[B, ...\], got"):
        rx.Guide(density)(x, 1.0)


def test_levels_that_are_refused():
    with pytest.raises(ValueError, match=r"sigma must be a number or \[5\], one per sample, got \[3\]"):
        rx.Guide(density)(torch.randn(5, 3), torch.ones(3))


def test_nan_outside_the_range_is_nobodys_concern():
    def broken_at_high_noise(x, sigma):
        return torch.where(sigma > 10, math.nan, density(x, sigma))

    sigma, x = torch.tensor([1.0, 20.0]), torch.randn(2, 3)
    with pytest.raises(ValueError, match="at sigma = 20"):
        rx.Guide(broken_at_high_noise)(x, sigma)
    guide = rx.Guide(broken_at_high_noise, sigma_max=10.0)
    result = guide(x, sigma)
    moved = rx.guided_step(x, [result.gradient], [1.0, 1.0], factor=guide.factor(result.h, sigma))
    assert moved.isfinite().all() and torch.equal(moved[1], x[1])


def test_parameters_made_under_inference_mode():
    with torch.inference_mode():
        network = Network()
    with pytest.raises(ValueError, match="holds tensors made under inference_mode"):
        rx.Guide(network)(torch.randn(2, 3), 1.0)


def test_probabilities_that_only_their_values_give_away():
    x = torch.rand(40, 3) + 0.01

    def share(x, sigma):
        return x[:, 0] / x.sum(1)

    with pytest.warns(UserWarning, match="all 40 outputs of the discriminator are between 0 and 1"):
        rx.Guide(share)(x, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rx.Guide(share, check=False)(x, 1.0)
        rx.Guide(share, kind="variational")(x, 1.0)
        rx.Guide(lambda x, sigma: share(x, sigma).sigmoid(), check=False)(x, 1.0)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(3)])
def test_training_mode_is_warned_of_once(layer):
    class WithLayer(Network):
        def __init__(self):
            super().__init__()
            self.extra = layer

        def forward(self, x, sigma):
            return super().forward(self.extra(x), sigma)

    network = WithLayer().train()
    guide = rx.Guide(network)
    with pytest.warns(UserWarning, match=f"training mode and has {type(layer).__name__}"):
        guide(torch.randn(5, 3), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide(torch.randn(5, 3), 1.0)
        rx.Guide(network.eval())(torch.randn(5, 3), 1.0)


@pytest.mark.cuda
def test_nan_on_cuda_is_named_at_the_end_without_waiting():
    guide = rx.Guide(lambda x, sigma: torch.where(sigma > 10, math.nan, density(x, sigma)))
    x = torch.randn(4, 3, device="cuda")
    guide(x, 1.0)  # the first call looks for probabilities
    levels = torch.tensor([1.0, 20.0, 30.0, 5.0], device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        guide(x, 1.0)
        guide(x, levels)
        guide(x, 2.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ValueError, match="at sigma = 20"):
        guide.finish()
    guide.finish()
