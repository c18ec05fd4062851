"""Names of folders, runs, titles and values in a page are text: no link and no script comes of them."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from support.synthetic_runs import write_run

from mhc_jax.analysis.comparison import Cell
from mhc_jax.reports import page as reports
from mhc_jax.reports.markup import markdown_table, relative_link
from mhc_jax.reports.page import write_folder_report

SCRIPT = "<script>alert(1)<"
ATTRIBUTE = 'x" onmouseover="alert(2)'
SCHEME = "javascript:alert(3)"
DATA = "data:text,x&#58;?a#b%41"
LOST = "é\udcff"
NAMES = (SCRIPT, ATTRIBUTE, SCHEME, DATA, LOST, " spaced ", "'&amp;")


class Page(HTMLParser):
    """The elements of a page: how many there are of each, addresses of links, and names of attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.counts: dict[str, int] = {}
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href") and value]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[Path, Page]:
    folder = tmp_path_factory.mktemp("report") / "x<b>"
    for k, name in enumerate(NAMES):
        config = {"data.source": f"<script>alert(5)</script>{k}", "data.tokenizer": ATTRIBUTE}
        run = write_run(folder, name, "mhc", seed=k, spikes=(90,), config=config)
        (run / "env.json").write_text(
            json.dumps({"command": SCRIPT, "commit": SCRIPT, "device": ATTRIBUTE, "date": SCRIPT})
        )
        with (run / "metrics.jsonl").open("a") as file:
            event = {"kind": "event", "step": 100, "event": SCRIPT, "detail": SCRIPT, ATTRIBUTE: SCHEME}
            file.write(json.dumps(event) + "\n")
    runs = [*NAMES, SCRIPT + "2"]
    (folder / "sweep.json").write_text(json.dumps({"title": f"{SCRIPT}$nav{ATTRIBUTE}", "baseline": {}, "runs": runs}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reports.plots, "FIGURES", {"loss": reports.plots.FIGURES["loss"]}
        )  # one figure, with the names as labels
        patch.setattr(reports, "SWEEP_FIGURES", {})
        return folder, Page(write_folder_report(folder).read_text())


def test_no_name_becomes_an_element_or_an_attribute(page):
    _, found = page
    assert found.counts["script"] == 1  # the page's own, which sorts tables
    assert not {name for name in found.attributes if name.startswith("on")}
    assert "b" not in found.counts
    assert found.counts["svg"] == 2


def test_links_are_relative_and_lead_to_the_folders(page):
    folder, found = page
    for link in found.links:
        assert link.startswith(("#", "./", "data:image/png;base64,")), link
        assert urlsplit(link).scheme == ("data" if link.startswith("data:image/") else "")
    targets = {
        os.path.normpath(os.path.join(folder, unquote(link, errors="surrogateescape")))
        for link in found.links
        if link[0] == "." and not link.startswith("./figures/loss.")
    }
    assert targets == {str(folder / name) for name in NAMES}
    assert all(os.path.isdir(os.fsencode(target)) for target in targets)


def test_a_link_upwards_and_one_to_the_same_folder(tmp_path):
    assert relative_link(tmp_path / "a", tmp_path / "b") == "./../a"
    assert relative_link(tmp_path, tmp_path) == "./."


def test_a_table_in_markdown_has_as_many_cells_as_headings():
    table = markdown_table([{"run": Cell("a|b\n| c <script>", None), "loss": Cell("1", 1.0)}])
    lines = table.splitlines()
    assert len(lines) == 3
    assert len(re.findall(r"(?<!\\)\|", lines[2])) == 3
