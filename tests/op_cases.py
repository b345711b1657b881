"""One table of calls that reach every op and each of its kernels, for the tests that ask the same of all of them.

A new op is a new entry: test_op_cases.py fails until every registered op is called by some case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from reference import CLIPPED, NAMED, outputs
from torch import Tensor

import refine_ext as rx
from refine_ext.divergence import parse_divergence

ops = torch.ops.refine_ext
# One row length for each way a row is worked on: by a warp, by a block, by a large block, by many blocks.
SHAPES = ((9, 40), (2, 3001), (2, 9000), (2, 20_001))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """`call` takes what `inputs` made, perhaps overwrites it, and returns tensors; both are the same on all devices."""

    name: str
    inputs: Callable[[torch.Generator], Iterable[Tensor]]
    call: Callable[..., Iterable[Tensor]]

    def make(self, device: str | torch.device, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [tensor.to(device) for tensor in self.inputs(generator)]

    def run(self, *inputs: Tensor) -> list[Tensor]:
        return list(self.call(*inputs))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ratio(name: str, dtype: torch.dtype) -> Case:
    def call(*groups: Tensor) -> Iterable[Tensor]:
        for h in groups:
            r = rx.density_ratio(h, name, dim=-1)
            # Next to where a ratio is clipped to zero its logarithm is any number.
            yield r.ratio if name in CLIPPED else r.log_ratio
            yield from (r.shift, r.ess, r.max_weight)

    return Case(
        f"density_ratio-{name}-{short(dtype)}",
        lambda g: [outputs(name, shape, dtype, generator=g) for shape in SHAPES],
        call,
    )


def _ratio_options(name: str, dtype: torch.dtype) -> Case:
    """Base weights, a given shift (a number and a tensor), ratios instead of their logarithms, in place."""

    def inputs(g: torch.Generator) -> Iterable[Tensor]:
        for shape in SHAPES:
            yield outputs(name, shape, dtype, generator=g)
            yield torch.rand(shape, dtype=torch.float64, generator=g).to(dtype)
            yield torch.rand(shape[:-1], dtype=torch.float64, generator=g)

    def call(*groups: Tensor) -> Iterable[Tensor]:
        for h, weights, shift in zip(*[iter(groups)] * 3, strict=True):
            yield rx.density_ratio(h, name, dim=-1, base_weights=weights).weights
            yield rx.density_ratio(h, name, dim=-1, base_weights=weights[0], shift=shift).log_ratio
            yield rx.density_ratio(h, name, dim=-1, shift=0.25).log_normalizer
            yield rx.density_ratio(h, name, dim=-1, output="ratio").ratio
            yield rx.density_ratio(h, name, dim=-1, out=h).log_ratio

    return Case(f"density_ratio_options-{name}-{short(dtype)}", inputs, call)


def _ratio_gradient(name: str, dtype: torch.dtype) -> Case:
    def inputs(g: torch.Generator) -> Iterable[Tensor]:
        for shape in SHAPES:
            yield outputs(name, shape, dtype, generator=g)
            yield torch.randn(shape, dtype=torch.float64, generator=g).to(dtype)
            yield torch.rand(shape[:-1], dtype=torch.float64, generator=g)

    def call(*groups: Tensor) -> Iterable[Tensor]:
        for h, grad, shift in zip(*[iter(groups)] * 3, strict=True):
            for given in (None, shift):
                x = h.detach().requires_grad_()
                r = rx.density_ratio(x, name, dim=-1, shift=given)
                upstream = [grad * r.ratio.detach(), torch.ones_like(r.log_normalizer)]
                yield from torch.autograd.grad([r.log_ratio, r.log_normalizer], x, upstream)

    return Case(f"density_ratio_backward-{name}-{short(dtype)}", inputs, call)


def _pairs(name: str, dtype: torch.dtype, g: torch.Generator) -> Iterable[Tensor]:
    """Real and generated outputs, of which one side alone may take many blocks, and a gradient for each row."""
    for rows, n, n_real in ((9, 40, 33), (2, 3001, 20_001), (2, 20_001, 500)):
        yield outputs(name, (rows, n_real), dtype, generator=g)
        yield outputs(name, (rows, n), dtype, generator=g)
        grad = torch.randn(rows, dtype=torch.float64, generator=g)
        yield grad if dtype == torch.float64 else grad.float()


def _with_gradients(value: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Iterable[Tensor]]:
    def call(*groups: Tensor) -> Iterable[Tensor]:
        for real, fake, grad in zip(*[iter(groups)] * 3, strict=True):
            leaves = [x.detach().requires_grad_() for x in (real, fake)]
            bound = value(*leaves)
            yield bound.detach()
            yield from torch.autograd.grad(bound, leaves, grad[: bound.numel()])

    return call


def _bound(name: str, dtype: torch.dtype, tight: bool) -> Case:
    code = parse_divergence("test", name)
    return Case(
        f"variational_bound-{name}-{short(dtype)}-{'tight' if tight else 'loose'}",
        lambda g: _pairs(name, dtype, g),
        _with_gradients(lambda real, fake: ops.variational_bound(real, fake, tight, *code)[0]),
    )


def _logit_bound(name: str, dtype: torch.dtype) -> Case:
    code = parse_divergence("test", name)
    return Case(
        f"dual_bound-{name}-{short(dtype)}",
        lambda g: _pairs("kl", dtype, g),
        _with_gradients(lambda real, fake: ops.dual_bound(real, fake, *code)),
    )


def _tight_logit_bound(name: str, dtype: torch.dtype) -> Case:
    def value(real: Tensor, fake: Tensor) -> Tensor:
        return rx.variational_bound(real, fake, name, kind="logit").reshape(1)

    return Case(f"dual_output-{name}-{short(dtype)}", lambda g: _pairs("kl", dtype, g), _with_gradients(value))


def _seed(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(2**62, shape, generator=g)


def _resample(method: str, dtype: torch.dtype, log: bool) -> Case:
    def inputs(g: torch.Generator) -> Iterable[Tensor]:
        for rows, n in ((3, 5), (2, 4097), (1, 20_001)):
            weights = torch.rand((rows, n), dtype=torch.float64, generator=g)
            yield (weights.log() if log else weights).to(dtype)
            yield _seed(g, rows)

    def call(*groups: Tensor) -> Iterable[Tensor]:
        for (weights, seed), num in zip(zip(*[iter(groups)] * 2, strict=True), (9, 3000, 30_000), strict=True):
            yield rx.resample(weights, num, method, seed=seed, log=log, offset=3)

    return Case(f"resample-{method}-{short(dtype)}{'-log' if log else ''}", inputs, call)


def _rejection(dtype: torch.dtype) -> Case:
    def inputs(g: torch.Generator) -> Iterable[Tensor]:
        for shape in SHAPES:
            yield torch.randn(shape, dtype=torch.float64, generator=g).to(dtype)
            yield torch.rand(shape[:-1], dtype=torch.float64, generator=g) + 3
            yield _seed(g)

    def call(*groups: Tensor) -> Iterable[Tensor]:
        for log_ratio, bound, seed in zip(*[iter(groups)] * 3, strict=True):
            yield from rx.rejection(log_ratio, gamma=None, seed=seed)
            yield from rx.rejection(log_ratio, log_bound=bound, gamma=bound - 2.5, seed=seed, offset=5)
            yield from rx.rejection(log_ratio, percentile=80, seed=seed)

    return Case(f"rejection-{short(dtype)}", inputs, call)


def _metropolis(dtype: torch.dtype) -> Case:
    def inputs(g: torch.Generator) -> Iterable[Tensor]:
        for n in (700, 20_001):
            yield torch.randn(n, dtype=torch.float64, generator=g).to(dtype)
            yield torch.randn(300, dtype=torch.float64, generator=g)
            yield _seed(g)

    def call(*groups: Tensor) -> Iterable[Tensor]:
        for log_ratio, initial, seed in zip(*[iter(groups)] * 3, strict=True):
            yield from rx.metropolis(log_ratio, 7, chains=300, thin=3, seed=seed, return_acceptance=True)
            yield rx.metropolis(log_ratio, 1, chains=300, burn_in=20, initial=initial, seed=seed)
            yield rx.metropolis(log_ratio, 5, chains=60, thin=2, burn_in=2, order="given", seed=seed)

    return Case(f"metropolis-{short(dtype)}", inputs, call)


def _guided_step(dtype: torch.dtype, other: torch.dtype | None = None) -> Case:
    """Rows of packs and rows that begin between two, few terms and many, of the state's dtype and of another one."""
    shapes = ((5, 2), (3, 5, 8), (2, 20_001), (3, 7, 1024))
    others = dtype if other is None else other

    def inputs(g: torch.Generator) -> Iterable[Tensor]:
        for shape in shapes:
            x, first = (torch.randn(shape, dtype=torch.float64, generator=g).to(dtype) for _ in range(2))
            yield from (x, first)
            for _ in range(4):
                yield torch.randn(shape, dtype=torch.float64, generator=g).to(others)
            yield torch.randn(shape[0], 7, dtype=torch.float64, generator=g)  # a table of coefficients
            yield torch.rand(shape[0], dtype=torch.float64, generator=g)  # factors
            yield _seed(g, shape[0])

    def call(*groups: Tensor) -> Iterable[Tensor]:
        for x, first, second, third, fourth, fifth, table, factor, seeds in zip(*[iter(groups)] * 9, strict=True):
            few, many = [first, second], [first, second, third, fourth, fifth]
            numbers = [0.9, 0.4, -0.3, 0.5]
            yield ops.guided_step(x, few, None, numbers[:3], factor, None, 0, 0, False)
            yield ops.guided_step(x, many, table[:, :6], [], factor, None, 0, 0, False)
            yield ops.guided_step(x, few, table[0, :4], [], None, seeds, 0, 2, True)
            yield ops.guided_step(x, many, table, [], factor, seeds[:1].reshape(()), 0, 2**32 - 1, True)
            ops.guided_step_out(x, [second], None, [0.9, 0.4, 0.5], factor, seeds, 0, 3, True, out=x)
            yield x

    return Case(f"guided_step-{short(dtype)}{f'-with_{short(other)}' if other else ''}", inputs, call)


def _guidance_factor(name: str, dtype: torch.dtype, logit: bool = False, flow: bool = False) -> Case:
    """Every parametrisation, its values as numbers and as tensors."""
    code, alpha = parse_divergence("test", name)
    rows = 700

    def inputs(g: torch.Generator) -> Iterable[Tensor]:
        h = torch.randn(rows, dtype=torch.float64, generator=g).to(dtype) if logit else None
        yield outputs(name, (rows,), dtype, generator=g) if h is None else h
        for _ in range(3):
            yield 0.1 + torch.rand(rows, dtype=torch.float64, generator=g)

    def call(h: Tensor, weight: Tensor, sigma: Tensor, level: Tensor) -> Iterable[Tensor]:
        options = (code, alpha, logit, flow)
        for parametrization in range(4):
            numbers = [0.1, 1.5, float("nan"), 1.0, 0.3, 2.0]
            yield ops.guidance_factor(h, None, weight, sigma, level, numbers, *options, parametrization)
            numbers[2] = 0.7
            few = h[:90], 0.05 * weight[:90]  # of kl all are the same constant
            yield ops.guidance_factor(*few, None, None, None, numbers, *options, parametrization)

    kind = "-logit" if logit else ""
    return Case(f"guidance_factor-{name}-{short(dtype)}{kind}{'-flow' if flow else ''}", inputs, call)


def _rademacher(dtype: torch.dtype) -> Case:
    """Two blocks of rows, two tiles of columns; the suprema with their gradients, sums that go on, multipliers."""
    n, m, draws = 1030, 65, 33

    def inputs(g: torch.Generator) -> Iterable[Tensor]:
        yield torch.randn(n, m, dtype=torch.float64, generator=g).to(dtype)
        yield torch.randn(draws, dtype=torch.float64, generator=g)

    def call(outputs: Tensor, grad: Tensor) -> Iterable[Tensor]:
        for supremum in range(3):
            x = outputs.detach().requires_grad_()
            suprema, index, largest = ops.rademacher_suprema(x, draws, 5, 2**62 + 7, supremum, 3)
            yield from (suprema.detach(), index, largest)
            yield from torch.autograd.grad(suprema, x, grad)
        if dtype == torch.float32:
            for digits in (1, 2):
                yield ops.rademacher_suprema(outputs, draws, 5, 3, 1, digits)[0]
        sums = grad[:, None].repeat(1, m)
        ops.rademacher_sums(sums, outputs, 2048, 2**33, 9)
        yield sums
        for normal in (False, True):
            yield ops.multipliers(outputs, n, 3, 1024, 2**33, 4, normal) * outputs[:, 0]

    return Case(f"rademacher-{short(dtype)}", inputs, call)


def _gaussian(dtype: torch.dtype) -> Case:
    """Rows of every way of work, packs and not, with each prior's part or without; draws, and all gradients."""

    def inputs(g: torch.Generator) -> Iterable[Tensor]:
        for shape in ((700, 2), (9, 40), (5, 3001), (2, 40_001)):
            for _ in range(4):
                yield torch.randn(shape, dtype=torch.float64, generator=g).to(dtype)
            yield 0.1 + torch.rand(shape[0], dtype=torch.float64, generator=g)
            yield torch.randn(3, *shape, dtype=torch.float64, generator=g).to(dtype)

    def call(*groups: Tensor) -> Iterable[Tensor]:
        for mean, log_variance, prior_mean, prior_log_variance, grad, z in zip(*[iter(groups)] * 6, strict=True):
            grad = grad.to(torch.float64 if dtype == torch.float64 else torch.float32)
            for m0, v0 in ((None, None), (prior_mean, None), (None, prior_log_variance[:1].expand_as(mean))):
                yield ops.gaussian_kl(mean, log_variance, m0, v0)
                wanted = 3 + 4 * (m0 is not None) + 8 * (v0 is not None)
                yield from (g for g in ops.gaussian_kl_backward(grad, mean, log_variance, m0, v0, wanted) if len(g))
            every = (mean, log_variance, prior_mean, prior_log_variance)
            yield ops.gaussian_kl(*every)
            yield from ops.gaussian_kl_backward(grad, *every, 15)
            yield ops.importance_log_weights(z, mean, log_variance)
            yield from ops.importance_log_weights_backward(grad.repeat(3, 1), z, mean, log_variance, 7)

    return Case(f"gaussian_kl-{short(dtype)}", inputs, call)


def _log_mixture(dtype: torch.dtype) -> Case:
    """Few dimensions, any, and as many as are multiplied; every kind of scale, more centres than one chunk has."""
    sizes = ((150, 40, 2), (20, 600, 3), (70, 150, 19), (3, 600, 66))
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def inputs(g: torch.Generator) -> Iterable[Tensor]:
        for m, n, d in sizes:
            for rows in (m, n):
                yield torch.randn(rows, d, dtype=torch.float64, generator=g).to(dtype)
            yield (d**0.5 * (0.5 + torch.rand(n, d, dtype=torch.float64, generator=g))).to(compute)
            yield torch.randn(n, dtype=torch.float64, generator=g).to(compute)
            yield torch.randint(-1, n, (m,), generator=g)
            yield torch.randn(m, dtype=torch.float64, generator=g)

    def call(*groups: Tensor) -> Iterable[Tensor]:
        for x, centers, scales, log_weights, exclude, grad in zip(*[iter(groups)] * 6, strict=True):
            # A kernel that is not one of the small dimensions' serves scales of each dimension.
            for scale, weights, left_out in (
                (scales[0, :1].reshape(()), None, exclude),
                (scales[:, 0], log_weights, None),
                (scales, log_weights, exclude),
            ):
                value, mean, stats, top = ops.log_mixture(x, centers, scale, weights, left_out, True, True)
                yield from (value, mean, stats, top)
                wanted = 7 if weights is None else 15
                grads = ops.log_mixture_backward(grad, value, x, centers, scale, weights, left_out, wanted)
                yield from grads[: wanted.bit_count()]
                yield ops.log_mixture(x, centers, scale, weights, left_out, False, False)[0]
                yield from ops.log_mixture_with_score(x, centers, scale, weights, left_out)

    return Case(f"log_mixture-{short(dtype)}", inputs, call)


ALPHAS = ("alpha:0.3", "alpha:3")
OTHERS = tuple(dtype for dtype in DTYPES if dtype != torch.float32)
CASES = (
    *(_ratio(name, torch.float32) for name in (*NAMED, *ALPHAS)),
    *(_ratio(name, dtype) for dtype in OTHERS for name in ("kl", "jensen_shannon")),
    *(_ratio_options(name, torch.float32) for name in ("kl", "gan")),
    *(_ratio_options("squared_hellinger", dtype) for dtype in OTHERS),
    *(_ratio_gradient(name, torch.float32) for name in ("kl", "gan", "pearson_chi2", "jeffreys")),
    *(_ratio_gradient("alpha:0.3", dtype) for dtype in OTHERS),
    *(_bound(name, torch.float32, tight) for name in ("kl", "reverse_kl", "gan", *ALPHAS) for tight in (True, False)),
    *(_bound("jeffreys", dtype, True) for dtype in OTHERS),
    *(_logit_bound(name, torch.float32) for name in ("kl", "gan", "jeffreys")),
    *(_logit_bound("pearson_chi2", dtype) for dtype in OTHERS),
    *(_tight_logit_bound("kl", dtype) for dtype in DTYPES),
    *(_resample(method, torch.float32, log) for method in rx.resampling.METHODS for log in (False, True)),
    *(_resample("systematic", dtype, False) for dtype in OTHERS),
    *(_rejection(dtype) for dtype in DTYPES),
    *(_metropolis(dtype) for dtype in DTYPES),
    *(_guided_step(dtype) for dtype in DTYPES),
    _guided_step(torch.float64, torch.float32),
    *(_guided_step(torch.float32, other) for other in (torch.float16, torch.bfloat16)),
    *(_guidance_factor(name, torch.float32) for name in (*NAMED, *ALPHAS)),
    *(_guidance_factor("jensen_shannon", dtype, True, True) for dtype in OTHERS),
    *(_rademacher(dtype) for dtype in DTYPES),
    *(_gaussian(dtype) for dtype in DTYPES),
    *(_log_mixture(dtype) for dtype in DTYPES),
)


def assert_same(got: Iterable[Tensor], want: Iterable[Tensor], name: str) -> None:
    """Bit for bit."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{name}: result {i} differs"


def near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Whole numbers equal; others within the tolerance of the largest value."""
    if not want.is_floating_point():
        return torch.equal(got, want)
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if not torch.equal(got[~finite], want[~finite]):
        return False
    return bool((got - want)[finite].abs().max() <= tolerance * want[finite].abs().max()) if finite.any() else True
