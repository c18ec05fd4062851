"""The record of a sweep is whole or absent, and holds what the run folders hold."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.ends import Killed
from support.synthetic_runs import write_run

from mhc_jax.analysis.grouping import group
from mhc_jax.analysis.run_reader import read_run
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.errors import InputError
from mhc_jax.files.json_files import read_json, write_json
from mhc_jax.reports import record
from mhc_jax.reports.record import read_newest, read_record, shortened, write_record, write_runs
from mhc_jax.sweeps.grid import Grid, applied, over, plan, product, seeds, write_plan
from mhc_jax.sweeps.results import result_rows


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


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """Folder of a sweep whose four runs read a file of this machine and have ended."""
    folder, source = tmp_path / "runs" / "pair", "/x/texts/train.jsonl.zst"
    points = product(over("connection", ["residual", "hc"]), seeds(2))
    runs = plan(applied(to_mapping(ExperimentConfig()), {"data.source": source}), points)
    write_plan(folder, Grid("Two kinds, two seeds.", runs))
    for run in runs:
        place = write_run(folder, run.name, run.config.model.connection.kind, seed=run.config.train.seed)
        write_json(place / "config.json", to_mapping(run.config))
        env = {"packages": {"jax": "0.10.2"}, "python": "3.11.7", "device_count": 1, "data": {"source": source}}
        env["command"] = f"python experiments/sweep.py {tmp_path}/pair.py --config.data.source={source}"
        write_json(place / "env.json", read_json(place / "env.json") | env)
        (place / "checkpoints").mkdir()
    return folder


def test_record_of_a_sweep(ended, tmp_path):
    folder = write_record(ended, tmp_path / "records" / "2026-01-02-sweep-pair", metrics=True, note="A note.")
    assert {path.name for path in folder.iterdir()} == {"README.md", "results.csv", "runs.json", "metrics"}
    names = ["hc-seed0", "hc-seed1", "residual-seed0", "residual-seed1"]
    assert sorted(path.name for path in (folder / "metrics").iterdir()) == [f"{name}.jsonl" for name in names]
    for path in folder.rglob("*.*"):
        assert not any(place in path.read_bytes() for place in (b"/home", str(tmp_path).encode())), path
    readme = (folder / "README.md").read_text()
    for part in (
        "\n    python experiments/sweep.py pair.py --config.data.source=train.jsonl.zst\n",
        "Shared settings that are not defaults: data.source=train.jsonl.zst.",
        "4 runs: 4 finished",
        "| hc | 2 | 1.6",
        "A note.",
    ):
        assert part in readme
    settings = group(read_record(folder))
    assert [setting.label for setting in settings] == ["hc", "residual"]
    assert len(settings[0].any_run.train["step"]) == 100
    assert [run.folder for run in read_newest(folder.parent, "pair")] == [folder / name for name in names]
    with pytest.raises(
        InputError, match=r"no record of the sweep 'width' yet; make it with `python experiments/sweep\.py"
    ):
        read_newest(folder.parent, "width")


def test_a_run_is_listed_with_the_settings_it_was_trained_with(ended, tmp_path):
    before = result_rows(ended)
    shutil.copytree(ended, tmp_path / "sweep")
    planned = tmp_path / "sweep" / ".sweep" / "runs" / "hc-seed0.json"
    planned.write_text(planned.read_text().replace('"learning_rate": 0.0', '"learning_rate": 0.1'))
    assert planned.read_text() != (ended / ".sweep" / "runs" / "hc-seed0.json").read_text()
    assert result_rows(tmp_path / "sweep") == before
    of_old = tmp_path / "sweep" / "hc-seed0" / "config.json"
    config = read_json(of_old)
    del config["data"]["seed"], config["optimizer"]["grad_clip"]
    write_json(of_old, config)
    assert result_rows(tmp_path / "sweep") == before


def test_record_without_metrics_has_summaries_alone(ended, tmp_path):
    runs = read_record(write_record(ended, tmp_path / "record"))
    assert [len(run.train["step"]) for run in runs] == [0, 0, 0, 0]
    assert all(run.result("validation_loss") for run in runs)
    assert runs[0].tokens == 200 * runs[0].config["data"]["batch_size"] * runs[0].config["data"]["sequence_length"]
    with (tmp_path / "record" / "results.csv").open() as table:
        assert len(list(csv.DictReader(table))) == 4


def test_runs_of_a_record_are_those_of_the_run_folders(ended, tmp_path):
    """Every value comes back with its type, also where one run has another value or lacks the key."""
    folders = {name: ended / name for name in ("hc-seed0", "hc-seed1", "residual-seed0", "residual-seed1")}
    config = read_json(folders["hc-seed1"] / "config.json")
    config["model"]["connection"]["disable"] = ["pre", "post"]
    config["optimizer"] |= {"grad_clip": int(config["optimizer"]["grad_clip"]), "extra": {"a": {"b": []}}}
    write_json(folders["hc-seed1"] / "config.json", config)
    env = read_json(folders["residual-seed0"] / "env.json")
    write_json(folders["residual-seed0"] / "env.json", {**env, "packages": {"a.b": "1"}, "optimizer": [{"x/y": 1}]})
    before = [read_run(folder) for folder in folders.values()]
    texts = []
    for place in (tmp_path / "one", tmp_path / "two"):
        place.mkdir()
        write_runs([*folders.values()][:: 1 if place.name == "one" else -1], place, metrics=True)
        texts.append((place / "runs.json").read_text())
    assert texts[0] == texts[1]
    for old, new in zip(before, read_record(tmp_path / "one"), strict=True):
        for part in ("config", "env", "summary"):
            expected = shortened(json.dumps(getattr(old, part), sort_keys=True))
            assert json.dumps(getattr(new, part), sort_keys=True) == expected
        assert new.name == old.name
        assert new.events == old.events
        for part in ("train", "validation"):
            columns, expected = getattr(new, part), getattr(old, part)
            assert list(columns) == list(expected)
            assert all(np.array_equal(columns[key], expected[key], equal_nan=True) for key in columns)
        assert len(new.diagnostics) == len(old.diagnostics)
    written = json.loads(texts[0])
    assert written["config"]["model"]["width"] == before[0].config["model"]["width"]
    assert "model.connection.disable" in written["runs"][1]["config"]
    (line,) = [line for line in texts[0].splitlines() if '"hc-seed1"' in line]
    assert json.loads(line.rstrip(",")) == written["runs"][1]


def test_a_sweep_with_a_run_that_has_not_ended_is_refused_unless_told(ended, tmp_path):
    begun, interrupted, pending = ("hc-seed1", "hc-seed0", "residual-seed1")
    (ended / begun / "summary.json").unlink()
    summary = ended / interrupted / "summary.json"
    write_json(summary, read_json(summary) | {"status": "interrupted"})
    shutil.rmtree(ended / pending)
    with pytest.raises(InputError, match=rf"3 of 4 runs .*\({pending}, {interrupted}, {begun}\); .*--unfinished"):
        write_record(ended, tmp_path / "record")
    assert not (tmp_path / "record").exists()
    write_record(ended, tmp_path / "record", unfinished=True)
    readme = (tmp_path / "record" / "README.md").read_text()
    assert all(f"1 {status}" in readme for status in ("finished", "begun", "interrupted", "pending"))
    assert [run.name for run in read_record(tmp_path / "record")] == ["residual-seed0"]
    with pytest.raises(InputError, match="there already"):
        write_record(ended, tmp_path / "record", unfinished=True)
    shutil.rmtree(ended / "residual-seed0")
    with pytest.raises(InputError, match="No run of"):
        write_record(ended, tmp_path / "nothing", unfinished=True)
    with pytest.raises(InputError, match="is no record"):
        read_record(tmp_path / "nothing")
