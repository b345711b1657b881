"""The budgets that stand above the CUDA kernels (grammar: csrc/cuda/launch.h), and whether compiled kernels keep them.

`python tests/cuda_budgets.py [words]` lists what the kernels have; `--write` puts that into the budgets: read the diff.
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
from typing import NamedTuple

from cuda_binary import ARCHITECTURES, LOAD, STORE, Kernel, Source, declared, kernels

# What a key of the grammar measures. `inputs` comes from the budget: the packs of 16 bytes read for as many samples.
FLOAT64 = r"D(ADD|MUL|FMA|SETP|MNMX)|F2F|I2F.*F64|F2I.*F64|MUFU\.\w*64H"
MEASURES = {
    # Handed out in eights.
    "registers": lambda kernel, inputs: -(-kernel.registers // 8) * 8,
    "local": lambda kernel, inputs: kernel.local,
    "shared": lambda kernel, inputs: kernel.shared,
    "occupancy": lambda kernel, inputs: kernel.occupancy,
    "outputs": lambda kernel, inputs: max(
        (loop.count(STORE) * inputs / loop.count(LOAD) for loop in kernel.loops), default=0
    ),
    "instructions/sample": lambda kernel, inputs: _heaviest(kernel, r".", inputs),
    "special/sample": lambda kernel, inputs: _heaviest(kernel, r"MUFU", inputs),
    "float64/sample": lambda kernel, inputs: _heaviest(kernel, FLOAT64, inputs),
}
AT_LEAST = ("occupancy", "outputs")
STREAMING = ("instructions/sample", "special/sample", "float64/sample")
# The share by which a limit may lie above what is measured: the next release of nvcc schedules a little differently.
SLACK = 0.05


def _heaviest(kernel: Kernel, pattern: str, inputs: float) -> float:
    return max((kernel.per_sample(loop, pattern, inputs) for loop in kernel.loops), default=0)


class Limit(NamedTuple):
    words: tuple[str, ...]  # the kernels it is for: those with all of these template arguments
    value: float


class Budget:
    """`key value (words value, ...)`, of several that fit a kernel the last."""

    ENTRY = re.compile(r"([a-z0-9/]+) ([\d.]+)%?(?: \(([^()]*)\))?")

    def __init__(self, source: Source):
        self.source = source
        self.limits: dict[str, list[Limit]] = {}
        rest = source.budget
        while rest:
            match = self.ENTRY.match(rest)
            if not match:
                raise ValueError(f"{source.name}: the budget is not understood from here on: {rest!r}")
            key, value, exceptions = match.groups()
            if key not in MEASURES and key != "inputs":
                raise ValueError(f"{source.name}: unknown word {key!r} in the budget")
            self.limits[key] = [Limit((), float(value))]
            for exception in (exceptions or "").split(", ") if exceptions else []:
                *words, number = exception.split()
                self.limits[key].append(Limit(tuple(words), float(number.removesuffix("%"))))
            rest = rest[match.end() :].removeprefix(", ") if rest[match.end() :] else ""

    def limit(self, key: str, kernel: Kernel) -> Limit:
        limits = self.limits.get(key, [Limit((), 0)])
        return [limit for limit in limits if set(limit.words) <= set(kernel.words)][-1]

    def measure(self, key: str, kernel: Kernel) -> float:
        return MEASURES[key](kernel, self.limit("inputs", kernel).value)

    def violations(self, kernel: Kernel) -> list[str]:
        found = []
        if bool(kernel.loops) != bool(self.limit("inputs", kernel).value):
            found.append(f"{kernel}: has {len(kernel.loops)} loops over packs of 16 bytes, unlike its budget's inputs")
        if any(loop.count(r"LDL|STL") for loop in kernel.loops):
            found.append(f"{kernel}: a loop over packs of 16 bytes uses local memory")
        for key in MEASURES:
            has, may = self.measure(key, kernel), self.limit(key, kernel).value
            if has < may if key in AT_LEAST else has > may:
                word = "least" if key in AT_LEAST else "most"
                found.append(f"{kernel}: {key} {has:g}, may have at {word} {may:g}")
        return found

    def looseness(self, compiled: list[Kernel]) -> list[str]:
        """Limits that no kernel comes near, or that are for no kernel."""
        found = []
        for key, limits in self.limits.items():
            for limit in limits:
                mine = [kernel for kernel in compiled if self.limit(key, kernel) == limit]
                name = f"{self.source.name}: {key} {' '.join(limit.words)} {limit.value:g}"
                if not mine:
                    found.append(f"{name}: is for no kernel")
                elif key != "inputs":
                    values = [self.measure(key, kernel) for kernel in mine]
                    nearest = min(values) if key in AT_LEAST else max(values)
                    if abs(limit.value - nearest) > SLACK * nearest + (1 if key in STREAMING[:1] else 0.1):
                        found.append(f"{name}: the nearest has {nearest:g}")
        return found

    def rewritten(self, compiled: list[Kernel]) -> list[str]:
        """The same entries with the values that these kernels have, less the exceptions that are none."""
        entries = []
        for key, limits in self.limits.items():
            values = {}
            for limit in limits:
                mine = [kernel for kernel in compiled if self.limit(key, kernel) == limit]
                if mine:
                    values[limit.words] = self._rounded(key, limit, mine)
            if () not in values:
                # All are exceptions: the first becomes the rule.
                values = {(): values[next(iter(values))], **values}
            for words in list(values)[1:]:
                fewer = {other: value for other, value in values.items() if other != words}
                if all(_stands_for(key, _fitting(fewer, k), _fitting(values, k)) for k in compiled):
                    values = fewer
            unit = "%" if key == "occupancy" else ""
            texts = [" ".join([*words, f"{value:g}{unit}"]) for words, value in values.items()]
            entries.append(f"{key} {texts[0]}" + (f" ({', '.join(texts[1:])})" if texts[1:] else ""))
        return entries

    def _rounded(self, key: str, limit: Limit, compiled: list[Kernel]) -> float:
        if key == "inputs":
            return limit.value
        measured = [self.measure(key, kernel) for kernel in compiled]
        if key in AT_LEAST:
            return min(measured)
        if key == "instructions/sample":
            return math.ceil(1.02 * max(measured))
        return math.ceil(10 * max(measured)) / 10


def _fitting(values: dict[tuple[str, ...], float], kernel: Kernel) -> float:
    return [value for words, value in values.items() if set(words) <= set(kernel.words)][-1]


def _stands_for(key: str, limit: float, exception: float) -> bool:
    """Whether a limit is tight enough for kernels that have the exception's value."""
    near = max(SLACK * exception, 2 if key == "instructions/sample" else 0.5) if key in STREAMING else 0
    return limit == exception or limit - near <= exception <= limit


def write() -> None:
    compiled = [kernel for architecture in ARCHITECTURES for kernel in kernels(architecture)]
    # From the end of each file on, so that the places of the others stay.
    for source in sorted(declared().values(), key=lambda source: -source.span[0]):
        mine = [kernel for kernel in compiled if kernel.source.name == source.name]
        entries = Budget(source).rewritten(mine)
        # What a loop is made of stands on lines of its own.
        first = next((i for i, entry in enumerate(entries) if entry.startswith(STREAMING)), len(entries))
        paragraphs = [", ".join(entries[:first]), *entries[first:]]
        lines = []
        for i, paragraph in enumerate(paragraphs):
            text = ("budget: " if i == 0 else "") + paragraph + ("," if i + 1 < len(paragraphs) else "")
            indents = {"initial_indent": "// " if i == 0 else "//   ", "subsequent_indent": "//     "}
            lines += textwrap.wrap(text, 108, break_long_words=False, **indents)
        start, end = source.span
        content = source.file.read_text()
        source.file.write_text(content[:start] + "\n".join(lines) + "\n" + content[end:])


def main(arguments: list[str]) -> None:
    if arguments == ["--write"]:
        return write()
    keys = list(MEASURES)
    print(" ".join(f"{key.replace('/sample', ''):>12}" for key in keys))
    for architecture in ARCHITECTURES:
        for kernel in kernels(architecture):
            if set(arguments) <= {*kernel.words, kernel.source.name, architecture}:
                budget = Budget(kernel.source)
                print(" ".join(f"{budget.measure(key, kernel):12g}" for key in keys), kernel)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
