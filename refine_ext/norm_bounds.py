"""Rademacher complexity of multilayer perceptrons from above: the classical bounds by norms of their layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .discriminator import Discriminator
from .networks import MLP
from .norm_balls import Constraint, radii_of
from .samples import as_tensor, count_nonfinite

_FUNCTION = "rademacher_norm_bounds"

# Activations with phi(0) = 0 and their Lipschitz constants, those of SiLU and GELU (1.0999 and 1.129) rounded up.
_LIPSCHITZ = {
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Tanh: 1.0,
    nn.Hardtanh: 1.0,
    nn.Softsign: 1.0,
    nn.SiLU: 1.1,
    nn.GELU: 1.13,
}
_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU)


@dataclass
class _Layer:
    """One linear layer as a matrix [W b] and what follows it; norms bound those of every matrix in the class."""

    name: str
    linear: nn.Linear
    lipschitz: float = 1.0
    nonlinear: bool = False
    homogeneous: bool = True
    keeps_one: bool = True  # phi(1) = 1: what carries a one to later biases
    rows: int = 0
    columns: int = 0
    frobenius: float = 0.0
    spectral: float = 0.0
    row_l1: float = 0.0  # the largest sum of magnitudes of a row
    row_l2_sum: float = 0.0  # the sum of the rows' Euclidean norms


def rademacher_norm_bounds(
    module: nn.Module,
    x: Tensor | np.ndarray,
    *,
    constraint: Constraint | None = None,
    norm_bound: float | Sequence[float] | None = None,
) -> dict[str, float]:
    r"""Upper bounds of the empirical Rademacher complexity of a class of multilayer perceptrons, by name.

    ``f(x) = W_d phi(W_{d-1} ... phi(W_1 x))``, X the n samples as rows, p the number of activations that are not the
    identity, L the product of their Lipschitz constants; all hold with and without the magnitude around the sum:

    - ``neyshabur2015``: ``2^p L prod ||W_j||_F ||X||_F / n``
    - ``golowich2018``: ``(1 + sqrt(2 p log 2)) L prod ||W_j||_F ||X||_F / n``
    - ``golowich2018_l1``: ``sqrt(2 (p log 2 + log 2D)) L prod ||W_j||_{1,inf} max_k ||X_k||_2 / n``, of D columns
    - ``bartlett2017``: ``12 sqrt(2) (C / n) (1 + log(T n / (3 sqrt(2) C)))``, or T where that is smaller;
      ``C = L prod ||W_j||_2 ||X||_F (sum_j (||W_j'||_{2,1} / ||W_j||_2)^{2/3})^{3/2} sqrt(log(2 max_j |W_j|))``
    - ``parameters``: ``12 T sqrt((P / n) ((1 + 2d) log(1 + 2d) - 2d log 2d))``, or T, P the number of weights
    - ``trivial``: ``T = L prod ||W_j||_2 ||X||_F / sqrt(n)``, the largest root mean square of an output

    ``||W||_{1,inf}`` is the largest sum of magnitudes of a row, ``||W'||_{2,1}`` the sum of the rows' Euclidean norms,
    ``|W|`` the number of entries. The class: all networks of this architecture whose norms in a bound's formula are
    at most those of the module; with `constraint`, that of `rademacher_neural`, whose estimate is below each of them.

    Assumptions: phi elementwise with phi(0) = 0; for the first two also positively homogeneous (ReLU, LeakyReLU).
    Biases are weights of an input that is 1, which earlier layers pass on (W = [[W, b], [0, 1]], whose norms are
    used): the first three need phi(1) = 1 in front of a bias for this. Bounds whose assumptions fail are left out.

    Args:
        module: nn.Linear layers and activations in an nn.Sequential, what :func:`fit_discriminator` makes of an MLP, or
            one nn.Linear; one output. Dropout counts as in evaluation mode. What comes before the first nn.Linear and
            has no parameters (with `constraint`: none that require gradients) makes fixed features of `x`.
        x: samples ``[n, ...]``.
        constraint: "frobenius" or "spectral", as in `rademacher_neural`. None: the norms of the module itself. A later
            layer without parameters that require gradients keeps its own norms.
        norm_bound: of `constraint`, one for all layers or one for each, by default 1. The other norms are at most
            ``||W||_F <= sqrt(rank) ||W||_2``, ``||W||_{1,inf} <= sqrt(columns) min(||W||_F, ||W||_2)``,
            ``||W'||_{2,1} <= sqrt(rows) ||W||_F``, ``||W||_2 <= ||W||_F``.

    Returns:
        A dict from name to value, of the names above whose assumptions hold.

    Raises:
        TypeError: samples, norm bounds or a module of another type.
        ValueError: a layer that is none of the above, named; more than one output; a norm bound without constraint;
            samples that are not finite.

    Sources: Neyshabur, Tomioka and Srebro, "Norm-based capacity control in neural networks", COLT 2015, theorem 1;
    Golowich, Rakhlin and Shamir, "Size-independent sample complexity of neural networks", COLT 2018, theorems 1 and 2,
    here with the number of activations for their depth, which their proof gives, and the smaller constants of the
    comment below; Bartlett, Foster and Telgarsky, "Spectrally-normalized margin bounds for neural networks", NIPS
    2017, theorem 3.3, with rounding of Maurey's lemma and constants of Dudley's integral included.

    >>> import torch, refine_ext as rx
    >>> bounds = rx.rademacher_norm_bounds(torch.nn.Linear(2, 1), torch.ones(8, 2), constraint="frobenius")
    >>> round(bounds["golowich2018"], 6) == round((8 * 3) ** 0.5 / 8, 6)  # ||w|| <= 1: ||(X, 1)||_F / n
    True
    """
    if constraint not in (None, "frobenius", "spectral"):
        raise ValueError(f"{_FUNCTION}: constraint must be None, 'frobenius' or 'spectral', got {constraint!r}")
    if constraint is None and norm_bound is not None:
        raise ValueError(f"{_FUNCTION}: norm_bound needs a constraint, 'frobenius' or 'spectral', whose bound it is")
    x = as_tensor(x, function=_FUNCTION, argument="x")
    if x.numel() == 0 or count_nonfinite(x):
        raise ValueError(f"{_FUNCTION}: x must be finite and not empty, got shape {list(x.shape)}")
    x, layers = _chain(module, x, of_class=constraint is not None)
    last_bias = max((k for k, layer in enumerate(layers) if layer.linear.bias is not None), default=-1)
    free = [layer for layer in layers if constraint is not None and layer.linear.weight.requires_grad]
    radii = radii_of(_FUNCTION, 1.0 if norm_bound is None else norm_bound, [layer.name for layer in free])
    radius_of = {layer.name: radius for layer, radius in zip(free, radii, strict=True)}
    for k, layer in enumerate(layers):
        _set_norms(layer, radius_of.get(layer.name), constraint, bias=k <= last_bias, carry=k < last_bias)
    if last_bias >= 0:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    return _bounds(x, layers, carried=all(layer.keeps_one for layer in layers[: max(0, last_bias)]))


def _bounds(x: Tensor, layers: list[_Layer], *, carried: bool) -> dict[str, float]:
    # Peeling, for the first three. For every convex, increasing g >= 0 and F a class of vector-valued functions,
    #   E sup_{f in F, ||W||_F <= B} g(||sum_i s_i phi(W f(x_i))||) <= 2 E sup_f g(B ||sum_i s_i f(x_i)||):
    # by homogeneity ||.||^2 = sum_j ||w_j||^2 (sum_i s_i phi(<w_j, f>/||w_j||))^2 is largest with one row that has all
    # of the norm; g(|z|) <= g(z) + g(-z) and symmetry make the 2; and E sup g(sum s phi(t)) <= E sup g(sum s t) for
    # contractions with phi(0) = 0 (Ledoux and Talagrand 1991, 4.20). Without phi there is no 2. The norm {1,inf} with
    # maxima for Euclidean norms: a maximum over rows is one over a row, and no homogeneity is needed. With M the
    # product of the bounds and Z = M ||sum s x|| (or M max_k |sum s x_k|):
    #   g(z) = max(z, 0):    n R <= 2^p E Z <= 2^p M ||X||_F;
    #   g(z) = exp(a z):     n R <= (p log 2 + log E exp(a Z)) / a, and for the Euclidean norm (bounded differences
    #                        2 M ||x_i||) log E exp(a Z) <= a M ||X||_F + a^2 M^2 ||X||_F^2 / 2;
    #                        for the maximum of 2D signed sums <= log 2D + a^2 M^2 max_k ||X_k||^2 / 2; best a.
    # The rest bounds T, the root mean square of f, and covers the class in L2 of the samples:
    #   R <= 4 a + (12 / sqrt n) int_a^T sqrt(log N(e)) de for every a >= 0, and R <= T
    # (chaining at T 2^-j: |f_j - f_{j-1}| <= 3 T 2^-j and Massart's lemma with at most N^2 differences).
    #   bartlett2017: layer j's output on the samples, sum_{ck} W_ck Y_k e_c', lies in ||W'||_{2,1} ||Y||_F times the
    #     convex hull of the 2 |W_j| matrices +-Y_k e_c' / ||Y_k||. By Maurey's lemma ceil(t) of them come within e_j,
    #     t = (||W'||_{2,1} ||Y||_F / e_j)^2; none is needed for t <= 1, so log N_j <= 2 t log(2 |W_j|). Centres are
    #     projected on the layer's convex set, so that norms multiply on. With e_j in proportion to the 2/3 powers,
    #     sum_j e_j prod_{l > j} ||W_l|| = e: log N <= 2 (C / e)^2; the integral with a = 3 sqrt(2) C / n.
    #   parameters: matrices within eta ||W_j||_2 of each other, (1 + 2 / eta)^|W_j| of them by volume, move f by at
    #     most d eta T, one layer at a time: log N <= P log(1 + 2 d T / e), and sqrt's integral by Jensen.
    n, width = x.shape
    depth, p = len(layers), sum(layer.nonlinear for layer in layers)
    norm, column = float(x.norm()), float(x.norm(dim=0).max())
    lipschitz = math.prod(layer.lipschitz for layer in layers)
    bounds = {}
    if carried and all(layer.homogeneous for layer in layers):
        frobenius = lipschitz * math.prod(layer.frobenius for layer in layers) * norm / n
        bounds["neyshabur2015"] = 2.0**p * frobenius
        bounds["golowich2018"] = (1.0 + math.sqrt(2.0 * p * math.log(2.0))) * frobenius
    if carried:
        l1 = lipschitz * math.prod(layer.row_l1 for layer in layers) * column / n
        bounds["golowich2018_l1"] = math.sqrt(2.0 * (p * math.log(2.0) + math.log(2.0 * width))) * l1
    trivial = lipschitz * math.prod(layer.spectral for layer in layers) * norm / math.sqrt(n)
    bounds["bartlett2017"] = bounds["parameters"] = trivial
    if trivial > 0.0:
        ratios = sum((layer.row_l2_sum / layer.spectral) ** (2.0 / 3.0) for layer in layers)
        entries = max(layer.rows * layer.columns for layer in layers)
        cut = 3.0 * math.sqrt(2.0 * math.log(2.0 * entries) / n) * ratios**1.5  # a / T
        if cut < 1.0:
            bounds["bartlett2017"] = trivial * min(1.0, 4.0 * cut * (1.0 - math.log(cut)))
        weights = sum(each.numel() for layer in layers for each in layer.linear.parameters())
        entropy = (1 + 2 * depth) * math.log(1 + 2 * depth) - 2 * depth * math.log(2 * depth)
        bounds["parameters"] = trivial * min(1.0, 12.0 * math.sqrt(weights / n * entropy))
    bounds["trivial"] = trivial
    return bounds


def _set_norms(layer: _Layer, radius: float | None, constraint: str | None, *, bias: bool, carry: bool) -> None:
    """Norms of [W b] with the row that passes the one on; within the class's radius, or its own."""
    linear = layer.linear
    weight = linear.weight.detach().double()
    layer.rows, layer.columns = weight.shape[0] + carry, weight.shape[1] + bias
    if radius is None:
        if bias:
            column = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double()
            weight = torch.cat([weight, column[:, None]], 1)
        if carry:
            weight = torch.cat([weight, torch.eye(1, layer.columns).to(weight).flip(1)])
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{_FUNCTION}: module's layer {layer.name!r} has NaN or infinite parameters")
        layer.frobenius = float(weight.norm())
        layer.spectral = float(torch.linalg.matrix_norm(weight, 2))
        layer.row_l1 = float(weight.abs().sum(1).max())
        layer.row_l2_sum = float(weight.norm(dim=1).sum())
        return
    rank = min(weight.shape[0], layer.columns) if linear.bias is not None else min(weight.shape)
    inputs = weight.shape[1] + (linear.bias is not None)
    frobenius = radius * math.sqrt(rank) if constraint == "spectral" else radius
    layer.frobenius = math.hypot(frobenius, float(carry))
    layer.spectral = math.hypot(radius, float(carry))
    layer.row_l1 = max(radius * math.sqrt(inputs), float(carry))
    layer.row_l2_sum = math.sqrt(weight.shape[0]) * frobenius + carry


def _chain(module: nn.Module, x: Tensor, *, of_class: bool) -> tuple[Tensor, list[_Layer]]:
    """Features of the samples, float64 ``[n, k]``, and the layers from the first nn.Linear on."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{_FUNCTION}: module must be a torch.nn.Module, got {type(module).__name__}")
    layers: list[_Layer] = []
    x = x.to(next(module.parameters(), x)).clone()  # of the user's memory, which a layer may work in
    for name, each in _flat(module, ""):
        fixed = not any(p.requires_grad or not of_class for p in each.parameters())
        if isinstance(each, (nn.Identity, nn.modules.dropout._DropoutNd)):
            continue
        if not layers and fixed:
            with torch.no_grad():
                x = copy.deepcopy(each).eval()(x)
        elif isinstance(each, nn.Linear):
            if of_class:
                _refuse_partly_frozen(name, each)
            layers.append(_Layer(name, each))
        elif not layers:
            raise _no_chain(f"begins with {type(each).__name__}, layer {name!r}")
        elif not isinstance(each, nn.Flatten):
            _add_activation(layers[-1], name, each)
    if not layers:
        raise _no_chain("has no trainable nn.Linear" if of_class else "has no nn.Linear")
    if layers[-1].linear.out_features != 1 or layers[-1].nonlinear:
        raise _no_chain(f"ends in {layers[-1].linear.out_features} outputs{' of an activation' * layers[-1].nonlinear}")
    return x.flatten(1).double(), layers


def _flat(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, Discriminator):
        module = module.network
    if isinstance(module, (nn.Sequential, MLP)):
        for child, each in module.named_children():
            yield from _flat(each, f"{name}.{child}" if name else child)
    else:
        yield name, module


def _add_activation(layer: _Layer, name: str, activation: nn.Module) -> None:
    if isinstance(activation, nn.LeakyReLU):
        lipschitz = max(1.0, abs(activation.negative_slope))
    elif isinstance(activation, nn.ELU):
        lipschitz = max(1.0, abs(activation.alpha))
    elif type(activation) in _LIPSCHITZ:
        lipschitz = _LIPSCHITZ[type(activation)]
    else:
        raise _no_chain(f"has {type(activation).__name__}, layer {name!r}")
    at = torch.tensor([0.0, 1.0], dtype=torch.float64)
    zero, one = activation(at.clone()).tolist()
    if zero != 0.0:
        raise _no_chain(f"has {activation}, layer {name!r}, which is not 0 at 0")
    layer.lipschitz *= lipschitz
    layer.nonlinear = True
    layer.homogeneous &= isinstance(activation, _HOMOGENEOUS)
    layer.keeps_one &= one == 1.0


def _refuse_partly_frozen(name: str, linear: nn.Linear) -> None:
    if len({p.requires_grad for p in linear.parameters()}) > 1:
        raise ValueError(
            f"{_FUNCTION}: module's layer {name!r} has a weight and a bias of which only one requires gradients; the "
            "norms of such a class are not known"
        )


def _no_chain(found: str) -> ValueError:
    return ValueError(
        f"{_FUNCTION}: module must be nn.Linear layers with activations between them (ReLU, LeakyReLU, Tanh, SiLU, "
        f"GELU, ELU, ReLU6, Hardtanh, Softsign) and one output, got one that {found}"
    )
