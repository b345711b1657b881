"""`rademacher_neural`: classes whose supremum is known, what may never lower it, draws, batches, modes, bad input."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from fitting import one_thread  # noqa: F401
from torch import nn

import refine_ext as rx
from refine_ext import neural_complexity
from refine_ext.norm_balls import Layer, projection_of


def samples(n=40, width=3, dtype=torch.float64):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def signs_of(n, draws, seed=0):
    like = torch.empty(0, dtype=torch.float64)
    return torch.ops.refine_ext.multipliers(like, n, draws, 0, 0, seed, False)


def mlp(*widths, bias=False, activation=nn.ReLU):
    layers = []
    for first, second in pairwise(widths):
        layers += [nn.Linear(first, second, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


def search(module, x, draws=6, seed=0, **options):
    return rx.rademacher_neural(module, x, draws, seed, progress=False, **options)


# ---- Classes whose supremum is known


@pytest.mark.parametrize("constraint", ["frobenius", "spectral"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_has_the_value_of_the_linear_ball(constraint, bias):
    # A matrix of one row has one singular value, its Euclidean norm; a bias is the weight of an input of 1.
    x = samples()
    found = search(mlp(3, 1, bias=bias), x, constraint=constraint, norm_bound=2.5)
    features = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if bias else x
    exact = rx.rademacher_linear(features, 2.5, draws=6, seed=0)
    # The angle to the maximiser shrinks at every step: the value, quadratic in it, is exact to rounding.
    torch.testing.assert_close(found.suprema, exact.suprema, rtol=1e-12, atol=0)
    assert found.kind == "lower"


@pytest.mark.parametrize("constraint", ["frobenius", "spectral"])
def test_linear_layers_behind_one_another_have_the_product_of_their_bounds(constraint):
    x = samples()
    found = search(mlp(3, 7, 5, 1, activation=nn.Identity), x, constraint=constraint, norm_bound=[2.0, 0.5, 3.0])
    exact = 3.0 * (signs_of(40, 6) @ x).norm(dim=1) / 40
    assert bool((found.suprema <= exact * (1 + 1e-12)).all())
    torch.testing.assert_close(found.suprema, exact, rtol=1e-3, atol=0)


def exact_relu_of_the_plane(x, signs):
    """max over unit w of |sum_i sigma_i relu(w x_i)|: linear in w between the directions at which a sample switches."""
    angles = np.arctan2(x[:, 1], x[:, 0])
    edges = np.sort(np.concatenate([angles - np.pi / 2, angles + np.pi / 2]) % (2 * np.pi))
    edges = np.append(edges, edges[0] + 2 * np.pi)
    best = 0.0
    for low, high in pairwise(edges):
        middle = np.array([np.cos((low + high) / 2), np.sin((low + high) / 2)])
        total = (signs[:, None] * x)[x @ middle > 0].sum(0)
        for at in (low, high):
            best = max(best, abs(total @ [np.cos(at), np.sin(at)]))
        for direction in (total, -total):
            if (np.arctan2(direction[1], direction[0]) - low) % (2 * np.pi) < high - low:
                best = max(best, np.linalg.norm(total))
    return best


@pytest.mark.parametrize("width", [1, 2])
def test_a_hidden_layer_in_the_frobenius_ball_is_as_good_as_its_best_unit(width):
    # sum_j a_j |w_j| s_j <= |a| |W| max_j |s_j|: all of both norms goes to one unit.
    x = samples(30, width)
    found = search(mlp(width, 8, 1), x, draws=12, norm_bound=[2.0, 3.0], restarts=3)
    rows = x.numpy() if width == 2 else np.concatenate([x.numpy(), np.zeros((30, 1))], 1)
    exact = torch.tensor([6.0 / 30 * exact_relu_of_the_plane(rows, s) for s in signs_of(30, 12).numpy()])
    assert bool((found.suprema <= exact * (1 + 1e-9)).all())
    # 24 random units with momentum: most draws reach their best unit, the others a good one.
    assert float(found) > 0.98 * float(exact.mean())
    assert int((found.suprema > 0.999 * exact).sum()) >= 9


def test_without_the_magnitude_a_class_of_one_sign_is_smaller():
    # f = relu(w x), |w| <= 1, of either sign of x: the supremum is the best of 0 and two sums.
    x = samples(20, 1)
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU()).double()
    sides = torch.cat([x.relu(), (-x).relu()], 1)
    sums = signs_of(20, 12) @ sides / 20
    for absolute, exact in ((False, sums.amax(1).clamp(min=0)), (True, sums.abs().amax(1))):
        found = search(module, x, draws=12, restarts=8, absolute=absolute)
        assert bool((found.suprema <= exact + 1e-12).all())
        torch.testing.assert_close(found.suprema, exact, rtol=1e-9, atol=1e-9)


def test_a_projection_of_ones_own():
    # |w_j| <= 0.3: the supremum is 0.3 |sum_i sigma_i x_i|_1 / n.
    x = samples()
    found = search(mlp(3, 1), x, constraint=lambda p: {name: each.clamp(-0.3, 0.3) for name, each in p.items()})
    exact = 0.3 * (signs_of(40, 6) @ x).abs().sum(1) / 40
    torch.testing.assert_close(found.suprema, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (1, 5), (6, 6)])
def test_the_projections_are_those_of_singular_values_and_of_norms(shape):
    layer = nn.Linear(shape[1], shape[0]).double()
    matrices = torch.randn(5, shape[0], shape[1] + 1, dtype=torch.float64) * torch.logspace(-2, 2, 5)[:, None, None]
    parts = {"weight": matrices[..., :-1], "bias": matrices[..., -1]}
    layers = [Layer("", ("weight", "bias"), 1.5)]

    def projected(constraint):
        inside = projection_of("test", constraint, layer, layers)(parts)
        return torch.cat([inside["weight"], inside["bias"][..., None]], 2)

    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    # Squaring into the Gram matrix and back loses half the digits of nothing that is cut: 1e-13 of the norm.
    norms = s.amax(1)[:, None, None]
    nearest = (u * s.clamp(max=1.5)[:, None]) @ v
    assert float(((projected("spectral") - nearest).abs() / norms).max()) < 1e-13
    frobenius = matrices * (1.5 / matrices.square().sum((1, 2)).sqrt()).clamp(max=1)[:, None, None]
    torch.testing.assert_close(projected("frobenius"), frobenius, rtol=1e-14, atol=0)


# ---- What may not lower it, and what scales it


def test_values_of_homogeneous_networks_scale_with_the_product_of_bounds():
    # Powers of two scale every number of the search exactly: the same bits.
    x, module = samples(), mlp(3, 8, 8, 1)
    for constraint in ("frobenius", "spectral"):
        one = search(module, x, constraint=constraint, steps=40)
        scaled = search(module, x, constraint=constraint, steps=40, norm_bound=[2.0, 0.25, 16.0])
        assert torch.equal(scaled.suprema, 8 * one.suprema)


def test_more_steps_and_more_restarts_never_lower_a_draw():
    x, module = samples(), mlp(3, 8, 1, bias=True)
    runs = [search(module, x, steps=steps, restarts=r).suprema for steps, r in ((1, 1), (5, 1), (40, 1), (40, 3))]
    for less, more in pairwise(runs):
        assert bool((more >= less).all()) and float(more.sum()) > float(less.sum())


def test_larger_classes_are_found_larger():
    x = samples()
    narrow = search(mlp(3, 1, 1), x, restarts=4)
    wide, spectral = (search(mlp(3, 16, 1), x, restarts=4, constraint=c) for c in ("frobenius", "spectral"))
    biased = search(mlp(3, 16, 1, bias=True), x, restarts=4)
    # In the Frobenius balls the width brings nothing but more units to start from, and both searches get close to
    # the supremum; the spectral ball holds that ball, and a bias may be zero.
    assert float(wide) == pytest.approx(float(narrow), rel=1e-2)
    assert float(spectral) > 1.1 * float(wide) and float(biased) > 0.99 * float(wide)


# ---- Draws and batches


def test_draws_are_those_of_rademacher_and_parts_merge():
    x, module = samples(), mlp(3, 6, 1)
    outputs = torch.empty(40, 6, dtype=torch.float32)
    whole = search(module, x, steps=30, outputs=outputs)
    own = (signs_of(40, 6) * outputs.T.double()).sum(1).abs() / 40
    torch.testing.assert_close(own, whole.suprema, rtol=1e-6, atol=0)  # float32 outputs
    finite = rx.rademacher(outputs, draws=6, seed=0)
    assert bool((finite.suprema >= whole.suprema * (1 - 1e-6)).all())
    parts = [search(module, x, draws=2, first_draw=first, steps=30) for first in (0, 4, 2)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.ranges == ((0, 6),)
    # Matrix products of another batch round otherwise, and 30 steps repeat it.
    torch.testing.assert_close(merged.suprema, whole.suprema, rtol=1e-6, atol=0)


def test_networks_found_are_a_class_inside_on_signs_they_were_not_trained_on():
    x, module = samples(), mlp(3, 6, 1)
    outputs = torch.empty(40, 16, dtype=torch.float64)
    found = search(module, x, draws=16, outputs=outputs)
    fresh = rx.rademacher(outputs, draws=512, seed=1)
    exact_upper = rx.rademacher_linear(x, draws=512, seed=1)  # of twice the linear class: Ledoux and Talagrand
    assert 0 < float(fresh) < float(found) + 4 * (found.stderr + fresh.stderr)
    assert float(fresh) <= 2 * float(exact_upper)


@pytest.mark.parametrize("memory", [1, 5000])
def test_batches_of_draws_and_of_samples_change_nothing_but_rounding(memory):
    x, module = samples(), mlp(3, 6, 1, bias=True)
    whole = search(module, x, steps=5)
    assert torch.equal(search(module, x, steps=5).suprema, whole.suprema)
    for at_once in (None, 4):
        parts = search(module, x, steps=5, draws_at_once=at_once, memory=memory)
        torch.testing.assert_close(parts.suprema, whole.suprema, rtol=1e-9, atol=0)


def test_memory_that_the_backward_pass_keeps_is_bounded(monkeypatch):
    # 2 hidden layers of 64: 1 KiB of a float64 sample's activations and as much of their inputs, for each network.
    module, x = mlp(3, 64, 64, 1), samples(512)
    most = 0
    networks = neural_complexity._networks

    def counted(module, parameters, x):
        nonlocal most
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            result = networks(module, parameters, x)
        most = max(most, kept)
        return result

    monkeypatch.setattr(neural_complexity, "_networks", counted)
    search(module, x, draws=8, steps=2, memory=1 << 20)
    weights = 2 * 8 * sum(p.nbytes for p in module.parameters())
    assert 1 << 18 < most < (1 << 20) + weights


def test_seeds():
    x, module = samples(), mlp(3, 4, 1)
    before = torch.random.get_rng_state()
    one, other = search(module, x, steps=5), search(module, x, steps=5, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(one.suprema, other.suprema)
    torch.manual_seed(3)
    drawn = search(module, x, steps=5, seed=None)
    torch.manual_seed(3)
    assert torch.equal(search(module, x, steps=5, seed=None).suprema, drawn.suprema)
    assert torch.equal(search(module, x, steps=5, seed=drawn.seed).suprema, drawn.suprema)


# ---- Modules, types and modes


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.last = nn.Linear(3, 1)

    def forward(self, x):
        return self.last(self.norm(self.convolution(x)).relu().mean((2, 3)))


def test_convolutions_and_fixed_statistics():
    module, x = Convolutions().eval(), torch.rand(20, 1, 5, 5)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    found = search(module, x, draws=4, steps=30)
    assert 0 < float(found) < math.inf
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_parameters_without_gradients_are_the_same_in_every_network():
    x, module = samples(), mlp(3, 8, 1)
    module[0].requires_grad_(False)
    features = module[1](module[0](x)).detach()
    exact = rx.rademacher_linear(features, draws=6, seed=0)
    torch.testing.assert_close(search(module, x).suprema, exact.suprema, rtol=1e-12, atol=0)


class Tied(nn.Module):
    """f(x) = 1' W W x, with one W at two places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.second = nn.Linear(1, 1, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_a_shared_parameter_is_one_parameter():
    x = samples(width=1)
    found = search(Tied().double(), x, norm_bound=3.0)
    torch.testing.assert_close(found.suprema, 9 * (signs_of(40, 6) @ x)[:, 0].abs() / 40, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_change_nothing(mode):
    x, module = samples(), mlp(3, 4, 1)
    expected = search(module, x, steps=10)
    with mode():
        inside = search(module, samples(), steps=10)
    assert torch.equal(inside.suprema, expected.suprema)


def test_samples_of_other_types():
    module = nn.Sequential(nn.Flatten(), nn.Linear(6, 1))
    images = torch.randint(0, 256, (30, 2, 3), dtype=torch.uint8)
    expected = search(module, images.float())
    for x in (images, images.numpy(), images.double(), images.numpy().astype(np.float16)):
        assert torch.equal(search(module, x).suprema, expected.suprema)
    exact = rx.rademacher_linear(torch.cat([images.flatten(1), torch.ones(30, 1)], 1), draws=6, seed=0)
    torch.testing.assert_close(expected.suprema, exact.suprema, rtol=1e-5, atol=0)  # float32 products


def test_trained_discriminators_are_modules_too():
    real, fake = samples(60).float() + 1, samples(60).float()
    disc = rx.fit_discriminator(real, fake, hidden=(8,), max_epochs=2, progress=False)
    assert torch.equal(search(disc, fake, steps=5).suprema, search(disc.network, fake, steps=5).suprema)


def test_one_sample_and_zero_samples():
    assert float(search(mlp(2, 1), torch.tensor([[3.0, 4.0]]))) == pytest.approx(5.0, rel=1e-12)
    assert float(search(mlp(2, 4, 1), torch.zeros(3, 2))) == 0.0


# ---- Bad input


class Outputs(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros(1))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def counting(self, x):
    self.calls += 1
    return x @ self.weight


def branching(self, x):
    return x @ self.weight if bool(self.weight.sum() > 0) else -x @ self.weight


def exploding(self, x):
    return torch.where((x @ self.weight).abs() > 1e-3, x @ self.weight / 0.0, x @ self.weight)


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (lambda x: x, TypeError, "module must be a torch.nn.Module, got function"),
        (nn.ReLU(), ValueError, "module must have a parameter that requires gradients, ReLU has none"),
        (mlp(3, 1).requires_grad_(False), ValueError, "parameter that requires gradients"),
        (mlp(3, 1).half(), TypeError, "module's 0.weight must be float64 or float32, got torch.float16"),
        (nn.LazyLinear(1), ValueError, "module's weight has no shape yet"),
        (mlp(3, 2), ValueError, r"module must return \[40\] or \[40, 1\], got \[40, 2\]"),
        (Outputs(lambda self, x: 1.0), TypeError, r"module must return a tensor of \[40\] outputs, got float"),
        (Outputs(lambda self, x: x.sum(1)), ValueError, "output does not depend on its parameters"),
        (Outputs(counting), ValueError, "changes its buffer calls"),
        (Outputs(branching), ValueError, "cannot run under torch.func.vmap: .*data-dependent"),
        (Outputs(exploding), ValueError, "NaN or infinity at step 0"),
        (nn.Sequential(nn.Dropout(0.5), mlp(3, 1)), ValueError, "module's 0 is Dropout in training mode"),
        (nn.Sequential(nn.BatchNorm1d(3).double(), mlp(3, 1)), ValueError, "0 is BatchNorm1d in training mode"),
    ],
)
def test_modules_that_make_no_class(module, error, message):
    with pytest.raises(error, match="^rademacher_neural: .*" + message):
        search(module, samples())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"constraint": "nuclear"}, ValueError, "constraint must be 'frobenius', 'spectral' or a function, got 'nucl"),
        ({"norm_bound": 0.0}, ValueError, "norm_bound must be positive and finite, got 0.0"),
        ({"norm_bound": [1.0, 2.0, 3.0]}, ValueError, r"one entry for each of \['0', '2'\], got 3"),
        ({"norm_bound": "large"}, TypeError, "norm_bound must be a number or one for each layer, got 'large'"),
        ({"norm_bound": None}, TypeError, "norm_bound must be a number or one for each layer, got NoneType"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"draws": 1.5}, TypeError, "draws must be an int, got float"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1"),
        ({"first_draw": -1}, ValueError, "first_draw must be at least 0"),
        (
            {"constraint": lambda p: list(p.values())},
            ValueError,
            r"constraint must return a dict of \['0.weight', '2.weight'\], got list",
        ),
        (
            {"constraint": lambda p: dict(list(p.items())[:1])},
            ValueError,
            r"must return a dict of .*, got \['0.weight'\]",
        ),
        (
            {"constraint": lambda p: {name: each.sum(0) for name, each in p.items()}},
            ValueError,
            r"constraint must leave 0.weight \[4, 3\] torch.float64, got \[3\] torch.float64",
        ),
        ({"memory": 0}, ValueError, "memory must be at least 1"),
        ({"draws_at_once": 0}, ValueError, "draws_at_once must be at least 1"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number, got str"),
        ({"seed": torch.tensor(1)}, TypeError, "seed must be an int, got a tensor"),
        ({"outputs": torch.empty(6, 40)}, ValueError, r"outputs must be \[40, 6\] and require no gradients"),
        ({"outputs": np.empty((40, 6))}, TypeError, "outputs must be a floating tensor to fill, got ndarray"),
        ({"x": torch.full((4, 3), math.nan)}, ValueError, "x has 12 NaN or infinite values of 12"),
        ({"x": torch.empty(0, 3)}, ValueError, r"x is empty, shape \[0, 3\]"),
        ({"x": [1.0]}, TypeError, "x must be a NumPy array or a torch tensor, got list"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match="^rademacher_neural: .*" + message):
        search(mlp(3, 4, 1), **{"x": samples(), **options})


def test_a_layer_without_a_spectral_norm_is_named():
    with pytest.raises(ValueError, match=r"knows nn\.Linear only, layer 'convolution' is Conv2d"):
        search(Convolutions().eval(), torch.rand(20, 1, 5, 5), constraint="spectral")
