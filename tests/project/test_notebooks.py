"""The committed notebooks are in step with their sources, show what they should, and execute without an error."""

import re
import runpy
from pathlib import Path

import jupytext
import nbformat
import pytest
from support.tiny_runs import ROOT

NOTEBOOKS = runpy.run_path(str(ROOT / "notebooks" / "execute.py"))
SOURCES = NOTEBOOKS["sources"]()
FIGURES = {"01_gain_curves": 3, "02_training_dynamics": 4, "03_streams": 7, "04_cost": 3, "05_scaling": 0}
"""Drawn whichever records of sweeps are there besides `connections`."""
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
def test_executes(source: Path, monkeypatch):
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


def test_a_failing_cell_is_an_error(tmp_path):
    source = tmp_path / "broken.py"
    source.write_text("# %%\nprint(1)\n\n# %%\n1 / 0\n")
    with pytest.raises(Exception, match="ZeroDivisionError"):
        NOTEBOOKS["execute"](source)
