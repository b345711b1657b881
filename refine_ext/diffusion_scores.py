"""What a diffusion's network contributes to the bound: its denoising score-matching loss, and the norm of its score."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._ops_guidance import PARAMETRIZATIONS
from .arguments import positive, whole
from .forward_process import ForwardProcess
from .guidance import philox_normal
from .network_checks import warn_of_training

_BATCH_ELEMENTS = 1 << 22  # of a batch of states, where the caller names no batch size
_LARGEST_BATCH = 8192

Advance = Callable[[int], Any]


class Term(NamedTuple):
    """A Monte-Carlo estimate and its standard error."""

    value: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.stderr:.2g}" if self.stderr > 0 else f"{self.value:.6g}"


@dataclass(frozen=True)
class ScoreModel:
    """A network and how it is called: ``model(x_t, time_scale t)``, x_t ``[B, ...]``, t ``[B]``.

    With ``eps^`` its prediction of the noise in ``x = a x_0 + sigma eps``, the score is ``s = -eps^ / sigma``:

    score: ``eps^ = -sigma out``; noise: ``eps^ = out``; denoised: ``eps^ = (x - a out) / sigma``;
    velocity ``a eps - sigma x_0``: ``eps^ = (a out + sigma x) / (a^2 + sigma^2)``.
    """

    function: str
    model: Callable[..., Tensor]
    process: ForwardProcess
    parametrization: str
    time_scale: float
    batch_size: int | None

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise TypeError(f"{self.function}: model must be callable as (x, t), got {type(self.model).__name__}")
        if self.parametrization not in PARAMETRIZATIONS:
            raise ValueError(
                f"{self.function}: parametrization must be one of {', '.join(PARAMETRIZATIONS)}, "
                f"got {self.parametrization!r}"
            )
        positive(self.function, "time_scale", self.time_scale)
        if self.batch_size is not None:
            whole(self.function, "batch_size", self.batch_size, 1)
        warn_of_training(self.function, "model", self.model, stacklevel=5)

    def predicted_noise(self, x: Tensor, t: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
        """eps^ ``[B, d]`` at states ``[B, ...]`` and times ``[B]``; a and sigma ``[B, 1]``."""
        dtype = next((p.dtype for p in self._parameters() if p.dtype.is_floating_point), x.dtype)
        out = self.model(x.to(dtype), (t * self.time_scale).to(dtype))
        if not isinstance(out, Tensor):
            raise TypeError(
                f"{self.function}: model must return a tensor shaped as x, {list(x.shape)}, got {type(out).__name__}; "
                "wrap it in a function that takes the tensor out"
            )
        if out.shape != x.shape:
            raise ValueError(
                f"{self.function}: model must return a tensor shaped as x, {list(x.shape)}, got {list(out.shape)}"
            )
        out, flat = out.to(x.dtype).flatten(1), x.flatten(1)
        bad = ~torch.isfinite(out).all(1)
        if bool(bad.any()):
            raise ValueError(f"{self.function}: model returned NaN or infinity at t = {float(t[bad].min()):.6g}")
        if self.parametrization == "noise":
            return out
        if self.parametrization == "score":
            return -sigma * out
        if self.parametrization == "denoised":
            return (flat - a * out) / sigma
        return (a * out + sigma * flat) / (a.square() + sigma.square())

    def _parameters(self) -> Any:
        return self.model.parameters() if isinstance(self.model, nn.Module) else ()


@dataclass(frozen=True)
class Noising:
    """Which samples are noised, in which order and with which noise: the same at every T.

    Evaluation q takes sample ``order[q mod m]`` and the noise of seed ``base + q``, whatever the batches.
    """

    data: Tensor
    shape: tuple[int, ...]
    order: Tensor
    base: int

    def states(
        self, process: ForwardProcess, times: Tensor, first: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(x_t ``[B, ...]``, eps ``[B, d]``, t ``[B]``, a, sigma ``[B, 1]``) of the evaluations from `first` on."""
        q = torch.arange(first, first + len(times), device=self.data.device)
        rows = self.data[self.order[q % len(self.order)]]
        eps = philox_normal(rows.shape, self.base + q, dtype=rows.dtype, device=rows.device)
        t = times.to(rows.device)
        a, sigma = (each(t).to(rows.dtype).unsqueeze(1) for each in (process.signal, process.noise))
        return (a * rows + sigma * eps).reshape(-1, *self.shape), eps, t, a, sigma


def _each(
    model: ScoreModel,
    noising: Noising,
    times: Tensor,
    value: Callable[[Tensor, Tensor, Tensor], Tensor],
    advance: Advance,
) -> Tensor:
    """``[len(times)]`` float64: value(eps^, eps, sigma) of every evaluation."""
    width = max(1, noising.data.shape[1])
    batch = model.batch_size or max(1, min(_LARGEST_BATCH, _BATCH_ELEMENTS // width))
    found = []
    with torch.no_grad():
        for first in range(0, len(times), batch):
            x, eps, t, a, sigma = noising.states(model.process, times[first : first + batch], first)
            found.append(value(model.predicted_noise(x, t, a, sigma), eps, sigma).double())
            advance(len(x))
    return torch.cat(found)


def score_matching(
    model: ScoreModel, noising: Noising, time: float, jitter: Tensor, advance: Advance = lambda n: None
) -> Term:
    """L_sm, ``int E |sigma s(x_t, t) + eps|^2 d lambda`` from the lowest time to T, ``lambda = log(sigma / a)``.

    ``beta dt / 2 = sigma^2 d lambda``: it is ``(1/2) int beta(t) E |s - grad log p(x_t | x_0)|^2 dt``, the integral's
    variable changed to one in which the integrand is as large everywhere. `jitter` ``[steps, draws]`` in [0, 1): each
    step's interval of lambda has as many evaluations at independent places.
    """
    process = model.process
    low, high = (float(process.log_level(t)) for t in (process.time_range[0], time))
    steps, draws = jitter.shape
    place = (torch.arange(steps, dtype=torch.float64).unsqueeze(1) + jitter) / steps
    times = process.time(low + (high - low) * place).flatten()
    errors = _each(model, noising, times, lambda hat, eps, _: (hat - eps).square().sum(1, dtype=torch.float64), advance)
    errors = errors.reshape(steps, draws)
    stderr = (high - low) / steps * float((errors.var(1) / draws).sum().sqrt())
    return Term((high - low) * float(errors.mean()), stderr)


def largest_score(
    model: ScoreModel, noising: Noising, time: float, steps: int, draws: int, advance: Advance = lambda n: None
) -> Term:
    """L, the largest over the steps of the mean norm of the model's score at x_t."""
    grid = step_times(model.process, time, steps)
    norms = _each(
        model,
        noising,
        grid.repeat_interleave(draws),
        lambda hat, _, sigma: hat.double().norm(dim=1) / sigma.squeeze(1).double(),
        advance,
    ).reshape(steps, draws)
    means = norms.mean(1)
    at = int(means.argmax())
    return Term(float(means[at]), float(norms[at].std()) / math.sqrt(draws))


def generator_term(process: ForwardProcess, time: float, steps: int, score: Term, m: int) -> Term:
    """C, ``sqrt((T - t_0) L^2 / (2 m N) sum_k beta(t_k))``."""
    length = time - process.time_range[0]
    factor = math.sqrt(length / (2 * m * steps) * float(process.beta(step_times(process, time, steps)).sum()))
    return Term(factor * score.value, factor * score.stderr)


def step_times(process: ForwardProcess, time: float, steps: int) -> Tensor:
    """``t_k = t_0 + k (T - t_0) / N``, k = 1 .. N, t_0 the lowest time of the schedule (VP: next to 0)."""
    low = process.time_range[0]
    return low + torch.arange(1, steps + 1, dtype=torch.float64) * ((time - low) / steps)
