"""Data, biased models of them and discriminator classes whose expectations are known without sampling.

For discriminators <w, phi>, or a hull of given ones with outputs phi, all that a certificate's truth needs is E_P phi:
IPM_H(P, Q') = B ||E_P phi - E_Q' phi||, in the 2-norm or, for a hull, the largest component. Two kinds of P have it
exactly: a Gaussian mixture, by its characteristic function, and a pool of digits that is drawn from with replacement.
Every discriminator and network here was trained on draws of its own, as a certificate asks.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gaussian_mixture import Mixture, Problem, problem
from torch import Tensor

from refine_ext.demo import faulty_generator, load_digits
from refine_ext.linear_dual import solve_linear_dual
from refine_ext.networks import RandomFourierFeatures

FREQUENCIES = 32  # of random Fourier features, each a cosine and a sine
_GENERATED = 20_000  # images that are the digits' model
_OTHER = 300  # draws on which a discriminator is trained
_REACH, _SPACING = 8.0, 0.2  # of the quadrature's grid in the plane


def seed_of(*key: object) -> int:
    """A seed for torch that depends on all of the key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


@dataclass(frozen=True, eq=False)
class Truth:
    """A class of discriminators on P and on a generator Q, with all expectations known; float64.

    Attributes:
        real: phi of n draws of P, ``[n, d]``, by their number and a seed.
        fake: phi of as many of the generator.
        mean_real: E_P phi, ``[d]``.
        mean_model: E_Q phi, ``[d]``.
        bound: sup ||phi||, or the largest |phi_j| of a hull.
        hull: phi are the outputs of discriminators whose hull is the class, instead of features.
        nodes: phi ``[k, d]`` at the nodes of a quadrature of Q; None where it has none that is exact.
        node_weights: their weights ``[k]``, of sum 1.
    """

    real: Callable[[int, int], Tensor]
    fake: Callable[[int, int], Tensor]
    mean_real: Tensor
    mean_model: Tensor
    bound: float = 1.0
    hull: bool = False
    nodes: Tensor | None = None
    node_weights: Tensor | None = None

    def ipm(self, difference: Tensor) -> float:
        """sup of <w, difference> over the class with norm bound 1."""
        return float(difference.abs().max() if self.hull else difference.norm())


def fourier(x: Tensor, frequencies: Tensor) -> Tensor:
    """[cos(W x), sin(W x)] / sqrt(k), of norm 1. The package's own features of the same form first limit how far out
    a sample may lie, after which a mixture's expectation has no closed form."""
    phase = x.double() @ frequencies.T
    return torch.cat([phase.cos(), phase.sin()], 1) / math.sqrt(len(frequencies))


def mean_fourier(mixture: Mixture, frequencies: Tensor) -> Tensor:
    """E phi: E exp(i <w, x>) = sum_k weight_k exp(i <w, mean_k> - scale_k^2 ||w||^2 / 2)."""
    phase = frequencies @ mixture.means.T
    size = mixture.weights * torch.exp(-0.5 * frequencies.square().sum(1, keepdim=True) * mixture.scales**2)
    return torch.cat([(size * phase.cos()).sum(1), (size * phase.sin()).sum(1)]) / math.sqrt(len(frequencies))


def _mixture_features(d: int) -> tuple[Problem, Tensor]:
    mixtures = problem(d)
    left, right = mixtures.true.sample(4096, 1), mixtures.true.sample(4096, 2)
    bandwidth = (left - right).norm(dim=1).median()
    random = torch.Generator().manual_seed(seed_of("frequencies", d))
    return mixtures, torch.randn(FREQUENCIES, d, generator=random, dtype=torch.float64) / bandwidth


def _of_mixture(true: Mixture, model: Mixture, frequencies: Tensor) -> Truth:
    nodes = weights = None
    if frequencies.shape[1] == 2:
        # The trapezoid rule on Gaussians of deviation s is off by exp(-2 (pi s / spacing)^2): nothing for s >= 0.3.
        axis = torch.arange(-_REACH, _REACH + _SPACING / 2, _SPACING, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        nodes, weights = fourier(grid, frequencies), model.log_density(grid).exp() * _SPACING**2
    return Truth(
        real=lambda n, seed: fourier(true.sample(n, seed), frequencies),
        fake=lambda n, seed: fourier(model.sample(n, seed), frequencies),
        mean_real=mean_fourier(true, frequencies),
        mean_model=mean_fourier(model, frequencies),
        nodes=nodes,
        node_weights=weights,
    )


def mixture(d: int) -> Truth:
    """Random Fourier features on Gaussian mixtures in d dimensions."""
    mixtures, frequencies = _mixture_features(d)
    return _of_mixture(mixtures.true, mixtures.model, frequencies)


def perfect_model() -> Truth:
    """The same in the plane where the model is the truth and nothing can be gained."""
    mixtures, frequencies = _mixture_features(2)
    return _of_mixture(mixtures.true, mixtures.true, frequencies)


def _hull_of(features: Truth, weights: Tensor, offset: float = 0.0) -> Truth:
    """The hull of <w_j, phi> + offset for the rows of weights."""
    outputs = weights.T
    return Truth(
        real=lambda n, seed: features.real(n, seed) @ outputs + offset,
        fake=lambda n, seed: features.fake(n, seed) @ outputs + offset,
        mean_real=features.mean_real @ outputs + offset,
        mean_model=features.mean_model @ outputs + offset,
        bound=float(weights.norm(dim=1).max()) * features.bound + abs(offset),
        hull=True,
        nodes=None if features.nodes is None else features.nodes @ outputs + offset,
        node_weights=features.node_weights,
    )


def mixture_hull(members: int = 32) -> Truth:
    """The hull of discriminators between the plane's mixtures, each trained on draws of its own."""
    features, trained = mixture(2), []
    for j in range(members):
        real, fake = (
            draw(_OTHER, seed_of("hull", side, j)) for side, draw in enumerate((features.real, features.fake))
        )
        weight = solve_linear_dual(real, fake, norm_bound=5.0, tolerance=1e-5).weight
        trained.append(weight / weight.norm())
    return _hull_of(features, torch.stack(trained))


def one_function() -> Truth:
    """One cosine of mean 0 under P, and its negative: as small as a class gets. Here the complexity alone is no bound:
    |mean of n| exceeds 2 R_n = 2 sqrt(2/pi) deviation / sqrt(n), for large n, with probability 0.11."""
    mixtures, frequencies = _mixture_features(2)
    frequency = frequencies[:1]
    features = _of_mixture(mixtures.true, mixtures.model, frequency)
    cosine, sine = features.mean_real
    weight = torch.stack([sine, -cosine])[None] / features.mean_real.norm()
    return _hull_of(features, weight)


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """P: scikit-learn's digits, each as likely; Q: images that the demonstration's generator made, each as likely."""
    digits = load_digits(0)
    pool = torch.cat([torch.as_tensor(half) for half in (digits.train, digits.held_out)])
    made = torch.as_tensor(faulty_generator(digits, _GENERATED, 0).images)
    return pool.flatten(1).double() / 16, made.flatten(1).double() / 16


def _drawn(rows: Tensor, n: int, seed: int) -> Tensor:
    return rows[torch.randint(len(rows), (n,), generator=torch.Generator().manual_seed(seed))]


def _of_pools(real: Tensor, fake: Tensor, *, hull: bool) -> Truth:
    """phi of both pools, scaled to be bounded by exactly 1 on them."""
    size = max(float(x.abs().max() if hull else x.norm(dim=1).max()) for x in (real, fake))
    real, fake = real / size, fake / size
    return Truth(
        real=lambda n, seed: _drawn(real, n, seed),
        fake=lambda n, seed: _drawn(fake, n, seed),
        mean_real=real.mean(0),
        mean_model=fake.mean(0),
        hull=hull,
        nodes=fake,
        node_weights=torch.full((len(fake),), 1 / len(fake), dtype=torch.float64),
    )


def digits_fourier() -> Truth:
    """The package's random Fourier features of digits, fitted on draws of their own."""
    real, fake = _digits()
    features = RandomFourierFeatures(real.shape[1], 2 * FREQUENCIES)
    features.fit([_drawn(real, _OTHER, 1), _drawn(fake, _OTHER, 2)], torch.Generator().manual_seed(0))
    return _of_pools(features(real), features(fake), hull=False)


def train_networks(
    real: Tensor, fake: Tensor, seed: int, steps: int = 150
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Classifiers with 32 and 16 hidden units, all trained at once, the j-th on real[j] and fake[j] ``[n, d]``.

    Returns:
        What gives a batch's last hidden layers ``[members, n, 16]`` and logits ``[members, n]``.
    """
    members, _, width = real.shape
    random = torch.Generator().manual_seed(seed)
    shapes = ((width, 32), (32, 16), (16, 1))
    layers = [torch.randn(members, *shape, generator=random, dtype=real.dtype) / shape[0] ** 0.5 for shape in shapes]
    biases = [torch.zeros(members, 1, shape[1], dtype=real.dtype) for shape in shapes]

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x
        for layer, bias in zip(layers[:-1], biases[:-1], strict=True):
            hidden = torch.tanh(hidden @ layer + bias)
        return hidden, (hidden @ layers[-1] + biases[-1])[..., 0]

    optimizer = torch.optim.Adam([p.requires_grad_() for p in layers + biases], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        # each member's mean over its samples: a sum over members, whose gradients do not meet
        softplus = torch.nn.functional.softplus
        loss = (softplus(-both(real)[1]) + softplus(both(fake)[1])).mean(1).sum()
        loss.backward()
        optimizer.step()
    for parameter in layers + biases:
        parameter.requires_grad_(False)
    return both


def _trained_on_digits(members: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Last hidden layers and logits of networks on both pools, each trained on draws of its own."""
    real, fake = _digits()
    own = [
        torch.stack([_drawn(pool, _OTHER, seed_of("network", side, members, j)) for j in range(members)])
        for side, pool in enumerate((real, fake))
    ]
    both = train_networks(own[0], own[1], members)
    return both(real), both(fake)


def digits_network() -> Truth:
    """The last hidden layer of a network trained to tell digits from generated ones."""
    (real, _), (fake, _) = _trained_on_digits(1)
    return _of_pools(real[0], fake[0], hull=False)


def digits_hull(members: int = 16) -> Truth:
    """The hull of the logits of such networks."""
    (_, real), (_, fake) = _trained_on_digits(members)
    return _of_pools(real.T, fake.T, hull=True)


PROBLEMS: dict[str, Callable[[], Truth]] = {
    "mixture, 2-D": lambda: mixture(2),
    "mixture, 8-D": lambda: mixture(8),
    "mixture, 2-D, hull": mixture_hull,
    "mixture, one function": one_function,
    "mixture, perfect model": perfect_model,
    "digits": digits_fourier,
    "digits, network": digits_network,
    "digits, hull": digits_hull,
}


@functools.cache
def truth(name: str) -> Truth:
    """A problem by its name, made once."""
    return PROBLEMS[name]()
