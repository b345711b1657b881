"""Fit a discriminator between real and generated samples, and say how far to trust it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._library import usable_device
from .calibration import FitReport, assess, calibrate, has_bounded_domain
from .discriminator import Architecture, Discriminator
from .divergence import parse_divergence
from .linear_dual import LinearDual
from .networks import (
    MLP,
    Features,
    LinearOnFeatures,
    RandomFourierFeatures,
    batch_output,
    evaluate_features,
)
from .samples import check_samples
from .training import (
    Kind,
    Objective,
    Parts,
    Schedule,
    isolated_rng,
    outputs,
    train_linear,
    train_network,
)

_OBJECTIVES = ("tight", "loose", "logistic")


def fit_discriminator(
    real: Any,
    fake: Any,
    *,
    model: str | nn.Module = "mlp",
    divergence: str = "kl",
    objective: str = "tight",
    validation_fraction: float = 0.25,
    max_epochs: int = 200,
    patience: int = 15,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    hidden: tuple[int, ...] = (256, 256),
    dropout: float = 0.5,
    norm_bound: float | None = None,
    features: int | Features = 512,
    tolerance: float = 1e-7,
    caution: float = 1.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Discriminator:
    r"""Learn the density ratio between real and generated samples, guarded against overfitting.

    ``tight``:    maximise ``E_real h - min_nu {nu + E_fake f*(h - nu)}``
    ``loose``:    maximise ``E_real h - E_fake f*(h)``
    ``logistic``: minimise ``E_real softplus(-l) + E_fake softplus(l)``

    The samples are split in three: one to train on, one to stop early on (by the tight objective
    of ``divergence``), and one to calibrate on: the shift, and a temperature tau in [0, 1] on
    log r. tau maximises ``G(tau) - caution * se(tau)``, with
    ``G(tau) = E_real[tau log r] - log E_fake[r^tau]`` the nats of log-likelihood per sample that
    the refined model gains over the unrefined one. ``G(0) = 0``, so the estimate never falls
    below the unrefined model's; a discriminator trained too long gets a low temperature.

    Args:
        real, fake: ``[n, ...]`` and ``[m, ...]`` arrays or tensors with equal trailing shapes,
            floating or uint8 (taken as floats without scaling), at least 10 samples each.
        model: "mlp" (standardised inputs, hidden layers of SiLU and dropout), "linear"
            (``<w, phi(x)>``, ``||w||_2 <= norm_bound``, solved to ``tolerance``), or a module
            from ``[n, ...]`` to ``[n]`` or ``[n, 1]``, of which a copy is trained.
        divergence: the f-divergence's name.
        objective: "tight", "loose" or "logistic".
        validation_fraction: share of each set held out of training, in (0, 1); half of it stops
            the training, half calibrates.
        max_epochs, patience: most epochs, and epochs without a better held-out objective.
        batch_size: real samples a batch, and as many generated ones.
        learning_rate, weight_decay: AdamW's.
        hidden, dropout: the MLP's layer widths and dropout probability.
        norm_bound: B of the linear class; None takes the best of a doubling grid, judged by the
            held-out tight objective.
        features: of the linear class: how many random Fourier features (even), or a function
            from a batch ``[n, ...]`` to features ``[n, d]``.
        tolerance: relative duality gap the linear class is solved to.
        caution: standard errors subtracted from the gain when tau is chosen.
        seed: of the split, the initial weights, the batches and dropout. Equal seeds give equal
            weights on one machine; the global generators are left as they were.
        device: where to train; by default where a tensor ``real`` is, the CPU for arrays.
        progress: show a progress bar.

    Returns:
        The discriminator, with ``report`` saying what was measured on held-out samples and
        whether reweighting can help at all.

    Raises:
        TypeError: an argument of a type or dtype that is not supported.
        ValueError: samples that are empty, too few, not finite, constant or of different
            shapes; a constant model output; an unknown name or a number out of its range; a device
            that cannot be used.

    Source: Husain, De Bortoli and Nock 2026; Nowozin et al. 2016 (loose); Ruderman et al. 2012
    (tight); Goodfellow et al. 2014 (logistic).

    >>> disc = fit_discriminator(torch.randn(80, 2) + 1, torch.randn(80, 2), progress=False)
    >>> disc.log_ratio(torch.zeros(3, 2)).shape
    torch.Size([3])
    """
    _check_options(locals())
    parse_divergence("fit_discriminator", divergence)
    from tqdm import tqdm

    started = time.perf_counter()
    x_real, x_fake = check_samples(real, fake, function="fit_discriminator")
    where = usable_device("fit_discriminator", device) if device is not None else x_real.device
    goal = Objective(objective, divergence, output_kind(model, objective, divergence))
    generator = torch.Generator().manual_seed(seed)
    parts_real = split(x_real, validation_fraction, generator)
    parts_fake = split(x_fake, validation_fraction, generator)
    shape = tuple(x_real.shape[1:])

    network: nn.Module
    solution: LinearDual | None = None
    with isolated_rng(seed, where):
        if model == "linear":
            linear, architecture = _linear_network(parts_real, parts_fake, features, generator)
            network = linear.to(where)
            with tqdm(total=None, desc="norm bound", disable=not progress) as bar:
                solution, trained = train_linear(
                    linear,
                    parts_real,
                    parts_fake,
                    objective=goal,
                    norm_bound=norm_bound,
                    tolerance=tolerance,
                    progress=lambda bound, best: show_epoch(bar, bound, best),
                )
        else:
            network, architecture = _network(model, shape, hidden, dropout, parts_real, parts_fake)
            network = network.to(where)
            with tqdm(total=max_epochs, desc="discriminator", disable=not progress) as bar:
                trained = train_network(
                    network,
                    (len(parts_real.train), len(parts_fake.train)),
                    batch=lambda real, fake: batch_output(
                        network, torch.cat([parts_real.train[real].to(where), parts_fake.train[fake].to(where)])
                    ),
                    heldout=lambda: (
                        outputs(network, parts_real.stop, where, 4 * batch_size),
                        outputs(network, parts_fake.stop, where, 4 * batch_size),
                    ),
                    objective=goal,
                    schedule=Schedule(max_epochs, patience, batch_size, learning_rate, weight_decay),
                    generator=generator,
                    progress=lambda bound, best: show_epoch(bar, bound, best),
                )
    rows = max(batch_size, 1024)
    scores_real = outputs(network, parts_real.calibrate, where, rows)
    scores_fake = outputs(network, parts_fake.calibrate, where, rows)
    calibration, reference = calibrate(
        scores_real, scores_fake, goal, fakes_trained_on=len(parts_fake.train), caution=caution
    )
    measured = assess(scores_real, scores_fake, calibration, goal)
    report = FitReport(
        model=architecture.model,
        divergence=divergence,
        objective=objective,
        kind=goal.kind,
        seed=seed,
        shape=shape,
        real_samples=parts_real.sizes(),
        fake_samples=parts_fake.sizes(),
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        stopping_bound=trained.bound,
        seconds=time.perf_counter() - started,
        solver=solution.to_dict() if solution else {},
        **measured,
    )
    result = Discriminator(network, architecture, calibration, reference=reference, report=report)
    return result.to(where).eval()


def output_kind(model: str | nn.Module, objective: str, divergence: str) -> Kind:
    """Whether the network's output is a logit or the variational h itself."""
    if objective == "logistic":
        return "logit"
    # A loose objective is -inf as soon as one output leaves a bounded domain: f'(exp(l)) cannot.
    if objective == "loose" and model != "linear" and has_bounded_domain(divergence):
        return "logit"
    return "variational"


def show_epoch(bar: Any, bound: float, best: float) -> None:
    """One epoch more on a progress bar."""
    bar.update(1)
    bar.set_postfix(heldout=f"{bound:.4f}", best=f"{best:.4f}", refresh=False)


def split(x: Tensor, fraction: float, generator: torch.Generator, *, function: str = "fit_discriminator") -> Parts:
    """Random disjoint parts; the two held-out ones have at least two samples each."""
    order = torch.randperm(len(x), generator=generator)
    held_out = max(4, round(fraction * len(x)))
    half = held_out // 2
    if len(x) - held_out < 2:
        raise ValueError(
            f"{function}: validation_fraction {fraction} of {len(x)} samples leaves "
            f"{len(x) - held_out} to train on, at least 2 are needed"
        )
    order = order.to(x.device)
    return Parts(train=x[order[held_out:]], stop=x[order[:half]], calibrate=x[order[half:held_out]])


def _network(
    model: str | nn.Module,
    shape: tuple[int, ...],
    hidden: Sequence[int],
    dropout: float,
    real: Parts,
    fake: Parts,
) -> tuple[nn.Module, Architecture]:
    if isinstance(model, nn.Module):
        network = copy.deepcopy(model)
        if not any(p.requires_grad for p in network.parameters()):
            raise ValueError("fit_discriminator: model has no parameter that requires a gradient")
        return network, Architecture(type(model).__name__, shape)
    default = MLP(math.prod(shape), hidden, dropout)
    default.standardise.fit([real.train, fake.train])
    return default, Architecture("mlp", shape, tuple(hidden), dropout)


def _linear_network(
    real: Parts, fake: Parts, features: int | Features, generator: torch.Generator
) -> tuple[LinearOnFeatures, Architecture]:
    shape = tuple(real.train.shape[1:])
    if isinstance(features, int):
        random_features = RandomFourierFeatures(math.prod(shape), features)
        random_features.fit([real.train, fake.train], generator)
        network = LinearOnFeatures(random_features, features)
        return network, Architecture("linear", shape, features=features)
    width = evaluate_features(features, real.train[:2]).shape[1]
    architecture = Architecture("linear", shape, features=width, given_features=True)
    return LinearOnFeatures(features, width), architecture


def _check_options(options: dict[str, Any]) -> None:
    model, features = options["model"], options["features"]
    if isinstance(model, str):
        if model not in ("mlp", "linear"):
            raise ValueError(f"fit_discriminator: model must be 'mlp', 'linear' or a torch.nn.Module, got {model!r}")
    elif not isinstance(model, nn.Module):
        raise TypeError(
            f"fit_discriminator: model must be 'mlp', 'linear' or a torch.nn.Module, got {type(model).__name__}"
        )
    if isinstance(features, bool) or not (isinstance(features, int) or callable(features)):
        raise TypeError(
            f"fit_discriminator: features must be an even number or a function, got {type(features).__name__}"
        )
    if isinstance(features, int) and (features < 2 or features % 2):
        raise ValueError(f"fit_discriminator: features must be even and at least 2, got {features}")
    check_training("fit_discriminator", options)
    check_range("fit_discriminator", options, "tolerance", 0.0, 1.0, open_below=True)
    if options["norm_bound"] is not None:
        check_range("fit_discriminator", options, "norm_bound", 0.0, math.inf, open_below=True, open_above=True)


def check_training(function: str, options: dict[str, Any]) -> None:
    """The options that every way of fitting has."""
    if options["objective"] not in _OBJECTIVES:
        raise ValueError(f"{function}: objective must be one of {', '.join(_OBJECTIVES)}, got {options['objective']!r}")
    if not isinstance(options["seed"], int):
        raise TypeError(f"{function}: seed must be an integer, got {type(options['seed']).__name__}")
    check_range(function, options, "validation_fraction", 0.0, 1.0, open_below=True, open_above=True)
    check_range(function, options, "dropout", 0.0, 1.0, open_above=True)
    check_range(function, options, "learning_rate", 0.0, math.inf, open_below=True, open_above=True)
    check_range(function, options, "weight_decay", 0.0, math.inf, open_above=True)
    check_range(function, options, "caution", 0.0, math.inf, open_above=True)
    for name in ("max_epochs", "patience", "batch_size"):
        check_range(function, options, name, 1, math.inf, open_above=True)
    for width in options["hidden"]:
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"{function}: hidden must hold positive integers, got {options['hidden']}")


def check_range(
    function: str,
    options: dict[str, Any],
    name: str,
    low: float,
    high: float,
    *,
    open_below: bool = False,
    open_above: bool = False,
) -> None:
    """``options[name]`` is a number in the range; a TypeError or ValueError says what is allowed."""
    value = options[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
    above = value > low if open_below else value >= low
    below = value < high if open_above else value <= high
    if not (above and below):
        left, right = "(" if open_below else "[", ")" if open_above else "]"
        raise ValueError(f"{function}: {name} must be in {left}{low:g}, {high:g}{right}, got {value}")
