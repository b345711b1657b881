"""The convex hull of given discriminators, solved exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_dual import LinearDual, Tight, _Model, check_dual, maximise

# Discriminators that may join at a step: at least so many, and a third of those in use. The Hessian of all of them is
# what a step costs.
_FEWEST_JOINING = 32
# Of the Hessian's mean diagonal: what makes copies of a discriminator share their coefficient.
_RIDGE = 1e-12


def solve_hull_dual(
    outputs_real: Tensor,
    outputs_fake: Tensor,
    divergence: str = "kl",
    *,
    norm_bound: float,
    tolerance: float = 1e-7,
    max_iterations: int = 200,
    initial: Tensor | None = None,
) -> LinearDual:
    r"""Maximise the tight objective over the hull of ``+-B h_1 ... +-B h_m``: ``h = sum_j a_j h_j``, ``||a||_1 <= B``.

    ``J(a) = E_real h - min_nu {nu + E_fake f*(h - nu)}``

    is concave in ``a``. Each step maximises the exact second-order model over the discriminators in use and those
    with the steepest slopes (an active-set quadratic programme), and searches along the segment to that point. It
    stops on the duality gap

    ``B ||grad J||_inf - <grad J, a>  >=  max J - J(a)``,

    which is the gap to the primal problem ``min_Q' D_f(Q'||Q) + B max_j |E_real h_j - E_Q' h_j|`` at
    ``dQ'/dQ = (f*)'(h - nu)``. Most coefficients of a solution are zero.

    Args:
        outputs_real: ``[n, m]`` outputs of m discriminators on real samples (computed with in float64).
        outputs_fake: ``[N, m]`` their outputs on generated samples.
        divergence: the f-divergence's name.
        norm_bound: B > 0.
        tolerance: relative duality gap to reach.
        max_iterations: Newton steps before giving up (``converged`` is then False).
        initial: ``[m]`` start, for instance the solution for a smaller B.

    Returns:
        The solution with its certificate; `weight` holds the coefficients ``a``.

    Raises:
        ValueError: shapes that do not match, a norm bound that is not positive, fewer than one sample.

    Source: Husain, De Bortoli and Nock 2026, duality of the restricted f-GAN; the gap is Frank and Wolfe's (1956),
    the active set that of Lawson and Hanson (1974), chapter 23.

    >>> real, fake = torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    >>> solve_hull_dual(real, fake, norm_bound=0.5).weight.round(decimals=6)
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    real, fake = check_dual("solve_hull_dual", "outputs", outputs_real, outputs_fake, norm_bound)
    if initial is None:
        weight = real.new_zeros(real.shape[1])
    else:
        weight = initial.detach().to(real)
        weight = weight * min(1.0, norm_bound / max(float(weight.abs().sum()), 1e-300))
    return maximise(Tight(real, fake, divergence), weight, _CrossPolytope(norm_bound), tolerance, max_iterations)


@dataclass
class _CrossPolytope:
    """``||a||_1 <= radius``: the hull of the signed coordinate vectors times the radius."""

    radius: float

    def gap(self, gradient: Tensor, weight: Tensor) -> float:
        return max(0.0, float(self.radius * gradient.abs().amax() - gradient @ weight))

    def target(self, problem: Tight, model: _Model, weight: Tensor) -> Tensor:
        gradient = model.gradient
        used = weight.nonzero().squeeze(1)
        steepness = gradient.abs().index_fill(0, used, 0.0)
        joining = min(max(_FEWEST_JOINING, len(used) // 3), int((steepness > 0.0).sum()))
        columns = torch.cat([used, steepness.topk(joining).indices])
        magnitudes = weight[columns].abs()
        signs = torch.where(magnitudes > 0, weight[columns], gradient[columns]).sign()
        hessian = problem.hessian(model, columns) * torch.outer(signs, signs)
        linear = signs * gradient[columns] + hessian @ magnitudes
        target = torch.zeros_like(weight)
        target[columns] = signs * _maximise_quadratic(hessian, linear, self.radius, magnitudes)
        return target


def _maximise_quadratic(hessian: Tensor, linear: Tensor, radius: float, start: Tensor) -> Tensor:
    """argmax of ``c'v - v'Hv/2`` over ``v >= 0``, ``sum v <= radius``, by an active set, from a feasible start.

    With the coordinates of a set ``S`` free and the others zero, ``(c - H v)_S = l 1``, where ``l`` belongs to the
    sum: zero while the sum is below the radius. A step towards that point stops where coordinates reach zero, which
    then leave the set, or the sum the radius. Once the point is reached, coordinates of greater slope than
    ``l`` join, or a negative ``l`` lets the sum go. The objective rises from one such point to the next, so that no
    set comes back. A ridge on the step, not on v, settles singular H and is refined away.
    """
    count = len(linear)
    tolerance = 1e-14 * max(float(linear.abs().amax()), float(hessian.diagonal().mean()) * radius)
    value, free = start.clone(), start > 0
    bound = float(value.sum()) >= (1.0 - 1e-12) * radius
    spread_before = math.inf
    for _ in range(20 * count + 100):
        inside = free.nonzero().squeeze(1)
        now, room = value[inside], radius - float(value.sum())
        local, rising = hessian[inside][:, inside], (linear - hessian @ value)[inside]
        change = _newton_step(local, rising, room if bound else None)
        goal = now + change
        steps = torch.where(goal <= 0.0, now / (-change).clamp_min(1e-300), 1.0)
        step = float(steps.amin()) if len(inside) else 1.0
        rise = float(change.sum())
        if not bound and step * rise > room:
            value[inside] = now + max(0.0, room) / rise * change
            bound, spread_before = True, math.inf
            continue
        if bool((goal <= 0.0).any()):
            # Mostly all that would turn negative can leave at once; where that does not pay, the first one does.
            cut = goal.clamp_min(0.0)
            cut *= radius / float(cut.sum()) if bound else 1.0
            moved = cut - now
            pays = float(rising @ moved - 0.5 * moved @ local @ moved) > 0.0
            if pays and float(cut.sum()) <= radius * (1.0 + 1e-12):
                value[inside], free[inside], spread_before = cut, cut > 0.0, math.inf
                continue
            value[inside] = torch.where(steps <= step, 0.0, now + step * change)
            free[inside] = steps > step
            bound, spread_before = bound and bool(free.any()), math.inf
            continue
        value[inside] = goal
        slope = linear - hessian @ value
        multiplier = float(slope[inside].mean()) if bound else 0.0
        spread = float((slope[inside] - multiplier).abs().amax()) if len(inside) else 0.0
        if tolerance < spread < 0.5 * spread_before:
            spread_before = spread
            continue
        spread_before = math.inf
        steepest = float((slope - multiplier).masked_fill(free, 0.0).amax())
        if bound and -multiplier > max(tolerance, steepest):
            bound = False
        elif steepest > max(tolerance, 2 * spread):
            free |= slope - multiplier > 0.5 * steepest
        else:
            break
    return value * min(1.0, radius / max(float(value.sum()), 1e-300))


def _newton_step(hessian: Tensor, slope: Tensor, total: float | None) -> Tensor:
    """argmax of ``s'd - d'Hd/2``, with a given ``sum d``: the last coordinate is what the others leave."""
    last = slope.new_zeros(len(slope))
    if total is not None:
        last[-1] = total
        slope = slope - hessian[:, -1] * total
        slope = slope[:-1] - slope[-1]
        edge = hessian[:-1, -1]
        hessian = hessian[:-1, :-1] - edge - edge[:, None] + hessian[-1, -1]
    if not len(slope):
        return last
    damped = hessian + torch.diag((_RIDGE * hessian.diagonal().mean() + 1e-300).expand(len(slope)))
    step = torch.cholesky_solve(slope[:, None], torch.linalg.cholesky(damped)).squeeze(1)
    return step if total is None else last + torch.cat([step, -step.sum()[None]])
