"""`rademacher_norm_bounds`: closed forms, each norm by hand, above every search, what is left out and refused."""

from __future__ import annotations

import math

import pytest
import torch
from fitting import one_thread  # noqa: F401
from torch import nn

import refine_ext as rx
from refine_ext import norm_bounds
from refine_ext.networks import MLP

PEELED = ("neyshabur2015", "golowich2018", "golowich2018_l1")


def samples(n=40, width=3):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def chain(*parts):
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(*p) if isinstance(p, tuple) else p for p in parts]).double()


def linear(first, second, bias=False):
    return (first, second, bias)


# ---- Closed forms


@pytest.mark.parametrize("constraint", ["frobenius", "spectral"])
def test_one_layer_is_jensen_and_massart(constraint):
    x = samples()
    bounds = rx.rademacher_norm_bounds(chain(linear(3, 1)), x, constraint=constraint, norm_bound=2.5)
    jensen = 2.5 * float(x.square().sum().sqrt()) / 40
    assert bounds["neyshabur2015"] == bounds["golowich2018"] == pytest.approx(jensen, rel=1e-14)
    massart = math.sqrt(2 * math.log(6)) * float(x.square().sum(0).max().sqrt()) / 40
    assert bounds["golowich2018_l1"] == pytest.approx(2.5 * math.sqrt(3) * massart, rel=1e-14)
    # Khintchine: the exact value is within a factor sqrt 2 of Jensen's.
    exact = rx.rademacher_linear(x, 2.5, draws=4096, seed=0)
    assert jensen / math.sqrt(2) - 4 * exact.stderr < float(exact) < jensen + 4 * exact.stderr


def test_layers_without_activations_are_a_linear_class():
    x = samples()
    module = chain(linear(3, 5), nn.Identity(), linear(5, 4), linear(4, 1))
    bounds = rx.rademacher_norm_bounds(module, x, constraint="frobenius", norm_bound=[2.0, 3.0, 0.5])
    assert bounds["golowich2018"] == bounds["neyshabur2015"] == pytest.approx(3 * float(x.norm()) / 40, rel=1e-14)


def test_every_norm_and_constant_by_hand():
    """W_1 = [[3, 4], [0, -1]], W_2 = [2, -1], ReLU, on X = diag(3, 4)."""
    module = chain(linear(2, 2), nn.ReLU(), linear(2, 1))
    module[0].weight.data = torch.tensor([[3.0, 4.0], [0.0, -1.0]], dtype=torch.float64)
    module[2].weight.data = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    bounds = rx.rademacher_norm_bounds(module, torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64))
    frobenius = math.sqrt(26) * math.sqrt(5)
    spectral = math.sqrt((26 + math.sqrt(26**2 - 4 * 9)) / 2) * math.sqrt(5)  # of W'W: trace 26, determinant 9
    assert bounds["neyshabur2015"] == pytest.approx(2 * frobenius * 5 / 2, rel=1e-14)
    assert bounds["golowich2018"] == pytest.approx((1 + math.sqrt(2 * math.log(2))) * frobenius * 5 / 2, rel=1e-14)
    assert bounds["golowich2018_l1"] == pytest.approx(
        7 * 3 * math.sqrt(2 * (math.log(2) + math.log(4))) * 4 / 2, rel=1e-14
    )
    assert bounds["trivial"] == pytest.approx(spectral * 5 / math.sqrt(2), rel=1e-14)
    assert bounds["bartlett2017"] == bounds["parameters"] == bounds["trivial"]  # two samples say nothing


def test_entropy_bounds_on_many_samples_by_quadrature():
    """The two of Dudley's integral, with the integral and its lower end found numerically."""
    from scipy.integrate import quad
    from scipy.optimize import minimize_scalar

    n = 4_000_000
    module = chain(linear(2, 2), nn.ReLU(), linear(2, 1))
    x = torch.ones(1, 2, dtype=torch.float64).expand(n, 2)
    bounds = rx.rademacher_norm_bounds(module, x, constraint="spectral", norm_bound=[2.0, 3.0])
    largest = 6 * math.sqrt(2)
    assert bounds["trivial"] == pytest.approx(largest, rel=1e-9)
    # ||W_1'||_{2,1} <= 2 sqrt 2 sqrt 2, of W_2 it is the norm itself: the ratios are 2 and 1.
    squared = (largest**2 * n) * (2 ** (2 / 3) + 1) ** 3 * math.log(2 * 4)

    def dudley(log_low, log_cover):
        low = math.exp(log_low)
        # In log e, where the integrand is smooth.
        area = quad(lambda v: math.sqrt(log_cover(math.exp(v))) * math.exp(v), log_low, math.log(largest))[0]
        return 4 * low + 12 / math.sqrt(n) * area

    def spectral(log_low):
        return dudley(log_low, lambda e: 2 * squared / (n * e * e))

    best = minimize_scalar(spectral, bounds=(math.log(largest) - 12, math.log(largest)), method="bounded")
    assert bounds["bartlett2017"] == pytest.approx(best.fun, rel=1e-6)
    assert bounds["bartlett2017"] < bounds["trivial"] / 3
    integral = dudley(math.log(largest) - 30, lambda e: 6 * math.log(1 + 4 * largest / e))
    assert integral <= bounds["parameters"] < 1.1 * integral  # Jensen's inequality is close for a root of a logarithm
    assert bounds["parameters"] < bounds["trivial"] / 5


@pytest.mark.parametrize("depth", [2, 3])
def test_above_the_exact_complexity_of_networks_on_the_line(depth):
    """On one input, all of the norm goes through one unit a layer: sup = prod B_j max |sums of relu(x), relu(-x)|."""
    x = samples(10, 1)
    hidden = [part for _ in range(depth - 2) for part in (linear(4, 4), nn.ReLU())]
    module = chain(linear(1, 4), nn.ReLU(), *hidden, linear(4, 1))
    sides = torch.cat([x.relu(), (-x).relu()], 1)
    exact = 3.0 * float(rx.rademacher(sides, draws="all"))
    bounds = rx.rademacher_norm_bounds(module, x, constraint="frobenius", norm_bound=[1.5, *[1.0] * (depth - 2), 2.0])
    assert len(bounds) == 6 and all(bound > exact for bound in bounds.values())
    assert bounds["golowich2018"] < 4 * exact
    lower = rx.rademacher_neural(module, x, 64, 0, norm_bound=[1.5, *[1.0] * (depth - 2), 2.0], progress=False)
    assert float(lower) == pytest.approx(3.0 * float(rx.rademacher(sides, draws=64, seed=0)), rel=0.05)


# ---- Above every search


NETWORKS = {
    "linear": chain(linear(3, 1, True)),
    "relu": chain(linear(3, 8), nn.ReLU(), linear(8, 1)),
    "relu, biases": chain(linear(3, 8, True), nn.ReLU(), linear(8, 1, True)),
    "leaky, deep": chain(linear(3, 6), nn.LeakyReLU(0.2), linear(6, 6), nn.LeakyReLU(0.2), linear(6, 1)),
    "tanh": chain(linear(3, 8, True), nn.Tanh(), linear(8, 1)),
    "silu": chain(linear(3, 8), nn.SiLU(), linear(8, 1)),
}


@pytest.mark.parametrize("constraint", ["frobenius", "spectral"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("norm_bound", [0.5, 2.0])
def test_the_lower_estimate_is_below_every_upper_bound(name, constraint, norm_bound):
    module, same = NETWORKS[name], {"constraint": constraint, "norm_bound": norm_bound}
    for x in (samples(), samples(12, 3) ** 3):
        lower = rx.rademacher_neural(module, x, 16, 0, steps=100, progress=False, **same)
        bounds = rx.rademacher_norm_bounds(module, x, **same)
        assert len(bounds) >= 4
        # The bounds are of the mean over all signs: 4 standard errors of 16 draws.
        assert all(float(lower) < bound + 4 * lower.stderr for bound in bounds.values()), bounds
        # No single draw exceeds the trivial bound; and the search is no further below than these constants.
        assert float(lower.suprema.max()) <= bounds["trivial"] * (1 + 1e-12)
        assert min(bounds.values()) < 20 * float(lower)


@pytest.mark.parametrize("constraint", ["frobenius", "spectral"])
def test_norms_of_the_module_are_a_class_that_holds_it(constraint):
    """The class with the module's own norms as radii: its bounds are at least those by all of the module's norms."""
    x = samples()
    for name in ("relu", "relu, biases", "leaky, deep"):
        module = NETWORKS[name]
        own = rx.rademacher_norm_bounds(module, x)
        matrices = [
            each.weight.detach() if each.bias is None else torch.cat([each.weight, each.bias[:, None]], 1).detach()
            for each in module
            if isinstance(each, nn.Linear)
        ]
        order = 2 if constraint == "spectral" else "fro"
        radii = [float(torch.linalg.matrix_norm(matrix, order)) for matrix in matrices]
        held = rx.rademacher_norm_bounds(module, x, constraint=constraint, norm_bound=radii)
        assert held.keys() == own.keys()
        assert all(held[key] >= own[key] * (1 - 1e-12) for key in own)
        if constraint == "frobenius":
            assert held["golowich2018"] == pytest.approx(own["golowich2018"], rel=1e-12)


def test_norms_pass_the_one_on_to_later_biases():
    """A network with biases is the one without, of the matrices [[W, b], [0, 1]] on (x, 1)."""
    x = samples()
    module = NETWORKS["relu, biases"]
    plain = chain(linear(4, 9), nn.ReLU(), linear(9, 1))
    plain[0].weight.data = torch.zeros(9, 4, dtype=torch.float64)
    plain[0].weight.data[:8] = torch.cat([module[0].weight, module[0].bias[:, None]], 1).data
    plain[0].weight.data[8, 3] = 1
    plain[2].weight.data = torch.cat([module[2].weight, module[2].bias[:, None]], 1).data
    ones = torch.cat([x, torch.ones(40, 1, dtype=x.dtype)], 1)
    torch.testing.assert_close(module(x), plain(ones))
    bounds, expected = rx.rademacher_norm_bounds(module, x), rx.rademacher_norm_bounds(plain, ones)
    for key in (*PEELED, "bartlett2017", "trivial"):
        assert bounds[key] == pytest.approx(expected[key], rel=1e-12)


# ---- Assumptions


@pytest.mark.parametrize(
    ("activation", "peeled"),
    [
        (nn.ReLU(), PEELED),
        (nn.LeakyReLU(-0.5), PEELED),
        (nn.ELU(), PEELED[2:]),
        (nn.ReLU6(), PEELED[2:]),
        (nn.Hardtanh(), PEELED[2:]),
        (nn.Tanh(), ()),
        (nn.Softsign(), ()),
        (nn.SiLU(), ()),
        (nn.GELU(), ()),
    ],
)
def test_bounds_whose_assumptions_fail_are_left_out(activation, peeled):
    x, covers = samples(), {"bartlett2017", "parameters", "trivial"}
    biased = chain(linear(3, 4, True), activation, linear(4, 1, True))
    # -0.5 keeps no sign but homogeneity and the one.
    assert rx.rademacher_norm_bounds(biased, x).keys() == {*peeled, *covers}
    first = chain(linear(3, 4, True), activation, linear(4, 1))  # its one passes no activation
    homogeneous = isinstance(activation, (nn.ReLU, nn.LeakyReLU))
    assert rx.rademacher_norm_bounds(first, x).keys() == {*(PEELED if homogeneous else PEELED[2:]), *covers}


@pytest.mark.parametrize("activation", [*(kind() for kind in norm_bounds._LIPSCHITZ), nn.GELU(approximate="tanh")])
def test_lipschitz_constants_bound_every_slope(activation):
    at = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    slopes = activation(at).diff().abs() / at.diff()
    constant = norm_bounds._LIPSCHITZ[type(activation)]
    assert constant - 1e-2 < float(slopes.max()) <= constant * (1 + 1e-9)
    assert float(activation(torch.zeros(1))) == 0.0


def test_constants_of_steep_activations_multiply():
    x = samples()
    plain = chain(linear(3, 4), nn.LeakyReLU(0.5), linear(4, 1))
    steep = chain(linear(3, 4), nn.LeakyReLU(3.0), linear(4, 1))
    first, second = (rx.rademacher_norm_bounds(module, x) for module in (plain, steep))
    assert all(second[key] == pytest.approx(3 * first[key], rel=1e-12) for key in first)


# ---- Modules


def test_what_has_no_parameters_in_front_makes_features():
    x = samples()
    module = chain(nn.Flatten(), nn.Tanh(), linear(3, 4), nn.ReLU(), nn.Dropout(0.5), linear(4, 1), nn.Flatten(0))
    bare = nn.Sequential(module[2], module[3], module[5])
    before = x.clone()
    assert rx.rademacher_norm_bounds(module, x) == rx.rademacher_norm_bounds(bare, x.tanh())
    rx.rademacher_norm_bounds(nn.Sequential(nn.ReLU(inplace=True), *bare), x)
    assert torch.equal(x, before)


def test_frozen_layers_make_features_or_keep_their_norms():
    x = samples()
    module = chain(linear(3, 4), nn.ReLU(), linear(4, 5), nn.ReLU(), linear(5, 1))
    module[0].requires_grad_(False)
    head = nn.Sequential(module[2], module[3], module[4])
    features = module[1](module[0](x))
    same = {"constraint": "frobenius", "norm_bound": [2.0, 3.0]}
    assert rx.rademacher_norm_bounds(module, x, **same) == rx.rademacher_norm_bounds(head, features.detach(), **same)
    head[2].requires_grad_(False)
    last = float(head[2].weight.norm())
    one = rx.rademacher_norm_bounds(head, features.detach(), constraint="frobenius", norm_bound=2.0)
    expected = (1 + math.sqrt(2 * math.log(2))) * 2 * last * float(features.detach().norm()) / 40
    assert one["golowich2018"] == pytest.approx(expected, rel=1e-12)


def test_the_default_discriminator():
    network = MLP(3, (8, 8)).eval()
    x = samples().float()
    bounds = rx.rademacher_norm_bounds(network, x, constraint="spectral")
    lower = rx.rademacher_neural(network, x, 8, 0, constraint="spectral", steps=50, progress=False)
    assert bounds.keys() == {"bartlett2017", "parameters", "trivial"}
    assert 0 < float(lower) < min(bounds.values())
    disc = rx.fit_discriminator(x + 1, x, hidden=(8,), max_epochs=2, progress=False)
    assert rx.rademacher_norm_bounds(disc, x) == rx.rademacher_norm_bounds(disc.network, x)


def test_networks_that_are_zero():
    module = chain(linear(3, 4), nn.ReLU(), linear(4, 1))
    module[2].weight.data.zero_()
    assert set(rx.rademacher_norm_bounds(module, samples()).values()) == {0.0}
    assert set(rx.rademacher_norm_bounds(NETWORKS["relu"], torch.zeros(5, 3)).values()) == {0.0}


def partly_frozen():
    module = chain(linear(3, 1, True))
    module[0].bias.requires_grad_(False)
    return module


def not_finite():
    module = chain(linear(3, 1))
    module[0].weight.data[0, 0] = math.nan
    return module


@pytest.mark.parametrize(
    ("module", "options", "error", "message"),
    [
        (lambda x: x, {}, TypeError, "module must be a torch.nn.Module, got function"),
        (nn.ReLU(), {}, ValueError, "one that has no nn.Linear"),
        (chain(linear(3, 1)).requires_grad_(False), {"constraint": "spectral"}, ValueError, "has no trainable nn.Lin"),
        (nn.Conv1d(1, 1, 1), {}, ValueError, "begins with Conv1d, layer ''"),
        (chain(linear(3, 4), nn.PReLU(), linear(4, 1)), {}, ValueError, "has PReLU, layer '1'"),
        (chain(linear(3, 4), nn.Sigmoid(), linear(4, 1)), {}, ValueError, "has Sigmoid, layer '1'"),
        (chain(linear(3, 4), nn.Hardtanh(0.5, 1.0), linear(4, 1)), {}, ValueError, "which is not 0 at 0"),
        (chain(linear(3, 4)), {}, ValueError, "ends in 4 outputs"),
        (chain(linear(3, 1), nn.ReLU()), {}, ValueError, "ends in 1 outputs of an activation"),
        (partly_frozen(), {"constraint": "frobenius"}, ValueError, "layer '0' has a weight and a bias of which only"),
        (not_finite(), {}, ValueError, "layer '0' has NaN or infinite parameters"),
        (NETWORKS["relu"], {"constraint": "nuclear"}, ValueError, "constraint must be None, 'frobenius' or 'spectral'"),
        (NETWORKS["relu"], {"norm_bound": 1.0}, ValueError, "norm_bound needs a constraint"),
        (NETWORKS["relu"], {"constraint": "spectral", "norm_bound": [1.0]}, ValueError, r"one entry for each of \['0"),
        (NETWORKS["relu"], {"x": torch.full((2, 3), math.inf)}, ValueError, "x must be finite and not empty"),
        (NETWORKS["relu"], {"x": "x"}, TypeError, "x must be a NumPy array or a torch tensor, got str"),
    ],
)
def test_bad_input(module, options, error, message):
    with pytest.raises(error, match="^rademacher_norm_bounds: .*" + message):
        rx.rademacher_norm_bounds(module, **{"x": samples(), **options})
