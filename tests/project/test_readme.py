"""The README is short, its sentences too, what it names exists, and every command in it runs, on tiny models."""

import re
import shlex

import pytest
from support.in_process import run_here
from support.tiny_runs import ROOT

from mhc_jax import connections

TEXT = (ROOT / "README.md").read_text()
COMMANDS = [line.partition(" #")[0].strip() for line in TEXT.splitlines() if re.match(r" {4}(python|make) ", line)]
SIZES = {
    "model": {"num_layers": 2, "width": 16, "mlp_width": 32, "num_heads": 2, "num_kv_heads": 1},
    "data": {"sequence_length": 16, "batch_size": 2},
    "optimizer": {"warmup_steps": 1},
    "train": {"steps": 2, "validation_batches": 1},
}
TINY = [f"--config.{part}.{key}={value}" for part, of in SIZES.items() for key, value in of.items()]
SHORT = {"train": TINY, "compare": [*TINY, "--seeds=1"], "sweep": [*TINY, "--select=1/9"], "report": [], "figure": []}


def prose() -> str:
    """The text without tables, code and pictures."""
    lines = re.sub(r"```.*?```|\$\$.*?\$\$", "", TEXT, flags=re.DOTALL).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("|", "    ", "#", "!")))


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150
    assert len(TEXT.split()) <= 1500
    sentences = re.split(r"(?<=[.!?:])\s+|\n\s*\n|\n- ", prose())
    assert [s for s in sentences if len(s.split()) > 25] == []


def test_it_has_no_commit():
    assert re.findall(r"\b(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b", TEXT) == []


def test_its_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    made = {command.split()[1] for command in COMMANDS if command.startswith("make")}
    assert {"demo", "test"} <= made <= set(targets)


@pytest.mark.full
def test_every_command_runs(tmp_path):
    """In the order of the README, because a report is of runs that an earlier command trained."""
    ran = set()
    for command in COMMANDS:
        if command.startswith("make"):
            continue
        _, script, *arguments = shlex.split(command.replace("runs/", f"{tmp_path}/"))
        name = script.removeprefix("experiments/").removesuffix(".py")
        short = SHORT[name]
        if name == "figure":
            arguments = [a.replace("--output=", f"--output={tmp_path}/") for a in arguments]
        status, _, err = run_here(name, *arguments, *short)
        assert status == 0, f"{command}\n{err}"
        ran.add(name)
    assert ran == set(SHORT)


def cells(file: str) -> list[list[str]]:
    """The cells of all rows of the tables of a page, without bold."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line.startswith("|")]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def test_its_numbers_of_the_demo_are_those_of_the_page_of_the_demo():
    """tests/project/test_numbers_pages.py holds that page against the record."""
    page = {tuple(cell.partition(" (")[0] for cell in row[1:]) for row in cells("docs/demo.md")}
    shown = [row for row in cells("README.md") if len(row) == 5 and re.match(r"[\d–]", row[1])]
    assert len(shown) == 6
    assert [row for row in shown if tuple(row[1:]) not in page] == []


def test_it_has_every_kind_and_its_file():
    rows = [row for row in cells("README.md") if re.fullmatch(r"`\w+\.py`", row[-1])]
    assert {row[0].strip("`") for row in rows} == set(connections.KINDS)
    assert all((ROOT / "mhc_jax" / "connections" / row[-1].strip("`")).is_file() for row in rows)
