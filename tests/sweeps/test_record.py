"""The record of a sweep is whole or absent."""

import json

import pytest
from support.ends import Killed
from support.synthetic_runs import write_run

from mhc_jax.errors import InputError
from mhc_jax.files.json_files import read_json, write_json
from mhc_jax.reports import record


@pytest.fixture
def sweep(tmp_path):
    """The folder of a sweep of two runs with made-up numbers."""
    names = ["hc-seed0", "hc-seed1"]
    (tmp_path / "sweep" / ".sweep" / "runs").mkdir(parents=True)
    for seed, name in enumerate(names):
        folder = write_run(tmp_path / "sweep", name, "hc", seed=seed)
        env = read_json(folder / "env.json") | {"packages": {"jax": "0.10.2"}, "python": "3.11", "device_count": 1}
        (folder / "env.json").write_text(json.dumps(env))
        (tmp_path / "sweep" / ".sweep" / "runs" / f"{name}.json").write_text((folder / "config.json").read_text())
    plan = {"title": "Two runs", "baseline": {}, "bisection": None, "runs": names}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(plan))
    return tmp_path / "sweep"


@pytest.mark.parametrize("where", ["write_csv", "write_runs", "shortened", "_page"])
def test_a_kill_in_the_middle_leaves_no_record_and_the_same_call_writes_it(where, sweep, tmp_path, monkeypatch):
    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(record, where, die)
        with pytest.raises(Killed):
            record.write_record(sweep, tmp_path / "records" / "two")
    assert not (tmp_path / "records" / "two").exists()
    folder = record.write_record(sweep, tmp_path / "records" / "two")
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["two"], "nothing stays aside"
    assert len(record.read_record(folder)) == 2
    assert (folder / "README.md").is_file()
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_run_whose_environment_is_cut_is_named(sweep, tmp_path):
    write_json(sweep / "hc-seed1" / "env.json", {"date": "2026-01-02"})
    with pytest.raises(InputError, match=r"hc-seed1/env\.json has no commit, dirty, device"):
        record.write_record(sweep, tmp_path / "record")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


def test_paths_are_cut_from_values_and_not_from_their_json():
    """In the JSON text of the first value, a letter n stands before the path."""
    assert record.without_paths(
        {
            "detail": "lost\n/home/me/a.txt",
            "source": "/home/me/my texts/a.txt,b/c.txt",
            "command": "/usr/bin/python a.py",
            "error": "/home/me/a.txt is lost; restore /home/me/a.txt",
            "n": [1, {"x": "/tmp/y z"}],
        }
    ) == {
        "detail": "lost\na.txt",
        "source": "a.txt,b/c.txt",
        "command": "python a.py",
        "error": "a.txt is lost; restore a.txt",
        "n": [1, {"x": "y z"}],
    }


def test_a_search_is_recorded_when_it_is_over_and_compares_nothing(sweep, tmp_path):
    plan = read_json(sweep / "sweep.json")
    plan["bisection"] = {"key": "optimizer.learning_rate", "loss_below": 3.0, "over": False}
    write_json(sweep / "sweep.json", plan)
    with pytest.raises(
        InputError, match=r"largest stable optimizer\.learning_rate in .* is not over; run the sweep's command"
    ):
        record.write_record(sweep, tmp_path / "record")
    plan["bisection"]["over"] = True
    write_json(sweep / "sweep.json", plan)
    page = (record.write_record(sweep, tmp_path / "record") / "README.md").read_text()
    assert "A search by bisection chose these runs" in page
    assert "| variant |" not in page


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("/x/a b/c.txt", "a b/c.txt"),
        ('"source": "/x/y/*.zst"', '"source": "*.zst"'),
        ("--config.data.source=/x/y.txt", "--config.data.source=y.txt"),
        ("https://host/path/file", "https://host/path/file"),
        ("model.py:/x/y/z.py", "model.py:z.py"),
        ("texts/a.txt 1/2 +0.1/x", "texts/a.txt 1/2 +0.1/x"),
    ],
)
def test_shortened(text, short):
    assert record.shortened(text) == short
