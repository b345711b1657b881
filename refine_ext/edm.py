"""The stochastic sampler of Karras et al. 2022 with discriminator guidance, on fused updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .arguments import check_floating, whole
from .forward_process import EDM
from .guidance import guided_step
from .guide import Guide, Level, as_term, per_sample

# EDM-G++ (Kim et al. 2022): how often, and how strongly, samples that the discriminator takes for generated are helped.
_BOOST_CHURN, _BOOST_NOISE = 4.0, 1.0
_CHURN_PERIOD, _WEIGHT_PERIOD = 5, 2
_MOST_CHURN = math.sqrt(2.0) - 1.0


@dataclass(frozen=True)
class _Raise:
    """Churn: the noise level it leads to, and the standard deviation of the noise that it adds."""

    sigma: float
    noise: float


def _levels(net: Any, num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """The noise levels t_0 > ... > t_{N-1} > t_N = 0, eq. 5, at which the network can be evaluated."""
    low = max(sigma_min, float(getattr(net, "sigma_min", 0.0)))
    high = min(sigma_max, float(getattr(net, "sigma_max", math.inf)))
    if not 0.0 < low < high < math.inf:
        raise ValueError(
            f"sample_edm: need 0 < sigma_min < sigma_max, got {low:g} and {high:g} (within the network's own range)"
        )
    first, last = high ** (1 / rho), low ** (1 / rho)
    levels = [(first + i / max(1, num_steps - 1) * (last - first)) ** rho for i in range(num_steps)]
    return [*_rounded(net, levels), 0.0]


def _rounded(net: Any, levels: list[float]) -> list[float]:
    if not hasattr(net, "round_sigma"):
        return levels
    return torch.as_tensor(net.round_sigma(torch.tensor(levels, dtype=torch.float64))).tolist()


def _raises(net: Any, levels: list[float], churn: float, s_min: float, s_max: float, s_noise: float) -> list[_Raise]:
    """What churn does at each level but the last."""
    gain = min(churn / (len(levels) - 1), _MOST_CHURN)
    raised = _rounded(net, [t * (1 + gain) if s_min <= t <= s_max else t for t in levels[:-1]])
    # (raised - t) (raised + t) does not cancel where the squares would
    return [_Raise(r, s_noise * math.sqrt(max(0.0, (r - t) * (r + t)))) for r, t in zip(raised, levels, strict=False)]


def _euler(sigma: Level, target: float) -> tuple[Level, ...]:
    """Of x, D, g in ``x + (target - sigma) d`` with ``d = (x - D) / sigma - sigma g``."""
    return target / sigma, (sigma - target) / sigma, sigma * (sigma - target)


def _heun(sigma: Level, target: float) -> tuple[Level, ...]:
    """Of x, x', D', g' in ``x + (target - sigma) (d + d') / 2``, where ``(target - sigma) d = x' - x``."""
    half = 0.5 * (target - sigma)
    return 0.5, 0.5 + half / target, -half / target, -half * target


def sample_edm(
    net: Callable[..., Tensor],
    noise: Tensor,
    *,
    num_steps: int = 18,
    sigma_min: float = EDM.sigma_min,
    sigma_max: float = EDM.sigma_max,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    order: int = 2,
    discriminator: Guide | Callable[..., Tensor] | None = None,
    weight: Level = 1.0,
    weight_2nd: Level | None = None,
    boosting: bool = False,
    class_labels: Tensor | None = None,
    extra: Mapping[str, Any] | None = None,
    discriminator_extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    randn_like: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Samples of a denoiser by Heun's method with churn: ``dx/dsigma = (x - D(x; sigma)) / sigma - w sigma g``.

    ``t_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho``, ``x_0 = t_0 noise``; step i
    adds noise up to ``t^ = t_i (1 + min(S_churn/N, sqrt(2) - 1))`` where ``S_min <= t_i <= S_max``, then goes from t^
    to t_{i+1}, twice evaluated but for the last step. g = c(h - nu) grad h is what the discriminator adds to the
    score: with the exact log-ratio of data to model and w = 1 the samples are the data's.

    Nothing waits for the device between the steps, but the callback. The state is updated in place, each update and
    the churn noise after it in one pass.

    Args:
        net: ``net(x, sigma, class_labels, **extra)`` -> denoised x, shaped as x; called without class_labels where
            they are None, in noise's dtype, with sigma ``[B]``. Its sigma_min, sigma_max and round_sigma count if it
            has them, as EDM's networks do.
        noise: ``[B, ...]``, standard normal, floating.
        num_steps, sigma_min, sigma_max, rho: the noise levels.
        S_churn, S_min, S_max, S_noise: churn, at which levels, and the inflation of its noise.
        order: 2 for Heun's method, 1 for Euler's.
        discriminator: a callable ``(x, sigma, **extra) -> h[B]`` of logits, or a :class:`Guide` for anything else: a
            variational output, a discriminator of a variance-preserving diffusion, a range of levels. It is not
            evaluated where it has no say.
        weight: w at the steps' first evaluations, a number or ``[B]``; times the Guide's own.
        weight_2nd: w at the second ones. None: as `weight`. The published code has 2 and 0.
        boosting: EDM-G++. Every fifth step, samples with log r < 0 at the step before get churn 4 (where
            ``S_min <= t_i <= S_max``, with S_noise = 1); every second step their guidance at the first order is
            doubled.
        class_labels, extra: handed to the network.
        discriminator_extra: handed to the discriminator, by name.
        dtype: of the state, float64 or float32.
        randn_like: makes the churn noise like a given state, called once a step whatever the churn, which reproduces
            the noise of code that does so. None: Philox normals made within the update.
        generator: where to draw the seed from. None: torch's default generator, so that `torch.manual_seed` rules.
        seed: of the Philox normals, an int, or ``[B]`` int64 on noise's device: then a sample's noise does not depend
            on the batch, and a CUDA graph reads it at every replay. Step i is number i + 1 of :func:`philox_normal`,
            whose number 0 can be `noise`.
        callback: called as ``callback(i, sigma, x, denoised)`` after the first evaluation of step i, x after churn.
        progress: show a progress bar.

    Returns:
        Samples shaped as noise, in `dtype`.

    Raises:
        TypeError: arguments of a type or dtype that is not supported.
        ValueError: numbers out of range; a network that changes the shape; a discriminator whose range of levels none
            of the steps meets, and what :class:`Guide` refuses; NaN of the discriminator, with its noise level.

    Source: Karras et al. 2022, Algorithm 2; Kim et al. 2022, eq. 8 and appendix (EDM-G++).

    >>> noise = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    >>> samples = sample_edm(lambda x, sigma: x / (1 + sigma[:, None] ** 2), noise)  # data N(0, 1)
    >>> abs(samples.std().item() - 1) < 0.1
    True
    """
    check_floating("sample_edm", "noise", noise)
    if noise.dim() == 0:
        raise ValueError("sample_edm: noise must be [B, ...], got a 0-dim tensor")
    if boosting and discriminator is None:
        raise ValueError("sample_edm: boosting needs a discriminator")
    numbers = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho, "S_churn": S_churn, "S_min": S_min}
    _check(net, num_steps, order, numbers | {"S_max": S_max, "S_noise": S_noise}, dtype)
    levels = _levels(net, num_steps, sigma_min, sigma_max, rho)
    churn = _raises(net, levels, S_churn, S_min, S_max, S_noise)
    boosted = _raises(net, levels, _BOOST_CHURN, S_min, S_max, _BOOST_NOISE) if boosting else churn
    updates = _Updates(randn_like, generator, seed)
    guidance = _Guidance(
        None if discriminator is None else Guide.of(discriminator),
        (weight, weight if weight_2nd is None else weight_2nd),
        churn,
        boosted,
        discriminator_extra or {},
    )
    guidance.check_range(levels[1:-1] if order == 2 else [])
    labels = () if class_labels is None else (class_labels,)

    def denoise(x: Tensor, sigma: Level) -> Tensor:
        at = per_sample(sigma, x, "sigma").to(noise.dtype)
        denoised = net(x.to(noise.dtype), at, *labels, **(extra or {}))
        if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
            got = list(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
            raise ValueError(f"sample_edm: net must return a tensor shaped as noise, {list(x.shape)}, got {got}")
        return as_term(denoised, x)

    with torch.no_grad():
        sigma, added = guidance.raised(0, noise)
        x = updates(noise.to(dtype), [], (levels[0],), noise=added, step=0)
        middle = None
        for i in _steps(num_steps, progress):
            target, last = levels[i + 1], i + 1 == num_steps
            denoised = denoise(x, sigma)
            if callback is not None:
                callback(i, churn[i].sigma, x, denoised)
            gradient, factor = guidance.first(x, sigma, i)
            terms, coefficients = [denoised, *gradient], _euler(sigma, target)
            if order == 2 and not last:
                middle = updates(x, terms, coefficients, factor, out=middle)
                gradient, factor = guidance.second(middle, target)
                terms, coefficients = [middle, denoise(middle, target), *gradient], _heun(sigma, target)
            if not last:
                sigma, added = guidance.raised(i + 1, noise)
            # What a callback was given stays as it was.
            out = None if callback else x
            x = updates(x, terms, coefficients, factor, noise=added, step=None if last else i + 1, out=out)
    guidance.finish()
    return x


class _Updates:
    """Updates of the state with the noise that follows them: Philox normals within the update, or injected ones."""

    def __init__(self, randn_like: Any, generator: torch.Generator | None, seed: int | Tensor | None) -> None:
        if sum(source is not None for source in (randn_like, generator, seed)) > 1:
            raise ValueError("sample_edm: give one of randn_like, generator and seed")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"sample_edm: generator must be a torch.Generator, got {type(generator).__name__}")
        self.randn_like = randn_like
        self.generator = generator
        self.seed = seed

    def __call__(
        self,
        x: Tensor,
        terms: list[Tensor],
        coefficients: tuple[Level, ...],
        factor: Tensor | None = None,
        *,
        noise: Level = 0.0,
        step: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """`coefficients` may have one more than there are terms, of guidance that is left out."""
        used = list(coefficients[: len(terms) + 1])
        if self.randn_like is not None and step is not None:
            last = len(terms) if factor is None else len(terms) - 1  # the factor is the last term's
            injected = self.randn_like(x)
            if injected.shape != x.shape:
                raise ValueError(f"sample_edm: randn_like must return {list(x.shape)}, got {list(injected.shape)}")
            terms = [*terms[:last], as_term(injected, x), *terms[last:]]
            used.insert(last + 1, noise)
            step = None
        elif step is not None and not _is_zero(noise):
            used.append(noise)
        else:
            step = None
        if step is None:
            return guided_step(x, terms, _row(used), factor=factor, out=out)
        if self.seed is None:
            where = "cpu" if self.generator is None else self.generator.device
            self.seed = int(torch.randint(2**63 - 1, (), generator=self.generator, device=where))
        return guided_step(x, terms, _row(used), factor=factor, seed=self.seed, step=step + 1, out=out)


class _Guidance:
    """The discriminator's part of each update, and EDM-G++'s boosting of the samples that it takes for generated."""

    def __init__(
        self,
        guide: Guide | None,
        weights: tuple[Level, Level],
        churn: list[_Raise],
        boosted: list[_Raise],
        extra: Mapping[str, Any],
    ) -> None:
        self.guide = guide
        self.weights = weights
        self.churn = churn
        self.boosted = boosted
        self.extra = extra
        self.low: Tensor | None = None  # which samples had log r < 0 at the last first evaluation

    def first(self, x: Tensor, sigma: Level, step: int) -> tuple[list[Tensor], Tensor | None]:
        """The gradient, as the last term of an update, and its factor, at a step's first evaluation."""
        self.low = None
        weight = self.weights[0]
        if self.guide is None or not self._speaks(weight, self.churn[step].sigma, self.boosted[step].sigma):
            return [], None
        output = self.guide(x, sigma, **self.extra)
        if self.boosted is not self.churn:
            level = per_sample(sigma, x, "sigma")
            inside = (level >= self.guide.sigma_min) & (level <= self.guide.sigma_max)
            self.low = (self.guide.log_ratio(output.h, level) < 0) & inside
            if step % _WEIGHT_PERIOD == 0:
                weight = per_sample(weight, x, "weight") * (1.0 + self.low.double())
        return [output.gradient], self.guide.factor(output.h, sigma, weight=weight)

    def second(self, x: Tensor, sigma: float) -> tuple[list[Tensor], Tensor | None]:
        """The same at the second evaluation, which boosting leaves alone."""
        if self.guide is None or not self._speaks(self.weights[1], sigma):
            return [], None
        output = self.guide(x, sigma, **self.extra)
        return [output.gradient], self.guide.factor(output.h, sigma, weight=self.weights[1])

    def raised(self, step: int, like: Tensor) -> tuple[Level, Level]:
        """The noise level and the noise of a step's churn, one for all samples or one for each."""
        usual, more = self.churn[step], self.boosted[step]
        if self.low is None or step % _CHURN_PERIOD:
            return usual.sigma, usual.noise
        sigma, noise = per_sample(usual.sigma, like, "sigma"), per_sample(usual.noise, like, "noise")
        return sigma.masked_fill(self.low, more.sigma), noise.masked_fill(self.low, more.noise)

    def check_range(self, second: list[float]) -> None:
        """An error where no evaluation with a weight, at the churned levels or the `second` ones, is in range."""
        if self.guide is None:
            return
        first = [raise_.sigma for raise_ in self.churn + self.boosted]
        guided = [s for w, each in zip(self.weights, (first, second), strict=True) if not _is_zero(w) for s in each]
        if guided and not any(map(self.guide.covers, guided)):
            raise ValueError(
                f"sample_edm: the discriminator guides sigma from {self.guide.sigma_min:g} to "
                f"{self.guide.sigma_max:g}, and the steps are from {min(guided):g} to {max(guided):g}"
            )

    def finish(self) -> None:
        if self.guide is not None:
            self.guide.finish()

    def _speaks(self, weight: Level, *levels: float) -> bool:
        return not _is_zero(weight) and self.guide is not None and any(map(self.guide.covers, levels))


def _is_zero(value: Level) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _row(coefficients: list[Level]) -> list[float] | Tensor:
    like = next((c for c in coefficients if isinstance(c, Tensor)), None)
    if like is None:
        return coefficients  # type: ignore[return-value]
    return torch.stack([c if isinstance(c, Tensor) else torch.full_like(like, c) for c in coefficients], -1)


def _steps(num_steps: int, progress: bool) -> Iterable[int]:
    if not progress:
        return range(num_steps)
    from tqdm import trange

    return trange(num_steps, desc="sampling")


def _check(net: Any, num_steps: int, order: int, numbers: dict[str, float], dtype: torch.dtype) -> None:
    if not callable(net):
        raise TypeError(f"sample_edm: net must be callable as (x, sigma), got {type(net).__name__}")
    whole("sample_edm", "num_steps", num_steps, 1)
    if order not in (1, 2):
        raise ValueError(f"sample_edm: order must be 1 (Euler) or 2 (Heun), got {order!r}")
    if dtype not in (torch.float64, torch.float32):
        raise TypeError(f"sample_edm: dtype must be torch.float64 or torch.float32, got {dtype}")
    for name, value in numbers.items():
        if not isinstance(value, Real):
            raise TypeError(f"sample_edm: {name} must be a number, got {type(value).__name__}")
    if not 0.0 < numbers["rho"] < math.inf:
        raise ValueError(f"sample_edm: rho must be positive, got {numbers['rho']}")
    for name in ("S_churn", "S_noise"):
        if not 0.0 <= numbers[name] < math.inf:
            raise ValueError(f"sample_edm: {name} must be finite and not negative, got {numbers[name]}")
