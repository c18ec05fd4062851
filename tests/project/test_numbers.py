"""tests/numbers.md: every number has a row, every row a definition and a test that is there."""

import ast
import dataclasses
import functools
import re
from pathlib import Path

import pytest
from support import numbers_page
from support.synthetic_runs import write_run

from mhc_jax import comparison, plots, results
from mhc_jax.cost import ModelCost
from mhc_jax.plots.sweeps import SWEEP_FIGURES
from mhc_jax.records import read_run
from mhc_jax.settings import group

ROWS = numbers_page.rows()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [read_run(write_run(root, kind, kind)) for kind in ("residual", "mhc")]


@functools.cache
def functions(file):
    (path,) = Path(__file__).parents[1].rglob(f"{file}.py")
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("cells", ROWS, ids=lambda cells: cells[0])
def test_a_row_has_a_definition_and_tests_that_exist(cells):
    assert len(cells) == 4
    number, definition, _, pinned = cells
    assert number
    assert definition
    named = re.findall(r"(\w+)::(\w+)", pinned)
    assert ", ".join("::".join(one) for one in named) == pinned != ""
    missing = [f"{file}::{name}" for file, name in named if name not in functions(file)]
    assert not missing


def test_columns_of_results_have_rows():
    columns = {"run", "status", "connection", "kind", "seed", "data_seed", "error", *results.measurements(None)}
    assert columns - numbers_page.names() == set()


def test_headings_of_tables_have_rows(runs):
    headings = {*comparison.rows(runs)[0], *comparison.statistics_rows(group(runs))[0]}
    assert headings - numbers_page.names() == set()


def test_figures_have_rows():
    assert {*plots.FIGURES, *SWEEP_FIGURES} - numbers_page.names() == set()


def test_costs_of_a_model_have_rows():
    assert {field.name for field in dataclasses.fields(ModelCost)} - numbers_page.names() == set()
