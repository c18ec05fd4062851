"""Wherever mHC stands beside a number, its init stands there too: report, figures, records, README, notebooks."""

import html
import json
import re

import pytest
from support.synthetic_runs import make_run
from support.tiny_runs import ROOT

from mhc_jax import plots
from mhc_jax.report import write_report
from mhc_jax.settings import group, mean_record

MHC = re.compile(r"\bm[hH][cC]\b(?![_\w]*\.|-|'s paper| (?:Table|Figure|Eq|section|ICML))")
"""mHC as a run or a result: neither a file name nor a place in the paper."""
KEEPS_ITS_NAME = ("Kind", "What to change", "Formula", "Letter", "`model.remat`", "Notebook")
"""Heads of tables of what there is, without a result in them."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three seeds of each connection, and mHC with two inits."""
    root, out = tmp_path_factory.mktemp("runs"), []
    for kind, config in (("residual", {}), ("hc", {}), ("mhc", {}), ("mhc", {"init": "home", "t_max": 5})):
        config = {f"model.connection.{key}": value for key, value in config.items()}
        out += [make_run(root, f"{len(out) + k}", kind, seed=k, config=config) for k in range(3)]
    return out


def rows_without_init(text):
    """Rows of Markdown tables that name mHC, in their first cells or in the heading row, and not its init."""
    wrong = []
    for table in re.findall(r"^\|.*(?:\n\|.*)*", text, re.MULTILINE):
        for k, line in enumerate(table.splitlines()):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            head = cells if k == 0 else head
            named = not set(head) & set(KEEPS_ITS_NAME) and any(
                MHC.search(cell) for cell in cells[: None if k == 0 else 2]
            )
            if named and "init=" not in line and "`home`" not in line:
                wrong.append(line)
    return wrong


def test_the_report_and_its_figures_name_the_init(runs, tmp_path, monkeypatch):
    """What a page says outside its figures, and every text in them; they are drawn and not rendered."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path, vector: figures.append((path.stem, figure)))
    monkeypatch.setattr(plots, "svg", lambda figure: "")
    page = write_report(runs, tmp_path, "Runs").read_text()
    page = re.sub(r"<script.*?</script>|<style.*?</style>|<details.*?</details>", "", page, flags=re.DOTALL)
    for block in re.findall(r"<(?:tr|li|figcaption)>(.*?)</(?:tr|li|figcaption)>", page, re.DOTALL):
        text = html.unescape(re.sub(r"<[^>]*>", " ", block))
        assert not MHC.search(text) or "init=" in text, text
    assert "mhc:init=paper" in page
    assert "mhc:init=home:t_max=5" in page
    drawn = [name for name, _ in figures]
    assert set(drawn) == {*plots.FIGURES, "gap_curves", "seed_bands", "seed_strip"} - {"loss_gap"}
    means = [mean_record(setting) for setting in group(runs)]
    for name, figure in [*figures, ("loss_gap", plots.FIGURES["loss_gap"].draw(means))]:
        for text in figure.findobj(lambda artist: hasattr(artist, "get_text")):
            assert not MHC.search(text.get_text()) or "init=" in text.get_text(), (name, text.get_text())


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("experiments/records/*/README.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_the_readme_and_records_name_the_init(path):
    assert rows_without_init(path.read_text()) == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_name_the_init(path):
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    for cell in cells:
        for output in cell.get("outputs", []):
            texts += ["".join(output.get("data", {}).get("text/markdown", "")), "".join(output.get("text", ""))]
    for text in texts:
        assert rows_without_init(text) == []
        for paragraph in re.findall(r"(?:^|\n)\*[^*\s].*?\*(?=\n\n|\n#|$)", text, re.DOTALL):  # captions of figures
            assert not MHC.search(paragraph) or "init=" in paragraph or "paper's" in paragraph, paragraph
