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


@functools.cache
def functions(file):
    (path,) = Path(__file__).parents[1].rglob(f"{file}.py")
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("cells", ROWS, ids=lambda cells: cells[0])
def test_a_row_has_a_definition_and_tests_that_exist(cells):
    number, definition, _, pinned = cells
    assert number != "" != definition
    named = re.findall(r"(\w+)::(\w+)", pinned)
    assert ", ".join("::".join(one) for one in named) == pinned != ""
    assert [f"{file}::{name}" for file, name in named if name not in functions(file)] == []


def test_every_column_heading_figure_and_cost_has_a_row(tmp_path):
    runs = [read_run(write_run(tmp_path, kind, kind)) for kind in ("residual", "mhc")]
    names = {"run", "status", "connection", "kind", "seed", "data_seed", "error", *results.measurements(None)}
    names |= {*comparison.rows(runs)[0], *comparison.statistics_rows(group(runs))[0]}
    names |= {*plots.FIGURES, *SWEEP_FIGURES, *(field.name for field in dataclasses.fields(ModelCost))}
    assert names - numbers_page.names() == set()
