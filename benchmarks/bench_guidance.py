"""Guided sampling: fused steps and whole trajectories, refine_ext against torch, EDM's and k-diffusion's loops.

    python benchmarks/bench_guidance.py --out benchmarks/results/guidance_cpu.json

A step is x' = a x + b d + c f g (+ s z), f of each sample: x, d and g are read, x' is written, the noise is neither.
Contenders named *_inplace write x' into x, *_out into a tensor that is there. A new tensor's pages are made as they are
first written, which nothing can save; copy_new, a copy of x into one, is what they cost. The loops are in
torch_guidance.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Case, normal, parser, run
from torch import Tensor
from torch_guidance import (
    Convolutions,
    Denoiser,
    Discriminator,
    Free,
    UNet,
    edm_loop,
    k_diffusion_loop,
    networks_alone,
    noise_levels,
)
from traffic import factor_traffic, normals_traffic, step_traffic

import refine_ext as rx
from refine_ext.guidance import guidance_factor, guided_step, philox_normal

# x stays bounded however often a contender overwrites it.
A, B, C, S = 0.9, 0.08, 0.05, 0.3
STEPS = 18


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))


def eager(x: Tensor, d: Tensor, g: Tensor, f: Tensor, noisy: bool) -> Tensor:
    result = A * x + B * d + C * _rows(f, x) * g
    return result + S * torch.randn_like(x) if noisy else result


def eager_inplace(x: Tensor, d: Tensor, g: Tensor, f: Tensor, noisy: bool, z: Tensor) -> Tensor:
    """The fewest passes: the guidance in one, the noise into a tensor that is there."""
    x.mul_(A).add_(d, alpha=B).addcmul_(g, _rows(f, x), value=C)
    return x.add_(z.normal_(), alpha=S) if noisy else x


def step_case(
    shape: tuple[int, ...], noisy: bool, dtype: torch.dtype, *, compiled: bool = False, threads: int = 1
) -> Case:
    numbers = (A, B, C, S) if noisy else (A, B, C)

    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        x, d, g = (normal(shape, random).to(dtype) for _ in range(3))
        factor = torch.rand(shape[0], generator=random, device=x.device, dtype=torch.float64)
        # What eager expressions need of the state's type, made before the loop.
        ready = {"f": factor.to(dtype), "z": torch.empty_like(x), "out": torch.ones_like(x)}
        # Each contender that overwrites its state has its own.
        states = {"ours": x.clone(), "theirs": x.clone()}
        return {"x": x, "d": d, "g": g, "factor": factor, **ready, **states}

    def ours(s: dict[str, Tensor], out: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        state = s["x"] if x is None else x
        return guided_step(state, [s["d"], s["g"]], numbers, factor=s["factor"], seed=0, out=out)

    def theirs(s: dict[str, Tensor]) -> Tensor:
        return eager(s["x"], s["d"], s["g"], s["f"], noisy)

    contenders: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        "refine_ext": ours,
        "refine_ext_out": lambda s: ours(s, out=s["out"]),
        "refine_ext_inplace": lambda s: ours(s, out=s["ours"], x=s["ours"]),
        "copy_new": lambda s: torch.empty_like(s["x"]).copy_(s["x"]),
        "eager": theirs,
        "eager_inplace": lambda s: eager_inplace(s["theirs"], s["d"], s["g"], s["f"], noisy, s["z"]),
    }
    capturable = tuple(contenders)
    if compiled:
        step = torch.compile(eager)
        contenders["compile"] = lambda s: step(s["x"], s["d"], s["g"], s["f"], noisy)

    def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """Without noise; the noise's own distribution is for the tests."""
        x, d, g = (s[name].double() for name in ("x", "d", "g"))
        want = A * x + B * d + C * _rows(s["factor"], x) * g
        plain = guided_step(s["x"], [s["d"], s["g"]], (A, B, C), factor=s["factor"])
        got = {"refine_ext": plain, "eager": eager(s["x"], s["d"], s["g"], s["f"], False)}
        return {"absolute_error": {name: (y.double() - want).abs().max().item() for name, y in got.items()}}

    rows, row = shape[0], torch.Size(shape[1:]).numel()
    return Case(
        op="guided_step",
        variant="with noise" if noisy else "without noise",
        dtype=dtype,
        shape=shape,
        traffic=step_traffic(rows * row, dtype.itemsize, terms=2),
        inputs=inputs,
        contenders=contenders,
        capturable=capturable,
        accuracy=accuracy,
        axes={"rows": rows},
        threads=threads,
    )


def normals_case(shape: tuple[int, ...], dtype: torch.dtype, threads: int = 1) -> Case:
    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        return {"out": torch.empty(shape, dtype=dtype, device=random.device)}

    def ours(s: dict[str, Tensor]) -> Tensor:
        # x is left out, so that only the noise is written.
        return guided_step(s["out"], [], (0.0, 1.0), seed=0, out=s["out"])

    return Case(
        op="guided_step",
        variant="normals",
        dtype=dtype,
        shape=shape,
        traffic=normals_traffic(torch.Size(shape).numel(), dtype.itemsize),
        inputs=inputs,
        contenders={
            "refine_ext": ours,
            "refine_ext_new": lambda s: philox_normal(shape, 0, dtype=dtype, device=s["out"].device),
            "eager": lambda s: torch.randn(shape, dtype=dtype, device=s["out"].device),
            "eager_inplace": lambda s: s["out"].normal_(),
        },
        capturable=("refine_ext", "eager", "eager_inplace"),
        axes={"rows": shape[0]},
        threads=threads,
    )


def factor_case(n: int) -> Case:
    """w c(h) (-sigma) within a range of noise levels, of the Jensen-Shannon divergence."""
    low, high = 0.02, 50.0

    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        h = -normal((n,), random).abs()
        weight, sigma = (torch.rand(n, generator=random, device=h.device, dtype=torch.float64) for _ in range(2))
        return {"h": h, "weight": weight, "sigma": sigma}

    def ours(s: dict[str, Tensor]) -> Tensor:
        options: dict[str, Any] = {"divergence": "jensen_shannon", "parametrization": "noise"}
        return guidance_factor(
            s["h"], weight=s["weight"], sigma=s["sigma"], sigma_min=low, sigma_max=high, kind="variational", **options
        )

    def theirs(s: dict[str, Tensor]) -> Tensor:
        t = s["h"].double().exp()
        inside = (s["sigma"] >= low) & (s["sigma"] <= high)
        return torch.where(inside, s["weight"] * (2 / (2 - t)) * -s["sigma"], 0.0)

    def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        return {"absolute_error": {"refine_ext": (ours(s) - theirs(s)).abs().max().item()}}

    return Case(
        op="guidance_factor",
        variant="jensen_shannon",
        shape=(n,),
        traffic=factor_traffic(n, 4),
        inputs=inputs,
        contenders={"refine_ext": ours, "eager": theirs},
        capturable=("refine_ext", "eager"),
        accuracy=accuracy,
    )


def trajectory_case(
    name: str, shape: tuple[int, ...], width: int, depth: int, num_steps: int, budget: float | None = None
) -> Case:
    """18 steps of Heun on a denoiser, guided by a discriminator at both orders.

    `networks` calls the same networks as often, forward and backward. `free` is our trajectory on networks that cost
    nothing: `overhead` is its share of the whole one, an upper bound, since autograd's own part of a discriminator's
    call is in it.
    """
    levels = noise_levels(num_steps)
    channels = shape[1]

    def inputs(random: torch.Generator) -> dict[str, Any]:
        torch.manual_seed(0)
        body = UNet(channels, width, depth) if name == "unet" else Convolutions(channels, width, depth)
        net, discriminator = (m.to(random.device).eval() for m in (Denoiser(body), Discriminator(channels, width)))
        noise = normal(shape, random)
        return {"net": net, "discriminator": discriminator, "noise": noise, "free": Free(noise)}

    def ours(s: dict[str, Any], discriminator: Any = None, net: Any = None, **options: Any) -> Tensor:
        return rx.sample_edm(net or s["net"], s["noise"], discriminator=discriminator, num_steps=num_steps, **options)

    def loop(run: Callable[..., Tensor]) -> Callable[[dict[str, Any]], Tensor]:
        return lambda s: run(s["net"], s["discriminator"], s["noise"], levels)

    return Case(
        op="sample_edm",
        variant=f"{name} width={width} steps={num_steps}",
        shape=shape,
        traffic=step_traffic(torch.Size(shape).numel() * (2 * num_steps - 1), 4, terms=2),
        inputs=inputs,
        contenders={
            "refine_ext": lambda s: ours(s, s["discriminator"]),
            "networks": loop(networks_alone),
            "refine_ext_float32": lambda s: ours(s, s["discriminator"], dtype=torch.float32),
            "refine_ext_unguided": lambda s: ours(s),
            "refine_ext_free": lambda s: ours(s, s["free"].discriminator, s["free"].net),
            "edm loop": loop(edm_loop),
            "edm loop free": lambda s: edm_loop(s["free"].net, s["free"].discriminator, s["noise"], levels),
            "k-diffusion loop": loop(k_diffusion_loop),
            "k-diffusion loop free": lambda s: k_diffusion_loop(
                s["free"].net, s["free"].discriminator, s["noise"], levels
            ),
        },
        capturable=(),
        axes={"network": name, "steps": num_steps},
        budget=budget,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64
    if quick:
        images, others = (4, 3, 16, 16), [(3, 100)]
    elif device == "cpu":
        images, others = (64, 12_288), [(2, 12_288), (512, 12_288)]
    else:  # what a run that is cut short must have comes first
        images, others = (64, 3, 512, 512), [(64, 3, 32, 32), (64, 3, 128, 128)]
    for noisy in (True, False):
        for dtype in (f32, bf16, f64):
            yield step_case(images, noisy, dtype, compiled=not quick and dtype == f32)
    yield normals_case(images, f32)
    for shape in others:
        for noisy in (True, False):
            yield step_case(shape, noisy, f32)
        yield normals_case(shape, f32)
    yield factor_case(64 if quick else 4096)
    if quick:
        yield trajectory_case("unet", (2, 3, 8, 8), 8, 2, 3)
        return
    if device == "cpu" and (cores := torch.get_num_threads()) > 1:
        for noisy in (True, False):
            for dtype in (f32, bf16):
                yield step_case(images, noisy, dtype, compiled=dtype == f32, threads=cores)
        yield normals_case(images, f32, threads=cores)
    size = (8, 3, 32, 32) if device == "cpu" else (64, 3, 64, 64)
    seconds = 60.0 if device == "cpu" else 6.0
    yield trajectory_case("convolutions", size, 64 if device == "cpu" else 256, 4, STEPS, seconds)
    yield trajectory_case("unet", size, 32 if device == "cpu" else 128, 3, STEPS, seconds)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    run(arguments, "guidance", cases(arguments.device, arguments.quick))


if __name__ == "__main__":
    main()
