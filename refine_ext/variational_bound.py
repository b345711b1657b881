"""The objectives a discriminator is trained with: lower bounds of f-divergences, and logistic loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._call import called
from ._ops import ops
from .arguments import check_floating
from .divergence import parse_divergence


def _pair(function: str, names: tuple[str, str], real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in zip(names, (real, fake), strict=True):
        check_floating(function, name, value)
    if real.device != fake.device:
        raise ValueError(f"{function}: {names[0]} is on {real.device}, {names[1]} is on {fake.device}")
    if real.dtype != fake.dtype:
        # Autocast and mixed models hand over two precisions; the bound is taken in the higher.
        dtype = torch.promote_types(real.dtype, fake.dtype)
        real, fake = real.to(dtype), fake.to(dtype)
    # Where there is nothing to do, autograd has one node less to visit.
    flat = [x if x.dim() == 1 else x.reshape(-1) for x in (real, fake)]
    return flat[0], flat[1]


def variational_bound(
    h_real: Tensor,
    h_fake: Tensor,
    divergence: str = "kl",
    *,
    tight: bool = True,
    kind: Literal["variational", "logit"] = "variational",
) -> Tensor:
    """Lower bound of D_f(P‖Q) in nats from a discriminator's outputs; maximise it to train the discriminator.

    tight:  E_P[h] − min_ν {ν + E_Q f*(h − ν)}        (for `kl` the Donsker–Varadhan bound E_P[h] − log E_Q e^h)
    loose:  E_P[h] − E_Q f*(h)                        (f-GAN)

    Forward and backward are one kernel pass each over h_fake once the shift is found. The gradient with respect to
    h_fake is −(f*)'(h − ν)/n, the density ratios themselves (envelope theorem); second derivatives are exact too.

    Args:
        h_real: outputs on real samples, any shape; float64, float32, float16 or bfloat16.
        h_fake: outputs on generated samples, any shape, same device.
        divergence: one of `divergences()`.
        tight: minimise over the shift ν. Any h is then allowed; loose needs h in the domain of f*.
        kind: "variational": h itself. "logit": a classifier's logit ℓ, h = f'(e^ℓ), which never leaves the domain.

    Returns:
        0-dim tensor, float64 for float64 inputs, else float32. Differentiable.

    Raises:
        TypeError, ValueError: as `density_ratio`; ValueError where h_fake leaves the domain of f* (loose, CPU).

    Source: Nguyen, Wainwright, Jordan 2010; Nowozin et al. 2016 (loose); Ruderman et al. 2012, Birrell et al. 2022
    (tight); Husain, De Bortoli, Nock 2026, the duality of the refined model.

    >>> import torch, refine_ext as rx
    >>> float(rx.variational_bound(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]), "kl"))
    0.0
    """
    name = "variational_bound"
    code, alpha = parse_divergence(name, divergence)
    parse_divergence(name, divergence, kind)
    real, fake = _pair(name, ("h_real", "h_fake"), h_real, h_fake)
    tracked = torch.is_grad_enabled() and (real.requires_grad or fake.requires_grad)
    if kind == "logit":
        if not tight:
            return called(name, ops.dual_bound.default, tracked, real, fake, code, alpha)
        real = called(name, ops.dual_output.default, tracked, real, code, alpha)
        fake = called(name, ops.dual_output.default, tracked, fake, code, alpha)
    return called(name, ops.variational_bound.default, tracked, real, fake, tight, code, alpha)[0]


def logistic_loss(logit_real: Tensor, logit_fake: Tensor) -> Tensor:
    """Logistic loss of a real/generated classifier, E_P log(1 + e^−ℓ) + E_Q log(1 + e^ℓ); minimise it.

    It is minus the loose `gan` bound of the same logits, and at its minimum ℓ is the log density ratio.

    Args:
        logit_real: logits ℓ on real samples, any shape; float64, float32, float16 or bfloat16.
        logit_fake: logits ℓ on generated samples, any shape, same device.

    Returns:
        0-dim tensor in nats, float64 for float64 inputs, else float32. Differentiable.

    Raises:
        TypeError, ValueError: wrong dtype, empty input, different devices.

    Source: Goodfellow et al. 2014, equation (1); Kim et al. 2022, equation (4).

    >>> import torch, refine_ext as rx
    >>> round(float(rx.logistic_loss(torch.zeros(3), torch.zeros(5))), 4)
    1.3863
    """
    name = "logistic_loss"
    code, alpha = parse_divergence(name, "gan")
    real, fake = _pair(name, ("logit_real", "logit_fake"), logit_real, logit_fake)
    tracked = torch.is_grad_enabled() and (real.requires_grad or fake.requires_grad)
    return -called(name, ops.dual_bound.default, tracked, real, fake, code, alpha)
