"""steptime.py times steps of other commits and of PyTorch beside ours, and says what it lacks for that."""

import re
import subprocess
import sys

import pytest
from support.in_process import run_here
from support.tiny_runs import ROOT

from mhc_jax.config import ExperimentConfig
from mhc_jax.errors import InputError
from mhc_jax.timing import step_times, worker_steps
from mhc_jax.timing.worker_steps import check_out, start_worker, torch_step

TINY = [
    f"--config.model.{name}" for name in ("num_layers=1", "width=16", "num_heads=2", "num_kv_heads=1", "mlp_width=8")
]


def test_mistakes_are_told_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match="git has no commit 'no-such'; give a commit, a tag or a branch"):
        check_out("no-such", tmp_path)
    with pytest.raises(InputError, match="/no/python cannot be run: No such file"):
        torch_step("/no/python", ExperimentConfig(), "hc", 1, False)
    with pytest.raises(InputError, match="has no 'mudd'; it has residual, hc and mhc"):
        torch_step(sys.executable, ExperimentConfig(), "mudd", 1, False)
    with pytest.raises(InputError, match="The process of a step failed"):
        start_worker([sys.executable, "-c", "0"], tmp_path, {})
    with pytest.raises(InputError, match="git has no commit '--help'"):
        check_out("--help", tmp_path)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--against=no-such"], "git has no commit 'no-such'"),
        (["--against=HEAD", "--torch=/no/python"], "/no/python cannot be run: No such file"),
        (["--rounds=0"], "--rounds is '0'; it must be a positive integer."),
        (
            ["--against=HEAD", "--connections=hc", "--config.model.vocab_size=7", "-config.model.width=16"],
            "demo.py:hc --config.model.vocab_size=7 -config.model.width=16 --config.model.vocab_size=264",
        ),
    ],
)
def test_steps_of_others_are_asked_for_before_the_first_compile(monkeypatch, given, told):
    """The last case ends with the settings that the step of another commit gets.  Its vocabulary is that of our step."""

    def no_step(python, checkout, settings):
        raise InputError(" ".join(settings))

    def known(revision, folder):
        """Sources without git have no HEAD; other commits are asked of git."""
        if revision != "HEAD":
            check_out(revision, folder)

    monkeypatch.setattr(worker_steps, "check_out", known)
    monkeypatch.setattr(worker_steps, "jax_step", no_step)
    monkeypatch.setattr(step_times, "compile_step", lambda *_: pytest.fail("compiled first"))
    status, _, err = run_here("steptime", *given)
    assert (status, told in err) == (2, True), err


@pytest.mark.full
def test_a_step_of_another_commit_takes_turns():
    """The commit is the one that is checked out, so that only the row's presence and its number are tested."""
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("the sources are not in a git repository")
    command = [
        sys.executable,
        "experiments/steptime.py",
        "--connections=residual",
        "--rounds=2",
        "--against=HEAD",
        *TINY,
    ]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| residual")]
    assert [row[0] for row in rows] == ["| residual", "| residual at HEAD"]
    ours, theirs = (float(row[1]) for row in rows)
    told = re.search(r"residual at HEAD: residual takes ([\d.]+) of its time", text)
    assert told
    # Both times are rounded to 0.1 ms and their ratio to 0.01.
    assert (ours - 0.05) / (theirs + 0.05) - 0.005 <= float(told[1]) <= (ours + 0.05) / (theirs - 0.05) + 0.005
