"""Refine any generative model with a discriminator, and bound how well it generalises.

import refine_ext as rx
disc = rx.fit_discriminator(real, fake)                       # or any discriminator of yours
r = rx.density_ratio(disc(fake), "kl")                        # density ratios, normalised
refined = fake[rx.resample(r.weights, num=len(fake))]         # samples of the refined model
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

import torch as _torch  # first: the libraries below need torch's  # noqa: F401

from . import (  # noqa: F401  (loads the libraries, registers the ops)
    _C,
    _library,
    _ops,
    _ops_gaussian_kl,
    _ops_guidance,
    _ops_log_mixture,
    _ops_rademacher,
)
from .complexity_estimate import Estimate
from .density_ratio import DensityRatio, density_ratio
from .divergence import divergences
from .forward_process import forward_process
from .gaussian_kl import gaussian_kl, importance_log_weights
from .log_mixture import LogMixture, log_mixture
from .rademacher import rademacher, rademacher_l1, rademacher_linear
from .resampling import Metropolis, Rejection, metropolis, rejection, resample
from .variational_bound import logistic_loss, variational_bound

if TYPE_CHECKING:
    from .certificate import refinement_certificate
    from .certificate_result import RefinementCertificate
    from .denoiser import RefinedDenoiser, post_cfg
    from .diffusion_bound_result import DiffusionBound
    from .diffusion_bounds import diffusion_bound, diffusion_bound_loss
    from .diffusion_discriminator import DiffusionDiscriminator
    from .diffusion_time import LearnedTime, TimeSelection, select_diffusion_time
    from .discriminator import Discriminator
    from .edm import sample_edm
    from .fit import fit_discriminator
    from .fit_diffusion import fit_diffusion_discriminator
    from .guidance import guided_score, guided_step, philox_normal
    from .guide import Guide, VPSchedule
    from .kernel_density import KernelDensity
    from .latent import LatentFlow, LatentLangevin, latent_flow, latent_langevin
    from .local_complexity import LocalComplexity, rademacher_local
    from .modular import DiscriminatorGuidance
    from .neural_complexity import rademacher_neural
    from .norm_bound_search import NormBoundSearch, suggest_norm_bound
    from .norm_bounds import rademacher_norm_bounds
    from .rkhs import rademacher_rkhs
    from .schedulers import wrap_scheduler
    from .vae_bound_result import VAEBound
    from .vae_bounds import vae_bound
    from .vae_likelihoods import BernoulliLikelihood, DiscretizedLogisticLikelihood, GaussianLikelihood
    from .vae_log_likelihood import LogLikelihood, importance_weighted_log_likelihood
    from .vae_memorization import MemorizationScore, memorization_score
    from .vae_training import VAELoss, fit_auxiliary_decoder, vae_bound_loss

__version__: str = _C.build_info()["version"]

# Training needs torch.nn and torch.optim, which `import torch` alone has not paid for; they come at first use.
_LAZY = {
    "RefinementCertificate": "certificate_result",
    "refinement_certificate": "certificate",
    "RefinedDenoiser": "denoiser",
    "post_cfg": "denoiser",
    "DiffusionBound": "diffusion_bound_result",
    "diffusion_bound": "diffusion_bounds",
    "diffusion_bound_loss": "diffusion_bounds",
    "DiffusionDiscriminator": "diffusion_discriminator",
    "LearnedTime": "diffusion_time",
    "TimeSelection": "diffusion_time",
    "select_diffusion_time": "diffusion_time",
    "Discriminator": "discriminator",
    "sample_edm": "edm",
    "fit_discriminator": "fit",
    "fit_diffusion_discriminator": "fit_diffusion",
    "guided_score": "guidance",
    "guided_step": "guidance",
    "philox_normal": "guidance",
    "Guide": "guide",
    "VPSchedule": "guide",
    "KernelDensity": "kernel_density",
    "LatentFlow": "latent",
    "LatentLangevin": "latent",
    "latent_flow": "latent",
    "latent_langevin": "latent",
    "LocalComplexity": "local_complexity",
    "rademacher_local": "local_complexity",
    "DiscriminatorGuidance": "modular",
    "rademacher_neural": "neural_complexity",
    "rademacher_norm_bounds": "norm_bounds",
    "rademacher_rkhs": "rkhs",
    "NormBoundSearch": "norm_bound_search",
    "suggest_norm_bound": "norm_bound_search",
    "wrap_scheduler": "schedulers",
    "VAEBound": "vae_bound_result",
    "vae_bound": "vae_bounds",
    "BernoulliLikelihood": "vae_likelihoods",
    "DiscretizedLogisticLikelihood": "vae_likelihoods",
    "GaussianLikelihood": "vae_likelihoods",
    "LogLikelihood": "vae_log_likelihood",
    "importance_weighted_log_likelihood": "vae_log_likelihood",
    "MemorizationScore": "vae_memorization",
    "memorization_score": "vae_memorization",
    "VAELoss": "vae_training",
    "fit_auxiliary_decoder": "vae_training",
    "vae_bound_loss": "vae_training",
}

__all__ = [
    "BernoulliLikelihood",
    "DensityRatio",
    "DiffusionBound",
    "DiffusionDiscriminator",
    "DiscretizedLogisticLikelihood",
    "Discriminator",
    "DiscriminatorGuidance",
    "Estimate",
    "GaussianLikelihood",
    "Guide",
    "KernelDensity",
    "LatentFlow",
    "LatentLangevin",
    "LearnedTime",
    "LocalComplexity",
    "LogLikelihood",
    "LogMixture",
    "MemorizationScore",
    "Metropolis",
    "NormBoundSearch",
    "RefinedDenoiser",
    "RefinementCertificate",
    "Rejection",
    "TimeSelection",
    "VAEBound",
    "VAELoss",
    "VPSchedule",
    "density_ratio",
    "diffusion_bound",
    "diffusion_bound_loss",
    "divergences",
    "fit_auxiliary_decoder",
    "fit_diffusion_discriminator",
    "fit_discriminator",
    "forward_process",
    "gaussian_kl",
    "guided_score",
    "guided_step",
    "importance_log_weights",
    "importance_weighted_log_likelihood",
    "latent_flow",
    "latent_langevin",
    "log_mixture",
    "logistic_loss",
    "memorization_score",
    "metropolis",
    "philox_normal",
    "post_cfg",
    "rademacher",
    "rademacher_l1",
    "rademacher_linear",
    "rademacher_local",
    "rademacher_neural",
    "rademacher_norm_bounds",
    "rademacher_rkhs",
    "refinement_certificate",
    "rejection",
    "resample",
    "sample_edm",
    "select_diffusion_time",
    "suggest_norm_bound",
    "vae_bound",
    "vae_bound_loss",
    "variational_bound",
    "wrap_scheduler",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(_import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
