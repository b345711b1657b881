"""`latent_flow`: each step against the formula, its factors against f, noise, batches, early stops, modes."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import reference
import torch
from fitting import fit, gaussians, one_thread  # noqa: F401
from host_reads import HostReads
from torch import nn

import refine_ext as rx
from refine_ext import latent
from refine_ext.guidance import philox_normal
from refine_ext.measures import energy_distance

FLOWS = (*reference.NAMED, "alpha:0.3", "alpha:-0.5", "alpha:3", "logD")


def kappa(name: str, log_r: float) -> float:
    """u f''(u) at u = 1/r, f'' by differences of f in 120 digits."""
    u = mpmath.exp(-mpmath.mpf(log_r))

    def f(v):
        return (1 + v) * mpmath.log(1 + v) - v if name == "logD" else reference.definition(name, v)

    return float(u * mpmath.diff(f, u, 2))


def generator(z):
    return torch.sinh(z)


MEAN = torch.tensor([0.4, -1.0], dtype=torch.float64)


def logit(x):
    """Of N(MEAN, 1/1.5) against a standard normal, up to a constant."""
    return -0.75 * (x - MEAN.to(x)).square().sum(1) + 0.5 * x.square().sum(1)


def logit_and_slope(z):
    """logit(generator(z)) and its gradient in z, by hand."""
    x = torch.sinh(z)
    slope = (-1.5 * (x - MEAN) + x) * torch.cosh(z)
    return -0.75 * (x - MEAN).square().sum(1) + 0.5 * x.square().sum(1), slope


def starts(n=7, dtype=torch.float64):
    return 0.5 * torch.randn(n, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def flow(z=None, **options):
    z = starts() if z is None else z
    return rx.latent_flow(generator, logit, z, **{"seed": 1, "progress": False, "check": False, **options})


@pytest.mark.parametrize("divergence", FLOWS)
def test_a_step_is_the_formula(divergence):
    z, shift = starts(), 0.3
    log_r, slope = logit_and_slope(z)
    factor = torch.tensor([kappa(divergence, v) for v in (log_r - shift).tolist()], dtype=torch.float64)
    noise = philox_normal(z.shape, 1, step=0, dtype=torch.float64)
    want = z + 0.01 * factor[:, None] * slope + (2 * 0.01 * 0.2) ** 0.5 * noise
    got = flow(z, steps=1, step_size=0.01, noise=0.2, divergence=divergence, shift=shift)
    # a dozen float64 operations, and exp(3 log r) in the steepest factors
    torch.testing.assert_close(got.z, want, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(got.x, torch.sinh(got.z), rtol=0, atol=0)
    torch.testing.assert_close(got.log_ratio, logit(got.x) - shift, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(got.trace, torch.stack([log_r.mean() - shift, got.log_ratio.mean()]))


@pytest.mark.parametrize("divergence", FLOWS)
def test_factors_are_u_times_the_second_derivative(divergence):
    log_r = torch.linspace(-9, 9, 19, dtype=torch.float64)
    want = [kappa(divergence, v) for v in log_r.tolist()]
    got = latent._kappa(log_r, divergence).tolist()
    assert got == pytest.approx(want, rel=1e-12)


def test_factors_in_closed_form():
    log_r = torch.tensor([-400.0, -2.0, 0.0, 3.0, 400.0], dtype=torch.float64)
    r = log_r.exp()
    assert latent._kappa(log_r, "kl").tolist() == [1.0] * 5
    for name, want in (("jensen_shannon", r / (1 + r)), ("gan", r / (1 + r)), ("logD", 1 / (1 + r))):
        torch.testing.assert_close(latent._kappa(log_r, name), want.double(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("read_by", ["kl", "jensen_shannon", "squared_hellinger", "pearson_chi2"])
def test_a_variational_output_is_read_by_its_divergence(read_by):
    """h = f'(r) + shift makes the flow of the logit; the flow's divergence is another matter."""

    def variational(x):
        log_r = logit(x) / 4
        r = log_r.exp()
        return (
            0.1
            + {
                "kl": lambda: log_r + 1,
                "jensen_shannon": lambda: torch.log(2 * r / (1 + r)),
                "squared_hellinger": lambda: 1 - torch.exp(-log_r / 2),
                "pearson_chi2": lambda: 2 * (r - 1),
            }[read_by]()
        )

    options = {"steps": 3, "noise": 0.0, "seed": 1, "progress": False, "check": False}
    want = rx.latent_flow(generator, lambda x: logit(x) / 4, starts(), divergence="logD", **options)
    variational.kind, variational.divergence, variational.shift = "variational", read_by, 0.1
    got = rx.latent_flow(generator, variational, starts(), divergence="logD", **options)
    torch.testing.assert_close(got.z, want.z, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got.log_ratio, want.log_ratio, rtol=1e-11, atol=1e-12)


def test_small_steps_of_the_plain_flow_increase_the_log_ratio():
    trace = flow(steps=40, step_size=0.01, noise=0.0).trace
    assert (trace.diff() > 0).all()
    assert len(trace) == 41


def test_schedules():
    constant = flow(steps=3, step_size=0.05, noise=0.1)
    for step_size, noise in (
        ([0.05] * 3, [0.1] * 3),
        (np.full(3, 0.05), torch.full((3,), 0.1, dtype=torch.float64)),
        (lambda k: 0.05, lambda k: 0.1),
    ):
        assert torch.equal(constant.z, flow(steps=3, step_size=step_size, noise=noise).z)
    # step by step is the whole, where the noise of a step is its number's
    by_hand = starts()
    for k, eta in enumerate([0.05, 0.02]):
        _, slope = logit_and_slope(by_hand)
        normal = philox_normal(by_hand.shape, 1, step=k, dtype=torch.float64)
        by_hand = by_hand + eta * slope + (2 * eta * 0.1 / (k + 1)) ** 0.5 * normal
    got = flow(steps=2, step_size=[0.05, 0.02], noise=lambda k: 0.1 / (k + 1))
    torch.testing.assert_close(got.z, by_hand, rtol=1e-12, atol=1e-13)


def test_a_prior_pulls_with_the_strength_of_the_noise():
    z = starts()
    _, slope = logit_and_slope(z)
    want = z + 0.05 * slope - 0.05 * 0.1 * z + 0.01**0.5 * philox_normal(z.shape, 1, dtype=torch.float64)
    torch.testing.assert_close(flow(steps=1, step_size=0.05, noise=0.1, prior="normal").z, want, rtol=1e-12, atol=1e-13)
    by_density = flow(steps=1, step_size=0.05, noise=0.1, prior=lambda z: -0.5 * z.square().sum(1))
    torch.testing.assert_close(by_density.z, want, rtol=1e-12, atol=1e-13)


def test_limit_law_with_a_prior():
    """N(0, 1) and log r = -(z - 1)^2 at gamma = 0.4: the drift is -(2 + gamma)(z - 2 / 2.4), a linear recursion."""
    eta, gamma, chains = 0.1, 0.4, 4000
    result = rx.latent_flow(
        lambda z: z, lambda x: -(x - 1).square().sum(1), torch.zeros(chains, 1, dtype=torch.float64),
        steps=40, step_size=eta, noise=gamma, prior="normal", seed=5, progress=False,
    )  # fmt: skip
    slope = 1 - eta * (2 + gamma)  # 0.76: forgotten to 2e-5
    variance = 2 * eta * gamma / (1 - slope**2)
    assert abs(result.z.mean() - 2 / 2.4) < 4.5 * (variance / chains) ** 0.5
    assert abs(result.z.var() - variance) < 4.5 * variance * (2 / chains) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    want = flow(starts(), steps=4, step_size=0.05, noise=0.1)
    got = flow(starts(dtype=dtype), steps=4, step_size=0.05, noise=0.1)
    assert got.z.dtype == got.x.dtype == dtype and got.trace.dtype == torch.float64
    # roundings of the state, of four steps, where slopes are up to ten
    torch.testing.assert_close(got.z.double(), want.z, rtol=0, atol=60 * torch.finfo(dtype).eps)


def test_the_noise_does_not_depend_on_the_batch():
    seeds = torch.tensor([5, 17, 5, 2**62, 1, 3, 4])
    z = starts()
    z[2] = z[0]
    all_ = flow(z, seed=seeds, steps=3, noise=0.3)
    some = flow(z[[3, 1]], seed=seeds[[3, 1]], steps=3, noise=0.3)
    assert torch.equal(all_.z[[3, 1]], some.z)
    assert torch.equal(all_.z[0], all_.z[2])
    whole = flow(z, steps=3, noise=0.3)
    assert torch.equal(whole.z[:4], flow(z[:4], steps=3, noise=0.3).z)
    assert not torch.equal(whole.z, flow(z, steps=3, noise=0.3, seed=2).z)
    torch.manual_seed(4)
    unseeded = flow(z, steps=2, noise=0.3, seed=None)
    torch.manual_seed(4)
    assert torch.equal(unseeded.z, flow(z, steps=2, noise=0.3, seed=None).z)
    assert not torch.equal(unseeded.z, flow(z, steps=2, noise=0.3, seed=None).z)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_do_not_matter(batch_size):
    whole, parts = (flow(steps=4, noise=0.1, divergence="logD", batch_size=size) for size in (None, batch_size))
    for name in ("z", "x", "log_ratio", "trace"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name


def test_images_as_latents():
    z = torch.randn(3, 2, 4, 4)
    result = rx.latent_flow(
        lambda z: z.mean(1), lambda x: x.sum((1, 2), keepdim=True).flatten(1), z, steps=2, noise=0, step_size=0.1,
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(result.z, z + 0.1)
    assert result.x.shape == (3, 4, 4) and result.log_ratio.shape == (3,)


def test_modes_and_what_is_left_alone():
    network = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    critic = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1)).double()
    z = starts().requires_grad_()
    before, quiet = z.detach().clone(), {"check": False, "progress": False}

    def go():
        return rx.latent_flow(network, critic, z, steps=3, seed=2, **quiet)

    plain = go()
    with torch.no_grad():
        assert torch.equal(go().z, plain.z)
    with torch.inference_mode():
        assert torch.equal(go().z, plain.z)
        inside = rx.latent_flow(network, critic, z * 1, steps=3, seed=2, **quiet)
        assert torch.equal(inside.z, plain.z)
    assert torch.equal(z, before) and z.grad is None
    assert all(p.grad is None for p in [*network.parameters(), *critic.parameters()])
    assert not (plain.z.requires_grad or plain.x.requires_grad or plain.log_ratio.requires_grad)


def test_the_callback_sees_every_iterate():
    seen = []
    result = flow(steps=3, noise=0.0, callback=lambda k, z, log_ratio: seen.append((k, z, log_ratio)))
    assert [k for k, _, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[0][1], starts()) and torch.equal(seen[3][1], result.z)
    torch.testing.assert_close(torch.stack([v.mean() for _, _, v in seen]), result.trace)


def test_early_stop_restores_the_best_iterate():
    goal = torch.full((2,), 0.2, dtype=torch.float64)

    def judge(x):
        return float((x - goal).square().mean())

    iterates = []
    flow(steps=30, noise=0.0, step_size=0.02, callback=lambda k, z, _: iterates.append(z))
    measures = [judge(generator(z)) for z in iterates]
    best = int(np.argmin(measures))
    assert 0 < best < 20  # neither end, and patience is spent
    result = flow(steps=30, noise=0.0, step_size=0.02, early_stop=judge, patience=4)
    assert result.step == best
    assert torch.equal(result.z, iterates[best]) and torch.equal(result.x, generator(iterates[best]))
    assert torch.equal(result.log_ratio, logit(result.x))
    assert result.measure.tolist() == measures[: best + 5] and len(result.trace) == best + 5
    rising = iter(range(100))
    worse = flow(steps=9, early_stop=lambda x: next(rising), patience=3)
    assert worse.step == 0 and torch.equal(worse.z, starts()) and worse.measure.tolist() == [0, 1, 2, 3]


def test_early_stop_by_held_out_samples():
    """The generated law is off by 1 along each axis; the discriminator's slope would carry it past the data."""
    g = torch.Generator().manual_seed(0)
    real, z = torch.randn(400, 2, generator=g), torch.randn(400, 2, generator=g)
    result = rx.latent_flow(
        lambda z: z - 1.0, lambda x: x.sum(1), z, steps=40, step_size=0.1, noise=0, early_stop=real, progress=False
    )
    assert result.step == pytest.approx(10, abs=1)
    assert result.measure[result.step] == result.measure.min() < 0.02 < result.measure[0]
    assert float(result.measure[0]) == pytest.approx(energy_distance(real.numpy(), (z - 1.0).numpy()), rel=1e-6)


def test_a_fitted_discriminator_is_used_as_calibrated():
    real, fake = gaussians(400, shift=1.5)
    disc = fit(real, fake)
    disc.temperature = 0.5
    z = fake[:50].clone()
    x = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(disc.log_ratio(x).sum(), x)
    result = rx.latent_flow(lambda z: z, disc, z, steps=1, step_size=0.2, noise=0, progress=False)
    torch.testing.assert_close(result.z, z + 0.2 * slope)
    torch.testing.assert_close(result.log_ratio, disc.log_ratio(result.x))
    assert result.trace[1] > result.trace[0]


Affine = nn.Linear(2, 2).double()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"generator": 3}, TypeError, "generator must be callable, got int"),
        ({"discriminator": None}, TypeError, "discriminator must be callable, got NoneType"),
        ({"generator": lambda z: z.detach()}, ValueError, "generator's output has no gradient in its latents"),
        (
            {"generator": lambda z: z > 0},
            ValueError,
            "no gradient in its latents; it is torch.bool",
        ),
        ({"generator": lambda z: Affine(z.detach())}, ValueError, "generator's output has no gradient in its latents"),
        ({"generator": lambda z: z[:3]}, ValueError, "generator must return [7, ...] for 7 latents, got [3, 2]"),
        ({"generator": lambda z: z.tolist()}, TypeError, "generator must return a tensor, got list"),
        (
            {"discriminator": lambda x: logit(x.detach())},
            ValueError,
            "discriminator's output has no gradient in its samples",
        ),
        (
            {"discriminator": lambda x: Affine(x.detach())[:, 0]},
            ValueError,
            "discriminator's output has no gradient in its samples",
        ),
        (
            {"discriminator": lambda x: x},
            ValueError,
            "must return [7] or [7, 1], got [7, 2]",
        ),
        ({"discriminator": lambda x: 1.0}, TypeError, "discriminator must return a tensor of [7] outputs, got float"),
        (
            {"discriminator": nn.Sequential(Affine, nn.Sigmoid())},
            ValueError,
            "ends in Sigmoid: these are probabilities",
        ),
        ({"discriminator": lambda x: x.sum(1, keepdim=True).sigmoid()}, ValueError, "returns a sigmoid: these are"),
        ({"z": 3}, TypeError, "z must be a torch.Tensor, got int"),
        ({"z": torch.ones(4, dtype=torch.int64)}, TypeError, "z must be float64"),
        ({"z": torch.ones(4)}, ValueError, "z must be [B, ...] with at least 2 dimensions, got [4]"),
        ({"z": torch.ones(0, 4)}, ValueError, "z must not be empty"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps must be an int"),
        ({"step_size": 0.0}, ValueError, "step_size must be finite and above 0, got 0.0 at step 0"),
        ({"step_size": [0.1, float("nan")]}, ValueError, "step_size must be finite and above 0, got nan at step 1"),
        ({"step_size": [0.1]}, ValueError, "step_size must have one number for each of 2 steps, got 1"),
        ({"step_size": object()}, TypeError, "step_size must be a number, 2 numbers or a function of the step"),
        ({"noise": -1}, ValueError, "noise must be finite and at least 0, got -1 at step 0"),
        ({"divergence": "log_d"}, ValueError, "alpha:<a>, got 'log_d' (or logD)"),
        ({"divergence": "alpha:1"}, ValueError, "alpha must be a finite number other than 0"),
        ({"divergence": "logD", "kind": "variational"}, ValueError, "which logD is not"),
        ({"divergence": 3}, TypeError, "divergence must be a string, got int"),
        ({"kind": "probability"}, ValueError, "kind must be one of variational, logit, got 'probability'"),
        ({"shift": torch.zeros(3)}, TypeError, "shift must be a number or a 0-dim tensor"),
        ({"prior": "gaussian"}, ValueError, "prior must be 'normal' or a log density z -> [B], got 'gaussian'"),
        ({"prior": 3.0}, TypeError, "prior must be 'normal' or a log density z -> [B], got float"),
        ({"prior": lambda z: z}, ValueError, "prior must return log densities [7], got [7, 2]"),
        ({"seed": 2**64}, ValueError, "seed must be between -2**63 and 2**64 - 1"),
        ({"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor, got float"),
        (
            {"seed": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "must be an int, or int64 [7] on cpu, got torch.int64 [3]",
        ),
        ({"patience": 0, "early_stop": lambda x: 0.0}, ValueError, "patience must be at least 1"),
        ({"early_stop": lambda x: float("nan")}, ValueError, "early_stop returned NaN at step 0"),
        ({"early_stop": 3}, TypeError, "early_stop must be a NumPy array or a torch tensor, got int"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"discriminator": lambda x: logit(x) * float("nan")}, ValueError, "at step 0: the discriminator or"),
        ({"step_size": 1e200, "discriminator": lambda x: -x.square().sum(1)}, ValueError, "the steps may be too large"),
    ],
)
def test_errors(change, error, text):
    options = {"generator": generator, "discriminator": logit, "z": starts(), "steps": 2, "progress": False, **change}
    with pytest.raises(error) as caught:
        rx.latent_flow(options.pop("generator"), options.pop("discriminator"), options.pop("z"), **options)
    message = str(caught.value)
    assert message.startswith("latent_flow: ") and text in message and "\n" not in message


def test_a_discriminator_of_its_own_calibration_takes_no_reading():
    real, fake = gaussians(60)
    disc = fit(real, fake, max_epochs=2)
    with pytest.raises(ValueError, match="kind and shift must be left out for a discriminator with a log_ratio"):
        rx.latent_flow(lambda z: z, disc, fake, kind="logit", progress=False)


def test_a_step_outside_the_domain_is_named():
    def beyond(x):  # log 2 is the supremum of jensen_shannon's dual
        return x.sum(1)

    beyond.kind, beyond.divergence = "variational", "jensen_shannon"
    with pytest.raises(ValueError, match=r"NaN .* at step 0: .* outside the domain of f\*"):
        rx.latent_flow(lambda z: z, beyond, torch.ones(3, 2), progress=False)


def test_a_network_in_training_mode_is_told():
    noisy = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).double()
    with pytest.warns(UserWarning, match=r"latent_flow: generator is in training mode and has Dropout"):
        rx.latent_flow(noisy, logit, starts(), steps=1, check=False, progress=False)


def test_values_like_probabilities_are_told():
    with pytest.warns(UserWarning, match="latent_flow: all 20 outputs of the discriminator are between 0 and 1"):
        rx.latent_flow(torch.sigmoid, lambda x: x.mean(1), torch.randn(20, 3), steps=1, progress=False)


@pytest.mark.parametrize("call", ["kl", "logD", "variational", "prior", "early stop", "langevin", "metropolis"])
def test_nothing_is_read_in_a_step(call, monkeypatch):
    """On CUDA the only read is `finish`, at the end; on the CPU it comes at every step, and is left out here."""
    monkeypatch.setattr(latent.LatentRatio, "finish", lambda self: None)

    def other(x):
        return logit(x) - 20

    other.kind, other.divergence = "variational", "reverse_kl"
    options = {"steps": 3, "seed": torch.arange(7), "batch_size": 4, "check": False, "progress": False}
    with HostReads() as reads:
        if call in ("langevin", "metropolis"):
            rx.latent_langevin(generator, logit, starts(), metropolis=call == "metropolis", **options)
        else:
            options |= {"prior": "normal"} if call == "prior" else {}
            options |= {"early_stop": lambda x: float(x.mean())} if call == "early stop" else {}
            divergence = call if call in ("kl", "logD") else "pearson_chi2"
            rx.latent_flow(generator, other if call == "variational" else logit, starts(), divergence=divergence,
                           noise=0.1, step_size=1e-6, **options)  # fmt: skip
    assert bool(reads.names) == (call == "early stop")  # which reads its measure: the count counts
