"""Draws from the refined model: resampling, rejection, Metropolis-Hastings. All by index, all seeded.

The random numbers are Philox4x32-10 with the seed as key and the draw as counter: a seed gives the same indices for any
number of threads, any batch, on CPU and GPU. What each draw is exactly stands in `csrc/math/resampling.h`.

In a CUDA graph, a seed tensor on the device is read at every replay: update it in place (`seed.add_(1)`) for new draws.
Without a seed every replay draws one from torch's default generator. A seed or offset given as an int is part of the
graph: every replay repeats its draws.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ._call import called
from ._ops_resampling import ops
from .arguments import check_floating, check_seed, whole

METHODS = ("multinomial", "stratified", "systematic", "residual")


class Rejection(NamedTuple):
    """What `rejection` returns.

    keep: bool, shaped as `log_ratio`: the accepted samples.
    log_bound: log M, float64, one per row (0-dim for 1-D input): pass it to the next batch.
    acceptance: share of accepted samples, float64, one per row.
    """

    keep: Tensor
    log_bound: Tensor
    acceptance: Tensor


class Metropolis(NamedTuple):
    """What `metropolis(..., return_acceptance=True)` returns.

    indices: int64, [num], or [chains, num] for several chains.
    acceptance: share of accepted proposals, float64, 0-dim or [chains].
    """

    indices: Tensor
    acceptance: Tensor


def _seed(function: str, seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    if seed is None:
        if generator is None:
            return torch.randint(2**63 - 1, (), device=device)
        return torch.randint(2**63 - 1, (), generator=generator, device=generator.device).to(device)
    if generator is not None:
        raise ValueError(f"{function}: give seed or generator, not both")
    seed = check_seed(function, seed)
    if isinstance(seed, Tensor):
        return seed.to(device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def _double(
    function: str, argument: str, value: float | Tensor, device: torch.device, *, infinite: bool = True
) -> Tensor:
    """A float64 tensor; a number is checked here, and may be -inf if `infinite`, the values of a tensor by the op."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64)
    if not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {argument} must be a number or a tensor, got {type(value).__name__}")
    if math.isnan(value):
        raise ValueError(f"{function}: {argument} must not be NaN")
    if value == math.inf or (value == -math.inf and not infinite):
        raise ValueError(f"{function}: {argument} must be finite{' or -inf' if infinite else ''}, got {value}")
    return torch.full((), value, dtype=torch.float64, device=device)


def resample(
    weights: Tensor,
    num: int,
    method: Literal["multinomial", "stratified", "systematic", "residual"] = "systematic",
    *,
    seed: int | Tensor | None = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    log: bool = False,
) -> Tensor:
    """Indices drawn with probabilities p = w / Σw: the refined sample is `fake[resample(r.weights, num)]`.

    E[count of i] = num · p_i for every method; they differ in the variance they leave, least in "systematic".

        multinomial  independent draws: t_j = U_j · Σw, in random order.
        stratified   one draw from each of `num` strata of equal weight: t_j = (j + U_j) Σw / num, ascending.
        systematic   the same place in each stratum: t_j = (j + U) Σw / num, ascending; every count is num·p_i rounded
                     up or down.
        residual     ⌊num·p_i⌋ copies of each i, ascending, then multinomial draws from what is left; no count is below
                     ⌊num·p_i⌋.

    Draw j is the first index at which the running sum of the weights exceeds t_j. The sums are exact integers, in
    units of at most 2⁻⁴⁹ of the largest of 4096 neighbouring weights and 2⁻⁶⁰ of the total: weights spanning 30
    orders of magnitude bias nothing, and a weight of zero is never drawn. The running time is O(n + num); on the CPU
    "multinomial" and "residual" take about 12 n bytes of working memory on top, the others next to none.

    Args:
        weights: non-negative, [..., n], any normalisation; float64, float32, float16 or bfloat16. Leading dimensions
            are independent rows. Treated as constants by autograd.
        num: how many to draw from each row.
        method: one of the four above.
        seed: an int, or an int64 tensor with one seed for each index of some leading dimensions. None: drawn from
            `generator`, or from torch's default generator, so that `torch.manual_seed` rules.
        offset: how many random numbers of the seed to skip. "multinomial" draws of `num` at offset 0 and of `more` at
            offset `num` are together the `num + more` draws at offset 0.
        generator: where to draw the seed from.
        log: `weights` are log-weights (−inf for none), which cannot overflow: `resample(r.log_ratio, num, log=True)`.

    Returns:
        int64 [..., num] on the weights' device.

    Raises:
        TypeError: a dtype or argument type that is not supported.
        ValueError: an empty, negative, NaN, infinite or all-zero row of weights (on CUDA, where checking would wait for
            the device, such a row draws its first index), an unknown method, a negative `num`.

    Source: Douc, Cappé, Moulines, "Comparison of resampling schemes for particle filtering", 2005, section 2; for
    "residual" Liu and Chen 1998.

    >>> import torch, refine_ext as rx
    >>> rx.resample(torch.tensor([1.0, 0.0, 2.0, 1.0]), 8, seed=0)
    tensor([0, 0, 2, 2, 2, 2, 3, 3])
    """
    check_floating("resample", "weights", weights)
    if weights.dim() == 0:
        raise ValueError("resample: weights must have at least one dimension, got a 0-dim tensor")
    if method not in METHODS:
        raise ValueError(f"resample: method must be one of {', '.join(METHODS)}, got {method!r}")
    num, offset = whole("resample", "num", num, 0), whole("resample", "offset", offset, 0)
    key = _seed("resample", seed, generator, weights.device)
    return called(
        "resample", ops.resample.default, False, weights.detach(), num, key, offset, METHODS.index(method), log
    )


def rejection(
    log_ratio: Tensor,
    *,
    log_bound: float | Tensor | None = None,
    gamma: float | Tensor | None = 0.0,
    percentile: float | None = None,
    epsilon: float = 1e-6,
    seed: int | Tensor | None = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
) -> Rejection:
    """Which samples of Q to keep so that the kept ones follow the refined model.

    gamma=None is plain rejection: keep with probability r / M. Otherwise discriminator rejection sampling:
    keep with probability sigmoid(F), F = d − log(1 − e^(d − epsilon)) − gamma, d = log r − log M, which is r / M
    for gamma = 0 up to epsilon; a gamma above 0 keeps fewer, one below 0 more (and then closer to Q).

    Args:
        log_ratio: log r, [..., n]; float64, float32, float16 or bfloat16; −inf is never kept. Leading dimensions are
            independent rows. A constant added to all of a row changes nothing if `log_bound` has it too.
        log_bound: log M so far, a number or one per row; M is raised to the batch's largest r. None: that one alone.
            Carry the returned one from batch to batch.
        gamma: the shift γ, a number or one per row; None for plain rejection.
        percentile: take γ from the batch instead: this percentile (0 to 100) of F at γ = 0, as the paper does for
            data whose largest r dwarfs the others; a lower percentile keeps more.
        epsilon: keeps F finite at r = M.
        seed, generator: as in `resample`.
        offset: number of samples of this seed already judged: sample i uses number offset + i, so that batches
            give what one call would for the same `log_bound`.

    Returns:
        `Rejection(keep, log_bound, acceptance)`.

    Raises:
        TypeError: a dtype or argument type that is not supported.
        ValueError: NaN or +inf in `log_ratio` (on CUDA a row that has one keeps nothing), a bound, gamma or percentile
            out of range.

    Source: Azadi, Olsson, Darrell, Goodfellow, Odena, "Discriminator rejection sampling", ICLR 2019, section 3.2, (8).

    >>> import torch, refine_ext as rx
    >>> rx.rejection(torch.tensor([0.0, -50.0, 0.0, -torch.inf]), gamma=None, seed=0).keep
    tensor([ True, False,  True, False])
    """
    check_floating("rejection", "log_ratio", log_ratio)
    if log_ratio.dim() == 0:
        raise ValueError("rejection: log_ratio must have at least one dimension, got a 0-dim tensor")
    if not (isinstance(epsilon, float) and 0 < epsilon < math.inf):
        raise ValueError(f"rejection: epsilon must be a positive float, got {epsilon!r}")
    offset = whole("rejection", "offset", offset, 0)
    log_ratio, device = log_ratio.detach(), log_ratio.device
    bound = None if log_bound is None else _double("rejection", "log_bound", log_bound, device)
    if percentile is not None:
        if not 0 <= percentile <= 100:
            raise ValueError(f"rejection: percentile must be between 0 and 100, got {percentile}")
        if gamma is None or isinstance(gamma, Tensor) or gamma != 0.0:
            raise ValueError("rejection: give gamma or percentile, not both")
        shift: Tensor | None = _percentile(log_ratio, bound, percentile, epsilon)
    else:
        shift = None if gamma is None else _double("rejection", "gamma", gamma, device, infinite=False)
    key = _seed("rejection", seed, generator, device)
    arguments = (log_ratio, bound, shift, epsilon, key, offset)
    keep, new_bound, accepted = called("rejection", ops.rejection.default, False, *arguments)
    return Rejection(keep, new_bound, accepted.double() / log_ratio.shape[-1])


def _percentile(log_ratio: Tensor, bound: Tensor | None, percentile: float, epsilon: float) -> Tensor:
    """The percentile of F at gamma = 0, the nearest rank from below."""
    wide = log_ratio.double()
    top = wide.amax(-1)
    if bound is not None:
        top = torch.maximum(top, bound.reshape(top.shape) if bound.dim() else bound)
    d = wide - top.unsqueeze(-1)
    rank = max(1, math.ceil(percentile / 100 * d.shape[-1]))
    # F grows with d: its percentile is F at the percentile of d.
    chosen = d.kthvalue(rank, dim=-1).values
    return chosen - torch.log(-torch.expm1(chosen - epsilon))


@overload
def metropolis(
    log_ratio: Tensor,
    num: int,
    *,
    chains: int = ...,
    burn_in: int = ...,
    thin: int = ...,
    initial: float | Tensor | None = ...,
    order: Literal["random", "given"] = ...,
    seed: int | Tensor | None = ...,
    generator: torch.Generator | None = ...,
    return_acceptance: Literal[False] = ...,
) -> Tensor: ...
@overload
def metropolis(
    log_ratio: Tensor,
    num: int,
    *,
    chains: int = ...,
    burn_in: int = ...,
    thin: int = ...,
    initial: float | Tensor | None = ...,
    order: Literal["random", "given"] = ...,
    seed: int | Tensor | None = ...,
    generator: torch.Generator | None = ...,
    return_acceptance: Literal[True],
) -> Metropolis: ...
def metropolis(
    log_ratio: Tensor,
    num: int,
    *,
    chains: int = 1,
    burn_in: int = 0,
    thin: int = 1,
    initial: float | Tensor | None = None,
    order: Literal["random", "given"] = "random",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    return_acceptance: bool = False,
) -> Tensor | Metropolis:
    """Indices drawn by independent Metropolis–Hastings: proposals are samples of Q, the target is the refined model.

    A chain at x takes the proposal x′ with probability min(1, r(x′)/r(x)). It needs no bound on r, and its draws
    follow the refined model once it has forgotten its start.

    Args:
        log_ratio: log r of samples of Q, [n]; float64, float32, float16 or bfloat16, any normalisation.
        num: draws to keep from each chain.
        chains: independent chains, run side by side.
        burn_in: steps before the first draw that is kept. With 0 and no `initial` that draw is a plain sample of Q.
        thin: steps from one kept draw to the next. MH-GAN keeps one draw of hundreds of steps: burn_in=640, num=1 in
            each of as many chains as samples are wanted.
        initial: log r of a state to start from that is not among the samples, such as a real sample (MH-GAN's
            choice, which in principle needs no burn-in): a number, or one per chain. A chain that has not left it when
            its first draw is due takes the proposal of that step. None: a chain starts at its first proposal.
        order: "random": each step proposes a sample drawn with replacement. "given": chain c proposes samples
            c·steps, c·steps + 1, … once each, steps = burn_in + (num − 1)·thin + 1; needs n ≥ chains · steps.
        seed, generator: as in `resample`; chain c has the numbers of its own, however many chains there are.
        return_acceptance: return `Metropolis(indices, acceptance)` instead of the indices.

    Returns:
        int64 [num], or [chains, num] for several chains.

    Raises:
        TypeError: a dtype or argument type that is not supported.
        ValueError: NaN or +inf in `log_ratio` (on CUDA nothing is checked), numbers out of range, too few samples
            for "given".

    Source: Turner, Hung, Frank, Saatchi, Yosinski, "Metropolis-Hastings generative adversarial networks", ICML 2019,
    section 3.1 and algorithm 1.

    >>> import torch, refine_ext as rx
    >>> rx.metropolis(torch.tensor([0.0, -torch.inf, 0.0]), 4, burn_in=20, seed=0).shape
    torch.Size([4])
    """
    check_floating("metropolis", "log_ratio", log_ratio)
    if log_ratio.dim() != 1:
        raise ValueError(f"metropolis: log_ratio must be 1-D, got shape {list(log_ratio.shape)}")
    num, burn_in = whole("metropolis", "num", num, 0), whole("metropolis", "burn_in", burn_in, 0)
    chains, thin = whole("metropolis", "chains", chains, 1), whole("metropolis", "thin", thin, 1)
    if order not in ("random", "given"):
        raise ValueError(f"metropolis: order must be 'random' or 'given', got {order!r}")
    start = None if initial is None else _double("metropolis", "initial", initial, log_ratio.device)
    key = _seed("metropolis", seed, generator, log_ratio.device)
    arguments = (log_ratio.detach(), num, chains, burn_in, thin, order == "given", start, key)
    indices, accepted = called("metropolis", ops.metropolis.default, False, *arguments)
    if chains == 1:
        indices, accepted = indices[0], accepted[0]
    if not return_acceptance:
        return indices
    compared = burn_in + (num - 1) * thin + (initial is not None)
    return Metropolis(indices, accepted.double() / max(1, compared))
