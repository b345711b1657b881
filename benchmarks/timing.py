"""Clocks: contenders run interleaved, so that only what differs between them differs between their times."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# A turn lasts at least this long: a clock's resolution and, on a GPU, the idle gap before a turn's first kernel.
SHORTEST_TURN = {"cpu": 2e-4, "cuda": 2e-3}
LONG_CALL = 1e-2  # seconds; caches and clocks that a contender finds cold no longer matter to such a call
GRAPH_CALLS = 20  # at least so many calls in a graph: its own launch is shared among them


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _turn(run: Callable[[], Any], count: int, device: str) -> float:
    """Seconds of `count` runs: by events on a GPU, whose work the host does not wait for; of one thread on the CPU the
    time that it ran, which others on the machine do not add to."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    for _ in range(count):
        run()
    return clock() - begin


def interleaved(
    contenders: dict[str, Callable[[], Any]],
    *,
    repeats: int = 7,
    budget: float = 20.0,
    device: str = "cpu",
    calls: dict[str, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Median, quartiles in seconds per call of each contender, all measured in turns after a warm-up.

    `calls` says how many calls a run of a contender makes where that is not one. Short runs are repeated within a turn.
    Turns stop after `repeats`, or once `budget` seconds are spent and each contender has three. A contender that still
    takes a sixth of the budget in its second call is not run again: that counts. One that fails, unless it is ours, is
    recorded with its error: a contender that cannot run here takes no other's time away.
    """
    inner: dict[str, int] = {}
    times: dict[str, list[float]] = {}
    warmed: set[str] = set()
    result: dict[str, dict[str, Any]] = {}
    for name, run in contenders.items():
        try:
            for _ in range(2 if name.startswith("compile") else 0):  # compiling is not what is measured
                run()
            first = _turn(run, 1, device)
            one = first if first > budget else max(_turn(run, 1, device), 1e-7)
            if one > budget / 6:
                times[name] = [one]
                continue
        except Exception as error:
            if name.startswith("refine_ext"):
                raise
            result[name] = {"error": one_line(error)}
            continue
        inner[name] = max(1, min(1000, int(SHORTEST_TURN[device] / one)))
        if one < LONG_CALL:
            warmed.add(name)
        times[name] = []
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - begin > budget:
            break
        for name, count in inner.items():
            if name in warmed:  # or it would pay for the caches that the contender before it filled
                contenders[name]()
            times[name].append(_turn(contenders[name], count, device) / count)
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        each = (calls or {}).get(name, 1)
        result[name] = {"seconds": median / each, "low": low / each, "high": high / each, "turns": len(values)}
    return {name: result[name] for name in contenders}


def rotating(run: Callable[[Any], Any], sets: Sequence[Any]) -> Callable[[], Any]:
    """A call on the next of `sets`."""
    following = itertools.cycle(sets)
    return lambda: run(next(following))


def captured(run: Callable[[Any], Any], sets: Sequence[Any]) -> tuple[Callable[[], Any], int]:
    """The replay of a CUDA graph of calls over all `sets`, and how many calls it makes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call sets up must not be captured
        run(sets[0])
    torch.cuda.current_stream().wait_stream(side)
    rounds = math.ceil(GRAPH_CALLS / len(sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in itertools.chain.from_iterable(itertools.repeat(sets, rounds)):
            run(inputs)
    return graph.replay, rounds * len(sets)


def limits(device: str, quick: bool = False) -> dict[str, float]:
    """The physical limits, measured: bytes a second of a large copy, operations a second of a matrix product; of one
    thread on the CPU, as most rows are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else threads)
    size = 2**20 if quick else 2**30 if device == "cuda" else 2**28
    edge = 256 if quick else 8192 if device == "cuda" else 1024
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    # Random: a matrix product of constants draws less power and runs faster than real ones do.
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
        runs[str(dtype).removeprefix("torch.")] = lambda a=a, b=b: a @ b
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        timed = interleaved(runs, budget=2.0, device=device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
        torch.set_num_threads(threads)
    return {
        "copy_bytes_per_second": 2 * size / timed["copy"]["seconds"],
        "bfloat16_flops_per_second": 2 * edge**3 / timed["bfloat16"]["seconds"],
        "float32_flops_per_second": 2 * edge**3 / timed["float32"]["seconds"],
    }
