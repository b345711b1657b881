"""Does the bound's diffusion time give the best samples? The swiss roll of Chen, Zhu and Shkurti (ICLR 2025), repeated.

OMP_NUM_THREADS=1 python benchmarks/reproduce_swiss_roll.py --out benchmarks/results/swiss_roll.json

With the published settings (T from 0.2 to 1.8 at m = 200 training samples; m from 10 to 2000 at T = 1; five repeats
of each): the terms of the bound by `refine_ext.diffusion_bound`, beside them the same terms as the published scripts
compute them, and how far the generated samples are from the truth, whose density is known. Then networks that are
trained with the bound in the objective against networks that are not (`swiss_roll_objective.py`).

All networks of a sweep are trained at once. Checkpoints and finished rows lie in OUT's neighbour folder
OUT_checkpoints: the same command continues where the last one stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parser, save
from swiss_roll import PROCESS, Group, OneScore, generate, samples, train, trained, training_samples
from swiss_roll_measures import published_terms, test_kl
from swiss_roll_objective import SIZE, Arms, BoundObjective
from torch import Tensor
from tqdm import tqdm

import refine_ext as rx
from refine_ext.output import replacing
from refine_ext.report import save_json

TIMES = tuple(round(0.2 * k, 1) for k in range(1, 10))
SIZES = (10, 50, 100, 200, 500, 1000, 2000)
SHOWN = 400  # generated samples of the first repeat, for the picture
FULL = {
    "epochs": 10_000,
    "repeats": 5,
    "seeds": 5,
    "steps": 1000,
    "held_out": 4000,
    "generated": 1000,
    "draws": 100,
    "sub_gaussian": 5.0,
}
QUICK = {
    **FULL,
    "epochs": 20,
    "repeats": 2,
    "seeds": 2,
    "steps": 20,
    "held_out": 300,
    "generated": 300,
    "draws": 5,
}
Settings = dict[str, Any]


def groups(settings: Settings, quick: bool) -> list[Group]:
    """Both sweeps, to which m = 200 at T = 1 is common, and the arms of the objective; the longest last."""
    repeats, seeds = settings["repeats"], settings["seeds"]
    if quick:
        return [Group(20, (0.4, 1.0), repeats), Group(10, (1.0,), repeats), Arms(20, (), seeds)]
    small, large = (
        [Group(m, (1.0,), repeats) for m in SIZES if m != SIZE and (m > 500) == big] for big in (False, True)
    )
    return [Group(SIZE, TIMES, repeats), *small, Arms(SIZE, (), seeds), *large]


def generated(
    group: Group, checkpoint: dict[str, Any], times: Sequence[float], n: int, steps: int, path: Path
) -> Tensor:
    """[runs, n, 2], made once and kept."""
    if not path.exists():
        made = generate(trained(checkpoint), times, n, steps, seed=group.m)
        with replacing(path) as temporary:
            torch.save(made, temporary)
    found: Tensor = torch.load(path, weights_only=True)
    return found


def outcome(
    data: Tensor, score: OneScore, time: float, samples: Tensor, held_out: Tensor, settings: Settings, seed: int
):
    """Everything about one network."""
    bound = rx.diffusion_bound(
        data,
        score,
        schedule=PROCESS,
        time=time,
        draws=settings["draws"],
        sub_gaussian=settings["sub_gaussian"],
        steps=settings["steps"],
        parametrization="score",
        seed=seed,
        progress=False,
    )
    return {
        "bound": bound.to_dict(),
        "published": published_terms(data, score, time, settings["steps"], seed),
        "test": test_kl(held_out, samples),
    }


def rows_of(group: Group, settings: Settings, folder: Path) -> list[dict[str, Any]]:
    """Train, generate, evaluate; what is in `folder` is not done again."""
    objective = None
    if isinstance(group, Arms):
        objective = BoundObjective(group, settings["sub_gaussian"], settings["steps"])
    checkpoint = train(group, settings["epochs"], folder / f"{group.name}.pt", objective)
    times = [float(value) for value in checkpoint["log_times"][-1].exp()]
    path = folder / f"{group.name}_samples.pt"
    made = generated(group, checkpoint, times, settings["generated"], settings["steps"], path)
    networks, held_out, rows = trained(checkpoint), samples(settings["held_out"], 1), []
    for index, (repeat, name) in enumerate(tqdm(group.runs, desc=f"{group.name}: terms", unit="network")):
        path = folder / f"{group.name}_{index}.json"
        if not path.exists():
            score = OneScore(networks, index)
            data = training_samples(group.m, repeat)
            row = {"m": group.m, "T": round(times[index], 4), "repeat": repeat}
            if isinstance(group, Arms):
                row["arm"] = name
            row |= {"epochs": settings["epochs"], "loss": float(checkpoint["losses"][-1, index])}
            row |= outcome(data, score, times[index], made[index], held_out, settings, seed=repeat)
            save_json(row, path)
        rows.append(json.loads(path.read_text()))
    return rows


def floor(settings: Settings) -> list[dict[str, float]]:
    """What the estimates say of the truth itself: as many true samples in the place of the generated ones."""
    held_out = samples(settings["held_out"], 1)
    return [test_kl(held_out, samples(settings["generated"], 2000 + seed)) for seed in range(settings["repeats"])]


def main() -> None:
    options = parser(__doc__.splitlines()[0], devices=("cpu",))
    arguments = options.parse_args()
    if arguments.out is None:
        options.error("--out is needed: checkpoints are kept beside it")
    torch.set_num_threads(1)
    settings = QUICK if arguments.quick else FULL
    folder = arguments.out.with_name(f"{arguments.out.stem}_checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        options.error(f"{folder} holds a run with other settings, {kept.read_text()}; remove it to begin anew")
    save_json(settings, kept)
    extra: dict[str, Any] = {"settings": settings, "floor": floor(settings), "objective": []}
    rows, shown = [], {"truth": samples(SHOWN, 1).half().numpy()}
    for group in groups(settings, arguments.quick):
        found = rows_of(group, settings, folder)
        if isinstance(group, Arms):
            extra["objective"] = found
        else:
            rows += found
            made = torch.load(folder / f"{group.name}_samples.pt", weights_only=True)
            for index, time in enumerate(group.times):
                shown[f"m{group.m}_T{time:g}"] = made[index, :SHOWN].half().numpy()
        # After each group, so that a run that is cut short has shown something.
        save(arguments.out, "swiss_roll", rows, **extra)
        with replacing(arguments.out.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **shown)


if __name__ == "__main__":
    main()
