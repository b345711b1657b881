"""Training a network as a discriminator, with early stopping on held-out samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .linear_dual import LinearDual, solve_linear_dual
from .networks import LinearOnFeatures, batch_output
from .overfit_guard import auc
from .variational_bound import logistic_loss, variational_bound

Kind = Literal["variational", "logit"]

_SEPARATED_AUC = 0.999


@dataclass
class Objective:
    """What is maximised, and how the network's output is to be read."""

    name: str
    divergence: str
    kind: Kind

    def loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """The loss of one batch's outputs."""
        if self.name == "logistic":
            return logistic_loss(real, fake)
        tight = self.name == "tight"
        return -variational_bound(real, fake, self.divergence, tight=tight, kind=self.kind)

    @torch.no_grad()
    def heldout(self, real: Tensor, fake: Tensor) -> float:
        """The tight objective of held-out outputs, a lower bound on the divergence in nats.

        NaN where an output is not finite.
        """
        if not bool(torch.isfinite(torch.cat([real, fake])).all()):
            return math.nan
        bound = variational_bound(real.double(), fake.double(), self.divergence, tight=True, kind=self.kind)
        return float(bound)


@dataclass
class Parts:
    """One sample set, split: to train on, to stop early on, to calibrate on."""

    train: Tensor
    stop: Tensor
    calibrate: Tensor

    def sizes(self) -> dict[str, int]:
        """How many samples are in each part."""
        return {k: len(getattr(self, k)) for k in ("train", "stop", "calibrate")}


@dataclass
class Schedule:
    """How long and how fast to train."""

    max_epochs: int
    patience: int
    batch_size: int
    learning_rate: float
    weight_decay: float


@dataclass
class Trained:
    """What happened: epochs run, the epoch kept, and its held-out bound."""

    epochs: int
    best_epoch: int
    bound: float


@contextmanager
def isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that dropout and initialisation draw from; put them back at the end."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: it would also reseed every other device, which is not put back.
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@torch.no_grad()
def outputs(network: nn.Module, x: Tensor, device: torch.device, batch_size: int) -> Tensor:
    """``[n]`` outputs in evaluation mode, in batches."""
    network.eval()
    return torch.cat([batch_output(network, rows.to(device)) for rows in x.split(batch_size)])


def train_network(
    network: nn.Module,
    counts: tuple[int, int],
    *,
    batch: Callable[[Tensor, Tensor], Tensor],
    heldout: Callable[[], tuple[Tensor, Tensor]],
    objective: Objective,
    schedule: Schedule,
    generator: torch.Generator,
    progress: Callable[[float, float], None],
    function: str = "fit_discriminator",
) -> Trained:
    """Train in place and leave the weights of the best held-out epoch in the network.

    Batches hold as many real as generated samples; the smaller set is gone through repeatedly.

    Args:
        counts: how many real and generated samples there are to train on.
        batch: from rows of both, ``[k]`` each, to the network's ``[2 k]`` outputs on them, real ones first.
        heldout: the outputs on held-out real and generated samples, in evaluation mode and without gradients.

    Raises:
        ValueError: no epoch had a finite held-out objective.
    """
    optimiser = torch.optim.AdamW(network.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    size = min(schedule.batch_size, *counts)
    length = max(counts) // size
    best = Trained(epochs=0, best_epoch=0, bound=-math.inf)
    best_weights = copy.deepcopy(network.state_dict())
    diverged, separated = False, 0
    for epoch in range(1, schedule.max_epochs + 1):
        network.train()
        order_real = _order(counts[0], length * size, generator)
        order_fake = _order(counts[1], length * size, generator)
        for start in range(0, length * size, size):
            both = batch(order_real[start : start + size], order_fake[start : start + size])
            if not bool(both.isfinite().all()):
                diverged = True
                break
            loss = objective.loss(both[:size], both[size:])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        network.eval()
        stop_real, stop_fake = heldout()
        bound = objective.heldout(stop_real, stop_fake)
        best.epochs = epoch
        if math.isfinite(bound) and bound > best.bound:
            best.best_epoch, best.bound = epoch, bound
            best_weights = copy.deepcopy(network.state_dict())
        progress(bound, best.bound)
        # Told apart for good: the bound would grow for ever, and no weights can follow it.
        separated = separated + 1 if auc(stop_real, stop_fake) > _SEPARATED_AUC else 0
        if diverged or max(epoch - best.best_epoch, separated) >= schedule.patience:
            break
    if best.bound == -math.inf:
        raise ValueError(
            f"{function}: training diverged, no epoch had a finite held-out objective; "
            f"lower learning_rate ({schedule.learning_rate:g}) or use objective='logistic'"
        )
    network.load_state_dict(best_weights)
    network.eval()
    return best


def _order(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Random permutations of `count` indices, one after another, `length` entries in all."""
    rounds = -(-length // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:length]


# The path of norm bounds: doubled from where outputs span about this many nats. A doubling has to
# earn this factor of held-out objective: a smaller rise is mostly noise, which large balls fit best
# (measured on Gaussians: a bound 30 % higher on 250 held-out samples, and a true gain below zero).
_FIRST_SPAN = 0.5
_DOUBLINGS = 12
_EARNINGS = 1.05


@torch.no_grad()
def train_linear(
    network: LinearOnFeatures,
    parts_real: Parts,
    parts_fake: Parts,
    *,
    objective: Objective,
    norm_bound: float | None,
    tolerance: float,
    progress: Callable[[float, float], None],
) -> tuple[LinearDual, Trained]:
    """Solve the linear class in place, for one bound or along a path of doubling bounds.

    On the path each solution starts the next; it ends at the first doubling that does not earn
    enough held-out objective, or once the ball no longer binds.

    Raises:
        ValueError: features that are constant or not finite.
    """
    device = network.weight.device

    def features(x: Tensor) -> Tensor:
        return torch.cat([network.features(rows.to(device)) for rows in x.split(8192)])

    real, fake = features(parts_real.train), features(parts_fake.train)
    stop_real, stop_fake = features(parts_real.stop), features(parts_fake.stop)
    both = torch.cat([real, fake])
    bad = int((~torch.isfinite(both)).sum())
    if bad:
        raise ValueError(f"fit_discriminator: features has {bad} NaN or infinite values")
    spread = float((both - both.mean(0)).square().sum(1).mean().sqrt())
    if spread <= 1e-12 * float(both.abs().max()):
        raise ValueError("fit_discriminator: features are constant over all samples")
    doubling = [_FIRST_SPAN / spread * 2.0**k for k in range(_DOUBLINGS)]
    path = doubling if norm_bound is None else [norm_bound]
    kept: LinearDual | None = None
    last: LinearDual | None = None
    result = Trained(epochs=0, best_epoch=0, bound=-math.inf)
    for bound in path:
        with torch.enable_grad():
            last = solve_linear_dual(
                real,
                fake,
                objective.divergence,
                norm_bound=bound,
                objective=objective.name,
                tolerance=tolerance,
                initial=last.weight if last else None,
            )
        heldout = objective.heldout(stop_real @ last.weight + last.intercept, stop_fake @ last.weight + last.intercept)
        result.epochs += 1
        if kept is None or heldout > _EARNINGS * max(result.bound, 0.0):
            kept, result.best_epoch, result.bound = last, result.epochs, heldout
        progress(heldout, result.bound)
        interior = float(last.weight.norm()) < 0.99 * bound
        if result.epochs > result.best_epoch or interior:
            break
    assert kept is not None
    network.weight.copy_(kept.weight)
    network.intercept.fill_(kept.intercept)
    return kept, result
