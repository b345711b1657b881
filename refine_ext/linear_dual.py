"""The exactly solvable discriminator class: linear in given features, inside a ball."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .arguments import positive
from .density_ratio import density_ratio
from .variational_bound import logistic_loss, variational_bound

# Rows of features multiplied at once: bounds the temporary of the Hessian.
_BLOCK = 8192


@dataclass
class LinearDual:
    """A solved linear dual and its certificate.

    Attributes:
        weight: ``[d]`` float64, ``||weight|| <= norm_bound``: the Euclidean norm, for `solve_hull_dual` the sum of
            the magnitudes.
        intercept: added to the output (0 for the tight objective, which has its own shift).
        value: the objective at ``weight``, nats.
        gap: a proven bound on how far ``value`` is below the optimum, nats.
        converged: ``gap <= tolerance * max(1, |value|)``.
        iterations: Newton iterations made.
        norm_bound: B.
    """

    weight: Tensor
    intercept: float
    value: float
    gap: float
    converged: bool
    iterations: int
    norm_bound: float

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as plain numbers."""
        return {k: v for k, v in asdict(self).items() if k != "weight"}


@dataclass
class _Model:
    """The concave objective at one point, and its local quadratic model."""

    value: float
    gradient: Tensor
    curvature_fake: Tensor
    curvature_real: Tensor | None = None
    intercept: float = 0.0


def solve_linear_dual(
    features_real: Tensor,
    features_fake: Tensor,
    divergence: str = "kl",
    *,
    norm_bound: float,
    objective: str = "tight",
    tolerance: float = 1e-7,
    max_iterations: int = 200,
    initial: Tensor | None = None,
) -> LinearDual:
    r"""Maximise a discriminator objective over ``h(x) = <w, phi(x)>``, ``||w||_2 <= B``.

    ``tight``:    ``J(w) = E_real h - min_nu {nu + E_fake f*(h - nu)}``
    ``logistic``: ``J(w) = max_b {-E_real softplus(-h - b) - E_fake softplus(h + b)}``

    Both are concave in ``w``. Each step maximises the exact second-order model over the ball
    (one symmetric eigendecomposition and a scalar secular equation) and searches along the
    segment to that point, which stays inside the ball. It stops on the duality gap

    ``B ||grad J|| - <grad J, w>  >=  max J - J(w)``.

    For ``tight`` this is the gap to the primal problem
    ``min_Q' D_f(Q'||Q) + B ||E_real phi - E_Q' phi||`` at ``dQ'/dQ = (f*)'(h - nu)``.
    A free intercept turns the loose objective into the tight one, so ``loose`` is solved as such.

    Args:
        features_real: ``[n, d]`` features of real samples (computed with in float64).
        features_fake: ``[m, d]`` features of generated samples.
        divergence: the f-divergence's name; not used by ``logistic``.
        norm_bound: B > 0, in units of output per unit of feature.
        objective: "tight", "loose" or "logistic".
        tolerance: relative duality gap to reach.
        max_iterations: iterations before giving up (``converged`` is then False).
        initial: ``[d]`` start, for instance the solution for a smaller B.

    Returns:
        The solution with its certificate.

    Raises:
        ValueError: shapes that do not match, a norm bound that is not positive, an unknown
            objective, or fewer than one sample.

    Source: Husain, De Bortoli and Nock 2026, duality of the restricted f-GAN; the gap is Frank
    and Wolfe's (1956).

    >>> real, fake = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    >>> round(float(solve_linear_dual(real, fake, norm_bound=0.5).weight[0]), 6)
    0.5
    """
    real, fake = check_dual("solve_linear_dual", "features", features_real, features_fake, norm_bound)
    if objective not in ("tight", "loose", "logistic"):
        raise ValueError(f"solve_linear_dual: objective must be 'tight', 'loose' or 'logistic', got {objective!r}")
    problem: Tight | _Logistic = _Logistic(real, fake) if objective == "logistic" else Tight(real, fake, divergence)
    if initial is None:
        weight = real.new_zeros(real.shape[1])
    else:
        weight = initial.detach().to(real)
        weight = weight * min(1.0, norm_bound / max(float(weight.norm()), 1e-300))
    return maximise(problem, weight, _Euclidean(norm_bound), tolerance, max_iterations)


def check_dual(function: str, what: str, real: Tensor, fake: Tensor, norm_bound: float) -> tuple[Tensor, Tensor]:
    """Both sets of features or outputs in float64: there are some, equally wide, and the norm bound is positive."""
    if real.ndim != 2 or fake.ndim != 2:
        raise ValueError(f"{function}: {what} must be [n, d], got {list(real.shape)} and {list(fake.shape)}")
    if real.shape[1] != fake.shape[1] or 0 in fake.shape:
        raise ValueError(
            f"{function}: {what}_real and {what}_fake must be non-empty and have the "
            f"same width, got {list(real.shape)} and {list(fake.shape)}"
        )
    if len(real) == 0:
        raise ValueError(f"{function}: {what}_real is empty")
    positive(function, "norm_bound", norm_bound)
    return real.detach().double(), fake.detach().double()


class Ball(Protocol):
    """The set of allowed weights, as far as `maximise` needs to know it."""

    radius: float

    def gap(self, gradient: Tensor, weight: Tensor) -> float:
        """max over the ball of ``<g, v - w>``, which bounds ``max J - J(w)`` for a concave J (Frank and Wolfe)."""

    def target(self, problem: Any, model: _Model, weight: Tensor) -> Tensor:
        """The maximiser of the quadratic model over the ball, or over a part of it that w and an ascent lie in."""


def maximise(problem: Tight | _Logistic, weight: Tensor, ball: Ball, tolerance: float, limit: int) -> LinearDual:
    """Newton steps to the maximiser of the model in the ball, with a search along each segment, down to the gap."""
    model = problem.model(weight)
    gap, iteration = ball.gap(model.gradient, weight), 0
    while gap > tolerance * max(1.0, abs(model.value)) and iteration < limit:
        iteration += 1
        target = ball.target(problem, model, weight)
        slope = float(model.gradient @ (target - weight))
        # Near the optimum the rise is below the rounding of the value: then the gap decides.
        rounding = 1e-14 * max(1.0, abs(model.value))
        if slope <= -10 * rounding:
            break
        candidate, step = None, 1.0
        while step > 1e-12:
            point = weight + step * (target - weight)
            trial = problem.model(point)
            rises = slope > 0.0 and trial.value >= model.value + 1e-4 * step * slope
            flat = step * slope < 10 * rounding and trial.value >= model.value - rounding
            if rises or (flat and ball.gap(trial.gradient, point) < gap):
                candidate = (point, trial)
                break
            step *= 0.5
        if candidate is None:
            break
        weight, model = candidate
        gap = ball.gap(model.gradient, weight)
    return LinearDual(
        weight=weight,
        intercept=model.intercept,
        value=model.value,
        gap=gap,
        converged=gap <= tolerance * max(1.0, abs(model.value)),
        iterations=iteration,
        norm_bound=ball.radius,
    )


@dataclass
class _Euclidean:
    radius: float

    def gap(self, gradient: Tensor, weight: Tensor) -> float:
        return max(0.0, float(self.radius * gradient.norm() - gradient @ weight))

    def target(self, problem: Tight | _Logistic, model: _Model, weight: Tensor) -> Tensor:
        return _ball_step(problem.hessian(model), model.gradient, weight, self.radius)


def _ball_step(hessian: Tensor, gradient: Tensor, weight: Tensor, radius: float) -> Tensor:
    """argmax over ``||v|| <= radius`` of ``<g, v - w> - (v - w)' H (v - w) / 2``, H >= 0.

    Stationarity is ``(H + l I) v = g + H w`` with a multiplier ``l >= 0``; ``||v||`` decreases
    in ``l``, and ``1/||v||`` is concave and nearly linear in it, which Newton likes.
    """
    eigenvalues, basis = torch.linalg.eigh(hessian)
    eigenvalues = eigenvalues.clamp_min(0.0)
    coefficients = basis.T @ (gradient + hessian @ weight)
    floor = 1e-14 * max(float(eigenvalues[-1]), 1e-300)

    def norm(multiplier: float) -> float:
        return float((coefficients / (eigenvalues + multiplier)).norm())

    if norm(floor) <= radius:
        return basis @ (coefficients / (eigenvalues + floor))
    low, high = floor, max(float(coefficients.norm()) / radius, 2 * floor)
    multiplier = low
    for _ in range(100):
        scaled = coefficients / (eigenvalues + multiplier)
        length = float(scaled.norm())
        if abs(length - radius) <= 1e-14 * radius:
            break
        if length > radius:
            low = multiplier
        else:
            high = multiplier
        slope = float((scaled * scaled / (eigenvalues + multiplier)).sum())
        multiplier += (length - radius) / radius * length * length / slope
        if not low < multiplier < high:
            multiplier = math.sqrt(low * high)
        if high - low <= 1e-15 * high:
            break
    target = basis @ (coefficients / (eigenvalues + multiplier))
    return target * (radius / float(target.norm()))


def _weighted_gram(features: Tensor, weights: Tensor, centre: Tensor | float = 0.0) -> Tensor:
    width = features.shape[1]
    gram = features.new_zeros(width, width)
    for start in range(0, len(features), _BLOCK):
        rows = features[start : start + _BLOCK] - centre
        gram += rows.T @ (rows * weights[start : start + _BLOCK, None])
    return gram


class Tight:
    """``E_real h - min_nu {nu + E_fake f*(h - nu)}`` with its first two derivatives.

    With ``r = (f*)'(h - nu)``: ``grad = E_real phi - E_fake[r phi]`` (envelope theorem), and
    ``-Hessian`` is ``E_fake[(f*)''] `` times the covariance of phi under weights ``(f*)''``.
    """

    def __init__(self, real: Tensor, fake: Tensor, divergence: str) -> None:
        self.fake, self.divergence = fake, divergence
        self.mean_real = real.mean(0)

    def model(self, weight: Tensor) -> _Model:
        h_real = (self.mean_real @ weight).reshape(1)
        h = (self.fake @ weight).requires_grad_()
        with torch.no_grad():
            solved = density_ratio(h, self.divergence)
            value = float(variational_bound(h_real, h, self.divergence))
        fixed = density_ratio(h, self.divergence, shift=solved.shift)
        ratio = torch.exp(fixed.log_ratio.detach())
        # d log r / dh at a fixed shift is (f*)''/(f*)'; where r = 0 the conjugate is flat.
        (score,) = torch.autograd.grad(fixed.log_ratio.sum(), h)
        curvature = torch.where(ratio > 0.0, ratio * score, torch.zeros_like(ratio))
        count = len(ratio)
        return _Model(value, self.mean_real - ratio @ self.fake / count, curvature / count)

    def hessian(self, model: _Model, columns: Tensor | None = None) -> Tensor:
        fake = self.fake if columns is None else self.fake[:, columns]
        weights = model.curvature_fake
        # Centred before it is squared: an offset that all samples share would cancel.
        return _weighted_gram(fake, weights, weights @ fake / weights.sum().clamp_min(1e-300))


class _Logistic:
    """Minus the logistic loss with its best intercept, and its first two derivatives."""

    def __init__(self, real: Tensor, fake: Tensor) -> None:
        self.real, self.fake = real, fake
        self.intercept = 0.0

    def model(self, weight: Tensor) -> _Model:
        real, fake = self.real @ weight, self.fake @ weight
        intercept = self._best_intercept(real, fake)
        p_real, p_fake = torch.sigmoid(real + intercept), torch.sigmoid(fake + intercept)
        value = -float(logistic_loss(real + intercept, fake + intercept))
        gradient = (1.0 - p_real) @ self.real / len(real) - p_fake @ self.fake / len(fake)
        return _Model(
            value,
            gradient,
            p_fake * (1.0 - p_fake) / len(fake),
            p_real * (1.0 - p_real) / len(real),
            intercept,
        )

    @staticmethod
    def _best_intercept(real: Tensor, fake: Tensor) -> float:
        """Root of ``E_real sigmoid(-h - b) = E_fake sigmoid(h + b)``: Newton inside a bracket."""
        low = -float(torch.maximum(real.max(), fake.max())) - 1.0
        high = -float(torch.minimum(real.min(), fake.min())) + 1.0
        b = 0.5 * (low + high)
        for _ in range(100):
            p_real, p_fake = torch.sigmoid(real + b), torch.sigmoid(fake + b)
            residual = float((1.0 - p_real).mean() - p_fake.mean())
            if residual > 0.0:
                low = b
            else:
                high = b
            slope = float((p_real * (1.0 - p_real)).mean() + (p_fake * (1.0 - p_fake)).mean())
            proposal = b + residual / slope if slope > 0.0 else math.inf
            if not low < proposal < high:
                proposal = 0.5 * (low + high)
            if abs(proposal - b) <= 1e-15 * max(1.0, abs(b)):
                break
            b = proposal
        return b

    def hessian(self, model: _Model) -> Tensor:
        assert model.curvature_real is not None
        weights_fake, weights_real = model.curvature_fake, model.curvature_real
        mass = weights_fake.sum() + weights_real.sum()
        mean = (weights_fake @ self.fake + weights_real @ self.real) / mass.clamp_min(1e-300)
        gram = _weighted_gram(self.fake, weights_fake) + _weighted_gram(self.real, weights_real)
        return gram - mass * torch.outer(mean, mean)
