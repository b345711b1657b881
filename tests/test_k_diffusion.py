"""The samplers and wrappers of the installed k-diffusion, with a RefinedDenoiser in the model's place."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import pytest
import torch
from gaussian_mixture import LogRatio, true_and_biased

import refine_ext as rx

TRUE, BIASED = true_and_biased(8)
SHAPE = (4, 2, 2, 2)


@pytest.fixture(scope="module")
def k_diffusion():
    """k_diffusion's own sampling and external modules, without the package's __init__: that imports clip and
    torchvision for training and evaluation, which do not come with every build of torch."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        pytest.skip("needs k-diffusion")
    names = ("k_diffusion", "torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    before = {
        name: module for name, module in sys.modules.items() if name.split(".")[0] in ("k_diffusion", "torchvision")
    }
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "k_diffusion", package)
        if importlib.util.find_spec("torchvision") is None:
            for name in names[1:]:  # for its image files only
                module = types.ModuleType(name)
                patch.setitem(sys.modules, name, module)
                parent, _, child = name.rpartition(".")
                if parent:
                    setattr(sys.modules[parent], child, module)
        package.sampling = importlib.import_module("k_diffusion.sampling")
        package.external = importlib.import_module("k_diffusion.external")
        yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "k_diffusion" and name not in before]:
        del sys.modules[name]


def denoiser(mixture):
    return lambda x, sigma, **extra: mixture.predict(x, 1.0, sigma, "sample")


DETERMINISTIC = ["sample_euler", "sample_heun", "sample_dpm_2", "sample_lms", "sample_dpmpp_2m"]
ANCESTRAL = ["sample_euler_ancestral", "sample_dpm_2_ancestral", "sample_dpmpp_2s_ancestral"]


@pytest.mark.parametrize("name", [*DETERMINISTIC, *ANCESTRAL])
def test_samplers_walk_as_with_the_true_model(name, k_diffusion):
    sample = getattr(k_diffusion.sampling, name)
    sigmas = k_diffusion.sampling.get_sigmas_karras(8, 0.02, 20.0).double()
    discriminator = LogRatio(TRUE, BIASED)
    x = 20 * torch.randn(SHAPE, dtype=torch.float64)

    def run(model):
        torch.manual_seed(3)  # the ancestral samplers draw from torch's own generator
        return sample(model, x, sigmas, extra_args={}, disable=True)

    got, want = run(rx.RefinedDenoiser(denoiser(BIASED), discriminator)), run(denoiser(TRUE))
    # float64 rounding of states of up to 60, grown by the distance of neighbouring trajectories.
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert (run(denoiser(BIASED)) - want).abs().max() > 1e-3
    evaluations = {"sample_heun": 15, "sample_dpm_2": 15, "sample_dpm_2_ancestral": 15, "sample_dpmpp_2s_ancestral": 15}
    assert len(discriminator.levels) == evaluations.get(name, 8)


@pytest.mark.parametrize("name", ["sample_dpmpp_sde", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"])
def test_stochastic_samplers(name, k_diffusion):
    sampling = k_diffusion.sampling
    sigmas = sampling.get_sigmas_karras(8, 0.02, 20.0).double()
    x = 20 * torch.randn(SHAPE, dtype=torch.float64)

    def run(model):
        noise = sampling.BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max(), seed=5)
        return getattr(sampling, name)(model, x, sigmas, disable=True, noise_sampler=noise)

    got, want = run(rx.RefinedDenoiser(denoiser(BIASED), LogRatio(TRUE, BIASED))), run(denoiser(TRUE))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert (run(denoiser(BIASED)) - want).abs().max() > 1e-3


@pytest.mark.parametrize("wrapper", ["VDenoiser", "DiscreteEpsDDPMDenoiser", "DiscreteVDDPMDenoiser"])
def test_around_its_wrappers(wrapper, k_diffusion):
    """Refined around k-diffusion's own denoisers, whose attributes and extra arguments pass through."""
    products = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    kind = "epsilon" if "Eps" in wrapper else "v_prediction"
    asked = []

    class Model(torch.nn.Module):
        def __init__(self, mixture):
            super().__init__()
            self.mixture = mixture

        def forward(self, x, t, label):
            asked.append(label)
            if wrapper == "VDenoiser":
                alpha, sigma = torch.cos(t * torch.pi / 2).double(), torch.sin(t * torch.pi / 2).double()
            else:
                sigma = denoisers[self.mixture].t_to_sigma(t).double()
                alpha = torch.rsqrt(1 + sigma**2)
                sigma = alpha * sigma
            return self.mixture.predict(x, alpha, sigma, kind)

    make = getattr(k_diffusion.external, wrapper)
    arguments = () if wrapper == "VDenoiser" else (products, False)
    denoisers = {mixture: make(Model(mixture), *arguments) for mixture in (TRUE, BIASED)}
    seen = []

    def discriminator(x, sigma, label):
        seen.append(label)
        return LogRatio(TRUE, BIASED)(x, sigma)

    refined = rx.RefinedDenoiser(denoisers[BIASED], discriminator, discriminator_extra=["label"])
    assert refined.inner_model.mixture is BIASED and refined.sigma_data == 1.0
    if arguments:
        assert refined.sigma_max == denoisers[BIASED].sigma_max
        assert torch.equal(refined.get_sigmas(5), denoisers[BIASED].get_sigmas(5))
    sigmas = k_diffusion.sampling.get_sigmas_karras(6, 0.1, 10.0)
    x = 10 * torch.randn(SHAPE)
    extra = {"label": torch.arange(4)}
    got, want = (
        k_diffusion.sampling.sample_heun(model, x, sigmas, extra_args=extra, disable=True)
        for model in (refined, denoisers[TRUE])
    )
    # float32 throughout; the discrete wrappers interpolate the level in float32.
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
    plain = k_diffusion.sampling.sample_heun(denoisers[BIASED], x, sigmas, extra_args=extra, disable=True)
    assert (plain - want).abs().max() > 0.1
    assert all(torch.equal(label, extra["label"]) for label in (*seen, *asked)) and len(seen) == 11
