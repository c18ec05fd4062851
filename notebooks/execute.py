"""Execute the notebooks and write the .ipynb beside each .py, as `make notebooks` does.

    python notebooks/execute.py [01_gain_curves ...]

The .py (jupytext, percent format) is the source.  The .ipynb holds the same cells with their outputs.
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

from mhc_jax.reports.record import shortened

HERE = Path(__file__).parent
TIMEOUT = 600
"""Seconds a cell may take."""


def sources() -> list[Path]:
    """Return the .py files of the notebooks."""
    return sorted(HERE.glob("[0-9]*.py"))


def execute(source: Path) -> nbformat.NotebookNode:
    """Execute a notebook and return it without what changes from call to call.

    Cell ids count up, and times, versions and folders are left out.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = jupytext.read(source)
    for k, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{k}"
    place = {"metadata": {"path": str(HERE)}}
    quiet = ["--log-level=ERROR"]  # otherwise every kernel warns that its sockets are not encrypted
    client = NotebookClient(notebook, timeout=TIMEOUT, record_timing=False, resources=place, extra_arguments=quiet)
    client.execute()
    notebook.metadata.pop("language_info", None)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "text" in output:
            output["text"] = shortened(output["text"])
        for kind in ("text/plain", "text/markdown"):
            if kind in output.get("data", {}):
                output["data"][kind] = shortened(output["data"][kind])
    return notebook


def main(names: list[str]) -> None:
    """Execute all notebooks, or those of the given names."""
    for source in sources():
        if not names or source.stem in names:
            nbformat.write(execute(source), source.with_suffix(".ipynb"))
            print(source.with_suffix(".ipynb").name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
