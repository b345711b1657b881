"""RefinedDenoiser and post_cfg: against the denoiser of the true model, and against what their hosts ask of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from gaussian_mixture import DUALS, LogRatio, true_and_biased
from torch import nn

import refine_ext as rx

SHAPE = (5, 2, 2, 2)
TRUE, BIASED = true_and_biased(8)
RATIO = LogRatio(TRUE, BIASED)


def denoise(mixture, x, sigma):
    return mixture.predict(x, 1.0, sigma, "sample")


def biased(x, sigma, **extra):
    return denoise(BIASED, x, sigma)


class Preconditioned(nn.Module):
    """What EDM's networks look like from outside: float32 inside and out, classes, attributes."""

    def __init__(self, label_dim: int = 3) -> None:
        super().__init__()
        self.sigma_min, self.sigma_max, self.label_dim = 0.002, 80.0, label_dim
        self.img_resolution, self.img_channels = 2, 2
        self.register_buffer("offset", torch.zeros(1))
        self.asked: list[tuple] = []

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None, force_fp32=False, return_logvar=False):
        self.asked.append((x.dtype, class_labels, force_fp32))
        denoised = denoise(BIASED, x.float(), sigma) + self.offset
        return (denoised, sigma.flatten()) if return_logvar else denoised


def states() -> torch.Tensor:
    return 3 * torch.randn(SHAPE, dtype=torch.float64)


@pytest.mark.parametrize(
    "sigma",
    [0.7, torch.tensor(0.7), torch.tensor(0.7, dtype=torch.float64), torch.linspace(0.1, 9, 5)],
    ids=["number", "0-dim", "float64", "batch"],
)
@pytest.mark.parametrize("layout", ["flat", "[B,1,1,1]"])
def test_refined_by_the_exact_ratio_it_is_the_true_denoiser(sigma, layout):
    if layout != "flat" and isinstance(sigma, torch.Tensor):
        sigma = sigma.reshape(-1, 1, 1, 1)
    x = states()
    want = denoise(TRUE, x, sigma)
    got = rx.RefinedDenoiser(biased, RATIO)(x, sigma)
    # A handful of float64 roundings of numbers of size 10; a level given in float32 is the same in both.
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert (biased(x, sigma) - want).abs().max() > 0.01


@pytest.mark.parametrize("divergence", DUALS)
def test_every_divergence_gives_the_same_gradient_at_its_optimum(divergence):
    """c(h) grad h = grad log r for h = f'(r), whatever f: the factor against the definition of the dual."""
    sigma = torch.linspace(0.1, 9, 5)
    x = (TRUE.means[[0, 1, 2, 0, 1]] + sigma[:, None] * torch.randn(5, 8)).reshape(SHAPE)
    assert RATIO(x, sigma).abs().max() < 5
    refined = rx.RefinedDenoiser(
        biased, lambda x, s: DUALS[divergence](RATIO(x, s)), kind="variational", divergence=divergence, shift=0.0
    )
    # The duals lose digits where r is far from 1: e^10 at most of 1e-16 here, in neyman_chi2.
    torch.testing.assert_close(refined(x, sigma), denoise(TRUE, x, sigma), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weight", [0.5, torch.linspace(0, 2, 5, dtype=torch.float64), lambda level: 1 / (1 + level)])
def test_weights(weight):
    x, sigma = states(), torch.linspace(0.1, 9, 5)
    w = weight(sigma.double()) if callable(weight) else weight
    w = torch.as_tensor(w).reshape(-1, 1, 1, 1)
    plain, true = biased(x, sigma), denoise(TRUE, x, sigma)
    got = rx.RefinedDenoiser(biased, RATIO, weight)(x, sigma)
    torch.testing.assert_close(got, plain + w * (true - plain), rtol=1e-12, atol=1e-12)
    if not callable(weight):  # beside a Guide's own weight
        got = rx.RefinedDenoiser(biased, rx.Guide(RATIO, weight=2.0), weight)(x, sigma)
        torch.testing.assert_close(got, plain + 2 * w * (true - plain), rtol=1e-12, atol=1e-12)


def test_outside_the_range_it_is_the_plain_denoiser():
    x, sigma = states(), torch.tensor([0.1, 0.2, 1.0, 5.0, 9.0])
    got = rx.RefinedDenoiser(biased, RATIO, sigma_min=0.2, sigma_max=5.0)(x, sigma)
    inside = ((sigma >= 0.2) & (sigma <= 5.0)).reshape(-1, 1, 1, 1)
    want = torch.where(inside, denoise(TRUE, x, sigma), biased(x, sigma))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_edm_conventions(mode):
    """EDM's sampler: 0-dim float64 sigma, float64 latents, classes by position, attributes of the network."""
    net = Preconditioned().eval()
    seen = []

    def discriminator(x, sigma, class_labels):
        seen.append(class_labels)
        return RATIO(x, sigma)

    refined = rx.RefinedDenoiser(net, discriminator, discriminator_extra=["class_labels"])
    assert (refined.sigma_min, refined.sigma_max, refined.label_dim) == (0.002, 80.0, 3)
    assert (refined.img_resolution, refined.img_channels) == (2, 2)
    with mode():
        labels = torch.eye(5)
        x, sigma = states(), refined.round_sigma(torch.tensor(1.5, dtype=torch.float64))
        got = refined(x, sigma, labels, force_fp32=True)
        want = denoise(TRUE, x, sigma)
    assert net.asked == [(torch.float64, labels, True)] and torch.equal(seen[0], labels)
    assert got.dtype == torch.float32
    # The network's and the sum's float32, of numbers up to 10.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6)


def test_networks_without_classes_are_not_given_any():
    refined = rx.RefinedDenoiser(lambda x, sigma: denoise(BIASED, x, sigma), RATIO)
    refined(states(), torch.tensor(1.0), None)
    with pytest.raises(TypeError, match="class_labels"):
        refined(states(), torch.tensor(1.0), torch.eye(5))


def test_a_tuple_keeps_what_follows():
    x, sigma = states().float(), torch.linspace(0.1, 9, 5)
    denoised, log_variance = rx.RefinedDenoiser(Preconditioned(), RATIO)(x, sigma, return_logvar=True)
    torch.testing.assert_close(denoised, denoise(TRUE, x, sigma), rtol=0, atol=5e-6)
    assert torch.equal(log_variance, sigma)


def test_extra_by_a_function_and_by_a_dict():
    seen = {}

    def discriminator(x, sigma, prompt):
        seen["prompt"] = prompt
        return x.flatten(1).sum(1)

    refined = rx.RefinedDenoiser(biased, discriminator, discriminator_extra=lambda extra: {"prompt": extra["cond"][1]})
    refined(states(), 1.0, cond=("a", "b"))
    assert seen == {"prompt": "b"}
    rx.RefinedDenoiser(biased, discriminator, discriminator_extra={"prompt": "c"})(states(), 1.0, cond=("a", "b"))
    assert seen == {"prompt": "c"}


def test_it_is_a_module():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 1)

        def forward(self, x, sigma):
            return self.linear(x.flatten(1))

    refined = rx.RefinedDenoiser(Preconditioned(), Linear())
    assert {name.split(".")[0] for name in refined.state_dict()} == {"net", "discriminator"}
    refined.double()
    assert refined.discriminator.linear.weight.dtype == torch.float64
    x = states()
    want = refined(x, torch.tensor(1.0))
    assert torch.equal(copy.deepcopy(refined)(x, torch.tensor(1.0)), want)
    copied = copy.deepcopy(refined)
    assert copied.guide.discriminator is copied.discriminator is not refined.discriminator
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = refined.no_such_thing


class Pull(nn.Module):
    def forward(self, x, sigma):
        return -(x**2).flatten(1).sum(1)


class Half(nn.Module):
    def forward(self, x, sigma):
        return x / 2


def test_it_pickles():
    refined = pickle.loads(pickle.dumps(rx.RefinedDenoiser(Half(), Pull())))
    x = torch.ones(1, 2)
    assert torch.equal(refined(x, 0.5), x / 2 - 0.25 * 2 * x)


def test_autograd_reaches_the_network():
    net = Preconditioned()
    net.offset.requires_grad_()
    rx.RefinedDenoiser(net, RATIO)(states(), torch.tensor(1.0)).sum().backward()
    assert net.offset.grad.item() == pytest.approx(40)


def test_compiled_whole():
    class Discriminator(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 1))

        def forward(self, x, sigma):
            return self.layers(torch.cat([x.flatten(1), sigma.log()[:, None]], 1))

    refined = rx.RefinedDenoiser(Half(), Discriminator()).requires_grad_(False)
    compiled = torch.compile(refined, backend="aot_eager", fullgraph=True)
    x, sigma = torch.randn(SHAPE), torch.linspace(0.1, 9, 5)
    for _ in range(2):
        torch.testing.assert_close(compiled(x, sigma), refined(x, sigma), rtol=1e-6, atol=1e-6)


def test_in_edms_sampler():
    """Guided by the sampler, or by the denoiser that it is given: the same samples, and those of the true model."""
    noise = torch.randn(SHAPE, dtype=torch.float64)

    def net(x, sigma):
        return denoise(BIASED, x, sigma)

    options = {"num_steps": 8, "S_churn": 4.0, "seed": 3}
    by_denoiser = rx.sample_edm(rx.RefinedDenoiser(net, RATIO, 1.5), noise, **options)
    by_sampler = rx.sample_edm(net, noise, discriminator=RATIO, weight=1.5, **options)
    # float64 rounding of states of up to 300, grown by the distance of neighbouring trajectories.
    torch.testing.assert_close(by_denoiser, by_sampler, rtol=1e-9, atol=1e-9)
    true = rx.sample_edm(lambda x, sigma: denoise(TRUE, x, sigma), noise, **options)
    torch.testing.assert_close(
        rx.sample_edm(rx.RefinedDenoiser(net, RATIO), noise, **options), true, rtol=1e-9, atol=1e-9
    )


def test_a_fitted_discriminator_is_taken_as_it_is():
    """Its gradient in its own range of levels, nothing outside; half of it at half the weight."""
    fake = torch.randn(80, 2)
    discriminator = rx.fit_diffusion_discriminator(
        fake + 1, fake, sigma_min=0.1, sigma_max=5.0, max_epochs=2, hidden=(8,), progress=False
    ).eval()
    discriminator.temperature.fill_(1.0)
    x, sigma = torch.randn(4, 2), torch.tensor([0.05, 0.5, 2.0, 6.0])
    state = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(state, sigma).sum(), state)
    inside = torch.tensor([0.0, 1.0, 1.0, 0.0])
    want = x / 2 + (0.5 * inside * sigma**2)[:, None] * gradient
    refined = rx.RefinedDenoiser(Half(), discriminator, weight=0.5)
    torch.testing.assert_close(refined(x, sigma), want, rtol=1e-5, atol=1e-6)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("latent_scale", [1.0, 0.18])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_post_cfg(flow, latent_scale, mode):
    """What ComfyUI hands over: float32 latents that the model scaled, [B] levels, other items beside."""
    sigma = torch.linspace(0.1, 0.9, 5) if flow else torch.linspace(0.1, 9, 5)
    alpha = 1 - sigma if flow else 1.0
    with mode():
        x = torch.randn(SHAPE)
        plain, true = (m.scaled(latent_scale).predict(x, alpha, sigma, "sample") for m in (BIASED, TRUE))
        refine = rx.post_cfg(RATIO, flow=flow, latent_scale=latent_scale)
        got = refine({"denoised": plain, "sigma": sigma, "input": x, "cond": None, "cond_scale": 7.0, "model": None})
        assert got is not plain and got.dtype == torch.float32
    # float32: of x / (alpha latent_scale) <= 60 in the discriminator.
    torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)
    assert (plain - true).abs().max() > 0.005


def test_post_cfg_extra():
    seen = []

    def discriminator(x, sigma, cond):
        seen.append(cond)
        return x.flatten(1).sum(1)

    refine = rx.post_cfg(discriminator, weight=0.5, discriminator_extra=["cond"])
    x = torch.ones(1, 2)
    got = refine({"denoised": torch.zeros(1, 2), "sigma": torch.tensor([2.0]), "input": x, "cond": "cat"})
    assert torch.equal(got, 2 * x) and seen == ["cat"]


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"RefinedDenoiser: net must be callable as .x, sigma., got int"):
        rx.RefinedDenoiser(3, RATIO)
    with pytest.raises(TypeError, match="Guide: discriminator must be callable"):
        rx.RefinedDenoiser(biased, None)
    with pytest.raises(TypeError, match="must be names of arguments, a function or a dict, got 'labels'"):
        rx.RefinedDenoiser(biased, RATIO, discriminator_extra="labels")
    with pytest.raises(ValueError, match="give these to the Guide"):
        rx.RefinedDenoiser(biased, rx.Guide(RATIO), divergence="kl")
    with pytest.raises(
        ValueError,
        match=r"RefinedDenoiser: the model's prediction must have the shape of its input, \[5, 2, 2, 2\], got \[5, 8\]",
    ):
        rx.RefinedDenoiser(lambda x, s: x.flatten(1), RATIO)(states(), 1.0)
    with pytest.raises(ValueError, match=r"must return \[5\] or \[5, 1\], got \[5, 8\]"):
        rx.RefinedDenoiser(biased, lambda x, s: x.flatten(1))(states(), 1.0)
    with pytest.raises(ValueError, match="no gradient in x"):
        rx.RefinedDenoiser(biased, lambda x, s: RATIO(x.detach(), s))(states(), 1.0)
    with pytest.raises(ValueError, match="post_cfg: latent_scale must be positive and finite, got -1"):
        rx.post_cfg(RATIO, latent_scale=-1)
    with pytest.raises(TypeError, match="post_cfg: latent_scale must be a number, got str"):
        rx.post_cfg(RATIO, latent_scale="1")
    with pytest.raises(ValueError, match="post_cfg: args must have denoised, sigma and input, got no sigma, input"):
        rx.post_cfg(RATIO)({"denoised": states()})
