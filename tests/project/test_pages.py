"""The example of a connection works, files that pages name exist, and notebooks execute; tests/numbers.md has every number."""

import ast
import dataclasses
import functools
import importlib
import math
import re
import runpy
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import jupytext
import nbformat
import pytest
from support import numbers_page
from support.synthetic_runs import write_run
from support.tiny_runs import ROOT
from support.tolerances import assert_close

from mhc_jax import connections, plots
from mhc_jax.analysis import comparison
from mhc_jax.analysis.grouping import group
from mhc_jax.analysis.run_reader import read_run
from mhc_jax.config import ModelConfig
from mhc_jax.cost.counts import ModelCost
from mhc_jax.model import Decoder
from mhc_jax.plots.sweeps import SWEEP_FIGURES
from mhc_jax.sweeps import results

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
CONTRACT = ["contract_shapes_and_dtypes", "boundary_is_write_coefficients_read_and_start_writes_nothing"]
CONTRACT += ["every_parameter_has_a_gradient", "dense_fills_in_disabled_components"]


def test_the_example_connection_works_as_printed(monkeypatch):
    page = (DOCS / "your_connection.md").read_text()
    (code,) = re.findall(r"```python\n(# mhc_jax/connections/forget.py\n.*?)```", page, re.DOTALL)
    module = types.ModuleType("forget")
    exec(compile(code, "your_connection.md", "exec"), module.__dict__)
    (line,) = re.findall(r'`("forget": Forget)` in `KINDS`', page)
    monkeypatch.setitem(connections.KINDS, *eval("{" + line + "}", module.__dict__).popitem())

    monkeypatch.syspath_prepend(ROOT / "tests/connections")
    tests = importlib.import_module("test_connections")
    for contract in CONTRACT:
        getattr(tests, f"test_{contract}")("forget")
    model = ModelConfig(vocab_size=31, width=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=24)
    decoder = Decoder(dataclasses.replace(model, connection=connections.parse("forget:init=paper")))
    tokens = jnp.arange(12)[None]
    params = jax.jit(decoder.init)(jax.random.key(0), tokens)
    assert params["params"]["layers"]["mlp_connection"]["bias"].shape == (2, 4 + 4 + 1)
    _, diagnostics = jax.jit(lambda p: decoder.apply(p, tokens, 4))(params)
    kept = 1 / (1 + math.exp(-4))
    for H in diagnostics["res"].reshape(-1, 4, 4):
        assert_close(H, kept * jnp.eye(4))


def test_the_table_has_every_kind():
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(\w+\.py)` \|$", (DOCS / "kinds.md").read_text(), re.MULTILINE)
    assert {kind for kind, _ in rows} == set(connections.KINDS)
    assert all((ROOT / "mhc_jax/connections" / name).exists() for _, name in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_that_a_page_names_exists(page):
    named = set(re.findall(r"(?<![\w/])((?:mhc_jax|kernels|experiments|tests|docs)/[\w/.-]+\.\w+)", page.read_text()))
    named -= {"mhc_jax/connections/forget.py", "experiments/sweeps/mine.py"}  # the examples
    assert [name for name in named if not (ROOT / name).exists()] == []


NOTEBOOKS = runpy.run_path(str(ROOT / "notebooks" / "execute.py"))
SOURCES = NOTEBOOKS["sources"]()
# Drawn whichever records of sweeps are there besides `connections`.
FIGURES = {
    "01_gain_curves": 3,
    "02_training_dynamics": 4,
    "03_streams": 11,
    "04_cost": 3,
    "05_scaling": 0,
    "06_answers": 3,
}
LEAKS = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|opt)/")


def check(notebook, name: str) -> None:
    """Figures, nothing on standard error, no folder of a machine."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in found) >= FIGURES[name]
    assert [output.text for output in found if output.get("name") == "stderr"] == []
    texts = [str({k: v for k, v in o.get("data", {}).items() if k != "image/png"}) + o.get("text", "") for o in found]
    assert [text for text in texts if LEAKS.search(text)] == []


def test_every_notebook_is_known():
    assert [source.stem for source in SOURCES] == list(FIGURES)


@pytest.mark.full
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebooks_execute(source: Path, monkeypatch):
    monkeypatch.setenv("MHC_JAX_TINY", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # halves the compile of the live run
    check(NOTEBOOKS["execute"](source), source.stem)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_committed_notebook_is_in_step_and_executed(source: Path):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    cells = jupytext.read(source).cells
    executed, written = ([(cell.cell_type, cell.source) for cell in cells] for cells in (notebook.cells, cells))
    assert executed == written, "make notebooks"
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    check(notebook, source.stem)


OWN = ["02_training_dynamics", "04_cost", "05_scaling"]
"""Notebooks that train nothing, which takes a test seconds."""


@pytest.mark.parametrize("name", OWN)
def test_one_path_makes_a_notebook_show_other_runs(name, tmp_path, monkeypatch, capsys):
    for k, kind in enumerate(("residual", "hc", "mhc")):
        write_run(tmp_path, f"run-{k}", kind)
    write_run(tmp_path, "lost", "hc", diverged_at=120, config={"model.dtype": "float16"})
    monkeypatch.chdir(ROOT / "notebooks")
    text = (ROOT / "notebooks" / f"{name}.py").read_text()
    text, count = re.subn(r"^RUNS = .*$", f"RUNS = {str(tmp_path)!r}", text, flags=re.MULTILINE)
    assert count == 1
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *items: shown.extend(items))
    exec(compile(text, name, "exec"), {})
    texts = "".join(getattr(item, "data", "") or str(item) for item in shown) + capsys.readouterr().out
    if name == "04_cost":
        assert len([item for item in shown if hasattr(item, "axes")]) >= 3
    else:
        assert "mhc:init=paper" in texts
    if name == "05_scaling":
        assert "swept is not drawn: no number is swept" in texts


def test_every_notebook_has_its_path_at_the_top_and_the_first_one_installs_itself():
    for source in SOURCES[:5]:
        code = [cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code"]
        assert sum("\nRUNS = " in cell for cell in code) == 1
        place = next(k for k, cell in enumerate(code) if "\nRUNS = " in cell)
        assert place == (1 if source.stem == "01_gain_curves" else 0)
    first = next(cell.source for cell in jupytext.read(SOURCES[0]).cells if cell.cell_type == "code")
    exec(first, {})  # nothing happens here, where the package can be imported


def test_a_failing_cell_is_an_error(tmp_path):
    source = tmp_path / "broken.py"
    source.write_text("# %%\nprint(1)\n\n# %%\n1 / 0\n")
    with pytest.raises(Exception, match="ZeroDivisionError"):
        NOTEBOOKS["execute"](source)


@functools.cache
def functions(file):
    (path,) = Path(__file__).parents[1].rglob(f"{file}.py")
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("cells", numbers_page.rows(), ids=lambda cells: cells[0])
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
