"""Rademacher complexities of finite classes: refine_ext against randint and matrix products.

    python benchmarks/bench_rademacher.py --out benchmarks/results/rademacher_cpu.json

Contenders: `user` makes its signs as users do, `compile` is that compiled; the `mm` ones are handed their signs (and
`mm bfloat16` its outputs in that dtype), which nobody has: plain, at torch's 'medium' precision, in bfloat16. The op
alone, below the Python function, is `refine_ext_op`. Rates are signed additions a second, n m draws in all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import Case, normal, parser, run
from torch import Tensor
from torch_rademacher import at_precision, largest, length, signs
from traffic import Traffic

import refine_ext as rx
from refine_ext import _C
from refine_ext._ops_rademacher import SUPREMA

ops = torch.ops.refine_ext
MAIN = (10_000, 1024, 1024)
MANY_COLUMNS = (10_000, 4096, 256)
SMALL = ((16, 4, 64), (100, 10, 100), (256, 64, 64), (1000, 16, 1000), (1000, 128, 256), (10_000, 8, 1024))


def _inputs(n: int, m: int, draws: int, dtype: torch.dtype) -> Callable[[torch.Generator], dict[str, Tensor]]:
    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        x = normal((n, m), random).to(dtype)
        sigma = ops.multipliers(x, n, draws, 0, 0, 0, False)
        return {"x": x, "sigma": sigma, "x16": x.bfloat16(), "sigma16": sigma.bfloat16()}

    return inputs


def _axes(what: str, draws: int) -> dict[str, Any]:
    return {"what": what, "draws": draws, "simd": _C.build_info()["simd_level"]}


def _relative_errors(s: dict[str, Tensor], found: dict[str, Tensor], reduce: Callable[..., Tensor]) -> dict[str, float]:
    """The worst draw's, against float64."""
    want = reduce(s["x"].double(), s["sigma"].double())
    return {name: ((value.double() - want) / want).abs().max().item() for name, value in found.items()}


def supremum_case(
    size: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    norm: bool = False,
    compiled: bool = False,
    threads: int = 1,
    budget: float | None = None,
) -> Case:
    n, m, draws = size
    reduce = length if norm else largest
    code = SUPREMA.index("norm" if norm else "magnitude")

    def op(s: dict[str, Tensor]) -> Tensor:
        return ops.rademacher_suprema(s["x"], draws, 0, 0, code, 3)[0]

    def ours(s: dict[str, Tensor]) -> Any:
        return rx.rademacher_linear(s["x"], draws=draws, seed=0) if norm else rx.rademacher(s["x"], draws, 0)

    def user(s: dict[str, Tensor]) -> Tensor:
        return reduce(s["x"], signs(draws, s["x"])).mean()

    contenders: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        "refine_ext": ours,
        "refine_ext_op": op,
        "user": user,
        "mm": lambda s: reduce(s["x"], s["sigma"]).mean(),
        "mm bfloat16": lambda s: reduce(s["x16"], s["sigma16"]).mean(),
    }
    if dtype == torch.float32:
        medium = at_precision("medium", reduce)
        contenders["mm medium"] = lambda s: medium(s["x"], s["sigma"]).mean()
    if compiled:
        fused = torch.compile(lambda x: reduce(x, signs(draws, x)).mean())
        contenders["compile"] = lambda s: fused(s["x"])

    def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        if n * m * draws > 2e10:
            return {}
        found = {"refine_ext": op(s), "mm": reduce(s["x"], s["sigma"]), "mm bfloat16": reduce(s["x16"], s["sigma16"])}
        return {"relative_error": _relative_errors(s, found, reduce)}

    return Case(
        op="rademacher_suprema",
        variant=f"{'norm' if norm else 'magnitude'} draws={draws}",
        dtype=dtype,
        shape=(n, m),
        traffic=Traffic(n * m * dtype.itemsize, n * m * dtype.itemsize),
        inputs=_inputs(n, m, draws, dtype),
        contenders=contenders,
        capturable=("refine_ext_op", "mm", "mm bfloat16"),
        accuracy=accuracy,
        axes=_axes("rademacher_linear" if norm else "rademacher", draws),
        threads=threads,
        budget=budget,
    )


def backward_case(size: tuple[int, int, int], budget: float | None = None) -> Case:
    """Value and gradient of a penalty."""
    n, m, draws = size

    def gradient(loss: Tensor, x: Tensor) -> Tensor:
        return torch.autograd.grad(loss, x)[0]

    def leaf(s: dict[str, Tensor]) -> Tensor:
        return s["x"].detach().requires_grad_()

    def ours(s: dict[str, Tensor]) -> Tensor:
        x = leaf(s)
        return gradient(rx.rademacher(x, draws, 0).mean, x)

    def theirs(s: dict[str, Tensor], sigma: Tensor | None = None) -> Tensor:
        x = leaf(s)
        return gradient(largest(x, signs(draws, x) if sigma is None else sigma).mean(), x)

    def accuracy(s: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        x = s["x"].double().requires_grad_()
        want = gradient(largest(x, s["sigma"].double()).mean(), x)
        found = {"refine_ext": ours(s), "mm": theirs(s, s["sigma"])}
        scale = want.abs().max()
        return {"relative_error": {name: ((g - want).abs().max() / scale).item() for name, g in found.items()}}

    return Case(
        op="rademacher_backward",
        variant=f"draws={draws}",
        shape=(n, m),
        traffic=Traffic(2 * n * m * 4, 2 * n * m * 4),
        inputs=_inputs(n, m, draws, torch.float32),
        contenders={"refine_ext": ours, "user": theirs, "mm": lambda s: theirs(s, s["sigma"])},
        capturable=(),
        accuracy=accuracy,
        axes=_axes("gradient", draws),
        budget=budget,
    )


def sums_case(size: tuple[int, int, int], budget: float | None = None) -> Case:
    """Sums of one block of rows added to those before it, which a class larger than the memory is streamed by."""
    n, m, draws = size

    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        tensors = _inputs(n, m, draws, torch.float32)(random)
        zeros = {name: tensors["x"].new_zeros(draws, m) for name in ("theirs", "theirs_again")}
        return tensors | zeros | {"sums": zeros["theirs"].double()}

    return Case(
        op="rademacher_sums",
        variant=f"draws={draws}",
        shape=(n, m),
        traffic=Traffic(n * m * 4 + 16 * m * draws, n * m * 4 + 16 * m * draws),
        inputs=inputs,
        contenders={
            "refine_ext": lambda s: ops.rademacher_sums(s["sums"], s["x"], 0, 0, 0),
            "user": lambda s: s["theirs"].addmm_(signs(draws, s["x"]), s["x"]),
            "mm": lambda s: s["theirs_again"].addmm_(s["sigma"], s["x"]),
        },
        capturable=("refine_ext", "mm"),
        axes=_axes("sums", draws),
        budget=budget,
    )


def multipliers_case(n: int, draws: int, normals: bool) -> Case:
    def inputs(random: torch.Generator) -> dict[str, Tensor]:
        return {"x": torch.empty(n, 1, device=random.device)}

    def user(s: dict[str, Tensor]) -> Tensor:
        return torch.randn(draws, n, device=s["x"].device) if normals else signs(draws, s["x"])

    return Case(
        op="multipliers",
        variant="normals" if normals else "signs",
        shape=(draws, n),
        traffic=Traffic(n * draws * 4, n * draws * 4),
        inputs=inputs,
        contenders={"refine_ext": lambda s: ops.multipliers(s["x"], n, draws, 0, 0, 0, normals), "user": user},
        axes=_axes("normals" if normals else "signs", 1),
    )


def cases(device: str, quick: bool, main_only: bool = False) -> Iterator[Case]:
    if quick:
        size = (64, 8, 32)
        yield supremum_case(size)
        yield supremum_case(size, norm=True)
        yield backward_case(size)
        yield sums_case(size)
        for normals in (False, True):
            yield multipliers_case(64, 8, normals)
        return
    yield supremum_case(MAIN, compiled=not main_only, budget=12.0)
    if main_only:
        return
    yield supremum_case(MANY_COLUMNS, budget=8.0)
    for dtype in (torch.bfloat16, torch.float64):
        yield supremum_case(MAIN, dtype, budget=8.0)
    yield supremum_case(MAIN, norm=True, budget=8.0)
    yield backward_case(MAIN, budget=8.0)
    yield sums_case((8192, 1024, 1024), budget=8.0)
    for normals in (False, True):
        yield multipliers_case(10_000, 1024, normals)
    for size in SMALL:
        yield supremum_case(size)
    if device == "cpu" and (cores := torch.get_num_threads()) > 1:
        yield supremum_case(MAIN, threads=cores, budget=8.0)


def other_instruction_sets() -> dict[str, list[dict[str, Any]]]:
    """The first case on the narrower sets, each in a process of its own."""
    found = {}
    info = _C.build_info()
    for level in info["simd_compiled"]:
        if level == info["simd_level"]:
            break
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            command = [sys.executable, __file__, "--main-only", "--out", str(out)]
            subprocess.run(command, env=dict(os.environ, REFINE_EXT_SIMD=level), check=True)
            found[level] = json.loads(out.read_text())["rows"]
    return found


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--main-only", action="store_true", help="the first case, on this process's instruction set")
    arguments = options.parse_args()
    device, quick, main_only = arguments.device, arguments.quick, arguments.main_only
    extra = {"instruction_sets": other_instruction_sets()} if device == "cpu" and not (quick or main_only) else {}
    run(arguments, "rademacher", cases(device, quick, main_only), **extra)


if __name__ == "__main__":
    main()
