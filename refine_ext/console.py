"""What the commands share: their own parameter types, and errors as one line."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

EXIT_ERROR, EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 3, 130, 143
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class Size(click.ParamType):
    """A number of bytes: 500MiB, 2G, 1073741824."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([kmgt]?)(?:i?b)?", str(value).strip().lower())
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is no size; write 500MiB, 2G or a number of bytes", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class Draws(click.ParamType):
    """`all`, or a positive number."""

    name = "integer|all"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        if value == "all" or (isinstance(value, int) and value > 0):
            return value
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is neither `all` nor a positive number", param, ctx)
        return int(value)


class AutoOrNumber(click.ParamType):
    """`auto`, which becomes None, or a number in a range."""

    def __init__(self, low: float, high: float, *, open_below: bool = False) -> None:
        self.low, self.high, self.open_below = low, high, open_below
        self.range = f"a number from {low:g} to {high:g}" if high < math.inf else f"a number above {low:g}"
        self.name = f"auto|{low:g}..{high:g}" if high < math.inf else "auto|number"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | None:
        if value is None or value == "auto":
            return None
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        above = number > self.low if self.open_below else number >= self.low
        if not (above and number <= self.high and math.isfinite(number)):
            self.fail(f"{value!r} is neither `auto` nor {self.range}", param, ctx)
        return number


class Times(click.ParamType):
    """Numbers with commas between them, or FROM:TO:COUNT for equally spaced ones."""

    name = "t,t,...|from:to:count"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            if ":" not in value:
                return [float(part) for part in value.split(",")]
            first, last, count = value.split(":")
            low, high, number = float(first), float(last), int(count)
        except ValueError:
            self.fail(f"{value!r} is neither numbers such as 0.2,0.5,1 nor FROM:TO:COUNT", param, ctx)
        if number < 2:
            self.fail(f"{value!r} has a count below 2", param, ctx)
        return [low + (high - low) * k / (number - 1) for k in range(number - 1)] + [high]


class Constant(click.ParamType):
    """NAME=VALUE."""

    name = "name=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        name, equals, number = value.partition("=")
        try:
            if equals and name:
                return name.strip(), float(number)
        except ValueError:
            pass
        self.fail(f"{value!r} is not NAME=VALUE", param, ctx)


def terminate(signum: int, frame: Any) -> NoReturn:
    """A signal as an exception, so that temporaries are removed on the way out."""
    raise SystemExit(EXIT_TERMINATED)


def reporting_errors(less_memory: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One line on stderr and a non-zero exit where the command fails; the traceback only with --debug.

    `less_memory`: what the user of this command can do where memory runs out.
    """

    def reporting(command: Callable[..., Any]) -> Callable[..., Any]:
        @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
        @functools.wraps(command)
        def run(*args: Any, debug: bool, **kwargs: Any) -> None:
            try:
                command(*args, **kwargs)
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except KeyboardInterrupt:
                click.echo("\ninterrupted: nothing was written", err=True)
                sys.exit(EXIT_INTERRUPTED)
            except Exception as error:
                if debug:
                    raise
                click.echo(f"error: {_one_line(error, less_memory)}", err=True)
                sys.exit(EXIT_ERROR)

        return run

    return reporting


def _one_line(error: Exception, less_memory: str) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        # str() of one would lead with its number
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        text = f"out of memory{less_memory and '; use '}{less_memory} ({text[:120] or 'no details'})"
    elif not isinstance(error, (ValueError, TypeError, OSError, ModuleNotFoundError)):
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    return text
