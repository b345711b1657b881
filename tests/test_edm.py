"""sample_edm: step for step the published algorithms, and what is around them: noise, ranges, dtypes, errors."""

from __future__ import annotations

import math

import pytest
import torch
from edm_reference import Stream, algorithm_2, column, denoiser, guided, images, levels, logit
from torch import nn

import refine_ext as rx

# Both sides are float64: a step is a few operations on numbers up to sigma_max = 80, so 80 * 2^-52 off, damped later.
EXACT = {"rtol": 1e-11, "atol": 1e-11}
CHURN = {
    "none": {},
    "most": {"S_churn": 40.0},
    "some": {"S_churn": 3.0, "S_min": 0.05, "S_max": 10.0, "S_noise": 1.003},
    "inflated": {"S_churn": 1.0, "S_noise": 1.5},
}
RESTATED = {"S_churn": "churn", "S_min": "s_min", "S_max": "s_max", "S_noise": "s_noise"}


@pytest.mark.parametrize("num_steps", [1, 2, 5, 18])
@pytest.mark.parametrize("churn", CHURN)
def test_algorithm_2_step_for_step(churn, num_steps):
    options = CHURN[churn]
    streams = Stream(), Stream()
    restated = {RESTATED[name]: value for name, value in options.items()}
    want = algorithm_2(denoiser, images(), levels(num_steps), streams[0], **restated)
    got = rx.sample_edm(denoiser, images(), num_steps=num_steps, randn_like=streams[1], **options)
    torch.testing.assert_close(got, want, **EXACT)
    assert streams[0].drawn == streams[1].drawn == num_steps
    if churn != "none" and num_steps == 18:
        assert (got - rx.sample_edm(denoiser, images())).abs().max() > 0.01


def test_levels_and_states_on_the_way():
    """Every evaluation of the network, at the very levels and states of the restatement; rho, sigma_min, sigma_max."""
    seen: list[list[torch.Tensor]] = [[], []]

    def recorded(which):
        def net(x, sigma):
            seen[which] += [x.clone(), sigma.clone()]
            return denoiser(x, sigma)

        return net

    algorithm_2(recorded(0), images(), levels(7, 0.01, 30.0, 5.0), Stream(), churn=2.0)
    options = {"num_steps": 7, "sigma_min": 0.01, "sigma_max": 30.0, "rho": 5.0}
    rx.sample_edm(recorded(1), images(), randn_like=Stream(), S_churn=2.0, **options)
    assert len(seen[0]) == len(seen[1]) == 2 * 13
    for want, got in zip(*seen, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_first_order():
    want = algorithm_2(denoiser, images(), levels(9), Stream(), churn=3.0, order=1)
    got = rx.sample_edm(denoiser, images(), num_steps=9, randn_like=Stream(), S_churn=3.0, order=1)
    torch.testing.assert_close(got, want, **EXACT)


def test_a_network_with_levels_of_its_own():
    """Its range narrows the schedule, and its rounding is applied to levels with and without churn."""

    class Discrete:
        sigma_min, sigma_max = 0.01, 50.0
        grid = torch.logspace(-2, math.log10(50.0), 300, dtype=torch.float64)

        def round_sigma(self, sigma):
            return self.grid[(sigma.reshape(-1, 1) - self.grid).abs().argmin(1)].reshape(sigma.shape)

        def __call__(self, x, sigma):
            torch.testing.assert_close(self.round_sigma(sigma), sigma, rtol=1e-15, atol=0)
            return denoiser(x, sigma)

    net = Discrete()
    t = net.round_sigma(torch.tensor(levels(8, 0.01, 50.0)[:-1], dtype=torch.float64)).tolist()

    def rounded(level):
        return net.round_sigma(torch.tensor(level, dtype=torch.float64)).item()

    want = algorithm_2(net, images(), [*t, 0.0], Stream(), churn=3.0, rounded=rounded)
    got = rx.sample_edm(net, images(), num_steps=8, randn_like=Stream(), S_churn=3.0)
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("window", [(0.0, math.inf), (0.05, 30.0)])
@pytest.mark.parametrize("churn", [0.0, 10.0])
@pytest.mark.parametrize("weights", [(2.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("boosting", [False, True])
def test_published_guidance_in_logit_space(boosting, weights, churn, window):
    def ratio(x, sigma):
        """Below 0 for the first sample, above for the last, at every level."""
        return logit(x, sigma) + torch.linspace(-6, 6, len(x))

    w1, w2 = weights
    rules = {"w1": w1, "w2": w2, "churn": churn, "low": window[0], "high": window[1]}
    want = guided(denoiser, ratio, images(), levels(12), Stream(), boosting=boosting, **rules)
    options = {"num_steps": 12, "S_churn": churn, "weight": w1, "weight_2nd": w2, "boosting": boosting}
    guide = rx.Guide(ratio, sigma_min=window[0], sigma_max=window[1])
    got = rx.sample_edm(denoiser, images(), randn_like=Stream(), discriminator=guide, **options)
    torch.testing.assert_close(got, want, **EXACT)
    plain = guided(denoiser, logit, images(), levels(12), Stream(), w1=0.0, w2=0.0, churn=churn)
    assert (got - plain).abs().amax((1, 2, 3)).min() > 1e-3, "guidance that does nothing proves nothing"
    if boosting and w1:
        usual = guided(denoiser, ratio, images(), levels(12), Stream(), **rules)
        changed = (got - usual).abs().amax((1, 2, 3))
        assert changed[0] > 1e-3 and changed[-1] < 1e-11, "boosting is for some samples, and not for others"


def test_boosting_of_a_variational_output():
    """log r < 0 is h below f'(1): the samples are those of the logit."""
    options = {"num_steps": 12, "weight": 2.0, "weight_2nd": 0.0, "boosting": True, "seed": 0}
    want = rx.sample_edm(denoiser, images(), discriminator=logit, **options)
    guide = rx.Guide(lambda x, sigma: logit(x, sigma) + 1.25, kind="variational", divergence="kl", shift=0.25)
    got = rx.sample_edm(denoiser, images(), discriminator=guide, **options)
    torch.testing.assert_close(got, want, **EXACT)


def test_gradients_live_where_clipped_probabilities_kill_them():
    """The published ratio is log(D / (1 - D)) with D clipped to [1e-5, 1 - 1e-5], whose gradient is 0 beyond a logit of
    11.5: the samples farthest from the data get no guidance. In logit space they do.
    """

    def clipped(of):
        def log_ratio(x, sigma):
            d = of(x, sigma).sigmoid().clamp(1e-5, 1 - 1e-5)
            return torch.log(d / (1 - d))

        return log_ratio

    def confident(x, sigma):
        return logit(x, sigma) - 20

    def run(of):
        return guided(denoiser, of, images(), levels(10), Stream(), w1=1.0, w2=1.0)

    plain = guided(denoiser, logit, images(), levels(10), Stream(), w1=0.0, w2=0.0)
    options = {"num_steps": 10, "randn_like": Stream()}
    near = rx.sample_edm(denoiser, images(), discriminator=logit, **options)
    far = rx.sample_edm(denoiser, images(), discriminator=confident, **options)
    # Through D and back, 1 - D cancels: the logit is off by 2^-53 e^|logit|, about 1e-14 here.
    torch.testing.assert_close(near, run(clipped(logit)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run(clipped(confident)), plain, rtol=0, atol=0)
    torch.testing.assert_close(far, near, **EXACT)
    assert (far - plain).abs().max() > 0.1


def test_discriminator_of_a_vp_diffusion():
    """The published rule: evaluate at (mu x, tau), multiply the gradient by mu, for tau in [0.01, 1]."""
    b0, b1 = 0.1, 20.0

    def change(sigma):
        tau = (-b0 + torch.sqrt(b0**2 + 2 * (b1 - b0) * torch.log(1 + sigma**2))) / (b1 - b0)
        return tau, torch.exp(-0.25 * tau**2 * (b1 - b0) - 0.5 * tau * b0)

    def vp(state, tau):
        return 3 * torch.sin(2 * state).mean((1, 2, 3)) * torch.cos(tau)

    def restated(x, sigma):
        tau, mu = change(sigma)
        inside = (tau >= 0.01) & (tau <= 1)
        return torch.where(inside, vp(column(mu) * x, tau), 0.0)  # gradient: mu times that of vp

    want = guided(denoiser, restated, images(), levels(12, 0.002, 400.0), Stream(), w1=2.0, w2=1.0, churn=5.0)
    guide = rx.Guide(vp, schedule=rx.VPSchedule())
    options = {"num_steps": 12, "sigma_max": 400.0, "S_churn": 5.0, "weight": 2.0, "weight_2nd": 1.0}
    got = rx.sample_edm(denoiser, images(), randn_like=Stream(), discriminator=guide, **options)
    # 1 - mu^2 of the published tau cancels by 1e-16 / tau
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    # levels 400 and 225 are above tau = 1, those under 0.0447 below tau = 0.01: no evaluation there
    evaluated = [s for i, s in enumerate(levels(12, 0.002, 400.0)[:-1]) for _ in range(1 if i == 0 else 2)]
    assert 0 < guide.calls < len(evaluated)


def test_weights_per_sample_and_of_the_guide():
    w = torch.tensor([0.0, 0.5, 1.0, 2.0])
    got = rx.sample_edm(denoiser, images(), discriminator=logit, weight=w, num_steps=6)
    for i, one in enumerate(w.tolist()):
        guide = rx.Guide(logit, weight=2.0)
        want = rx.sample_edm(denoiser, images()[i : i + 1], discriminator=guide, weight=one / 2, num_steps=6)
        torch.testing.assert_close(got[i : i + 1], want, **EXACT)


# ---- noise


def test_the_seed_is_philox_number_i_plus_1_and_0_is_left_for_the_start():
    seed = 5
    start = rx.philox_normal((4, 3, 4, 4), seed, dtype=torch.float64)
    numbers = iter(range(1, 100))

    def injected(x):
        return rx.philox_normal(x.shape, seed, step=next(numbers), dtype=torch.float64)

    options = {"num_steps": 8, "S_churn": 4.0, "discriminator": logit}
    want = rx.sample_edm(denoiser, start, randn_like=injected, **options)
    torch.testing.assert_close(rx.sample_edm(denoiser, start, seed=seed, **options), want, **EXACT)


def test_seeds_of_each_sample_whatever_the_batch():
    seeds = torch.tensor([3, -7, 11, 2**62])
    options = {"num_steps": 8, "S_churn": 4.0, "discriminator": logit, "boosting": True, "weight": 2.0}
    together = rx.sample_edm(denoiser, images(), seed=seeds, **options)
    for i in range(4):
        alone = rx.sample_edm(denoiser, images()[i : i + 1], seed=seeds[i : i + 1], **options)
        torch.testing.assert_close(alone, together[i : i + 1], **EXACT)
    assert (rx.sample_edm(denoiser, images(), seed=seeds + 1, **options) - together).abs().min(0)[0].max() > 1e-6


def test_where_the_seed_comes_from():
    options = {"num_steps": 4, "S_churn": 4.0}

    def run(**more):
        return rx.sample_edm(denoiser, images(), **options, **more)

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert torch.equal(run(), first) and not torch.equal(first, second)
    drawn = [run(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    state = torch.get_rng_state()
    rx.sample_edm(denoiser, images(), num_steps=4)
    run(seed=3)
    assert torch.equal(torch.get_rng_state(), state), "samplers that need no numbers draw none"


# ---- dtypes, modes, arguments handed on


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_float32_networks_in_every_mode(mode):
    """A float64 state around float32 networks, as published; a float32 state is off by its roundings."""
    torch.manual_seed(0)
    net = nn.Conv2d(3, 3, 3, padding=1)
    head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1))

    def denoise(x, sigma):
        assert x.dtype == sigma.dtype == torch.float32
        return x / column(1 + sigma**2) + 0.2 * net(x).tanh()

    def disc(x, sigma):
        return head(x / column(1 + sigma))

    options = {"num_steps": 8, "discriminator": rx.Guide(disc, dtype=torch.float32), "S_churn": 2.0, "seed": 1}
    with mode():
        noise = images(dtype=torch.float32)
        kept = noise.clone()
        double = rx.sample_edm(denoise, noise, **options)
        single = rx.sample_edm(denoise, noise, dtype=torch.float32, **options)
    assert torch.equal(noise, kept) and not double.requires_grad
    assert double.dtype == torch.float64 and single.dtype == torch.float32
    # sigma_max * 2^-24 = 5e-6 at the first step, damped by the denoiser afterwards
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)
    assert all(p.grad is None for p in [*net.parameters(), *head.parameters()])


def test_what_is_handed_on():
    labels = torch.eye(4, dtype=torch.float64)
    seen = []

    def net(x, sigma, class_labels, scale):
        assert class_labels is labels
        return scale * denoiser(x, sigma)

    def disc(x, sigma, prompt):
        seen.append(prompt)
        return logit(x, sigma)

    given = {"class_labels": labels, "extra": {"scale": 0.9}, "discriminator_extra": {"prompt": "a"}}
    rx.sample_edm(net, images(), num_steps=3, discriminator=disc, **given)
    assert seen == ["a"] * 5


def test_evaluations_that_have_no_say_are_left_out():
    def calls(num_steps=10, **options):
        guide = rx.Guide(logit, **{k: options.pop(k) for k in ("sigma_min", "sigma_max") if k in options})
        rx.sample_edm(denoiser, images(), num_steps=num_steps, discriminator=guide, seed=0, **options)
        return guide.calls

    inside = [0.1 <= s <= 10 for s in levels(10)[:-1]]
    assert calls() == 19
    assert calls(weight_2nd=0.0) == 10 and calls(weight=0.0, weight_2nd=1.0) == 9 and calls(order=1) == 10
    assert calls(sigma_min=0.1, sigma_max=10.0) == 2 * sum(inside)
    assert calls(weight=0.0) == 0


@pytest.mark.parametrize("order", [1, 2])
def test_callback(order):
    kept = []

    def callback(i, sigma, x, denoised):
        kept.append((i, sigma, x, x.clone(), denoised))

    options = {"num_steps": 5, "S_churn": 2.0, "order": order, "seed": 0}
    with_callback = rx.sample_edm(denoiser, images(), callback=callback, **options)
    assert torch.equal(with_callback, rx.sample_edm(denoiser, images(), **options))
    assert [i for i, *_ in kept] == list(range(5))
    for i, sigma, x, then, denoised in kept:
        assert sigma == pytest.approx(levels(5)[i] * 1.4, rel=1e-12)
        assert torch.equal(x, then), "a state that was handed out has changed"
        assert torch.equal(denoised, denoiser(x, torch.full((4,), sigma, dtype=torch.float64)))


def test_progress_bar(capsys):
    rx.sample_edm(denoiser, images(), num_steps=3, progress=True)
    assert "3/3" in capsys.readouterr().err
    rx.sample_edm(denoiser, images(), num_steps=3)
    assert capsys.readouterr().err == ""


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"net": 3}, TypeError, "net must be callable as .x, sigma., got int"),
        ({"noise": [1.0]}, TypeError, "noise must be a torch.Tensor, got list"),
        ({"noise": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "noise must be float64, float32"),
        ({"noise": torch.empty(0, 3, 4, 4)}, ValueError, r"noise must not be empty, got shape \[0, 3, 4, 4\]"),
        ({"noise": torch.tensor(1.0)}, ValueError, r"noise must be \[B, ...\], got a 0-dim"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"num_steps": 2.5}, TypeError, "num_steps must be an int, got float"),
        ({"sigma_min": 90.0}, ValueError, "need 0 < sigma_min < sigma_max, got 90 and 80"),
        ({"sigma_min": 0.0}, ValueError, "need 0 < sigma_min < sigma_max, got 0 and 80"),
        ({"sigma_max": math.inf}, ValueError, "need 0 < sigma_min < sigma_max"),
        ({"rho": 0.0}, ValueError, "rho must be positive, got 0.0"),
        ({"S_churn": -1.0}, ValueError, "S_churn must be finite and not negative, got -1.0"),
        ({"S_noise": math.nan}, ValueError, "S_noise must be finite and not negative, got nan"),
        ({"order": 3}, ValueError, "order must be 1 .Euler. or 2 .Heun., got 3"),
        ({"dtype": torch.float16}, TypeError, "dtype must be torch.float64 or torch.float32, got torch.float16"),
        ({"seed": 1, "randn_like": torch.randn_like}, ValueError, "give one of randn_like, generator and seed"),
        ({"boosting": True}, ValueError, "boosting needs a discriminator"),
        (
            {"net": lambda x, s: x[:, :1]},
            ValueError,
            r"must return a tensor shaped as noise, \[4, 3, 4, 4\], got \[4, 1",
        ),
        ({"net": lambda x, s: (x,)}, ValueError, r"must return a tensor shaped as noise, .*, got tuple"),
        ({"discriminator": 3}, TypeError, "discriminator must be callable"),
        ({"discriminator": lambda x, s: x}, ValueError, r"discriminator must return \[4\]"),
        ({"discriminator": lambda x, s: logit(x, s).sigmoid()}, ValueError, "returns a sigmoid"),
        ({"discriminator": lambda x, s: logit(x, s) / (s > 1)}, ValueError, "or its gradient was, at sigma = 0.169753"),
        (
            {"discriminator": rx.Guide(logit, sigma_min=100.0, sigma_max=200.0)},
            ValueError,
            "the discriminator guides sigma from 100 to 200, and the steps are from 0.002 to 80",
        ),
        ({"weight": torch.ones(3), "discriminator": logit}, ValueError, r"weight must be a number or \[4\], one per"),
        ({"weight": "1", "discriminator": logit}, TypeError, "weight must be a number or a tensor .B., got str"),
        ({"sigma_max": "80"}, TypeError, "sigma_max must be a number, got str"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"seed": torch.arange(3), "S_churn": 1.0}, ValueError, "seed must be one number or have shape .4., got .3."),
        ({"randn_like": lambda x: x[:1], "S_churn": 1.0}, ValueError, "randn_like must return .* got"),
    ],
)
def test_arguments_that_are_refused(options, error, said):
    arguments = {"net": denoiser, "noise": images(), "num_steps": 5, **options}
    with pytest.raises(error, match=said):
        rx.sample_edm(arguments.pop("net"), arguments.pop("noise"), **arguments)


def test_a_range_that_the_steps_meet_in_part_is_fine():
    guide = rx.Guide(logit, sigma_min=50.0, sigma_max=200.0)
    guided_early = rx.sample_edm(denoiser, images(), num_steps=5, discriminator=guide)
    assert guide.calls == 1
    assert (guided_early - rx.sample_edm(denoiser, images(), num_steps=5)).abs().max() > 1e-6
