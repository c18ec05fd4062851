"""A run that has ended and whose files have changed since is refused by pages and told in the table."""

import json

import pytest
from support.synthetic_runs import write_run
from support.tiny_runs import tiny

from mhc_jax.analysis.run_reader import read_run
from mhc_jax.config.mapping import to_mapping
from mhc_jax.errors import InputError
from mhc_jax.reports.page import find_runs
from mhc_jax.runs import checksums
from mhc_jax.runs.checksums import remove_summary, write_summary
from mhc_jax.sweeps.grid import Grid, plan, write_plan
from mhc_jax.sweeps.results import result_rows


@pytest.mark.parametrize("name", ["config.json", "env.json", "metrics.jsonl", "summary.json"])
def test_one_changed_digit_of_a_run_that_has_ended_is_refused_by_pages(name, tmp_path):
    folder = write_run(tmp_path, "run", "hc")
    (folder / "env.json").write_text('{"commit": "1"}')
    write_summary(folder, json.loads((folder / "summary.json").read_text()))
    assert read_run(folder).status == "finished"
    text = (folder / name).read_text()
    (folder / name).write_text(text[::-1].replace("1", "2", 1)[::-1])
    with pytest.raises(InputError, match=rf"{name} is damaged: its SHA-256 is not .* remove .*checksums.json to use"):
        read_run(folder)
    remove_summary(folder)
    assert read_run(folder).summary is None


@pytest.mark.parametrize("harm", ["removed", "a folder", "cut"])
def test_a_run_that_has_ended_without_its_metrics_is_told_in_the_table_and_refused_by_the_page(harm, text, tmp_path):
    (run,) = plan(to_mapping(tiny(text, "residual")), [{"optimizer.learning_rate": 0.5}])
    write_plan(tmp_path, Grid("One run", [run]))
    for folder in (write_run(tmp_path, run.name, "residual"), write_run(tmp_path, "other", "residual")):
        (folder / "env.json").write_text('{"commit": "1"}')
        write_summary(folder, json.loads((folder / "summary.json").read_text()))
    (row,) = result_rows(tmp_path)
    assert (row["status"], row["error"]) == ("finished", None)
    file = tmp_path / run.name / "metrics.jsonl"
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:20])
    else:
        file.unlink()
    if harm == "a folder":
        file.mkdir()
    (row,) = result_rows(tmp_path)
    told = "metrics.jsonl is damaged" if harm == "cut" else "it has no metrics.jsonl"
    assert (row["status"], row["validation_loss"], told in row["error"]) == ("finished", None, True)
    with pytest.raises(InputError, match=told):
        find_runs(tmp_path)


@pytest.mark.parametrize("name", ["summary.json", "env.json", "checksums.json"])
@pytest.mark.parametrize("harm", ["removed", "a folder"])
def test_a_run_that_has_ended_and_lacks_a_file_is_refused_by_pages(name, harm, tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "WRITING_S", 0.0)
    folder = write_run(tmp_path, "run", "hc")
    (folder / "env.json").write_text('{"commit": "1"}')
    write_summary(folder, json.loads((folder / "summary.json").read_text()))
    (folder / name).unlink()
    if harm == "a folder":
        (folder / name).mkdir()
    elif name == "checksums.json":
        assert read_run(folder).status == "finished", "an older version wrote none"
        return
    with pytest.raises(InputError, match=rf"{name} (cannot be read|is damaged)"):
        read_run(folder)
