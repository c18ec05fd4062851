"""Examples in docstrings print what they say, and every public function of the connections has one."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
from support.tiny_runs import ROOT

from mhc_jax import connections

FILES = [path for path in sorted((ROOT / "mhc_jax").rglob("*.py")) if ">>>" in path.read_text()]


def module_of(path: Path):
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_print_what_they_say(path):
    module = module_of(path)
    finder, runner = doctest.DocTestFinder(recurse=True), doctest.DocTestRunner()
    # The shape checks of the tests wrap functions, which `doctest.testmod` then takes for those of another module.
    members = [m for m in vars(module).values() if getattr(m, "__module__", None) == module.__name__]
    for member in members:
        for test in finder.find(member, getattr(member, "__name__", ""), module=False, globs=dict(vars(module))):
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    assert runner.tries == path.read_text().count(">>> "), "every example ran"


def test_every_public_function_of_the_connections_has_an_example():
    functions = [f for f in map(vars(connections).get, connections.__all__) if inspect.isfunction(f)]
    assert [f.__name__ for f in functions if ">>>" not in (f.__doc__ or "")] == []
