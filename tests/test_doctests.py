"""The examples in the public docstrings run, on the installed package."""

import doctest
import importlib
import pkgutil

import pytest

import refine_ext

MODULES = [m.name for m in pkgutil.iter_modules(refine_ext.__path__) if not m.name.startswith(("_", "lib"))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_module(name):
    module = importlib.import_module(f"refine_ext.{name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_every_public_function_has_an_example():
    finder = doctest.DocTestFinder(recurse=False)
    without = [
        name
        for name in refine_ext.__all__
        if callable(value := getattr(refine_ext, name))
        and not isinstance(value, type)
        and not any(test.examples for test in finder.find(value, name))
    ]
    assert without == []
