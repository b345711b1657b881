"""Does the refined certificate hold, and how loose is it? Problems whose truth is known exactly, many times over.

python benchmarks/bench_certificate.py --out benchmarks/results/certificate.json

A repetition draws n real and N generated samples, makes the certificate and computes the exact IPM between P and the
refined sample (`known_truth.py`): the bound is violated if that is larger. Beside the bound stand weaker ones, which
lack a part of it and have no guarantee: an experiment in which nothing can be violated would show nothing.

    bound               IPM(P_n, Q_hat) + 2 R_n + Monte-Carlo and confidence terms
    no_confidence       IPM(P_n, Q_hat) + 2 R_n
    one_complexity      IPM(P_n, Q_hat) + R_n
    training            IPM(P_n, Q_hat)

Every repetition is appended to OUT's neighbour .jsonl as it ends: the same command continues where the last one
stopped. Numbers are those of the class of norm bound 1, IPM_H / B, so that different B can be compared.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import parser, save
from known_truth import PROBLEMS, Truth, seed_of, truth
from machine import commit
from torch import Tensor
from tqdm import tqdm

import refine_ext as rx

DELTA = 0.05
DRAWS = 64  # of signs: what so few leave open is in the bound
REPETITIONS = 400
CONFIDENCE = 0.95  # of the intervals of violation rates
NUM_REAL = (100, 300, 1000, 3000, 10_000)
NUM_FAKE = (100, 300, 1000, 3000, 10_000)
NORM_BOUNDS = (0.3, 1.0, 3.0, 10.0, 30.0)
DIVERGENCES = ("kl", "reverse_kl", "jensen_shannon", "pearson_chi2", "squared_hellinger")
BOUNDS = ("bound", "no_confidence", "one_complexity", "training")


@dataclass(frozen=True)
class Setting:
    """What the repetitions of a row have in common."""

    problem: str
    divergence: str = "kl"
    n: int = 1000
    num_fake: int = 1000
    norm_bound: float = 3.0


def settings(quick: bool) -> list[Setting]:
    """From one setting of every problem, n, N, B and the divergence are varied, one at a time."""
    found: dict[Setting, None] = {}
    for problem in PROBLEMS:
        if quick:
            found[Setting(problem, n=100, num_fake=100)] = None
            continue
        varied: list[dict[str, Any]] = [{}, *({"n": n} for n in NUM_REAL), *({"num_fake": n} for n in NUM_FAKE)]
        varied += [{"norm_bound": b} for b in NORM_BOUNDS] + [{"divergence": d} for d in DIVERGENCES]
        found |= dict.fromkeys(Setting(problem, **change) for change in varied)
    return list(found)


def expectation(known: Truth, certificate: rx.RefinementCertificate) -> Tensor | None:
    """E phi under the refined generator, dQ_hat/dQ = r / E_Q r. For `kl`, whose r = exp(h) wants no shift: that of
    a sample may be outside the domain of another f* elsewhere."""
    if certificate.divergence != "kl" or known.nodes is None or known.node_weights is None:
        return None
    return torch.softmax(certificate.outputs(known.nodes) + known.node_weights.log(), 0) @ known.nodes


def repetition(setting: Setting, index: int) -> dict[str, Any]:
    """One certificate beside the truth, over B. The same samples whatever the divergence and B."""
    known, b = truth(setting.problem), setting.norm_bound
    started = time.thread_time()
    real = known.real(setting.n, seed_of(setting.problem, "real", setting.n, index))
    fake = known.fake(setting.num_fake, seed_of(setting.problem, "fake", setting.num_fake, index))
    made = rx.refinement_certificate(
        real,
        fake,
        setting.divergence,
        norm_bound=b,
        feature_bound=known.bound,
        delta=DELTA,
        draws=DRAWS,
        seed=index,
        hull=known.hull,
    )
    refined, complexity = made.ipm_refined / b, float(made.complexity) / b
    unseen = (known.mean_real - real.mean(0))[None]
    found = {
        "bound": made.bound_refined / b,
        "no_confidence": refined + 2 * complexity,
        "one_complexity": refined + complexity,
        "training": refined,
        "truth": known.ipm(known.mean_real - made.weights @ fake),
        "unrefined_bound": made.bound_unrefined / b,
        "unrefined_training": made.ipm_unrefined / b,
        "unrefined_truth": known.ipm(known.mean_real - fake.mean(0)),
        "bound_by_duality": made.bound_by_duality / b,
        "deviation": known.ipm(unseen[0]),
        "complexity": complexity,
        "confidence_term": made.confidence_term / b,
        "monte_carlo_term": made.monte_carlo_term / b,
        "gain": made.gain / b,
        "divergence_value": made.divergence_value / b,
        # of the dual objective at h*, in nats: what unseen data give, and what they give at least
        "improvement": made.dual_value - made.divergence_at_one + made.outputs(unseen).item(),
        "certified_improvement": made.certified_improvement,
        "effective_share": float(1 / (made.weights.square().sum() * len(made.weights))),
        # what the theory says is zero, and what it says is not negative
        "duality_error": abs(made.dual_value - made.divergence_value - made.ipm_refined) / b,
        "duality_gap": made.duality_gap / b,
        "converged": made.converged,
        "unrefined_generator": known.ipm(known.mean_real - known.mean_model),
    }
    if (mean := expectation(known, made)) is not None:
        found["generator"] = known.ipm(known.mean_real - mean)
    return found | {"seconds": time.thread_time() - started}


def share(outcomes: Iterable[bool]) -> dict[str, Any]:
    """How often, with the interval of Clopper and Pearson (1934)."""
    from scipy.stats import binomtest

    listed = list(outcomes)
    if not listed:
        return {"count": 0, "of": 0, "low": 0.0, "high": 1.0}
    interval = binomtest(sum(listed), len(listed)).proportion_ci(CONFIDENCE, method="exact")
    return {"count": sum(listed), "of": len(listed), "low": float(interval.low), "high": float(interval.high)}


def is_proven(record: dict[str, Any]) -> bool:
    """Whether the certificate proves that the refined sample is nearer to P: the class is symmetric, so where the bound
    holds IPM(P, Q) >= IPM(P_n, Q) - margin, which then exceeds the refined sample's bound."""
    return record["gain"] > 2 * (record["bound"] - record["training"])


def summary(setting: Setting, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A row: how often each bound is violated, what its parts are on average, how often refinement helps."""
    deviations = sorted(record["deviation"] for record in records)
    # The smallest number that at most DELTA of them exceed: no margin that holds is smaller.
    needed = deviations[math.ceil((1 - DELTA) * len(deviations)) - 1]
    better = [record["truth"] < record["unrefined_truth"] for record in records]
    row = {
        **asdict(setting),
        "repetitions": len(records),
        "violated": {name: share(r["truth"] > r[name] for r in records) for name in BOUNDS},
        "unrefined_violated": share(r["unrefined_truth"] > r["unrefined_bound"] for r in records),
        "duality_violated": share(r["truth"] > r["bound_by_duality"] for r in records),
        "improvement_violated": share(r["improvement"] < r["certified_improvement"] for r in records),
        "improved_where_certified": share(r["improvement"] > 0 for r in records if r["certified_improvement"] > 0),
        "better": share(better),
        "better_where_gained": share(b for b, r in zip(better, records, strict=True) if r["gain"] > 0),
        "better_where_proven": share(b for b, r in zip(better, records, strict=True) if is_proven(r)),
        "deviation_needed": needed,
        "margin_over_needed": statistics.median((r["bound"] - r["training"]) / needed for r in records),
        "largest_duality_excess": max(r["duality_error"] - r["duality_gap"] for r in records),
        "converged": sum(r["converged"] for r in records),
    }
    if "generator" in records[0]:
        row["generator_violated"] = share(r["generator"] > r["bound"] for r in records)
        row["generator_better"] = share(r["generator"] < r["unrefined_generator"] for r in records)
    averaged = set(records[0]) - {"duality_error", "duality_gap", "converged", "seconds"}
    row["mean"] = {name: float(f"{statistics.fmean(r[name] for r in records):.6g}") for name in sorted(averaged)}
    return row


Key = tuple[Setting, int]


class Records:
    """Repetitions that were made, in a file to which each is appended; what a kill cut off is made again."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.found = path, {}  # type: Path | None, dict[Key, dict[str, Any]]
        if path is None or not path.exists():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._append({"commit": commit()})
            return
        text = path.read_text()
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            path.write_text(complete)
        lines = [json.loads(line) for line in complete.splitlines()]
        if not lines or lines[0] != {"commit": commit()}:
            was = lines[0]["commit"] if lines else "nothing"
            raise ValueError(f"{path}: made with {was}, this is {commit()}; remove it to begin anew")
        for line in lines[1:]:
            self.found[Setting(**line["setting"]), line["index"]] = line["record"]

    def add(self, key: Key, record: dict[str, Any]) -> None:
        self.found[key] = record
        self._append({"setting": asdict(key[0]), "index": key[1], "record": record})

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        each = defaultdict(list)
        for (setting, _), record in self.found.items():
            each[setting].append(record)
        return (summary(setting, records) for setting, records in each.items())


def line(row: dict[str, Any]) -> str:
    """A row for the eye."""
    violated = "  ".join(f"{name} {row['violated'][name]['count']:3}" for name in BOUNDS)
    better, proven = row["better"], row["better_where_proven"]
    return (
        f"{row['problem']:24}{row['divergence']:18}n {row['n']:5} N {row['num_fake']:5} B {row['norm_bound']:4}  "
        f"truth {row['mean']['truth']:.4f}  bound {row['mean']['bound']:.3f}, margin x{row['margin_over_needed']:.1f}  "
        f"of {row['repetitions']} violated: {violated}  better {better['count']:3}, of {proven['of']} proven "
        f"{proven['count']}"
    )


def main() -> None:
    options = parser(__doc__.splitlines()[0], devices=("cpu",))
    options.add_argument("--repetitions", type=int, default=REPETITIONS, help=f"a setting (default {REPETITIONS})")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    repetitions = 2 if arguments.quick else arguments.repetitions
    records = Records(arguments.out.with_suffix(".jsonl") if arguments.out else None)
    # A setting's index-th repetition comes before any other's next: a run that is cut short is smaller, not lopsided.
    keys = [(s, index) for index, s in itertools.product(range(repetitions), settings(arguments.quick))]
    for key in tqdm([key for key in keys if key not in records.found], unit="certificate"):
        records.add(key, repetition(*key))
    rows = list(records.rows())
    for row in rows:
        print(line(row))
    save(
        arguments.out,
        "certificate",
        rows,
        delta=DELTA,
        draws=DRAWS,
        confidence=CONFIDENCE,
        cpu_seconds=sum(record["seconds"] for record in records.found.values()),
    )


if __name__ == "__main__":
    main()
