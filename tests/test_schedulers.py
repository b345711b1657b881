"""Wrapped schedulers of the installed diffusers: guided by the exact ratio, they walk as if the model were the true one."""

from __future__ import annotations

import gc
import inspect
import warnings

import pytest
import torch
from gaussian_mixture import LogRatio, true_and_biased

import refine_ext as rx

diffusers = pytest.importorskip("diffusers")

STEPS = 8
SHAPE = (5, 2, 2, 2)
TRUE, BIASED = true_and_biased(8)
VP = {"beta_schedule": "linear"}
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
    ("UniPCMultistepScheduler", {"solver_order": 3, "predict_x0": False}, {}),
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


@pytest.mark.parametrize(("name", "config", "options"), parameters())
def test_guided_trajectory_is_the_true_models(name, config, options):
    make = getattr(diffusers, name)
    plain = make(**config)
    discriminator = LogRatio(TRUE, BIASED)
    guided = rx.wrap_scheduler(plain, discriminator)
    noise = torch.randn(SHAPE, dtype=torch.float64)
    got = walk(guided, name, BIASED, options, noise)
    want = walk(make(**config), name, TRUE, options, noise)
    unguided = walk(make(**config), name, BIASED, options, noise)
    assert len(discriminator.levels) == len(guided.timesteps)
    # The schedulers that convert the state to float32 round every step (6e-8) and grow that by sigma at most;
    # at sigmas[0] = 157 of x / sigma a float64 state keeps 1e-13.
    rounds = name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
    rounds = rounds or name.startswith("DPMSolver")
    tolerance = 2e-5 if rounds else 1e-10
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert (unguided[-1] - want[-1]).abs().max() > 100 * tolerance  # the test would see a missing guidance
    assert type(plain) is make and not hasattr(plain, "guide")
