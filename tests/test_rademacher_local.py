"""`rademacher_local`: the definition, what is sub-root, fixed points in closed form, their error, blocks, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fitting import one_thread  # noqa: F401

import refine_ext as rx
from refine_ext import local_complexity

RADII = torch.logspace(-3, 1, 9, dtype=torch.float64)


def values(n=60, m=12, dtype=torch.float64, seed=3):
    """Columns of many sizes, some off centre."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, m, generator=generator, dtype=torch.float64) * torch.logspace(-1.5, 0.5, m, dtype=torch.float64)
    return (x + 0.3 * torch.randn(m, generator=generator, dtype=torch.float64)).to(dtype)


def local(outputs, radius=RADII, draws=32, seed=0, **options):
    return rx.rademacher_local(outputs, radius, draws, seed, progress=False, **options)


def suprema(result):
    return torch.stack([estimate.suprema for estimate in result.estimates])


def signed_sums(outputs, draws=32):
    like = torch.empty(0, dtype=torch.float64)
    signs = torch.ops.refine_ext.multipliers(like, len(outputs), draws, 0, 0, 0, False)
    return (signs.numpy().astype(np.longdouble) @ outputs.numpy().astype(np.longdouble)).astype(float) / len(outputs)


# ---- The definition


@pytest.mark.parametrize("absolute", [True, False])
def test_star_hull_by_its_definition(absolute):
    """The supremum over a fine grid of multiples, keeping those within the radius."""
    outputs = values()
    sums, moments = signed_sums(outputs), (outputs**2).mean(0).numpy()
    shrink = np.linspace(0, 1, 4001)[:, None]
    found = suprema(local(outputs, absolute=absolute)).numpy()
    for k, r in enumerate(RADII.tolist()):
        inside = shrink**2 * moments <= r
        every = (np.abs(sums) if absolute else sums)[:, None, :] * shrink
        expected = np.where(inside, every, -np.inf).max((1, 2))
        # The grid misses the edge by at most a 4000th of a function's largest sum.
        assert np.all(found[k] >= expected - 1e-12)
        assert np.all(found[k] <= expected + np.abs(sums).max() / 4000)


@pytest.mark.parametrize("absolute", [True, False])
def test_without_the_star_hull_it_is_rademacher_of_the_functions_within(absolute):
    outputs = values()
    result = local(outputs, star_hull=False, absolute=absolute)
    moments = outputs.square().mean(0)
    torch.testing.assert_close(result.second_moments, moments, rtol=1e-14, atol=0)
    assert result.fixed_point is None and result.fixed_point_stderr is None
    for r, estimate in zip(RADII.tolist(), result.estimates, strict=True):
        inside = outputs[:, moments <= r]
        if inside.shape[1] == 0:
            assert float(estimate) == 0.0
            continue
        expected = rx.rademacher(inside, draws=32, seed=0, absolute=absolute).suprema
        assert torch.equal(estimate.suprema, expected.clamp(min=0))  # the zero function is in the class
    assert 0 < int((moments <= RADII[3]).sum()) < 12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_radius_that_holds_all_is_rademacher_and_others_are_of_shrunken_functions(dtype):
    outputs = values(dtype=dtype)
    moments = outputs.double().square().mean(0)
    result = local(outputs, [1e6, 0.05])
    assert torch.equal(result.estimates[0].suprema, rx.rademacher(outputs, draws=32, seed=0).suprema)
    assert result.estimates[0].bound == float(outputs.double().abs().max())
    shrunken = outputs.double() * (0.05 / moments).sqrt().clamp(max=1)
    expected = rx.rademacher(shrunken, draws=32, seed=0)
    # float32 values are rounded to 23 bits of a block's largest before they are summed, float64 ones to 52.
    rtol = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(result.estimates[1].suprema, expected.suprema, rtol=rtol, atol=0)
    assert result.estimates[1].bound == pytest.approx(expected.bound, rel=1e-12)
    assert result.estimates[1].upper(0.1) == pytest.approx(expected.upper(0.1), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_centred_functions(dtype):
    outputs = values(dtype=dtype)
    centred = outputs.double() - outputs.double().mean(0)
    result, expected = local(outputs, centred=True), local(centred)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(suprema(result), suprema(expected), rtol=rtol, atol=1e-12)
    torch.testing.assert_close(result.second_moments, outputs.double().var(0, correction=0), rtol=1e-12, atol=0)
    assert result.estimates[-1].bound == pytest.approx(expected.estimates[-1].bound, rel=1e-12)
    # A large mean is taken off before values are rounded for the sums: 1000 + x has x to 2^-14.
    far = local(values(dtype=torch.float32) + 1000, centred=True)
    near = local(values(), centred=True)
    torch.testing.assert_close(far.mean, near.mean, rtol=1e-3, atol=0)


# ---- Sub-root


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_it_grows_with_the_radius_and_falls_against_its_root(seed, absolute):
    radii = torch.logspace(-6, 2, 60, dtype=torch.float64)
    found = suprema(local(values(20, 7, seed=seed), radii, absolute=absolute))
    assert bool((found.diff(dim=0) >= 0).all())
    against = found / radii.sqrt()[:, None]
    assert bool((against.diff(dim=0) <= 1e-14 * against[:-1]).all())
    assert bool((found[-1] > found[0]).any())


def test_radii_in_any_order_and_alone():
    outputs, order = values(), torch.tensor([4, 0, 8, 2])
    assert torch.equal(suprema(local(outputs, RADII[order])), suprema(local(outputs))[order])
    for one in (0.01, np.float32(0.01), [0.01], torch.tensor(0.01)):
        result = local(outputs, one)
        assert len(result.estimates) == 1 and result.mean.shape == result.stderr.shape == (1,)
        assert result.stderr[0] == result.estimates[0].stderr


def test_scales():
    """Outputs times 2^k and radii times 4^k: the same bits, times 2^k."""
    outputs = values()
    one = local(outputs)
    for power in (-100, 100):
        scaled = local(outputs * 2.0**power, RADII * 4.0**power, factor=2.0**power)
        assert torch.equal(suprema(scaled), suprema(one) * 2.0**power)
        assert scaled.fixed_point == pytest.approx(one.fixed_point * 4.0**power, rel=1e-11)


# ---- Fixed points


@pytest.mark.parametrize(
    ("factor", "offset", "expected"),
    [
        (4.0, 0.0, 0.04),
        (1.0, 0.0, 0.01),
        (0.5, 0.0, 0.0025),
        (1e-6, 0.0, 1e-14),
        (0.5, 0.001, ((0.05 + math.sqrt(0.05**2 + 0.004)) / 2) ** 2),
        (1.0, 3.0, 3.01),
    ],
)
def test_fixed_points_in_closed_form(factor, offset, expected):
    """Of the unit vectors P_n f^2 = 1/n, every supremum is min(1, sqrt(n r)) / n: r* solves a quadratic equation."""
    result = local(torch.eye(100), 1.0, draws=4, factor=factor, offset=offset)
    assert result.fixed_point == pytest.approx(expected, rel=1e-11)
    assert result.fixed_point_stderr == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
def test_fixed_points_solve_their_equation(factor):
    outputs = values()
    point = local(outputs, factor=factor, offset=0.002).fixed_point
    at = local(outputs, point, fixed_point=False)
    assert at.fixed_point is None
    assert factor * float(at.mean[0]) + 0.002 == pytest.approx(point, rel=1e-11)


@pytest.mark.parametrize("seed", range(40))
def test_fixed_points_of_any_sub_root_function_take_few_radii(seed):
    """Of maxima and means of c min(1, sqrt(r / v)): slopes in log r jump between 0 and 1/2, against bisection."""
    generator = np.random.default_rng(seed)
    kinks = 10 ** generator.uniform(-12, 4, int(generator.integers(1, 12)))
    heights = 10 ** generator.uniform(-6, 3, len(kinks))
    combine = np.max if seed % 2 else np.mean
    radii = []

    def psi(r):
        radii.append(float(r))
        return float(combine(heights * np.minimum(1.0, np.sqrt(float(r) / kinks))))

    found, asked = local_complexity._fixed_point(psi), len(radii)
    low, high = 1e-60, 1e4
    for _ in range(120):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if psi(middle) > middle else (low, middle)
    assert found == pytest.approx(low, rel=1e-11)
    assert asked <= 20


def test_functions_that_vanish():
    zeros = torch.zeros(5, 3)
    result = local(zeros)
    assert result.fixed_point == result.fixed_point_stderr == 0.0
    assert bool((result.mean == 0).all())
    assert local(zeros, offset=0.3).fixed_point == pytest.approx(0.3, rel=1e-12)


def test_the_error_of_the_fixed_point_covers_its_spread():
    outputs = values(50, 8)
    results = [local(outputs, 1.0, draws=64, seed=seed, factor=2.0) for seed in range(120)]
    spread = float(np.std([result.fixed_point for result in results], ddof=1))
    stated = float(np.mean([result.fixed_point_stderr for result in results]))
    # 2 is the largest slope's amplification, 1 the smallest; 120 runs know their spread to 7 %.
    assert 0.4 * stated < spread < 1.2 * stated


# ---- Blocks and parts


def test_blocks_groups_and_parts_give_the_same_bits(tmp_path):
    outputs = values(2500, 5, torch.float32)
    path = tmp_path / "outputs.npy"
    np.save(path, outputs.numpy())
    whole = local(outputs)

    def blocks():
        return iter(outputs.split(700))

    sources = [outputs.numpy(), np.load(path, mmap_mode="r"), outputs.t().contiguous().t(), list(blocks()), blocks]
    results = [local(source) for source in sources]
    results += [local(source, memory=memory) for source in sources for memory in (1 << 14, 1000)]
    for result in results:
        assert torch.equal(suprema(result), suprema(whole))
        assert result.fixed_point == whole.fixed_point
    parts = [local(outputs, draws=16, first_draw=first) for first in (16, 0)]
    for k in range(len(RADII)):
        merged = parts[0].estimates[k].merge(parts[1].estimates[k])
        assert torch.equal(merged.suprema, whole.estimates[k].suprema)


def test_centred_blocks():
    outputs = values(2500, 5)
    whole, blocks = local(outputs, centred=True), local(list(outputs.split(1024)), centred=True, memory=1 << 16)
    assert torch.equal(suprema(blocks), suprema(whole))
    torch.testing.assert_close(whole.second_moments, outputs.var(0, correction=0), rtol=1e-13, atol=0)


def test_one_sample_one_function_and_its_gradient_is_not_kept():
    x = torch.tensor([2.0], requires_grad=True)
    result = local(x, [1.0, 9.0])
    assert result.mean.tolist() == [1.0, 2.0] and not result.mean.requires_grad


def test_what_it_says():
    result = local(values(), [0.01, 0.1])
    lines = str(result).splitlines()
    assert lines[0].startswith("r = 0.01: ") and "star hull of ±f, P_n f^2 <= 0.01" in lines[0]
    assert lines[2].startswith(f"fixed point: {result.fixed_point:.6g} ± ")
    facts = result.to_dict(delta=0.05)
    assert facts["radius"] == [0.01, 0.1] and facts["fixed_point"] == result.fixed_point
    assert [each["mean"] for each in facts["estimates"]] == result.mean.tolist()
    assert facts["estimates"][1]["upper"] == result.estimates[1].upper(0.05)


# ---- Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"radius": 0.0}, ValueError, "radius must be positive and finite, got 0.0"),
        ({"radius": [1.0, math.inf]}, ValueError, "radius must be positive and finite"),
        ({"radius": []}, ValueError, "radius must be positive and finite"),
        ({"radius": "wide"}, TypeError, "radius must be a number or several, got str"),
        ({"factor": 0.0}, ValueError, "factor must be positive and finite, got 0.0"),
        ({"offset": -1.0}, ValueError, "offset must be finite and not negative, got -1.0"),
        ({"offset": None}, TypeError, "offset must be a number, got NoneType"),
        ({"star_hull": False, "fixed_point": True}, ValueError, "fixed_point needs star_hull=True"),
        ({"draws": 0}, ValueError, "draws must be at least 1, got 0"),
        ({"seed": torch.tensor(1)}, TypeError, "seed must be an int, got a tensor"),
        ({"first_draw": -1}, ValueError, "first_draw must be at least 0"),
        ({"memory": 0}, ValueError, "memory must be at least 1"),
        ({"outputs": torch.ones(2, 2, 2)}, ValueError, r"must be \[rows, m\], got shape \[2, 2, 2\]"),
        ({"outputs": torch.ones(2, 2, dtype=torch.int64)}, TypeError, "must be float64, float32, float16 or bfloat16"),
        ({"outputs": iter([torch.ones(2, 2)])}, ValueError, "outputs is an iterator, which can be read once"),
        ({"outputs": []}, ValueError, "outputs must not be empty, got no row blocks"),
        ({"outputs": 3.0}, TypeError, "outputs must be a tensor, a NumPy array, row blocks"),
        (
            {"outputs": torch.full((3, 2), 1e200, dtype=torch.float64)},
            ValueError,
            r"too large to square, up to 1e\+200",
        ),
    ],
)
def test_bad_input(options, error, message):
    options = {"outputs": values(), **options}
    with pytest.raises(error, match="rademacher_local: .*" + message):
        local(**options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(value):
    outputs = values(1500, 3, torch.float32)
    outputs[1200, 2] = value
    for source in (outputs, list(outputs.split(600))):
        with pytest.raises(ValueError, match=f"outputs must be finite, got {value} in column 2, row 1200"):
            local(source)
