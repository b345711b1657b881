"""`metropolis`: chains against a step-by-step reference, the stationary law, starts and orders."""

from __future__ import annotations

import math

import pytest
import resampling_reference as reference
import torch
from reference import on_device
from scipy.stats import chisquare

import refine_ext as rx

pytestmark = pytest.mark.usefixtures("device")
P_VALUE = 1e-4


def chain(log_ratio, num, burn_in, thin, seed, c, initial=None, given=False):
    """Algorithm 1 of Turner et al. 2019, one step at a time."""
    steps = burn_in + (num - 1) * thin + 1 if num else 0
    state, current, accepted, drawn = None, initial, 0, []
    for s in range(steps):
        low, high = reference.block(seed, c, reference.METROPOLIS, s)
        proposal = c * steps + s if given else low * len(log_ratio) >> 64
        u = 1 - (high >> 12) / 2**52
        if current is None:
            state, current = proposal, log_ratio[proposal]
        elif u <= math.exp(min(0.0, log_ratio[proposal] - current)):
            state, current = proposal, log_ratio[proposal]
            accepted += 1
        if s == burn_in and state is None:
            state, current = proposal, log_ratio[proposal]
        if s >= burn_in and (s - burn_in) % thin == 0:
            drawn.append(state)
    return drawn, accepted / max(1, steps - (initial is None))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("initial", [None, -1.0, 40.0])
@pytest.mark.parametrize("given", [False, True])
def test_equals_the_algorithm(dtype, initial, given):
    log_ratio = (2 * torch.randn(4000)).to(dtype)
    log_ratio[:3] = torch.tensor([-0.0, 2e-6, 3e-7]).to(dtype)  # half's subnormals too
    for num, burn_in, thin in ((1, 0, 1), (600, 0, 1), (50, 17, 9), (0, 5, 2)):
        result = rx.metropolis(
            log_ratio,
            num,
            chains=3,
            burn_in=burn_in,
            thin=thin,
            initial=initial,
            order="given" if given else "random",
            seed=7,
            return_acceptance=True,
        )
        assert result.indices.shape == (3, num)
        for c in range(3):
            drawn, rate = chain(log_ratio.tolist(), num, burn_in, thin, 7, c, initial, given)
            assert result.indices[c].tolist() == drawn
            if num:
                assert result.acceptance[c].item() == pytest.approx(rate)


def test_stationary_law():
    """20,000 chains of 60 steps, whose draws are independent, against the weights."""
    p = torch.tensor([0.02, 0.08, 0.1, 0.15, 0.25, 0.4], dtype=torch.float64)
    drawn = rx.metropolis(p.log(), 1, chains=20_000, burn_in=60, seed=1)
    counts = torch.bincount(drawn[:, 0], minlength=6).cpu().numpy()
    assert chisquare(counts, (20_000 * p).cpu().numpy()).pvalue > P_VALUE
    # One long chain, thinned until its draws are all but independent: acceptance is above 1 / (6 * 0.4).
    drawn = rx.metropolis(p.log() + 1e4, 20_000, burn_in=50, thin=25, seed=2)
    assert chisquare(torch.bincount(drawn, minlength=6).cpu().numpy(), (20_000 * p).cpu().numpy()).pvalue > P_VALUE
    # Without burn-in the first draw is a draw of Q.
    drawn = rx.metropolis(p.log(), 1, chains=20_000, seed=3)
    assert chisquare(torch.bincount(drawn[:, 0], minlength=6).cpu().numpy()).pvalue > P_VALUE


def test_each_sample_is_proposed_once_in_order():
    rising = torch.arange(100.0)
    assert rx.metropolis(rising, 100, order="given", seed=0).tolist() == list(range(100))
    falling = -100 * rising
    assert rx.metropolis(falling, 100, order="given", seed=0).tolist() == [0] * 100


def test_chains_and_threads_do_not_matter(threads):
    log_ratio = torch.randn(10_000)
    threads(1)
    many = rx.metropolis(log_ratio, 3, chains=5000, burn_in=100, thin=5, seed=4)
    threads(2)
    assert torch.equal(many, rx.metropolis(log_ratio, 3, chains=5000, burn_in=100, thin=5, seed=4))
    few = rx.metropolis(log_ratio, 3, chains=7, burn_in=100, thin=5, seed=4)
    assert torch.equal(many[:7], few)
    assert torch.equal(few[0], rx.metropolis(log_ratio, 3, burn_in=100, thin=5, seed=4))
    longer = rx.metropolis(log_ratio, 20, burn_in=100, thin=5, seed=4)
    assert torch.equal(longer[:3], few[0])


def test_starts():
    log_ratio = torch.zeros(50)
    # A start that nothing can beat: the draw due first takes its proposal, later ones stay with the samples.
    stuck = rx.metropolis(log_ratio, 5, initial=1e6, burn_in=10, seed=5)
    assert (stuck >= 0).all()
    nowhere = torch.full((5,), -math.inf)
    nowhere[3] = 0.0
    assert set(rx.metropolis(nowhere, 30, burn_in=100, seed=6).tolist()) == {3}
    starts = torch.tensor([-5.0, 5.0], dtype=torch.float64)
    both = rx.metropolis(torch.randn(50), 4, chains=2, initial=starts, seed=7)
    assert both.shape == (2, 4)
    assert rx.metropolis(torch.tensor([1.0]), 3, seed=0).tolist() == [0, 0, 0]


def test_vmap_is_the_loop():
    log_ratio = torch.randn(3, 40)
    by_vmap = torch.vmap(lambda x: rx.metropolis(x, 6, chains=2, seed=8))(log_ratio)
    for r in range(3):
        assert torch.equal(by_vmap[r], rx.metropolis(log_ratio[r], 6, chains=2, seed=8))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"log_ratio": torch.ones(2, 2)}, ValueError, "must be 1-D, got shape [2, 2]"),
        ({"log_ratio": torch.ones(0)}, ValueError, "must not be empty"),
        ({"num": -1}, ValueError, "num must be at least 0"),
        ({"chains": 0}, ValueError, "chains must be at least 1"),
        ({"thin": 0}, ValueError, "thin must be at least 1"),
        ({"burn_in": -1}, ValueError, "burn_in must be at least 0"),
        ({"order": "sorted"}, ValueError, "order must be 'random' or 'given'"),
        ({"order": "given", "num": 4}, ValueError, "order 'given' needs"),
        ({"initial": torch.zeros(2)}, ValueError, "initial must hold one value"),
    ],
)
def test_errors(arguments, error, text):
    arguments = on_device({"log_ratio": torch.zeros(3), "num": 2, **arguments})
    with pytest.raises(error) as caught:
        rx.metropolis(**arguments)
    message = str(caught.value)
    assert message.startswith("metropolis: ") and text in message and "\n" not in message


def test_an_infinite_start_is_refused(device):
    with pytest.raises(ValueError, match=r"^metropolis: initial must be finite or -inf, got inf$"):
        rx.metropolis(torch.zeros(3), 2, initial=math.inf)


@pytest.mark.sanitized
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_data(bad, kernels):
    """An error on the CPU; on CUDA, where it would wait for the device, the chains stay at their first index."""
    log_ratio = torch.randn(50)
    log_ratio[7] = bad
    if kernels == "cpu":
        with pytest.raises(ValueError, match=r"^metropolis: log_ratio must hold no NaN or .inf$"):
            rx.metropolis(log_ratio, 9, chains=2, seed=1)
    else:
        result = rx.metropolis(log_ratio, 9, chains=2, seed=1, return_acceptance=True)
        assert not result.indices.any() and not result.acceptance.any()


def test_registrations():
    op = torch.ops.refine_ext.metropolis.default
    start = torch.tensor(0.5, dtype=torch.float64)
    for initial in (None, start):
        torch.library.opcheck(op, (torch.randn(9), 4, 2, 3, 2, False, initial, torch.tensor(3)))


def test_compiles():
    compiled = torch.compile(lambda x: rx.metropolis(x, 5, chains=2, seed=1), fullgraph=True, backend="aot_eager")
    log_ratio = torch.randn(100)
    assert torch.equal(compiled(log_ratio), rx.metropolis(log_ratio, 5, chains=2, seed=1))
