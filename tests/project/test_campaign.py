"""The campaign's own parts work: its log, its choice of trials, its damages, and a slice of each part that starts commands."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from campaign import damage, digests, numerics
from campaign.trials import Log, Part, Trial, next_trial, table
from support.tiny_runs import PATIENCE_S, ROOT

RUN = ROOT / "tests" / "campaign" / "run.py"


def test_a_log_goes_on_where_a_killed_campaign_ended(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    log.add(Trial("kills", "train", "0/kills/train/0", kills=3, restarts=3, moments={"random": 3}, seconds=4.0))
    log.add(Trial("disk", "train", "0/disk/train/0", seconds=1.0).fail("lost", "a line"))
    path.write_bytes(path.read_bytes()[:-9])
    again = Log(path)
    assert [trial.number for trial in again.trials] == [1]
    assert again.trials[0] == log.trials[0]
    parts = [Part(name, {"train": 1.0, "sweep": 3.0}, lambda *_: None, limit=2) for name in ("kills", "disk")]
    drawn = []
    while found := next_trial(again, parts, "0"):
        drawn.append(found[1].seed)
        again.add(found[1])
    assert drawn[0] == "0/disk/train/0"
    assert sorted([*drawn, "0/kills/train/0"]) == sorted(
        f"0/{p}/{c}/{k}" for p in ("disk", "kills") for c in ("sweep", "train") for k in (0, 1)
    )
    assert "| kills | train | 2 | 2 | 3 | random 3 | 3 | equal 2 | 0 |" in table(again)


@pytest.mark.parametrize("kind", damage.KINDS)
def test_every_kind_of_damage_changes_a_file(kind, tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    changed = 0
    for seed in range(4):
        for path in paths:
            path.rmdir() if path.is_dir() else None
            path.write_text(path.name * 50)
        damage.harm(paths[0], kind, random.Random(seed), paths)
        changed += not paths[0].is_file() or paths[0].read_bytes() != b"a" * 50
    assert changed >= 1
    assert set(os.listdir(tmp_path)) <= {"a", "b"}


def test_digests_name_what_differs():
    assert digests.differing({"a": "1", "files": "x y"}, {"a": "2", "files": "y z"}) == [
        "a: 1 -> 2",
        "files: missing [x], more [z]",
    ]


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_sinkhorn_problems_hold_and_a_wrong_one_is_found(eps, monkeypatch):
    found = numerics.check("xla", 3, "float32", eps, 400, 0)
    assert sum(found.pop("kinds").values()) == 400
    assert found == {}
    monkeypatch.setattr(numerics, "ITERATIONS", 2)
    right = numerics.float64_sinkhorn
    monkeypatch.setattr(numerics, "float64_sinkhorn", lambda x, eps: right(x, eps).swapaxes(0, 1))
    assert {"entries", "columns"} <= set(numerics.check("xla", 3, "float32", eps, 400, 0))


@pytest.mark.full
@pytest.mark.parametrize(
    ("part", "cases"),
    [
        ("kills", "train,tokenizer,convert"),
        ("disk", "tokenizer,train"),
        ("damage", "train: its run folder,generate: a model folder"),
        ("others", "SIGTERM,two at once"),
    ],
)
def test_a_slice_of_the_campaign(part, cases, tmp_path):
    log = tmp_path / "log.jsonl"
    command = [
        sys.executable,
        str(RUN),
        f"--only={part}",
        f"--case={cases}",
        f"--trials={1 + cases.count(',')}",
        f"--log={log}",
        "--seed=suite",
    ]
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command += [f"--patience={PATIENCE_S}", f"--scratch={tmp_path / 'scratch'}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(Path(log).read_text().splitlines()) == 1 + cases.count(",")
    assert all(
        json.loads(line)["verdict"] in ("equal", "refused", "recovered") for line in log.read_text().splitlines()
    )
