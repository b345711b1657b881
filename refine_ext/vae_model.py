"""Encoders and decoders as users hold them: what they return, where they live, and the noise of their latents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import whole
from .guidance import philox_normal
from .progress import progress_bar
from .rademacher_suprema import seed_of
from .samples import as_tensor, check_finite_rows, rows_text
from .vae_likelihoods import Likelihood, Output, likelihood_of

Encoder = Callable[[Tensor], Any]
Decoder = Callable[[Tensor], Any]

_BATCH_ELEMENTS = 1 << 22  # of samples x draws x pixels in a decoder at once
_MOST_ROWS = 1024


class Posterior(NamedTuple):
    """q(z|x) = N(mean, e^log_variance), each ``[B, ...]`` as the decoder takes z."""

    mean: Tensor
    log_variance: Tensor

    def latent(self, noise: Tensor) -> Tensor:
        """z = mean + e^(log_variance / 2) noise."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def flat(self) -> tuple[Tensor, Tensor]:
        """Both as ``[B, d]``."""
        return self.mean.flatten(1), self.log_variance.flatten(1)


class VAE(NamedTuple):
    """An encoder, a decoder and the law of pixels, for the function that was called with them."""

    function: str
    encoder: Encoder
    decoder: Decoder
    likelihood: Likelihood

    def posterior(self, x: Tensor) -> Posterior:
        """q(z|x) of a batch, in at least float32.

        Raises:
            TypeError, ValueError: an output of another kind or shape.
        """
        mean, log_variance = _moments(self.function, self.encoder(x), len(x))
        if mean.dtype in (torch.float16, torch.bfloat16):
            mean, log_variance = mean.float(), log_variance.float()
        return Posterior(mean, log_variance)

    def check_data(self, x: Tensor) -> None:
        """Raise, naming rows, where a batch is not finite or outside the likelihood's range."""
        check_finite_rows(x, function=self.function, argument="x")
        self.likelihood.check(self.function, "x", x)

    @torch.no_grad()
    def check_posterior(self, posterior: Posterior, first: int = 0) -> Posterior:
        """Raise, naming rows from `first` on, where it is NaN, infinite, or its variance overflows."""
        for name, value in zip(Posterior._fields, posterior, strict=True):
            self._refuse(~value.isfinite(), f"encoder returns a {name} that is not finite", first)
        wide = ~posterior.log_variance.exp().isfinite()
        kind = str(posterior.log_variance.dtype).removeprefix("torch.")
        self._refuse(wide, f"encoder returns a log_variance whose exponential overflows {kind}", first)
        return posterior

    def output(self, z: Tensor, pixels: int, argument: str = "decoder", decoder: Decoder | None = None) -> Output:
        """The decoder's output for z ``[R, ...]``, each parameter ``[R, pixels]``, or one number."""
        network = decoder or self.decoder
        if z.dtype != (dtype := home(z, network).dtype):
            z = z.to(dtype)
        made = network(z)
        if not isinstance(made, (Tensor, tuple, list)) and isinstance(getattr(made, "sample", None), Tensor):
            made = made.sample  # diffusers' DecoderOutput
        names = self.likelihood.parameters
        parts = (made,) if isinstance(made, Tensor) else made
        wanted = " or ".join([names[0], f"({', '.join(names)})"][: len(names)])
        if not isinstance(parts, (tuple, list)) or not all(isinstance(p, Tensor) for p in parts):
            got = type(made).__name__
            raise TypeError(f"{self.function}: {argument} must return {wanted} as tensors, got {got}")
        if not 1 <= len(parts) <= len(names):
            raise ValueError(f"{self.function}: {argument} must return {wanted}, got {len(parts)} tensors")
        flat = []
        for name, part in zip(names, parts, strict=False):
            rows = len(z)
            shared = name != names[0] and part.numel() in (1, pixels)  # a parameter of its own, not of z
            if not shared and (part.dim() == 0 or len(part) != rows or part.numel() != rows * pixels):
                raise ValueError(
                    f"{self.function}: {argument} must return {name} of {pixels} pixels for each of {rows} latents "
                    f"({wanted} for a {self.likelihood.name} likelihood), got {list(part.shape)}"
                )
            part = part.float() if part.dtype in (torch.float16, torch.bfloat16) else part
            flat.append(part.reshape(-1) if shared else part.reshape(rows, pixels))
        return self.likelihood.complete(tuple(flat))

    def log_prob(self, output: Output, x: Tensor) -> Tensor:
        """log p(x|z) ``[S, B]`` of outputs for latents ``[S B, ...]`` of the rows ``[B, ...]``, in draw order."""
        return self.likelihood.log_prob(by_draw(output, len(x)), x.flatten(1))

    def check_log_prob(self, value: Tensor, first: int = 0, argument: str = "decoder") -> Tensor:
        """Raise, naming rows from `first` on, where log p(x|z) ``[S, B]`` is not finite."""
        what = f"log p(x|z) is not finite, the output of {argument} is not finite or extreme,"
        self._refuse(~value.isfinite().T, what, first)
        return value

    def _refuse(self, bad: Tensor, what: str, first: int) -> None:
        rows = bad.flatten(1).any(1)
        if bool(rows.any()):
            raise ValueError(f"{self.function}: {what} in {rows_text(rows, first)}")


def by_draw(output: Output, rows: int) -> Output:
    """Parameters ``[S B, D]`` as ``[S, B, D]``; those that all share stay."""
    return tuple(p.reshape(-1, rows, p.shape[1]) if p.dim() == 2 else p for p in output)


def _moments(function: str, output: Any, batch: int) -> tuple[Tensor, Tensor]:
    wanted = "(mean, log_variance), one tensor of both along dimension 1, or an object with latent_dist"
    law = getattr(output, "latent_dist", output)  # diffusers' AutoencoderKLOutput
    if not isinstance(law, (Tensor, tuple, list)) and hasattr(law, "mean") and hasattr(law, "logvar"):
        law = (law.mean, law.logvar)
    if isinstance(law, Tensor):
        if law.dim() < 2 or law.shape[0] != batch or law.shape[1] % 2:
            raise ValueError(
                f"{function}: encoder must return {wanted}: [{batch}, 2 d, ...] for {batch} samples, got "
                f"{list(law.shape)}"
            )
        mean, log_variance = law.chunk(2, 1)
        return mean, log_variance
    if not isinstance(law, (tuple, list)) or len(law) != 2 or not all(isinstance(p, Tensor) for p in law):
        got = f"{len(law)} values" if isinstance(law, (tuple, list)) else type(law).__name__
        raise TypeError(f"{function}: encoder must return {wanted}, got {got}")
    mean, log_variance = law
    if mean.dim() < 2 or len(mean) != batch or mean.shape != log_variance.shape:
        raise ValueError(
            f"{function}: encoder must return mean and log_variance of one shape [{batch}, d, ...] for {batch} "
            f"samples, got {list(mean.shape)} and {list(log_variance.shape)}"
        )
    return mean, log_variance


class Work(NamedTuple):
    """What an estimate goes through: checked samples in batches, with the noise of their latents."""

    vae: VAE
    data: Tensor  # [n, ...]
    draws: int
    rows: int  # of a batch
    seeds: Tensor  # [n] int64: a sample's noise is its own, whatever the batch
    seed: int
    like: Tensor  # the networks' device and dtype

    def batches(self, progress: bool | None) -> Iterator[tuple[int, Tensor]]:
        """(first row, samples where the networks are), with a bar."""
        with progress_bar(self.vae.function, len(self.data), progress, "sample") as bar:
            for first in range(0, len(self.data), self.rows):
                x = self.data[first : first + self.rows]
                yield first, x.to(self.like)
                bar.update(len(x))

    def blocks_of_draws(self) -> Iterator[range]:
        """The draws that go through a decoder together."""
        pixels = self.data[0].numel()
        count = max(1, min(self.draws, _BATCH_ELEMENTS // max(1, self.rows * pixels)))
        return (range(k, min(k + count, self.draws)) for k in range(0, self.draws, count))

    def noise(self, draws: range, first: int, like: Tensor) -> Tensor:
        """``[S, B, ...]`` standard normal numbers of the rows from `first` on, shaped as their means `like`."""
        return sample_noise(self.seeds[first : first + len(like)], draws, like)


def sample_noise(seeds: Tensor, draws: range, like: Tensor) -> Tensor:
    """``[S, B, ...]``: draw k of a sample is step k of its seed."""
    make = functools.partial(philox_normal, tuple(like.shape), seeds.to(like.device), dtype=like.dtype)
    return torch.stack([make(step=k, device=like.device) for k in draws])


def sample_seeds(seed: int, n: int) -> Tensor:
    """``[n]`` int64 seeds of the samples; a longer list begins with a shorter one."""
    return torch.randint(-(2**63), 2**63 - 1, (n,), generator=torch.Generator().manual_seed(seed))


def prepare(
    function: str,
    encoder: Any,
    decoder: Any,
    data: Any,
    likelihood: Any,
    *,
    draws: int,
    seed: int | None,
    batch_size: int | None,
    least: int = 1,
) -> Work:
    """Everything checked that can be before the networks run.

    Raises:
        TypeError, ValueError: networks that cannot be called, samples that are too few, not finite or outside the
            likelihood's range, numbers out of theirs.
    """
    for argument, network in (("encoder", encoder), ("decoder", decoder)):
        check_callable(function, argument, network)
    law = likelihood_of(function, likelihood)
    draws = whole(function, "draws", draws, 1)
    x = as_tensor(data, function=function, argument="data")
    if len(x) < least:
        raise ValueError(f"{function}: data has {len(x)} samples, at least {least} are needed")
    if x.numel() == 0:
        raise ValueError(f"{function}: data is empty, shape {list(x.shape)}")
    check_finite_rows(x, function=function, argument="data")
    law.check(function, "data", x)
    seed = seed_of(function, seed)
    rows = max(1, min(_MOST_ROWS, _BATCH_ELEMENTS // x[0].numel()))
    rows = rows if batch_size is None else whole(function, "batch_size", batch_size, 1)
    vae = VAE(function, encoder, decoder, law)
    return Work(vae, x, draws, rows, sample_seeds(seed, len(x)), seed, home(x, encoder, decoder))


def check_callable(function: str, argument: str, network: Any) -> None:
    if not callable(network):
        raise TypeError(
            f"{function}: {argument} must be a module or a function of a batch, got {type(network).__name__}"
        )


def modules_of(network: Any) -> list[nn.Module]:
    """A module and those inside; the module whose method it is; none of a plain function."""
    while isinstance(network, functools.partial):
        network = network.func
    owner = network if isinstance(network, nn.Module) else getattr(network, "__self__", None)
    return list(owner.modules()) if isinstance(owner, nn.Module) else []


def home(x: Tensor, *networks: Any) -> Tensor:
    """An empty tensor of the networks' device and dtype; those of x where they have no parameters."""
    for network in networks:
        for module in modules_of(network):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    return torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    return x.new_empty(0)


@contextmanager
def evaluation(*networks: Any) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    modules = {id(module): module for network in networks for module in modules_of(network)}
    modes = [(module, module.training) for module in modules.values()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
