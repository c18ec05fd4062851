"""The README is short, its sentences too, what it names exists, and every command in it runs, on tiny models."""

import re
import shlex

import pytest
from support.in_process import run_here
from support.tiny_runs import ROOT

TEXT = (ROOT / "README.md").read_text()
COMMANDS = [line.partition(" #")[0].strip() for line in TEXT.splitlines() if re.match(r" {4}(python|make) ", line)]
TINY = """--config.model.num_layers=2 --config.model.width=16 --config.model.mlp_width=32 --config.model.num_heads=2
--config.model.num_kv_heads=1 --config.data.sequence_length=16 --config.data.batch_size=2 --config.train.steps=2
--config.optimizer.warmup_steps=1 --config.train.validation_batches=1""".split()
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
