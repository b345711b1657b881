"""The diffusion bound's terms against closed forms and quadrature, its loss against differences of the same noise."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import erf, logsumexp

import refine_ext as rx
from refine_ext import diffusion_terms
from refine_ext.forward_process import SCHEDULES

F64 = torch.float64
# A time at which the mixture of these points is neither separate nor merged.
MIDDLE = {"vp": 0.4, "sub-vp": 0.4, "ve": 0.55, "edm": 1.0}
POINTS = np.array([-1.9, -0.4, 0.1, 0.3, 1.2, 2.5])


def normal_log_density(z, mean, sigma):
    return -((z - mean) ** 2) / (2 * sigma**2) - np.log(sigma * math.sqrt(2 * math.pi))


def divergences_by_quadrature(points: np.ndarray, a: float, sigma: float, leave_out: bool) -> np.ndarray:
    """KL(N(a x_i, sigma^2) || mixture) of each point, on a grid so fine and wide that the sum is exact to 1e-12."""
    found = []
    for i, x in enumerate(points):
        z = a * x + sigma * np.linspace(-12, 12, 20001)
        own = normal_log_density(z, a * x, sigma)
        chosen = np.delete(points, i) if leave_out else points
        mixture = logsumexp([normal_log_density(z, a * y, sigma) for y in chosen], axis=0) - math.log(len(chosen))
        found.append(np.trapezoid(np.exp(own) * (own - mixture), z))
    return np.array(found)


def constants(schedule: str, t: float) -> tuple[float, float]:
    process = rx.forward_process(schedule)
    return float(process.signal(t)), float(process.noise(t))


def gaussian_score(process, spread: float):
    """The exact score of data N(0, spread^2) at every time."""

    def score(x, t):
        a, sigma = (each(t.double()).reshape(-1, *[1] * (x.dim() - 1)) for each in (process.signal, process.noise))
        return (-x.double() / (a.square() * spread**2 + sigma.square())).to(x.dtype)

    return score


def test_one_sample_is_its_own_mixture():
    found = rx.diffusion_bound(torch.tensor([[3.0, -1.0]]), time=0.4, draws=2)
    assert found.mutual_information == (0.0, 0.0) and math.isnan(found.leave_one_out.value)
    assert found.prior_gap.value > 0.1 and found.bound.value == pytest.approx(math.sqrt(2) * found.prior_gap.value)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("m", [2, 7])
def test_far_points_have_exactly_log_m(m, dtype):
    """Whatever the noise: only the own centre counts."""
    data = 1000.0 * torch.arange(m, dtype=dtype).unsqueeze(1).expand(m, 3)
    found = rx.diffusion_bound(data, time=0.2, draws=3)
    assert found.mutual_information == (math.log(m), 0.0)
    assert found.leave_one_out.value > 1e4


def test_equal_points_share_nothing():
    for dtype, allowed in ((F64, 1e-14), (torch.float32, 1e-6)):  # roundings of exponents near 1
        found = rx.diffusion_bound(torch.full((5, 2), 0.7, dtype=dtype), time=0.3, draws=4)
        assert abs(found.mutual_information.value) < allowed and abs(found.leave_one_out.value) < allowed


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_divergences_against_quadrature(schedule, dtype):
    t = MIDDLE[schedule]
    data = torch.from_numpy(POINTS).to(dtype)
    found = rx.diffusion_bound(data, schedule=schedule, time=t, draws=4000)
    a, sigma = constants(schedule, t)
    for leave_out, term, each in (
        (False, found.mutual_information, found.kl),
        (True, found.leave_one_out, found.kl_leave_one_out),
    ):
        exact = divergences_by_quadrature(POINTS, a, sigma, leave_out)
        assert exact.mean() > 0.1 and 0 < term.stderr < 0.1
        assert abs(term.value - exact.mean()) < 4 * term.stderr
        if not leave_out:
            # Six comparisons: 4.5 standard errors are exceeded once in 25,000 runs.
            assert (np.abs(each.numpy() - exact) < 4.5 * found.kl_variance.sqrt().numpy()).all()


def test_the_estimate_never_exceeds_log_m_and_is_below_the_left_out_one():
    data = torch.randn(40, 3)
    for t in (0.05, 0.2, 0.5, 1.0):
        found = rx.diffusion_bound(data, time=t, draws=20)
        assert float(found.kl.max()) <= math.log(40)
        assert found.mutual_information.value < found.leave_one_out.value + 3 * found.leave_one_out.stderr


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_prior_gap_against_torch_distributions(schedule):
    data, t = torch.randn(9, 4, dtype=F64), MIDDLE[schedule]
    a, sigma = constants(schedule, t)
    prior = 1.0 if schedule in ("vp", "sub-vp") else sigma
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(a * data, sigma), normal(torch.zeros(4, dtype=F64), prior)).sum(1)
    found = rx.diffusion_bound(data, schedule=schedule, time=t, draws=2)
    torch.testing.assert_close(found.prior_kl_root, kl.sqrt(), rtol=1e-12, atol=0)
    assert found.prior_gap == (pytest.approx(float(kl.sqrt().mean())), 0.0)


def test_a_sample_at_the_priors_centre():
    """VE: E_T(0) is the prior; the root's slope there is not infinite times zero."""
    data = torch.tensor([[0.0], [1.0]], requires_grad=True)
    t = torch.tensor(0.5, requires_grad=True)
    rx.diffusion_bound_loss(data, t, schedule="ve", draws=2, seed=0).backward()
    assert torch.isfinite(data.grad).all() and torch.isfinite(t.grad)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_model_terms_of_an_exact_gaussian_score(schedule):
    """In one dimension, at x_t = a x_i + sigma eps and s = -x_t / v, v = a^2 r^2 + sigma^2:

    E |s - grad log p(x_t | x_i)|^2 = ((1 - sigma^2 / v)^2 / sigma^2) + a^2 x_i^2 / v^2, and E |s| is the mean of a
    folded normal over v.
    """
    process, t, spread, steps = rx.forward_process(schedule), MIDDLE[schedule], 0.8, 16
    low = process.time_range[0]

    def at(time):
        a, sigma = constants(schedule, time)
        return a, sigma, a * a * spread**2 + sigma**2

    def integrand(time):
        a, sigma, v = at(time)
        error = (1 - sigma**2 / v) ** 2 / sigma**2 + a * a * (POINTS**2).mean() / v**2
        return 0.5 * float(process.beta(time)) * error

    # Beta over sigma^2 goes as 1 / t: in log t the integrand is smooth.
    start = max(low, 1e-12)
    matching = quad(lambda u: math.exp(u) * integrand(math.exp(u)), math.log(start), math.log(t), limit=200)[0]
    means = []
    grid = [low + k * (t - low) / steps for k in range(1, steps + 1)]
    for time in grid:
        a, sigma, v = at(time)
        mean = a * POINTS
        folded = sigma * math.sqrt(2 / math.pi) * np.exp(-(mean**2) / (2 * sigma**2)) + mean * erf(
            mean / (sigma * math.sqrt(2))
        )
        means.append(float(folded.mean()) / v)
    generator = math.sqrt(
        (t - low) * max(means) ** 2 / (2 * len(POINTS) * steps) * sum(float(process.beta(s)) for s in grid)
    )
    found = rx.diffusion_bound(
        torch.from_numpy(POINTS), gaussian_score(process, spread), schedule=schedule, time=t, draws=2,
        steps=steps, model_draws=3000, sub_gaussian=0.7,
    )  # fmt: skip
    assert 0 < found.score_matching.stderr < 0.05 * found.score_matching.value
    assert abs(found.score_matching.value - matching) < 4 * found.score_matching.stderr
    assert abs(found.score_norm.value - max(means)) < 4 * found.score_norm.stderr < 0.2 * max(means)
    assert abs(found.generator.value - generator) < 4 * found.generator.stderr
    total = -found.mutual_information.value + math.sqrt(2) * 0.7 * (found.prior_gap.value + found.generator.value)
    assert found.bound.value == pytest.approx(total + found.score_matching.value) and found.complete


def test_the_training_sets_own_score_loses_what_information_is_lost():
    """L_sm is the explicit loss, which is 0 for the score of the marginals, plus I(t_0) - I(T)."""
    process, t = rx.forward_process("vp", time_min=1e-4), 0.6
    data = torch.randn(5, 2, dtype=F64)

    def score(x, times):
        a, sigma = (each(times).reshape(-1, 1, 1) for each in (process.signal, process.noise))
        steps = a * data - x.unsqueeze(1)
        logits = -steps.square().sum(2) / (2 * sigma.squeeze(2).square())
        return (logits.softmax(1).unsqueeze(2) * steps).sum(1) / sigma.squeeze(2).square()

    found = rx.diffusion_bound(data, score, schedule=process, time=t, draws=4000, steps=40, model_draws=1000)
    at_start = rx.diffusion_bound(data, schedule=process, time=1e-4, draws=2).mutual_information.value
    assert at_start == math.log(5)
    lost = at_start - found.mutual_information.value
    error = math.hypot(found.score_matching.stderr, found.mutual_information.stderr)
    assert lost > 20 * error and abs(found.score_matching.value - lost) < 4 * error


@pytest.mark.parametrize("schedule", ["vp", "sub-vp", "edm"])
def test_parametrizations_agree(schedule):
    process, t = rx.forward_process(schedule), MIDDLE[schedule]
    score = gaussian_score(process, 1.3)

    def parts(x, times):
        a, sigma = (each(times.double()).reshape(-1, 1) for each in (process.signal, process.noise))
        eps = -sigma * score(x, times)
        return a, sigma, eps, (x - sigma * eps) / a

    def velocity(x, times):
        a, sigma, eps, denoised = parts(x, times)
        return a * eps - sigma * denoised

    models = {
        "score": score,
        "noise": lambda x, times: parts(x, times)[2],
        "denoised": lambda x, times: parts(x, times)[3],
        "velocity": velocity,
    }
    data = torch.randn(7, 3, dtype=F64)
    found = [
        rx.diffusion_bound(
            data, model, schedule=schedule, time=t, draws=2, steps=20, model_draws=4, parametrization=name
        )
        for name, model in models.items()
    ]
    for other in found[1:]:
        # Denoised outputs are differenced with states a few digits larger than the noise.
        assert other.score_matching.value == pytest.approx(found[0].score_matching.value, rel=1e-8)
        assert other.score_norm.value == pytest.approx(found[0].score_norm.value, rel=1e-8)


def test_how_the_model_is_called():
    seen = []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), dtype=F64))

        def forward(self, x, t):
            assert x.dtype == F64 and t.dtype == F64 and x.shape[1:] == (2, 3) and t.shape == x.shape[:1]
            assert not torch.is_grad_enabled()
            seen.append((len(x), float(t.max())))
            return -self.weight * x

    data = torch.randn(6, 2, 3)
    options = dict(time=0.5, draws=2, steps=10, model_draws=3, time_scale=999.0)
    found = rx.diffusion_bound(data, Network(), batch_size=7, **options)
    assert max(n for n, _ in seen) == 7 and sum(n for n, _ in seen) == 2 * 10 * 3
    assert max(t for _, t in seen) == pytest.approx(499.5)
    whole = rx.diffusion_bound(data, Network(), **options)
    assert whole.to_dict() == found.to_dict()


def test_bits_do_not_depend_on_the_blocks(monkeypatch):
    data = torch.randn(23, 3, dtype=F64)
    whole = rx.diffusion_bound(data, time=0.3, draws=6)
    monkeypatch.setattr(diffusion_terms, "_BLOCK_ROWS", 13)
    blocks = rx.diffusion_bound(data, time=0.3, draws=6)
    assert torch.equal(whole.kl, blocks.kl) and torch.equal(whole.kl_leave_one_out, blocks.kl_leave_one_out)
    assert whole.to_dict() == blocks.to_dict()


def test_seeds_and_arrays():
    data = torch.randn(12, 2)
    first, same, other = (rx.diffusion_bound(x, time=0.3, draws=3, seed=s).bound.value
                          for x, s in ((data, 1), (data.numpy(), 1), (data, 2)))  # fmt: skip
    assert first == same != other


def test_the_same_noise_at_every_time():
    """Differences along the curve are far more accurate than its values."""
    data, step, t = torch.from_numpy(POINTS), 0.004, MIDDLE["vp"]
    near = [divergences_by_quadrature(POINTS, *constants("vp", s), False).mean() for s in (t, t + step)]
    found = [rx.diffusion_bound(data, time=s, draws=30).mutual_information for s in (t, t + step)]
    error = abs((found[1].value - found[0].value) - (near[1] - near[0]))
    assert error < 0.02 * found[0].stderr


def test_result_as_text_and_json(tmp_path):
    process = rx.forward_process("vp")
    data = torch.randn(5, 2)
    bare = rx.diffusion_bound(data, time=0.5, draws=2)
    assert "without a model" in str(bare) and not bare.complete and bare.to_dict()["generator"] is None
    found = rx.diffusion_bound(data, gaussian_score(process, 1.0), time=0.5, draws=2, steps=4, model_draws=2)
    found.save(tmp_path / "b.json")
    read = json.loads((tmp_path / "b.json").read_text())
    assert read == json.loads(json.dumps(found.to_dict()))
    assert read["schedule"]["name"] == "vp" and read["bound"]["value"] == found.bound.value
    for name in ("A ", "B ", "C ", "L_sm", "bound"):
        assert any(line.startswith(name) for line in str(found).splitlines())
    with pytest.raises(ValueError, match=r"must end in \.json"):
        found.save(tmp_path / "b.txt")


# ---- the loss


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loss_is_the_bounds_data_terms(schedule):
    data, t = torch.randn(11, 2, dtype=F64), MIDDLE[schedule]
    loss = rx.diffusion_bound_loss(data, t, schedule=schedule, sub_gaussian=0.3, draws=5, seed=4)
    found = rx.diffusion_bound(data, schedule=schedule, time=t, sub_gaussian=0.3, draws=5, seed=4)
    assert float(loss) == pytest.approx(found.data_terms.value, abs=1e-13)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_against_differences_of_the_same_noise(schedule):
    data = torch.randn(9, 2, dtype=F64, requires_grad=True)
    time = torch.tensor(MIDDLE[schedule], dtype=F64, requires_grad=True)

    def loss(x, t):
        return rx.diffusion_bound_loss(x, t, schedule=schedule, draws=3, seed=7)

    assert torch.autograd.gradcheck(loss, (data, time), eps=1e-6, atol=1e-6, rtol=1e-5)


def test_gradients_in_float32_and_in_blocks(monkeypatch):
    data = torch.randn(10, 3)
    gradients = []
    for dtype, rows in ((F64, 1 << 16), (torch.float32, 1 << 16), (torch.float32, 8)):
        monkeypatch.setattr(diffusion_terms, "_BLOCK_ROWS", rows)
        x, t = data.to(dtype, copy=True).requires_grad_(), torch.tensor(0.3, requires_grad=True)
        loss = rx.diffusion_bound_loss(x, t, draws=4, seed=0)
        loss.backward()
        gradients.append((float(loss.detach()), x.grad.double(), t.grad.double()))
    (exact, *grads), (single, *singles), (blocks, *by_blocks) = gradients
    assert single == pytest.approx(exact, abs=1e-5) and blocks == pytest.approx(single, abs=1e-6)
    for g, s, b in zip(grads, singles, by_blocks, strict=True):
        # Float32 arithmetic on sums of tens of terms.
        torch.testing.assert_close(s, g, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b, s, rtol=1e-5, atol=1e-6)


def test_loss_of_some_rows():
    data, rows = torch.randn(30, 2), torch.tensor([3, 17, 29, 3])
    found = rx.diffusion_bound(data, time=0.3, draws=4, seed=5)
    loss = rx.diffusion_bound_loss(data, 0.3, draws=4, rows=rows, seed=5)
    want = math.sqrt(2) * found.prior_kl_root[rows].mean() - found.kl[rows].mean()
    assert float(loss) == pytest.approx(float(want), abs=1e-12)


def test_loss_draws_fresh_noise_from_torchs_generator():
    data = torch.randn(8, 2)
    first, second = (float(rx.diffusion_bound_loss(data, 0.3)) for _ in range(2))
    torch.manual_seed(0)
    torch.randn(8, 2)
    assert first != second and float(rx.diffusion_bound_loss(data, 0.3)) == first


# ---- errors

DATA = torch.randn(6, 2)


def spoilt():
    data = DATA.clone()
    data[2, 1] = math.nan
    data[4, 0] = math.inf
    return data


@pytest.mark.parametrize(
    ("data", "options", "kind", "message"),
    [
        (spoilt(), {}, ValueError, "data has NaN or infinite values in rows 2, 4;"),
        (torch.empty(0, 2), {}, ValueError, r"data is empty, shape \[0, 2\]"),
        (torch.zeros(4, 2, dtype=torch.int64), {}, TypeError, "data must be floating or uint8, got torch.int64"),
        ([[1.0]], {}, TypeError, "data must be a NumPy array or a torch tensor, got list"),
        (DATA, {"time": 2.5}, ValueError, "time must be in the range of the vp schedule, 1e-05 to 2, got 2.5"),
        (DATA, {"time": 0.0}, ValueError, "time must be in the range"),
        (DATA, {"time": math.nan}, ValueError, "time must be in the range"),
        (DATA, {"time": "late"}, TypeError, "time must be a number, got str"),
        (DATA, {"draws": 1}, ValueError, "draws must be at least 2, got 1"),
        (DATA, {"schedule": "cosine"}, ValueError, "diffusion_bound: schedule must be one of"),
        (DATA, {"sub_gaussian": -1.0}, ValueError, "sub_gaussian must be finite and not negative"),
        (DATA, {"seed": 1.5}, TypeError, "seed must be an int"),
        (DATA, {"model": 3}, TypeError, "model must be callable as"),
        (
            DATA,
            {"model": lambda x, t: x[:, :1]},
            ValueError,
            r"must return a tensor shaped as x, \[384, 2\], got",
        ),
        (DATA, {"model": lambda x, t: (x,)}, TypeError, "got tuple; wrap it"),
        (DATA, {"model": lambda x, t: x * math.nan}, ValueError, "model returned NaN or infinity at t = 0.16667"),
        (
            DATA,
            {"model": lambda x, t: x, "parametrization": "flow"},
            ValueError,
            "must be one of score, noise, denoised",
        ),
        (DATA, {"model": lambda x, t: x, "time_scale": 0.0}, ValueError, "time_scale must be positive and finite"),
        (DATA, {"model": lambda x, t: x, "model_draws": 1}, ValueError, "model_draws must be at least 2"),
        (DATA, {"model": lambda x, t: x, "batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ],
)
def test_bad_arguments(data, options, kind, message):
    model = options.pop("model", None)
    with pytest.raises(kind, match=message):
        rx.diffusion_bound(data, model, **{"draws": 2, "steps": 6, **options})


@pytest.mark.parametrize(
    ("data", "time", "options", "kind", "message"),
    [
        (DATA.numpy(), 0.5, {}, TypeError, "data must be a tensor, got ndarray"),
        (DATA.half(), 0.5, {}, TypeError, "data must be float32 or float64, got torch.float16"),
        (DATA, torch.ones(2), {}, ValueError, "time must be a number or a floating 0-dim tensor"),
        (DATA, torch.tensor(3.0), {}, ValueError, "time must be in the range of the vp schedule"),
        (DATA, 0.5, {"rows": [0]}, TypeError, "rows must be an int64 tensor, got list"),
        (DATA, 0.5, {"rows": torch.tensor([6])}, ValueError, "rows must be from 0 to 5, got 6 to 6"),
        (DATA, 0.5, {"draws": 0}, ValueError, "draws must be at least 1"),
    ],
)
def test_bad_arguments_of_the_loss(data, time, options, kind, message):
    with pytest.raises(kind, match=message):
        rx.diffusion_bound_loss(data, time, **options)


def test_a_network_in_training_mode_is_warned_of():
    network = torch.nn.Sequential(torch.nn.Dropout(0.5))
    model = torch.nn.Module()
    model.inner, model.forward = network, lambda x, t: network(x)
    with pytest.warns(UserWarning, match="in training mode"):
        rx.diffusion_bound(DATA, model, draws=2, steps=2, model_draws=2)
