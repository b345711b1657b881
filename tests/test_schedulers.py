"""Wrapped schedulers of the installed diffusers: guided by the exact ratio, they walk as with the true model."""

from __future__ import annotations

import copy
import gc
import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from gaussian_mixture import LogRatio, true_and_biased
from torch._subclasses.fake_tensor import FakeTensorMode

import refine_ext as rx
from refine_ext.schedulers import noise_levels

diffusers = pytest.importorskip("diffusers")

# Of diffusers' own code with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 8
SHAPE = (5, 2, 2, 2)
TRUE, BIASED = true_and_biased(8)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

# name, configuration, arguments of every step.
CASES = [
    ("DDPMScheduler", {"clip_sample": False}, {}),
    ("DDIMScheduler", {"clip_sample": False}, {}),
    ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, {"eta": 0.7}),
    ("EulerDiscreteScheduler", {}, {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"s_churn": 2.0}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("HeunDiscreteScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}, {}),
    ("UniPCMultistepScheduler", {}, {}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "predict_x0": False, "final_sigmas_type": "sigma_min"}, {}),
]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
FLOW_CASES = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    ("DPMSolverMultistepScheduler", FLOW, {}),
    ("UniPCMultistepScheduler", FLOW, {}),
]


def parameters():
    for name, config, options in CASES:
        for prediction in PREDICTIONS:
            if not (name == "EulerAncestralDiscreteScheduler" and prediction == "sample"):  # diffusers has none
                yield pytest.param(name, {**config, "prediction_type": prediction}, options, id=f"{name}-{prediction}")
    for name, config, options in FLOW_CASES:
        yield pytest.param(name, config, options, id=f"{name}-flow")


def levels_of_input(scheduler, name: str, index: int, timestep) -> tuple[float, float]:
    """alpha and sigma of what the model sees at the index-th evaluation."""
    if name in ("DDPMScheduler", "DDIMScheduler"):
        product = scheduler.alphas_cumprod[int(timestep)].double()
        return product.sqrt().item(), (1 - product).sqrt().item()
    sigma = scheduler.sigmas[index].double().item()
    if name.startswith("Flow") or scheduler.config.get("use_flow_sigmas"):
        return 1 - sigma, sigma
    norm = (1 + sigma**2) ** 0.5
    return 1 / norm, sigma / norm


def walk(scheduler, name: str, mixture, options: dict, x: torch.Tensor, steps: int = STEPS) -> list[torch.Tensor]:
    """The states of a run with the mixture's own prediction as the model."""
    scheduler.set_timesteps(steps)
    torch.manual_seed(3)  # of those that do not use the generator for all they draw
    generator = torch.Generator().manual_seed(3)
    takes = inspect.signature(scheduler.step).parameters
    options = {**options, **({"generator": generator} if "generator" in takes else {})}
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    what = scheduler.config.get("prediction_type", "flow_prediction")
    states = []
    for index, timestep in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        alpha, sigma = levels_of_input(scheduler, name, index, timestep)
        # At pure noise there is no guidance: the true model's own first step is the biased one's here.
        model = BIASED if alpha == 0 else mixture
        prediction = model.predict(seen, max(alpha, 1e-12), sigma, what)
        x = scheduler.step(prediction, timestep, x, **options, return_dict=False)[0]
        states.append(x)
    return states


@pytest.mark.parametrize(("name", "config", "options"), list(parameters()))
def test_guided_trajectory_is_the_true_models(name, config, options):
    make = getattr(diffusers, name)
    plain = make(**config)
    discriminator = LogRatio(TRUE, BIASED)
    guided = rx.wrap_scheduler(plain, discriminator)
    noise = torch.randn(SHAPE, dtype=torch.float64)
    got = walk(guided, name, BIASED, options, noise)
    want = walk(make(**config), name, TRUE, options, noise)
    unguided = walk(make(**config), name, BIASED, options, noise)
    at_pure_noise = name.startswith("FlowMatch")  # its first step, where the discriminator is not asked
    assert len(discriminator.levels) == len(guided.timesteps) - at_pure_noise
    # Of a state of up to 157: those that compute in float32 round every step by 6e-8 (measured: 4e-6); Heun keeps
    # float64 but divides the model's input by a float32 norm, so that model and discriminator are asked 6e-8 apart
    # (measured: 7e-9); the others keep 1e-16, which grows with the distance of neighbouring trajectories.
    in_float32 = ("Euler", "EulerAncestral", "FlowMatchEuler", "DPMSolver")
    tolerance = 2e-5 if name.startswith(in_float32) else 1e-7 if name.startswith("Heun") else 1e-10
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert (unguided[-1] - want[-1]).abs().max() > 100 * tolerance  # the test would see a missing guidance
    assert type(plain) is make and not hasattr(plain, "guide")


def test_heun_is_guided_in_both_halves_at_its_own_levels():
    discriminator = LogRatio(TRUE, BIASED)
    guided = rx.wrap_scheduler(diffusers.HeunDiscreteScheduler(), discriminator)
    walk(guided, "HeunDiscreteScheduler", BIASED, {}, torch.randn(SHAPE), steps=3)
    got = [level.unique().item() for level in discriminator.levels]
    assert got == pytest.approx(guided.sigmas[:-1].tolist())  # every inner level twice
    assert len(got) == 5


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_scaled_latents_reach_the_discriminator_unscaled(name, prediction):
    """The host diffuses 0.18 z; the discriminator knows z = x_0 / 0.18 and its own noise levels."""
    scale = 0.18
    config = {} if name.startswith("Flow") else {"prediction_type": prediction}
    config |= {"clip_sample": False} if name == "DDIMScheduler" else {}
    make = getattr(diffusers, name)
    plain = make(**config)
    guided = rx.wrap_scheduler(plain, LogRatio(TRUE, BIASED), latent_scale=scale)
    noise = torch.randn(SHAPE, dtype=torch.float64)
    # Started below pure noise, which is not guided.
    steps = 6
    for scheduler in (plain, guided):
        scheduler.set_timesteps(steps)
    what = plain.config.get("prediction_type", "flow_prediction")
    for index, timestep in enumerate(guided.timesteps):
        alpha, sigma = levels_of_input(guided, name, index, timestep)
        if alpha == 0:
            plain.step(noise, timestep, noise)
            guided.step(noise, timestep, noise)
            continue
        x = guided.scale_model_input(noise, timestep) if hasattr(guided, "scale_model_input") else noise
        biased, true = (m.scaled(scale).predict(x, alpha, sigma, what) for m in (BIASED, TRUE))
        if hasattr(plain, "scale_model_input"):
            plain.scale_model_input(noise, timestep)
        got = guided.step(biased, timestep, noise).prev_sample
        want = plain.step(true, timestep, noise).prev_sample
        # One step: the float32 rounding of a state of unit size in Euler and flow, else float64's.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_weight_shift_and_range_are_the_guides():
    """One DDIM step against the formula: noise - w sigma c(h - nu) grad h, and nothing outside the range."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    direction = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    options = {"kind": "variational", "divergence": "pearson_chi2", "shift": 0.25}
    for sigma_max in (float("inf"), 0.1):
        guided = rx.wrap_scheduler(
            scheduler, lambda x, sigma: 0.1 * (x @ direction), weight=1.5, sigma_max=sigma_max, **options
        )
        plain = diffusers.DDIMScheduler(clip_sample=False)
        for each in (plain, guided):
            each.set_timesteps(10)
        timestep = guided.timesteps[5]
        x, noise = torch.randn(2, 3, 4, dtype=torch.float64)
        product = scheduler.alphas_cumprod[timestep].double()
        alpha, sigma = product.sqrt(), (1 - product).sqrt()
        ratio = 1 + (0.1 * (x / alpha) @ direction - 0.25) / 2  # pearson_chi2: r = 1 + t/2, c = 1/(2r)
        corrected = noise - 1.5 * sigma * (0.1 * direction / alpha) / (2 * ratio[:, None])
        want = plain.step(corrected if sigma_max > 1 else noise, timestep, x).prev_sample
        torch.testing.assert_close(guided.step(noise, timestep, x).prev_sample, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted({case[0] for case in CASES + FLOW_CASES}))
def test_a_range_that_no_step_is_in_is_an_error(name):
    make = getattr(diffusers, name)
    discriminator = lambda x, sigma: x.flatten(1).sum(1)  # noqa: E731
    guided = rx.wrap_scheduler(make(), discriminator, sigma_min=1e5)
    with pytest.raises(ValueError, match=r"none of the scheduler's noise levels, .* range, 1e\+05 to inf: nothing"):
        guided.set_timesteps(5)
    # 5e4 <= sigma / latent_scale for sigma = 1 and more, which every scheduler has.
    guided = rx.wrap_scheduler(make(), discriminator, sigma_min=5e4, latent_scale=2e-5)
    take_a_step(guided)


def test_learned_variance_is_left_alone():
    config = {"variance_type": "learned_range", "clip_sample": False}
    plain = diffusers.DDPMScheduler(**config)
    guided = rx.wrap_scheduler(plain, LogRatio(TRUE, BIASED))
    for each in (plain, guided):
        each.set_timesteps(4)
    x, variance = torch.randn(2, *SHAPE, dtype=torch.float64)
    timestep = plain.timesteps[1]
    alpha, sigma = levels_of_input(plain, "DDPMScheduler", 1, timestep)
    results = []
    for scheduler, mixture in ((guided, BIASED), (plain, TRUE)):
        output = torch.cat([mixture.predict(x, alpha, sigma, "epsilon"), variance], dim=1)
        generator = torch.Generator().manual_seed(0)
        results.append(scheduler.step(output, timestep, x, generator=generator).prev_sample)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_with_a_float32_discriminator(dtype):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 1))

    class Discriminator(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x, sigma):
            return self.module(x)

    guided = rx.wrap_scheduler(diffusers.EulerDiscreteScheduler(), Discriminator())
    plain = diffusers.EulerDiscreteScheduler()
    for each in (plain, guided):
        each.set_timesteps(5)
        each.scale_model_input(torch.zeros(SHAPE), each.timesteps[0])
    x, noise = 10 * torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)
    sigma = plain.sigmas[0]
    weight = module[1].weight.detach().reshape(SHAPE[1:])
    got = guided.step(noise, guided.timesteps[0], x).prev_sample
    want = plain.step((noise.float() - sigma * weight).to(dtype), plain.timesteps[0], x).prev_sample
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=0, atol=2 * torch.finfo(dtype).eps * float(want.abs().max()))


def test_extra_goes_to_the_discriminator():
    seen = []

    def discriminator(x, sigma, labels):
        seen.append(labels)
        return x.flatten(1).sum(1) * labels

    guided = rx.wrap_scheduler(diffusers.DDIMScheduler(), discriminator)
    guided.set_timesteps(4)
    x = torch.randn(SHAPE)
    labels = torch.arange(5.0)
    guided.discriminator_extra = {"labels": labels}
    guided.step(x, guided.timesteps[0], x)
    guided.discriminator_extra = lambda timestep: {"labels": labels + timestep}
    guided.step(x, guided.timesteps[1], x)
    assert torch.equal(seen[0], labels) and torch.equal(seen[1], labels + guided.timesteps[1])
    with pytest.raises(TypeError, match="discriminator_extra must be a dict or a function, got str"):
        guided.discriminator_extra = "labels"


@pytest.mark.parametrize("name", sorted({case[0] for case in CASES + FLOW_CASES}))
def test_wrapper_is_a_scheduler_of_its_class(name, tmp_path):
    make = getattr(diffusers, name)
    config = {"shift": 2.0} if name.startswith("Flow") else {"beta_end": 0.013}
    plain = make(**config)
    guided = rx.wrap_scheduler(plain, lambda x, sigma: x.flatten(1).sum(1))
    assert isinstance(guided, make) and type(guided).__name__ == name
    for method in ("step", "set_timesteps", "__init__"):
        assert inspect.signature(getattr(guided, method)) == inspect.signature(getattr(plain, method))
    assert dict(guided.config) == dict(plain.config)
    guided.save_pretrained(tmp_path)
    loaded = make.from_pretrained(tmp_path)
    assert type(loaded) is make
    assert all(loaded.config[key] == value for key, value in config.items())
    # Made anew by its own class it is guided, by the class of diffusers it is not.
    again = type(guided).from_config(guided.config)
    assert again.guide is guided.guide
    assert not hasattr(make.from_config(guided.config), "guide")
    take_a_step(again)


def take_a_step(scheduler) -> None:
    scheduler.set_timesteps(5)
    x = torch.randn(SHAPE)
    scheduler.step(x, scheduler.timesteps[0], x)


def test_copies_share_the_discriminator():
    discriminator = torch.nn.Module()
    discriminator.forward = lambda x, sigma: x.flatten(1).sum(1)
    guided = rx.wrap_scheduler(diffusers.DDIMScheduler(), discriminator)
    copied = copy.deepcopy(guided)
    assert copied.guide.discriminator is discriminator
    take_a_step(copied)
    del guided, copied
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gc.collect()


def test_a_dropped_wrapper_warns():
    guided = rx.wrap_scheduler(diffusers.DDIMScheduler(), lambda x, sigma: x.flatten(1).sum(1))
    with pytest.warns(UserWarning, match="a wrapped DDIMScheduler never took a step"):
        del guided
        gc.collect()


def test_an_unused_wrapper_warns_at_exit():
    code = (
        "import diffusers, refine_ext as rx\n"
        "guided = rx.wrap_scheduler(diffusers.DDIMScheduler(), lambda x, sigma: x.sum(1))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "a wrapped DDIMScheduler never took a step" in result.stderr


def test_schedulers_that_are_not_supported_are_named():
    discriminator = lambda x, sigma: x.sum(1)  # noqa: E731
    with pytest.raises(
        TypeError, match=r"one of diffusers' DDPMScheduler, .*FlowMatchEulerDiscreteScheduler, got PNDM"
    ):
        rx.wrap_scheduler(diffusers.PNDMScheduler(), discriminator)
    with pytest.raises(TypeError, match="got NoneType"):
        rx.wrap_scheduler(None, discriminator)
    with pytest.raises(ValueError, match=r"prediction_type must be one of epsilon, .* got 'nothing'"):
        rx.wrap_scheduler(diffusers.DDIMScheduler(prediction_type="nothing"), discriminator)
    with pytest.raises(ValueError, match="invert_sigmas is not supported"):
        rx.wrap_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), discriminator)
    with pytest.raises(TypeError, match="must be callable"):
        rx.wrap_scheduler(diffusers.DDIMScheduler(), 3)
    with pytest.raises(ValueError, match="latent_scale must be positive and finite, got 0"):
        rx.wrap_scheduler(diffusers.DDIMScheduler(), discriminator, latent_scale=0)
    with pytest.raises(ValueError, match="kind: give these to the Guide"):
        rx.wrap_scheduler(diffusers.DDIMScheduler(), rx.Guide(discriminator), kind="logit")


@pytest.mark.filterwarnings("ignore:wrap_scheduler")
def test_bad_steps_are_named():
    guided = rx.wrap_scheduler(diffusers.DDIMScheduler(), lambda x, sigma: x.flatten(1).sum(1))
    with pytest.raises(
        ValueError, match=r"guided already; DDIMScheduler.from_config\(scheduler.config\) is a plain one"
    ):
        rx.wrap_scheduler(guided, lambda x, sigma: x.sum(1))
    guided.set_timesteps(2)
    with pytest.raises(
        ValueError,
        match=r"wrap_scheduler: the model's prediction must have the shape of its input, \[5, 2, 2, 2\], got \[5, 3,",
    ):
        guided.step(torch.zeros(5, 3, 2, 2), guided.timesteps[0], torch.zeros(SHAPE))
    flow = rx.wrap_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), lambda x, sigma: x.flatten(1).sum(1))
    flow.set_timesteps(2)
    x = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="per_token_timesteps are not supported"):
        flow.step(x, flow.timesteps[0], x, per_token_timesteps=torch.ones(2, 4))
    nan = rx.wrap_scheduler(diffusers.DDIMScheduler(), lambda x, sigma: x.flatten(1).sum(1) * float("nan"))
    nan.set_timesteps(2)
    with pytest.raises(ValueError, match="discriminator returned NaN"):
        nan.step(torch.zeros(SHAPE), nan.timesteps[0], torch.zeros(SHAPE))


def test_a_timestep_on_the_device_is_looked_up_there():
    """A fake CUDA tensor has no value that could be waited for: asking for one is an error."""
    scheduler = diffusers.DDIMScheduler()
    with FakeTensorMode(allow_non_fake_inputs=True):
        timestep = torch.empty((), dtype=torch.int64, device="cuda")
        alpha, sigma, norm = noise_levels(scheduler, "DDIMScheduler", timestep)
    assert alpha.device.type == sigma.device.type == "cuda" and norm == 1.0


def pull(direction):
    return lambda x, sigma: 0.1 * (x * direction).flatten(1).sum(1)


@pytest.mark.cuda
@pytest.mark.parametrize("name", sorted({case[0] for case in CASES + FLOW_CASES}))
def test_on_cuda(name):
    """As on the CPU, and after the first step, whose values are looked at, the correction waits for nothing."""
    make, states = getattr(diffusers, name), []
    direction, x, output = torch.randn(3, *SHAPE)
    for device in ("cpu", "cuda"):
        guided = rx.wrap_scheduler(make(), pull(direction.to(device)))
        guided.set_timesteps(5, device=device)
        state = x.to(device)
        for timestep in guided.timesteps[:3]:
            if hasattr(guided, "scale_model_input"):
                guided.scale_model_input(state, timestep)
            generator = {"generator": torch.Generator().manual_seed(0)}
            taken = generator if "generator" in inspect.signature(guided.step).parameters else {}
            state = guided.step(output.to(device), timestep, state, **taken).prev_sample
        states.append(state.cpu())
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-4)
    arguments = (output.cuda(), guided.timesteps[3], state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        guided._refine_hook.refine(guided, name, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_zero_terminal_signal_is_not_guided():
    discriminator = LogRatio(TRUE, BIASED)
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    guided = rx.wrap_scheduler(diffusers.DDIMScheduler(**config), discriminator)
    plain = diffusers.DDIMScheduler(**config)
    for each in (plain, guided):
        each.set_timesteps(4)
    x, velocity = torch.randn(2, *SHAPE)
    assert plain.alphas_cumprod[plain.timesteps[0]] == 0
    want = plain.step(velocity, plain.timesteps[0], x).prev_sample
    assert torch.equal(guided.step(velocity, guided.timesteps[0], x).prev_sample, want)
