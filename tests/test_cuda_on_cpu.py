"""The CUDA kernels of the density-ratio family without a GPU: the same sources, compiled for the host (cuda_on_cpu/).

Every call runs under AddressSanitizer and UndefinedBehaviorSanitizer with buffers of exactly the size they need, and is
compared with bisection in extended precision (reference.py). A second build looks for races between CUDA threads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda_on_cpu"))

import emulator
from emulator import STORAGE, Answer, Emulator, decode, encode
from reference import (
    ALPHAS,
    CLIPPED,
    FAMILIES,
    NAMED,
    SUPREMUM,
    alpha_of,
    log_ratio,
    score_factor,
    slope,
    solve,
)

pytestmark = pytest.mark.skipif(emulator.COMPILER is None or sys.platform != "linux", reason="needs g++ on Linux")

CODES = {name: code for code, name in enumerate((*NAMED, "alpha", "logit"))}
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
RESIDUAL = {"float64": 1e-12, "float32": 3e-7, "float16": 3e-7, "bfloat16": 3e-7}
# With two multiprocessors and 4 blocks on each, rows of 20,001 float32 samples take 8 blocks.
LONG = 20_001


@pytest.fixture(scope="module")
def emulated():
    process = Emulator(emulator.build("density_ratio_main", "address"))
    yield process
    process.close()


def codes(name: str) -> dict[str, float]:
    return {"divergence": CODES[name.partition(":")[0]], "alpha": alpha_of(name)}


def random_outputs(name: str, shape, storage: str, seed: int, scale: float = 1.0) -> np.ndarray:
    """Stored outputs inside the domain of f*, at a spread of distances from its edge."""
    draws = np.random.default_rng(seed).normal(size=shape) * scale
    if name in SUPREMUM:
        draws = SUPREMUM[name] - 0.05 - np.abs(draws)
    elif name in CLIPPED:
        draws = np.abs(draws) - 1 / max(1.0, alpha_of(name) - 1) * 0.5
    return encode(draws, storage)


def tolerance(name: str, h, want, w, storage: str) -> np.ndarray:
    """A few roundings of log r and of d, through the score factor; the shift's residual; the storage's rounding."""
    compute = EPS["float64" if storage == "float64" else "float32"]
    c = np.where(want == -np.inf, 0, score_factor(name, np.maximum(want, -500)))
    mean_slope = np.average(np.exp(np.maximum(want, -500)) * c, weights=w)
    highest = h[np.isfinite(h)].max()
    spread = highest - np.where(np.isfinite(h), h, highest)
    bound = 10 * compute * (1 + np.abs(want) + c * spread) + RESIDUAL[storage] * c / mean_slope
    return bound + (0 if "16" not in storage else EPS[storage] / 2 * np.abs(want))


def check_row(name: str, storage: str, h, out, stats, w=None, output: str = "log_ratio") -> None:
    """One row of a solved call against the reference."""
    x = decode(h, storage)
    weights = np.ones(x.size) if w is None else decode(w, storage)
    want, shift = solve(name, x, weights)
    got = decode(out, storage)
    with np.errstate(invalid="ignore"):
        bound = tolerance(name, x, want, weights, storage)
        clipped = want == -np.inf
        if output == "ratio":
            ratio = np.exp(want)
            limit = ratio * (np.expm1(np.minimum(bound, 1)) + EPS[storage]) + 1e-5 * clipped
            # The smallest halves are coarse.
            limit = limit + (2.0**-24 if storage == "float16" else 1e-37)
            np.testing.assert_array_less(np.abs(got - ratio), np.maximum(limit, 1e-300))
        else:
            near = ~clipped & (bound >= 1)
            assert (got[near] < 0).all()
            assert (np.exp(got[clipped]) <= 1e-5).all()
            kept = ~clipped & ~near & np.isfinite(want)
            np.testing.assert_array_less(np.abs(got[kept] - want[kept]), bound[kept])
            # A half of a log-ratio beyond 65504 is infinite.
            rest = ~clipped & ~near & ~np.isfinite(want)
            np.testing.assert_array_equal(got[rest], want[rest].astype(float))
    ratio = np.exp(want) * weights
    counts = weights > 0
    residual = 1e-11 if storage == "float64" else 1e-6
    assert abs(np.expm1(stats[1] - stats[4])) <= residual
    rel = 1e-9 if storage == "float64" else 2e-5
    assert stats[4] == pytest.approx(np.log(weights.sum()), abs=rel)
    assert stats[2] == pytest.approx(float(np.log(np.sum(ratio[counts] ** 2))), abs=rel, rel=rel)
    assert stats[3] == pytest.approx(float(np.log(np.max(ratio[counts]))), abs=rel, rel=rel)
    c = score_factor(name, np.maximum(want, -500))
    slope_of_mean = np.average(np.exp(np.maximum(want, -500)) * c, weights=weights)
    scale = 10 * residual / slope_of_mean + 4 * rel * 1e-2 * (1 + np.abs(x[np.isfinite(x)]).max())
    assert abs(stats[0] - shift) <= scale


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("name", (*FAMILIES, "logit"))
def test_log_ratio(emulated, name, storage):
    # Around packs, warps and blocks, aligned and not; rows that share a block and rows of several blocks.
    sizes = (1, 2, 5, 33, 130, 1025, LONG) if name in (*NAMED, "logit") else (3, 129, LONG)
    for seed, n in enumerate(sizes):
        rows = 3 if n < LONG else 1
        h = random_outputs(name, (rows, n), storage, seed)
        answer = emulated.call("ratio", storage, h=h, misaligned=seed % 4, **codes(name))
        for row in range(rows):
            check_row(name, storage, h[row], answer.out[row], answer.stats[row])


@pytest.mark.parametrize(
    "n", [1, 2, 3, 4, 7, 8, 9, 31, 32, 63, 127, 128, 129, 255, 256, 1024, 4096, 4097, 16384, 16385]
)
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_every_element_is_written_once(emulated, n, storage):
    for misaligned in (0, 1, 3):
        h = random_outputs("kl", (2, n), storage, n)
        for name in ("kl", "squared_hellinger"):
            h = random_outputs(name, (2, n), storage, n)
            answer = emulated.call("ratio", storage, h=h, misaligned=misaligned, out_misaligned=1, **codes(name))
            for row in range(2):
                check_row(name, storage, h[row], answer.out[row], answer.stats[row])


@pytest.mark.parametrize(
    ("storage", "output"),
    [("float64", "log_ratio"), ("float32", "ratio"), ("float16", "ratio"), ("bfloat16", "log_ratio")],
)
@pytest.mark.parametrize("name", NAMED)
def test_weights(emulated, name, storage, output):
    rng = np.random.default_rng(5)
    for rows, n in ((3, 70), (2, 3000), (1, 20_000)):
        h = random_outputs(name, (rows, n), storage, n)
        for shape in ((n,), (rows, n)):
            w = encode(rng.integers(0, 3, shape) * rng.uniform(0.5, 2, shape) + (np.arange(n) == 0), storage)
            answer = emulated.call("ratio", storage, h=h, weights=w, output=output, misaligned=2, **codes(name))
            for row in range(rows):
                own = w if w.ndim == 1 else w[row]
                check_row(name, storage, h[row], answer.out[row], answer.stats[row], own, output)


@pytest.mark.parametrize("n", [50, 5000, LONG])
@pytest.mark.parametrize("name", FAMILIES)
def test_given_shift(emulated, name, n):
    for storage in ("float64", "float32"):
        # Next to alpha = 1 ratios near the edge of the domain overflow, which makes a row NaN.
        h = random_outputs(name if name != "alpha:0.999" else "kl", (2, n), storage, 1)
        shift = np.array([0.25, -0.01]) if name not in SUPREMUM else np.array([0.02, 1.5])
        answer = emulated.call("ratio", storage, h=h, shift=shift, fixed=True, **codes(name))
        for row in range(2):
            x = decode(h[row], storage)
            want = log_ratio(name, x.astype(np.longdouble) - shift[row])
            got = decode(answer.out[row], storage)
            finite = np.isfinite(want)
            c = score_factor(name, want[finite])
            bound = 8 * EPS[storage] * (1 + np.abs(want[finite]) + c * (1 + np.abs(x[finite])))
            np.testing.assert_array_less(np.abs(got[finite] - want[finite]), bound)
            assert (np.exp(got[~finite]) <= 1e-5).all()
            sums = np.array([np.log(np.sum(np.exp(k * want))) for k in (1, 2)])
            np.testing.assert_allclose(answer.stats[row, 1:3], sums.astype(float), rtol=1e-5, atol=1e-5)
            assert answer.stats[row, 0] == shift[row]


@pytest.mark.parametrize("n", [200, 3000, LONG])
@pytest.mark.parametrize("name", FAMILIES)
def test_heavy_tails_and_offsets(emulated, name, n):
    rng = np.random.default_rng(3)
    if name in CLIPPED:
        pytest.skip("clipped ratios have no heavy tail")
    tails = rng.standard_cauchy((1, n)) * 3
    tails = (SUPREMUM[name] - np.abs(tails) - 1e-3) if name in SUPREMUM else tails
    for offset in (0.0, 1e4, -1e4):
        for storage in ("float64", "float32"):
            h = encode(tails + offset, storage)
            answer = emulated.call("ratio", storage, h=h, **codes(name))
            check_row(name, storage, h[0], answer.out[0], answer.stats[0])


@pytest.mark.parametrize("n", [100, 2000, 16_390])
@pytest.mark.parametrize("name", (*NAMED, "logit", "alpha:0.3"))
def test_special_samples(emulated, name, n):
    """-inf is a sample of ratio zero; NaN, +inf and rows of nothing else make their own row NaN and no other."""
    for storage in ("float32", "bfloat16"):
        h = decode(random_outputs(name, (6, n), storage, 0), storage)
        h[0, ::3] = -np.inf
        h[1, n // 2] = np.nan
        h[2, n - 1] = np.inf
        h[3] = -np.inf
        h[4] = h[4, 0]
        stored = encode(h, storage)
        answer = emulated.call("ratio", storage, h=stored, **codes(name))
        out = decode(answer.out, storage)
        for row in (1, 2, 3):
            assert np.isnan(out[row]).all() and np.isnan(answer.stats[row]).all()
        for row in (0, 4, 5):
            check_row(name, storage, stored[row], answer.out[row], answer.stats[row])
        assert (np.exp(out[0, ::3]) == 0).all()
        assert np.abs(out[4]).max() <= 1e-6


@pytest.mark.parametrize("n", [64, 3000, 20_000])
def test_invalid_weights_and_shifts(emulated, n):
    h = random_outputs("gan", (5, n), "float32", 0)
    w = np.ones((5, n), dtype=np.float32)
    w[0, n // 3], w[1, 0], w[2, -1], w[3] = np.nan, -1.0, np.inf, 0.0
    answer = emulated.call("ratio", "float32", h=h, weights=w, **codes("gan"))
    assert np.isnan(answer.out[:4]).all() and np.isnan(answer.stats[:4]).all()
    check_row("gan", "float32", h[4], answer.out[4], answer.stats[4], w[4])
    shift = np.array([0.0, np.nan, float(h[2].max()) - 0.01, 1.0, 1.0])
    answer = emulated.call("ratio", "float32", h=h, shift=shift, fixed=True, **codes("gan"))
    assert np.isnan(answer.out[1:3]).all() and np.isnan(answer.stats[1:3]).all()
    assert np.isfinite(answer.out[[0, 3, 4]]).all()


@pytest.mark.parametrize("n", [100, 3000, 17_000])
@pytest.mark.parametrize("name", NAMED)
def test_weights_over_sixty_decades(emulated, name, n):
    """The largest ratio is then beyond float32, and so are squares of weighted ratios."""
    rng = np.random.default_rng(n)
    h = random_outputs(name, (1, n), "float32", 8)
    for w in (10 ** rng.uniform(-30, 30, n), np.where(h[0] == h[0].max(), 1e-36, 1.0)):
        weights = encode(w, "float32")
        answer = emulated.call("ratio", "float32", h=h, weights=weights, **codes(name))
        check_row(name, "float32", h[0], answer.out[0], answer.stats[0], weights)


@pytest.mark.parametrize("n", [9, 3000, 17_000])
@pytest.mark.parametrize("name", ["kl", "logit", "pearson_chi2", "jensen_shannon"])
def test_no_mass_at_a_given_shift(emulated, name, n):
    h = np.full((1, n), -np.inf, dtype=np.float32)
    answer = emulated.call("ratio", "float32", h=h, shift=np.zeros(1), fixed=True, **codes(name))
    assert (answer.out == -np.inf).all()
    np.testing.assert_array_equal(answer.stats[0, 1:4], [-np.inf] * 3)


@pytest.mark.parametrize("n", [5, 300, 20_000])
@pytest.mark.parametrize("name", ["kl", "jensen_shannon"])
def test_in_place(emulated, name, n):
    for storage in STORAGE:
        h = random_outputs(name, (2, n), storage, 0)
        apart = emulated.call("ratio", storage, h=h, misaligned=1, **codes(name))
        same = emulated.call("ratio", storage, h=h, misaligned=1, in_place=True, **codes(name))
        np.testing.assert_array_equal(apart.out, same.out)
        np.testing.assert_array_equal(apart.stats, same.stats)


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_the_order_of_blocks_does_not_matter(order, emulated):
    other = Emulator(emulator.build("density_ratio_main", "address"), CUDA_ON_CPU_ORDER=order)
    for name in (*NAMED, "alpha:0.3"):
        for rows, n in ((20, 40), (2, 3000), (2, 20_000)):
            h = random_outputs(name, (rows, n), "float32", 0)
            one: Answer = emulated.call("ratio", "float32", h=h, **codes(name))
            two: Answer = other.call("ratio", "float32", h=h, **codes(name))
            np.testing.assert_array_equal(one.out, two.out)
            np.testing.assert_array_equal(one.stats, two.stats)
    other.close()


def conjugate(name: str, t: np.ndarray) -> np.ndarray:
    """f*(t) as the table of the literature writes it."""
    u = np.exp(log_ratio(name, t))
    with np.errstate(all="ignore"):
        closed = {
            "kl": lambda: np.exp(t - 1),
            "reverse_kl": lambda: -1 - np.log(-t),
            "jensen_shannon": lambda: -np.log(2 - np.exp(t)),
            "gan": lambda: -np.log(1 - np.exp(t)),
            "pearson_chi2": lambda: np.where(t >= -2, t * t / 4 + t, -1),
            "neyman_chi2": lambda: 2 - 2 * np.sqrt(1 - t),
            "squared_hellinger": lambda: t / (1 - t),
            "jeffreys": lambda: u + 1 / u + t - 2,
        }
        if name in closed:
            return closed[name]()
        a = alpha_of(name)
        return (np.maximum(1 + (a - 1) * t, 0) ** (a / (a - 1)) - 1) / a


@pytest.mark.parametrize("tight", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_variational_bound(emulated, name, tight):
    for storage in ("float64", "float32"):
        # A row path, a long path, and one side long beside a short one.
        for n, real_n in ((60, 70), (3000, 17), (LONG, 300), (300, LONG)):
            # Next to alpha = 1 ratios near the edge of the domain overflow, which makes a row NaN.
            drawn = name if name != "alpha:0.999" else "kl"
            fake = random_outputs(drawn, (2, n), storage, 1)
            real = random_outputs(drawn, (2, real_n), storage, 2)
            wide = storage == "float64"
            answer = emulated.call(
                "bound", storage, h=fake, other=real, flag=tight, wide=wide, misaligned=1, **codes(name)
            )
            grad = np.array([0.7, -1.3], dtype=np.float64 if wide else np.float32)
            back = emulated.call(
                "bound_backward", storage, h=fake, other=grad, stats=answer.stats, flag=tight, wide=wide, **codes(name)
            )
            rtol = 1e-9 if storage == "float64" else 5e-6
            for row in range(2):
                x = decode(fake[row], storage).astype(np.longdouble)
                log_r, shift = solve(name, x) if tight else (log_ratio(name, x), np.longdouble(0))
                terms = conjugate(name, x - shift)
                want = np.mean(decode(real[row], storage)) - (shift if tight else 0) - np.mean(terms)
                scale = 1 + abs(shift) + np.mean(np.abs(terms)) + np.abs(x).max()
                assert abs(answer.values[row] - want) <= rtol * scale
                gradient = -grad[row] * np.exp(log_r) / n
                got = decode(back.out[row], storage)
                limit = rtol * 20 * np.abs(gradient) + np.abs(gradient).max() * rtol
                np.testing.assert_array_less(np.abs(got - gradient), limit + 1e-300)


@pytest.mark.parametrize("n", [300, 20_000])
def test_invalid_bound(emulated, n):
    fake = random_outputs("gan", (3, n), "float32", 1)
    real = random_outputs("gan", (3, 50), "float32", 2)
    fake[0, 3], real[1, 4] = np.nan, np.nan
    for tight in (True, False):
        answer = emulated.call("bound", "float32", h=fake, other=real, flag=tight, **codes("gan"))
        assert np.isnan(answer.values[:2]).all() and np.isfinite(answer.values[2])


@pytest.mark.parametrize("name", (*NAMED, "alpha:0.3", "alpha:3", "logit"))
def test_backward(emulated, name):
    """The gradient's own closed form (implicit differentiation of E r = 1), in float64 from the stored log-ratios."""
    rng = np.random.default_rng(0)
    for storage in STORAGE:
        for n, weighted in ((40, False), (1500, True), (20_000, False)):
            h = random_outputs(name, (2, n), storage, 4)
            w = encode(rng.integers(0, 3, (2, n)), storage) if weighted else None
            forward = emulated.call("ratio", storage, h=h, weights=w, **codes(name))
            grad = encode(rng.normal(size=(2, n)), storage)
            grad_stats = rng.normal(size=(2, 8))
            for solved in (True, False):
                answer = emulated.call(
                    "backward",
                    storage,
                    h=forward.out,
                    weights=w,
                    other=grad,
                    stats=forward.stats,
                    grad_stats=grad_stats,
                    flag=solved,
                    misaligned=1,
                    **codes(name),
                )
                for row in range(2):
                    x, g = decode(forward.out[row], storage), decode(grad[row], storage)
                    mass = np.exp(x) * (decode(w[row], storage) if weighted else 1)
                    clipped = x == -np.inf
                    with np.errstate(all="ignore"):
                        c = np.where(clipped, 0, score_factor(name, np.where(clipped, 0, x))).astype(float)
                    through = (
                        (grad_stats[row, 0] - np.sum(c * g)) / np.sum(c * mass)
                        if solved
                        else grad_stats[row, 1] / np.exp(forward.stats[row, 1])
                    )
                    want = c * (g + mass * through)
                    eps = EPS[storage] if "16" in storage else 8 * EPS[storage] * np.sqrt(n)
                    scale = c * (np.abs(g) + mass * (abs(through) + np.mean(np.abs(c * g)) * n / np.sum(c * mass)))
                    limit = eps * scale * (1 + np.abs(np.where(clipped, 0, x)))
                    tiny = 2.0**-24 if storage == "float16" else 1e-30
                    np.testing.assert_array_less(np.abs(decode(answer.out[row], storage) - want), limit + tiny)


def mp_slopes(name: str, x: np.ndarray) -> np.ndarray:
    import mpmath

    return np.array([float(slope(name, mpmath.exp(float(value)))) for value in x])


@pytest.mark.parametrize("name", (*NAMED, *ALPHAS[:4]))
def test_dual(emulated, name):
    """f'(e^l), its derivative and f*(f'(e^l)) of logits, against differences of the definitions."""
    for storage in ("float64", "float32"):
        for rows, n in ((2, 37), (1, 5000)):
            logits = encode(np.random.default_rng(n).normal(size=(rows, n)) * 2, storage)
            x = decode(logits, storage)
            eps = 1e-11 if storage == "float64" else 3e-6
            got = decode(emulated.call("output", storage, h=logits, misaligned=3, **codes(name)).out, storage)
            some = np.arange(0, n, max(1, n // 40))
            want = mp_slopes(name, x[0, some])
            np.testing.assert_array_less(np.abs(got[0, some] - want), eps * (1 + np.abs(want)))
            c = score_factor(name, x).astype(float)
            ratio = np.exp(x)
            for conjugated, derivative in ((False, 1 / c), (True, ratio / c)):
                grad = np.random.default_rng(1).normal(size=(rows, n))
                stored = encode(grad, storage)
                answer = emulated.call("slope", storage, h=logits, other=stored, flag=conjugated, **codes(name))
                np.testing.assert_allclose(
                    decode(answer.out, storage), decode(stored, storage) * derivative, rtol=eps * 10, atol=1e-30
                )
                per_row = np.linspace(-1, 2, rows)
                answer = emulated.call(
                    "slope", storage, h=logits, grad_stats=per_row, flag=conjugated, wide=True, **codes(name)
                )
                np.testing.assert_allclose(
                    decode(answer.out, storage), per_row[:, None] * derivative, rtol=eps * 10, atol=1e-30
                )
            real = encode(np.random.default_rng(3).normal(size=(rows, 45)), storage)
            wide = storage == "float64"
            answer = emulated.call("dual_bound", storage, h=logits, other=real, wide=wide, **codes(name))
            t = got.astype(np.longdouble)
            fake_mean = np.mean(conjugate(name, t), axis=1)
            exact = [np.mean(mp_slopes(name, decode(real[row], storage))) for row in range(rows)]
            scale = 1 + np.abs(fake_mean) + np.abs(exact)
            assert (np.abs(answer.values - (exact - fake_mean)) <= 30 * eps * scale).all()


def test_no_races():
    """Every float32 kernel under ThreadSanitizer, each CUDA thread a thread to it."""
    process = Emulator(emulator.build("density_ratio_main", "thread"))
    for name in ("kl", "reverse_kl", "squared_hellinger", "gan", "jeffreys", "alpha:0.3"):
        for rows, n in ((9, 40), (2, 600), (2, 17_000)):
            h = random_outputs(name, (rows, n), "float32", 0)
            w = np.ones(n, dtype=np.float32)
            real = random_outputs(name, (rows, 70), "float32", 1)
            forward = process.call("ratio", "float32", h=h, weights=w, **codes(name))
            check_row(name, "float32", h[0], forward.out[0], forward.stats[0])
            process.call("ratio", "float32", h=h, in_place=True, output="ratio", **codes(name))
            process.call("bound", "float32", h=h, other=real, flag=True, **codes(name))
            process.call("dual_bound", "float32", h=h, other=real, **codes(name))
            process.call(
                "backward",
                "float32",
                h=forward.out,
                other=h,
                stats=forward.stats,
                grad_stats=forward.stats,
                flag=True,
                **codes(name),
            )
    process.close()
