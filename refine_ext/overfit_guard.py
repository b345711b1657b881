"""How much of a learned log-ratio to believe: temperature, held-out gain and the verdict."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Above this, equal weights are no sign of a generator that is already right.
SEPARATED_AUC = 0.9
# Above this, real samples outscore even the best-weighted generated ones: they do not overlap.
HOPELESS_AUC = 0.95
# Pareto k-hat above which importance weights have no reliable mean (Vehtari et al. 2024).
KHAT_LIMIT = 0.7
# Fewer effective samples than this among the held-out generated ones is a collapse.
MIN_EFFECTIVE_SAMPLES = 5.0


def refinement_gain(log_ratio_real: Tensor, log_ratio_fake: Tensor, temperature: float = 1.0) -> tuple[float, float]:
    """Held-out nats per sample that the tempered refinement gains over the unrefined model.

    ``G(tau) = E_real[tau log r] - log E_fake[exp(tau log r)]``, which is
    ``E_real[log q_tau / q]`` for the refined density ``q_tau = q r^tau / E_q r^tau``.

    Args:
        log_ratio_real: ``[n]`` log-ratios of real samples the discriminator never saw; or ``[levels, n]``, of the same
            samples at several noise levels, over which the gain is then averaged.
        log_ratio_fake: ``[m]`` or ``[levels, m]`` log-ratios of such generated samples.
        temperature: ``tau`` in [0, 1].

    Returns:
        The gain and its standard error (delta method), both in nats.

    Source: Donsker and Varadhan 1983; the temperature is that of Husain et al. 2026's refinement.

    >>> refinement_gain(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]))
    (1.0, 0.0)
    """
    if temperature == 0.0:
        return 0.0, 0.0
    real = temperature * log_ratio_real.detach().double()
    fake = temperature * log_ratio_fake.detach().double()
    normalizer = torch.logsumexp(fake, -1, keepdim=True) - math.log(fake.shape[-1])
    ratio = torch.exp(fake - normalizer)
    gain = real.mean() - normalizer.mean()
    # A sample's levels are not independent: their average is one observation.
    per_real, per_fake = (x.reshape(-1, x.shape[-1]).mean(0) for x in (real, ratio))
    variance = per_real.var() / per_real.numel() + per_fake.var() / per_fake.numel()
    return float(gain), float(variance.sqrt())


def choose_temperature(
    log_ratio_real: Tensor, log_ratio_fake: Tensor, *, caution: float = 1.0, resolution: int = 50
) -> float:
    """The ``tau`` in [0, 1] with the highest lower confidence bound ``G(tau) - caution * se(tau)``.

    ``tau = 0`` leaves the model as it is (bound 0), so the chosen bound is never negative.

    Args:
        log_ratio_real, log_ratio_fake: held-out log-ratios, as in :func:`refinement_gain`.
        caution: how many standard errors to subtract.
        resolution: the number of equal steps between 0 and 1.

    Returns:
        The temperature, 0.0 where no temperature has a positive bound.

    >>> choose_temperature(torch.randn(50) - 1.0, torch.randn(50) + 1.0)
    0.0
    """
    best, best_bound = 0.0, 0.0
    for step in range(1, resolution + 1):
        tau = step / resolution
        gain, error = refinement_gain(log_ratio_real, log_ratio_fake, tau)
        bound = gain - caution * error
        if bound > best_bound:
            best, best_bound = tau, bound
    return best


def auc(scores_real: Tensor, scores_fake: Tensor, fake_weights: Tensor | None = None) -> float:
    """P(score of a real sample > score of a generated one), ties counted half.

    With ``fake_weights`` the generated samples count by their weight: after a perfect
    reweighting the result is 1/2, and where the generator misses the data it stays near 1.

    >>> auc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
    0.875
    """
    real = scores_real.detach().double()
    fake, order = scores_fake.detach().double().sort()
    weights = torch.ones_like(fake) if fake_weights is None else fake_weights.double()[order]
    mass = torch.cat([weights.new_zeros(1), weights.cumsum(0)]) / weights.sum()
    below = mass[torch.searchsorted(fake, real, right=False)]
    below_or_equal = mass[torch.searchsorted(fake, real, right=True)]
    return float(0.5 * (below + below_or_equal).mean())


def judge(
    *,
    temperature: float,
    gain: float,
    gain_stderr: float,
    gain_full: float,
    auc: float,
    auc_reweighted: float,
    ess: float,
    fakes: int,
    khat: float,
) -> tuple[bool, str]:
    """Whether reweighting can help, and a sentence that says why.

    Args:
        temperature: the guarded temperature.
        gain, gain_stderr, gain_full: held-out gains at that temperature and at 1, nats.
        auc, auc_reweighted: held-out AUC before, and after full-strength reweighting.
        ess: effective number of held-out generated samples at the guarded temperature.
        fakes: how many there are.
        khat: Pareto k-hat of the weights at the guarded temperature.
    """
    # k-hat is NaN where there are too few samples to fit a tail.
    tail = f", k-hat {khat:.2f}" if math.isfinite(khat) else ""
    advice = "use latent refinement or guidance instead"
    if auc_reweighted > HOPELESS_AUC:
        return False, (
            "reweighting cannot help: the generated samples never hit the data's support "
            f"(held-out AUC {auc:.4f}, still {auc_reweighted:.4f} after full reweighting); {advice}"
        )
    if ess < min(MIN_EFFECTIVE_SAMPLES, 0.5 * fakes) and temperature > 0.0:
        return False, (
            f"reweighting cannot help: the weights collapse to {ess:.1f} effective samples of "
            f"{fakes} held-out generated ones (held-out AUC {auc:.4f}{tail}); {advice}"
        )
    if temperature == 0.0 and auc > SEPARATED_AUC:
        return False, (
            f"reweighting cannot help: real and generated are told apart (held-out AUC {auc:.4f}), "
            f"yet no temperature gives weights that improve the held-out estimate; {advice}"
        )
    if temperature == 0.0:
        return True, (
            "nothing to gain: no temperature improves the held-out estimate beyond its standard "
            f"error (held-out AUC {auc:.3f}, gain at full strength {gain_full:+.3f} nats), "
            "so all weights are equal and the model stays as it is"
        )
    text = (
        f"refinement gains {gain:.3f} +- {gain_stderr:.3f} nats per held-out sample at temperature "
        f"{temperature:.2f} ({gain_full:+.3f} at full strength); "
        f"{100 * ess / fakes:.0f} % effective samples"
    )
    if khat > KHAT_LIMIT:
        text += f"; caution: k-hat {khat:.2f} > {KHAT_LIMIT}, a few samples dominate the weights"
    return True, text
