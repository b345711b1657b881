"""DiscriminatorGuidance in the real denoising loops of diffusers' modular pipelines, with tiny random networks."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

import refine_ext as rx

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")  # diffusers' modular pipelines import it

STEPS = 5
BATCH, CHANNELS, SIZE = 2, 2, 4
SCALE = 0.25
torch.manual_seed(0)
DIRECTION = torch.randn(CHANNELS, SIZE, SIZE)
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning", "ignore:DiscriminatorGuidance.*never asked:UserWarning"
)


def discriminator(x, sigma):
    return 0.2 * (x * DIRECTION).flatten(1).sum(1)


class Flow:
    """Stable Diffusion 3: flow matching, an input by keyword."""

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler
    options = {"shift": 2.0}  # noqa: RUF012
    component = "transformer"

    @staticmethod
    def denoiser():
        return diffusers.SD3Transformer2DModel(
            sample_size=SIZE,
            patch_size=1,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            pos_embed_max_size=8,
        ).eval()

    @staticmethod
    def blocks():
        # Not in the oldest diffusers that is supported.
        host = pytest.importorskip("diffusers.modular_pipelines.stable_diffusion_3.denoise")
        return host.StableDiffusion3DenoiseStep()

    @staticmethod
    def conditions():
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return {name: torch.randn(BATCH, *((8,) if "pooled" in name else (3, 8))) for name in names}

    arguments = staticmethod(lambda conditions: conditions)

    @staticmethod
    def predict(denoiser, x, timestep, conditions, prefix):
        return denoiser(
            hidden_states=x,
            timestep=timestep.expand(BATCH),
            encoder_hidden_states=conditions[f"{prefix}prompt_embeds"],
            pooled_projections=conditions[f"{prefix}pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    @staticmethod
    def correction(sigma):
        """Of the velocity eps - x_0, by x = (1 - sigma) x_0 + sigma eps: h's gradient is DIRECTION / (1 - sigma)."""
        alpha = 1 - sigma
        return 0.0 if alpha == 0 else -sigma / alpha * 0.2 * DIRECTION / alpha


class Scaled:
    """Stable Diffusion XL: a noise prediction at an input by position that Euler divides by sqrt(1 + sigma^2)."""

    scheduler = diffusers.EulerDiscreteScheduler
    options = {"timestep_spacing": "leading"}  # noqa: RUF012
    component = "unet"

    @staticmethod
    def denoiser(in_channels=CHANNELS):
        return diffusers.UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=in_channels,
            out_channels=CHANNELS,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=2,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8 + 6 * 4,
        ).eval()

    @staticmethod
    def blocks():
        from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep

        return StableDiffusionXLDenoiseStep()

    @staticmethod
    def conditions():
        shapes = {"prompt_embeds": (3, 8), "pooled_prompt_embeds": (8,), "add_time_ids": (6,)}
        return {
            prefix + name: torch.randn(BATCH, *shape) for prefix in ("", "negative_") for name, shape in shapes.items()
        }

    arguments = staticmethod(lambda conditions: {"denoiser_input_fields": conditions})

    @staticmethod
    def predict(denoiser, x, timestep, conditions, prefix):
        added = {
            "text_embeds": conditions[f"{prefix}pooled_prompt_embeds"],
            "time_ids": conditions[f"{prefix}add_time_ids"],
        }
        hidden = conditions[f"{prefix}prompt_embeds"]
        return denoiser(x, timestep, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False)[0]

    @staticmethod
    def correction(sigma):
        """Of the noise, by x = x_0 + sigma eps."""
        return -sigma * 0.2 * DIRECTION


@pytest.fixture(params=[Flow, Scaled], ids=["flow", "euler"])
def host(request):
    torch.manual_seed(1)
    return request.param


def pipeline(host, denoiser, scheduler, guider=None):
    pipe = host.blocks().init_pipeline()
    pipe.update_components(**{host.component: denoiser, "scheduler": scheduler})
    pipe.update_components(guider=guider or diffusers.ClassifierFreeGuidance(guidance_scale=1.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, host, conditions, latents):
    pipe.scheduler.set_timesteps(STEPS)
    return pipe(
        latents=latents,
        timesteps=pipe.scheduler.timesteps,
        num_inference_steps=STEPS,
        **host.arguments(conditions),
        output="latents",
    )


def by_hand(host, denoiser, conditions, x, scale, corrected=range(STEPS), latent_scale=1.0):
    """The loop without guider: classifier-free guidance, and the correction in closed form."""
    scheduler = host.scheduler(**host.options)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for index, timestep in enumerate(scheduler.timesteps):
            seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            prediction, unconditional = (
                host.predict(denoiser, seen, timestep, conditions, p) for p in ("", "negative_")
            )
            prediction = unconditional + scale * (prediction - unconditional)
            if index in corrected:  # h of x / latent_scale
                prediction = prediction + host.correction(scheduler.sigmas[index].item()) / latent_scale
            x = scheduler.step(prediction, timestep, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("latent_scale", [1.0, SCALE])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_loop_is_corrected(host, scale, latent_scale, mode):
    denoiser, scheduler, conditions = host.denoiser(), host.scheduler(**host.options), host.conditions()
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(BATCH, CHANNELS, SIZE, SIZE) * getattr(scheduler, "init_noise_sigma", 1.0)
    inner = diffusers.ClassifierFreeGuidance(guidance_scale=scale)
    guider = rx.DiscriminatorGuidance(discriminator, scheduler, guider=inner, latent_scale=latent_scale)
    with mode():
        got = run(pipeline(host, denoiser, scheduler, guider), host, conditions, latents)
    want = by_hand(host, denoiser, conditions, latents, scale, latent_scale=latent_scale)
    plain = by_hand(host, denoiser, conditions, latents, scale, corrected=())
    # float32 rounding of states of up to 15, steps of up to 15 in sigma (Euler; sums of 20 terms of either sign).
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
    assert (plain - want).abs().max() > 0.1


def test_it_does_what_the_wrapped_scheduler_does(host):
    """Two ways to the same correction, in a pipeline with classifier-free guidance."""
    denoiser, conditions = host.denoiser(), host.conditions()
    latents = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    results = []
    for wrapped in (False, True):
        scheduler = host.scheduler(**host.options)
        inner = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)
        if wrapped:
            scheduler = rx.wrap_scheduler(scheduler, discriminator, weight=1.5)
        else:
            inner = rx.DiscriminatorGuidance(discriminator, scheduler, weight=1.5, guider=inner)
        results.append(run(pipeline(host, denoiser, scheduler, inner), host, conditions, latents))
    torch.testing.assert_close(*results, rtol=1e-4, atol=2e-4)


def test_part_of_the_steps(host):
    denoiser, scheduler, conditions = host.denoiser(), host.scheduler(**host.options), host.conditions()
    latents = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    guider = rx.DiscriminatorGuidance(discriminator, scheduler, start=0.4, stop=0.8)
    got = run(pipeline(host, denoiser, scheduler, guider), host, conditions, latents)
    want = by_hand(host, denoiser, conditions, latents, 1.0, corrected=(2, 3))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)


def test_disabled_it_is_the_conditional_prediction():
    host = Flow
    denoiser, scheduler, conditions = host.denoiser(), host.scheduler(**host.options), host.conditions()
    latents = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    guider = rx.DiscriminatorGuidance(discriminator, scheduler, guider=diffusers.ClassifierFreeGuidance(3.0))
    assert guider.num_conditions == 2
    guider.disable()
    assert guider.num_conditions == 1
    got = run(pipeline(host, denoiser, scheduler, guider), host, conditions, latents)
    torch.testing.assert_close(
        got, by_hand(host, denoiser, conditions, latents, 1.0, corrected=()), rtol=1e-4, atol=2e-4
    )
    guider.enable()
    assert guider.num_conditions == 2


def step(guider, sample, prediction, timestep, index=0, denoiser=None):
    """One step as the pipelines take it."""
    guider.set_state(index, STEPS, timestep)
    (batch,) = guider.prepare_inputs({"encoder_hidden_states": (prediction, None)})
    denoiser = torch.nn.Identity() if denoiser is None else denoiser
    guider.prepare_models(denoiser)
    denoiser(sample)
    batch.noise_pred = prediction
    guider.cleanup_models(denoiser)
    assert not denoiser._forward_pre_hooks
    return guider([batch])[0]


@pytest.mark.parametrize("way", ["torch.compile", "module.compile", "compiled before"])
def test_compiled_denoisers_are_seen(way):
    """Dynamo may not look for hooks that come after it has compiled: none of the ways to compile may miss one."""
    scheduler = diffusers.DDIMScheduler()
    guider = rx.DiscriminatorGuidance(lambda x, sigma: x.square().sum(1), scheduler)
    denoiser = torch.nn.Linear(3, 3)
    if way == "torch.compile":
        denoiser = torch.compile(denoiser, backend="eager")
    else:
        denoiser.compile(backend="eager")
    if way == "compiled before":
        denoiser(torch.randn(BATCH, 3))
    product = scheduler.alphas_cumprod[300]
    for _ in range(3):
        x = torch.randn(BATCH, 3)
        got = step(guider, x, torch.zeros(BATCH, 3), torch.tensor(300), denoiser=denoiser)
        torch.testing.assert_close(got, -(1 - product).sqrt() * 2 * x / product)


def test_leading_channels_and_tokens_are_the_state():
    """Inpainting networks see masks beside x_t, editing ones reference tokens after it."""
    scheduler = diffusers.DDIMScheduler()
    x, other = torch.randn(2, BATCH, 3, 5)
    weights = torch.randn(3, 5)
    guider = rx.DiscriminatorGuidance(lambda x, sigma: (x * weights).flatten(1).sum(1), scheduler)
    got = step(guider, torch.cat([x, other], dim=1), torch.zeros(BATCH, 3, 5), torch.tensor(300))
    product = scheduler.alphas_cumprod[300]
    want = -((1 - product) / product).sqrt() * weights.expand(BATCH, 3, 5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_extra_goes_to_the_discriminator():
    seen = []

    def with_label(x, sigma, label):
        seen.append(label)
        return x.sum(1)

    guider = rx.DiscriminatorGuidance(with_label, diffusers.DDIMScheduler(), discriminator_extra={"label": 3})
    x = torch.randn(BATCH, 3)
    step(guider, x, x, torch.tensor(300))
    guider.discriminator_extra = lambda timestep: {"label": timestep.item()}
    step(guider, x, x, torch.tensor(300))
    assert seen == [3, 300]


def test_settings_are_saved_and_the_rest_given_again(tmp_path):
    scheduler = diffusers.DDIMScheduler()
    guider = rx.DiscriminatorGuidance(
        discriminator,
        scheduler,
        weight=1.5,
        guider=diffusers.ClassifierFreeGuidance(3.0, stop=0.75),
        latent_scale=0.18,
        start=0.25,
        sigma_max=7.0,
        kind="variational",
        divergence="jensen_shannon",
        shift=-0.5,
    )
    guider.save_pretrained(tmp_path)
    again = rx.DiscriminatorGuidance.from_pretrained(tmp_path, discriminator=discriminator, scheduler=scheduler)
    changed = again.new(weight=0.5)
    for each in (again, changed):
        assert each.guide.discriminator is discriminator and each.scheduler is scheduler
        assert isinstance(each.guider, diffusers.ClassifierFreeGuidance)
        assert (each.guider.guidance_scale, each.guider._stop) == (3.0, 0.75)
        assert (each.latent_scale, each._start, each.guide.sigma_max) == (0.18, 0.25, 7.0)
        assert (each.guide.kind, each.guide.divergence, each.guide.shift) == ("variational", "jensen_shannon", -0.5)
    assert (guider.weight, again.weight, changed.weight) == (1.5, 1.5, 0.5)
    with pytest.raises(ValueError, match="discriminator, scheduler cannot be saved: give them again"):
        rx.DiscriminatorGuidance.from_pretrained(tmp_path)


def test_a_weight_that_cannot_be_saved_is_asked_for(tmp_path):
    given = {"discriminator": discriminator, "scheduler": diffusers.DDIMScheduler()}
    rx.DiscriminatorGuidance(**given, weight=lambda sigma: 1 / (1 + sigma)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weight cannot be saved: give them again"):
        rx.DiscriminatorGuidance.from_pretrained(tmp_path, **given)
    assert rx.DiscriminatorGuidance.from_pretrained(tmp_path, **given, weight=2.0).weight == 2.0


def test_a_scheduler_of_another_pipeline_is_an_error(host):
    """Its levels would be wrong: it stands still while the pipeline's own takes steps."""
    denoiser, scheduler, conditions = host.denoiser(), host.scheduler(**host.options), host.conditions()
    stale = host.scheduler(**host.options)
    stale.set_timesteps(STEPS)
    pipe = pipeline(host, denoiser, scheduler, rx.DiscriminatorGuidance(discriminator, stale))
    with pytest.raises(ValueError, match="its scheduler takes no steps; give it the one that the pipeline uses"):
        run(pipe, host, conditions, torch.randn(BATCH, CHANNELS, SIZE, SIZE))


def test_a_range_that_no_step_is_in_is_an_error(host):
    denoiser, scheduler, conditions = host.denoiser(), host.scheduler(**host.options), host.conditions()
    pipe = pipeline(host, denoiser, scheduler, rx.DiscriminatorGuidance(discriminator, scheduler, sigma_min=1e5))
    with pytest.raises(ValueError, match="DiscriminatorGuidance: none of the scheduler's noise levels"):
        run(pipe, host, conditions, torch.randn(BATCH, CHANNELS, SIZE, SIZE))


def test_bad_arguments_are_named():
    scheduler = diffusers.DDIMScheduler()
    with pytest.raises(TypeError, match="DiscriminatorGuidance: scheduler must be one of diffusers' DDPM"):
        rx.DiscriminatorGuidance(discriminator, diffusers.PNDMScheduler())
    with pytest.raises(TypeError, match="guider must be one of diffusers', got float"):
        rx.DiscriminatorGuidance(discriminator, scheduler, guider=3.0)
    with pytest.raises(ValueError, match="DiscriminatorGuidance: latent_scale must be positive"):
        rx.DiscriminatorGuidance(discriminator, scheduler, latent_scale=0)
    if hasattr(diffusers, "LTX2Guidance"):
        with pytest.raises(TypeError, match="LTX2Guidance works on denoised predictions; use wrap_scheduler"):
            rx.DiscriminatorGuidance(discriminator, scheduler, guider=diffusers.LTX2Guidance())
    guider = rx.DiscriminatorGuidance(discriminator, scheduler)
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    with pytest.raises(ValueError, match="saw a list; guide this pipeline by wrap_scheduler"):
        step(guider, list(x), x, torch.tensor(300))
    with pytest.raises(ValueError, match=r"input \[2, 32\] does not fit its prediction \[2, 2, 4, 4\]"):
        step(guider, x.flatten(1), x, torch.tensor(300))
    guider.set_state(0, STEPS, torch.tensor(300))  # a pipeline that never calls prepare_models
    with pytest.raises(ValueError, match="saw nothing; guide this pipeline by wrap_scheduler"):
        guider.forward(x)


@pytest.mark.filterwarnings("default")
def test_an_unused_guider_warns():
    guider = rx.DiscriminatorGuidance(discriminator, diffusers.DDIMScheduler())
    with pytest.warns(UserWarning, match="a guider was never asked for a prediction"):
        del guider
        gc.collect()


def test_without_diffusers_it_says_what_to_install():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"  # importing it is an error from here on
        "import refine_ext as rx\n"
        "rx.wrap_scheduler, rx.RefinedDenoiser, rx.post_cfg\n"
        "try: rx.DiscriminatorGuidance\n"
        "except ImportError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "refine-ext[diffusers]"' in result.stdout
