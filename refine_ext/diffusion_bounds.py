"""The generalisation bound of a diffusion model at a time T, from its training data: every term, and a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import not_negative, whole
from .diffusion_bound_result import DiffusionBound
from .diffusion_scores import Noising, ScoreModel, Term, generator_term, largest_score, score_matching
from .diffusion_terms import (
    Numbers,
    checked_data,
    checked_rows,
    checked_seed,
    mixture_divergences,
    prior_roots,
    schedule_of,
)
from .forward_process import ForwardProcess
from .progress import progress_bar
from .samples import as_tensor


@dataclass(frozen=True)
class BoundProblem:
    """Checked arguments of `diffusion_bound` but for T, which is all that changes along a curve."""

    data: Tensor
    shape: tuple[int, ...]
    process: ForwardProcess
    draws: int
    seed: int
    sub_gaussian: float
    model: ScoreModel | None
    steps: int
    model_draws: int

    def evaluations(self) -> int:
        """How many rows and calls of the network one T takes, as the progress bar counts them."""
        return len(self.data) * self.draws + (0 if self.model is None else 2 * self.steps * self.model_draws)

    def at(self, time: float, advance: Callable[[int], Any]) -> DiffusionBound:
        m = len(self.data)
        numbers = Numbers.of(self.seed)
        with torch.no_grad():
            t = torch.tensor(time, dtype=torch.float64, device=self.data.device)
            kl, others = mixture_divergences(self.data, self.process, t, self.draws, numbers.mixture, None, advance)
            roots = prior_roots(self.data, self.process, t)
        norm = matching = generator = None
        if self.model is not None:
            order = torch.randperm(m, generator=numbers.generator).to(self.data.device)
            jitter = torch.rand((self.steps, self.model_draws), generator=numbers.generator, dtype=torch.float64)
            noising = Noising(self.data, self.shape, order, numbers.score)
            norm = largest_score(self.model, noising, time, self.steps, self.model_draws, advance)
            generator = generator_term(self.process, time, self.steps, norm, m)
            noising = Noising(self.data, self.shape, order, numbers.matching)
            matching = score_matching(self.model, noising, time, jitter, advance)
        parts = {
            "kl": kl.mean(1).cpu(),
            "kl_variance": (kl.var(1) / self.draws).cpu(),
            "kl_leave_one_out": others.mean(1).cpu(),
            "prior_kl_root": roots.cpu(),
        }
        terms = {
            "mutual_information": _averaged(parts["kl"], parts["kl_variance"]),
            "leave_one_out": _averaged(parts["kl_leave_one_out"], (others.var(1) / self.draws).cpu()),
            "prior_gap": Term(float(parts["prior_kl_root"].mean()), 0.0),
            "generator": generator,
            "score_matching": matching,
            "score_norm": norm,
        }
        return self.result(time, terms, parts)

    def result(self, time: float, terms: dict[str, Term | None], parts: dict[str, Tensor]) -> DiffusionBound:
        """What is known at a T, with what was asked for."""
        about_model: dict[str, Any] = {}
        if self.model is not None:
            about_model = {
                "steps": self.steps,
                "model_draws": self.model_draws,
                "parametrization": self.model.parametrization,
            }
        return DiffusionBound(
            time=time,
            sub_gaussian=self.sub_gaussian,
            m=self.data.shape[0],
            d=self.data.shape[1],
            draws=self.draws,
            seed=self.seed,
            schedule=self.process.to_dict(),
            **terms,  # type: ignore[arg-type]
            **parts,  # type: ignore[arg-type]
            **about_model,
        )


def bound_problem(
    function: str,
    data: Any,
    model: Callable[..., Tensor] | None,
    schedule: str | ForwardProcess,
    draws: int,
    seed: int,
    sub_gaussian: float,
    steps: int,
    model_draws: int,
    parametrization: str,
    time_scale: float,
    batch_size: int | None,
    least: int = 1,
) -> BoundProblem:
    """The arguments, checked.

    Raises:
        TypeError, ValueError: see `diffusion_bound`.
    """
    samples = as_tensor(data, function=function, argument="data")
    flat, shape = checked_data(function, samples, least)
    process = schedule_of(function, schedule)
    scores = None
    if model is not None:
        scores = ScoreModel(function, model, process, parametrization, time_scale, batch_size)
    return BoundProblem(
        flat,
        shape,
        process,
        whole(function, "draws", draws, 2),
        checked_seed(function, seed),
        not_negative(function, "sub_gaussian", sub_gaussian),
        scores,
        whole(function, "steps", steps, 1),
        whole(function, "model_draws", model_draws, 2),
    )


def diffusion_bound(
    data: Any,
    model: Callable[..., Tensor] | None = None,
    *,
    schedule: str | ForwardProcess = "vp",
    time: float = 1.0,
    draws: int = 100,
    sub_gaussian: float = 1.0,
    steps: int = 1000,
    model_draws: int = 64,
    parametrization: str = "score",
    time_scale: float = 1.0,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> DiffusionBound:
    """``A + sqrt2 R B + sqrt2 R C + L_sm``, a bound on how far a diffusion model's samples are from the data's law.

    For ``E_T(x) = N(a_T x, sigma_T^2 I)`` and the prior that sampling starts from, N(0, I), of VE and EDM
    N(0, sigma_T^2 I):

    ``A = -(1/m) sum_i KL(E_T(x_i) || (1/m) sum_j E_T(x_j))``, the mixture over all m training samples;
    ``B = (1/m) sum_i sqrt(KL(E_T(x_i) || prior))``;
    ``C = sqrt((T - t_0) L^2 / (2 m N) sum_k beta(t_k))``, ``t_k = t_0 + k (T - t_0) / N``, L the largest over the steps
    of the mean norm of the model's score at the noised training samples;
    ``L_sm = (1/2) int_{t_0}^T beta(t) E |s(x_t, t) - grad log p(x_t | x_0)|^2 dt``, ``beta = g^2``: denoising score
    matching with the likelihood weighting. It is the explicit one, whose target is the score of the training set's
    own marginal, plus the mutual information at t_0 minus that at T; nothing else is added or dropped.

    t_0 is the lowest time of the schedule (VP, sub-VP: time_min, 1e-5; VE: 0; EDM: sigma_min). L_sm grows without
    limit as t_0 goes to 0 unless the model memorises its training data; compare values of one t_0 only.

    A's KL is estimated from ``z = a x_i + sigma eps`` by ``log m - E log(1 + exp(L_i(z) - own))``, L_i the log-mixture
    of the other centres and own that of x_i: exactly log m where only the own centre counts, whatever eps, and never
    above it. The mixture is over every sample and no m draws x m array is made. The same seed gives the same noise at
    every T, so that curves are smooth in T.

    Args:
        data: `[m, ...]` the training samples, scaled as the diffusion takes them; an array or a tensor, float64,
            float32 (half and uint8 become float32). The arithmetic is in its dtype, sums in float64.
        model: ``model(x_t [B, ...], t [B])`` -> shaped as x_t, in evaluation mode; called in the dtype of its
            parameters, without gradients. None: the data terms A and B only.
        schedule: "vp", "sub-vp", "ve", "edm", or a process that `forward_process` made with other constants.
        time: T.
        draws: noise vectors for each sample in A, at least 2.
        sub_gaussian: R, the sub-Gaussian constant of the loss.
        steps: N, of C; L_sm takes as many intervals, of equal length in log(sigma / a).
        model_draws: evaluations of the model at each step, of C and of L_sm.
        parametrization: what the model returns: "score", "noise" (eps), "denoised" (x_0) or "velocity"
            (a eps - sigma x_0).
        time_scale: the model is given time_scale t, such as 999 for networks of discrete time.
        batch_size: of the calls of the model. None: 8192, fewer for large samples.
        seed: of the noise, an int.
        progress: a bar where it takes over a second. None: on a terminal.

    Returns:
        `DiffusionBound`: every term with its Monte-Carlo standard error, bound, to_dict, save.

    Raises:
        TypeError: data, model or numbers of a type or dtype that is not supported.
        ValueError: NaN or infinity in the data (with their rows) or from the model (with its t), no samples, T outside
            the schedule, too few draws, unknown names, a model whose output is not shaped as x.

    Source: Chen, Zhu and Shkurti 2025, section 4; Song et al. 2021, maximum likelihood training, theorem 1 (L_sm).

    >>> import torch, refine_ext as rx
    >>> rx.diffusion_bound(torch.tensor([[-30.0], [30.0]]), time=0.1, draws=4).mutual_information  # log 2: far apart
    Term(value=0.69314..., stderr=0.0)
    """
    function = "diffusion_bound"
    problem = bound_problem(
        function, data, model, schedule, draws, seed, sub_gaussian, steps, model_draws, parametrization, time_scale,
        batch_size,
    )  # fmt: skip
    at = problem.process.check_time(function, "time", time)
    with progress_bar(function, problem.evaluations(), progress) as bar:
        return problem.at(at, bar.update)


def diffusion_bound_loss(
    data: Tensor,
    time: float | Tensor,
    *,
    schedule: str | ForwardProcess = "vp",
    sub_gaussian: float = 1.0,
    draws: int = 1,
    rows: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """``A + sqrt2 R B`` of `diffusion_bound`, differentiable in T and in the data: add it to a training loss.

    The derivative is that of the estimate itself: z = a_T x_i + sigma_T eps, the centres a_T x_j and the scale sigma_T
    move with T and the data while eps stays. Where many noised samples are needed they are made again for the backward
    pass, block by block: memory is that of the data.

    Args:
        data: `[m, ...]` training samples, or what an encoder made of them; a tensor, float64 or float32.
        time: T; a 0-dim tensor, such as a `LearnedTime`'s, gets a gradient.
        schedule, sub_gaussian: as `diffusion_bound`.
        draws: noise vectors for each sample, at least 1.
        rows: `[k]` int64, the samples whose KL are averaged; the mixture is over all m all the same. None: all.
        seed: of the noise. None: drawn from torch's default generator, so that each step has its own.

    Returns:
        A 0-dim float64 tensor, nats.

    Raises:
        TypeError, ValueError: as `diffusion_bound`; rows that are not indices of samples.

    Source: Chen, Zhu and Shkurti 2025, section 4.

    >>> import torch, refine_ext as rx
    >>> t = torch.tensor(0.3, requires_grad=True)
    >>> rx.diffusion_bound_loss(torch.randn(50, 2), t, draws=4, seed=0).backward()
    >>> t.grad.isfinite().item()
    True
    """
    function = "diffusion_bound_loss"
    if not isinstance(data, Tensor):
        raise TypeError(f"{function}: data must be a tensor, got {type(data).__name__}")
    if data.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{function}: data must be float32 or float64, got {data.dtype}")
    checked_data(function, as_tensor(data, function=function, argument="data"), 1)
    flat = data.reshape(len(data), -1)
    process = schedule_of(function, schedule)
    if isinstance(time, Tensor) and (time.numel() != 1 or not time.is_floating_point()):
        raise ValueError(f"{function}: time must be a number or a floating 0-dim tensor, got {list(time.shape)}")
    process.check_time(function, "time", time)
    t = time if isinstance(time, Tensor) else torch.tensor(float(time), dtype=torch.float64)
    t = t.to(device=flat.device, dtype=torch.float64).reshape(())
    if rows is not None:
        rows = checked_rows(function, rows, len(flat)).to(flat.device)
    number = int(torch.randint(2**62, ())) if seed is None else checked_seed(function, seed)
    factor = math.sqrt(2) * not_negative(function, "sub_gaussian", sub_gaussian)
    draws = whole(function, "draws", draws, 1)
    kl, _ = mixture_divergences(flat, process, t, draws, Numbers.of(number).mixture, rows)
    roots = prior_roots(flat if rows is None else flat[rows], process, t)
    return factor * roots.mean() - kl.mean()


def _averaged(mean: Tensor, variance: Tensor) -> Term:
    return Term(float(mean.mean()), float(variance.sum().sqrt()) / len(mean))
