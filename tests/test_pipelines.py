"""Wrapped schedulers in pipelines of the installed diffusers, with small random networks and no files."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import refine_ext as rx

diffusers = pytest.importorskip("diffusers")

# Of diffusers' own code with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(1)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_pipelines(name, mode, unet, tmp_path):
    """A guided pipeline makes the images of an unguided one whose network is corrected itself, by hand."""
    make, scheduler = getattr(diffusers, f"{name}Pipeline"), getattr(diffusers, f"{name}Scheduler")
    direction = torch.randn(2, 8, 8)

    def run(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        return torch.from_numpy(pipe(batch_size=2, num_inference_steps=6, output_type="np", generator=generator).images)

    def correct(module, args, output):
        product = pipe.scheduler.alphas_cumprod[args[1]]
        return {"sample": output["sample"] - 0.3 * ((1 - product) / product).sqrt() * direction}

    def discriminator(x, sigma):
        return 0.3 * (x * direction).flatten(1).sum(1)

    with mode():
        pipe = make(unet, scheduler())
        plain = run(pipe)
        hook = unet.register_forward_hook(lambda *a: type(a[2])(**correct(*a)))
        want = run(pipe)
        hook.remove()
        pipe.scheduler = rx.wrap_scheduler(pipe.scheduler, discriminator)
        got = run(pipe)
    # float32 rounding of 6 steps of a state of unit size.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert (plain - want).abs().mean() > 0.01
    pipe.save_pretrained(tmp_path)
    again = make.from_pretrained(tmp_path)
    assert type(again.scheduler) is scheduler


def test_a_pipeline_that_makes_its_scheduler_anew_drops_the_wrapper_and_that_warns(unet):
    with pytest.warns(UserWarning, match="DDIMPipeline does, drops the wrapper"):
        pipe = diffusers.DDIMPipeline(unet, rx.wrap_scheduler(diffusers.DDIMScheduler(), lambda x, sigma: x.sum()))
        gc.collect()
    assert type(pipe.scheduler) is diffusers.DDIMScheduler


SCHEDULERS = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", {}),
]


def small_vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=1,
    )


@pytest.fixture(scope="module")
def stable_diffusion():
    """The pipeline with prompts given as embeddings."""
    pytest.importorskip("transformers")
    torch.manual_seed(2)
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    ).eval()
    pipe = diffusers.StableDiffusionPipeline(
        vae=small_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("start", ["noise", "image"])
@pytest.mark.parametrize(("name", "config"), SCHEDULERS)
def test_stable_diffusion(name, config, start, stable_diffusion):
    """Latents, of a discriminator of the VAE's unscaled ones, with classifier-free guidance; again a corrected network
    is the reference. The pipeline looks for eta and generator in the signature of step; from an image it begins in the
    middle of the schedule."""
    pipe, make = stable_diffusion, getattr(diffusers, name)
    given = {"height": 32, "width": 32}
    if start == "image":
        pipe = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        given = {"image": torch.randn(2, 4, 4, 4), "strength": 0.7}
    embeddings = {"prompt_embeds": torch.randn(2, 3, 8), "negative_prompt_embeds": torch.randn(2, 3, 8)}
    direction = 0.05 * torch.randn(4, 4, 4)
    scale = pipe.vae.config.scaling_factor
    assert scale == 0.18215

    def run(scheduler):
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(4)
        return pipe(
            **embeddings,
            **given,
            num_inference_steps=5,
            guidance_scale=3.0,
            eta=0.5,
            generator=generator,
            output_type="latent",
        ).images

    def correct(module, args, output):
        products = pipe.scheduler.alphas_cumprod
        sigma = np.interp(float(args[1]), np.arange(1000), ((1 - products) / products).sqrt().numpy())
        return (output[0] - float(sigma) * direction / scale,)

    plain = run(make(**config))
    hook = pipe.unet.register_forward_hook(correct)
    want = run(make(**config))
    hook.remove()
    guided = rx.wrap_scheduler(make(**config), lambda x, sigma: (x * direction).flatten(1).sum(1), latent_scale=scale)
    got = run(guided)
    size = want.abs().max()
    # float32 rounding, which 5 steps from sigma = 157 of a guided network grow.
    assert (got - want).abs().max() < 1e-4 * size
    assert (plain - want).abs().max() > 1e-2 * size


def test_stable_diffusion_3():
    """Flow matching: velocities of x = (1 - sigma) x_0 + sigma eps. Its first step, pure noise, is not guided."""
    pytest.importorskip("transformers")
    torch.manual_seed(2)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    ).eval()
    encoders = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.StableDiffusion3Pipeline(transformer=transformer, vae=small_vae(), scheduler=scheduler, **encoders)
    pipe.set_progress_bar_config(disable=True)
    prompts = {f"{kind}prompt_embeds": torch.randn(2, 3, 8) for kind in ("", "negative_")}
    prompts |= {f"{kind}pooled_prompt_embeds": torch.randn(2, 8) for kind in ("", "negative_")}
    direction = 0.5 * torch.randn(4, 4, 4)

    def run():
        generator = torch.Generator().manual_seed(4)
        options = {"height": 32, "width": 32, "num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "latent"}
        return pipe(**prompts, **options, generator=generator).images

    def correct(module, args, kwargs, output):
        sigma = kwargs["timestep"][0] / 1000
        return output if sigma == 1 else (output[0] - sigma / (1 - sigma) ** 2 * direction,)

    plain = run()
    hook = transformer.register_forward_hook(correct, with_kwargs=True)
    want = run()
    hook.remove()
    pipe.scheduler = rx.wrap_scheduler(pipe.scheduler, lambda x, sigma: (x * direction).flatten(1).sum(1))
    # float32 rounding of states of a hundred at most.
    torch.testing.assert_close(run(), want, rtol=1e-4, atol=1e-3)
    assert (plain - want).abs().max() > 1
