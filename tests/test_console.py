"""What the commands say where something fails, whatever the command does."""

import click
import pytest
import torch
from click.testing import CliRunner

from refine_ext.cli import main
from refine_ext.console import EXIT_ERROR, reporting_errors


def failing(error: BaseException, *less_memory: str) -> click.Command:
    @click.command()
    @reporting_errors(*less_memory)
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("f: x must be\n positive"), "f: x must be positive"),
        (FileNotFoundError(2, "No such file or directory", "a.npy"), "a.npy: No such file or directory"),
        (ModuleNotFoundError("f needs SciPy"), "f needs SciPy"),
        (KeyError("k"), "KeyError: 'k' (--debug shows where)"),
        (MemoryError(), "out of memory; use less (no details)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory; use less (CUDA out of memory. Tried)"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
            "out of memory; use less (DefaultCPUAllocator: can't allocate memory: you tried 8 bytes)",
        ),
    ],
)
def test_one_line(error, line):
    result = CliRunner().invoke(failing(error, "less"), [])
    assert result.exit_code == EXIT_ERROR and result.stderr == f"error: {line}\n"


def test_no_advice_where_there_is_none():
    assert CliRunner().invoke(failing(MemoryError()), []).stderr == "error: out of memory (no details)\n"


def test_debug_shows_where():
    error = KeyError("k")
    assert CliRunner().invoke(failing(error), ["--debug"]).exception is error


def out_of_memory(*args, **kwargs):
    raise MemoryError


@pytest.mark.parametrize(
    ("command", "given", "advice"),
    [
        ("refine", ("--real", "x.npy", "--generated", "x.npy", "--out", "y.npy"), "a smaller --memory or --train-rows"),
        ("demo", (), "--quick"),
        ("rademacher", ("--outputs", "x.npy"), "a smaller --memory"),
        ("bound", ("--data", "x.npy"), "fewer samples, or a smaller --batch-size with --model"),
    ],
)
def test_commands_advise_what_they_have(command, given, advice, monkeypatch):
    monkeypatch.setattr("refine_ext.io.open_rows", out_of_memory)
    monkeypatch.setattr("refine_ext.demo.require_extras", out_of_memory)
    result = CliRunner().invoke(main, [command, *given])
    assert result.stderr == f"error: out of memory; use {advice} (no details)\n"
    options = {option for parameter in main.commands[command].params for option in parameter.opts}
    assert {word.strip(",") for word in advice.split() if word.startswith("--")} <= options
